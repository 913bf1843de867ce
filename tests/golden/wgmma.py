"""M2RNN kernels for k64_v64_q16_k16_v16_f16_w16_bf16_carry_approx, schedule wgmma_aa_i12_ptx.



H_t = f_t H_(t-1) + (1 - f_t) tanh(H_(t-1) W + k_t v_t^T),  y_t = H_t^T q_t   (arXiv 2603.14360)

    B, S, N      sequences, steps, heads of the state; head n reads group n // (N // NX) of operand X
    K, V         rows (state expansion) and columns (head dim) of the state
    q k v dy     q_t (K,), k_t (K,), v_t (V,) and dy_t (V,) of this program's head
    x, f, u      x_t, which is the gate itself; f_t and 1 - f_t
    h, z, w      state H (rows, V), candidate Z (rows, V), state weight W (V, V)
    c, g, d      gradients of H_t from the future, of H_t, and of the argument of tanh
    h0, ht       states before the first step and after the last one; dh0, dht, their gradients
    started      a product of all four warps that is on its way; decayed, f H_(t-1)
    _of, _at     a tensor in shared memory, step by step, and a tensor in memory, from an interval's first step on
    _parts       what each warp has summed; _tile, an interval's vectors as an operand of products
    stride_x_s   elements between steps of operand x (and b sequences, n heads, d elements, i rows, j columns)
    stride_x     the same in 64 bits; of a result, elements between its steps
"""

import triton.language
from triton.experimental import gluon
from triton.experimental.gluon import language as gl  # Triton's functions, on tensors whose layouts are written down
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

K: gl.constexpr = gl.constexpr(64)
V: gl.constexpr = gl.constexpr(64)
V_PAD: gl.constexpr = gl.constexpr(64)
N: gl.constexpr = gl.constexpr(16)
NQ: gl.constexpr = gl.constexpr(16)
NK: gl.constexpr = gl.constexpr(16)
NV: gl.constexpr = gl.constexpr(16)
NF: gl.constexpr = gl.constexpr(16)
NW: gl.constexpr = gl.constexpr(16)
INTERVAL: gl.constexpr = gl.constexpr(12)
FORWARD_ROWS: gl.constexpr = gl.constexpr(64)
FORWARD_PARTS: gl.constexpr = gl.constexpr(1)
BACKWARD_ROWS: gl.constexpr = gl.constexpr(64)
BACKWARD_PARTS: gl.constexpr = gl.constexpr(1)
FORWARD_TILE: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
BACKWARD_TILE: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
FORWARD_VECTOR: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[1]], lane_bases=[[0], [0], [2], [4], [8]],
    warp_bases=[[16], [32]], block_bases=[], shape=[64],
))  # fmt: skip
BACKWARD_VECTOR: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[1]], lane_bases=[[0], [0], [2], [4], [8]],
    warp_bases=[[16], [32]], block_bases=[], shape=[64],
))  # fmt: skip
ROW_SUMS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 1], [0, 8], [0, 16], [0, 32]], lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
    warp_bases=[[8, 0], [16, 0]], block_bases=[], shape=[32, 64],
))  # fmt: skip
ROW_EIGHTHS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 1]], lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
    warp_bases=[[8, 0], [16, 0]], block_bases=[], shape=[32, 8],
))  # fmt: skip
COL_SUMS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[8, 0]], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
    warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, 4],
))  # fmt: skip
COL_SUMS_LOADED: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[1, 0]], lane_bases=[[0, 1], [0, 2], [2, 0], [4, 0], [8, 0]],
    warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, 4],
))  # fmt: skip
ALL_SUMS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
    warp_bases=[[8, 0], [16, 0]], block_bases=[], shape=[32, 4],
))  # fmt: skip
COLS: gl.constexpr = gl.constexpr(gl.SliceLayout(0, FORWARD_TILE))
SUMS: gl.constexpr = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
THREADS_SUMS: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
INTERVAL_LINE: gl.constexpr = gl.constexpr(gl.SliceLayout(1, THREADS_SUMS))
INTERVAL_LOADED: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
OPERANDS: gl.constexpr = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
PLAIN: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
LINE: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
KEYS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[1, 0], [0, 1], [0, 8]], lane_bases=[[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]],
    warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, 16],
))  # fmt: skip
BACKWARD_SPREAD: gl.constexpr = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
BACKWARD_SCRATCH: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
if not hasattr(gl.shared_memory_descriptor, "_reinterpret"):  # Triton 3.9 dropped the underscore
    gl.shared_memory_descriptor._reinterpret = gl.shared_memory_descriptor.reinterpret


