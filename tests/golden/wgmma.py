"""M2RNN kernels for k64_v64_q16_k16_v16_f16_w16_bf16_carry_approx, schedule wgmma_aa_i8_ptx.



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
    gap, slope   H_(t-1) - Z_t, and the derivative u (1 - Z^2) of H_t by the argument of tanh
    next_, _all  operands of several steps, loaded ahead of time; a product with the vectors of all of them
    stride_x_s   elements between steps of operand x (and b sequences, n heads, d elements, i rows, j columns)
    stride_x     the same in 64 bits; of a result, elements between its steps
"""

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
INTERVAL: gl.constexpr = gl.constexpr(8)
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
ROW_SUMS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 1], [0, 8], [0, 16], [0, 32]], lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
    warp_bases=[[8, 0], [16, 0]], block_bases=[], shape=[32, 64],
))  # fmt: skip
ROW_EIGHTHS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[0, 1]], lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
    warp_bases=[[8, 0], [16, 0]], block_bases=[], shape=[32, 8],
))  # fmt: skip
ALL_SUMS: gl.constexpr = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
    warp_bases=[[8, 0], [16, 0]], block_bases=[], shape=[32, 4],
))  # fmt: skip
LEFT: gl.constexpr = gl.constexpr(gl.DotOperandLayout(0, FORWARD_TILE, 2))
SLOT_TILE: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))
SLOTS_LOADED: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
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
    return gl.convert_layout(x, LEFT)


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


@gluon.jit
def times(x, y):
    """x y, both operands of products, rounded once: one instruction for two."""
    return gl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, gl.full(x.shape, -0.0, x.dtype, x.type.layout)],
        dtype=x.dtype, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def output_of(q_of, dy_of, t, tile):
    """q and dy of step t, beside ``tile``."""
    q_t = q_of.index(t).load(gl.SliceLayout(1, tile.type.layout)).to(gl.float32)[:, None]
    return q_t, dy_of.index(t).load(gl.SliceLayout(0, tile.type.layout)).to(gl.float32)[None, :]


