"""How a space is searched that is too large to be tried as a whole; imports nothing, for the command line."""

from enum import StrEnum


class Sampler(StrEnum):
    """Who proposes the next candidate."""

    TPE = "tpe"
    """Optuna's multivariate tree-structured Parzen estimator, with a constant liar for what is running."""
    RANDOM = "random"
    """Points in a seeded order: the baseline."""
