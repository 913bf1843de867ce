"""How the kernels on pools of states are made for some dims and heads: what their templates ask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from m2gen.kernels import layouts
from m2gen.kernels.literals import literal
from m2gen.kernels.render import TRITON, render_template
from m2gen.runtime.pool_plan import PoolPlan
from m2gen.schedule import Family, ForwardTile, Reduction, Schedule
from m2gen.spec import Dtype, Fp32Products, Heads
from m2gen.variant import MIN_TILE, Variant, padded

Dims = tuple[int, ...]
"""K, V and the heads of q, k, v, f and w."""
TILE = 4096
"""Most elements of a state that a program holds at once."""
WARP_TILE = 512
"""Elements of a state for each warp: 16 registers of a thread, so that neither random numbers nor tokens spill any."""
MOST_WARPS = 8
TOKEN_REGISTERS = 64
"""Registers of a thread for one token: as many as ptxas takes, but told so it asks for whole states before products."""


@dataclass(frozen=True)
class PoolLowering:
    """How the kernels on a pool are made, which serve every dtype and gate; templates see it as ``k``."""

    state_expansion: int
    head_dim: int
    heads: Heads
    products: Fp32Products = Fp32Products.IEEE
    """How float32 operands are multiplied."""

    explicit: bool = False
    """Whether layouts are written down: of tokens alone, with operands of 16 bits, on tensor cores of NVIDIA's."""

    tanh_ptx = False  # calls say whether they may take it, since one module serves GPUs of every kind
    forward_only = True
    """Whether nothing is differentiated: ``gate`` comes without its slopes."""

    @property
    def jit(self) -> str:
        """What makes a function a kernel."""
        return "gluon.jit" if self.explicit else "triton.jit"

    @property
    def dims(self) -> Dims:
        """What calls look the module up by."""
        return self.state_expansion, self.head_dim, *self.heads.counts

    @property
    def name(self) -> str:
        """The module's name: dims, heads and products, which are all that it depends on."""
        heads = "_".join(f"{role}{count}" for role, count in zip("qkvfw", self.heads.counts, strict=True))
        kind = "pool_explicit" if self.explicit else "pool"
        return f"{kind}_k{self.state_expansion}_v{self.head_dim}_{heads}{'_tf32' if self.tf32 else ''}"

    @property
    def tf32(self) -> bool:
        return self.products is Fp32Products.TF32

    @property
    def rows(self) -> int:
        """Rows of a state that a program holds at once; it takes the others after them."""
        return min(padded(self.state_expansion), max(MIN_TILE, TILE // padded(self.head_dim)))

    @property
    def constants(self) -> dict[str, int]:
        """Numbers that the kernels name."""
        heads = self.heads
        return {
            "K": self.state_expansion, "V": self.head_dim, "V_PAD": padded(self.head_dim),
            "N": heads.total, "NQ": heads.q, "NK": heads.k, "NV": heads.v, "NF": heads.f, "NW": heads.w,
            "ROWS": self.rows, **({} if self.explicit else {"PARTS": self.parts}),
        }  # fmt: skip

    @property
    def parts(self) -> int:
        """How often a program takes rows of a state."""
        return padded(self.state_expansion) // self.rows

    @property
    def layouts(self) -> dict[str, str]:
        """The layouts that an explicit kernel names, and how many warps share the rows of a tile."""
        tile = ForwardTile(self.rows, self.plan.warps, 1, Reduction.PARTIAL)
        found = {"TILE": layouts.tile(tile), "VECTOR": layouts.vector(tile), "WARPS": str(layouts.warps_down(tile))}
        return found if self.explicit else {}

    @property
    def plan(self) -> PoolPlan:
        """All that launchers must know of these kernels."""
        warps = min(MOST_WARPS, max(1, self.rows * padded(self.head_dim) // WARP_TILE))
        registers = TOKEN_REGISTERS if self.explicit and padded(self.head_dim) == MIN_TILE else 0
        return PoolPlan(self.heads.total, self.state_expansion, self.head_dim, warps, registers)


def pool_of(variant: Variant) -> PoolLowering:
    """Return how the kernels on a variant's pools are made."""
    return PoolLowering(variant.state_expansion, variant.head_dim, variant.heads, variant.products)


def pools_of(variants: Iterable[Variant]) -> dict[Dims, PoolLowering]:
    """Return every module of kernels on pools that variants need, once, by what calls look it up by."""
    found: dict[Dims, PoolLowering] = {}
    for k in map(pool_of, variants):
        if k.tf32 or k.dims not in found:  # narrow dtypes leave products of float32 to those that have any
            found[k.dims] = k
    return found


def explicit_pools_of(scheduled: Iterable[tuple[Variant, Schedule]]) -> dict[Dims, PoolLowering]:
    """Return the modules with explicit layouts, for variants whose schedules are explicit as well."""
    explicit = (variant for variant, schedule in scheduled if schedule.family is not Family.PORTABLE)
    narrow = {variant: pool_of(variant) for variant in explicit if variant.dtype is not Dtype.FP32}
    return {k.dims: replace(k, explicit=True, products=Fp32Products.IEEE) for k in narrow.values() if k.parts == 1}


def render_pool(k: PoolLowering, provenance: str = "") -> str:
    """Return the module of the kernels on pools of states."""
    heads = " ".join(f"{role}{count}" for role, count in zip("qkvfw", k.heads.counts, strict=True))
    title = f"Kernels on pools of states of K{k.state_expansion} V{k.head_dim}, heads {heads}."
    template = "kernels/pool/explicit.py.j2" if k.explicit else "kernels/pool/module.py.j2"
    text = render_template(template, k=k, title=title, provenance=provenance, launch=literal(k.plan._asdict()))
    return TRITON.sub("gl.", text) if k.explicit else text
