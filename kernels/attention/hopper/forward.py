"""Causal attention, forward, for Hopper: warps of different trades (Shah et al., "FlashAttention-3", 2024).

Equations, saved tensors and the order of programs are ../forward.py's. What differs is who does what. A program owns
128 queries of one head, and its warps part (ring.py): the producer loads tiles of q, k and v, STAGES blocks ahead; each
consumer has 64 queries. Beside the rings there is one more kind of barrier:

    turn[c]      the other consumer has issued its products         consumer c waits before it issues its own

Step n of a consumer (algorithm 2 of the paper) keeps the tensor cores busy during its softmax, and by taking turns with
the other consumer during both softmaxes:

    s    = q k_n^T              starts
    acc += p v_(n-1)            starts behind it, with the p of the step before; then it is the other's turn
    wait for s; m, p', l, alpha = softmax of s                  while acc += p v_(n-1) runs
    wait for acc; acc = alpha acc; p = p'

Blocks are taken from the first key to the diagonal, so that those with a mask come last. TMA reads rows past the end of
a tensor as zeros and does not write them; the mask hides their scores. fp32: scores, softmax, m, l, acc, lse.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels import _runtime, _tuning
from kernels._runtime import cdiv
from kernels.attention.hopper.ring import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER_REGISTERS,
    REGISTERS,
    ROWS,
    SIZES,
    allocate_barriers,
    allocate_ring,
    descriptor,
    load,
    padded_head_dim,
    place,
    release,
    schedule,
    start_product,
    tile,
    tma_readable,
    tma_store,
    wait_for,
)
from kernels.attention.tiles import LOG2_E, empty_heads, heads_per_section

LN_2 = gl.constexpr(0.6931471805599453)


# ---- which tile is when ----------------------------------------------------------------------------------------------


@gluon.jit
def number_of_tiles(num_blocks, num_heads):
    """How many of all tiles this program takes: every num_programs-th."""
    return gl.cdiv(num_blocks * num_heads - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def tile_at(
    i, Tq, Tk, num_heads, num_blocks, heads_per_section, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr
):  # fmt: skip
    """Batch-and-head, first query and blocks of keys of this program's tile i; those with most keys come first."""
    t = gl.program_id(0) + i * gl.num_programs(0)
    block, bh = schedule(t, num_blocks, num_heads, heads_per_section)
    start_q = (num_blocks - 1 - block) * BLOCK_Q
    num_k = gl.cdiv(gl.minimum(start_q + BLOCK_Q, Tq) + (Tk - Tq), BLOCK_K)
    return bh, start_q, num_k


# ---- the producer ----------------------------------------------------------------------------------------------------


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_ring, k_ring, v_ring, H, GROUP, Tq, Tk, num_heads, num_blocks, heads_per_section,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """For each tile load q, then k and v in the order in which the consumers ask for them: k_0, k_1, v_0, k_2, v_1...
    q has room for two tiles: the next one's is loaded, and its first k and v, while the consumers end this one."""
    n = 0  # blocks of keys loaded so far
    for i in range(number_of_tiles(num_blocks, num_heads)):
        bh, start_q, num_k = tile_at(i, Tq, Tk, num_heads, num_blocks, heads_per_section, BLOCK_Q, BLOCK_K)
        b, h = bh // H, bh % H
        h_kv = h // GROUP
        for consumer in gl.static_range(CONSUMERS):
            load(q_ring, i * CONSUMERS + consumer, q_desc, b, h, start_q + consumer * ROWS)
        load(k_ring, n, k_desc, b, h_kv, 0)
        for block in range(1, num_k):
            load(k_ring, n + block, k_desc, b, h_kv, block * BLOCK_K)
            load(v_ring, n + block - 1, v_desc, b, h_kv, (block - 1) * BLOCK_K)
        load(v_ring, n + num_k - 1, v_desc, b, h_kv, (num_k - 1) * BLOCK_K)
        n += num_k


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
def start_values(p, acc, v_ring, n, DTYPE: gl.constexpr, O_LAYOUT: gl.constexpr):
    """acc + p v_n (ROWS, D), on its way, and p as the product reads it: rounded, in the registers that it is in."""
    p = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, O_LAYOUT, 2))
    wait_for(v_ring, n)
    return warpgroup_mma(p, tile(v_ring, n), acc, is_async=True), p


