"""M2RNN kernels for k24_v17_q2_k1_v4_f2_w4_fp32_total_exact, schedule portable_f16x1u3p_b16x1c2p_i6_exp.



H_t = f_t H_(t-1) + (1 - f_t) tanh(H_(t-1) W + k_t v_t^T),  y_t = H_t^T q_t   (arXiv 2603.14360)

    B, S, N      sequences, steps, heads of the state; head n reads group n // (N // NX) of operand X
    K, V         rows (state expansion) and columns (head dim) of the state
    q k v dy     q_t (K,), k_t (K,), v_t (V,) and dy_t (V,) of this program's head
    x, f, u      x_t, which is the gate itself; f_t and 1 - f_t
    h, z, w      state H (rows, V), candidate Z (rows, V), state weight W (V, V)
    c, g, d      gradients of H_t from the future, of H_t, and of the argument of tanh
    h0, ht       states before the first step and after the last one; dh0, dht, their gradients
    gap, slope   H_(t-1) - Z_t, and the derivative u (1 - Z^2) of H_t by the argument of tanh
    r_           operands from which an interval's states are rebuilt; next_, operands loaded ahead of time
    stride_x_s   elements between steps of operand x (and b sequences, n heads, d elements, i rows, j columns)
    stride_x     the same in 64 bits; of a result, elements between its steps
"""

import os

import torch
import triton
import triton.language as tl

K: tl.constexpr = tl.constexpr(24)
V: tl.constexpr = tl.constexpr(17)
V_PAD: tl.constexpr = tl.constexpr(32)
N: tl.constexpr = tl.constexpr(4)
NQ: tl.constexpr = tl.constexpr(2)
NK: tl.constexpr = tl.constexpr(1)
NV: tl.constexpr = tl.constexpr(4)
NF: tl.constexpr = tl.constexpr(2)
NW: tl.constexpr = tl.constexpr(4)
INTERVAL: tl.constexpr = tl.constexpr(6)
FORWARD_ROWS: tl.constexpr = tl.constexpr(16)
FORWARD_PARTS: tl.constexpr = tl.constexpr(2)
UNROLL: tl.constexpr = tl.constexpr(3)
BACKWARD_ROWS: tl.constexpr = tl.constexpr(16)
BACKWARD_PARTS: tl.constexpr = tl.constexpr(2)
CHUNK: tl.constexpr = tl.constexpr(2)
SUM_BLOCK: tl.constexpr = tl.constexpr(256)
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@triton.jit
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


@triton.jit
def gate(x):
    """f and 1 - f, where x is f itself."""
    return x, 1.0 - x


@triton.jit
def load_vector(address, mask, inside):
    """Load one step's vector; zeros where the step is outside the sequence."""
    return tl.load(address, mask=tl.where(inside, mask, False), other=0.0)


@triton.jit
def load_weight(base, stride_n, stride_i, stride_j, n):
    """Load group n's state weight, (V_PAD, V_PAD), as the right operand of a product."""
    i = tl.arange(0, V_PAD)
    j = tl.arange(0, V_PAD)
    offsets = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
    mask = (i < V)[:, None] & (j < V)[None, :]
    w = tl.load(base + tl.cast(n, tl.int64) * stride_n + offsets, mask=mask, other=0.0)
    return rounded(w.to(tl.float32))


@triton.jit
def load_gate(address, inside):
    """Load one step's x as float32; outside the sequence, that of f = 1, which changes nothing."""
    return tl.load(address, mask=inside, other=1.0).to(tl.float32)


@triton.jit
def to_bfloat16(x):
    """Round x to nearest even, as a GPU does."""
    if INTERPRETED:  # which truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def rounded(x):
    """x as an operand of a product."""
    return x.to(tl.float32)


@triton.jit
def transposed(x):
    """x^T."""
    return tl.trans(x)


@triton.jit
def product(a, b, total):
    """a b + total, summed in float32."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def column(x, tile):
    """x (rows,) as a column beside ``tile``, in float32."""
    return x.to(tl.float32)[:, None]


@triton.jit
def outer(k, v, tile):
    """k v^T beside ``tile``."""
    return column(k, tile) * v.to(tl.float32)[None, :]


@triton.jit
def candidate(h, w, kv):
    """Z = tanh(H W + k v^T)."""
    return tanh(product(rounded(h), w, kv))


@triton.jit
def advance(h, z, f, u):
    """H = f H + u Z, in one operation once Z is known."""
    return tl.fma(u, z, f * h)


@triton.jit
def clamp(x, bound):
    """Clamp to [-bound, bound]; NaN stays NaN."""
    low = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sequence(cu_seqlens, b, T):
    """First token and length of packed sequence b; offsets that nobody could check still stay inside the tensors."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + b).to(tl.int64), 0), T)
    stop = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1).to(tl.int64), start), T)
    return start, (stop - start).to(tl.int32)


