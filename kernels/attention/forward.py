"""Causal attention, forward (Dao, "FlashAttention-2", 2023, algorithm 1).

For one head, with q (Tq, D), k and v (Tk, D), s_ij = scale * <q_i, k_j> and the keys that i sees (see tiles.py):

    m_i = max_j s_ij    p_ij = exp(s_ij - m_i)    l_i = sum_j p_ij
    out_i = sum_j p_ij v_j / l_i                  lse_i = m_i + log l_i

A program owns BLOCK_Q queries of one head and walks over blocks of keys, keeping m, l and the unnormalized output `acc`
in registers: scores never reach memory. When a block raises the maximum, l and acc are multiplied by
exp(m_old - m_new). Exponentials are base 2, with scale * log2(e) applied after the dot product, so that each costs one
fused multiply-add and one special-function operation. Dropout zeroes entries of p after they were counted in l. With
OVERLAP the tensor cores compute the next block's scores during the softmax of this one.

Saved for the backward: q, k, v, out and lse (fp32). Accumulators, softmax and lse are fp32; p is rounded to v's dtype
for its product with v. Heaviest tiles (the last rows, which see most keys) start first.
"""

import torch
import triton
import triton.language as tl

from kernels import _dropout, _runtime
from kernels._dropout import keep_mask, load_rng
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
    schedule,
    store_tile,
    strides,
    visible,
    walk,
)

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def online_softmax_update(s, m, l, acc, scale_log2):
    """Fold scores s (BLOCK_Q, BLOCK_K) into the running maximum, denominator and output; returns p too."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # rows that have seen no key yet
    p = tl.exp2(s * scale_log2 - m_finite[:, None])
    alpha = tl.exp2(m - m_finite)
    return p, m_new, l * alpha + tl.sum(p, 1), acc * alpha[:, None]


@triton.jit
def scores(
    q, k_src, stride_kt, b, h_kv, start_k, Tk,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr,
    CHECK_ROWS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """<q_i, k_j> for the block of keys at start_k, (BLOCK_Q, BLOCK_K)."""
    k = load_tile(k_src, b, h_kv, start_k, stride_kt, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, CHECK_ROWS)
    return dot(q, k.trans(1, 0), None, INPUT_PRECISION)


@triton.jit
def absorb(
    s, m, l, acc, v_src, stride_vt, offs_q, first, b, h_kv, bh, start_k, Tq, Tk, scale_log2, key, counter, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr, MASKED: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax of one block's scores s, and its values into acc."""
    if MASKED:
        offs_k = start_k + tl.arange(0, BLOCK_K)
        seen = visible(offs_q[:, None], offs_k[None, :], first[:, None], Tq, Tk, HAS_FIRST)
        s = tl.where(seen, s, float("-inf"))
    p, m, l, acc = online_softmax_update(s, m, l, acc, scale_log2)
    if HAS_DROPOUT:
        p = tl.where(keep_mask(key, counter, bh, offs_q, start_k, threshold, BLOCK_K), p, 0.0)
    v = load_tile(v_src, b, h_kv, start_k, stride_vt, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, MASKED)
    return m, l, dot(cast(p, v.dtype), v, acc, INPUT_PRECISION)  # (BLOCK_Q, BLOCK_D)


