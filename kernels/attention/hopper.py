"""Causal attention, forward, for Hopper: warps of different trades (Shah et al., "FlashAttention-3", 2024).

Equations, saved tensors and the order of programs are forward.py's, the backward is backward.py's. What differs is who
does what. A program owns 128 queries of one head, and its warps part:

    producer     one warp of few registers: copies tiles of q, k and v to shared memory by TMA, STAGES blocks ahead
    consumers    two warpgroups of 64 queries and many registers each: wgmma and softmax

They meet at barriers in shared memory. Tile n of k (and of v) lives in slot n mod STAGES of a ring:

    full[slot]   counts the bytes of the tile that lands there      a consumer waits before it multiplies
    empty[slot]  counts two consumers done with the tile            the producer waits before it loads the next one
    turn[c]      the other consumer has issued its products         consumer c waits before it issues its own

A barrier has phases: it completes one, and starts the next, when all that it counts has come. A wait names the parity
of a phase, and that of visit number i to a slot is the parity of i: the ring needs no other state.

Step n of a consumer (algorithm 2 of the paper) keeps the tensor cores busy during its softmax, and by taking turns with
the other consumer during both softmaxes:

    s    = q k_n^T              starts
    acc += p v_(n-1)            starts behind it, with the p of the step before; then it is the other's turn
    wait for s; m, p', l, alpha = softmax of s                  while acc += p v_(n-1) runs
    wait for acc; acc = alpha acc; p = p'

Blocks are taken from the first key to the diagonal, so that those with a mask come last. TMA reads rows past the end of
a tensor as zeros and does not write them; the mask hides their scores. fp32: scores, softmax, m, l, acc, lse.

Supported: bf16 and fp16, D up to 128 in multiples of 8 (padded to 64 or 128), any Tq <= Tk, grouped heads. Not:
dropout, windows, packed documents, fp32. It has been compiled for sm_90 and executed by an emulator of its barriers,
copies and products (tests/gluon_emulator.py), but not yet run on a GPU: kernels.causal_attention does not use it, it is
there for whoever asks by name.
"""

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import _runtime, _tuning, attention
from kernels.attention import tiles
from kernels.attention.tiles import LOG2_E, empty_heads, heads_per_section, readable, tma_strides

OP = "hopper.causal_attention"
MAX_HEAD_DIM = 128
ROWS = gl.constexpr(64)  # queries of a consumer: what one wgmma multiplies
CONSUMERS = gl.constexpr(2)
LN_2 = gl.constexpr(0.6931471805599453)
# A multiprocessor's 65536 registers for 12 warps (a lone one costs four), and how the three warpgroups share them.
REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS = 168, 240, 24  # 3 x 168 = 240 + 240 + 24

# Names that Triton 3.9 changed.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
schedule = gluon.jit(tiles.schedule.fn)


# ---- the ring --------------------------------------------------------------------------------------------------------