@triton.jit
def contribute(address, x, mask, ATOMIC: tl.constexpr):
    """Add to a sum that several programs share, or store this program's own row of it."""
    if ATOMIC:
        tl.atomic_add(address, x, mask=mask, sem="relaxed")
    else:
        tl.store(address, x, mask=mask)


@triton.jit(do_not_specialize=["S", "intervals"])
def m2rnn_forward_kernel(
    q, k, v, w, x, h0, y, ht, checkpoints, cu_seqlens, stride_q_b, stride_q_s, stride_q_n, stride_q_d,
    stride_k_b, stride_k_s, stride_k_n, stride_k_d, stride_v_b, stride_v_s, stride_v_n, stride_v_d,
    stride_w_n, stride_w_i, stride_w_j, stride_x_b, stride_x_s, stride_x_n, S, intervals,
    USE_INITIAL_STATE: tl.constexpr, IS_VARLEN: tl.constexpr, SAVE: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Scan one sequence's steps for FORWARD_ROWS rows of one head's state."""
    part = tl.program_id(0) % FORWARD_PARTS
    n = (tl.program_id(0) // FORWARD_PARTS) % N
    b = (tl.program_id(0) // (FORWARD_PARTS * N)).to(tl.int64)
    rows = part * FORWARD_ROWS + tl.arange(0, FORWARD_ROWS)
    cols = tl.arange(0, V_PAD)
    row_mask = rows < K
    col_mask = cols < V
    state_rows = rows[:, None]
    state_mask = (state_rows < K) & col_mask[None, :]
    state_offsets = state_rows * V + cols[None, :]

    if IS_VARLEN:
        start, length = sequence(cu_seqlens, b, S)
        token = start
        interval = start // INTERVAL + b
    else:
        start = tl.cast(0, tl.int64)
        length = S
        token = b * S
        interval = b * intervals
    q += b * stride_q_b + start * stride_q_s + (n // (N // NQ)).to(tl.int64) * stride_q_n
    k += b * stride_k_b + start * stride_k_s + (n // (N // NK)).to(tl.int64) * stride_k_n
    v += b * stride_v_b + start * stride_v_s + (n // (N // NV)).to(tl.int64) * stride_v_n
    x += b * stride_x_b + start * stride_x_s + (n // (N // NF)).to(tl.int64) * stride_x_n
    q_row = rows.to(tl.int64) * stride_q_d
    k_row = rows.to(tl.int64) * stride_k_d
    v_col = cols.to(tl.int64) * stride_v_d
    y += (token * 4 + n) * 17 if ATOMIC else ((token * 4 + n) * 2 + part) * 17
    stride_y: tl.constexpr = 68 if ATOMIC else 136
    checkpoints += (interval * N + n) * (K * V)
    w = load_weight(w, stride_w_n, stride_w_i, stride_w_j, n // (N // NW))
    h = tl.zeros((FORWARD_ROWS, V_PAD), tl.float32)
    if USE_INITIAL_STATE:
        h = tl.load(h0 + (b * N + n) * (K * V) + state_offsets, mask=state_mask, other=0.0)

    # Where step i of an iteration lies; q, k, v and x point to the iteration whose operands are loaded next.
    q_0_row = q_row + 0 * tl.cast(stride_q_s, tl.int64)
    k_0_row = k_row + 0 * tl.cast(stride_k_s, tl.int64)
    v_0_col = v_col + 0 * tl.cast(stride_v_s, tl.int64)
    x_0_at = 0 * tl.cast(stride_x_s, tl.int64)
    q_1_row = q_row + 1 * tl.cast(stride_q_s, tl.int64)
    k_1_row = k_row + 1 * tl.cast(stride_k_s, tl.int64)
    v_1_col = v_col + 1 * tl.cast(stride_v_s, tl.int64)
    x_1_at = 1 * tl.cast(stride_x_s, tl.int64)
    q_2_row = q_row + 2 * tl.cast(stride_q_s, tl.int64)
    k_2_row = k_row + 2 * tl.cast(stride_k_s, tl.int64)
    v_2_col = v_col + 2 * tl.cast(stride_v_s, tl.int64)
    x_2_at = 2 * tl.cast(stride_x_s, tl.int64)
    q_0 = load_vector(q + q_0_row, row_mask, length > 0)
    k_0 = load_vector(k + k_0_row, row_mask, length > 0)
    v_0 = load_vector(v + v_0_col, col_mask, length > 0)
    x_0 = load_gate(x + x_0_at, length > 0)
    q_1 = load_vector(q + q_1_row, row_mask, length > 1)
    k_1 = load_vector(k + k_1_row, row_mask, length > 1)
    v_1 = load_vector(v + v_1_col, col_mask, length > 1)
    x_1 = load_gate(x + x_1_at, length > 1)
    q_2 = load_vector(q + q_2_row, row_mask, length > 2)
    k_2 = load_vector(k + k_2_row, row_mask, length > 2)
    v_2 = load_vector(v + v_2_col, col_mask, length > 2)
    x_2 = load_gate(x + x_2_at, length > 2)
    q_iteration = UNROLL * tl.cast(stride_q_s, tl.int64)
    k_iteration = UNROLL * tl.cast(stride_k_s, tl.int64)
    v_iteration = UNROLL * tl.cast(stride_v_s, tl.int64)
    x_iteration = UNROLL * tl.cast(stride_x_s, tl.int64)
    q += q_iteration
    k += k_iteration
    v += v_iteration
    x += x_iteration

    # Iterations after which a whole one follows need no guards, and the last ones do.
    whole = tl.maximum(length // UNROLL - 1, 0) * UNROLL
    for t in range(0, whole, UNROLL):
        if SAVE:
            if tl.cast(t, tl.int32) % INTERVAL == 0:
                tl.store(checkpoints + state_offsets, h, mask=state_mask)
                checkpoints += N * K * V

        # Operands of the next iteration: issued now, so that they arrive before they are needed.
        next_q_0 = tl.load(q + q_0_row, mask=row_mask, other=0.0)
        next_k_0 = tl.load(k + k_0_row, mask=row_mask, other=0.0)
        next_v_0 = tl.load(v + v_0_col, mask=col_mask, other=0.0)
        next_x_0 = tl.load(x + x_0_at).to(tl.float32)
        next_q_1 = tl.load(q + q_1_row, mask=row_mask, other=0.0)
        next_k_1 = tl.load(k + k_1_row, mask=row_mask, other=0.0)
        next_v_1 = tl.load(v + v_1_col, mask=col_mask, other=0.0)
        next_x_1 = tl.load(x + x_1_at).to(tl.float32)
        next_q_2 = tl.load(q + q_2_row, mask=row_mask, other=0.0)
        next_k_2 = tl.load(k + k_2_row, mask=row_mask, other=0.0)
        next_v_2 = tl.load(v + v_2_col, mask=col_mask, other=0.0)
        next_x_2 = tl.load(x + x_2_at).to(tl.float32)
        q += q_iteration
        k += k_iteration
        v += v_iteration
        x += x_iteration

        # Step t + 0
        f, u = gate(x_0)
        h = advance(h, candidate(h, w, outer(k_0, v_0, h)), f, u)
        y_0 = tl.sum(column(q_0, h) * h, 0)
        contribute(y + 0 * stride_y + cols, y_0, col_mask, ATOMIC)

        # Step t + 1
        f, u = gate(x_1)
        h = advance(h, candidate(h, w, outer(k_1, v_1, h)), f, u)
        y_1 = tl.sum(column(q_1, h) * h, 0)
        contribute(y + 1 * stride_y + cols, y_1, col_mask, ATOMIC)

        # Step t + 2
        f, u = gate(x_2)
        h = advance(h, candidate(h, w, outer(k_2, v_2, h)), f, u)
        y_2 = tl.sum(column(q_2, h) * h, 0)
        contribute(y + 2 * stride_y + cols, y_2, col_mask, ATOMIC)
        y += UNROLL * stride_y

        q_0, k_0, v_0, x_0 = next_q_0, next_k_0, next_v_0, next_x_0
        q_1, k_1, v_1, x_1 = next_q_1, next_k_1, next_v_1, next_x_1
        q_2, k_2, v_2, x_2 = next_q_2, next_k_2, next_v_2, next_x_2
    for t in range(whole, length, UNROLL):
        if SAVE:
            if tl.cast(t, tl.int32) % INTERVAL == 0:
                tl.store(checkpoints + state_offsets, h, mask=state_mask)
                checkpoints += N * K * V

        # Operands of the next iteration: issued now, so that they arrive before they are needed.
        ahead = t + 0 + UNROLL < length
        next_q_0 = load_vector(q + q_0_row, row_mask, ahead)
        next_k_0 = load_vector(k + k_0_row, row_mask, ahead)
        next_v_0 = load_vector(v + v_0_col, col_mask, ahead)
        next_x_0 = load_gate(x + x_0_at, ahead)
        ahead = t + 1 + UNROLL < length
        next_q_1 = load_vector(q + q_1_row, row_mask, ahead)
        next_k_1 = load_vector(k + k_1_row, row_mask, ahead)
        next_v_1 = load_vector(v + v_1_col, col_mask, ahead)
        next_x_1 = load_gate(x + x_1_at, ahead)
        ahead = t + 2 + UNROLL < length
        next_q_2 = load_vector(q + q_2_row, row_mask, ahead)
        next_k_2 = load_vector(k + k_2_row, row_mask, ahead)
        next_v_2 = load_vector(v + v_2_col, col_mask, ahead)
        next_x_2 = load_gate(x + x_2_at, ahead)
        q += q_iteration
        k += k_iteration
        v += v_iteration
        x += x_iteration

        # Step t + 0
        f, u = gate(x_0)
        h = advance(h, candidate(h, w, outer(k_0, v_0, h)), f, u)
        y_0 = tl.sum(column(q_0, h) * h, 0)
        contribute(y + 0 * stride_y + cols, y_0, tl.where(t + 0 < length, col_mask, False), ATOMIC)

        # Step t + 1
        f, u = gate(x_1)
        h = advance(h, candidate(h, w, outer(k_1, v_1, h)), f, u)
        y_1 = tl.sum(column(q_1, h) * h, 0)
        contribute(y + 1 * stride_y + cols, y_1, tl.where(t + 1 < length, col_mask, False), ATOMIC)

        # Step t + 2
        f, u = gate(x_2)
        h = advance(h, candidate(h, w, outer(k_2, v_2, h)), f, u)
        y_2 = tl.sum(column(q_2, h) * h, 0)
        contribute(y + 2 * stride_y + cols, y_2, tl.where(t + 2 < length, col_mask, False), ATOMIC)
        y += UNROLL * stride_y

        q_0, k_0, v_0, x_0 = next_q_0, next_k_0, next_v_0, next_x_0
        q_1, k_1, v_1, x_1 = next_q_1, next_k_1, next_v_1, next_x_1
        q_2, k_2, v_2, x_2 = next_q_2, next_k_2, next_v_2, next_x_2
    tl.store(ht + (b * N + n) * (K * V) + state_offsets, h, mask=state_mask)


@triton.jit(do_not_specialize=["S", "intervals"])
def m2rnn_backward_kernel(
    q, k, v, w, x, dy, dht, checkpoints, scratch, cu_seqlens, dq, dk, dv, dw, df, dh0, stride_q_b,
    stride_q_s, stride_q_n, stride_q_d, stride_k_b, stride_k_s, stride_k_n, stride_k_d, stride_v_b,
    stride_v_s, stride_v_n, stride_v_d, stride_w_n, stride_w_i, stride_w_j, stride_x_b, stride_x_s,
    stride_x_n, stride_dy_b, stride_dy_s, stride_dy_n, stride_dy_d, S, intervals, bound,
    USE_FINAL_STATE_GRADIENT: tl.constexpr, IS_VARLEN: tl.constexpr, ATOMIC: tl.constexpr,
    WANT_Q: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, WANT_W: tl.constexpr,
    WANT_F: tl.constexpr, WANT_H: tl.constexpr, CARRIES: tl.constexpr,
):  # fmt: skip
    """Scan one sequence's steps backwards for BACKWARD_ROWS rows of one head's state."""
    program = tl.program_id(0)
    part = program % BACKWARD_PARTS
    n = (program // BACKWARD_PARTS) % N
    b = (program // (BACKWARD_PARTS * N)).to(tl.int64)
    rows = part * BACKWARD_ROWS + tl.arange(0, BACKWARD_ROWS)
    cols = tl.arange(0, V_PAD)
    row_mask = rows < K
    col_mask = cols < V
    state_rows = rows[:, None]
    state_mask = (state_rows < K) & col_mask[None, :]
    state_offsets = state_rows * V + cols[None, :]

    if IS_VARLEN:
        start, length = sequence(cu_seqlens, b, S)
        token = start
        interval = start // INTERVAL + b
    else:
        start = tl.cast(0, tl.int64)
        length = S
        token = b * S
        interval = b * intervals
    q += b * stride_q_b + start * stride_q_s + (n // (N // NQ)).to(tl.int64) * stride_q_n
    k += b * stride_k_b + start * stride_k_s + (n // (N // NK)).to(tl.int64) * stride_k_n
    v += b * stride_v_b + start * stride_v_s + (n // (N // NV)).to(tl.int64) * stride_v_n
    x += b * stride_x_b + start * stride_x_s + (n // (N // NF)).to(tl.int64) * stride_x_n
    dy += b * stride_dy_b + start * stride_dy_s + n.to(tl.int64) * stride_dy_n
    q_row = rows.to(tl.int64) * stride_q_d
    k_row = rows.to(tl.int64) * stride_k_d
    v_col = cols.to(tl.int64) * stride_v_d
    dy_col = cols.to(tl.int64) * stride_dy_d
    checkpoints += (interval * N + n) * (K * V)
    w_t = load_weight(w, stride_w_n, stride_w_j, stride_w_i, n // (N // NW))
    w = load_weight(w, stride_w_n, stride_w_i, stride_w_j, n // (N // NW))
    sum_dw = tl.zeros((V_PAD, V_PAD), tl.float32)
    no_dw = sum_dw
    zeros = tl.zeros((BACKWARD_ROWS, V_PAD), tl.float32)
    c = zeros
    if USE_FINAL_STATE_GRADIENT:
        c = tl.load(dht + (b * N + n) * (K * V) + state_offsets, mask=state_mask, other=0.0)


    end = (tl.cdiv(length, CHUNK) - 1) * CHUNK  # where the last chunk starts
    # Chunks go backwards: these point to the chunk whose operands are loaded next, and to that whose gradients are.
    stride_q = tl.cast(stride_q_s, tl.int64)
    q_at = q + end * stride_q
    stride_k = tl.cast(stride_k_s, tl.int64)
    k_at = k + end * stride_k
    stride_v = tl.cast(stride_v_s, tl.int64)
    v_at = v + end * stride_v
    stride_x = tl.cast(stride_x_s, tl.int64)
    x_at = x + end * stride_x
    stride_dy = tl.cast(stride_dy_s, tl.int64)
    dy_at = dy + end * stride_dy
    stride_dq: tl.constexpr = 48 if ATOMIC else 96
    if WANT_Q:
        dq += (token * 2 + n // 2) * 24 if ATOMIC else (token * 4 + n) * 24
        dq += tl.cast(end, tl.int64) * stride_dq
    stride_dk: tl.constexpr = 24 if ATOMIC else 96
    if WANT_K:
        dk += (token * 1 + n // 4) * 24 if ATOMIC else (token * 4 + n) * 24
        dk += tl.cast(end, tl.int64) * stride_dk
    stride_dv: tl.constexpr = 68 if ATOMIC else 136
    if WANT_V:
        dv += (token * 4 + n) * 17 if ATOMIC else ((token * 4 + n) * 2 + part) * 17
        dv += tl.cast(end, tl.int64) * stride_dv
    stride_df: tl.constexpr = 2 if ATOMIC else 8
    if WANT_F:
        df += (token * 2 + n // 2) if ATOMIC else ((token * 4 + n) * 2 + part)
        df += tl.cast(end, tl.int64) * stride_df
    inside = (end >= 0) & (end + 0 < length)
    k_0 = load_vector(k_at + 0 * stride_k + k_row, row_mask, inside)
    v_0 = load_vector(v_at + 0 * stride_v + v_col, col_mask, inside)
    x_0 = load_gate(x_at + 0 * stride_x, inside)
    q_0 = load_vector(q_at + 0 * stride_q + q_row, row_mask, inside)
    dy_0 = load_vector(dy_at + 0 * stride_dy + dy_col, col_mask, inside)
    inside = (end >= 0) & (end + 1 < length)
    k_1 = load_vector(k_at + 1 * stride_k + k_row, row_mask, inside)
    v_1 = load_vector(v_at + 1 * stride_v + v_col, col_mask, inside)
    x_1 = load_gate(x_at + 1 * stride_x, inside)
    q_1 = load_vector(q_at + 1 * stride_q + q_row, row_mask, inside)
    dy_1 = load_vector(dy_at + 1 * stride_dy + dy_col, col_mask, inside)
    # States of one interval, CHUNK steps apart, rebuilt from its checkpoint; only this program touches them.
    scratch += program.to(tl.int64) * (INTERVAL // CHUNK * BACKWARD_ROWS * V_PAD)
    scratch_offsets = (state_rows - part * BACKWARD_ROWS) * V_PAD + cols[None, :]
    for first in range((tl.cdiv(length, INTERVAL) - 1) * INTERVAL, -1, -INTERVAL):
        last = tl.minimum(first + INTERVAL - CHUNK, end)
        state = checkpoints + tl.cast(first // INTERVAL, tl.int64) * (N * K * V) + state_offsets
        h_0 = tl.load(state, mask=state_mask, other=0.0)
        # The chunks before the last one are whole. Where there is none, nobody uses what is loaded.
        r_k_at = k + first * stride_k
        r_stride_k = tl.where(first < last, stride_k, 0)
        r_v_at = v + first * stride_v
        r_stride_v = tl.where(first < last, stride_v, 0)
        r_x_at = x + first * stride_x
        r_stride_x = tl.where(first < last, stride_x, 0)
        r_k_0 = tl.load(r_k_at + 0 * r_stride_k + k_row, mask=row_mask, other=0.0)
        r_v_0 = tl.load(r_v_at + 0 * r_stride_v + v_col, mask=col_mask, other=0.0)
        r_x_0 = tl.load(r_x_at + 0 * r_stride_x).to(tl.float32)
        r_k_1 = tl.load(r_k_at + 1 * r_stride_k + k_row, mask=row_mask, other=0.0)
        r_v_1 = tl.load(r_v_at + 1 * r_stride_v + v_col, mask=col_mask, other=0.0)
        r_x_1 = tl.load(r_x_at + 1 * r_stride_x).to(tl.float32)
        for t in range(0, last - first, CHUNK):
            tl.store(scratch + t // CHUNK * (BACKWARD_ROWS * V_PAD) + scratch_offsets, h_0)
            ahead = tl.where(tl.cast(first + t + CHUNK, tl.int32) < last, CHUNK, 0)
            r_k_at += ahead * stride_k
            r_v_at += ahead * stride_v
            r_x_at += ahead * stride_x
            next_k_0 = tl.load(r_k_at + 0 * stride_k + k_row, mask=row_mask, other=0.0)
            next_v_0 = tl.load(r_v_at + 0 * stride_v + v_col, mask=col_mask, other=0.0)
            next_x_0 = tl.load(r_x_at + 0 * stride_x).to(tl.float32)
            next_k_1 = tl.load(r_k_at + 1 * stride_k + k_row, mask=row_mask, other=0.0)
            next_v_1 = tl.load(r_v_at + 1 * stride_v + v_col, mask=col_mask, other=0.0)
            next_x_1 = tl.load(r_x_at + 1 * stride_x).to(tl.float32)
            f, u = gate(r_x_0)
            h_0 = advance(h_0, candidate(h_0, w, outer(r_k_0, r_v_0, h_0)), f, u)
            f, u = gate(r_x_1)
            h_0 = advance(h_0, candidate(h_0, w, outer(r_k_1, r_v_1, h_0)), f, u)
            r_k_0, r_v_0, r_x_0 = next_k_0, next_v_0, next_x_0
            r_k_1, r_v_1, r_x_1 = next_k_1, next_v_1, next_x_1
        tl.debug_barrier()
        for t in range(last, first - 1, -CHUNK):
            # Operands of the chunk before this one are loaded ahead of time. Where there is none, nobody uses what is
            # loaded, and the first step's will do.
            before = tl.cast(t - CHUNK, tl.int32)
            kept = scratch + tl.maximum(before - first, 0) // CHUNK * (BACKWARD_ROWS * V_PAD) + scratch_offsets
            before_stride_q = tl.where(before >= 0, stride_q, 0)
            q_at -= CHUNK * before_stride_q
            before_stride_k = tl.where(before >= 0, stride_k, 0)
            k_at -= CHUNK * before_stride_k
            before_stride_v = tl.where(before >= 0, stride_v, 0)
            v_at -= CHUNK * before_stride_v
            before_stride_dy = tl.where(before >= 0, stride_dy, 0)
            dy_at -= CHUNK * before_stride_dy
            before_stride_x = tl.where(before >= 0, stride_x, 0)
            x_at -= CHUNK * before_stride_x
            next_h = tl.load(kept)
            next_q_0 = tl.load(q_at + 0 * before_stride_q + q_row, mask=row_mask, other=0.0)
            next_k_0 = tl.load(k_at + 0 * before_stride_k + k_row, mask=row_mask, other=0.0)
            next_v_0 = tl.load(v_at + 0 * before_stride_v + v_col, mask=col_mask, other=0.0)
            next_dy_0 = tl.load(dy_at + 0 * before_stride_dy + dy_col, mask=col_mask, other=0.0)
            next_x_0 = tl.load(x_at + 0 * before_stride_x).to(tl.float32)
            next_q_1 = tl.load(q_at + 1 * before_stride_q + q_row, mask=row_mask, other=0.0)
            next_k_1 = tl.load(k_at + 1 * before_stride_k + k_row, mask=row_mask, other=0.0)
            next_v_1 = tl.load(v_at + 1 * before_stride_v + v_col, mask=col_mask, other=0.0)
            next_dy_1 = tl.load(dy_at + 1 * before_stride_dy + dy_col, mask=col_mask, other=0.0)
            next_x_1 = tl.load(x_at + 1 * before_stride_x).to(tl.float32)

            # The chunk's states and candidates, forwards: h_0 is the state that step t starts from.
            f_0, u_0 = gate(x_0)
            z_0 = candidate(h_0, w, outer(k_0, v_0, h_0))
            h_1 = f_0 * h_0 + u_0 * z_0  # not advance: the slope has u z as well
            operand_0 = rounded(h_0)
            gap_0 = h_0 - z_0
            slope_0 = u_0 - u_0 * z_0 * z_0
            f_1, u_1 = gate(x_1)
            z_1 = candidate(h_1, w, outer(k_1, v_1, h_1))
            h_2 = f_1 * h_1 + u_1 * z_1  # not advance: the slope has u z as well
            operand_1 = rounded(h_1)
            gap_1 = h_1 - z_1
            slope_1 = u_1 - u_1 * z_1 * z_1

            # Step t + 1, backwards
            inside = t + 1 < length
            limit = tl.where(inside, bound, float("inf"))
            g = clamp(c + column(q_1, c) * dy_1.to(tl.float32)[None, :], limit)
            d = g * slope_1
            dq_1 = tl.sum(h_2 * dy_1.to(tl.float32)[None, :], 1)
            dk_1 = tl.sum(d * v_1.to(tl.float32)[None, :], 1)
            dv_1 = tl.sum(d * column(k_1, c), 0)
            df_1 = tl.sum(g * gap_1)
            d_operand = rounded(d)
            if WANT_W:
                sum_dw = tl.fma(1.0, product(transposed(operand_1), d_operand, no_dw), sum_dw)
            if CARRIES:
                c = tl.fma(f_1, g, product(d_operand, w_t, zeros))
            if WANT_Q:
                contribute(dq + 1 * stride_dq + rows, dq_1, tl.where(inside, row_mask, False), ATOMIC)
            if WANT_K:
                contribute(dk + 1 * stride_dk + rows, dk_1, tl.where(inside, row_mask, False), ATOMIC)
            if WANT_V:
                contribute(dv + 1 * stride_dv + cols, dv_1, tl.where(inside, col_mask, False), ATOMIC)
            if WANT_F:
                contribute(df + 1 * stride_df, df_1, inside, ATOMIC)

            # Step t + 0, backwards
            inside = t + 0 < length
            limit = tl.where(inside, bound, float("inf"))
            g = clamp(c + column(q_0, c) * dy_0.to(tl.float32)[None, :], limit)
            d = g * slope_0
            dq_0 = tl.sum(h_1 * dy_0.to(tl.float32)[None, :], 1)
            dk_0 = tl.sum(d * v_0.to(tl.float32)[None, :], 1)
            dv_0 = tl.sum(d * column(k_0, c), 0)
            df_0 = tl.sum(g * gap_0)
            d_operand = rounded(d)
            if WANT_W:
                sum_dw = tl.fma(1.0, product(transposed(operand_0), d_operand, no_dw), sum_dw)
            if CARRIES:
                c = tl.fma(f_0, g, product(d_operand, w_t, zeros))
            if WANT_Q:
                contribute(dq + 0 * stride_dq + rows, dq_0, tl.where(inside, row_mask, False), ATOMIC)
            if WANT_K:
                contribute(dk + 0 * stride_dk + rows, dk_0, tl.where(inside, row_mask, False), ATOMIC)
            if WANT_V:
                contribute(dv + 0 * stride_dv + cols, dv_0, tl.where(inside, col_mask, False), ATOMIC)
            if WANT_F:
                contribute(df + 0 * stride_df, df_0, inside, ATOMIC)
            if WANT_Q:
                dq -= CHUNK * stride_dq
            if WANT_K:
                dk -= CHUNK * stride_dk
            if WANT_V:
                dv -= CHUNK * stride_dv
            if WANT_F:
                df -= CHUNK * stride_df

            h_0 = next_h
            q_0 = next_q_0
            k_0 = next_k_0
            v_0 = next_v_0
            dy_0 = next_dy_0
            x_0 = next_x_0
            q_1 = next_q_1
            k_1 = next_k_1
            v_1 = next_v_1
            dy_1 = next_dy_1
            x_1 = next_x_1
        tl.debug_barrier()

    if WANT_H:
        tl.store(dh0 + (b * N + n) * (K * V) + state_offsets, c, mask=state_mask)
    if WANT_W:
        i = tl.arange(0, V_PAD)
        mask = (i < V)[:, None] & col_mask[None, :]
        tl.store(dw + program.to(tl.int64) * (V * V) + i[:, None] * V + cols[None, :], sum_dw, mask=mask)


@triton.jit
def m2rnn_step_kernel(
    q, k, v, w, x, state, y, stride_q_b, stride_q_n, stride_q_d, stride_k_b, stride_k_n, stride_k_d,
    stride_v_b, stride_v_n, stride_v_d, stride_w_n, stride_w_i, stride_w_j, stride_x_b, stride_x_n,
    stride_h_b, stride_h_n, stride_h_i, stride_h_j,
):  # fmt: skip
    """Advance one head's state by one step in place, FORWARD_ROWS rows at a time."""
    n = tl.program_id(0) % N
    b = (tl.program_id(0) // N).to(tl.int64)
    cols = tl.arange(0, V_PAD)
    col_mask = cols < V

    q += b * stride_q_b + (n // (N // NQ)).to(tl.int64) * stride_q_n
    k += b * stride_k_b + (n // (N // NK)).to(tl.int64) * stride_k_n
    v += b * stride_v_b + (n // (N // NV)).to(tl.int64) * stride_v_n
    x += b * stride_x_b + (n // (N // NF)).to(tl.int64) * stride_x_n
    state += b * stride_h_b + n.to(tl.int64) * stride_h_n
    w = load_weight(w, stride_w_n, stride_w_i, stride_w_j, n // (N // NW))
    v = tl.load(v + cols.to(tl.int64) * stride_v_d, mask=col_mask, other=0.0)
    f, u = gate(tl.load(x).to(tl.float32))
    y_0 = tl.zeros((V_PAD,), tl.float32)
    for first in range(0, FORWARD_PARTS * FORWARD_ROWS, FORWARD_ROWS):
        rows = (first + tl.arange(0, FORWARD_ROWS)).to(tl.int64)
        row_mask = rows < K
        state_rows = rows[:, None]
        address = state + state_rows * stride_h_i + cols.to(tl.int64)[None, :] * stride_h_j
        state_mask = (state_rows < K) & col_mask[None, :]
        q_0 = tl.load(q + rows * stride_q_d, mask=row_mask, other=0.0)
        k_0 = tl.load(k + rows * stride_k_d, mask=row_mask, other=0.0)
        h = tl.load(address, mask=state_mask, other=0.0).to(tl.float32)
        h = advance(h, candidate(h, w, outer(k_0, v, h)), f, u)
        y_0 += tl.sum(column(q_0, h) * h, 0)
        if state.dtype.element_ty == tl.bfloat16:
            h = to_bfloat16(h)
        tl.store(address, h, mask=state_mask)
    tl.store(y + (b * N + n) * V + cols, y_0, mask=col_mask)


@triton.jit
def m2rnn_sum_kernel(rows, out, elements, CONTRIBUTORS: tl.constexpr, DIM: tl.constexpr):
    """Sum the rows that CONTRIBUTORS programs stored for each row of ``out``, always in one order, and round once."""
    i = tl.program_id(0).to(tl.int64) * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    row = rows + (i // DIM) * (CONTRIBUTORS * DIM) + i % DIM
    total = tl.zeros((SUM_BLOCK,), tl.float32)
    for _ in range(CONTRIBUTORS):
        total += tl.load(row, mask=i < elements, other=0.0)
        row += DIM
    tl.store(out + i, total, mask=i < elements)


# How m2gen's launchers, or those of a package, launch these kernels; of results by step: heads, contributors, shape
LAUNCH = {
    "computes_gate": False,
    "interval": 6,
    "checkpoints": "float32",
    "forward_programs": 8,
    "backward_programs": 8,
    "segments": 1,
    "shortest_segment": 0,
    "state": (4, 24, 17),
    "weight": (4, 2, 17, 17),
    "gate": (2, 4),
    "scratch": 1536,
    "y": (4, 2, (17,)),
    "dq": (2, 2, (24,)),
    "dk": (1, 4, (24,)),
    "dv": (4, 2, (17,)),
    "df": (2, 4, ()),
    "forward_adds": False,
    "backward_adds": False,
    "short": 64,
    "aligned": False,
    "sum_block": 256,
    "forward_options": {
        "num_warps": 1,
        "num_stages": 1,
        "enable_fp_fusion": True,
    },
    "backward_options": {
        "num_warps": 1,
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
