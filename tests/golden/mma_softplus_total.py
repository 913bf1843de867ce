"""M2RNN kernels for k64_v16_q1_k1_v2_f2_w2_bf16_total_exact_softplus, schedule mma_f32x1u4a_b32x1c2as_i16_exp.



H_t = f_t H_(t-1) + (1 - f_t) tanh(H_(t-1) W + k_t v_t^T),  y_t = H_t^T q_t   (arXiv 2603.14360)

    B, S, N      sequences, steps, heads of the state; head n reads group n // (N // NX) of operand X
    K, V         rows (state expansion) and columns (head dim) of the state
    q k v dy     q_t (K,), k_t (K,), v_t (V,) and dy_t (V,) of this program's head
    x, f, u      x_t, from which the gate is computed; f_t and 1 - f_t
    h, z, w      state H (rows, V), candidate Z (rows, V), state weight W (V, V)
    c, g, d      gradients of H_t from the future, of H_t, and of the argument of tanh
    gap, slope   H_(t-1) - Z_t, and the derivative u (1 - Z^2) of H_t by the argument of tanh
    r_           what the states of an interval are rebuilt from; next_, of what is loaded ahead of time
    x_s, x_n     element strides of operand x by step, by head (and b batch, d element, i row, j column)
"""

import torch
import triton.language
from triton.experimental import gluon
from triton.experimental.gluon import language as tl  # Triton's functions, on tensors whose layouts are written down
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

K: tl.constexpr = tl.constexpr(64)
V: tl.constexpr = tl.constexpr(16)
V_PAD: tl.constexpr = tl.constexpr(16)
N: tl.constexpr = tl.constexpr(2)
NQ: tl.constexpr = tl.constexpr(1)
NK: tl.constexpr = tl.constexpr(1)
NV: tl.constexpr = tl.constexpr(2)
NF: tl.constexpr = tl.constexpr(2)
NW: tl.constexpr = tl.constexpr(2)
INTERVAL: tl.constexpr = tl.constexpr(16)
FORWARD_ROWS: tl.constexpr = tl.constexpr(32)
FORWARD_PARTS: tl.constexpr = tl.constexpr(2)
UNROLL: tl.constexpr = tl.constexpr(4)
BACKWARD_ROWS: tl.constexpr = tl.constexpr(32)
BACKWARD_PARTS: tl.constexpr = tl.constexpr(2)
CHUNK: tl.constexpr = tl.constexpr(2)
SUM_BLOCK: tl.constexpr = tl.constexpr(256)
FORWARD_TILE: tl.constexpr = tl.constexpr(tl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))
BACKWARD_TILE: tl.constexpr = tl.constexpr(tl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))
FORWARD_VECTOR: tl.constexpr = tl.constexpr(tl.DistributedLinearLayout(
    reg_bases=[[1], [2]], lane_bases=[[0], [0], [4], [8], [16]],
    warp_bases=[], block_bases=[], shape=[32],
))  # fmt: skip
BACKWARD_VECTOR: tl.constexpr = tl.constexpr(tl.DistributedLinearLayout(
    reg_bases=[[1], [2]], lane_bases=[[0], [0], [4], [8], [16]],
    warp_bases=[], block_bases=[], shape=[32],
))  # fmt: skip
FORWARD_KEYS: tl.constexpr = tl.constexpr(tl.DistributedLinearLayout(
    reg_bases=[[1, 0], [2, 0], [0, 1], [0, 8]], lane_bases=[[0, 2], [0, 4], [4, 0], [8, 0], [16, 0]],
    warp_bases=[], block_bases=[], shape=[32, 16],
))  # fmt: skip
FORWARD_VALUES: tl.constexpr = tl.constexpr(tl.DotOperandLayout(1, FORWARD_TILE, 2))
BACKWARD_SPREAD: tl.constexpr = tl.constexpr(tl.BlockedLayout([1], [32], [1], [0]))
BACKWARD_SCRATCH: tl.constexpr = tl.constexpr(tl.SwizzledSharedLayout(8, 2, 2, [1, 0]))
SUM_LAYOUT: tl.constexpr = tl.constexpr(tl.BlockedLayout([1], [32], [1], [0]))
FORWARD_SUMS: tl.constexpr = tl.constexpr(tl.DistributedLinearLayout(
    reg_bases=[[0, 1], [0, 8]], lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
    warp_bases=[], block_bases=[], shape=[8, 16],
))  # fmt: skip
ROW_SUMS: tl.constexpr = tl.constexpr(tl.DistributedLinearLayout(
    reg_bases=[[0, 1], [0, 8]], lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
    warp_bases=[], block_bases=[], shape=[8, 16],
))  # fmt: skip
COL_SUMS: tl.constexpr = tl.constexpr(tl.DistributedLinearLayout(
    reg_bases=[[8, 0], [16, 0]], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
    warp_bases=[], block_bases=[], shape=[32, 4],
))  # fmt: skip
COL_SUMS_LOADED: tl.constexpr = tl.constexpr(tl.DistributedLinearLayout(
    reg_bases=[[1, 0], [2, 0]], lane_bases=[[0, 1], [0, 2], [4, 0], [8, 0], [16, 0]],
    warp_bases=[], block_bases=[], shape=[32, 4],
))  # fmt: skip
ALL_SUMS: tl.constexpr = tl.constexpr(tl.DistributedLinearLayout(
    reg_bases=[], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
    warp_bases=[], block_bases=[], shape=[8, 4],
))  # fmt: skip


@gluon.jit
def tanh(x):
    """tanh to float32 accuracy: near 0, where 1 - 2 / (exp(2|x|) + 1) cancels, the polynomial of Cephes' tanhf."""
    size = tl.abs(x)
    s = x * x
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    tail = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * size) + 1.0)
    return tl.where(size < 0.625, x + x * s * p, tl.where(x < 0.0, -tail, tail))


@gluon.jit
def softplus(x):
    """log(1 + exp(x)) to float32 accuracy: max(x, 0) + log1p(e) for e = exp(-|x|), as the series of 2 atanh."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    r = e / (2.0 + e)  # in (0, 1/3]
    s = r * r
    p = s * (1.0 / 15.0) + 1.0 / 13.0
    p = p * s + 1.0 / 11.0
    p = p * s + 1.0 / 9.0
    p = p * s + 1.0 / 7.0
    p = p * s + 1.0 / 5.0
    p = p * s + 1.0 / 3.0
    return tl.maximum(x, 0.0) + 2.0 * (r + r * s * p)


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), also where that is tiny."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@gluon.jit
def gate(x, rate, dt_bias):
    """f = exp(-a) and 1 - f for a = rate softplus(x + dt_bias), both to float32 accuracy."""
    a = rate * softplus(x + dt_bias)
    f = tl.exp2(-1.4426950408889634 * a)
    p = a * (-1.0 / 5040.0) + 1.0 / 720.0  # Taylor's series, where 1 - f would cancel
    p = p * a - 1.0 / 120.0
    p = p * a + 1.0 / 24.0
    p = p * a - 1.0 / 6.0
    p = p * a + 0.5
    return f, tl.where(a < 0.35, a - a * a * p, 1.0 - f)


@gluon.jit
def gate_slopes(x, f, rate, dt_bias):
    """Derivatives of f by x (or dt_bias), and by A_log = log(rate)."""
    return -f * rate * sigmoid(x + dt_bias), -f * rate * softplus(x + dt_bias)


@gluon.jit
def load_vector(address, mask, inside):
    """Load one step's vector; zeros where the step is not inside the sequence."""
    return tl.load(address, mask=tl.where(inside, mask, False), other=0.0)


