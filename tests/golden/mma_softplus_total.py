"""M2RNN kernels for k64_v16_q1_k1_v2_f2_w2_bf16_total_exact_softplus, schedule mma_f64x2u4a_b64x2c8atx_i8_exp.



H_t = f_t H_(t-1) + (1 - f_t) tanh(H_(t-1) W + k_t v_t^T),  y_t = H_t^T q_t   (arXiv 2603.14360)

    B, S, N      sequences, steps, heads of the state; head n reads group n // (N // NX) of operand X
    K, V         rows (state expansion) and columns (head dim) of the state
    q k v dy     q_t (K,), k_t (K,), v_t (V,) and dy_t (V,) of this program's head
    x, f, u      x_t, from which the gate is computed; f_t and 1 - f_t
    h, z, w      state H (rows, V), candidate Z (rows, V), state weight W (V, V)
    c, g, d      gradients of H_t from the future, of H_t, and of the argument of tanh
    h0, ht       states before the first step and after the last one; dh0, dht, their gradients
    gap, slope   H_(t-1) - Z_t, and the derivative u (1 - Z^2) of H_t by the argument of tanh
    next_, done_ operands loaded ahead of time, and sums that are written with those of the next interval
    stride_x_s   elements between steps of operand x (and b sequences, n heads, d elements, i rows, j columns)
    stride_x     the same in 64 bits; of a result, elements between its steps
"""

import torch
import triton.language
from triton.experimental import gluon
from triton.experimental.gluon import language as gl  # Triton's functions, on tensors whose layouts are written down
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

K: gl.constexpr = gl.constexpr(64)
V: gl.constexpr = gl.constexpr(16)
V_PAD: gl.constexpr = gl.constexpr(16)
N: gl.constexpr = gl.constexpr(2)
NQ: gl.constexpr = gl.constexpr(1)
NK: gl.constexpr = gl.constexpr(1)
NV: gl.constexpr = gl.constexpr(2)
NF: gl.constexpr = gl.constexpr(2)
NW: gl.constexpr = gl.constexpr(2)
INTERVAL: gl.constexpr = gl.constexpr(8)
FORWARD_ROWS: gl.constexpr = gl.constexpr(64)
FORWARD_PARTS: gl.constexpr = gl.constexpr(1)
UNROLL: gl.constexpr = gl.constexpr(4)
WARPS: gl.constexpr = gl.constexpr(2)
ROWS: gl.constexpr = gl.constexpr(32)
SUM_BLOCK: gl.constexpr = gl.constexpr(512)
FORWARD_TILE: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [2, 1], [16, 8]))
FORWARD_VECTOR: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[1], [2]], lane_bases=[[0], [0], [4], [8], [16]],
    warp_bases=[[32]], block_bases=[], shape=[64],
))  # fmt: skip
BACKWARD_TILE: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [2, 1, 1], [1, 16, 8]))
LEFT: gl.constexpr = gl.constexpr(gl.DotOperandLayout(0, BACKWARD_TILE, 2))
RIGHT: gl.constexpr = gl.constexpr(gl.DotOperandLayout(1, BACKWARD_TILE, 2))
SLOT_KEYS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 1, 0], [0, 2, 0], [0, 0, 1]], lane_bases=[[0, 0, 2], [0, 0, 4], [0, 4, 0], [0, 8, 0], [0, 16, 0]],
    warp_bases=[[1, 0, 0]], block_bases=[], shape=[2, 32, 8],
))  # fmt: skip
SLOT_VALUES: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 0, 1], [0, 0, 8]], lane_bases=[[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
    warp_bases=[[1, 0, 0]], block_bases=[], shape=[2, 8, 16],
))  # fmt: skip
CHECKPOINT: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 0, 1], [0, 1, 0], [0, 0, 8], [0, 2, 0]], lane_bases=[[0, 0, 2], [0, 0, 4], [0, 4, 0], [0, 8, 0], [0, 16, 0]],
    warp_bases=[[1, 0, 0]], block_bases=[], shape=[2, 32, 16],
))  # fmt: skip
KEPT: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 32, 0]], lane_bases=[[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0]],
    warp_bases=[[1, 0, 0]], block_bases=[], shape=[2, 64, 8],
))  # fmt: skip
COPIED_KEYS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4]], lane_bases=[[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
    warp_bases=[[1, 0, 0]], block_bases=[], shape=[2, 8, 32],
))  # fmt: skip
COPIED_VALUES: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 0, 1], [0, 0, 2]], lane_bases=[[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
    warp_bases=[[1, 0, 0]], block_bases=[], shape=[2, 8, 16],
))  # fmt: skip
COPIED_STATE: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 16, 0]], lane_bases=[[0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0]],
    warp_bases=[[1, 0, 0]], block_bases=[], shape=[2, 32, 16],
))  # fmt: skip
THREADS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[], lane_bases=[[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
    warp_bases=[[1, 0, 0]], block_bases=[], shape=[2, 8, 4],
))  # fmt: skip
OVER_WARPS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[1, 0, 0], [0, 0, 4]], lane_bases=[[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 0, 1]],
    warp_bases=[[0, 0, 2]], block_bases=[], shape=[2, 16, 8],
))  # fmt: skip
OVER_THREADS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[4, 0], [8, 0], [16, 0], [32, 0]], lane_bases=[[0, 1], [0, 2], [0, 4], [1, 0], [2, 0]],
    warp_bases=[[0, 0]], block_bases=[], shape=[64, 8],
))  # fmt: skip
PLACE_OF_KEYS: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0]))
PLACE_OF_CHECKPOINT: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(8, 4, 2, [2, 1, 0]))
PLACE_OF_STATES: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(8, 4, 2, [2, 1, 0]))
PLACE: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
FORWARD_KEYS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[1, 0], [2, 0], [0, 1], [0, 8]], lane_bases=[[0, 2], [0, 4], [4, 0], [8, 0], [16, 0]],
    warp_bases=[[32, 0]], block_bases=[], shape=[64, 16],
))  # fmt: skip
FORWARD_VALUES: gl.constexpr = gl.constexpr(gl.DotOperandLayout(1, FORWARD_TILE, 2))
FORWARD_APART: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 1], [0, 2], [16, 0], [32, 0]], lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
    warp_bases=[[8, 0]], block_bases=[], shape=[64, 16],
))  # fmt: skip
FORWARD_EVERY: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 1], [1, 0], [2, 0], [4, 0], [8, 0]], lane_bases=[[0, 2], [0, 4], [0, 8], [16, 0], [32, 0]],
    warp_bases=[[0, 0]], block_bases=[], shape=[64, 16],
))  # fmt: skip
FORWARD_SUMS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 1]], lane_bases=[[0, 8], [0, 2], [0, 4], [1, 0], [2, 0]],
    warp_bases=[[0, 0]], block_bases=[], shape=[4, 16],
))  # fmt: skip
PLAIN: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
SUM_LAYOUT: gl.constexpr = gl.constexpr(gl.BlockedLayout([1], [32], [2], [0]))
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # before Triton 3.8


@gluon.jit
def tanh(x):
    """tanh to float32 accuracy: near 0, where 1 - 2 / (exp(2|x|) + 1) cancels, the polynomial of Cephes' tanhf."""
    size = gl.abs(x)
    s = x * x
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    tail = 1.0 - 2.0 / (gl.exp2(2.8853900817779268 * size) + 1.0)
    return gl.where(size < 0.625, x + x * s * p, gl.where(x < 0.0, -tail, tail))


@gluon.jit
def softplus(x):
    """log(1 + exp(x)) to float32 accuracy: max(x, 0) + log1p(e) for e = exp(-|x|), as the series of 2 atanh."""
    e = gl.exp2(-1.4426950408889634 * gl.abs(x))
    r = e / (2.0 + e)  # in (0, 1/3]
    s = r * r
    p = s * (1.0 / 15.0) + 1.0 / 13.0
    p = p * s + 1.0 / 11.0
    p = p * s + 1.0 / 9.0
    p = p * s + 1.0 / 7.0
    p = p * s + 1.0 / 5.0
    p = p * s + 1.0 / 3.0
    return gl.maximum(x, 0.0) + 2.0 * (r + r * s * p)


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), also where that is tiny."""
    e = gl.exp2(-1.4426950408889634 * gl.abs(x))
    return gl.where(x < 0.0, e, 1.0) / (1.0 + e)


@gluon.jit
def gate(x, rate, dt_bias):
    """f = exp(-a) and 1 - f for a = rate softplus(x + dt_bias), both to float32 accuracy."""
    a = rate * softplus(x + dt_bias)
    f = gl.exp2(-1.4426950408889634 * a)
    p = a * (-1.0 / 5040.0) + 1.0 / 720.0  # Taylor's series, where 1 - f would cancel
    p = p * a - 1.0 / 120.0
    p = p * a + 1.0 / 24.0
    p = p * a - 1.0 / 6.0
    p = p * a + 0.5
    return f, gl.where(a < 0.35, a - a * a * p, 1.0 - f)


@gluon.jit
def gate_slopes(x, f, rate, dt_bias):
    """Derivatives of f by x (or dt_bias), and by A_log = log(rate)."""
    return -f * rate * sigmoid(x + dt_bias), -f * rate * softplus(x + dt_bias)


@gluon.jit
def load_vector(address, mask, inside):
    """Load one step's vector; zeros where the step is outside the sequence."""
    return gl.load(address, mask=gl.where(inside, mask, False), other=0.0)