@gluon.jit
def tanh(x):
    """tanh in one special-function instruction; relative error at most 2^-11."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def gate(x):
    """f and 1 - f, where x is f itself."""
    return x, 1.0 - x


@gluon.jit
def load_vector(address, mask, inside):
    """Load one step's vector; zeros where the step is outside the sequence."""
    return gl.load(address, mask=gl.where(inside, mask, False), other=0.0)


@gluon.jit
def load_weight(base, stride_n, stride_i, stride_j, n, TILE: gl.constexpr):
    """Put group n's state weight, (V_PAD, V_PAD), where a warpgroup's products read their right operand."""
    i = gl.arange(0, V_PAD, gl.SliceLayout(1, TILE))
    j = gl.arange(0, V_PAD, gl.SliceLayout(0, TILE))
    offsets = i.to(gl.int64)[:, None] * stride_i + j.to(gl.int64)[None, :] * stride_j
    mask = (i < V)[:, None] & (j < V)[None, :]
    w = rounded(gl.load(base + gl.cast(n, gl.int64) * stride_n + offsets, mask=mask, other=0.0).to(gl.float32))
    shared = gl.allocate_shared_memory(w.dtype, [V_PAD, V_PAD], OPERANDS, w)
    fence_async_shared()
    return shared


@gluon.jit
def load_gate(address, inside):
    """Load one step's x as float32; outside the sequence, that of f = 1, which changes nothing."""
    return gl.load(address, mask=inside, other=1.0).to(gl.float32)


@gluon.jit
def rounded(x):
    """x as an operand of a product."""
    return x.to(gl.bfloat16)


@gluon.jit
def product(a, b, total):
    """a b + total, summed in float32; b is in shared memory."""
    return warpgroup_mma(gl.convert_layout(a, gl.DotOperandLayout(0, total.type.layout, 2)), b, total)


@gluon.jit
def slots(k_loaded):
    """An interval's k_t, from shared memory (steps, rows), as columns of the left operand of a product."""
    x = k_loaded.permute((1, 0)).load(KEYS)
    x = x.reshape([4, 8, 2, x.shape[1]]).permute((0, 2, 1, 3)).reshape([x.shape[0], x.shape[1]])
    return gl.convert_layout(x, gl.DotOperandLayout(0, FORWARD_TILE, 2))


@gluon.jit
def started_candidate(h, w, keys, v_tile, t, zeros):
    """H W + k v^T of step t, for which ``warpgroup_mma_wait`` waits: one slot is not zero."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, zeros.type.layout, 2)
    slot = gl.arange(0, keys.shape[1], gl.SliceLayout(0, LEFT))[None, :]
    kv = warpgroup_mma(gl.where(slot == t, keys, 0.0), v_tile, zeros, use_acc=False, is_async=True)
    return warpgroup_mma(gl.convert_layout(rounded(h), LEFT), w, kv, is_async=True)


@gluon.jit
def started_product(a, b, zeros):
    """a b, for which ``warpgroup_mma_wait`` waits; b is in shared memory."""
    a = gl.convert_layout(a, gl.DotOperandLayout(0, zeros.type.layout, 2))
    return warpgroup_mma(a, b, zeros, use_acc=False, is_async=True)


@gluon.jit
def prefetch(address):
    """Have the L2 fetch the sector of each of these addresses, with no register to wait for them."""
    address = address.to(gl.int64)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
    )


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
def col_sums(x, LAYOUT: gl.constexpr):
    """Sum x (rows, cols) over the columns that a thread has: (rows, 4), one column a lane."""
    x = x.reshape([x.shape[0], x.shape[1] // 8, 4, 2]).permute((0, 2, 1, 3)).reshape([x.shape[0], 4, x.shape[1] // 4])
    x = gl.sum(x, 2)
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def butterfly(x, LANES: gl.constexpr):
    """Butterfly shuffle: the value of lane ^ LANES."""
    return gl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {LANES}, 0x1f, 0xffffffff;", "=f,f", [x], dtype=x.dtype, is_pure=False, pack=1
    )


@gluon.jit
def added(one, other, upper, LANES: gl.constexpr):
    """Add pairs of rows of two sums at once: lower rows go on with ``one``, upper ones with ``other``."""
    return gl.where(upper, other, one) + butterfly(gl.where(upper, one, other), LANES)


@gluon.jit
def columns_as_loaded(x, LAYOUT: gl.constexpr):
    """x (rows of a tile, 4) as vectors are loaded and stored; undoes ``in_tile``."""
    x = x.reshape([x.shape[0] // 16, 2, 8, 4]).permute((0, 2, 1, 3)).reshape([x.shape[0], 4])
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def row_sums(x):
    """Sum x (rows, cols) over the rows that a thread has: 8 rows a warp, one a lane."""
    x = gl.sum(x.reshape([4, x.shape[0] // 32, 8, x.shape[1]]), 1).reshape([32, x.shape[1]])
    return gl.convert_layout(x, ROW_SUMS, assert_trivial=True)


@gluon.jit
def halves(x):
    """x (rows, cols) as two tensors (rows, cols / 2), from left to right."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def eighths(x, LAYOUT: gl.constexpr):
    """x (rows, cols) as eight tensors (rows, cols / 8), from left to right."""
    left, right = halves(x)
    x_0, x_2 = halves(left)
    x_4, x_6 = halves(right)
    x_0, x_1 = halves(x_0)
    x_2, x_3 = halves(x_2)
    x_4, x_5 = halves(x_4)
    x_6, x_7 = halves(x_6)
    x_0 = gl.convert_layout(x_0, LAYOUT, assert_trivial=True)
    x_1 = gl.convert_layout(x_1, LAYOUT, assert_trivial=True)
    x_2 = gl.convert_layout(x_2, LAYOUT, assert_trivial=True)
    x_3 = gl.convert_layout(x_3, LAYOUT, assert_trivial=True)
    x_4 = gl.convert_layout(x_4, LAYOUT, assert_trivial=True)
    x_5 = gl.convert_layout(x_5, LAYOUT, assert_trivial=True)
    x_6 = gl.convert_layout(x_6, LAYOUT, assert_trivial=True)
    x_7 = gl.convert_layout(x_7, LAYOUT, assert_trivial=True)
    return x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7


