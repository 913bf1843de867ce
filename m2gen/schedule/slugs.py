"""Parse the names of schedules that ``Knobs.slug`` writes, and of a layer's tiles that ``Tiles.slug`` does."""

from __future__ import annotations

import re

from m2gen.errors import ScheduleError
from m2gen.schedule.knobs import Reduction, Scratch, Tanh
from m2gen.schedule.layer import DEFAULTS, AnyTiles
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.schedule.mma import Mma
from m2gen.schedule.mma_tiles import MmaBackward, MmaForward
from m2gen.schedule.portable import Portable, PortableBackward, PortableForward
from m2gen.schedule.wgmma import WarpgroupBackward, WarpgroupForward, Wgmma

_TILES = re.compile(
    r"(portable|mma)_f(\d+)x(\d+)u(\d+)([ap])(?:(t)([1-9]\d*)?)?"
    r"_b(\d+)x(\d+)c(\d+)([ap])([st]?)(x?)_i(\d+)(?:_s(\d+))?_(ptx|exp)",
    re.ASCII,
)
_WARPGROUP = re.compile(r"wgmma_([ap])([ap])_i(\d+)_(ptx|exp)", re.ASCII)
_LAYER = re.compile(rf"({'|'.join(LayerKernel)})((?:_[a-z][0-9]{{1,9}})+)", re.ASCII)
_REDUCTIONS = {kind[0]: kind for kind in Reduction}


def parse(slug: str) -> Portable | Mma | Wgmma:
    """Return the schedule that a slug names; raises ``ScheduleError`` for any other text."""
    found = _WARPGROUP.fullmatch(slug)
    if found is not None:
        each = WarpgroupForward(_REDUCTIONS[found[1]]), WarpgroupBackward(_REDUCTIONS[found[2]])
        return Wgmma(*each, int(found[3]), Tanh(found[4]))
    found = _TILES.fullmatch(slug)
    if found is None or (found[1] == "portable" and (found[6] or found[12] or found[13])):
        raise ScheduleError(f"a schedule must begin with its family, as mma_f32x1u4a_b32x1c2as_i16_ptx, got {slug!r}")
    tile = (int(found[2]), int(found[3]), int(found[4]), _REDUCTIONS[found[5]])
    back = (int(found[8]), int(found[9]), int(found[10]), _REDUCTIONS[found[11]])
    interval, segments, tanh = int(found[14]), int(found[15] or 1), Tanh(found[16])
    if found[1] == "portable":
        return Portable(PortableForward(*tile), PortableBackward(*back), interval, tanh, segments)
    scratch = {"": Scratch.L2, "s": Scratch.SHARED, "t": Scratch.SLOTS}[found[12]]
    forward = MmaForward(*tile, slots=bool(found[6]), registers=int(found[7] or 0))
    backward = MmaBackward(*back, scratch, xorsign=bool(found[13]))
    return Mma(forward, backward, interval, tanh, segments)


def parse_tiles(slug: str) -> AnyTiles:
    """Return the tiles that a slug names; raises ``ScheduleError`` for any other text."""
    found = _LAYER.fullmatch(slug)
    if found is not None:
        kind, knobs = type(DEFAULTS[LayerKernel(found[1])]), found[2].split("_")[1:]
        if [knob[0] for knob in knobs] == [name[0] for name in kind.AXES]:
            return kind.of(dict(zip(kind.AXES, (int(knob[1:]) for knob in knobs), strict=True)))
    raise ScheduleError(f"tiles must begin with their kernel, as convolve_r32_c128_w4, got {slug!r}")
