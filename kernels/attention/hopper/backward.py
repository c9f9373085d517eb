"""Causal attention, backward, for Hopper in one pass: dq, dk and dv with five products instead of seven.

Equations and names are ../backward.py's. There, dK/dV and dQ are two kernels that both compute scores and dp. Here a
program owns 128 keys of one head, walks over the queries that see them, and adds what those keys give to dq in global
memory: fp32 additions in the order in which programs come by, so that dq may differ in its last bits from run to run.

Its warps part (ring.py). The producer loads k and v once and tiles of q, dout and stats ahead; each of the two
consumers has 64 keys. A tile has BLOCK_Q queries, HALVES times 64: 128 of them at D = 64, 64 at D = 128. For 64 queries
a consumer does, everything of size (keys, queries):

    s  = k q^T    starts          dp = v dout^T    starts behind it
    wait for s;  p = exp2(s - lse)                                   while dp runs
    dv += p dout                  starts
    wait for dp; ds = p (dp - delta), to shared memory               while dv runs

and once a tile, when the barrier `ready` says that both consumers have written their ds:

    dq = ds^T k, dk += ds q       start
    wait for dq; it goes to shared memory, and from there TMA adds it to dq_sum             while dk runs

At D = 64 registers are left for more: dq and dk of a tile start behind s and dp of the next, and run during its
softmax. dq sums over the keys of both consumers, 64 x 64 elements for each of them to compute: half of the tile's
queries (D = 64) or half of its columns (D = 128). ds has two buffers, so that `ready` also tells that the one before
the last is free again.

stats[b, h, t, :] holds lse to base 2 of queries 64 t ... 64 t + 63 and then their delta, both 0 past the end, where q
and dout are read as 0: p is 1 there, and dp, ds and all that they give are 0. dq_sum[b, h] is a row of tiles of 64
queries by 64 columns, each in an order in which neighbouring threads write neighbouring words (by_thread), so that no
two of them ask for one bank of shared memory. Three kernels in this order: prepare (stats, and dq_sum = 0), backward,
and finish (dq from dq_sum, in its dtype).
"""

import torch
import triton
import triton.language as tl
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
from kernels.attention.backward import load_delta
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
    release,
    schedule,
    start_product,
    tile,
    tma_add,
    tma_readable,
    tma_store,
    wait_for,
)
from kernels.attention.tiles import LOG2_E, empty_heads, head_of, heads_per_section, store_tile, strides

LOG2E = tl.constexpr(LOG2_E)
BLOCK_K = ROWS.value * CONSUMERS.value  # keys of a program


# ---- before and after ------------------------------------------------------------------------------------------------


@triton.jit
def prepare_kernel(
    out_src, dout_src, lse_ptr, dlse_ptr, stats_ptr, sum_ptr,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, H, Tq, num_blocks,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """stats of ROWS queries, and zeros for their dq_sum."""
    pid = tl.program_id(0)
    start_q, bh = pid % num_blocks * ROWS, pid // num_blocks
    delta = load_delta(
        out_src, dout_src, dlse_ptr, bh // H, bh % H, bh, start_q,
        stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, Tq, HEAD_DIM, ROWS, BLOCK_D, HAS_DLSE,
    )  # fmt: skip
    rows = tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + bh.to(tl.int64) * Tq + start_q + rows, mask=start_q + rows < Tq, other=0.0)
    stats_ptr += pid.to(tl.int64) * (2 * ROWS)
    tl.store(stats_ptr + rows, lse * LOG2E)
    tl.store(stats_ptr + ROWS + rows, delta)
    tl.store(sum_ptr + pid.to(tl.int64) * (ROWS * BLOCK_D) + tl.arange(0, ROWS * BLOCK_D), 0.0)