@gluon.jit
def over_lanes(x):
    """Sum x (rows, cols) over each warp's rows: (32, cols / 8), an eighth of the columns a lane."""
    x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7 = eighths(row_sums(x), ROW_EIGHTHS)
    row = gl.arange(0, 32, gl.SliceLayout(1, ROW_EIGHTHS))[:, None]
    x_0 = added(x_0, x_4, row & 4 != 0, 16)
    x_1 = added(x_1, x_5, row & 4 != 0, 16)
    x_2 = added(x_2, x_6, row & 4 != 0, 16)
    x_3 = added(x_3, x_7, row & 4 != 0, 16)
    x_0 = added(x_0, x_2, row & 2 != 0, 8)
    x_1 = added(x_1, x_3, row & 2 != 0, 8)
    x_0 = added(x_0, x_1, row & 1 != 0, 4)
    return x_0


@gluon.jit
def over_warps(parts):
    """Sum the parts that four warps left in shared memory."""
    x = parts.index(0).load(SUMS)
    for warp in gl.static_range(1, 4):
        x += parts.index(warp).load(SUMS)
    return x


@gluon.jit
def over_cols(x, y):
    """Sum x y over columns, x (rows, cols) and y (cols,): (rows, 4) as vectors are loaded, every lane the same."""
    x = col_sums(x * y.to(gl.float32)[None, :], COL_SUMS)
    x += butterfly(x, 2)
    x += butterfly(x, 1)
    return columns_as_loaded(x, COL_SUMS_LOADED)


@gluon.jit
def keep_gates(f_line, u_line, x):
    """Store an interval's f and 1 - f to shared memory, since every thread needs all of them."""
    f, u = gate(x)
    f_line.store(f)
    u_line.store(u)


@gluon.jit
def kept_gate(line, t, tile):
    """Step t's f or 1 - f, for all elements of ``tile``."""
    return line.index(t).load(gl.SliceLayout(1, tile.type.layout))[:, None]


@gluon.jit
def outer(k, v, tile):
    """k v^T beside ``tile``."""
    return column(k, tile) * v.to(gl.float32)[None, :]


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
    low = gl.maximum(x, -bound, propagate_nan=triton.language.PropagateNan.ALL)
    return gl.minimum(low, bound, propagate_nan=triton.language.PropagateNan.ALL)


@gluon.jit
def sequence(cu_seqlens, b, T):
    """First token and length of packed sequence b; offsets that nobody could check still stay inside the tensors."""
    start = gl.minimum(gl.maximum(gl.load(cu_seqlens + b).to(gl.int64), 0), T)
    stop = gl.minimum(gl.maximum(gl.load(cu_seqlens + b + 1).to(gl.int64), start), T)
    return start, (stop - start).to(gl.int32)


