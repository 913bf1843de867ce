"""Importance of knobs: how much each decides whether a call is fast, as Optuna's PED-ANOVA has it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from m2gen.tune.study import created, state_of
from m2gen.tune.trial import Trial

if TYPE_CHECKING:
    from optuna.study import Study

FEWEST = 8
"""Fewest passed trials from which importances are computed."""


def study_of(trials: Iterable[Trial]) -> Study:
    """Return a study of trials in their order, in memory, with what the final found out of each."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    for trial in trials:
        state, values = state_of(trial)
        study.add_trial(created(state, trial.schedule, {}, values))
    return study


def evaluated(study: Study) -> dict[str, Any]:
    """Return the arguments of Optuna's functions of importance: the evaluator, and the knobs in which trials differ.

    A search dwells where calls are fast, so trials are no even sample of a space: this is importance among them. No
    knobs where too few trials passed.
    """
    from optuna.importance import PedAnovaImportanceEvaluator

    passed = [trial.params for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    differ = [name for name in passed[0] if len({params[name] for params in passed}) > 1] if passed else []
    return {"evaluator": PedAnovaImportanceEvaluator(), "params": differ if len(passed) >= FEWEST else []}


def importances(study: Study) -> dict[str, float]:
    """Return the importance of each knob in which trials differ, the largest first; together they are 1."""
    from optuna.importance import get_param_importances

    arguments = evaluated(study)
    return get_param_importances(study, **arguments) if arguments["params"] else {}
