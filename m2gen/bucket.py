"""Buckets of calls by the number of programs for each SM, which is what decides between schedules."""

from __future__ import annotations

from bisect import bisect_left
from enum import StrEnum

HALVES = (1, 2, 4, 8, 16)
"""Upper bounds of all buckets but the last, in half programs per SM. Generated packages carry this table."""


class Bucket(StrEnum):
    """Programs per SM, one for each head of each sequence: from a GPU that is half idle to one of several waves."""

    HALF = "<=0.5"
    ONE = "<=1"
    TWO = "<=2"
    FOUR = "<=4"
    EIGHT = "<=8"
    MORE = ">8"

    @property
    def place(self) -> int:
        """Index in the order of sizes."""
        return BUCKETS.index(self)


BUCKETS = tuple(Bucket)


def most_sequences(heads: int, sm_count: int) -> tuple[int, ...]:
    """Return the largest number of sequences of ``heads`` heads in each bucket but the last, for ``sm_count`` SMs."""
    return tuple(halves * sm_count // (2 * heads) for halves in HALVES)


def bucket_of(sequences: int, heads: int, sm_count: int) -> Bucket:
    """Return the bucket of ``sequences`` (B, or the packed ones) with N ``heads`` each, on ``sm_count`` SMs.

    The sequence length plays no part: steps follow each other, whatever the schedule.
    """
    return BUCKETS[bisect_left(most_sequences(heads, sm_count), sequences)]