@gluon.jit(do_not_specialize=["S", "intervals"])
def m2rnn_forward_kernel(
    q, k, v, w, x, h0, y, ht, checkpoints, cu_seqlens, stride_q_b, stride_q_s, stride_q_n, stride_q_d,
    stride_k_b, stride_k_s, stride_k_n, stride_k_d, stride_v_b, stride_v_s, stride_v_n, stride_v_d,
    stride_w_n, stride_w_i, stride_w_j, stride_x_b, stride_x_s, stride_x_n, S, intervals,
    USE_INITIAL_STATE: gl.constexpr, IS_VARLEN: gl.constexpr, SAVE: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """Scan one sequence's steps for FORWARD_ROWS rows of one head's state, 16 rows a warp."""
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
    y += (token * 16 + n) * 64
    stride_y: gl.constexpr = 1024
    checkpoints += (interval * N + n) * (K * V)
    w = load_weight(w, stride_w_n, stride_w_i, stride_w_j, n // (N // NW), FORWARD_TILE)
    zeros = gl.zeros((FORWARD_ROWS, V_PAD), gl.float32, FORWARD_TILE)
    h = zeros
    if USE_INITIAL_STATE:
        h = gl.load(h0 + (b * N + n) * (K * V) + state_offsets, mask=state_mask, other=0.0)

    # An interval's vectors, and what every warp has summed over its rows for y. A step sums for the one before it while
    # its own product and tanh are on their way, so q and y begin one step earlier.
    loaded_step = gl.arange(0, 16, gl.SliceLayout(1, INTERVAL_LOADED))[:, None]
    loaded_col = gl.arange(0, V_PAD, gl.SliceLayout(0, INTERVAL_LOADED))[None, :]
    loaded_row = part * 64 + loaded_col
    sum_cols = gl.arange(0, V_PAD, SUMS)
    stride_q = gl.cast(stride_q_s, gl.int64)
    q_mask = loaded_row < K
    q_at = q + loaded_step * stride_q + loaded_row.to(gl.int64) * stride_q_d
    q_loaded = gl.allocate_shared_memory(w.dtype, [16, V_PAD], PLAIN)
    q_of = q_loaded._reinterpret(w.dtype, [16, V_PAD], LINE)
    stride_k = gl.cast(stride_k_s, gl.int64)
    k_mask = loaded_row < K
    k_at = k + loaded_step * stride_k + loaded_row.to(gl.int64) * stride_k_d
    k_loaded = gl.allocate_shared_memory(w.dtype, [16, V_PAD], PLAIN)
    stride_v = gl.cast(stride_v_s, gl.int64)
    v_mask = loaded_col < V
    v_at = v + loaded_step * stride_v + loaded_col.to(gl.int64) * stride_v_d
    v_tile = gl.allocate_shared_memory(w.dtype, [16, V_PAD], OPERANDS)
    line_step = gl.arange(0, 16, INTERVAL_LINE)
    stride_x = gl.cast(stride_x_s, gl.int64)
    f_line = gl.allocate_shared_memory(gl.float32, [16], LINE)
    f_of = f_line._reinterpret(gl.float32, [16, 1], LINE)
    u_line = gl.allocate_shared_memory(gl.float32, [16], LINE)
    u_of = u_line._reinterpret(gl.float32, [16, 1], LINE)
    y_parts = gl.allocate_shared_memory(gl.float32, [16, 4 * V_PAD], PLAIN)
    y_of = y_parts._reinterpret(gl.float32, [16, 32, V_PAD // 8], PLAIN)
    y_offsets = (loaded_step - 1) * stride_y + loaded_col
    q_at -= stride_q
    q_next = gl.load(q_at, mask=(loaded_step > 0) & (loaded_step <= length) & q_mask, other=0.0)
    k_next = gl.load(k_at, mask=(loaded_step < length) & k_mask, other=0.0)
    v_next = gl.load(v_at, mask=(loaded_step < length) & v_mask, other=0.0)
    x_next = load_gate(x + line_step * stride_x, line_step < length)
    for first in range(0, length, INTERVAL):
        steps = gl.minimum(INTERVAL, length - first)
        q_loaded.store(q_next)
        k_loaded.store(k_next)
        v_tile.store(v_next)
        fence_async_shared()
        keep_gates(f_line, u_line, x_next)
        keys = slots(k_loaded)
        inside = loaded_step < length - first - INTERVAL
        q_at += INTERVAL * stride_q
        q_next = gl.load(q_at, mask=inside & q_mask, other=0.0)
        k_at += INTERVAL * stride_k
        k_next = gl.load(k_at, mask=inside & k_mask, other=0.0)
        v_at += INTERVAL * stride_v
        v_next = gl.load(v_at, mask=inside & v_mask, other=0.0)
        x_next = load_gate(x + (first + INTERVAL + line_step) * stride_x, line_step < length - first - INTERVAL)
        if SAVE:
            gl.store(checkpoints + state_offsets, h, mask=state_mask)
            checkpoints += N * K * V
        for t in range(0, steps):
            started = started_candidate(h, w, keys, v_tile, t, zeros)
            f, u = kept_gate(f_of, t, h), kept_gate(u_of, t, h)
            decayed = f * h
            q_t = q_of.index(t).load(FORWARD_VECTOR)
            z = tanh(warpgroup_mma_wait(0, [started]))
            y_of.index(t).store(over_lanes(column(q_t, h) * h))
            h = gl.fma(u, z, decayed)
        y_0 = y_parts.slice(0, V_PAD, 1).load(INTERVAL_LOADED)
        for warp in gl.static_range(1, 4):
            y_0 += y_parts.slice(warp * V_PAD, V_PAD, 1).load(INTERVAL_LOADED)
        y_inside = (loaded_step < steps) & (first + loaded_step > 0)
        gl.store(y + y_offsets, y_0, mask=gl.where(y_inside, (loaded_col < V), False))
        y += INTERVAL * stride_y

    # y of the last step, which no other one follows.
    q += gl.maximum(length - 1, 0) * stride_q
    q_t = load_vector(q + rows.to(gl.int64) * stride_q_d, row_mask, length > 0)
    y_of.index(0).store(over_lanes(column(q_t, h) * h))
    y_0 = over_warps(y_of.index(0)._reinterpret(gl.float32, [4, V_PAD], LINE))
    y += (length - 1 - gl.cdiv(length, INTERVAL) * INTERVAL) * stride_y
    gl.store(y + sum_cols, y_0, mask=gl.where(length > 0, (sum_cols < V), False))
    gl.store(ht + (b * N + n) * (K * V) + state_offsets, h, mask=state_mask)


@gluon.jit(do_not_specialize=["S", "intervals"])
def m2rnn_backward_kernel(
    q, k, v, w, x, dy, dht, checkpoints, scratch, cu_seqlens, dq, dk, dv, dw, df, dh0, stride_q_b,
    stride_q_s, stride_q_n, stride_q_d, stride_k_b, stride_k_s, stride_k_n, stride_k_d, stride_v_b,
    stride_v_s, stride_v_n, stride_v_d, stride_w_n, stride_w_i, stride_w_j, stride_x_b, stride_x_s,
    stride_x_n, stride_dy_b, stride_dy_s, stride_dy_n, stride_dy_d, S, intervals, bound,
    USE_FINAL_STATE_GRADIENT: gl.constexpr, IS_VARLEN: gl.constexpr, ATOMIC: gl.constexpr,
    WANT_Q: gl.constexpr, WANT_K: gl.constexpr, WANT_V: gl.constexpr, WANT_W: gl.constexpr,
    WANT_F: gl.constexpr, WANT_H: gl.constexpr, CARRIES: gl.constexpr,
):  # fmt: skip
    """Scan one sequence's steps backwards for BACKWARD_ROWS rows of one head's state, 16 rows a warp."""
    program = gl.program_id(0)
    part = program % BACKWARD_PARTS
    n = (program // BACKWARD_PARTS) % N
    b = (program // (BACKWARD_PARTS * N)).to(gl.int64)
    rows = part * BACKWARD_ROWS + gl.arange(0, BACKWARD_ROWS, BACKWARD_VECTOR)
    cols = gl.arange(0, V_PAD, gl.SliceLayout(0, BACKWARD_TILE))
    col_mask = cols < V
    state_rows = in_tile(rows, BACKWARD_TILE)[:, None]
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
    dy += b * stride_dy_b + start * stride_dy_s + n.to(gl.int64) * stride_dy_n
    checkpoints += (interval * N + n) * (K * V)
    w = load_weight(w, stride_w_n, stride_w_i, stride_w_j, n // (N // NW), BACKWARD_TILE)
    w_t = w.permute((1, 0))
    sum_dw = gl.zeros((V_PAD, V_PAD), gl.float32, BACKWARD_TILE)
    zeros = gl.zeros((BACKWARD_ROWS, V_PAD), gl.float32, BACKWARD_TILE)
    c = zeros
    if USE_FINAL_STATE_GRADIENT:
        c = gl.load(dht + (b * N + n) * (K * V) + state_offsets, mask=state_mask, other=0.0)

    # Operands of dW, what warps and threads have summed, and an interval's states and vectors. The states' pass has dq
    # of the step before its own, so dy begins one step earlier.
    h_operand = gl.allocate_shared_memory(w.dtype, [BACKWARD_ROWS, V_PAD], OPERANDS, rounded(zeros))
    d_operand = gl.allocate_shared_memory(w.dtype, [BACKWARD_ROWS, V_PAD], OPERANDS, rounded(zeros))
    dv_parts = gl.allocate_shared_memory(gl.float32, [32, V_PAD // 8], PLAIN)
    dv_of = dv_parts._reinterpret(gl.float32, [4, V_PAD], LINE)
    df_parts = gl.allocate_shared_memory(gl.float32, [16, 128], PLAIN)
    df_of = df_parts._reinterpret(gl.float32, [16, 32, 4], PLAIN)
    rebuilt = gl.allocate_shared_memory(gl.float32, [INTERVAL - 1, BACKWARD_ROWS, V_PAD], BACKWARD_SCRATCH)
    loaded_step = gl.arange(0, 16, gl.SliceLayout(1, INTERVAL_LOADED))[:, None]
    loaded_col = gl.arange(0, V_PAD, gl.SliceLayout(0, INTERVAL_LOADED))[None, :]
    loaded_row = part * 64 + loaded_col
    sum_cols = gl.arange(0, V_PAD, SUMS)
    stride_q = gl.cast(stride_q_s, gl.int64)
    q_mask = loaded_row < K
    q_at = q + loaded_step * stride_q + loaded_row.to(gl.int64) * stride_q_d
    q_loaded = gl.allocate_shared_memory(w.dtype, [16, V_PAD], PLAIN)
    q_of = q_loaded._reinterpret(w.dtype, [16, V_PAD], LINE)
    stride_k = gl.cast(stride_k_s, gl.int64)
    k_mask = loaded_row < K
    k_at = k + loaded_step * stride_k + loaded_row.to(gl.int64) * stride_k_d
    k_loaded = gl.allocate_shared_memory(w.dtype, [16, V_PAD], PLAIN)
    k_of = k_loaded._reinterpret(w.dtype, [16, V_PAD], LINE)
    stride_v = gl.cast(stride_v_s, gl.int64)
    v_mask = loaded_col < V
    v_at = v + loaded_step * stride_v + loaded_col.to(gl.int64) * stride_v_d
    v_loaded = gl.allocate_shared_memory(w.dtype, [16, V_PAD], PLAIN)
    v_tile = gl.allocate_shared_memory(w.dtype, [16, V_PAD], OPERANDS)
    v_of = v_loaded._reinterpret(w.dtype, [16, V_PAD], LINE)
    stride_dy = gl.cast(stride_dy_s, gl.int64)
    dy_mask = loaded_col < V
    dy_at = dy + loaded_step * stride_dy + loaded_col.to(gl.int64) * stride_dy_d
    dy_loaded = gl.allocate_shared_memory(w.dtype, [16, V_PAD], PLAIN)
    dy_of = dy_loaded._reinterpret(w.dtype, [16, V_PAD], LINE)
    line_step = gl.arange(0, 16, INTERVAL_LINE)
    stride_x = gl.cast(stride_x_s, gl.int64)
    f_line = gl.allocate_shared_memory(gl.float32, [16], LINE)
    f_of = f_line._reinterpret(gl.float32, [16, 1], LINE)
    u_line = gl.allocate_shared_memory(gl.float32, [16], LINE)
    u_of = u_line._reinterpret(gl.float32, [16, 1], LINE)
    dy_at -= stride_dy

    col_lane = gl.arange(0, 4, gl.SliceLayout(0, COL_SUMS_LOADED))[None, :]
    col_rows = part * BACKWARD_ROWS + gl.arange(0, BACKWARD_ROWS, gl.SliceLayout(1, COL_SUMS_LOADED))[:, None]
    col_sum_mask = (col_lane == 0) & (col_rows < K)
    col_rows += 0 * col_lane
    stride_dq: gl.constexpr = 1024
    if WANT_Q:
        dq += (token * 16 + n) * 64
    stride_dk: gl.constexpr = 1024
    if WANT_K:
        dk += (token * 16 + n) * 64
    stride_dv: gl.constexpr = 1024
    if WANT_V:
        dv += (token * 16 + n) * 64
    stride_df: gl.constexpr = 16
    if WANT_F:
        df += (token * 16 + n)

    final = (gl.cdiv(length, INTERVAL) - 1) * INTERVAL
    for first in range(final, -1, -INTERVAL):
        # An interval's vectors and gates, then its states from its checkpoint.
        last = gl.minimum(INTERVAL, length - first) - 1
        if WANT_Q:
            dq_at = dq + gl.cast(first, gl.int64) * stride_dq
        if WANT_K:
            dk_at = dk + gl.cast(first, gl.int64) * stride_dk
        if WANT_V:
            dv_at = dv + gl.cast(first, gl.int64) * stride_dv
        if WANT_F:
            df_at = df + gl.cast(first, gl.int64) * stride_df
        mask = (loaded_step <= last) & q_mask
        loaded = gl.load(q_at + first * stride_q, mask=mask, other=0.0)
        q_loaded.store(loaded)
        mask = (loaded_step <= last) & k_mask
        loaded = gl.load(k_at + first * stride_k, mask=mask, other=0.0)
        k_loaded.store(loaded)
        mask = (loaded_step <= last) & v_mask
        loaded = gl.load(v_at + first * stride_v, mask=mask, other=0.0)
        v_loaded.store(loaded)
        v_tile.store(loaded)
        mask = (loaded_step <= last + 1) & (first + loaded_step > 0) & dy_mask
        loaded = gl.load(dy_at + first * stride_dy, mask=mask, other=0.0)
        dy_loaded.store(loaded)
        fence_async_shared()
        x_line = load_gate(x + (first + line_step) * stride_x, line_step <= last)
        keep_gates(f_line, u_line, x_line)
        keys = slots(k_loaded)
        state = checkpoints + gl.cast(first // INTERVAL, gl.int64) * (N * K * V) + state_offsets
        h = gl.load(state, mask=state_mask, other=0.0)
        for t in range(0, last):
            started = started_candidate(h, w, keys, v_tile, t, zeros)
            rebuilt.index(t).store(h)
            f, u = kept_gate(f_of, t, h), kept_gate(u_of, t, h)
            decayed = f * h
            dy_t = dy_of.index(t).load(COLS)
            z = tanh(warpgroup_mma_wait(0, [started]))
            if WANT_Q:
                dq_0 = over_cols(h, dy_t)
                inside = first + t > 0
                gl.store(dq_at + (t - 1) * stride_dq + col_rows, dq_0, mask=gl.where(inside, col_sum_mask, False))
            h = gl.fma(u, z, decayed)
        if WANT_Q:
            dq_0 = over_cols(h, dy_of.index(last).load(COLS))
            inside = first + last > 0
            gl.store(dq_at + (last - 1) * stride_dq + col_rows, dq_0, mask=gl.where(inside, col_sum_mask, False))
            if first == final:  # and of the last step, which no other one follows
                started = started_candidate(h, w, keys, v_tile, last, zeros)
                f, u = kept_gate(f_of, last, h), kept_gate(u_of, last, h)
                z = tanh(warpgroup_mma_wait(0, [started]))
                dq_0 = over_cols(gl.fma(u, z, f * h), dy_of.index(last + 1).load(COLS))
                gl.store(dq_at + last * stride_dq + col_rows, dq_0, mask=col_sum_mask)
        # Prefetch what the interval before this one is rebuilt from, so that the L2 has it in time.
        lower = first - INTERVAL
        lane = gl.arange(0, 16 * (BACKWARD_ROWS // 16), BACKWARD_SPREAD)
        fetched = gl.maximum(lower + gl.minimum(lane % 16, INTERVAL - 1), 0).to(gl.int64)
        row = gl.minimum(part * BACKWARD_ROWS + lane // 16 * 16, K - 1).to(gl.int64)
        prefetch(k + fetched * stride_k + row * stride_k_d)
        prefetch(x + fetched * stride_x)
        prefetch(q + fetched * stride_q + row * stride_q_d)
        lane = gl.arange(0, 16 * (V_PAD // 16), BACKWARD_SPREAD)
        fetched = gl.maximum(lower + gl.minimum(lane % 16, INTERVAL - 1), 0).to(gl.int64)
        col = gl.minimum(lane // 16 * 16, V - 1).to(gl.int64)
        prefetch(v + fetched * stride_v + col * stride_v_d)
        prefetch(dy + fetched * stride_dy + col * stride_dy_d)
        lane = gl.arange(0, BACKWARD_ROWS * V_PAD // 8, BACKWARD_SPREAD)
        element = gl.minimum(part * (BACKWARD_ROWS * V) + lane * 8, K * V - 1)
        prefetch(checkpoints + gl.cast(gl.maximum(lower // INTERVAL, 0), gl.int64) * (N * K * V) + element)
        for t in range(last, -1, -1):
            started = started_candidate(h, w, keys, v_tile, t, zeros)
            if WANT_W:  # of the step that came before this one: nobody waits for it
                more_dw = warpgroup_mma(h_operand.permute((1, 0)), d_operand, sum_dw, is_async=True)
            f, u = kept_gate(f_of, t, h), kept_gate(u_of, t, h)
            k_t = column(k_of.index(t).load(BACKWARD_VECTOR), c)
            q_t = column(q_of.index(t).load(BACKWARD_VECTOR), c)
            dy_t = dy_of.index(t + 1).load(COLS).to(gl.float32)[None, :]
            g = clamp(c, bound) + q_t * dy_t
            z = tanh(warpgroup_mma_wait(1 if WANT_W else 0, [started]))
            d = g * (u - u * z * z)
            d_rounded = rounded(d)
            if WANT_W:
                sum_dw = warpgroup_mma_wait(0, [more_dw])
            if CARRIES:
                started = started_product(d_rounded, w_t, zeros)
            if WANT_W:
                h_operand.store(rounded(h))
                d_operand.store(d_rounded)
            if WANT_F:
                df_of.index(t).store(col_sums(row_sums(g * (h - z)), ALL_SUMS))
            if WANT_V:
                dv_parts.store(over_lanes(d * k_t))
            dk_0 = over_cols(d, v_of.index(t).load(COLS))
            if CARRIES:
                c = f * g + warpgroup_mma_wait(0, [started])
            if WANT_W:
                fence_async_shared()
            if WANT_K:
                gl.store(dk_at + t * stride_dk + col_rows, dk_0, mask=col_sum_mask)
            if WANT_V:
                dv_0 = over_warps(dv_of)
                gl.store(dv_at + t * stride_dv + sum_cols, dv_0, mask=(sum_cols < V))
            h = rebuilt.index(gl.maximum(t - 1, 0)).load(BACKWARD_TILE)
        if WANT_F:
            df_0 = gl.where(line_step <= last, gl.sum(df_parts.load(THREADS_SUMS), 1), 0.0)
            gl.store(df_at + line_step * stride_df, df_0, mask=line_step <= last)

    if WANT_W:
        sum_dw = warpgroup_mma(h_operand.permute((1, 0)), d_operand, sum_dw)
    if WANT_H:
        gl.store(dh0 + (b * N + n) * (K * V) + state_offsets, c, mask=state_mask)
    if WANT_W:
        i = gl.arange(0, V_PAD, gl.SliceLayout(1, BACKWARD_TILE))
        mask = (i < V)[:, None] & col_mask[None, :]
        gl.store(dw + program.to(gl.int64) * (V * V) + i[:, None] * V + cols[None, :], sum_dw, mask=mask)


@gluon.jit
def m2rnn_step_kernel(
    q, k, v, w, x, state, y, stride_q_b, stride_q_n, stride_q_d, stride_k_b, stride_k_n, stride_k_d,
    stride_v_b, stride_v_n, stride_v_d, stride_w_n, stride_w_i, stride_w_j, stride_x_b, stride_x_n,
    stride_h_b, stride_h_n, stride_h_i, stride_h_j,
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
    v = gl.load(v + cols.to(gl.int64) * stride_v_d, mask=col_mask, other=0.0)
    f, u = gate(gl.load(x).to(gl.float32))
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


# How m2gen's launchers, or those of a package, launch these kernels; of results by step: heads, contributors, shape
LAUNCH = {
    "computes_gate": False,
    "interval": 12,
    "checkpoints": "float32",
    "forward_programs": 16,
    "backward_programs": 16,
    "segments": 1,
    "shortest_segment": 0,
    "state": (16, 64, 64),
    "weight": (16, 1, 64, 64),
    "gate": (16, 1),
    "scratch": 0,
    "y": (16, 1, (64,)),
    "dq": (16, 1, (64,)),
    "dk": (16, 1, (64,)),
    "dv": (16, 1, (64,)),
    "df": (16, 1, ()),
    "forward_adds": False,
    "backward_adds": False,
    "short": 64,
    "aligned": False,
    "sum_block": 1024,
    "forward_options": {
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    },
    "backward_options": {
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    },
}