@gluon.jit
def load_weight(base, stride_n, stride_i, stride_j, n, TILE: gl.constexpr):
    """Load group n's state weight, (V_PAD, V_PAD), as the right operand of a product."""
    i = gl.arange(0, V_PAD, gl.SliceLayout(1, TILE))
    j = gl.arange(0, V_PAD, gl.SliceLayout(0, TILE))
    offsets = i.to(gl.int64)[:, None] * stride_i + j.to(gl.int64)[None, :] * stride_j
    mask = (i < V)[:, None] & (j < V)[None, :]
    w = gl.load(base + gl.cast(n, gl.int64) * stride_n + offsets, mask=mask, other=0.0)
    return gl.convert_layout(rounded(w.to(gl.float32)), gl.DotOperandLayout(1, TILE, 2))


@gluon.jit
def load_gate(address, inside):
    """Load one step's x as float32; outside the sequence, that of f = 1, which changes nothing."""
    return gl.load(address, mask=inside, other=float("-inf")).to(gl.float32)


@gluon.jit
def rounded(x):
    """x as an operand of a product."""
    return x.to(gl.bfloat16)


@gluon.jit
def product(a, b, total):
    """a b + total, summed in float32."""
    layout: gl.constexpr = total.type.layout  # the left operand's layout is equal to it, so H does not move
    a = gl.convert_layout(a, gl.DotOperandLayout(0, layout, 2))
    return mma_v2(a, gl.convert_layout(b, gl.DotOperandLayout(1, layout, 2)), total)