@triton.jit
def attend(
    m, l, acc, q, k_src, v_src, stride_kt, stride_vt, offs_q, first, b, h_kv, bh,
    start, whole, cut, end, Tq, Tk, scale_log2, key, counter, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr,
    ONE_LOOP: tl.constexpr, MASKED: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the blocks of keys in [whole, cut), or with MASKED to the others in [start, end)."""
    first_k, last_k, leap_at, leap = walk(start, whole, cut, end, MASKED, ONE_LOOP)
    for position in tl.range(first_k, last_k, BLOCK_K):
        start_k = position + tl.where(position >= leap_at, leap, 0)
        s = scores(
            q, k_src, stride_kt, b, h_kv, start_k, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, MASKED, INPUT_PRECISION
        )
        m, l, acc = absorb(
            s, m, l, acc, v_src, stride_vt, offs_q, first, b, h_kv, bh, start_k, Tq, Tk,
            scale_log2, key, counter, threshold,
            HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, MASKED, HAS_FIRST, HAS_DROPOUT, INPUT_PRECISION,
        )  # fmt: skip
    return m, l, acc


@triton.jit
def attend_overlapped(
    m, l, acc, q, k_src, v_src, stride_kt, stride_vt, offs_q, first, b, h_kv, bh,
    whole, cut, Tq, Tk, scale_log2, key, counter, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the blocks in [whole, cut) and to the one at cut, each with the next one's scores on their way: the
    tensor cores multiply while the other units take exponentials (Shah et al., "FlashAttention-3", 2024, algorithm 2).
    """
    s = scores(q, k_src, stride_kt, b, h_kv, whole, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, True, INPUT_PRECISION)
    for start_k in tl.range(whole, cut, BLOCK_K):
        s_next = scores(
            q, k_src, stride_kt, b, h_kv, start_k + BLOCK_K, Tk,
            HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, True, INPUT_PRECISION,
        )  # fmt: skip
        m, l, acc = absorb(
            s, m, l, acc, v_src, stride_vt, offs_q, first, b, h_kv, bh, start_k, Tq, Tk,
            scale_log2, key, counter, threshold,
            HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, False, HAS_FIRST, HAS_DROPOUT, INPUT_PRECISION,
        )  # fmt: skip
        s = s_next
    return absorb(
        s, m, l, acc, v_src, stride_vt, offs_q, first, b, h_kv, bh, cut, Tq, Tk, scale_log2, key, counter, threshold,
        HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, True, HAS_FIRST, HAS_DROPOUT, INPUT_PRECISION,
    )  # fmt: skip


@triton.jit
def attention_forward_kernel(
    q_src, k_src, v_src, out_dst, lse_ptr, doc_start_ptr, rng_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    H, GROUP, Tq, Tk, num_heads, num_blocks, heads_per_section, window, scale_log2, threshold, rescale,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr,
    ONE_LOOP: tl.constexpr, OVERLAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    block, bh = schedule(tl.program_id(0), num_blocks, num_heads, heads_per_section)
    b, h = bh // H, bh % H
    h_kv = h // GROUP
    start_q = (num_blocks - 1 - block) * BLOCK_Q
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    HAS_FIRST: tl.constexpr = HAS_WINDOW or HAS_DOCS
    first = first_key(offs_q, doc_start_ptr, Tq, Tk, window, HAS_WINDOW, HAS_DOCS)
    key, counter = tl.cast(0, tl.int64), tl.cast(0, tl.uint32)
    if HAS_DROPOUT:
        key, counter = load_rng(rng_ptr)

    q_src = head_of(q_src, b, h, stride_qb, stride_qh, USE_TMA)
    k_src = head_of(k_src, b, h_kv, stride_kb, stride_kh, USE_TMA)
    v_src = head_of(v_src, b, h_kv, stride_vb, stride_vh, USE_TMA)
    q = load_tile(q_src, b, h, start_q, stride_qt, Tq, HEAD_DIM, BLOCK_Q, BLOCK_D, USE_TMA, True)
    m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)

    start, whole, cut, end = key_ranges(start_q, doc_start_ptr, Tq, Tk, window, HAS_WINDOW, HAS_DOCS, BLOCK_Q, BLOCK_K)
    after = cut  # the first block past those already taken
    if OVERLAP:
        last = (end - 1) // BLOCK_K * BLOCK_K  # a narrow window or an aligned end can leave nothing at cut
        whole, cut = tl.minimum(whole, last), tl.minimum(cut, last)
        m, l, acc = attend_overlapped(
            m, l, acc, q, k_src, v_src, stride_kt, stride_vt, offs_q, first, b, h_kv, bh,
            whole, cut, Tq, Tk, scale_log2, key, counter, threshold,
            HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, HAS_FIRST, HAS_DROPOUT, INPUT_PRECISION,
        )  # fmt: skip
        after = tl.minimum(cut + BLOCK_K, end)
    for WHOLE in tl.static_range(1 if ONE_LOOP or OVERLAP else 2):  # the blocks cut by an edge, then the others
        m, l, acc = attend(
            m, l, acc, q, k_src, v_src, stride_kt, stride_vt, offs_q, first, b, h_kv, bh,
            start, whole, after, end, Tq, Tk, scale_log2, key, counter, threshold,
            HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, ONE_LOOP, WHOLE == 0, HAS_FIRST, HAS_DROPOUT, INPUT_PRECISION,
        )  # fmt: skip

    out = acc * (rescale / tl.where(l == 0.0, 1.0, l))[:, None]
    out_dst = head_of(out_dst, b, h, stride_ob, stride_oh, USE_TMA)
    store_tile(out_dst, out, b, h, start_q, stride_ot, Tq, HEAD_DIM, BLOCK_Q, BLOCK_D, DTYPE, USE_TMA)
    lse = (m + tl.log2(l)) * LN_2
    tl.store(lse_ptr + bh.to(tl.int64) * Tq + offs_q, lse, mask=offs_q < Tq)


def attention_forward(q, k, v, scale, dropout_p=0.0, rng=None, window=0, doc_start=None):
    """Launch the forward: out (B, H, Tq, D) stored as (B, Tq, H, D), and lse (B, H, Tq) fp32."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    out = empty_heads(B, H, Tq, D, like=q)
    lse = q.new_empty((B, H, Tq), dtype=torch.float32)
    tile, sources = plan("forward", (q, k, v, out), "qkkq", dropout_p > 0.0)
    num_blocks = cdiv(Tq, tile.block_q)
    threshold, rescale = _dropout.threshold_and_rescale(dropout_p)
    _runtime.launch(
        attention_forward_kernel, (num_blocks * B * H,),
        *sources, lse, doc_start, rng, *strides(q), *strides(k), *strides(v), *strides(out),
        H, H // Hkv, Tq, Tk, B * H, num_blocks, heads_per_section(B * H, k, H // Hkv), window,
        scale * LOG2_E, threshold, rescale,
        HEAD_DIM=D, BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, BLOCK_D=padded_head_dim(D),
        USE_TMA=tile.use_tma, ONE_LOOP=tile.loops == "one", OVERLAP=tile.loops == "overlap",
        HAS_WINDOW=window > 0, HAS_DOCS=doc_start is not None, HAS_DROPOUT=dropout_p > 0.0,
        DTYPE=_runtime.TL_DTYPES[q.dtype], INPUT_PRECISION=_runtime.fp32_precision(q.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg,
    )  # fmt: skip
    return out, lse
