"""Causal attention, backward (Dao, "FlashAttention-2", 2023, algorithm 2), deterministic: no atomics.

With p_ij = exp(s_ij - lse_i) recomputed from q, k and the saved lse (s_ij = scale * <q_i, k_j>):

    dv_j = sum_i p_ij dout_i                        dp_ij = <dout_i, v_j>
    ds_ij = p_ij (dp_ij - delta_i)                  delta_i = sum_j p_ij dp_ij = <out_i, dout_i>
    dq_i = scale * sum_j ds_ij k_j                  dk_j = scale * sum_i ds_ij q_i

A gradient dlse_i of the log-sum-exp adds p_ij dlse_i to ds_ij, so it is subtracted from delta_i. With dropout, p is
masked and rescaled where it meets v (in dv and dp), and delta needs no change.

Three kernels in this order: delta, one pass over out and dout; dK/dV, a program per block of keys walking over the
queries (of every head that shares the key head) that see it; dQ, a program per block of queries walking over its keys.
Scores are recomputed twice, in exchange for which every output has one owner: the same bits on every run. dK/dV
computes s and dp transposed (keys by queries), so that both of its products take them as they come, untransposed.
Accumulators and the softmax are fp32; p and ds are rounded to the inputs' dtype for their products.
"""

import torch
import triton
import triton.language as tl

from kernels import _dropout, _runtime
from kernels._dropout import keep_mask, keep_mask_transposed, load_rng
from kernels._runtime import cast, cdiv, dot
from kernels.attention.tiles import (
    LOG2_E,
    empty_heads,
    first_key,
    head_of,
    heads_per_section,
    key_ranges,
    load_tile,
    padded_head_dim,
    plan,
    query_ranges,
    schedule,
    store_tile,
    strides,
    visible,
    walk,
)

LOG2E = tl.constexpr(LOG2_E)