@gluon.jit
def in_tile(x, TILE: gl.constexpr):
    """x (rows,), whose neighbours one thread has loaded, as rows of a tile: a thread has every eighth row."""
    WARPS: gl.constexpr = TILE.warps_per_cta[0]
    x = x.reshape([WARPS, 8, x.shape[0] // (16 * WARPS), 2]).permute((2, 0, 3, 1)).reshape([x.shape[0]])
    return gl.convert_layout(x, gl.SliceLayout(1, TILE), assert_trivial=True)


@gluon.jit
def column(x, tile):
    """x (rows,) as a column beside ``tile``, in float32."""
    TILE: gl.constexpr = tile.type.layout
    x = in_tile(x, TILE)
    return x.to(gl.float32)[:, None]


@gluon.jit
def sums_apart(x):
    """Sum x (rows, cols) over the rows that a thread has: (8 a warp, cols)."""
    WARPS: gl.constexpr = x.type.layout.warps_per_cta[0]
    R: gl.constexpr = x.shape[0]
    x = x.reshape([R // (16 * WARPS), WARPS, 2, 8, V_PAD]).permute((0, 2, 1, 3, 4))
    return gl.sum(x.reshape([R // (8 * WARPS), 8 * WARPS, V_PAD]), 0)


@gluon.jit
def added_up(x, parts):
    """Sum over warps, in shared memory, all steps' ``sums_apart``; x's last dims are a step's bits: (steps, cols)."""
    R: gl.constexpr = x.shape[0]
    x = x.reshape([R, V_PAD // 8, 4, 2, UNROLL]).permute((4, 0, 2, 1, 3)).reshape([UNROLL * R, V_PAD])
    parts.store(gl.convert_layout(x, FORWARD_APART, assert_trivial=True))
    x = gl.sum(parts.load(FORWARD_EVERY).reshape([UNROLL, R, V_PAD]), 1)
    x = x.reshape([UNROLL, 4, V_PAD // 8, 2]).permute((0, 2, 1, 3)).reshape([UNROLL, V_PAD])
    return gl.convert_layout(x, FORWARD_SUMS, assert_trivial=True)


@gluon.jit
def outer(k, v, tile):
    """k v^T beside ``tile``."""
    return column(k, tile) * v.to(gl.float32)[None, :]


@gluon.jit
def outer_of_slot(keys, values, slot, STEP: gl.constexpr, tile):
    """k v^T of the step whose k and v are slot STEP of ``keys`` (rows, 16) and ``values`` (16, cols).

    Tensor cores sum over all slots; all but one are zero.
    """
    TILE: gl.constexpr = tile.type.layout
    WARPS: gl.constexpr = TILE.warps_per_cta[0]
    R: gl.constexpr = keys.shape[0]
    keys = keys.reshape([WARPS, 8, R // (16 * WARPS), 2, 16]).permute((2, 0, 3, 1, 4)).reshape([R, 16])
    keys = gl.convert_layout(keys, gl.DotOperandLayout(0, TILE, 2))
    return mma_v2(keys, gl.where(slot == STEP, values, 0.0), gl.zeros((R, V_PAD), gl.float32, TILE))


@gluon.jit
def candidate(h, w, kv):
    """Z = tanh(H W + k v^T)."""
    return tanh(product(rounded(h), w, kv))


@gluon.jit
def advance(h, z, f, u):
    """H = f H + u Z, in one operation once Z is known."""
    return gl.fma(u, z, f * h)


@gluon.jit
def clamp(x, bound):
    """Clamp to [-bound, bound]; NaN stays NaN."""
    return gl.inline_asm_elementwise(  # the smaller size, with the signs of both
        "min.NaN.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [x, gl.full(x.shape, 0.0, gl.float32, x.type.layout) + bound],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def sequence(cu_seqlens, b, T):
    """First token and length of packed sequence b; offsets that nobody could check still stay inside the tensors."""
    start = gl.minimum(gl.maximum(gl.load(cu_seqlens + b).to(gl.int64), 0), T)
    stop = gl.minimum(gl.maximum(gl.load(cu_seqlens + b + 1).to(gl.int64), start), T)
    return start, (stop - start).to(gl.int32)


@gluon.jit
def contribute(address, x, mask, ATOMIC: gl.constexpr):
    """Add to a sum that several programs share, or store this program's own row of it."""
    if ATOMIC:
        gl.atomic_add(address, x, mask=mask, sem="relaxed")
    else:
        gl.store(address, x, mask=mask)


@gluon.jit(do_not_specialize=["S", "intervals"])
def m2rnn_forward_kernel(
    q, k, v, w, x, A_log, dt_bias, h0, y, ht, checkpoints, cu_seqlens, stride_q_b, stride_q_s, stride_q_n,
    stride_q_d, stride_k_b, stride_k_s, stride_k_n, stride_k_d, stride_v_b, stride_v_s, stride_v_n,
    stride_v_d, stride_w_n, stride_w_i, stride_w_j, stride_x_b, stride_x_s, stride_x_n, S, intervals,
    USE_INITIAL_STATE: gl.constexpr, IS_VARLEN: gl.constexpr, SAVE: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """Scan one sequence's steps for FORWARD_ROWS rows of one head's state."""
    part = gl.program_id(0) % FORWARD_PARTS
    n = (gl.program_id(0) // FORWARD_PARTS) % N
    b = (gl.program_id(0) // (FORWARD_PARTS * N)).to(gl.int64)
    rows = part * FORWARD_ROWS + gl.arange(0, FORWARD_ROWS, FORWARD_VECTOR)
    cols = gl.arange(0, V_PAD, gl.SliceLayout(0, FORWARD_TILE))
    row_mask = rows < K
    col_mask = cols < V
    state_rows = in_tile(rows, FORWARD_TILE)[:, None]
    state_mask = (state_rows < K) & col_mask[None, :]
    state_offsets = state_rows * V + cols[None, :]

    if IS_VARLEN:
        start, length = sequence(cu_seqlens, b, S)
        token = start
        interval = start // INTERVAL + b
    else:
        start = gl.cast(0, gl.int64)
        length = S
        token = b * S
        interval = b * intervals
    q += b * stride_q_b + start * stride_q_s + (n // (N // NQ)).to(gl.int64) * stride_q_n
    k += b * stride_k_b + start * stride_k_s + (n // (N // NK)).to(gl.int64) * stride_k_n
    v += b * stride_v_b + start * stride_v_s + (n // (N // NV)).to(gl.int64) * stride_v_n
    x += b * stride_x_b + start * stride_x_s + (n // (N // NF)).to(gl.int64) * stride_x_n
    q_row = rows.to(gl.int64) * stride_q_d
    # Keys and values of an iteration, each step in a slot of the outer product's tiles.
    key_slot = gl.arange(0, 16, gl.SliceLayout(0, FORWARD_KEYS))[None, :]
    key_rows = part * FORWARD_ROWS + gl.arange(0, FORWARD_ROWS, gl.SliceLayout(1, FORWARD_KEYS))[:, None]
    key_mask = (key_slot < UNROLL) & (key_rows < K)
    key_offsets = key_rows.to(gl.int64) * stride_k_d + key_slot.to(gl.int64) * stride_k_s
    value_slot = gl.arange(0, 16, gl.SliceLayout(1, FORWARD_VALUES))[:, None]
    value_cols = gl.arange(0, V_PAD, gl.SliceLayout(0, FORWARD_VALUES))[None, :]
    value_mask = (value_slot < UNROLL) & (value_cols < V)
    value_offsets = value_slot.to(gl.int64) * stride_v_s + value_cols.to(gl.int64) * stride_v_d
    y += (token * 2 + n) * 16
    stride_y: gl.constexpr = 32
    y_parts = gl.allocate_shared_memory(gl.float32, [UNROLL * 16, V_PAD], PLAIN)
    sum_step = gl.arange(0, UNROLL, gl.SliceLayout(1, FORWARD_SUMS))[:, None]
    sum_col = gl.arange(0, V_PAD, gl.SliceLayout(0, FORWARD_SUMS))[None, :]
    sum_mask = sum_col < V
    sum_offsets = sum_step * stride_y + sum_col
    checkpoints += (interval * N + n) * (K * V)
    w = load_weight(w, stride_w_n, stride_w_i, stride_w_j, n // (N // NW), FORWARD_TILE)
    rate = gl.exp(gl.load(A_log + n // (N // NF)))
    dt_bias = gl.load(dt_bias + n // (N // NF))
    h = gl.zeros((FORWARD_ROWS, V_PAD), gl.float32, FORWARD_TILE)
    if USE_INITIAL_STATE:
        h = gl.load(h0 + (b * N + n) * (K * V) + state_offsets, mask=state_mask, other=0.0)

    # Where step i of an iteration lies; q, k, v and x point to the iteration whose operands are loaded next.
    q_0_row = q_row + 0 * gl.cast(stride_q_s, gl.int64)
    x_0_at = 0 * gl.cast(stride_x_s, gl.int64)
    q_1_row = q_row + 1 * gl.cast(stride_q_s, gl.int64)
    x_1_at = 1 * gl.cast(stride_x_s, gl.int64)
    q_2_row = q_row + 2 * gl.cast(stride_q_s, gl.int64)
    x_2_at = 2 * gl.cast(stride_x_s, gl.int64)
    q_3_row = q_row + 3 * gl.cast(stride_q_s, gl.int64)
    x_3_at = 3 * gl.cast(stride_x_s, gl.int64)
    q_0 = load_vector(q + q_0_row, row_mask, length > 0)
    x_0 = load_gate(x + x_0_at, length > 0)
    q_1 = load_vector(q + q_1_row, row_mask, length > 1)
    x_1 = load_gate(x + x_1_at, length > 1)
    q_2 = load_vector(q + q_2_row, row_mask, length > 2)
    x_2 = load_gate(x + x_2_at, length > 2)
    q_3 = load_vector(q + q_3_row, row_mask, length > 3)
    x_3 = load_gate(x + x_3_at, length > 3)
    keys = load_vector(k + key_offsets, key_mask, key_slot < length)
    values = load_vector(v + value_offsets, value_mask, value_slot < length)
    q_iteration = UNROLL * gl.cast(stride_q_s, gl.int64)
    k_iteration = UNROLL * gl.cast(stride_k_s, gl.int64)
    v_iteration = UNROLL * gl.cast(stride_v_s, gl.int64)
    x_iteration = UNROLL * gl.cast(stride_x_s, gl.int64)
    q += q_iteration
    k += k_iteration
    v += v_iteration
    x += x_iteration

    # Iterations after which a whole one follows need no guards, and the last ones do.
    whole = gl.maximum(length // UNROLL - 1, 0) * UNROLL
    for t in range(0, whole, UNROLL):
        # Operands of the next iteration: issued now, so that they arrive before they are needed.
        next_q_0 = gl.load(q + q_0_row, mask=row_mask, other=0.0)
        next_x_0 = gl.load(x + x_0_at).to(gl.float32)
        next_q_1 = gl.load(q + q_1_row, mask=row_mask, other=0.0)
        next_x_1 = gl.load(x + x_1_at).to(gl.float32)
        next_q_2 = gl.load(q + q_2_row, mask=row_mask, other=0.0)
        next_x_2 = gl.load(x + x_2_at).to(gl.float32)
        next_q_3 = gl.load(q + q_3_row, mask=row_mask, other=0.0)
        next_x_3 = gl.load(x + x_3_at).to(gl.float32)
        next_keys = gl.load(k + key_offsets, mask=key_mask, other=0.0)
        next_values = gl.load(v + value_offsets, mask=value_mask, other=0.0)
        q += q_iteration
        k += k_iteration
        v += v_iteration
        x += x_iteration

        if SAVE:
            if gl.cast(t, gl.int32) % INTERVAL == 0:
                gl.store(checkpoints + state_offsets, h, mask=state_mask)
                checkpoints += N * K * V
        elif t & 0x40000000 != 0:  # never: a branch, behind which ptxas cannot put off the loads (docs/performance.md)
            gl.store(ht + (b * N + n) * (K * V) + state_offsets, h, mask=state_mask)

        # Step t + 0
        f, u = gate(x_0, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 0, h)), f, u)
        y_0 = sums_apart(column(q_0, h) * h)

        # Step t + 1
        f, u = gate(x_1, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 1, h)), f, u)
        y_1 = sums_apart(column(q_1, h) * h)

        # Step t + 2
        f, u = gate(x_2, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 2, h)), f, u)
        y_2 = sums_apart(column(q_2, h) * h)

        # Step t + 3
        f, u = gate(x_3, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 3, h)), f, u)
        y_3 = sums_apart(column(q_3, h) * h)

        # Sums over rows of all steps at once: warps meet once an iteration.
        every = gl.join(gl.join(y_0, y_2), gl.join(y_1, y_3))
        y_0 = added_up(every, y_parts)
        gl.store(y + sum_offsets, y_0, mask=sum_mask)
        y += UNROLL * stride_y

        q_0, x_0 = next_q_0, next_x_0
        q_1, x_1 = next_q_1, next_x_1
        q_2, x_2 = next_q_2, next_x_2
        q_3, x_3 = next_q_3, next_x_3
        keys, values = next_keys, next_values
    for t in range(whole, length, UNROLL):
        # Operands of the next iteration: issued now, so that they arrive before they are needed.
        ahead = t + 0 + UNROLL < length
        next_q_0 = load_vector(q + q_0_row, row_mask, ahead)
        next_x_0 = load_gate(x + x_0_at, ahead)
        ahead = t + 1 + UNROLL < length
        next_q_1 = load_vector(q + q_1_row, row_mask, ahead)
        next_x_1 = load_gate(x + x_1_at, ahead)
        ahead = t + 2 + UNROLL < length
        next_q_2 = load_vector(q + q_2_row, row_mask, ahead)
        next_x_2 = load_gate(x + x_2_at, ahead)
        ahead = t + 3 + UNROLL < length
        next_q_3 = load_vector(q + q_3_row, row_mask, ahead)
        next_x_3 = load_gate(x + x_3_at, ahead)
        next_keys = load_vector(k + key_offsets, key_mask, t + UNROLL + key_slot < length)
        next_values = load_vector(v + value_offsets, value_mask, t + UNROLL + value_slot < length)
        q += q_iteration
        k += k_iteration
        v += v_iteration
        x += x_iteration

        if SAVE:
            if gl.cast(t, gl.int32) % INTERVAL == 0:
                gl.store(checkpoints + state_offsets, h, mask=state_mask)
                checkpoints += N * K * V
        elif t & 0x40000000 != 0:  # never: a branch, behind which ptxas cannot put off the loads (docs/performance.md)
            gl.store(ht + (b * N + n) * (K * V) + state_offsets, h, mask=state_mask)

        # Step t + 0
        f, u = gate(x_0, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 0, h)), f, u)
        y_0 = sums_apart(column(q_0, h) * h)

        # Step t + 1
        f, u = gate(x_1, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 1, h)), f, u)
        y_1 = sums_apart(column(q_1, h) * h)

        # Step t + 2
        f, u = gate(x_2, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 2, h)), f, u)
        y_2 = sums_apart(column(q_2, h) * h)

        # Step t + 3
        f, u = gate(x_3, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 3, h)), f, u)
        y_3 = sums_apart(column(q_3, h) * h)

        # Sums over rows of all steps at once: warps meet once an iteration.
        every = gl.join(gl.join(y_0, y_2), gl.join(y_1, y_3))
        y_0 = added_up(every, y_parts)
        gl.store(y + sum_offsets, y_0, mask=gl.where(t + sum_step < length, sum_mask, False))
        y += UNROLL * stride_y

        q_0, x_0 = next_q_0, next_x_0
        q_1, x_1 = next_q_1, next_x_1
        q_2, x_2 = next_q_2, next_x_2
        q_3, x_3 = next_q_3, next_x_3
        keys, values = next_keys, next_values
    gl.store(ht + (b * N + n) * (K * V) + state_offsets, h, mask=state_mask)


@gluon.jit
def only(x, slot, STEP: gl.constexpr):
    """x of 16-bit elements where ``slot`` is STEP, else zeros: one instruction for two."""
    mask = gl.where(slot == STEP, -1, 0).to(gl.int16)
    return gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [x, mask], dtype=x.dtype, is_pure=True, pack=2)


@gluon.jit
def times(x, y):
    """x y, both bfloat16, rounded once: one instruction for two."""
    return gl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, gl.full(x.shape, -0.0, x.dtype, x.type.layout)],
        dtype=x.dtype, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def with_outer(rows, cols, total):
    """total + a product over 8 slots, of ``as_left`` and ``as_right``: half the work of one over 16."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5}, {$6}, {$8,$9,$10,$11};",
        "=f,=f,=f,=f,r,r,r,r,f,f,f,f", [rows, cols, total], dtype=gl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def trivially(x, LAYOUT: gl.constexpr):
    """x in an equal layout of another name, which moves nothing."""
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def transposed(x):
    """x^T of every warp's 16-bit elements: blocks of 8 x 8 are transposed; that whole blocks move costs nothing."""
    x = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
    )
    R: gl.constexpr = x.shape[1]
    C: gl.constexpr = x.shape[2]
    return x.reshape([WARPS, R // 8, 8, C // 8, 8]).permute((0, 3, 2, 1, 4)).reshape([WARPS, C, R])


@gluon.jit
def as_left(x):
    """x (rows, 8 slots) as ``with_outer`` reads it, beside both halves of the columns."""
    return trivially(gl.join(x, x).permute((0, 1, 3, 2)).reshape([WARPS, ROWS, 16]), BACKWARD_TILE)


@gluon.jit
def as_right(x):
    """x (8 slots, 16 columns) as ``with_outer`` reads it, beside every block of 8 rows."""
    x = transposed(x).reshape([WARPS, 2, 8, 8]).permute((0, 2, 1, 3)).reshape([WARPS, 8, 16])
    x = gl.join(gl.join(x, x), gl.join(x, x)).permute((0, 3, 4, 1, 2)).reshape([WARPS, ROWS, 16])
    return trivially(x, BACKWARD_TILE)


@gluon.jit
def tile_rows(x):
    """x (rows in memory's order, n) in a tile's: row 16 i + 8 j + l of a tile is row 4 l + 2 i + j."""
    C: gl.constexpr = x.shape[2]
    return x.reshape([WARPS, 8, ROWS // 16, 2, C]).permute((0, 2, 3, 1, 4)).reshape([WARPS, ROWS, C])


@gluon.jit
def memory_rows(x):
    """Undo ``tile_rows``."""
    C: gl.constexpr = x.shape[2]
    return x.reshape([WARPS, ROWS // 16, 2, 8, C]).permute((0, 3, 1, 2, 4)).reshape([WARPS, ROWS, C])


@gluon.jit
def keep(x, place):
    """Store a tile so that each thread reads back what it wrote, 16 bytes at a time."""
    x = x.reshape([WARPS, ROWS // 16, 2, 8, 2, 4, 2]).permute((0, 1, 3, 5, 4, 2, 6)).reshape([WARPS, 2 * ROWS, 8])
    place.store(trivially(x, KEPT))


@gluon.jit
def kept(place):
    """Load what ``keep`` stored."""
    x = place.load(KEPT).reshape([WARPS, ROWS // 16, 8, 4, 2, 2, 2]).permute((0, 1, 5, 2, 4, 3, 6))
    return trivially(x.reshape([WARPS, ROWS, 16]), BACKWARD_TILE)


@gluon.jit
def over_registers(x):
    """Sum x (rows, cols) over the elements that a thread has: (8, 4 lanes)."""
    x = x.reshape([WARPS, ROWS // 16, 2, 8, 2, 4, 2]).permute((0, 3, 5, 1, 2, 4, 6)).reshape([WARPS, 8, 4, ROWS // 2])
    return trivially(gl.sum(x, 3), THREADS)


@gluon.jit
def index(x, ALIGNED: gl.constexpr):
    """x as a factor of strides, which may be of any size where rows are not aligned."""
    return x if ALIGNED else x.to(gl.int64)


@gluon.jit
def bring(place, address, mask, ALIGNED: gl.constexpr):
    """Copy to shared memory: asynchronously where rows lie on 16 bytes, else through registers."""
    if ALIGNED:
        async_load(place, address, mask)
    else:
        place.store(gl.load(address, mask=mask, other=0.0))


@gluon.jit
def left_operand(x):
    """x of a tile as the left operand of a product: another name of the same registers."""
    return gl.convert_layout(x, LEFT)


@gluon.jit(do_not_specialize=["S", "intervals"])
def m2rnn_backward_kernel(
    q, k, v, w, x, A_log, dt_bias, dy, dht, checkpoints, scratch, cu_seqlens, dq, dk, dv, dw, df, dA_log,
    ddt_bias, dh0, stride_q_b, stride_q_s, stride_q_n, stride_q_d, stride_k_b, stride_k_s, stride_k_n,
    stride_k_d, stride_v_b, stride_v_s, stride_v_n, stride_v_d, stride_w_n, stride_w_i, stride_w_j,
    stride_x_b, stride_x_s, stride_x_n, stride_dy_b, stride_dy_s, stride_dy_n, stride_dy_d, S, intervals,
    bound,
    USE_FINAL_STATE_GRADIENT: gl.constexpr, IS_VARLEN: gl.constexpr, ATOMIC: gl.constexpr,
    WANT_Q: gl.constexpr, WANT_K: gl.constexpr, WANT_V: gl.constexpr, WANT_W: gl.constexpr,
    WANT_F: gl.constexpr, WANT_H: gl.constexpr, CARRIES: gl.constexpr, ALIGNED: gl.constexpr,
    WANT_GATE: gl.constexpr,
):  # fmt: skip
    """Scan one sequence's steps backwards for one head: a warp has ROWS rows of the state.

    Steps go by intervals of 8. Forwards, from the interval's checkpoint, what gradients need of each step is kept in
    shared memory: the state, the derivative of H_t by the argument of tanh, and the gap. Backwards, every sum over rows,
    columns or steps is a product on tensor cores, in which each step has a slot of its own. What an interval has summed
    is written while the next one goes forwards.
    """
    program = gl.program_id(0)
    n = program % N
    b = (program // N).to(gl.int64)
    if IS_VARLEN:
        start, length = sequence(cu_seqlens, b, S)
        token = start
        interval = start // INTERVAL + b
    else:
        start = gl.cast(0, gl.int64)
        length = S
        token = b * S
        interval = b * intervals
    end = (gl.cdiv(length, INTERVAL) - 1) * INTERVAL  # where the last interval starts
    stride_q = gl.cast(stride_q_s, gl.int64)
    stride_k = gl.cast(stride_k_s, gl.int64)
    stride_v = gl.cast(stride_v_s, gl.int64)
    stride_x = gl.cast(stride_x_s, gl.int64)
    stride_dy = gl.cast(stride_dy_s, gl.int64)

    # What the program reads of an interval: each from where the last interval begins.
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, COPIED_KEYS)))[:, None, None]
    key_slot = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, COPIED_KEYS)))[None, :, None]
    key_row = warp * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, COPIED_KEYS)))[None, None, :]
    key_mask = (key_row < K) & (key_slot >= 0)
    key_offsets = index(key_slot, ALIGNED) * stride_k_s + index(key_row, ALIGNED) * stride_k_d
    query_offsets = index(key_slot, ALIGNED) * stride_q_s + index(key_row, ALIGNED) * stride_q_d
    value_slot = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, COPIED_VALUES)))[None, :, None]
    value_col = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, COPIED_VALUES)))[None, None, :]
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, COPIED_VALUES)))[:, None, None]
    value_mask = (value_col < V) & (value_slot >= 0) & (warp >= 0)
    value_offsets = index(value_slot, ALIGNED) * stride_v_s + index(value_col, ALIGNED) * stride_v_d + 0 * warp
    dy_offsets = index(value_slot, ALIGNED) * stride_dy_s + index(value_col, ALIGNED) * stride_dy_d + 0 * warp
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, COPIED_STATE)))[:, None, None]
    state_row = warp * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, COPIED_STATE)))[None, :, None]
    state_col = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, COPIED_STATE)))[None, None, :]
    checkpoint_mask = (state_row < K) & (state_col < V)
    checkpoint_offsets = state_row * V + state_col
    begin = gl.cast(end, gl.int64)
    q += b * stride_q_b + (start + begin) * stride_q_s + (n // (N // NQ)).to(gl.int64) * stride_q_n
    k += b * stride_k_b + (start + begin) * stride_k_s + (n // (N // NK)).to(gl.int64) * stride_k_n
    v += b * stride_v_b + (start + begin) * stride_v_s + (n // (N // NV)).to(gl.int64) * stride_v_n
    x += b * stride_x_b + start * stride_x_s + (n // (N // NF)).to(gl.int64) * stride_x_n
    x_at = x + begin * stride_x
    dy += b * stride_dy_b + (start + begin) * stride_dy_s + n.to(gl.int64) * stride_dy_n
    checkpoints += ((interval + end // INTERVAL) * N + n) * (K * V)
    k_of = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, 8, ROWS], PLACE_OF_KEYS)
    q_of = gl.allocate_shared_memory(q.dtype.element_ty, [WARPS, 8, ROWS], PLACE_OF_KEYS)
    v_of = gl.allocate_shared_memory(v.dtype.element_ty, [WARPS, 8, 16], PLACE)
    dy_of = gl.allocate_shared_memory(dy.dtype.element_ty, [WARPS, 8, 16], PLACE)
    h_of = gl.allocate_shared_memory(checkpoints.dtype.element_ty, [WARPS, ROWS, 16], PLACE_OF_CHECKPOINT)
    slopes_0 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, 2 * ROWS, 8], PLACE)
    gaps_0 = gl.allocate_shared_memory(gl.float32, [WARPS, 2 * ROWS, 8], PLACE)
    states_0 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, ROWS, 16], PLACE_OF_STATES)
    slopes_1 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, 2 * ROWS, 8], PLACE)
    gaps_1 = gl.allocate_shared_memory(gl.float32, [WARPS, 2 * ROWS, 8], PLACE)
    states_1 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, ROWS, 16], PLACE_OF_STATES)
    slopes_2 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, 2 * ROWS, 8], PLACE)
    gaps_2 = gl.allocate_shared_memory(gl.float32, [WARPS, 2 * ROWS, 8], PLACE)
    states_2 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, ROWS, 16], PLACE_OF_STATES)
    slopes_3 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, 2 * ROWS, 8], PLACE)
    gaps_3 = gl.allocate_shared_memory(gl.float32, [WARPS, 2 * ROWS, 8], PLACE)
    states_3 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, ROWS, 16], PLACE_OF_STATES)
    slopes_4 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, 2 * ROWS, 8], PLACE)
    gaps_4 = gl.allocate_shared_memory(gl.float32, [WARPS, 2 * ROWS, 8], PLACE)
    states_4 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, ROWS, 16], PLACE_OF_STATES)
    slopes_5 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, 2 * ROWS, 8], PLACE)
    gaps_5 = gl.allocate_shared_memory(gl.float32, [WARPS, 2 * ROWS, 8], PLACE)
    states_5 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, ROWS, 16], PLACE_OF_STATES)
    slopes_6 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, 2 * ROWS, 8], PLACE)
    gaps_6 = gl.allocate_shared_memory(gl.float32, [WARPS, 2 * ROWS, 8], PLACE)
    states_6 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, ROWS, 16], PLACE_OF_STATES)
    slopes_7 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, 2 * ROWS, 8], PLACE)
    gaps_7 = gl.allocate_shared_memory(gl.float32, [WARPS, 2 * ROWS, 8], PLACE)
    states_7 = gl.allocate_shared_memory(k.dtype.element_ty, [WARPS, ROWS, 16], PLACE_OF_STATES)

    # What it writes of one: each from where the last interval begins, but that written with the next interval.
    row_slot = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, SLOT_KEYS)))[None, None, :]
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, SLOT_KEYS)))[:, None, None]
    row = warp * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, SLOT_KEYS)))[None, :, None]
    row_mask = (row < K) & (row_slot >= 0)
    sum_col = gl.arange(0, 16, gl.SliceLayout(1, gl.SliceLayout(0, OVER_WARPS)))[:, None]
    sum_slot = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(0, OVER_WARPS)))[None, :]
    sum_mask = (sum_col < V) & (sum_slot >= 0)
    scalar_slot = gl.arange(0, 8, gl.SliceLayout(0, OVER_THREADS))
    parts_dv = gl.allocate_shared_memory(gl.float32, [WARPS, 16, 8], PLACE)
    parts_df = gl.allocate_shared_memory(gl.float32, [WARPS * 32, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    stride_dq: gl.constexpr = 64 if ATOMIC else 128
    if WANT_Q:
        dq += (token * 1 + n // 2) * 64 if ATOMIC else (token * 2 + n) * 64
        dq += begin * stride_dq
    stride_dk: gl.constexpr = 64 if ATOMIC else 128
    if WANT_K:
        dk += (token * 1 + n // 2) * 64 if ATOMIC else (token * 2 + n) * 64
        dk += (begin + INTERVAL) * stride_dk
    stride_dv: gl.constexpr = 32
    if WANT_V:
        dv += (token * 2 + n) * 16
        dv += (begin + INTERVAL) * stride_dv
    stride_df: gl.constexpr = 2
    if WANT_F:
        df += (token * 2 + n)
        df += (begin + INTERVAL) * stride_df

    # Where a thread has which element of the state and of the weight, and which step's slot of an operand.
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, BACKWARD_TILE)))[:, None, None]
    i = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, BACKWARD_TILE)))[None, :, None]
    j = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, BACKWARD_TILE)))[None, None, :]
    tile_row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, BACKWARD_TILE)))[None, :, None]
    rows = warp * ROWS + tile_row % 8 * (ROWS // 8) + tile_row // 16 * 2 + tile_row // 8 % 2  # as tile_rows has them
    state_mask = (rows < K) & (j < V)
    state_offsets = rows * V + j
    weight_mask = (i < V) & (j < V) & (warp >= 0)
    w += (n // (N // NW)).to(gl.int64) * stride_w_n
    w_ij = i.to(gl.int64) * stride_w_i + j.to(gl.int64) * stride_w_j + 0 * warp
    w_ji = j.to(gl.int64) * stride_w_i + i.to(gl.int64) * stride_w_j + 0 * warp
    w_t = gl.convert_layout(rounded(gl.load(w + w_ji, mask=weight_mask, other=0.0).to(gl.float32)), RIGHT)
    w = gl.convert_layout(rounded(gl.load(w + w_ij, mask=weight_mask, other=0.0).to(gl.float32)), RIGHT)
    tile_slot = j % 8 + 0 * tile_row + 0 * warp
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))[:, None, None]
    slot = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
    col_slot = slot + 0 * gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None] + 0 * warp
    key_slot_of = slot + 0 * gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None] + 0 * warp
    rate = gl.exp(gl.load(A_log + n // (N // NF)))
    dt_bias = gl.load(dt_bias + n // (N // NF))
    sum_dA_log = gl.zeros((8,), gl.float32, gl.SliceLayout(0, OVER_THREADS))
    sum_ddt_bias = sum_dA_log
    zeros = gl.zeros((WARPS, ROWS, 16), gl.float32, BACKWARD_TILE)
    c = zeros
    if USE_FINAL_STATE_GRADIENT:
        c = gl.load(dht + (b * N + n) * (K * V) + state_offsets, mask=state_mask, other=0.0)
    sum_dw = gl.zeros((WARPS, 16, 16), gl.float32, BACKWARD_TILE)  # of its transpose, for each warp
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, BACKWARD_TILE)))[:, None, None]
    dw_offsets = (program.to(gl.int64) * WARPS + warp) * (V * V) + j * V + i

    # The last interval, of which steps may be missing.
    left = gl.where(length > 0, length - end, 0)
    k_of.store(gl.load(k + key_offsets, mask=key_mask & (key_slot < left), other=0.0))
    q_of.store(gl.load(q + query_offsets, mask=key_mask & (key_slot < left), other=0.0))
    v_of.store(gl.load(v + value_offsets, mask=value_mask & (value_slot < left), other=0.0))
    dy_of.store(gl.load(dy + dy_offsets, mask=value_mask & (value_slot < left), other=0.0))
    h_of.store(gl.load(checkpoints + checkpoint_offsets, mask=checkpoint_mask & (left > 0), other=0.0))
    next_x_0 = load_gate(x_at + 0 * stride_x, left > 0)
    next_x_1 = load_gate(x_at + 1 * stride_x, left > 1)
    next_x_2 = load_gate(x_at + 2 * stride_x, left > 2)
    next_x_3 = load_gate(x_at + 3 * stride_x, left > 3)
    next_x_4 = load_gate(x_at + 4 * stride_x, left > 4)
    next_x_5 = load_gate(x_at + 5 * stride_x, left > 5)
    next_x_6 = load_gate(x_at + 6 * stride_x, left > 6)
    next_x_7 = load_gate(x_at + 7 * stride_x, left > 7)
    done_dk = gl.zeros((WARPS, ROWS, 8), gl.float32, BACKWARD_TILE)
    done_dv = gl.zeros((WARPS, 16, 8), gl.float32, BACKWARD_TILE)
    df_0 = gl.zeros((WARPS, 8, 4), gl.float32, THREADS)
    df_1 = gl.zeros((WARPS, 8, 4), gl.float32, THREADS)
    df_2 = gl.zeros((WARPS, 8, 4), gl.float32, THREADS)
    df_3 = gl.zeros((WARPS, 8, 4), gl.float32, THREADS)
    df_4 = gl.zeros((WARPS, 8, 4), gl.float32, THREADS)
    df_5 = gl.zeros((WARPS, 8, 4), gl.float32, THREADS)
    df_6 = gl.zeros((WARPS, 8, 4), gl.float32, THREADS)
    df_7 = gl.zeros((WARPS, 8, 4), gl.float32, THREADS)
    for t in range(end, -1, -INTERVAL):
        if ALIGNED:
            async_copy.wait_group(0)
        keys = trivially(tile_rows(k_of.permute((0, 2, 1)).load(SLOT_KEYS)), BACKWARD_TILE)
        queries = trivially(tile_rows(q_of.permute((0, 2, 1)).load(SLOT_KEYS)), BACKWARD_TILE)
        values = v_of.load(SLOT_VALUES)
        dys = dy_of.load(SLOT_VALUES)
        h = trivially(tile_rows(h_of.load(CHECKPOINT)), BACKWARD_TILE).to(gl.float32)
        keys_t = gl.convert_layout(transposed(keys).permute((0, 2, 1)), RIGHT)
        values_t = trivially(values.permute((0, 2, 1)), RIGHT)
        dys_t = trivially(dys.permute((0, 2, 1)), RIGHT)
        keys, queries, values, dys = as_left(keys), as_left(queries), as_right(values), as_right(dys)
        f_0, u_0 = gate(next_x_0, rate, dt_bias)
        f_1, u_1 = gate(next_x_1, rate, dt_bias)
        f_2, u_2 = gate(next_x_2, rate, dt_bias)
        f_3, u_3 = gate(next_x_3, rate, dt_bias)
        f_4, u_4 = gate(next_x_4, rate, dt_bias)
        f_5, u_5 = gate(next_x_5, rate, dt_bias)
        f_6, u_6 = gate(next_x_6, rate, dt_bias)
        f_7, u_7 = gate(next_x_7, rate, dt_bias)

        # Forwards: the states that steps start from, slopes and gaps.
        operand = rounded(h)
        sum_dq = gl.zeros((WARPS, ROWS, 8), gl.float32, BACKWARD_TILE)
        if WANT_W:
            states_0.store(operand)
        z = tanh(mma_v2(left_operand(operand), w, with_outer(keys, only(values, tile_slot, 0), zeros)))
        uz = u_0 * z
        if CARRIES:
            keep(rounded(u_0 - uz * z), slopes_0)
            keep((h - z).to(gl.float32), gaps_0)
        h = gl.fma(f_0 + zeros, h, uz)
        operand = rounded(h)
        if WANT_Q:
            sum_dq = mma_v2(left_operand(operand), only(dys_t, col_slot, 0), sum_dq)
        if WANT_W:
            states_1.store(operand)
        z = tanh(mma_v2(left_operand(operand), w, with_outer(keys, only(values, tile_slot, 1), zeros)))
        uz = u_1 * z
        if CARRIES:
            keep(rounded(u_1 - uz * z), slopes_1)
            keep((h - z).to(gl.float32), gaps_1)
        h = gl.fma(f_1 + zeros, h, uz)
        operand = rounded(h)
        if WANT_Q:
            sum_dq = mma_v2(left_operand(operand), only(dys_t, col_slot, 1), sum_dq)
        if WANT_V:
            parts_dv.store(done_dv)
        if WANT_F or WANT_GATE:
            parts_df.store(gl.join(gl.join(gl.join(df_0, df_4), gl.join(df_2, df_6)), gl.join(gl.join(df_1, df_5), gl.join(df_3, df_7))).reshape([WARPS * 32, 8]))
        if WANT_W:
            states_2.store(operand)
        z = tanh(mma_v2(left_operand(operand), w, with_outer(keys, only(values, tile_slot, 2), zeros)))
        uz = u_2 * z
        if CARRIES:
            keep(rounded(u_2 - uz * z), slopes_2)
            keep((h - z).to(gl.float32), gaps_2)
        h = gl.fma(f_2 + zeros, h, uz)
        operand = rounded(h)
        if WANT_Q:
            sum_dq = mma_v2(left_operand(operand), only(dys_t, col_slot, 2), sum_dq)
        if WANT_K:
            contribute(dk + row_slot * stride_dk + row, trivially(memory_rows(done_dk), SLOT_KEYS), gl.where(t + INTERVAL + row_slot < length, row_mask, False), ATOMIC)
            dk -= INTERVAL * stride_dk
        if WANT_W:
            states_3.store(operand)
        z = tanh(mma_v2(left_operand(operand), w, with_outer(keys, only(values, tile_slot, 3), zeros)))
        uz = u_3 * z
        if CARRIES:
            keep(rounded(u_3 - uz * z), slopes_3)
            keep((h - z).to(gl.float32), gaps_3)
        h = gl.fma(f_3 + zeros, h, uz)
        operand = rounded(h)
        if WANT_Q:
            sum_dq = mma_v2(left_operand(operand), only(dys_t, col_slot, 3), sum_dq)
        if WANT_V:
            dv_t = gl.sum(parts_dv.load(OVER_WARPS), 0)
            gl.store(dv + sum_slot * stride_dv + sum_col, dv_t, mask=gl.where(t + INTERVAL + sum_slot < length, sum_mask, False))
            dv -= INTERVAL * stride_dv
        if WANT_F or WANT_GATE:
            x_t = load_gate(x + gl.cast(t + INTERVAL + scalar_slot, gl.int64) * stride_x_s, t + INTERVAL + scalar_slot < length)
            f_by_x, f_by_A_log = gate_slopes(x_t, gate(x_t, rate, dt_bias)[0], rate, dt_bias)
            df_t = gl.where(t + INTERVAL + scalar_slot < length, gl.sum(parts_df.load(OVER_THREADS), 0), 0.0)
            sum_dA_log += df_t * f_by_A_log
            df_t *= f_by_x
            sum_ddt_bias += df_t
        if WANT_F:
            gl.store(df + scalar_slot * stride_df, df_t, mask=t + INTERVAL + scalar_slot < length)
            df -= INTERVAL * stride_df
        if WANT_W:
            states_4.store(operand)
        z = tanh(mma_v2(left_operand(operand), w, with_outer(keys, only(values, tile_slot, 4), zeros)))
        uz = u_4 * z
        if CARRIES:
            keep(rounded(u_4 - uz * z), slopes_4)
            keep((h - z).to(gl.float32), gaps_4)
        h = gl.fma(f_4 + zeros, h, uz)
        operand = rounded(h)
        if WANT_Q:
            sum_dq = mma_v2(left_operand(operand), only(dys_t, col_slot, 4), sum_dq)
        if WANT_W:
            states_5.store(operand)
        z = tanh(mma_v2(left_operand(operand), w, with_outer(keys, only(values, tile_slot, 5), zeros)))
        uz = u_5 * z
        if CARRIES:
            keep(rounded(u_5 - uz * z), slopes_5)
            keep((h - z).to(gl.float32), gaps_5)
        h = gl.fma(f_5 + zeros, h, uz)
        operand = rounded(h)
        if WANT_Q:
            sum_dq = mma_v2(left_operand(operand), only(dys_t, col_slot, 5), sum_dq)
        if WANT_W:
            states_6.store(operand)
        z = tanh(mma_v2(left_operand(operand), w, with_outer(keys, only(values, tile_slot, 6), zeros)))
        uz = u_6 * z
        if CARRIES:
            keep(rounded(u_6 - uz * z), slopes_6)
            keep((h - z).to(gl.float32), gaps_6)
        h = gl.fma(f_6 + zeros, h, uz)
        operand = rounded(h)
        if WANT_Q:
            sum_dq = mma_v2(left_operand(operand), only(dys_t, col_slot, 6), sum_dq)
        if WANT_W:
            states_7.store(operand)
        z = tanh(mma_v2(left_operand(operand), w, with_outer(keys, only(values, tile_slot, 7), zeros)))
        uz = u_7 * z
        if CARRIES:
            keep(rounded(u_7 - uz * z), slopes_7)
            keep((h - z).to(gl.float32), gaps_7)
        h = gl.fma(f_7 + zeros, h, uz)
        operand = rounded(h)
        if WANT_Q:
            sum_dq = mma_v2(left_operand(operand), only(dys_t, col_slot, 7), sum_dq)

        # The interval before this one is on its way while this one goes backwards.
        before = t > 0
        k -= gl.where(before, INTERVAL * stride_k, 0)
        q -= gl.where(before, INTERVAL * stride_q, 0)
        v -= gl.where(before, INTERVAL * stride_v, 0)
        dy -= gl.where(before, INTERVAL * stride_dy, 0)
        x_at -= gl.where(before, INTERVAL * stride_x, 0)
        checkpoints -= gl.where(before, N * K * V, 0)
        bring(k_of, k + key_offsets, key_mask & before, ALIGNED)
        bring(q_of, q + query_offsets, key_mask & before, ALIGNED)
        bring(v_of, v + value_offsets, value_mask & before, ALIGNED)
        bring(dy_of, dy + dy_offsets, value_mask & before, ALIGNED)
        bring(h_of, checkpoints + checkpoint_offsets, checkpoint_mask & before, ALIGNED)
        if ALIGNED:
            async_copy.commit_group()
        next_x_0 = load_gate(x_at + 0 * stride_x, before)
        next_x_1 = load_gate(x_at + 1 * stride_x, before)
        next_x_2 = load_gate(x_at + 2 * stride_x, before)
        next_x_3 = load_gate(x_at + 3 * stride_x, before)
        next_x_4 = load_gate(x_at + 4 * stride_x, before)
        next_x_5 = load_gate(x_at + 5 * stride_x, before)
        next_x_6 = load_gate(x_at + 6 * stride_x, before)
        next_x_7 = load_gate(x_at + 7 * stride_x, before)

        # Backwards: what gradients are of.
        done_dk = gl.zeros((WARPS, ROWS, 8), gl.float32, BACKWARD_TILE)
        done_dv = gl.zeros((WARPS, 16, 8), gl.float32, BACKWARD_TILE)
        if CARRIES:
            limit = gl.where(t + 7 < length, bound, float("inf"))
            g = clamp(with_outer(queries, only(dys, tile_slot, 7), c), limit)
            low = rounded(g)
            d = times(low, kept(slopes_7))
            d_left = left_operand(d)
            c = gl.fma(f_7 + zeros, g, mma_v2(d_left, w_t, zeros))
            if WANT_F or WANT_GATE:
                df_7 = over_registers(g * kept(gaps_7).to(gl.float32))
            if WANT_K:
                done_dk = mma_v2(d_left, only(values_t, col_slot, 7), done_dk)
            d_t = left_operand(transposed(d))
            if WANT_V:
                done_dv = mma_v2(d_t, only(keys_t, key_slot_of, 7), done_dv)
            if WANT_W:
                sum_dw = mma_v2(d_t, states_7.load(RIGHT), sum_dw)
        if CARRIES:
            limit = gl.where(t + 6 < length, bound, float("inf"))
            g = clamp(with_outer(queries, only(dys, tile_slot, 6), c), limit)
            low = rounded(g)
            d = times(low, kept(slopes_6))
            d_left = left_operand(d)
            c = gl.fma(f_6 + zeros, g, mma_v2(d_left, w_t, zeros))
            if WANT_F or WANT_GATE:
                df_6 = over_registers(g * kept(gaps_6).to(gl.float32))
            if WANT_K:
                done_dk = mma_v2(d_left, only(values_t, col_slot, 6), done_dk)
            d_t = left_operand(transposed(d))
            if WANT_V:
                done_dv = mma_v2(d_t, only(keys_t, key_slot_of, 6), done_dv)
            if WANT_W:
                sum_dw = mma_v2(d_t, states_6.load(RIGHT), sum_dw)
        if CARRIES:
            limit = gl.where(t + 5 < length, bound, float("inf"))
            g = clamp(with_outer(queries, only(dys, tile_slot, 5), c), limit)
            low = rounded(g)
            d = times(low, kept(slopes_5))
            d_left = left_operand(d)
            c = gl.fma(f_5 + zeros, g, mma_v2(d_left, w_t, zeros))
            if WANT_F or WANT_GATE:
                df_5 = over_registers(g * kept(gaps_5).to(gl.float32))
            if WANT_K:
                done_dk = mma_v2(d_left, only(values_t, col_slot, 5), done_dk)
            d_t = left_operand(transposed(d))
            if WANT_V:
                done_dv = mma_v2(d_t, only(keys_t, key_slot_of, 5), done_dv)
            if WANT_W:
                sum_dw = mma_v2(d_t, states_5.load(RIGHT), sum_dw)
        if WANT_Q:
            contribute(dq + row_slot * stride_dq + row, trivially(memory_rows(sum_dq), SLOT_KEYS), gl.where(t + row_slot < length, row_mask, False), ATOMIC)
            dq -= INTERVAL * stride_dq
        if CARRIES:
            limit = gl.where(t + 4 < length, bound, float("inf"))
            g = clamp(with_outer(queries, only(dys, tile_slot, 4), c), limit)
            low = rounded(g)
            d = times(low, kept(slopes_4))
            d_left = left_operand(d)
            c = gl.fma(f_4 + zeros, g, mma_v2(d_left, w_t, zeros))
            if WANT_F or WANT_GATE:
                df_4 = over_registers(g * kept(gaps_4).to(gl.float32))
            if WANT_K:
                done_dk = mma_v2(d_left, only(values_t, col_slot, 4), done_dk)
            d_t = left_operand(transposed(d))
            if WANT_V:
                done_dv = mma_v2(d_t, only(keys_t, key_slot_of, 4), done_dv)
            if WANT_W:
                sum_dw = mma_v2(d_t, states_4.load(RIGHT), sum_dw)
        if CARRIES:
            limit = gl.where(t + 3 < length, bound, float("inf"))
            g = clamp(with_outer(queries, only(dys, tile_slot, 3), c), limit)
            low = rounded(g)
            d = times(low, kept(slopes_3))
            d_left = left_operand(d)
            c = gl.fma(f_3 + zeros, g, mma_v2(d_left, w_t, zeros))
            if WANT_F or WANT_GATE:
                df_3 = over_registers(g * kept(gaps_3).to(gl.float32))
            if WANT_K:
                done_dk = mma_v2(d_left, only(values_t, col_slot, 3), done_dk)
            d_t = left_operand(transposed(d))
            if WANT_V:
                done_dv = mma_v2(d_t, only(keys_t, key_slot_of, 3), done_dv)
            if WANT_W:
                sum_dw = mma_v2(d_t, states_3.load(RIGHT), sum_dw)
        if CARRIES:
            limit = gl.where(t + 2 < length, bound, float("inf"))
            g = clamp(with_outer(queries, only(dys, tile_slot, 2), c), limit)
            low = rounded(g)
            d = times(low, kept(slopes_2))
            d_left = left_operand(d)
            c = gl.fma(f_2 + zeros, g, mma_v2(d_left, w_t, zeros))
            if WANT_F or WANT_GATE:
                df_2 = over_registers(g * kept(gaps_2).to(gl.float32))
            if WANT_K:
                done_dk = mma_v2(d_left, only(values_t, col_slot, 2), done_dk)
            d_t = left_operand(transposed(d))
            if WANT_V:
                done_dv = mma_v2(d_t, only(keys_t, key_slot_of, 2), done_dv)
            if WANT_W:
                sum_dw = mma_v2(d_t, states_2.load(RIGHT), sum_dw)
        if CARRIES:
            limit = gl.where(t + 1 < length, bound, float("inf"))
            g = clamp(with_outer(queries, only(dys, tile_slot, 1), c), limit)
            low = rounded(g)
            d = times(low, kept(slopes_1))
            d_left = left_operand(d)
            c = gl.fma(f_1 + zeros, g, mma_v2(d_left, w_t, zeros))
            if WANT_F or WANT_GATE:
                df_1 = over_registers(g * kept(gaps_1).to(gl.float32))
            if WANT_K:
                done_dk = mma_v2(d_left, only(values_t, col_slot, 1), done_dk)
            d_t = left_operand(transposed(d))
            if WANT_V:
                done_dv = mma_v2(d_t, only(keys_t, key_slot_of, 1), done_dv)
            if WANT_W:
                sum_dw = mma_v2(d_t, states_1.load(RIGHT), sum_dw)
        if CARRIES:
            limit = gl.where(t + 0 < length, bound, float("inf"))
            g = clamp(with_outer(queries, only(dys, tile_slot, 0), c), limit)
            low = rounded(g)
            d = times(low, kept(slopes_0))
            d_left = left_operand(d)
            c = gl.fma(f_0 + zeros, g, mma_v2(d_left, w_t, zeros))
            if WANT_F or WANT_GATE:
                df_0 = over_registers(g * kept(gaps_0).to(gl.float32))
            if WANT_K:
                done_dk = mma_v2(d_left, only(values_t, col_slot, 0), done_dk)
            d_t = left_operand(transposed(d))
            if WANT_V:
                done_dv = mma_v2(d_t, only(keys_t, key_slot_of, 0), done_dv)
            if WANT_W:
                sum_dw = mma_v2(d_t, states_0.load(RIGHT), sum_dw)

    # The first interval's, where there is one.
    if WANT_V:
        parts_dv.store(done_dv)
    if WANT_F or WANT_GATE:
        parts_df.store(gl.join(gl.join(gl.join(df_0, df_4), gl.join(df_2, df_6)), gl.join(gl.join(df_1, df_5), gl.join(df_3, df_7))).reshape([WARPS * 32, 8]))
    if WANT_K:
        contribute(dk + row_slot * stride_dk + row, trivially(memory_rows(done_dk), SLOT_KEYS), gl.where(0 + row_slot < length, row_mask, False), ATOMIC)
        dk -= INTERVAL * stride_dk
    if WANT_V:
        dv_t = gl.sum(parts_dv.load(OVER_WARPS), 0)
        gl.store(dv + sum_slot * stride_dv + sum_col, dv_t, mask=gl.where(0 + sum_slot < length, sum_mask, False))
        dv -= INTERVAL * stride_dv
    if WANT_F or WANT_GATE:
        x_t = load_gate(x + gl.cast(0 + scalar_slot, gl.int64) * stride_x_s, 0 + scalar_slot < length)
        f_by_x, f_by_A_log = gate_slopes(x_t, gate(x_t, rate, dt_bias)[0], rate, dt_bias)
        df_t = gl.where(0 + scalar_slot < length, gl.sum(parts_df.load(OVER_THREADS), 0), 0.0)
        sum_dA_log += df_t * f_by_A_log
        df_t *= f_by_x
        sum_ddt_bias += df_t
    if WANT_F:
        gl.store(df + scalar_slot * stride_df, df_t, mask=0 + scalar_slot < length)
        df -= INTERVAL * stride_df
    if WANT_H:
        gl.store(dh0 + (b * N + n) * (K * V) + state_offsets, c, mask=state_mask)
    if WANT_W:
        gl.store(dw + dw_offsets, sum_dw, mask=weight_mask)
    if WANT_GATE:
        gl.store(dA_log + program * 8 + scalar_slot, sum_dA_log)
        gl.store(ddt_bias + program * 8 + scalar_slot, sum_ddt_bias)