@gluon.jit
def allocate_ring(desc, SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Shared memory for SLOTS tiles of `desc`, and their barriers: (tiles, full, empty)."""
    TILE: gl.constexpr = desc.block_type.shape  # (1, 1, rows, D)
    buffers = gl.allocate_shared_memory(desc.dtype, [SLOTS, 1, 1, TILE[2], TILE[3]], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=READERS)
    return buffers, full, empty


@gluon.jit
def place(n, ring):
    """Slot of tile n, and the parity of this visit to it."""
    SLOTS: gl.constexpr = ring[0].shape[0]
    return n % SLOTS, n // SLOTS & 1


@gluon.jit
def load(ring, n, desc, b, h, start):
    """Have rows start... of head (b, h) copied to the ring as tile n, once its slot is free."""
    buffers, full, empty = ring
    slot, parity = place(n, ring)
    mbarrier.wait(empty.index(slot), parity ^ 1)  # of the visit before; the first one passes at once
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma_load(desc, [b, h, start, 0], full.index(slot), buffers.index(slot))


@gluon.jit
def wait_for(ring, n, exists=True):
    _, full, _ = ring
    slot, parity = place(n, ring)
    mbarrier.wait(full.index(slot), parity, pred=exists)


@gluon.jit
def tile(ring, n):
    """Tile n, which has landed, as a matrix (rows, D) in shared memory."""
    buffers, _, _ = ring
    slot, _ = place(n, ring)
    return buffers.index(slot).reshape((buffers.shape[3], buffers.shape[4]))


@gluon.jit
def release(ring, n):
    _, _, empty = ring
    slot, _ = place(n, ring)
    mbarrier.arrive(empty.index(slot), count=1)


# ---- the producer ----------------------------------------------------------------------------------------------------


@gluon.jit
def produce(q_desc, k_desc, v_desc, q_ring, k_ring, v_ring, b, h, h_kv, start_q, num_k, BLOCK_K: gl.constexpr):
    """Load q once, then k and v in the order in which the consumers ask for them: k_0, k_1, v_0, k_2, v_1, ..."""
    for consumer in gl.static_range(CONSUMERS):
        load(q_ring, consumer, q_desc, b, h, start_q + consumer * ROWS)
    load(k_ring, 0, k_desc, b, h_kv, 0)
    for n in range(1, num_k):
        load(k_ring, n, k_desc, b, h_kv, n * BLOCK_K)
        load(v_ring, n - 1, v_desc, b, h_kv, (n - 1) * BLOCK_K)
    load(v_ring, num_k - 1, v_desc, b, h_kv, (num_k - 1) * BLOCK_K)


# ---- a consumer ------------------------------------------------------------------------------------------------------


@gluon.jit
def softmax(s, m, l, offs_q, offs_k, scale_log2, MASKED: gl.constexpr):
    """Running maximum m and denominator l with scores s (ROWS, BLOCK_K); p, and the factor that acc owes to m."""
    if MASKED:
        s = gl.where(offs_k[None, :] <= offs_q[:, None], s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
    m_finite = gl.where(m_new == float("-inf"), 0.0, m_new)  # rows whose scores are all -inf
    p = gl.exp2(s * scale_log2 - m_finite[:, None])
    alpha = gl.exp2(m - m_finite)
    return p, m_new, l * alpha + gl.sum(p, 1), alpha


@gluon.jit
def start_scores(q, k_ring, n, S_LAYOUT: gl.constexpr, BLOCK_K: gl.constexpr):
    """q k_n^T (ROWS, BLOCK_K), on its way."""
    zeros = gl.zeros((ROWS, BLOCK_K), gl.float32, S_LAYOUT)
    return warpgroup_mma(q, tile(k_ring, n).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def start_values(p, acc, v_ring, n, DTYPE: gl.constexpr, O_LAYOUT: gl.constexpr):
    """acc + p v_n (ROWS, D), on its way, and p as the product reads it: rounded, in the registers that it is in."""
    p = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, O_LAYOUT, 2))
    wait_for(v_ring, n)
    return warpgroup_mma(p, tile(v_ring, n), acc, is_async=True), p


@gluon.jit
def step(
    n, num_k, p, m, l, acc, q, k_ring, v_ring, turn, offs_q, offs_k, scale_log2,
    MASKED: gl.constexpr, ME: gl.constexpr, TURNS: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of block n, values of block n - 1. k_n has landed."""
    if TURNS:
        mbarrier.wait(turn.index(ME), (n - 1 & 1) ^ (1 - ME))  # consumer 0 begins
    s = start_scores(q, k_ring, n, S_LAYOUT, BLOCK_K)
    acc, p = start_values(p, acc, v_ring, n - 1, q.dtype, O_LAYOUT)
    if TURNS:
        mbarrier.arrive(turn.index(1 - ME), count=1)

    s = warpgroup_mma_wait(1, deps=(s,))
    release(k_ring, n)
    p_next, m, l, alpha = softmax(s, m, l, offs_q, offs_k + n * BLOCK_K, scale_log2, MASKED)
    wait_for(k_ring, n + 1, n + 1 < num_k)  # here, ptxas does not move the softmax behind the wait for acc

    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    release(v_ring, n - 1)
    return p_next, m, l, acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]