@triton.jit
def load_delta(
    out_src, dout_src, dlse_ptr, b, h, bh, start_q,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, Tq,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta (BLOCK_Q,) = rowsum(out * dout) - dlse of the queries from start_q on, 0 beyond Tq."""
    out_src = head_of(out_src, b, h, stride_ob, stride_oh, False)
    dout_src = head_of(dout_src, b, h, stride_gb, stride_gh, False)
    out = load_tile(out_src, b, h, start_q, stride_ot, Tq, HEAD_DIM, BLOCK_Q, BLOCK_D, False, True).to(tl.float32)
    dout = load_tile(dout_src, b, h, start_q, stride_gt, Tq, HEAD_DIM, BLOCK_Q, BLOCK_D, False, True).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if HAS_DLSE:
        offs_q = start_q + tl.arange(0, BLOCK_Q)
        delta -= tl.load(dlse_ptr + bh.to(tl.int64) * Tq + offs_q, mask=offs_q < Tq, other=0.0)
    return delta


@triton.jit
def delta_kernel(
    out_src, dout_src, dlse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, H, Tq, num_blocks,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta (B, H, Tq)."""
    pid = tl.program_id(0)
    start_q, bh = pid % num_blocks * BLOCK_Q, pid // num_blocks
    delta = load_delta(
        out_src, dout_src, dlse_ptr, bh // H, bh % H, bh, start_q,
        stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, Tq, HEAD_DIM, BLOCK_Q, BLOCK_D, HAS_DLSE,
    )  # fmt: skip
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    tl.store(delta_ptr + bh.to(tl.int64) * Tq + offs_q, delta, mask=offs_q < Tq)


@triton.jit
def accumulate_dkdv(
    dk, dv, k, v, q_src, dout_src, lse_ptr, delta_ptr, doc_start_ptr, stride_qt, stride_gt,
    start_k, offs_k, b, h, bh, start, whole, cut, end, Tq, Tk, window, scale_log2, key, counter, threshold, rescale,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    ONE_LOOP: tl.constexpr, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv (BLOCK_K, BLOCK_D) what one head's blocks of queries in [whole, cut) give, or with MASKED the
    others in [start, end). Rows beyond Tq need no mask: their q, dout, lse and delta are 0, and so is what they add."""
    first_q, last_q, leap_at, leap = walk(start, whole, cut, end, MASKED, ONE_LOOP)
    for position in tl.range(first_q, last_q, BLOCK_Q):
        start_q = position + tl.where(position >= leap_at, leap, 0)
        offs_q = start_q + tl.arange(0, BLOCK_Q)
        exists = offs_q < Tq
        q = load_tile(q_src, b, h, start_q, stride_qt, Tq, HEAD_DIM, BLOCK_Q, BLOCK_D, USE_TMA, True)
        lse_log2 = tl.load(lse_ptr + offs_q, mask=exists, other=0.0) * LOG2E
        s_t = dot(k, q.trans(1, 0), None, INPUT_PRECISION)  # (BLOCK_K, BLOCK_Q)
        dout = load_tile(dout_src, b, h, start_q, stride_gt, Tq, HEAD_DIM, BLOCK_Q, BLOCK_D, USE_TMA, True)
        # dp before p: tensor cores multiply for it during the exponentials.
        dp_t = dot(v, dout.trans(1, 0), None, INPUT_PRECISION)  # (BLOCK_K, BLOCK_Q)
        p_t = tl.exp2(s_t * scale_log2 - lse_log2[None, :])
        if MASKED:
            first = first_key(offs_q, doc_start_ptr, Tq, Tk, window, HAS_WINDOW, HAS_DOCS)
            seen = visible(offs_q[None, :], offs_k[:, None], first[None, :], Tq, Tk, HAS_WINDOW or HAS_DOCS)
            p_t = tl.where(seen, p_t, 0.0)
        kept_p_t = p_t
        if HAS_DROPOUT:
            keep = keep_mask_transposed(key, counter, bh, offs_q, start_k, threshold, BLOCK_K)
            kept_p_t = tl.where(keep, p_t, 0.0)
            dp_t = tl.where(keep, dp_t * rescale, 0.0)
        dv = dot(cast(kept_p_t, dout.dtype), dout, dv, INPUT_PRECISION)
        delta = tl.load(delta_ptr + offs_q, mask=exists, other=0.0)
        ds_t = p_t * (dp_t - delta[None, :])
        dk = dot(cast(ds_t, q.dtype), q, dk, INPUT_PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    q_src, k_src, v_src, dout_src, dk_dst, dv_dst, lse_ptr, delta_ptr, doc_start_ptr, doc_end_ptr, rng_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, Hkv, Tq, Tk, num_heads, num_blocks, heads_per_section, window, scale, scale_log2, threshold, rescale,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr,
    ONE_LOOP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dk, dv of one block of keys. The first block is seen by most queries, so blocks run in their order."""
    block, bh_kv = schedule(tl.program_id(0), num_blocks, num_heads, heads_per_section)
    b, h_kv = bh_kv // Hkv, bh_kv % Hkv
    start_k = block * BLOCK_K
    offs_k = start_k + tl.arange(0, BLOCK_K)
    key, counter = tl.cast(0, tl.int64), tl.cast(0, tl.uint32)
    if HAS_DROPOUT:
        key, counter = load_rng(rng_ptr)

    k_src = head_of(k_src, b, h_kv, stride_kb, stride_kh, USE_TMA)
    v_src = head_of(v_src, b, h_kv, stride_vb, stride_vh, USE_TMA)
    k = load_tile(k_src, b, h_kv, start_k, stride_kt, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, True)
    v = load_tile(v_src, b, h_kv, start_k, stride_vt, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, True)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)

    start, whole, cut, end = query_ranges(start_k, doc_end_ptr, Tq, Tk, window, HAS_WINDOW, HAS_DOCS, BLOCK_Q, BLOCK_K)
    for g in tl.range(0, GROUP):
        h = h_kv * GROUP + g
        bh = b * H + h
        q_head = head_of(q_src, b, h, stride_qb, stride_qh, USE_TMA)
        dout_head = head_of(dout_src, b, h, stride_gb, stride_gh, USE_TMA)
        lse_head = lse_ptr + bh.to(tl.int64) * Tq
        delta_head = delta_ptr + bh.to(tl.int64) * Tq
        for WHOLE in tl.static_range(1 if ONE_LOOP else 2):  # the blocks cut by an edge, then the others
            dk, dv = accumulate_dkdv(
                dk, dv, k, v, q_head, dout_head, lse_head, delta_head, doc_start_ptr, stride_qt, stride_gt,
                start_k, offs_k, b, h, bh, start, whole, cut, end, Tq, Tk, window,
                scale_log2, key, counter, threshold, rescale,
                HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D, USE_TMA, ONE_LOOP, WHOLE == 0, HAS_WINDOW, HAS_DOCS, HAS_DROPOUT,
                INPUT_PRECISION,
            )  # fmt: skip

    dk_dst = head_of(dk_dst, b, h_kv, stride_dkb, stride_dkh, USE_TMA)
    dv_dst = head_of(dv_dst, b, h_kv, stride_dvb, stride_dvh, USE_TMA)
    store_tile(dk_dst, dk * scale, b, h_kv, start_k, stride_dkt, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, DTYPE, USE_TMA)
    store_tile(dv_dst, dv * rescale, b, h_kv, start_k, stride_dvt, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, DTYPE, USE_TMA)


@triton.jit
def accumulate_dq(
    dq, q, dout, lse_log2, delta, k_src, v_src, stride_kt, stride_vt,
    offs_q, first, b, h_kv, bh, start, whole, cut, end, Tq, Tk, scale_log2, key, counter, threshold, rescale,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr,
    ONE_LOOP: tl.constexpr, MASKED: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq (BLOCK_Q, BLOCK_D) what the blocks of keys in [whole, cut) give, or with MASKED the others in
    [start, end)."""
    first_k, last_k, leap_at, leap = walk(start, whole, cut, end, MASKED, ONE_LOOP)
    for position in tl.range(first_k, last_k, BLOCK_K):
        start_k = position + tl.where(position >= leap_at, leap, 0)
        offs_k = start_k + tl.arange(0, BLOCK_K)
        k = load_tile(k_src, b, h_kv, start_k, stride_kt, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, MASKED)
        s = dot(q, k.trans(1, 0), None, INPUT_PRECISION)  # (BLOCK_Q, BLOCK_K)
        v = load_tile(v_src, b, h_kv, start_k, stride_vt, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, MASKED)
        dp = dot(dout, v.trans(1, 0), None, INPUT_PRECISION)  # (BLOCK_Q, BLOCK_K)
        p = tl.exp2(s * scale_log2 - lse_log2[:, None])
        if MASKED:
            seen = visible(offs_q[:, None], offs_k[None, :], first[:, None], Tq, Tk, HAS_FIRST)
            p = tl.where(seen, p, 0.0)
        if HAS_DROPOUT:
            keep = keep_mask(key, counter, bh, offs_q, start_k, threshold, BLOCK_K)
            dp = tl.where(keep, dp * rescale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = dot(cast(ds, k.dtype), k, dq, INPUT_PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q_src, k_src, v_src, dout_src, dq_dst, lse_ptr, delta_ptr, doc_start_ptr, rng_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    H, GROUP, Tq, Tk, num_heads, num_blocks, heads_per_section, window, scale, scale_log2, threshold, rescale,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr,
    ONE_LOOP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, heaviest (last) blocks first."""
    block, bh = schedule(tl.program_id(0), num_blocks, num_heads, heads_per_section)
    b, h = bh // H, bh % H
    h_kv = h // GROUP
    start_q = (num_blocks - 1 - block) * BLOCK_Q
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    exists = offs_q < Tq
    HAS_FIRST: tl.constexpr = HAS_WINDOW or HAS_DOCS
    first = first_key(offs_q, doc_start_ptr, Tq, Tk, window, HAS_WINDOW, HAS_DOCS)
    key, counter = tl.cast(0, tl.int64), tl.cast(0, tl.uint32)
    if HAS_DROPOUT:
        key, counter = load_rng(rng_ptr)

    q_src = head_of(q_src, b, h, stride_qb, stride_qh, USE_TMA)
    k_src = head_of(k_src, b, h_kv, stride_kb, stride_kh, USE_TMA)
    v_src = head_of(v_src, b, h_kv, stride_vb, stride_vh, USE_TMA)
    dout_src = head_of(dout_src, b, h, stride_gb, stride_gh, USE_TMA)
    q = load_tile(q_src, b, h, start_q, stride_qt, Tq, HEAD_DIM, BLOCK_Q, BLOCK_D, USE_TMA, True)
    dout = load_tile(dout_src, b, h, start_q, stride_gt, Tq, HEAD_DIM, BLOCK_Q, BLOCK_D, USE_TMA, True)
    lse_log2 = tl.load(lse_ptr + bh.to(tl.int64) * Tq + offs_q, mask=exists, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + bh.to(tl.int64) * Tq + offs_q, mask=exists, other=0.0)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)

    start, whole, cut, end = key_ranges(start_q, doc_start_ptr, Tq, Tk, window, HAS_WINDOW, HAS_DOCS, BLOCK_Q, BLOCK_K)
    for WHOLE in tl.static_range(1 if ONE_LOOP else 2):  # the blocks cut by an edge, then the others
        dq = accumulate_dq(
            dq, q, dout, lse_log2, delta, k_src, v_src, stride_kt, stride_vt,
            offs_q, first, b, h_kv, bh, start, whole, cut, end, Tq, Tk, scale_log2, key, counter, threshold, rescale,
            HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, ONE_LOOP, WHOLE == 0, HAS_FIRST, HAS_DROPOUT, INPUT_PRECISION,
        )  # fmt: skip

    dq_dst = head_of(dq_dst, b, h, stride_dqb, stride_dqh, USE_TMA)
    store_tile(dq_dst, dq * scale, b, h, start_q, stride_dqt, Tq, HEAD_DIM, BLOCK_Q, BLOCK_D, DTYPE, USE_TMA)


def compute_delta(out, dout, dlse):
    """Launch the delta pass: (B, H, Tq) fp32."""
    B, H, Tq, D = out.shape
    delta = out.new_empty((B, H, Tq), dtype=torch.float32)
    block_d = padded_head_dim(D)
    block_q = 128 if _runtime.arch(out.device) == "interpret" else max(16, 4096 // block_d)
    num_blocks = cdiv(Tq, block_q)
    _runtime.launch(
        delta_kernel, (num_blocks * B * H,),
        out, dout, dlse, delta, *strides(out), *strides(dout), H, Tq, num_blocks,
        HEAD_DIM=D, BLOCK_Q=block_q, BLOCK_D=block_d, HAS_DLSE=dlse is not None, num_warps=4, num_stages=1,
    )  # fmt: skip
    return delta


def attention_backward(
    dout, dlse, q, k, v, out, lse, scale, dropout_p=0.0, rng=None, window=0, doc_start=None, doc_end=None
):
    """Launch the backward: dq, dk, dv in the inputs' shapes, stored as (B, T, H, D). dlse (B, H, Tq) or None."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    threshold, rescale = _dropout.threshold_and_rescale(dropout_p)
    flags = {
        "HEAD_DIM": D, "BLOCK_D": padded_head_dim(D), "HAS_WINDOW": window > 0, "HAS_DOCS": doc_start is not None,
        "HAS_DROPOUT": dropout_p > 0.0, "DTYPE": _runtime.TL_DTYPES[q.dtype],
        "INPUT_PRECISION": _runtime.fp32_precision(q.dtype),
    }  # fmt: skip
    delta = compute_delta(out, dout, dlse)

    dk, dv = empty_heads(B, Hkv, Tk, D, like=k), empty_heads(B, Hkv, Tk, D, like=v)
    tile, sources = plan("dkdv", (q, k, v, dout, dk, dv), "qkkqkk", dropout_p > 0.0)
    num_blocks = cdiv(Tk, tile.block_k)
    _runtime.launch(
        dkdv_kernel, (num_blocks * B * Hkv,),
        *sources, lse, delta, doc_start, doc_end, rng,
        *strides(q), *strides(k), *strides(v), *strides(dout), *strides(dk), *strides(dv),
        H, Hkv, Tq, Tk, B * Hkv, num_blocks, heads_per_section(B * Hkv, q, 1, H // Hkv), window,
        scale, scale * LOG2_E, threshold, rescale,
        BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, USE_TMA=tile.use_tma, ONE_LOOP=tile.loops == "one",
        GROUP=H // Hkv, **flags, num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg,
    )  # fmt: skip

    dq = empty_heads(B, H, Tq, D, like=q)
    tile, sources = plan("dq", (q, k, v, dout, dq), "qkkqq", dropout_p > 0.0)
    num_blocks = cdiv(Tq, tile.block_q)
    _runtime.launch(
        dq_kernel, (num_blocks * B * H,),
        *sources, lse, delta, doc_start, rng,
        *strides(q), *strides(k), *strides(v), *strides(dout), *strides(dq),
        H, H // Hkv, Tq, Tk, B * H, num_blocks, heads_per_section(B * H, k, H // Hkv), window,
        scale, scale * LOG2_E, threshold, rescale,
        BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, USE_TMA=tile.use_tma, ONE_LOOP=tile.loops == "one", **flags,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg,
    )  # fmt: skip
    return dq, dk, dv
