"""Causal attention for few queries against many keys, as when decoding: the keys are split over programs.

One query row would keep one program a head busy, a handful of multiprocessors on a GPU of a hundred. Here the queries
of all heads that share a key head form one tile (GROUP * Tq rows; more tiles where that would be too many for the
registers), every program takes one through one span of the keys, and a second kernel merges the spans' results as the
online softmax merges blocks (Dao et al., "Flash-Decoding", 2023): with lse = log-sum-exp over the spans' lse_n,

    out = sum_n exp(lse_n - lse) out_n

The partial results are fp32. The backward is the general one: it needs only out and lse.
"""

import torch
import triton
import triton.language as tl

from kernels import _runtime
from kernels._runtime import cast, cdiv, dot, next_power_of_2
from kernels.attention.forward import LN_2, online_softmax_update
from kernels.attention.tiles import (
    LOG2_E,
    empty_heads,
    first_key,
    head_of,
    load_tile,
    padded_head_dim,
    plan,
    strides,
    visible,
)

MAX_ROWS = 64  # GROUP * Tq: more queries than this fill the general kernel's tiles
MAX_ROWS_OF_WIDE_HEADS, MAX_ROWS_FP32 = 32, 16  # to a tile, D > 128 and fp32: with more it spills
MAX_SPANS = 128
MIN_SPAN = 256  # keys: a shorter span does not pay for its merge