@gluon.jit
def load_weight(base, n_stride, i_stride, j_stride, n, TILE: tl.constexpr):
    """Load group n's state weight, (V_PAD, V_PAD), as the right operand of a product."""
    i = tl.arange(0, V_PAD, tl.SliceLayout(1, TILE))
    j = tl.arange(0, V_PAD, tl.SliceLayout(0, TILE))
    offsets = i.to(tl.int64)[:, None] * i_stride + j.to(tl.int64)[None, :] * j_stride
    mask = (i < V)[:, None] & (j < V)[None, :]
    w = tl.load(base + tl.cast(n, tl.int64) * n_stride + offsets, mask=mask, other=0.0)
    return tl.convert_layout(rounded(w.to(tl.float32)), tl.DotOperandLayout(1, TILE, 2))


@gluon.jit
def load_gate(address, inside):
    """Load one step's x as float32; that of f = 1, which changes nothing, where it is not inside the sequence."""
    return tl.load(address, mask=inside, other=float("-inf")).to(tl.float32)


@gluon.jit
def rounded(x):
    """x as an operand of a product."""
    return x.to(tl.bfloat16)


@gluon.jit
def transposed(x):
    """x^T of 16-bit elements: a warp transposes blocks of 8 x 8; that whole blocks move costs nothing."""
    x = tl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
    )
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return x.reshape([R // 8, 8, C // 8, 8]).permute((2, 1, 0, 3)).reshape([C, R])


@gluon.jit
def product(a, b, total):
    """a b + total, summed in float32."""
    layout: tl.constexpr = total.type.layout  # of which the left operand's is another name, so H moves nowhere
    a = tl.convert_layout(a, tl.DotOperandLayout(0, layout, 2))
    return mma_v2(a, tl.convert_layout(b, tl.DotOperandLayout(1, layout, 2)), total)


@gluon.jit
def prefetch(address):
    """Have the L2 fetch the sector of each of these addresses, with no register to wait for them."""
    address = address.to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@gluon.jit
def in_tile(x, TILE: tl.constexpr):
    """x (rows,), of which a thread has loaded neighbours, as rows of a tile: of every eighth row it has one."""
    WARPS: tl.constexpr = TILE.warps_per_cta[0]
    x = x.reshape([WARPS, 8, x.shape[0] // (16 * WARPS), 2]).permute((2, 0, 3, 1)).reshape([x.shape[0]])
    return tl.convert_layout(x, tl.SliceLayout(1, TILE), assert_trivial=True)


@gluon.jit
def as_loaded(x, LAYOUT: tl.constexpr):
    """x (rows of a tile,) as vectors are loaded and stored; undoes ``in_tile``."""
    WARPS: tl.constexpr = x.type.layout.parent.warps_per_cta[0]
    x = x.reshape([x.shape[0] // (16 * WARPS), WARPS, 2, 8]).permute((1, 3, 0, 2)).reshape([x.shape[0]])
    return tl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def columns_as_loaded(x, LAYOUT: tl.constexpr):
    """``as_loaded`` for x (rows, 4) of one warp."""
    x = x.reshape([x.shape[0] // 16, 2, 8, 4]).permute((2, 0, 1, 3)).reshape([x.shape[0], 4])
    return tl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def column(x, tile):
    """x (rows,) as a column beside ``tile``, in float32."""
    TILE: tl.constexpr = tile.type.layout
    x = in_tile(x, TILE)
    return x.to(tl.float32)[:, None]


@gluon.jit
def row_sums(x, LAYOUT: tl.constexpr):
    """Sum x (rows, cols) over the rows that a thread has: (8, cols), of which a lane has one row."""
    x = tl.sum(x.reshape([x.shape[0] // 8, 8, x.shape[1]]), 0)
    return tl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def col_sums_of(x, y, LAYOUT: tl.constexpr):
    """Sum x y over columns, x (rows, cols) and y (cols,), on tensor cores: (rows, 4), every lane the same.

    They see 11 bits of x (tf32) and all of y, which is bfloat16, as results are.
    """
    TILE: tl.constexpr = x.type.layout
    RIGHT: tl.constexpr = tl.DotOperandLayout(1, TILE, 2)
    x = tl.convert_layout(x, tl.DotOperandLayout(0, TILE, 2), assert_trivial=True)
    y = tl.convert_layout(y.to(tl.float32), tl.SliceLayout(1, RIGHT), assert_trivial=True)
    zeros = tl.zeros((x.shape[0], 8), tl.float32, TILE)
    y, _ = tl.broadcast(y[:, None], tl.zeros((y.shape[0], 8), tl.float32, RIGHT))
    sums, _ = mma_v2(x, y, zeros, input_precision="tf32").reshape([x.shape[0], 4, 2]).split()
    return tl.convert_layout(sums, LAYOUT, assert_trivial=True)


@gluon.jit
def exchanged(x, LANES: tl.constexpr):
    """What the thread has whose lane differs in the bit LANES."""
    return tl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {LANES}, 0x1f, 0xffffffff;", "=f,f", [x], dtype=x.dtype, is_pure=False, pack=1
    )


@gluon.jit
def added(one, other, upper, LANES: tl.constexpr):
    """Add pairs of rows of two sums at once: lower rows go on with ``one``, upper ones with ``other``."""
    return tl.where(upper, other, one) + exchanged(tl.where(upper, one, other), LANES)


@gluon.jit
def outer(k, v, tile):
    """k v^T beside ``tile``."""
    return column(k, tile) * v.to(tl.float32)[None, :]


@gluon.jit
def outer_of_slot(keys, values, slot, STEP: tl.constexpr, tile):
    """k v^T of the step whose k and v are slot STEP of ``keys`` (rows, 16) and ``values`` (16, cols).

    Tensor cores sum over all slots, of which one is not zero.
    """
    TILE: tl.constexpr = tile.type.layout
    WARPS: tl.constexpr = TILE.warps_per_cta[0]
    R: tl.constexpr = keys.shape[0]
    keys = keys.reshape([WARPS, 8, R // (16 * WARPS), 2, 16]).permute((2, 0, 3, 1, 4)).reshape([R, 16])
    keys = tl.convert_layout(keys, tl.DotOperandLayout(0, TILE, 2))
    return mma_v2(keys, tl.where(slot == STEP, values, 0.0), tl.zeros((R, V_PAD), tl.float32, TILE))


@gluon.jit
def candidate(h, w, kv):
    """Z = tanh(H W + k v^T)."""
    return tanh(product(rounded(h), w, kv))


@gluon.jit
def advance(h, z, f, u):
    """H = f H + u Z, in one operation once Z is known."""
    return tl.fma(u, z, f * h)


@gluon.jit
def clamp(x, bound):
    """Clamp to [-bound, bound]; NaN stays NaN."""
    low = tl.maximum(x, -bound, propagate_nan=triton.language.PropagateNan.ALL)
    return tl.minimum(low, bound, propagate_nan=triton.language.PropagateNan.ALL)


@gluon.jit
def sequence(cu_seqlens, b, T):
    """First token and length of packed sequence b; offsets that nobody could check still stay inside the tensors."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + b).to(tl.int64), 0), T)
    stop = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1).to(tl.int64), start), T)
    return start, (stop - start).to(tl.int32)


@gluon.jit
def contribute(address, x, mask, ATOMIC: tl.constexpr):
    """Add to a sum that several programs share, or store this program's own row of it."""
    if ATOMIC:
        tl.atomic_add(address, x, mask=mask, sem="relaxed")
    else:
        tl.store(address, x, mask=mask)


@gluon.jit(do_not_specialize=["S", "intervals"])
def m2rnn_forward_kernel(
    q, k, v, w, x, A_log, dt_bias, h_first, y, h_last, checkpoints, cu_seqlens, q_b, q_s, q_n, q_d, k_b, k_s,
    k_n, k_d, v_b, v_s, v_n, v_d, w_n, w_i, w_j, x_b, x_s, x_n, S, intervals,
    HAS_FIRST: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Walk one sequence's steps for FORWARD_ROWS rows of one head's state."""
    part = tl.program_id(0) % FORWARD_PARTS
    n = (tl.program_id(0) // FORWARD_PARTS) % N
    b = (tl.program_id(0) // (FORWARD_PARTS * N)).to(tl.int64)
    rows = part * FORWARD_ROWS + tl.arange(0, FORWARD_ROWS, FORWARD_VECTOR)
    cols = tl.arange(0, V_PAD, tl.SliceLayout(0, FORWARD_TILE))
    row_mask = rows < K
    col_mask = cols < V
    state_rows = in_tile(rows, FORWARD_TILE)[:, None]
    state_mask = (state_rows < K) & col_mask[None, :]
    state_offsets = state_rows * V + cols[None, :]

    if PACKED:
        start, length = sequence(cu_seqlens, b, S)
        token = start
        interval = start // INTERVAL + b
    else:
        start = tl.cast(0, tl.int64)
        length = S
        token = b * S
        interval = b * intervals
    q += b * q_b + start * q_s + (n // (N // NQ)).to(tl.int64) * q_n
    k += b * k_b + start * k_s + (n // (N // NK)).to(tl.int64) * k_n
    v += b * v_b + start * v_s + (n // (N // NV)).to(tl.int64) * v_n
    x += b * x_b + start * x_s + (n // (N // NF)).to(tl.int64) * x_n
    q_row = rows.to(tl.int64) * q_d
    # Keys and values of an iteration, each step in a slot of the outer product's tiles.
    key_slot = tl.arange(0, 16, tl.SliceLayout(0, FORWARD_KEYS))[None, :]
    key_rows = part * FORWARD_ROWS + tl.arange(0, FORWARD_ROWS, tl.SliceLayout(1, FORWARD_KEYS))[:, None]
    key_mask = (key_slot < UNROLL) & (key_rows < K)
    key_offsets = key_rows.to(tl.int64) * k_d + key_slot.to(tl.int64) * k_s
    value_slot = tl.arange(0, 16, tl.SliceLayout(1, FORWARD_VALUES))[:, None]
    value_cols = tl.arange(0, V_PAD, tl.SliceLayout(0, FORWARD_VALUES))[None, :]
    value_mask = (value_slot < UNROLL) & (value_cols < V)
    value_offsets = value_slot.to(tl.int64) * v_s + value_cols.to(tl.int64) * v_d
    y += (token * 2 + n) * 16 if ATOMIC else ((token * 2 + n) * 2 + part) * 16
    y_step: tl.constexpr = 32 if ATOMIC else 64
    sum_row = tl.arange(0, 8, tl.SliceLayout(1, FORWARD_SUMS))[:, None]
    sum_col = tl.arange(0, V_PAD, tl.SliceLayout(0, FORWARD_SUMS))[None, :]
    sum_step = sum_row // (8 // UNROLL)
    sum_mask = (sum_row % (8 // UNROLL) == 0) & (sum_col < V)
    sum_offsets = sum_step * y_step + sum_col
    checkpoints += (interval * N + n) * (K * V)
    w = load_weight(w, w_n, w_i, w_j, n // (N // NW), FORWARD_TILE)
    rate = tl.exp(tl.load(A_log + n // (N // NF)))
    dt_bias = tl.load(dt_bias + n // (N // NF))
    h = tl.zeros((FORWARD_ROWS, V_PAD), tl.float32, FORWARD_TILE)
    if HAS_FIRST:
        h = tl.load(h_first + (b * N + n) * (K * V) + state_offsets, mask=state_mask, other=0.0)

    # Where step i of an iteration lies; q, k, v and x point to the iteration whose operands are loaded next.
    q_0_row = q_row + 0 * tl.cast(q_s, tl.int64)
    x_0_at = 0 * tl.cast(x_s, tl.int64)
    q_1_row = q_row + 1 * tl.cast(q_s, tl.int64)
    x_1_at = 1 * tl.cast(x_s, tl.int64)
    q_2_row = q_row + 2 * tl.cast(q_s, tl.int64)
    x_2_at = 2 * tl.cast(x_s, tl.int64)
    q_3_row = q_row + 3 * tl.cast(q_s, tl.int64)
    x_3_at = 3 * tl.cast(x_s, tl.int64)
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
    q_iteration = UNROLL * tl.cast(q_s, tl.int64)
    k_iteration = UNROLL * tl.cast(k_s, tl.int64)
    v_iteration = UNROLL * tl.cast(v_s, tl.int64)
    x_iteration = UNROLL * tl.cast(x_s, tl.int64)
    q += q_iteration
    k += k_iteration
    v += v_iteration
    x += x_iteration

    # Iterations after which a whole one follows need no guards, and the last ones do.
    whole = tl.maximum(length // UNROLL - 1, 0) * UNROLL
    for t in range(0, whole, UNROLL):
        # Operands of the next iteration: issued now, so that they arrive before they are needed.
        next_q_0 = tl.load(q + q_0_row, mask=row_mask, other=0.0)
        next_x_0 = tl.load(x + x_0_at).to(tl.float32)
        next_q_1 = tl.load(q + q_1_row, mask=row_mask, other=0.0)
        next_x_1 = tl.load(x + x_1_at).to(tl.float32)
        next_q_2 = tl.load(q + q_2_row, mask=row_mask, other=0.0)
        next_x_2 = tl.load(x + x_2_at).to(tl.float32)
        next_q_3 = tl.load(q + q_3_row, mask=row_mask, other=0.0)
        next_x_3 = tl.load(x + x_3_at).to(tl.float32)
        next_keys = tl.load(k + key_offsets, mask=key_mask, other=0.0)
        next_values = tl.load(v + value_offsets, mask=value_mask, other=0.0)
        q += q_iteration
        k += k_iteration
        v += v_iteration
        x += x_iteration

        if SAVE:
            if tl.cast(t, tl.int32) % INTERVAL == 0:
                tl.store(checkpoints + state_offsets, h, mask=state_mask)
                checkpoints += N * K * V
        elif t & 0x40000000 != 0:  # never: a branch, behind which ptxas cannot put off the loads (docs/performance.md)
            tl.store(h_last + (b * N + n) * (K * V) + state_offsets, h, mask=state_mask)

        # Step t + 0
        f, u = gate(x_0, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 0, h)), f, u)
        y_0 = row_sums(column(q_0, h) * h, FORWARD_SUMS)

        # Step t + 1
        f, u = gate(x_1, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 1, h)), f, u)
        y_1 = row_sums(column(q_1, h) * h, FORWARD_SUMS)

        # Step t + 2
        f, u = gate(x_2, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 2, h)), f, u)
        y_2 = row_sums(column(q_2, h) * h, FORWARD_SUMS)

        # Step t + 3
        f, u = gate(x_3, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 3, h)), f, u)
        y_3 = row_sums(column(q_3, h) * h, FORWARD_SUMS)

        # Sums over rows of all steps at once: every exchange halves those that a thread goes on with.
        y_0 = added(y_0, y_2, sum_row & 4 != 0, 16)
        y_1 = added(y_1, y_3, sum_row & 4 != 0, 16)
        y_0 = added(y_0, y_1, sum_row & 2 != 0, 8)
        y_0 += exchanged(y_0, 4)
        contribute(y + sum_offsets, y_0, sum_mask, ATOMIC)
        y += UNROLL * y_step

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
            if tl.cast(t, tl.int32) % INTERVAL == 0:
                tl.store(checkpoints + state_offsets, h, mask=state_mask)
                checkpoints += N * K * V
        elif t & 0x40000000 != 0:  # never: a branch, behind which ptxas cannot put off the loads (docs/performance.md)
            tl.store(h_last + (b * N + n) * (K * V) + state_offsets, h, mask=state_mask)

        # Step t + 0
        f, u = gate(x_0, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 0, h)), f, u)
        y_0 = row_sums(column(q_0, h) * h, FORWARD_SUMS)

        # Step t + 1
        f, u = gate(x_1, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 1, h)), f, u)
        y_1 = row_sums(column(q_1, h) * h, FORWARD_SUMS)

        # Step t + 2
        f, u = gate(x_2, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 2, h)), f, u)
        y_2 = row_sums(column(q_2, h) * h, FORWARD_SUMS)

        # Step t + 3
        f, u = gate(x_3, rate, dt_bias)
        h = advance(h, candidate(h, w, outer_of_slot(keys, values, value_slot, 3, h)), f, u)
        y_3 = row_sums(column(q_3, h) * h, FORWARD_SUMS)

        # Sums over rows of all steps at once: every exchange halves those that a thread goes on with.
        y_0 = added(y_0, y_2, sum_row & 4 != 0, 16)
        y_1 = added(y_1, y_3, sum_row & 4 != 0, 16)
        y_0 = added(y_0, y_1, sum_row & 2 != 0, 8)
        y_0 += exchanged(y_0, 4)
        contribute(y + sum_offsets, y_0, tl.where(t + sum_step < length, sum_mask, False), ATOMIC)
        y += UNROLL * y_step

        q_0, x_0 = next_q_0, next_x_0
        q_1, x_1 = next_q_1, next_x_1
        q_2, x_2 = next_q_2, next_x_2
        q_3, x_3 = next_q_3, next_x_3
        keys, values = next_keys, next_values
    tl.store(h_last + (b * N + n) * (K * V) + state_offsets, h, mask=state_mask)


@gluon.jit(do_not_specialize=["S", "intervals"])
def m2rnn_backward_kernel(
    q, k, v, w, x, A_log, dt_bias, dy, dh_last, checkpoints, scratch, cu_seqlens, dq, dk, dv, dw, df, dA_log,
    ddt_bias, dh_first, q_b, q_s, q_n, q_d, k_b, k_s, k_n, k_d, v_b, v_s, v_n, v_d, w_n, w_i, w_j, x_b, x_s,
    x_n, dy_b, dy_s, dy_n, dy_d, S, intervals, bound,
    HAS_LAST: tl.constexpr, PACKED: tl.constexpr, ATOMIC: tl.constexpr, WANT_Q: tl.constexpr,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr, WANT_W: tl.constexpr, WANT_F: tl.constexpr,
    WANT_H: tl.constexpr, CARRIES: tl.constexpr, WANT_GATE: tl.constexpr,
):  # fmt: skip
    """Walk one sequence's steps backwards for BACKWARD_ROWS rows of one head's state."""
    program = tl.program_id(0)
    part = program % BACKWARD_PARTS
    n = (program // BACKWARD_PARTS) % N
    b = (program // (BACKWARD_PARTS * N)).to(tl.int64)
    rows = part * BACKWARD_ROWS + tl.arange(0, BACKWARD_ROWS, BACKWARD_VECTOR)
    cols = tl.arange(0, V_PAD, tl.SliceLayout(0, BACKWARD_TILE))
    row_mask = rows < K
    col_mask = cols < V
    state_rows = in_tile(rows, BACKWARD_TILE)[:, None]
    state_mask = (state_rows < K) & col_mask[None, :]
    state_offsets = state_rows * V + cols[None, :]

    if PACKED:
        start, length = sequence(cu_seqlens, b, S)
        token = start
        interval = start // INTERVAL + b
    else:
        start = tl.cast(0, tl.int64)
        length = S
        token = b * S
        interval = b * intervals
    q += b * q_b + start * q_s + (n // (N // NQ)).to(tl.int64) * q_n
    k += b * k_b + start * k_s + (n // (N // NK)).to(tl.int64) * k_n
    v += b * v_b + start * v_s + (n // (N // NV)).to(tl.int64) * v_n
    x += b * x_b + start * x_s + (n // (N // NF)).to(tl.int64) * x_n
    dy += b * dy_b + start * dy_s + n.to(tl.int64) * dy_n
    q_row = rows.to(tl.int64) * q_d
    k_row = rows.to(tl.int64) * k_d
    v_col = cols.to(tl.int64) * v_d
    dy_col = cols.to(tl.int64) * dy_d
    checkpoints += (interval * N + n) * (K * V)
    w_t = load_weight(w, w_n, w_j, w_i, n // (N // NW), BACKWARD_TILE)
    w = load_weight(w, w_n, w_i, w_j, n // (N // NW), BACKWARD_TILE)
    rate = tl.exp(tl.load(A_log + n // (N // NF)))
    dt_bias = tl.load(dt_bias + n // (N // NF))
    sum_dA_log = tl.cast(0.0, tl.float32)
    sum_ddt_bias = tl.cast(0.0, tl.float32)
    sum_dw = tl.zeros((V_PAD, V_PAD), tl.float32, BACKWARD_TILE)
    zeros = tl.zeros((BACKWARD_ROWS, V_PAD), tl.float32, BACKWARD_TILE)
    c = zeros
    if HAS_LAST:
        c = tl.load(dh_last + (b * N + n) * (K * V) + state_offsets, mask=state_mask, other=0.0)

    # Where a thread has a part of a sum, and of which step and element in the end.
    sum_row = tl.arange(0, 8, tl.SliceLayout(1, ROW_SUMS))[:, None]
    sum_col = tl.arange(0, V_PAD, tl.SliceLayout(0, ROW_SUMS))[None, :]
    row_step = sum_row // (8 // CHUNK)
    row_sum_mask = (sum_row % (8 // CHUNK) == 0) & (sum_col < V)
    sum_lane = tl.arange(0, 4, tl.SliceLayout(0, COL_SUMS))[None, :]
    col_lane = tl.arange(0, 4, tl.SliceLayout(0, COL_SUMS_LOADED))[None, :]
    col_rows = part * BACKWARD_ROWS + tl.arange(0, BACKWARD_ROWS, tl.SliceLayout(1, COL_SUMS_LOADED))[:, None]
    col_step = col_lane // (4 // CHUNK)
    col_sum_mask = (col_lane % (4 // CHUNK) == 0) & (col_rows < K)

    end = (tl.cdiv(length, CHUNK) - 1) * CHUNK  # where the last chunk starts
    # Chunks go backwards: these point to the chunk whose operands are loaded next, and to that whose gradients are.
    q_step = tl.cast(q_s, tl.int64)
    q_at = q + end * q_step
    k_step = tl.cast(k_s, tl.int64)
    k_at = k + end * k_step
    v_step = tl.cast(v_s, tl.int64)
    v_at = v + end * v_step
    x_step = tl.cast(x_s, tl.int64)
    x_at = x + end * x_step
    dy_step = tl.cast(dy_s, tl.int64)
    dy_at = dy + end * dy_step
    dq_step: tl.constexpr = 64 if ATOMIC else 128
    if WANT_Q:
        dq += (token * 1 + n // 2) * 64 if ATOMIC else (token * 2 + n) * 64
        dq += tl.cast(end, tl.int64) * dq_step
    dq_offsets = col_step * dq_step + col_rows
    dk_step: tl.constexpr = 64 if ATOMIC else 128
    if WANT_K:
        dk += (token * 1 + n // 2) * 64 if ATOMIC else (token * 2 + n) * 64
        dk += tl.cast(end, tl.int64) * dk_step
    dk_offsets = col_step * dk_step + col_rows
    dv_step: tl.constexpr = 32 if ATOMIC else 64
    if WANT_V:
        dv += (token * 2 + n) * 16 if ATOMIC else ((token * 2 + n) * 2 + part) * 16
        dv += tl.cast(end, tl.int64) * dv_step
    dv_offsets = row_step * dv_step + sum_col
    df_step: tl.constexpr = 2 if ATOMIC else 4
    if WANT_F:
        df += (token * 2 + n) if ATOMIC else ((token * 2 + n) * 2 + part)
        df += tl.cast(end, tl.int64) * df_step
    inside = (end >= 0) & (end + 0 < length)
    k_0 = load_vector(k_at + 0 * k_step + k_row, row_mask, inside)
    v_0 = load_vector(v_at + 0 * v_step + v_col, col_mask, inside)
    x_0 = load_gate(x_at + 0 * x_step, inside)
    q_0 = load_vector(q_at + 0 * q_step + q_row, row_mask, inside)
    dy_0 = load_vector(dy_at + 0 * dy_step + dy_col, col_mask, inside)
    inside = (end >= 0) & (end + 1 < length)
    k_1 = load_vector(k_at + 1 * k_step + k_row, row_mask, inside)
    v_1 = load_vector(v_at + 1 * v_step + v_col, col_mask, inside)
    x_1 = load_gate(x_at + 1 * x_step, inside)
    q_1 = load_vector(q_at + 1 * q_step + q_row, row_mask, inside)
    dy_1 = load_vector(dy_at + 1 * dy_step + dy_col, col_mask, inside)
    # States of one interval, CHUNK steps apart, rebuilt from its checkpoint; only this program touches them.
    rebuilt = tl.allocate_shared_memory(tl.float32, [INTERVAL // CHUNK, BACKWARD_ROWS, V_PAD], BACKWARD_SCRATCH)
    for first in range((tl.cdiv(length, INTERVAL) - 1) * INTERVAL, -1, -INTERVAL):
        last = tl.minimum(first + INTERVAL - CHUNK, end)
        state = checkpoints + tl.cast(first // INTERVAL, tl.int64) * (N * K * V) + state_offsets
        h_0 = tl.load(state, mask=state_mask, other=0.0)
        # The chunks before the last one are whole. Where there is none, nobody uses what is loaded.
        r_k_at = k + first * k_step
        r_k_step = tl.where(first < last, k_step, 0)
        r_v_at = v + first * v_step
        r_v_step = tl.where(first < last, v_step, 0)
        r_x_at = x + first * x_step
        r_x_step = tl.where(first < last, x_step, 0)
        r_k_0 = tl.load(r_k_at + 0 * r_k_step + k_row, mask=row_mask, other=0.0)
        r_v_0 = tl.load(r_v_at + 0 * r_v_step + v_col, mask=col_mask, other=0.0)
        r_x_0 = tl.load(r_x_at + 0 * r_x_step).to(tl.float32)
        r_k_1 = tl.load(r_k_at + 1 * r_k_step + k_row, mask=row_mask, other=0.0)
        r_v_1 = tl.load(r_v_at + 1 * r_v_step + v_col, mask=col_mask, other=0.0)
        r_x_1 = tl.load(r_x_at + 1 * r_x_step).to(tl.float32)
        for t in range(0, last - first, CHUNK):
            rebuilt.index(tl.cast(t // CHUNK, tl.int32)).store(h_0)
            ahead = tl.where(tl.cast(first + t + CHUNK, tl.int32) < last, CHUNK, 0)
            r_k_at += ahead * k_step
            r_v_at += ahead * v_step
            r_x_at += ahead * x_step
            next_k_0 = tl.load(r_k_at + 0 * k_step + k_row, mask=row_mask, other=0.0)
            next_v_0 = tl.load(r_v_at + 0 * v_step + v_col, mask=col_mask, other=0.0)
            next_x_0 = tl.load(r_x_at + 0 * x_step).to(tl.float32)
            next_k_1 = tl.load(r_k_at + 1 * k_step + k_row, mask=row_mask, other=0.0)
            next_v_1 = tl.load(r_v_at + 1 * v_step + v_col, mask=col_mask, other=0.0)
            next_x_1 = tl.load(r_x_at + 1 * x_step).to(tl.float32)
            f, u = gate(r_x_0, rate, dt_bias)
            h_0 = advance(h_0, candidate(h_0, w, outer(r_k_0, r_v_0, h_0)), f, u)
            f, u = gate(r_x_1, rate, dt_bias)
            h_0 = advance(h_0, candidate(h_0, w, outer(r_k_1, r_v_1, h_0)), f, u)
            r_k_0, r_v_0, r_x_0 = next_k_0, next_v_0, next_x_0
            r_k_1, r_v_1, r_x_1 = next_k_1, next_v_1, next_x_1
        # What the interval before this one is rebuilt from lies in the L2 by the time that its turn comes.
        lower = first - INTERVAL
        lane = tl.arange(0, 16 * (BACKWARD_ROWS // 16), BACKWARD_SPREAD)
        fetched = tl.maximum(lower + tl.minimum(lane % 16, INTERVAL - 1), 0).to(tl.int64)
        row = tl.minimum(part * BACKWARD_ROWS + lane // 16 * 16, K - 1).to(tl.int64)
        prefetch(k + fetched * k_step + row * k_d)
        prefetch(x + fetched * x_step)
        lane = tl.arange(0, 16 * (V_PAD // 16), BACKWARD_SPREAD)
        fetched = tl.maximum(lower + tl.minimum(lane % 16, INTERVAL - 1), 0).to(tl.int64)
        col = tl.minimum(lane // 16 * 16, V - 1).to(tl.int64)
        prefetch(v + fetched * v_step + col * v_d)
        lane = tl.arange(0, BACKWARD_ROWS * V_PAD // 8, BACKWARD_SPREAD)
        element = tl.minimum(part * (BACKWARD_ROWS * V) + lane * 8, K * V - 1)
        prefetch(checkpoints + tl.cast(tl.maximum(lower // INTERVAL, 0), tl.int64) * (N * K * V) + element)
        for t in range(last, first - 1, -CHUNK):
            # The chunk's states and candidates, forwards: h_0 is the state that step t starts from.
            f_0, u_0 = gate(x_0, rate, dt_bias)
            z_0 = candidate(h_0, w, outer(k_0, v_0, h_0))
            h_1 = f_0 * h_0 + u_0 * z_0  # not advance: the slope has u z as well
            operand_0 = rounded(h_0)
            gap_0 = h_0 - z_0
            slope_0 = u_0 - u_0 * z_0 * z_0
            f_1, u_1 = gate(x_1, rate, dt_bias)
            z_1 = candidate(h_1, w, outer(k_1, v_1, h_1))
            h_2 = f_1 * h_1 + u_1 * z_1  # not advance: the slope has u z as well
            operand_1 = rounded(h_1)
            gap_1 = h_1 - z_1
            slope_1 = u_1 - u_1 * z_1 * z_1

            # Operands of the chunk before this one are loaded ahead of time. Where there is none, nobody uses what is
            # loaded, and the first step's will do.
            before = tl.cast(t - CHUNK, tl.int32)
            kept = rebuilt.index(tl.cast(tl.maximum(before - first, 0) // CHUNK, tl.int32))
            before_q_s = tl.where(before >= 0, q_step, 0)
            q_at -= CHUNK * before_q_s
            before_k_s = tl.where(before >= 0, k_step, 0)
            k_at -= CHUNK * before_k_s
            before_v_s = tl.where(before >= 0, v_step, 0)
            v_at -= CHUNK * before_v_s
            before_dy_s = tl.where(before >= 0, dy_step, 0)
            dy_at -= CHUNK * before_dy_s
            before_x_s = tl.where(before >= 0, x_step, 0)
            x_at -= CHUNK * before_x_s

            # Step t + 1, backwards
            inside = t + 1 < length
            limit = tl.where(inside, bound, float("inf"))
            g = clamp(c + column(q_1, c) * dy_1.to(tl.float32)[None, :], limit)
            d = g * slope_1
            dq_1 = col_sums_of(h_2, dy_1, COL_SUMS)
            dk_1 = col_sums_of(d, v_1, COL_SUMS)
            dv_1 = row_sums(d * column(k_1, c), ROW_SUMS)
            df_1 = tl.sum(g * gap_1)
            f_by_x, f_by_A_log = gate_slopes(x_1, f_1, rate, dt_bias)
            sum_dA_log += df_1 * f_by_A_log
            sum_ddt_bias += df_1 * f_by_x
            df_1 *= f_by_x
            d_operand = rounded(d)
            if WANT_W:
                sum_dw = product(transposed(operand_1), transposed(d_operand).permute((1, 0)), sum_dw)
            if CARRIES:
                c = f_1 * g + product(d_operand, w_t, zeros)  # tensor cores round a large c less well
            if WANT_F:
                contribute(df + 1 * df_step, df_1, inside, ATOMIC)
            k_1 = tl.load(k_at + 1 * before_k_s + k_row, mask=row_mask, other=0.0)
            v_1 = tl.load(v_at + 1 * before_v_s + v_col, mask=col_mask, other=0.0)
            x_1 = tl.load(x_at + 1 * before_x_s).to(tl.float32)
            q_1 = tl.load(q_at + 1 * before_q_s + q_row, mask=row_mask, other=0.0)
            dy_1 = tl.load(dy_at + 1 * before_dy_s + dy_col, mask=col_mask, other=0.0)

            next_k_0 = tl.load(k_at + 0 * before_k_s + k_row, mask=row_mask, other=0.0)
            next_v_0 = tl.load(v_at + 0 * before_v_s + v_col, mask=col_mask, other=0.0)
            next_x_0 = tl.load(x_at + 0 * before_x_s).to(tl.float32)
            next_h = kept.load(BACKWARD_TILE)

            # Step t + 0, backwards
            inside = t + 0 < length
            limit = tl.where(inside, bound, float("inf"))
            g = clamp(c + column(q_0, c) * dy_0.to(tl.float32)[None, :], limit)
            d = g * slope_0
            dq_0 = col_sums_of(h_1, dy_0, COL_SUMS)
            dk_0 = col_sums_of(d, v_0, COL_SUMS)
            dv_0 = row_sums(d * column(k_0, c), ROW_SUMS)
            df_0 = tl.sum(g * gap_0)
            f_by_x, f_by_A_log = gate_slopes(x_0, f_0, rate, dt_bias)
            sum_dA_log += df_0 * f_by_A_log
            sum_ddt_bias += df_0 * f_by_x
            df_0 *= f_by_x
            d_operand = rounded(d)
            if WANT_W:
                sum_dw = product(transposed(operand_0), transposed(d_operand).permute((1, 0)), sum_dw)
            if CARRIES:
                c = f_0 * g + product(d_operand, w_t, zeros)  # tensor cores round a large c less well
            if WANT_F:
                contribute(df + 0 * df_step, df_0, inside, ATOMIC)
            q_0 = tl.load(q_at + 0 * before_q_s + q_row, mask=row_mask, other=0.0)
            dy_0 = tl.load(dy_at + 0 * before_dy_s + dy_col, mask=col_mask, other=0.0)

            # Sums of all steps at once: every exchange halves those that a thread goes on with.
            if WANT_Q:
                dq_0 = tl.where(sum_lane & 2 != 0, dq_1, dq_0)
                dq_0 = columns_as_loaded(dq_0, COL_SUMS_LOADED)
            if WANT_K:
                dk_0 = tl.where(sum_lane & 2 != 0, dk_1, dk_0)
                dk_0 = columns_as_loaded(dk_0, COL_SUMS_LOADED)
            if WANT_V:
                dv_0 = added(dv_0, dv_1, sum_row & 4 != 0, 16)
                dv_0 += exchanged(dv_0, 8)
                dv_0 += exchanged(dv_0, 4)
            if WANT_Q:
                contribute(dq + dq_offsets, dq_0, tl.where(t + col_step < length, col_sum_mask, False), ATOMIC)
                dq -= CHUNK * dq_step
            if WANT_K:
                contribute(dk + dk_offsets, dk_0, tl.where(t + col_step < length, col_sum_mask, False), ATOMIC)
                dk -= CHUNK * dk_step
            if WANT_V:
                contribute(dv + dv_offsets, dv_0, tl.where(t + row_step < length, row_sum_mask, False), ATOMIC)
                dv -= CHUNK * dv_step
            if WANT_F:
                df -= CHUNK * df_step

            h_0 = next_h
            k_0 = next_k_0
            v_0 = next_v_0
            x_0 = next_x_0

    if WANT_H:
        tl.store(dh_first + (b * N + n) * (K * V) + state_offsets, c, mask=state_mask)
    if WANT_W:
        i = tl.arange(0, V_PAD, tl.SliceLayout(1, BACKWARD_TILE))
        mask = (i < V)[:, None] & col_mask[None, :]
        tl.store(dw + program.to(tl.int64) * (V * V) + i[:, None] * V + cols[None, :], sum_dw, mask=mask)
    if WANT_GATE:
        tl.store(dA_log + program, sum_dA_log)
        tl.store(ddt_bias + program, sum_ddt_bias)


@gluon.jit
def m2rnn_step_kernel(
    q, k, v, w, x, A_log, dt_bias, state, y, q_b, q_n, q_d, k_b, k_n, k_d, v_b, v_n, v_d, w_n, w_i, w_j, x_b,
    x_n, h_b, h_n, h_i, h_j,
):  # fmt: skip
    """Advance one head's state by one step in place, FORWARD_ROWS rows at a time."""
    n = tl.program_id(0) % N
    b = (tl.program_id(0) // N).to(tl.int64)
    cols = tl.arange(0, V_PAD, tl.SliceLayout(0, FORWARD_TILE))
    col_mask = cols < V

    q += b * q_b + (n // (N // NQ)).to(tl.int64) * q_n
    k += b * k_b + (n // (N // NK)).to(tl.int64) * k_n
    v += b * v_b + (n // (N // NV)).to(tl.int64) * v_n
    x += b * x_b + (n // (N // NF)).to(tl.int64) * x_n
    state += b * h_b + n.to(tl.int64) * h_n
    w = load_weight(w, w_n, w_i, w_j, n // (N // NW), FORWARD_TILE)
    rate = tl.exp(tl.load(A_log + n // (N // NF)))
    dt_bias = tl.load(dt_bias + n // (N // NF))
    v = tl.load(v + cols.to(tl.int64) * v_d, mask=col_mask, other=0.0)
    f, u = gate(tl.load(x).to(tl.float32), rate, dt_bias)
    y_0 = tl.zeros((V_PAD,), tl.float32, tl.SliceLayout(0, FORWARD_TILE))
    for first in range(0, FORWARD_PARTS * FORWARD_ROWS, FORWARD_ROWS):
        rows = (first + tl.arange(0, FORWARD_ROWS, FORWARD_VECTOR)).to(tl.int64)
        row_mask = rows < K
        state_rows = in_tile(rows, FORWARD_TILE)[:, None]
        address = state + state_rows * h_i + cols.to(tl.int64)[None, :] * h_j
        state_mask = (state_rows < K) & col_mask[None, :]
        q_0 = tl.load(q + rows * q_d, mask=row_mask, other=0.0)
        k_0 = tl.load(k + rows * k_d, mask=row_mask, other=0.0)
        h = tl.load(address, mask=state_mask, other=0.0).to(tl.float32)
        h = advance(h, candidate(h, w, outer(k_0, v, h)), f, u)
        y_0 += tl.sum(column(q_0, h) * h, 0)
        tl.store(address, h, mask=state_mask)
    tl.store(y + (b * N + n) * V + cols, y_0, mask=col_mask)


@gluon.jit
def m2rnn_sum_kernel(rows, out, elements, CONTRIBUTORS: tl.constexpr, DIM: tl.constexpr):
    """Sum the rows that CONTRIBUTORS programs stored for each row of ``out``, always in one order, and round once."""
    i = tl.program_id(0).to(tl.int64) * SUM_BLOCK + tl.arange(0, SUM_BLOCK, SUM_LAYOUT)
    row = rows + (i // DIM) * (CONTRIBUTORS * DIM) + i % DIM
    total = tl.zeros((SUM_BLOCK,), tl.float32, SUM_LAYOUT)
    for _ in range(CONTRIBUTORS):
        total += tl.load(row, mask=i < elements, other=0.0)
        row += DIM
    tl.store(out + i, total, mask=i < elements)


def forward(q, k, v, weight, forget, A_log, dt_bias, initial_state, cu_seqlens, save, deterministic, known=None):
    """Launch the forward kernel; return y, the final state and, if ``save``, the state every INTERVAL steps.

    ``known``, here and for ``step``, keeps launches for calls that agree in shapes, strides, dtypes, alignment, device
    and which operands are there.
    """
    packed = cu_seqlens is not None
    batch, steps, intervals, count = sizes(q, cu_seqlens)
    lead = q.shape[:-2]
    tokens = steps if packed else batch * steps
    atomic = not deterministic and tokens > 64  # a short call's time is the host's: clearing the sums, rounding them
    y = buffer(q, atomic, lead, 2, 2, 16)
    final_state = q.new_empty(batch, 2, 64, 16, dtype=torch.float32)
    checkpoints = q.new_empty(count, 2, 64, 16, dtype=torch.float32) if save else None
    pointers = (
        q, k, v, weight, forget, A_log, dt_bias, initial_state, y, final_state,
        checkpoints if save else final_state,  # not written to then
        cu_seqlens,
    )  # fmt: skip
    again = None if known is None else known.get((save, deterministic))
    if again is not None:
        again(pointers)
    elif batch:
        scalars = (
            *token_strides(q, packed), *token_strides(k, packed), *token_strides(v, packed), *weight.stride(),
            *token_strides(forget, packed), steps, intervals,
        )  # fmt: skip
        flags = {"HAS_FIRST": initial_state is not None, "PACKED": packed, "SAVE": save, "ATOMIC": atomic}
        programs = batch * 4
        launch(known, (save, deterministic), m2rnn_forward_kernel, programs, pointers, scalars, flags)
    return (y.to(v.dtype) if atomic else summed(y, v.dtype, known)), final_state, checkpoints


def backward(
    dy, dh_last, q, k, v, weight, forget, A_log, dt_bias, checkpoints, cu_seqlens, bound, wanted, deterministic
):  # fmt: skip
    """Launch the backward kernel; return the ``wanted`` gradients: eight flags, in the order of forward's operands."""
    packed = cu_seqlens is not None
    batch, steps, intervals, _ = sizes(q, cu_seqlens)
    lead = q.shape[:-2]
    want_q, want_k, want_v, want_w, want_f, want_A_log, want_dt_bias, want_h = wanted
    atomic = not deterministic
    dq = buffer(q, atomic, lead, 1, 2, 64) if want_q else None
    dk = buffer(q, atomic, lead, 1, 2, 64) if want_k else None
    dv = buffer(q, atomic, lead, 2, 2, 16) if want_v else None
    df = buffer(q, atomic, lead, 2, 2) if want_f else None
    dw = q.new_empty(batch, 2, 2, 16, 16, dtype=torch.float32) if want_w else None
    want_gate = want_A_log or want_dt_bias
    dA_log, ddt_bias = q.new_empty(2, batch, 2, 2, dtype=torch.float32) if want_gate else (None, None)
    dh_first = q.new_empty(batch, 2, 64, 16, dtype=torch.float32) if want_h else None
    programs = batch * 4
    scratch = None
    if batch:
        m2rnn_backward_kernel[(programs,)](
            q, k, v, weight, forget, A_log, dt_bias, dy, dh_last, checkpoints, scratch, cu_seqlens,
            dq, dk, dv, dw, df, dA_log, ddt_bias, dh_first,
            *token_strides(q, packed), *token_strides(k, packed), *token_strides(v, packed), *weight.stride(),
            *token_strides(forget, packed), *token_strides(dy, packed), steps, intervals, bound,
            HAS_LAST=dh_last is not None, PACKED=packed, ATOMIC=atomic,
            WANT_Q=want_q, WANT_K=want_k, WANT_V=want_v, WANT_W=want_w, WANT_F=want_f, WANT_H=want_h,
            CARRIES=any(wanted[1:]), WANT_GATE=want_gate, num_warps=1, num_stages=1,
        )  # fmt: skip
    gradients = (
        (dq.to(q.dtype) if atomic else summed(dq, q.dtype)) if want_q else None,
        (dk.to(k.dtype) if atomic else summed(dk, k.dtype)) if want_k else None,
        (dv.to(v.dtype) if atomic else summed(dv, v.dtype)) if want_v else None,
        dw.sum((0, 2)).to(weight.dtype) if want_w else None,
        (df.to(forget.dtype) if atomic else summed(df.unsqueeze(-1), forget.dtype).squeeze(-1)) if want_f else None,
        dA_log.sum((0, 2)) if want_A_log else None,
        ddt_bias.sum((0, 2)) if want_dt_bias else None,
        dh_first,
    )
    return [gradient for gradient in gradients if gradient is not None]


def step(q, k, v, weight, forget, A_log, dt_bias, state, known=None):
    """Launch the step kernel, which advances ``state`` in place; return y."""
    batch = q.shape[0]
    y = v.new_empty(batch, 2, 16)
    pointers = (q, k, v, weight, forget, A_log, dt_bias, state, y)
    again = None if known is None else known.get(())
    if again is not None:
        again(pointers)
    elif batch:
        scalars = (
            *q.stride(), *k.stride(), *v.stride(), *weight.stride(), *forget.stride(), *state.stride(),
        )  # fmt: skip
        launch(known, (), m2rnn_step_kernel, batch * 2, pointers, scalars, {})
    return y


def launch(known, key, kernel, programs, pointers, scalars, flags):
    """Launch one of the forward kernels; ``known``, if given, keeps under ``key`` what launches it with other pointers.

    Triton chooses a binary by types, alignment and sizes of the arguments, which takes most of a call's time on the
    host; so a caller that knows them to be the same keeps the choice. The interpreter has no binaries to keep.
    """
    compiled = kernel[(programs, 1, 1)](*pointers, *scalars, **flags, num_warps=1, num_stages=1)
    if known is not None and compiled is not None:
        known[key] = relaunch(compiled, programs, (*scalars, *flags.values()), pointers[0].get_device())


def relaunch(compiled, programs, rest, device):
    """Return what launches a binary on other pointers, which it takes as addresses, on the device's current stream.

    It calls the binary's launcher itself, as generated code of torch.compile does, unless a hook must see the launch.
    """
    bound, run, hooks = compiled[(programs, 1, 1)], compiled.run, triton.knobs.runtime
    function, metadata, stream_of = compiled.function, compiled.packed_metadata, current_stream_of()

    def again(pointers):
        addresses = [None if x is None else x.data_ptr() for x in pointers]
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # chains of hooks, or one each
            bound(*addresses, *rest, stream=stream_of(device))
        else:
            run(programs, 1, 1, stream_of(device), function, metadata, None, None, None, *addresses, *rest)

    return again


def current_stream_of():
    """Return the function that gives a device's current stream as Triton launches on it."""
    return triton.runtime.driver.active.get_current_stream


def sizes(q, cu_seqlens):
    """Sequences, steps (tokens of a packed batch), checkpoints of a sequence (of a packed batch), of all sequences."""
    if cu_seqlens is None:
        batch, steps = q.shape[:2]
        intervals = (steps + 15) // 16
        return batch, steps, intervals, batch * intervals
    batch, steps = cu_seqlens.shape[0] - 1, q.shape[0]
    intervals = steps // 16 + batch
    return batch, steps, intervals, intervals


def token_strides(x, packed):
    """Strides of x by batch, step, head (and element); a packed batch has no batch dim."""
    return (0, *x.stride()) if packed else x.stride()


def summed(rows, dtype, known=None):
    """Sum (..., contributors, dim) float32 rows to (..., dim) of ``dtype``, in order; ``known`` as for ``launch``."""
    *lead, contributors, dim = rows.shape
    out = rows.new_empty(*lead, dim, dtype=dtype)
    again = None if known is None else known.get("sum")
    if again is not None:
        again((rows, out))
    elif out.numel():
        flags = {"CONTRIBUTORS": contributors, "DIM": dim}
        programs = (out.numel() + 255) // 256
        launch(known, "sum", m2rnn_sum_kernel, programs, (rows, out), (out.numel(),), flags)
    return out


def buffer(q, atomic, lead, groups, contributors, *dim):
    """A float32 buffer of zeros to add to, or one with a row for each contributor."""
    if atomic:
        return q.new_zeros(*lead, groups, *dim, dtype=torch.float32)
    return q.new_empty(*lead, groups, contributors, *dim, dtype=torch.float32)