@gluon.jit
def with_output(c, q_t, dy_t, bound):
    """Gradient of a step's H: c, what the future wants of it, and q dy^T."""
    return clamp(c, bound) + q_t * dy_t


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
    """Scan one sequence's steps backwards for BACKWARD_ROWS rows of one head's state, 16 rows a warp.

    Shared memory has of each step of an interval the state before it, its slope and its gap. Each step has a slot of the
    products that make dq, dk and dv.
    """
    program = gl.program_id(0)
    part = program % BACKWARD_PARTS
    n = (program // BACKWARD_PARTS) % N
    b = (program // (BACKWARD_PARTS * N)).to(gl.int64)
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

    # What the program reads of an interval: each from where the last interval begins.
    slot = gl.arange(0, 8, gl.SliceLayout(1, SLOTS_LOADED))[:, None]
    loaded_col = gl.arange(0, V_PAD, gl.SliceLayout(0, SLOTS_LOADED))[None, :]
    loaded_row = part * BACKWARD_ROWS + loaded_col
    line_step = gl.arange(0, 16, INTERVAL_LINE)
    begin = gl.cast(end, gl.int64)
    left = gl.where(length > 0, length - end, 0)
    stride_q = gl.cast(stride_q_s, gl.int64)
    q += b * stride_q_b + (start + begin) * stride_q + (n // (N // NQ)).to(gl.int64) * stride_q_n
    q_offsets = slot * stride_q + loaded_row.to(gl.int64) * stride_q_d
    q_mask = (loaded_row < K) & (slot >= 0)
    next_q = gl.load(q + q_offsets, mask=q_mask & (slot < left), other=0.0)
    stride_k = gl.cast(stride_k_s, gl.int64)
    k += b * stride_k_b + (start + begin) * stride_k + (n // (N // NK)).to(gl.int64) * stride_k_n
    k_offsets = slot * stride_k + loaded_row.to(gl.int64) * stride_k_d
    k_mask = (loaded_row < K) & (slot >= 0)
    next_k = gl.load(k + k_offsets, mask=k_mask & (slot < left), other=0.0)
    stride_v = gl.cast(stride_v_s, gl.int64)
    v += b * stride_v_b + (start + begin) * stride_v + (n // (N // NV)).to(gl.int64) * stride_v_n
    v_offsets = slot * stride_v + loaded_col.to(gl.int64) * stride_v_d
    v_mask = (loaded_col < V) & (slot >= 0)
    next_v = gl.load(v + v_offsets, mask=v_mask & (slot < left), other=0.0)
    stride_dy = gl.cast(stride_dy_s, gl.int64)
    dy += b * stride_dy_b + (start + begin) * stride_dy + n.to(gl.int64) * stride_dy_n
    dy_offsets = slot * stride_dy + loaded_col.to(gl.int64) * stride_dy_d
    dy_mask = (loaded_col < V) & (slot >= 0)
    next_dy = gl.load(dy + dy_offsets, mask=dy_mask & (slot < left), other=0.0)
    stride_x = gl.cast(stride_x_s, gl.int64)
    x += b * stride_x_b + (start + begin) * stride_x + (n // (N // NF)).to(gl.int64) * stride_x_n
    next_x = load_gate(x + line_step * stride_x, line_step < left)
    rows = part * BACKWARD_ROWS + gl.arange(0, BACKWARD_ROWS, gl.SliceLayout(1, BACKWARD_TILE))
    cols = gl.arange(0, V_PAD, gl.SliceLayout(0, BACKWARD_TILE))
    col_mask = cols < V
    state_mask = (rows < K)[:, None] & col_mask[None, :]
    state_offsets = rows[:, None] * V + cols[None, :]
    checkpoints += ((interval + end // INTERVAL) * N + n) * (K * V)
    next_h = gl.load(checkpoints + state_offsets, mask=state_mask & (left > 0), other=0.0)

    # What it writes of one: each from where the interval begins.
    sum_col = gl.arange(0, V_PAD, gl.SliceLayout(1, SLOT_TILE))[:, None]
    sum_row = part * BACKWARD_ROWS + sum_col
    sum_slot = gl.arange(0, 8, gl.SliceLayout(0, SLOT_TILE))[None, :]
    stride_dq: gl.constexpr = 1024
    if WANT_Q:
        dq += (token * 16 + n) * 64
        dq += begin * stride_dq
    stride_dk: gl.constexpr = 1024
    if WANT_K:
        dk += (token * 16 + n) * 64
        dk += begin * stride_dk
    stride_dv: gl.constexpr = 1024
    if WANT_V:
        dv += (token * 16 + n) * 64
        dv += begin * stride_dv
    stride_df: gl.constexpr = 16
    if WANT_F:
        df += (token * 16 + n)
        df += begin * stride_df

    # Operands of products, of whose 16 rows the last 8 are zeros, what is kept of steps, and df's sums over threads.
    w = load_weight(w, stride_w_n, stride_w_i, stride_w_j, n // (N // NW), BACKWARD_TILE)
    w_t = w.permute((1, 0))
    no_steps = rounded(gl.zeros((16, V_PAD), gl.float32, SLOTS_LOADED))
    q_loaded = gl.allocate_shared_memory(w.dtype, [8, V_PAD], PLAIN)
    dy_loaded = gl.allocate_shared_memory(w.dtype, [8, V_PAD], PLAIN)
    q_of = q_loaded._reinterpret(w.dtype, [8, V_PAD], LINE)
    dy_of = dy_loaded._reinterpret(w.dtype, [8, V_PAD], LINE)
    k_tile = gl.allocate_shared_memory(w.dtype, [16, V_PAD], OPERANDS, no_steps)
    v_tile = gl.allocate_shared_memory(w.dtype, [16, V_PAD], OPERANDS, no_steps)
    dy_tile = gl.allocate_shared_memory(w.dtype, [8, V_PAD], OPERANDS)
    k_slots = k_tile.slice(0, 8, 0)
    v_slots = v_tile.slice(0, 8, 0)
    states = gl.allocate_shared_memory(w.dtype, [INTERVAL, BACKWARD_ROWS, V_PAD], OPERANDS)
    slopes = gl.allocate_shared_memory(w.dtype, [INTERVAL, BACKWARD_ROWS, V_PAD], OPERANDS)
    gaps = gl.allocate_shared_memory(gl.float16, [INTERVAL, BACKWARD_ROWS, V_PAD], OPERANDS)
    d_operand = gl.allocate_shared_memory(w.dtype, [BACKWARD_ROWS, V_PAD], OPERANDS)
    f_line = gl.allocate_shared_memory(gl.float32, [16], LINE)
    f_of = f_line._reinterpret(gl.float32, [16, 1], LINE)
    u_line = gl.allocate_shared_memory(gl.float32, [16], LINE)
    u_of = u_line._reinterpret(gl.float32, [16, 1], LINE)
    df_parts = gl.allocate_shared_memory(gl.float32, [16, 128], PLAIN)
    df_of = df_parts._reinterpret(gl.float32, [16, 32, 4], PLAIN)
    UNDERWAY: gl.constexpr = (1 if WANT_K else 0) + (1 if WANT_V else 0) + (1 if WANT_W else 0)
    no_sums = gl.zeros((V_PAD, 8), gl.float32, SLOT_TILE)
    sum_dw = gl.zeros((V_PAD, V_PAD), gl.float32, BACKWARD_TILE)
    zeros = gl.zeros((BACKWARD_ROWS, V_PAD), gl.float32, BACKWARD_TILE)
    c = zeros
    if USE_FINAL_STATE_GRADIENT:
        c = gl.load(dht + (b * N + n) * (K * V) + state_offsets, mask=state_mask, other=0.0)

    for first in range(end, -1, -INTERVAL):
        last = gl.minimum(INTERVAL, length - first) - 1
        q_loaded.store(next_q)
        k_slots.store(next_k)
        v_slots.store(next_v)
        dy_tile.store(next_dy)
        dy_loaded.store(next_dy)
        keep_gates(f_line, u_line, next_x)
        fence_async_shared()
        keys = k_tile.permute((1, 0)).load(LEFT)

        # Forwards: the states that steps start from, slopes and gaps. dq of a step is made during the next one.
        h = next_h.to(gl.float32)
        operand = rounded(h)
        sum_dq = no_sums
        for t in range(0, last + 1):
            started = started_candidate(operand, w, keys, v_tile, t, zeros)
            if WANT_Q:
                dq_all = started_product(operand, dy_tile.permute((1, 0)), no_sums)
            if WANT_W:
                states.index(t).store(operand)
            f, u = kept_gate(f_of, t, h), kept_gate(u_of, t, h)
            z = tanh(warpgroup_mma_wait(1 if WANT_Q else 0, [started]))
            uz = u * z
            if CARRIES:
                slopes.index(t).store(rounded(u - uz * z))
                gaps.index(t).store((h - z).to(gl.float16))
            h = gl.fma(f, h, uz)
            operand = rounded(h)
            if WANT_Q:
                sum_dq = gl.where(sum_slot == t - 1, warpgroup_mma_wait(0, [dq_all]), sum_dq)
        if WANT_Q:
            dq_all = started_product(operand, dy_tile.permute((1, 0)), no_sums)
            sum_dq = gl.where(sum_slot == last, warpgroup_mma_wait(0, [dq_all]), sum_dq)
            gl.store(dq + sum_slot * stride_dq + sum_row, sum_dq, mask=gl.where(sum_slot <= last, sum_row < K, False))

        # The interval before this one is on its way while this one goes backwards.
        before = first > 0
        q -= gl.where(before, INTERVAL * stride_q, 0)
        next_q = gl.load(q + q_offsets, mask=q_mask & before & (slot < INTERVAL), other=0.0)
        k -= gl.where(before, INTERVAL * stride_k, 0)
        next_k = gl.load(k + k_offsets, mask=k_mask & before & (slot < INTERVAL), other=0.0)
        v -= gl.where(before, INTERVAL * stride_v, 0)
        next_v = gl.load(v + v_offsets, mask=v_mask & before & (slot < INTERVAL), other=0.0)
        dy -= gl.where(before, INTERVAL * stride_dy, 0)
        next_dy = gl.load(dy + dy_offsets, mask=dy_mask & before & (slot < INTERVAL), other=0.0)
        x -= gl.where(before, INTERVAL * stride_x, 0)
        next_x = load_gate(x + line_step * stride_x, before & (line_step < INTERVAL))
        checkpoints -= gl.where(before, N * K * V, 0)
        next_h = gl.load(checkpoints + state_offsets, mask=state_mask & before, other=0.0)

        # Backwards: what gradients are of.
        if CARRIES:
            sum_dk = no_sums
            sum_dv = no_sums
            q_t, dy_t = output_of(q_of, dy_of, last, c)
            g = with_output(c, q_t, dy_t, bound)
            for t in range(last, -1, -1):
                d = times(rounded(g), slopes.index(t).load(BACKWARD_TILE))
                started = started_product(d, w_t, zeros)
                if WANT_K:
                    dk_all = started_product(d, v_slots.permute((1, 0)), no_sums)
                if WANT_V or WANT_W:
                    d_operand.store(d)
                f = kept_gate(f_of, t, c)
                q_t, dy_t = output_of(q_of, dy_of, gl.maximum(t - 1, 0), c)
                if WANT_F:
                    gap = gaps.index(t).load(BACKWARD_TILE).to(gl.float32)
                    df_of.index(t).store(col_sums(row_sums(g * gap), ALL_SUMS))
                if WANT_V or WANT_W:
                    fence_async_shared()  # which waits for the products that are underway
                if WANT_V:
                    d_t = d_operand.permute((1, 0))
                    dv_all = warpgroup_mma(d_t, k_slots.permute((1, 0)), no_sums, use_acc=False, is_async=True)
                if WANT_W:
                    more_dw = warpgroup_mma(states.index(t).permute((1, 0)), d_operand, sum_dw, is_async=True)
                c = f * g + warpgroup_mma_wait(UNDERWAY, [started])
                g = with_output(c, q_t, dy_t, bound)
                if WANT_K:
                    sum_dk = gl.where(sum_slot == t, warpgroup_mma_wait(UNDERWAY - 1, [dk_all]), sum_dk)
                if WANT_V:
                    sum_dv = gl.where(sum_slot == t, warpgroup_mma_wait(1 if WANT_W else 0, [dv_all]), sum_dv)
                if WANT_W:
                    sum_dw = warpgroup_mma_wait(0, [more_dw])
            if WANT_K:
                gl.store(dk + sum_slot * stride_dk + sum_row, sum_dk, mask=gl.where(sum_slot <= last, sum_row < K, False))
            if WANT_V:
                gl.store(dv + sum_slot * stride_dv + sum_col, sum_dv, mask=gl.where(sum_slot <= last, sum_col < V, False))
            if WANT_F:
                df_0 = gl.where(line_step <= last, gl.sum(df_parts.load(THREADS_SUMS), 1), 0.0)
                gl.store(df + line_step * stride_df, df_0, mask=line_step <= last)
        if WANT_Q:
            dq -= gl.where(before, INTERVAL * stride_dq, 0)
        if WANT_K:
            dk -= gl.where(before, INTERVAL * stride_dk, 0)
        if WANT_V:
            dv -= gl.where(before, INTERVAL * stride_dv, 0)
        if WANT_F:
            df -= gl.where(before, INTERVAL * stride_df, 0)

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
    "interval": 8,
    "checkpoints": "float16",
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
