"""The layer over several ranks: its heads sharded, or the tokens of long sequences handed from rank to rank.

Every rank picks the same schedules: they depend on the number of sequences, the heads and the device alone.
"""

from .heads import HeadParallelM2RNN
from .sequence import scan_over_ranks

__all__ = ["HeadParallelM2RNN", "scan_over_ranks"]