@gluon.jit
def m2rnn_step_kernel(
    q, k, v, w, x, A_log, dt_bias, state, y, stride_q_b, stride_q_n, stride_q_d, stride_k_b, stride_k_n,
    stride_k_d, stride_v_b, stride_v_n, stride_v_d, stride_w_n, stride_w_i, stride_w_j, stride_x_b,
    stride_x_n, stride_h_b, stride_h_n, stride_h_i, stride_h_j,
):  # fmt: skip
    """Advance one head's state by one step in place, FORWARD_ROWS rows at a time."""
    n = gl.program_id(0) % N
    b = (gl.program_id(0) // N).to(gl.int64)
    cols = gl.arange(0, V_PAD, gl.SliceLayout(0, FORWARD_TILE))
    col_mask = cols < V

    q += b * stride_q_b + (n // (N // NQ)).to(gl.int64) * stride_q_n
    k += b * stride_k_b + (n // (N // NK)).to(gl.int64) * stride_k_n
    v += b * stride_v_b + (n // (N // NV)).to(gl.int64) * stride_v_n
    x += b * stride_x_b + (n // (N // NF)).to(gl.int64) * stride_x_n
    state += b * stride_h_b + n.to(gl.int64) * stride_h_n
    w = load_weight(w, stride_w_n, stride_w_i, stride_w_j, n // (N // NW), FORWARD_TILE)
    rate = gl.exp(gl.load(A_log + n // (N // NF)))
    dt_bias = gl.load(dt_bias + n // (N // NF))
    v = gl.load(v + cols.to(gl.int64) * stride_v_d, mask=col_mask, other=0.0)
    f, u = gate(gl.load(x).to(gl.float32), rate, dt_bias)
    y_0 = gl.zeros((V_PAD,), gl.float32, gl.SliceLayout(0, FORWARD_TILE))
    for first in range(0, FORWARD_PARTS * FORWARD_ROWS, FORWARD_ROWS):
        rows = (first + gl.arange(0, FORWARD_ROWS, FORWARD_VECTOR)).to(gl.int64)
        row_mask = rows < K
        state_rows = in_tile(rows, FORWARD_TILE)[:, None]
        address = state + state_rows * stride_h_i + cols.to(gl.int64)[None, :] * stride_h_j
        state_mask = (state_rows < K) & col_mask[None, :]
        q_0 = gl.load(q + rows * stride_q_d, mask=row_mask, other=0.0)
        k_0 = gl.load(k + rows * stride_k_d, mask=row_mask, other=0.0)
        h = gl.load(address, mask=state_mask, other=0.0).to(gl.float32)
        h = advance(h, candidate(h, w, outer(k_0, v, h)), f, u)
        y_0 += gl.sum(column(q_0, h) * h, 0)
        gl.store(address, h, mask=state_mask)
    gl.store(y + (b * N + n) * V + cols, y_0, mask=col_mask)


@gluon.jit
def m2rnn_sum_kernel(rows, out, elements, CONTRIBUTORS: gl.constexpr, DIM: gl.constexpr):
    """Sum the rows that CONTRIBUTORS programs stored for each row of ``out``, always in one order, and round once."""
    i = gl.program_id(0).to(gl.int64) * SUM_BLOCK + gl.arange(0, SUM_BLOCK, SUM_LAYOUT)
    row = rows + (i // DIM) * (CONTRIBUTORS * DIM) + i % DIM
    total = gl.zeros((SUM_BLOCK,), gl.float32, SUM_LAYOUT)
    for _ in range(CONTRIBUTORS):
        total += gl.load(row, mask=i < elements, other=0.0)
        row += DIM
    gl.store(out + i, total, mask=i < elements)


# How m2gen's launchers, or those of a package, launch these kernels; of results by step: heads, contributors, shape
LAUNCH = {
    "computes_gate": True,
    "interval": 8,
    "checkpoints": "float16",
    "forward_programs": 2,
    "backward_programs": 2,
    "segments": 1,
    "shortest_segment": 0,
    "state": (2, 64, 16),
    "weight": (2, 2, 16, 16),
    "gate": (2, 8),
    "scratch": 0,
    "y": (2, 1, (16,)),
    "dq": (1, 2, (64,)),
    "dk": (1, 2, (64,)),
    "dv": (2, 1, (16,)),
    "df": (2, 1, ()),
    "forward_adds": False,
    "backward_adds": True,
    "short": 64,
    "aligned": True,
    "sum_block": 512,
    "forward_options": {
        "num_warps": 2,
        "num_stages": 1,
        "maxnreg": 255,
        "enable_fp_fusion": True,
    },
    "backward_options": {
        "num_warps": 2,
        "num_stages": 1,
        "enable_fp_fusion": True,
    },
}


def forward_effort(target):
    """Return how much ptxas tries for the forward kernel on ``target``, as the option ``ptx_options``; None: as usual.

    The ptxas that Triton has from 3.9 on for Hopper and later, of CUDA 13.4, never ends at its usual level on some
    loops that carry what is always zero. A level that PTXAS_OPTIONS or DISABLE_PTXAS_OPT sets stands.
    """
    given = triton.knobs.nvidia.ptxas_options
    if TRITON < (3, 9) or target.backend != "cuda" or target.arch < 90 or triton.knobs.nvidia.disable_ptxas_opt:
        return given
    options = (given or "").split()
    if any(option.lstrip("-").startswith(("O", "opt-level")) for option in options):
        return given
    return " ".join(("--Ofast-compile=min", *options))


def current_forward_effort(_):
    """Return ``forward_effort`` for the current device."""
    return forward_effort(triton.runtime.driver.active.get_current_target())


if TRITON >= (3, 9) and torch.version.hip is None and not triton.knobs.runtime.interpret:
    m2rnn_forward_kernel = triton.heuristics({"ptx_options": current_forward_effort})(m2rnn_forward_kernel)
