"""Samplers for spaces that are too large to try every point. Imports nothing, for the command line."""

from enum import StrEnum


class Sampler(StrEnum):
    """The source of the next candidate."""

    TPE = "tpe"
    """Optuna's multivariate tree-structured Parzen estimator, with a constant liar for running candidates."""
    RANDOM = "random"
    """Points in a seeded order, as a baseline."""