@gluon.jit
def step(
    block, num_k, n, p, m, l, acc, q, k_ring, v_ring, turn, offs_q, offs_k, scale_log2,
    MASKED: gl.constexpr, ME: gl.constexpr, TURNS: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of a block, values of the one before. n + block is its place in the ring; its k has landed."""
    if TURNS:
        mbarrier.wait(turn.index(ME), (n + block & 1) ^ (1 - ME))
    s = start_product(q, tile(k_ring, n + block).permute((1, 0)), BLOCK_K, S_LAYOUT)
    acc, p = start_values(p, acc, v_ring, n + block - 1, q.dtype, O_LAYOUT)
    if TURNS:
        mbarrier.arrive(turn.index(1 - ME), count=1)

    s = warpgroup_mma_wait(1, deps=(s,))
    release(k_ring, n + block)
    p_next, m, l, alpha = softmax(s, m, l, offs_q, offs_k + block * BLOCK_K, scale_log2, MASKED)
    # Here, ptxas does not move the softmax behind the wait for acc.
    wait_for(k_ring, n + block + 1, block + 1 < num_k)

    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    release(v_ring, n + block - 1)
    return p_next, m, l, acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]


@gluon.jit
def attend(
    n, i, start_q, num_k, q_ring, k_ring, v_ring, turn, Tq, Tk, scale_log2,
    ME: gl.constexpr, TURNS: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """acc, l and m of ROWS queries, from the first key to the diagonal of the whole tile."""
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    offs_q = start_q + (Tk - Tq) + gl.arange(0, ROWS, ROW)  # the last key that each sees
    offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, S_LAYOUT))
    m = gl.full((ROWS,), float("-inf"), gl.float32, ROW)
    l = gl.zeros((ROWS,), gl.float32, ROW)
    acc = gl.zeros((ROWS, BLOCK_D), gl.float32, O_LAYOUT)

    wait_for(q_ring, i * CONSUMERS + ME)
    q = tile(q_ring, i * CONSUMERS + ME)
    wait_for(k_ring, n)
    if TURNS:
        mbarrier.wait(turn.index(ME), (n & 1) ^ (1 - ME))  # consumer 0 begins
    s = start_product(q, tile(k_ring, n).permute((1, 0)), BLOCK_K, S_LAYOUT)
    if TURNS:
        mbarrier.arrive(turn.index(1 - ME), count=1)
    tma.store_wait(0)  # the out before has left through its q's tile
    release(q_ring, (i - 1) * CONSUMERS + ME, i > 0)
    s = warpgroup_mma_wait(0, deps=(s,))
    release(k_ring, n)
    p, m, l, _ = softmax(s, m, l, offs_q, offs_k, scale_log2, True)
    wait_for(k_ring, n + 1, num_k > 1)

    whole = gl.minimum(gl.maximum((start_q + (Tk - Tq) + 1) // BLOCK_K, 1), num_k)  # blocks that no row sees in part
    for block in range(1, whole):
        p, m, l, acc = step(
            block, num_k, n, p, m, l, acc, q, k_ring, v_ring, turn, offs_q, offs_k, scale_log2,
            False, ME, TURNS, S_LAYOUT, O_LAYOUT, BLOCK_K,
        )  # fmt: skip
    for block in range(whole, num_k):
        p, m, l, acc = step(
            block, num_k, n, p, m, l, acc, q, k_ring, v_ring, turn, offs_q, offs_k, scale_log2,
            True, ME, TURNS, S_LAYOUT, O_LAYOUT, BLOCK_K,
        )  # fmt: skip
    acc, p = start_values(p, acc, v_ring, n + num_k - 1, q.dtype, O_LAYOUT)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    release(v_ring, n + num_k - 1)
    return acc, l, m


@gluon.jit
def consume(
    out_desc, lse_ptr, q_ring, k_ring, v_ring, turn,
    H, Tq, Tk, num_heads, num_blocks, heads_per_section, scale_log2,
    ME: gl.constexpr, TURNS: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """out and lse of ROWS queries of each tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    n = 0  # blocks of keys done so far
    for i in range(number_of_tiles(num_blocks, num_heads)):
        bh, start_q, num_k = tile_at(i, Tq, Tk, num_heads, num_blocks, heads_per_section, BLOCK_Q, BLOCK_K)
        start_q += ME * ROWS
        acc, l, m = attend(
            n, i, start_q, num_k, q_ring, k_ring, v_ring, turn, Tq, Tk, scale_log2,
            ME, TURNS, BLOCK_K, BLOCK_D, S_LAYOUT, O_LAYOUT,
        )  # fmt: skip
        norm = gl.convert_layout(1.0 / gl.where(l == 0.0, 1.0, l), gl.SliceLayout(1, O_LAYOUT))
        q = tile(q_ring, i * CONSUMERS + ME)
        q.store((acc * norm[:, None]).to(q.dtype))  # q's tile is free: out leaves through it
        fence_async_shared()
        slot, _ = place(i * CONSUMERS + ME, q_ring)
        tma_store(out_desc, [bh // H, bh % H, start_q, 0], q_ring[0].index(slot))
        rows = start_q + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        lse_head = lse_ptr + gl.cast(bh, gl.int64) * Tq
        gl.store(lse_head + rows, (m + gl.log2(l)) * LN_2, mask=rows < Tq)
        n += num_k
    tma.store_wait(0)


# ---- the kernel ------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=SIZES)
def hopper_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr,
    H, GROUP, Tq, Tk, num_heads, num_blocks, heads_per_section, scale_log2,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    q_ring = allocate_ring(q_desc, 2 * CONSUMERS, 1)
    k_ring = allocate_ring(k_desc, STAGES, CONSUMERS)
    v_ring = allocate_ring(v_desc, STAGES, CONSUMERS)
    turn = allocate_barriers(CONSUMERS, 1)
    fence_async_shared()  # TMA must find the barriers initialized

    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (consume, (out_desc, lse_ptr, q_ring, k_ring, v_ring, turn, H, Tq, Tk, num_heads, num_blocks,
                       heads_per_section, scale_log2, FIRST, TURNS, BLOCK_Q, BLOCK_K, BLOCK_D)),
            (consume, (out_desc, lse_ptr, q_ring, k_ring, v_ring, turn, H, Tq, Tk, num_heads, num_blocks,
                       heads_per_section, scale_log2, SECOND, TURNS, BLOCK_Q, BLOCK_K, BLOCK_D)),
            (produce, (q_desc, k_desc, v_desc, q_ring, k_ring, v_ring, H, GROUP, Tq, Tk, num_heads, num_blocks,
                       heads_per_section, BLOCK_Q, BLOCK_K)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# ---- on the host -----------------------------------------------------------------------------------------------------


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
    num_blocks = cdiv(Tq, block_q)
    _runtime.launch(
        hopper_forward_kernel, (min(num_blocks * B * H, _runtime.multiprocessors(q.device)),),
        descriptor(q, ROWS.value), descriptor(k, block_k), descriptor(v, block_k),
        descriptor(out, ROWS.value), lse,
        H, H // Hkv, Tq, Tk, B * H, num_blocks, heads_per_section(B * H, k, H // Hkv), scale * LOG2_E,
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_D=padded_head_dim(D), STAGES=stages, TURNS=turns,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return out, lse
