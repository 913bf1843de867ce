"""Interactive figures of a search for its page, by Optuna's own functions; they need plotly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m2gen.pipeline import Tuned
from m2gen.tune.knobs import evaluated
from m2gen.tune.trial import Trial

if TYPE_CHECKING:
    from optuna.study import Study

MISSING = "Figures need plotly: pip install 'm2gen[report]'."


def available() -> bool:
    """Return whether figures can be drawn."""
    from optuna.visualization import is_available

    return bool(is_available())


def script() -> str:
    """Return the script that all figures of a page need, which refers to no other file."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def history(study: Study, tuned: Tuned) -> str:
    """Return the figure of every trial's time and the best so far; none takes more room than 1.5 times the default."""
    from optuna.visualization import plot_optimization_history

    outcome = tuned.outcome
    passed = [(number, trial) for number, trial in enumerate(outcome.trials, 1) if trial.median_ms is not None]
    if not passed:
        return ""
    figure = plot_optimization_history(study, target_name="milliseconds")
    words = [_words(number, trial, tuned) for number, trial in passed]
    figure.update_traces(text=words, hovertemplate="%{text}<extra></extra>", selector={"name": "milliseconds"})
    times = [trial.median_ms or 0.0 for _, trial in passed]
    default = next((t.median_ms for _, t in passed if t.schedule == outcome.default and t.median_ms), None)
    figure.update_yaxes(range=[0.95 * min(times), max(1.5 * (default or max(times)), 1.05 * min(times))])
    if default is not None:
        figure.add_hline(y=default, line_dash="dash", annotation_text="default")
    return _html(figure)


def importance(study: Study) -> str:
    """Return the figure of each knob's importance; empty where too few trials passed."""
    from optuna.visualization import plot_param_importances

    arguments = evaluated(study)
    return _html(plot_param_importances(study, **arguments)) if arguments["params"] else ""


def _words(number: int, trial: Trial, tuned: Tuned) -> str:
    words = trial.schedule.describe(tuned.outcome.default)
    return f"{number}: {words} ({trial.origin}), {trial.median_ms:.3f} ms"


def _html(figure: Any) -> str:
    figure.update_layout(title=None, margin={"t": 20, "b": 40}, height=360, template="plotly_white")
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))
