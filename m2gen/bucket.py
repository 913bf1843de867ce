"""Problem buckets: how many programs there are for each SM, which is what decides between schedules."""

from __future__ import annotations

from bisect import bisect_left
from enum import StrEnum

HALVES = (1, 2, 4, 8, 16)
"""The most programs in each bucket but the last, in halves of a program an SM. Generated packages carry this table."""


class Bucket(StrEnum):
    """Heads of all sequences for each SM, from a GPU that is half idle to one whose SMs take turns."""

    HALF = "<=0.5"
    ONE = "<=1"
    TWO = "<=2"
    FOUR = "<=4"
    EIGHT = "<=8"
    MORE = ">8"

    @property
    def place(self) -> int:
        """Place in the order of sizes."""
        return BUCKETS.index(self)


BUCKETS = tuple(Bucket)


def most_sequences(heads: int, sm_count: int) -> tuple[int, ...]:
    """Return the most sequences of ``heads`` heads in each bucket but the last, on a GPU of ``sm_count`` SMs."""
    return tuple(halves * sm_count // (2 * heads) for halves in HALVES)


def bucket_of(sequences: int, heads: int, sm_count: int) -> Bucket:
    """Return the bucket of a call: B, or the sequences of a packed batch; N heads of the state; SMs of the GPU.

    The length of sequences plays no part: steps follow each other, whatever the schedule.
    """
    return BUCKETS[bisect_left(most_sequences(heads, sm_count), sequences)]