@triton.jit
def finish_kernel(
    sum_ptr, dq_ptr, stride_b, stride_h, stride_t, H, Tq, num_blocks, scale,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dq of ROWS queries: scale * dq_sum."""
    pid = tl.program_id(0)
    block, bh = pid % num_blocks, pid // num_blocks
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    # where by_thread has put it: its thread's warp, place in the warp, and number of the register
    offs = column // 64 * 4096 + column % 64 // 8 * 512 + row // 8 % 2 * 256 + row // 16 * 64 + row % 8 * 8 + column % 8
    tile = tl.load(sum_ptr + pid.to(tl.int64) * (ROWS * BLOCK_D) + offs) * scale
    dq_ptr = head_of(dq_ptr, bh // H, bh % H, stride_b, stride_h, False)
    store_tile(dq_ptr, tile, 0, 0, block * ROWS, stride_t, Tq, HEAD_DIM, ROWS, BLOCK_D, DTYPE, False)


# ---- the producer ----------------------------------------------------------------------------------------------------


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, dout_desc, stats_desc, q_ring, k_ring, v_ring, dout_ring, stats_ring,
    b, h_kv, start_k, first_q, num_q, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """Load k and v once, then tiles of stats, dout and q in the order in which the consumers free them."""
    for consumer in gl.static_range(CONSUMERS):
        load(k_ring, consumer, k_desc, b, h_kv, start_k + consumer * ROWS)
        load(v_ring, consumer, v_desc, b, h_kv, start_k + consumer * ROWS)
    for g in range(GROUP):
        h = h_kv * GROUP + g
        for i in range(num_q):
            n, start_q = g * num_q + i, first_q + i * BLOCK_Q
            load(stats_ring, n, stats_desc, b, h, start_q // ROWS)
            load(dout_ring, n, dout_desc, b, h, start_q)
            load(q_ring, n, q_desc, b, h, start_q)


# ---- a consumer ------------------------------------------------------------------------------------------------------


@gluon.jit
def half_tile(ring, n, HALF: gl.constexpr):
    """64 rows of tile n, its first or its second."""
    return tile(ring, n).slice(HALF * ROWS, ROWS, 0)


@gluon.jit
def statistic(stats_ring, n, HALF: gl.constexpr, WHICH: gl.constexpr, LAYOUT: gl.constexpr):
    """lse (0) or delta (1) of 64 queries of tile n, (1, 64)."""
    return tile(stats_ring, n).slice(HALF, 1, 0).slice(WHICH * ROWS, ROWS, 1).load(LAYOUT)


@gluon.jit
def probabilities(s, lse, start_q, whole, offs_q, offs_k, scale_log2, BRANCH: gl.constexpr):
    """p (keys, queries) of 64 queries from start_q on. Keys that they do not see have 0; from query `whole` on they see
    all. With BRANCH others do not ask, at the price of a few registers."""
    p = gl.exp2(s * scale_log2 - lse)
    if BRANCH:
        if start_q < whole:
            p = gl.where(offs_k[:, None] <= offs_q[None, :] + start_q, p, 0.0)
    else:
        p = gl.where(offs_k[:, None] <= offs_q[None, :] + start_q, p, 0.0)
    return p


@gluon.jit
def start_scores(n, k, q_ring, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """k q^T of 64 queries of tile n, on its way."""
    return start_product(k, half_tile(q_ring, n, HALF).permute((1, 0)), ROWS, LAYOUT)


@gluon.jit
def start_dp(n, v, dout_ring, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """v dout^T of 64 queries of tile n, on its way."""
    return start_product(v, half_tile(dout_ring, n, HALF).permute((1, 0)), ROWS, LAYOUT)


@gluon.jit
def start_gradients(
    n, dk, q_ring, k_ring, ds_buffers, ME: gl.constexpr, HALVES: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """This consumer's 64 x 64 elements of dq = ds^T k of tile n, summed over the keys of both consumers, and dk + ds q
    of its own keys, on their way: 2 + HALVES products."""
    ds, k = ds_of(ds_buffers, n, ME % HALVES, 0, HALVES), tile(k_ring, 0)
    dq = start_product(ds.permute((1, 0)), dq_columns(k, ME, HALVES), ROWS, LAYOUT)
    ds, k = ds_of(ds_buffers, n, ME % HALVES, 1, HALVES), tile(k_ring, 1)
    dq = warpgroup_mma(ds.permute((1, 0)), dq_columns(k, ME, HALVES), dq, is_async=True)
    for HALF in gl.static_range(HALVES):
        ds = ds_of(ds_buffers, n, HALF, ME, HALVES)
        dk = warpgroup_mma(ds, half_tile(q_ring, n, HALF), dk, is_async=True)
    return dq, dk


@gluon.jit
def by_thread(dq):
    """dq (64, 64) as (16, 256): of the registers of the warpgroup's 128 threads, two of each to a row.

    Thread (warp, r, c) of (4, 8, 4) holds rows 16 warp + 8 i + r and columns 8 j + 2 c and 2 c + 1, i < 2, j < 8.
    """
    warp_i_r_j_c_2 = dq.reshape((4, 2, 8, 8, 4, 2))
    return warp_i_r_j_c_2.permute((3, 1, 0, 2, 4, 5)).reshape((16, 256))


@gluon.jit
def finish_gradients(
    n, dq, dk, q_ring, dq_buffer, dq_desc, b, h, start_q, ME: gl.constexpr, HALVES: gl.constexpr, BEHIND: gl.constexpr
):  # fmt: skip
    """Have dq of tile n, the queries from start_q on of head h, added to dq_sum through a buffer of this consumer's,
    and wait for dk. BEHIND: products on their way that were started after these."""
    dq = warpgroup_mma_wait(HALVES + BEHIND, deps=(dq,))
    tma.store_wait(0)  # what left through the buffer before has been read
    dq_buffer.reshape((16, 256)).store(by_thread(dq))
    fence_async_shared()
    place_of_tile = start_q // ROWS * (2 // HALVES) + ME  # the next 64 queries, or the same ones' next 64 columns
    tma_add(dq_desc, [b, h, place_of_tile * 16, 0], dq_buffer)
    dk = warpgroup_mma_wait(BEHIND, deps=(dk,))
    release(q_ring, n)
    return dk


@gluon.jit
def ds_of(ds_buffers, n, HALF: gl.constexpr, OWNER: gl.constexpr, HALVES: gl.constexpr):
    """Where ds (64 keys of a consumer, 64 queries) of tile n lies."""
    return ds_buffers.index((n % 2 * HALVES + HALF) * CONSUMERS + OWNER)


@gluon.jit
def dq_columns(k, ME: gl.constexpr, HALVES: gl.constexpr):
    """The 64 columns of k for which this consumer computes dq: all there are, if consumers share its rows."""
    return k.slice(0 if HALVES == 2 else ME * ROWS, ROWS, 1)


@gluon.jit
def attend(
    n, s, dp, dv, dout_ring, stats_ring, ds_buffers, start_q, whole, offs_q, offs_k, scale_log2,
    HALF: gl.constexpr, BEHIND: gl.constexpr, ME: gl.constexpr, HALVES: gl.constexpr, BRANCH: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """dv with what 64 queries of tile n give to it, on its way, and p as that product reads it; their ds goes to shared
    memory. s and dp are on their way too, with BEHIND products started after them."""
    DTYPE: gl.constexpr = dout_ring[0].dtype
    start_q += HALF * ROWS
    s = warpgroup_mma_wait(1 + BEHIND, deps=(s,))
    lse = statistic(stats_ring, n, HALF, 0, S_LAYOUT)
    p = probabilities(s, lse, start_q, whole, offs_q, offs_k, scale_log2, BRANCH)
    p_rounded = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, O_LAYOUT, 2))
    dv = warpgroup_mma(p_rounded, half_tile(dout_ring, n, HALF), dv, is_async=True)
    dp, p = warpgroup_mma_wait(1 + BEHIND, deps=(dp, p))
    ds = p * (dp - statistic(stats_ring, n, HALF, 1, S_LAYOUT))
    ds_of(ds_buffers, n, HALF, ME, HALVES).store(ds.to(DTYPE))
    return dv, p_rounded


@gluon.jit
def step(
    n, dk, dv, k, v, q_ring, k_ring, dout_ring, stats_ring, ds_buffers, dq_buffer, ready, dq_desc,
    b, h, start_q, h_before, start_before, whole, offs_q, offs_k, scale_log2,
    BEFORE: gl.constexpr, ME: gl.constexpr, HALVES: gl.constexpr, BRANCH: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """What tile n, the queries from start_q on of head h, gives to dv, and its ds. With one half also its dq and dk;
    with two, whose tiles are small, registers let dq and dk of the tile BEFORE run during this one's softmax."""
    wait_for(q_ring, n)
    s = start_scores(n, k, q_ring, 0, S_LAYOUT)
    wait_for(dout_ring, n)
    dp = start_dp(n, v, dout_ring, 0, S_LAYOUT)
    if BEFORE:
        dq, dk = start_gradients(n - 1, dk, q_ring, k_ring, ds_buffers, ME, HALVES, S_LAYOUT)
    wait_for(stats_ring, n)
    dv, p = attend(
        n, s, dp, dv, dout_ring, stats_ring, ds_buffers, start_q, whole, offs_q, offs_k, scale_log2,
        0, 4 if BEFORE else 0, ME, HALVES, BRANCH, S_LAYOUT, O_LAYOUT,
    )  # fmt: skip
    if HALVES == 2:
        s = start_scores(n, k, q_ring, 1, S_LAYOUT)
        dp = start_dp(n, v, dout_ring, 1, S_LAYOUT)
        if BEFORE:
            dk = finish_gradients(n - 1, dq, dk, q_ring, dq_buffer, dq_desc, b, h_before, start_before, ME, HALVES, 3)
        s, p = warpgroup_mma_wait(1, deps=(s, p))  # dv of the first half is done, and has read its p
        dv, p = attend(
            n, s, dp, dv, dout_ring, stats_ring, ds_buffers, start_q, whole, offs_q, offs_k, scale_log2,
            1, 0, ME, HALVES, BRANCH, S_LAYOUT, O_LAYOUT,
        )  # fmt: skip
    release(stats_ring, n)
    fence_async_shared()  # the tensor cores must find ds written
    mbarrier.arrive(ready.index(0), count=1)
    mbarrier.wait(ready.index(0), n & 1)

    if HALVES == 2:
        dv, p = warpgroup_mma_wait(0, deps=(dv, p))  # with one in flight from step to step, ptxas serializes them all
        release(dout_ring, n)
    else:
        dq, dk = start_gradients(n, dk, q_ring, k_ring, ds_buffers, ME, HALVES, S_LAYOUT)
        dv, p = warpgroup_mma_wait(3, deps=(dv, p))
        release(dout_ring, n)
        dk = finish_gradients(n, dq, dk, q_ring, dq_buffer, dq_desc, b, h, start_q, ME, HALVES, 0)
    return dk, dv


@gluon.jit
def consume(
    dk_desc, dv_desc, dq_desc, q_ring, k_ring, v_ring, dout_ring, stats_ring, ds_buffers, dq_buffers, ready,
    b, h_kv, start_k, first_q, num_q, Tq, Tk, scale, scale_log2,
    ME: gl.constexpr, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_D: gl.constexpr, BRANCH: gl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS keys, and their part of dq."""
    HALVES: gl.constexpr = BLOCK_Q // ROWS
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])  # of dq too
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    offs_q = gl.arange(0, ROWS, gl.SliceLayout(0, S_LAYOUT)) + (Tk - Tq)  # the last key that each sees, from 0 on
    offs_k = start_k + ME * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    whole = start_k + CONSUMERS * ROWS - 1 - (Tk - Tq)
    dk = gl.zeros((ROWS, BLOCK_D), gl.float32, O_LAYOUT)
    dv = gl.zeros((ROWS, BLOCK_D), gl.float32, O_LAYOUT)
    for consumer in gl.static_range(CONSUMERS):
        wait_for(k_ring, consumer)
    wait_for(v_ring, ME)
    k, v = tile(k_ring, ME), tile(v_ring, ME)
    v_operand = v.load(gl.DotOperandLayout(0, S_LAYOUT, 2)) if HALVES == 2 else v  # spares shared memory its reads
    dq_buffer = dq_buffers.index(ME)

    h, start_q, first_n, last_n = h_kv * GROUP, first_q - BLOCK_Q, 0, num_q * GROUP - 1
    if HALVES == 2:
        first_n, start_q = 1, first_q
        dk, dv = step(
            0, dk, dv, k, v_operand, q_ring, k_ring, dout_ring, stats_ring, ds_buffers, dq_buffer, ready, dq_desc,
            b, h, start_q, h, start_q, whole, offs_q, offs_k, scale_log2,
            False, ME, HALVES, BRANCH, S_LAYOUT, O_LAYOUT,
        )  # fmt: skip
    for n in range(first_n, last_n + 1):
        h_before, start_before = h, start_q
        start_q += BLOCK_Q
        if GROUP > 1:
            h = gl.where(start_q < Tq, h, h + 1)
            start_q = gl.where(start_q < Tq, start_q, first_q)
        dk, dv = step(
            n, dk, dv, k, v_operand, q_ring, k_ring, dout_ring, stats_ring, ds_buffers, dq_buffer, ready, dq_desc,
            b, h, start_q, h_before, start_before, whole, offs_q, offs_k, scale_log2,
            HALVES == 2, ME, HALVES, BRANCH, S_LAYOUT, O_LAYOUT,
        )  # fmt: skip
    if HALVES == 2:
        dq, dk = start_gradients(last_n, dk, q_ring, k_ring, ds_buffers, ME, HALVES, S_LAYOUT)
        dk = finish_gradients(last_n, dq, dk, q_ring, dq_buffer, dq_desc, b, h, start_q, ME, HALVES, 0)

    v.store(dv.to(v.dtype))  # v's tile is free, and k's once the other consumer has made its last dq: they leave there
    fence_async_shared()
    mbarrier.arrive(ready.index(0), count=1)
    mbarrier.wait(ready.index(0), num_q * GROUP & 1)
    tma_store(dv_desc, [b, h_kv, start_k + ME * ROWS, 0], v_ring[0].index(ME))
    k.store((dk * scale).to(k.dtype))
    fence_async_shared()
    tma_store(dk_desc, [b, h_kv, start_k + ME * ROWS, 0], k_ring[0].index(ME))
    tma.store_wait(0)


# ---- the kernel ------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=SIZES)
def hopper_backward_kernel(
    q_desc, k_desc, v_desc, dout_desc, stats_desc, dq_desc, dk_desc, dv_desc,
    Hkv, Tq, Tk, num_heads, num_blocks, heads_per_section, scale, scale_log2,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, GROUP: gl.constexpr,
    Q_STAGES: gl.constexpr, STAGES: gl.constexpr, BRANCH: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk, dv of one block of keys. The first block is seen by most queries, so blocks run in their order."""
    block, bh = schedule(gl.program_id(0), num_blocks, num_heads, heads_per_section)
    b, h_kv = bh // Hkv, bh % Hkv
    start_k = block * BLOCK_K
    first_q = gl.maximum(start_k - (Tk - Tq), 0) // BLOCK_Q * BLOCK_Q
    num_q = gl.cdiv(Tq - first_q, BLOCK_Q)

    q_ring = allocate_ring(q_desc, Q_STAGES, CONSUMERS)
    k_ring = allocate_ring(k_desc, CONSUMERS, 1)
    v_ring = allocate_ring(v_desc, CONSUMERS, 1)
    dout_ring = allocate_ring(dout_desc, STAGES, CONSUMERS)
    stats_ring = allocate_ring(stats_desc, STAGES, CONSUMERS)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    DS_TILES: gl.constexpr = 2 * CONSUMERS * (BLOCK_Q // ROWS)
    ds_buffers = gl.allocate_shared_memory(k_desc.dtype, [DS_TILES, ROWS, ROWS], DS_LAYOUT)
    dq_buffers = gl.allocate_shared_memory(gl.float32, [CONSUMERS, 1, 1, 16, 256], dq_desc.layout)
    ready = allocate_barriers(1, CONSUMERS)
    fence_async_shared()  # TMA must find the barriers initialized

    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (consume, (dk_desc, dv_desc, dq_desc, q_ring, k_ring, v_ring, dout_ring, stats_ring, ds_buffers, dq_buffers,
                       ready, b, h_kv, start_k, first_q, num_q, Tq, Tk, scale, scale_log2,
                       FIRST, GROUP, BLOCK_Q, BLOCK_D, BRANCH)),
            (consume, (dk_desc, dv_desc, dq_desc, q_ring, k_ring, v_ring, dout_ring, stats_ring, ds_buffers, dq_buffers,
                       ready, b, h_kv, start_k, first_q, num_q, Tq, Tk, scale, scale_log2,
                       SECOND, GROUP, BLOCK_Q, BLOCK_D, BRANCH)),
            (produce, (q_desc, k_desc, v_desc, dout_desc, stats_desc, q_ring, k_ring, v_ring, dout_ring, stats_ring,
                       b, h_kv, start_k, first_q, num_q, GROUP, BLOCK_Q)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# ---- on the host -----------------------------------------------------------------------------------------------------


def hopper_backward(dout, dlse, q, k, v, out, lse, scale):
    """Launch the backward: dq, dk, dv in the inputs' shapes, stored as (B, T, H, D). dlse (B, H, Tq) or None."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    dq, dk, dv = (empty_heads(*x.shape, like=x) for x in (q, k, v))
    if B == 0:
        return dq, dk, dv
    rows, block_d = ROWS.value, padded_head_dim(D)
    block_q = rows * CONSUMERS.value * 64 // block_d
    stats, dq_sum = prepare(dout, dlse, out, lse, block_q)
    q, k, v, dout = (tma_readable(x) for x in (q, k, v, dout))
    row = _tuning.HOPPER_BACKWARD[block_d]
    num_blocks = cdiv(Tk, BLOCK_K)
    _runtime.launch(
        hopper_backward_kernel, (num_blocks * B * Hkv,),
        descriptor(q, block_q), descriptor(k, rows), descriptor(v, rows), descriptor(dout, block_q),
        descriptor(stats, block_q // rows, 2 * rows), descriptor(dq_sum, 16, 256),
        descriptor(dk, rows), descriptor(dv, rows),
        Hkv, Tq, Tk, B * Hkv, num_blocks, heads_per_section(B * Hkv, q, 1, H // Hkv), scale, scale * LOG2_E,
        BLOCK_Q=block_q, BLOCK_K=BLOCK_K, BLOCK_D=block_d, GROUP=H // Hkv,
        Q_STAGES=row.q_stages, STAGES=row.stages, BRANCH=row.branch,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    num_blocks = stats.shape[2]
    _runtime.launch(
        finish_kernel, (num_blocks * B * H,),
        dq_sum, dq, *strides(dq), H, Tq, num_blocks, scale,
        HEAD_DIM=D, ROWS=rows, BLOCK_D=block_d, DTYPE=_runtime.TL_DTYPES[dq.dtype], num_warps=4, num_stages=1,
    )  # fmt: skip
    return dq, dk, dv


def prepare(dout, dlse, out, lse, block_q):
    """Launch the first kernel: stats (B, H, blocks of 64 queries, 2 * 64) and dq_sum (B, H, 64 x 64 tiles * 16, 256) of
    zeros, in fp32."""
    B, H, Tq, D = out.shape
    rows, block_d = ROWS.value, padded_head_dim(D)
    num_blocks = cdiv(Tq, block_q) * (block_q // rows)
    stats = out.new_empty((B, H, num_blocks, 2 * rows), dtype=torch.float32)
    dq_sum = out.new_empty((B, H, num_blocks * (block_d // 64) * 16, 256), dtype=torch.float32)
    _runtime.launch(
        prepare_kernel, (num_blocks * B * H,),
        out, dout, lse, dlse, stats, dq_sum, *strides(out), *strides(dout), H, Tq, num_blocks,
        HEAD_DIM=D, ROWS=rows, BLOCK_D=block_d, HAS_DLSE=dlse is not None, num_warps=4, num_stages=1,
    )  # fmt: skip
    return stats, dq_sum