@triton.jit
def decode_kernel(
    q_ptr, k_src, v_src, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H, Hkv, Tq, Tk, span, num_spans, window, scale_log2,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr,
    HAS_WINDOW: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows (g, i) of one key head against the keys of one span -> out (B, H, spans, Tq, D), lse (B, H, spans,
    Tq)."""
    pid = tl.program_id(0)
    group = H // Hkv
    tiles = tl.cdiv(group * Tq, ROWS)
    n, tile, bh_kv = pid % num_spans, pid // num_spans % tiles, pid // num_spans // tiles
    b, h_kv = bh_kv // Hkv, bh_kv % Hkv
    rows = tile * ROWS + tl.arange(0, ROWS)
    i, h = rows % Tq, h_kv * group + rows // Tq
    exists = rows < group * Tq
    offs_d = tl.arange(0, BLOCK_D)
    in_tile = exists[:, None] & (offs_d < HEAD_DIM)[None, :]

    q_rows = q_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh + i.to(tl.int64) * stride_qt
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=in_tile, other=0.0)  # (ROWS, BLOCK_D)
    k_src = head_of(k_src, b, h_kv, stride_kb, stride_kh, USE_TMA)
    v_src = head_of(v_src, b, h_kv, stride_vb, stride_vh, USE_TMA)
    first = first_key(i, None, Tq, Tk, window, HAS_WINDOW, False)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    start = n * span
    if HAS_WINDOW:  # the first query's window reaches furthest back
        start = tl.maximum(start, tl.min(first, 0) // BLOCK_K * BLOCK_K)
    for start_k in tl.range(start, tl.minimum((n + 1) * span, Tk), BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        k = load_tile(k_src, b, h_kv, start_k, stride_kt, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, True)
        s = dot(q, k.trans(1, 0), None, INPUT_PRECISION)  # (ROWS, BLOCK_K)
        seen = visible(i[:, None], offs_k[None, :], first[:, None], Tq, Tk, HAS_WINDOW)
        p, m, l, acc = online_softmax_update(tl.where(seen, s, float("-inf")), m, l, acc, scale_log2)
        v = load_tile(v_src, b, h_kv, start_k, stride_vt, Tk, HEAD_DIM, BLOCK_K, BLOCK_D, USE_TMA, True)
        acc = dot(cast(p, v.dtype), v, acc, INPUT_PRECISION)

    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    lse = (m + tl.log2(l)) * LN_2
    partial = ((b.to(tl.int64) * H + h) * num_spans + n) * Tq + i
    tl.store(out_ptr + partial[:, None] * HEAD_DIM + offs_d[None, :], out, mask=in_tile)
    tl.store(lse_ptr + partial, lse, mask=exists)


@triton.jit
def merge_kernel(
    partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, stride_ob, stride_oh, stride_ot, H, Tq, num_spans,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPANS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One row of out from its spans: partial out (B, H, spans, Tq, D), partial lse (B, H, spans, Tq)."""
    pid = tl.program_id(0)
    i, bh = pid % Tq, pid // Tq
    spans = tl.arange(0, SPANS)
    offs_d = tl.arange(0, BLOCK_D)
    partial = (bh.to(tl.int64) * num_spans + spans) * Tq + i
    lse_n = tl.load(partial_lse_ptr + partial, mask=spans < num_spans, other=float("-inf"))
    m = tl.max(lse_n, 0)  # finite: the row's own key is in some span
    weight = tl.exp(lse_n - m)
    total = tl.sum(weight, 0)
    in_tile = (spans < num_spans)[:, None] & (offs_d < HEAD_DIM)[None, :]
    out_n = tl.load(partial_out_ptr + partial[:, None] * HEAD_DIM + offs_d[None, :], mask=in_tile, other=0.0)
    out = tl.sum(out_n * weight[:, None], 0) / total
    row = out_ptr + (bh // H).to(tl.int64) * stride_ob + (bh % H).to(tl.int64) * stride_oh + i * stride_ot
    tl.store(row + offs_d, cast(out, DTYPE), mask=offs_d < HEAD_DIM)
    tl.store(lse_ptr + pid, m + tl.log(total))


def rows_of(q, k):
    """How many rows share a key head: GROUP * Tq."""
    return q.shape[1] // k.shape[1] * q.shape[2]


def rows_per_tile(q, k):
    """ROWS: a power of two, 16 at least (the tensor cores' M)."""
    most = MAX_ROWS_FP32 if q.dtype == torch.float32 else MAX_ROWS_OF_WIDE_HEADS if q.shape[3] > 128 else MAX_ROWS
    return min(most, max(16, next_power_of_2(rows_of(q, k))))


def num_spans_for(q, k):
    """How many spans fill the GPU twice over, none shorter than MIN_SPAN."""
    tiles = cdiv(rows_of(q, k), rows_per_tile(q, k))
    wanted = 2 * _runtime.multiprocessors(q.device) // max(1, k.shape[0] * k.shape[1] * tiles)
    return max(1, min(wanted, k.shape[2] // MIN_SPAN, MAX_SPANS))


def applies(q, k, dropout_p, cu_seqlens):
    """Whether a split over keys serves this call: few rows, long keys, too few heads to fill the GPU."""
    return rows_of(q, k) <= MAX_ROWS and dropout_p == 0.0 and cu_seqlens is None and num_spans_for(q, k) > 1


def attention_decode(q, k, v, scale, window=0, num_spans=None):
    """Launch the split forward: out (B, H, Tq, D) stored as (B, Tq, H, D), and lse (B, H, Tq) fp32."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    tile, sources = plan("decode", (k, v), "kk")
    block_d = padded_head_dim(D)
    rows = rows_per_tile(q, k)
    span = cdiv(cdiv(Tk, num_spans or num_spans_for(q, k)), tile.block_k) * tile.block_k
    num_spans = cdiv(Tk, span)
    partial_out = torch.empty((B, H, num_spans, Tq, D), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((B, H, num_spans, Tq), dtype=torch.float32, device=q.device)
    _runtime.launch(
        decode_kernel, (B * Hkv * cdiv(rows_of(q, k), rows) * num_spans,),
        q, *sources, partial_out, partial_lse, *strides(q), *strides(k), *strides(v),
        H, Hkv, Tq, Tk, span, num_spans, window, scale * LOG2_E,
        HEAD_DIM=D, ROWS=rows, BLOCK_K=tile.block_k, BLOCK_D=block_d, USE_TMA=tile.use_tma,
        HAS_WINDOW=window > 0, INPUT_PRECISION=_runtime.fp32_precision(q.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg,
    )  # fmt: skip
    out = empty_heads(B, H, Tq, D, like=q)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    _runtime.launch(
        merge_kernel, (B * H * Tq,),
        partial_out, partial_lse, out, lse, *strides(out), H, Tq, num_spans,
        HEAD_DIM=D, BLOCK_D=block_d, SPANS=max(2, next_power_of_2(num_spans)),
        DTYPE=_runtime.TL_DTYPES[q.dtype], num_warps=4 if num_spans * block_d < 32768 else 8, num_stages=1,
    )  # fmt: skip
    return out, lse