@gluon.jit
def consume(
    out_desc, lse_ptr, q_ring, k_ring, v_ring, turn, b, h, bh, start_q, num_k, Tq, Tk, scale_log2,
    ME: gl.constexpr, TURNS: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Attention of ROWS queries, from the first key to the diagonal of the whole program."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    start_q += ME * ROWS
    rows = start_q + gl.arange(0, ROWS, ROW)
    offs_q = rows + (Tk - Tq)  # the last key that each sees
    offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, S_LAYOUT))
    m = gl.full((ROWS,), float("-inf"), gl.float32, ROW)
    l = gl.zeros((ROWS,), gl.float32, ROW)
    acc = gl.zeros((ROWS, BLOCK_D), gl.float32, O_LAYOUT)

    wait_for(q_ring, ME)
    q = tile(q_ring, ME)
    wait_for(k_ring, 0)
    s = warpgroup_mma_wait(0, deps=(start_scores(q, k_ring, 0, S_LAYOUT, BLOCK_K),))
    release(k_ring, 0)
    p, m, l, _ = softmax(s, m, l, offs_q, offs_k, scale_log2, True)
    wait_for(k_ring, 1, num_k > 1)

    whole = gl.minimum(gl.maximum((start_q + (Tk - Tq) + 1) // BLOCK_K, 1), num_k)  # blocks that no row sees in part
    for n in range(1, whole):
        p, m, l, acc = step(
            n, num_k, p, m, l, acc, q, k_ring, v_ring, turn, offs_q, offs_k, scale_log2,
            False, ME, TURNS, S_LAYOUT, O_LAYOUT, BLOCK_K,
        )  # fmt: skip
    for n in range(whole, num_k):
        p, m, l, acc = step(
            n, num_k, p, m, l, acc, q, k_ring, v_ring, turn, offs_q, offs_k, scale_log2,
            True, ME, TURNS, S_LAYOUT, O_LAYOUT, BLOCK_K,
        )  # fmt: skip
    acc, p = start_values(p, acc, v_ring, num_k - 1, q.dtype, O_LAYOUT)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))

    norm = gl.convert_layout(1.0 / gl.where(l == 0.0, 1.0, l), gl.SliceLayout(1, O_LAYOUT))
    q.store((acc * norm[:, None]).to(q.dtype))  # q's tile is free: out leaves through it
    fence_async_shared()
    tma_store(out_desc, [b, h, start_q, 0], q_ring[0].index(ME))
    gl.store(lse_ptr + gl.cast(bh, gl.int64) * Tq + rows, (m + gl.log2(l)) * LN_2, mask=rows < Tq)
    tma.store_wait(0)


# ---- the kernel ------------------------------------------------------------------------------------------------------


@gluon.jit
def hopper_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr,
    H, GROUP, Tq, Tk, num_heads, num_blocks, heads_per_section, scale_log2,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    block, bh = schedule(num_blocks, num_heads, heads_per_section)
    b, h = bh // H, bh % H
    h_kv = h // GROUP
    start_q = (num_blocks - 1 - block) * BLOCK_Q
    num_k = gl.cdiv(gl.minimum(start_q + BLOCK_Q, Tq) + (Tk - Tq), BLOCK_K)

    q_ring = allocate_ring(q_desc, CONSUMERS, 1)
    k_ring = allocate_ring(k_desc, STAGES, CONSUMERS)
    v_ring = allocate_ring(v_desc, STAGES, CONSUMERS)
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(consumer), count=1)
    fence_async_shared()  # TMA must find the barriers initialized

    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (consume, (out_desc, lse_ptr, q_ring, k_ring, v_ring, turn, b, h, bh, start_q, num_k, Tq, Tk, scale_log2,
                       FIRST, TURNS, BLOCK_K, BLOCK_D)),
            (consume, (out_desc, lse_ptr, q_ring, k_ring, v_ring, turn, b, h, bh, start_q, num_k, Tq, Tk, scale_log2,
                       SECOND, TURNS, BLOCK_K, BLOCK_D)),
            (produce, (q_desc, k_desc, v_desc, q_ring, k_ring, v_ring, b, h, h_kv, start_q, num_k, BLOCK_K)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# ---- on the host -----------------------------------------------------------------------------------------------------

GL_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def padded_head_dim(head_dim):
    """64 or 128: rows of a tile are whole 128-byte lines, as TMA and wgmma swizzle them."""
    return 64 if head_dim <= 64 else 128


def descriptor(x, rows):
    """Tensor map of x (B, H, T, D) for tiles of `rows` positions of one head."""
    shape = [1, 1, rows, padded_head_dim(x.shape[-1])]
    layout = gl.NVMMASharedLayout.get_default_for(shape, GL_DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), tma_strides(x), shape, layout)


def tma_readable(x):
    """x itself if TMA can read it, else a contiguous copy."""
    x = readable(x)
    return x if tma_strides(x) is not None else x.clone(memory_format=torch.contiguous_format)


