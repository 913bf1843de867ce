"""Parse the names of schedules that ``Knobs.slug`` writes."""

from __future__ import annotations

import re

from m2gen.errors import ScheduleError
from m2gen.schedule.knobs import Reduction, Scratch, Tanh
from m2gen.schedule.mma import Mma, MmaBackward, MmaForward
from m2gen.schedule.portable import Portable, PortableBackward, PortableForward
from m2gen.schedule.wgmma import Warpgroup, Wgmma

_TILES = re.compile(
    r"(portable|mma)_f(\d+)x(\d+)u(\d+)([ap])(t?)_b(\d+)x(\d+)c(\d+)([ap])([st]?)_i(\d+)(?:_s(\d+))?_(ptx|exp)",
    re.ASCII,
)
_WARPGROUP = re.compile(r"wgmma_([ap])([ap])_i(\d+)_(ptx|exp)", re.ASCII)
_REDUCTIONS = {kind[0]: kind for kind in Reduction}


def parse(slug: str) -> Portable | Mma | Wgmma:
    """Return the schedule that a slug names; raises ``ScheduleError`` for any other text."""
    found = _WARPGROUP.fullmatch(slug)
    if found is not None:
        forward, backward = (Warpgroup(_REDUCTIONS[letter]) for letter in found.group(1, 2))
        return Wgmma(forward, backward, int(found[3]), Tanh(found[4]))
    found = _TILES.fullmatch(slug)
    if found is None or (found[1] == "portable" and (found[6] or found[11])):
        raise ScheduleError(f"a schedule must begin with its family, as mma_f32x1u4a_b32x1c2as_i16_ptx, got {slug!r}")
    tile = (int(found[2]), int(found[3]), int(found[4]), _REDUCTIONS[found[5]])
    back = (int(found[7]), int(found[8]), int(found[9]), _REDUCTIONS[found[10]])
    interval, segments, tanh = int(found[12]), int(found[13] or 1), Tanh(found[14])
    if found[1] == "portable":
        return Portable(PortableForward(*tile), PortableBackward(*back), interval, tanh, segments)
    scratch = {"": Scratch.L2, "s": Scratch.SHARED, "t": Scratch.SLOTS}[found[11]]
    return Mma(MmaForward(*tile, slots=bool(found[6])), MmaBackward(*back, scratch), interval, tanh, segments)
