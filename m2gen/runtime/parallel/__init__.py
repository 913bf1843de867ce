"""The layer over several ranks: its heads sharded, or the tokens of long sequences exchanged or handed on.

``HeadParallelM2RNN`` shards heads, of tokens that are whole on every rank or lie over ranks, too. Where each rank has
its part of the sequences, ``exchange_over_ranks`` gives each its share of the heads on whole ones, and
``scan_over_ranks`` hands states from rank to rank. ``M2RNNHeads`` and ``M2RNNContext`` are the same as styles of
``torch.distributed.tensor.parallel.parallelize_module``.

Every rank picks the same schedules: they depend on the number of sequences, the heads and the device alone. Ranks whose
packages or GPUs differ would not, which is RanksDifferError when a layer is put over them. So is a call that differs
from the first rank's, where it is the first of its kind.
"""

from .agreement import RanksDifferError, check_ranks_agree
from .exchange import HeadExchange, exchange_over_ranks
from .heads import HeadParallelM2RNN
from .sequence import scan_over_ranks
from .styles import M2RNNContext, M2RNNHeads

__all__ = [
    "HeadExchange",
    "HeadParallelM2RNN",
    "M2RNNContext",
    "M2RNNHeads",
    "RanksDifferError",
    "check_ranks_agree",
    "exchange_over_ranks",
    "scan_over_ranks",
]