def hopper_forward(q, k, v, scale):
    """Launch the forward: out (B, H, Tq, D) stored as (B, Tq, H, D), and lse (B, H, Tq) fp32."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    out = empty_heads(B, H, Tq, D, like=q)
    lse = q.new_empty((B, H, Tq), dtype=torch.float32)
    if B == 0:
        return out, lse
    q, k, v = tma_readable(q), tma_readable(k), tma_readable(v)
    block_k, stages, turns = _tuning.HOPPER[padded_head_dim(D)]
    block_q = ROWS.value * CONSUMERS.value
    num_blocks = triton.cdiv(Tq, block_q)
    _runtime.launch(
        hopper_forward_kernel, (num_blocks * B * H,),
        descriptor(q, ROWS.value), descriptor(k, block_k), descriptor(v, block_k),
        descriptor(out, ROWS.value), lse,
        H, H // Hkv, Tq, Tk, B * H, num_blocks, heads_per_section(B * H, k, H // Hkv), scale * LOG2_E,
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_D=padded_head_dim(D), STAGES=stages, TURNS=turns,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return out, lse


# ---- registration ----------------------------------------------------------------------------------------------------


def _check_machine(device):
    if (arch := _runtime.arch(device)) != "sm_90":
        here = "Triton's interpreter" if arch == "interpret" else arch
        raise ValueError(f"{OP}: an H100 or H200 (sm_90) is needed, not {here}; use kernels.causal_attention")


def _run(q, k, v, scale):
    _check_machine(q.device)
    return hopper_forward(q, k, v, scale)


def _fake(q, k, v, scale):
    B, H, Tq, D = q.shape
    return empty_heads(B, H, Tq, D, like=q), q.new_empty((B, H, Tq), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, None
    dout = torch.zeros_like(out) if dout is None else dout
    grads = attention.backward_op(dout, dlse, q, k, v, out, lse, ctx.scale, 0.0, None, 0, None)
    return *grads, None


_hopper_attention = _runtime.register_op(
    "hopper_attention",
    "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _backward,
)


# ---- the public function ---------------------------------------------------------------------------------------------


def causal_attention(
    q, k, v, *, scale=None, dropout_p=0.0, window=None, cu_seqlens=None, deterministic=True, return_lse=False
):
    """kernels.causal_attention with this file's forward: softmax(scale * q k^T + causal mask) v.

    Not yet run on a GPU: its machine code has been examined and its protocol emulated, see the top of this file.

    Args:
        q: (B, H, Tq, D), float16 or bfloat16, D a multiple of 8 up to 128. TMA reads q, k and v in place if their last
            stride is 1 and the others are multiples of 16 bytes; others are copied first.
        k, v: (B, Hkv, Tk, D) in q's dtype with Tk >= Tq and H a multiple of Hkv.
        scale: factor of the scores, positive; 1 / sqrt(D) by default.
        dropout_p, window, cu_seqlens: must be 0, None (or hide nothing) and None.
        deterministic: the backward always is.
        return_lse: return the log-sum-exp of the scaled scores too. Gradients flow through it.

    Returns:
        out (B, H, Tq, D) in q's dtype, stored as (B, Tq, H, D); with return_lse, (out, lse), lse (B, H, Tq) float32.

    Raises:
        ValueError: an argument outside of the above (named, with its value), or a GPU other than a Hopper.
        NotImplementedError: second derivatives, vmap.

    Source: Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", 2024.
    """
    attention.check(q, k, v, scale, dropout_p, window, cu_seqlens)
    if not torch.compiler.is_compiling():
        _check_machine(q.device)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if (dtype := _runtime.autocast_dtype(q)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _refuse(q, k, dropout_p, window, cu_seqlens)
    out, lse = _hopper_attention(q, k, v, scale)
    return (out, lse) if return_lse else out


def _refuse(q, k, dropout_p, window, cu_seqlens):
    """ValueError for what kernels.causal_attention can do and this kernel cannot."""
    refused = {
        f"dtype {q.dtype}": q.dtype not in GL_DTYPES,
        f"head dimension {q.shape[-1]}": q.shape[-1] > MAX_HEAD_DIM or q.shape[-1] % 8 != 0,
        f"dropout_p = {dropout_p}": dropout_p > 0.0,
        f"window = {window}": window is not None and window < k.shape[2],
        "cu_seqlens": cu_seqlens is not None,
    }
    for what, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"{OP}: {what} is not supported by this kernel; use kernels.causal_attention")
