"""What the attention kernels share: their grid, their tiles in memory, and which keys a query sees.

Query i sees keys first(i) <= j <= i + Tk - Tq, causal at the bottom right, with
first(i) = max(0, i + Tk - Tq - W + 1 with a window W, the start of i's document with packed documents).
Both ends never decrease with i, so the blocks that a tile must visit are one range [start, end), and those that all of
its rows see whole are a range [whole, cut) inside it. A kernel walks twice: with a mask over the blocks cut by an edge,
leaping over [whole, cut); and over [whole, cut) without one. Or once, with a mask everywhere, where registers are few.
"""

import math

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import _runtime, _tuning
from kernels._runtime import cast, next_power_of_2

L2_BYTES_FOR_KV = 24 * 2**20  # about half of an A100's or H100's L2
MAX_TILE_ROWS = 256


# ---- inside the kernels ----------------------------------------------------------------------------------------------


@triton.jit
def schedule(pid, num_blocks, num_heads, heads_per_section):
    """Program -> (block, batch-and-head). Sections of heads whose keys and values fit in L2 run one after the other;
    inside one, block 0 of every head comes first."""
    section = pid // (num_blocks * heads_per_section)
    first_head = section * heads_per_section
    heads = tl.minimum(heads_per_section, num_heads - first_head)
    within = pid - section * num_blocks * heads_per_section
    return within // heads, first_head + within % heads


@triton.jit
def head_of(src, b, h, stride_b, stride_h, USE_TMA: tl.constexpr):
    """Where head (b, h) of a (B, H, T, D) tensor begins; a descriptor is indexed instead."""
    if USE_TMA:
        return src
    else:
        return src + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def tile_offsets(start, stride_t, T, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets (BLOCK, BLOCK_D) from the start of the head, and which of them exist."""
    rows = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    offsets = start.to(tl.int64) * stride_t + (rows[:, None] * stride_t + offs_d[None, :])
    return offsets, (start + rows < T)[:, None] & (offs_d < HEAD_DIM)[None, :]


@triton.jit
def load_tile(
    src, b, h, start, stride_t, T,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr, CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows start ... start + BLOCK - 1 of one head, (BLOCK, BLOCK_D), zero beyond T and HEAD_DIM. CHECK_ROWS=False
    promises that all of them exist."""
    start = tl.cast(start, tl.int32)
    if USE_TMA:
        return src.load([b, h, start, 0]).reshape(BLOCK, BLOCK_D)
    else:
        offsets, exists = tile_offsets(start, stride_t, T, HEAD_DIM, BLOCK, BLOCK_D)
        if CHECK_ROWS:
            return tl.load(src + offsets, mask=exists, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            return tl.load(src + offsets, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
        else:
            return tl.load(src + offsets)


@triton.jit
def store_tile(
    dst, tile, b, h, start, stride_t, T,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Write an fp32 tile (BLOCK, BLOCK_D) as DTYPE, nothing beyond T and HEAD_DIM."""
    if USE_TMA:
        dst.store([b, h, start, 0], cast(tile, DTYPE).reshape(1, 1, BLOCK, BLOCK_D))
    else:
        offsets, exists = tile_offsets(start, stride_t, T, HEAD_DIM, BLOCK, BLOCK_D)
        tl.store(dst + offsets, cast(tile, DTYPE), mask=exists)


@triton.jit
def first_key(i, doc_start_ptr, Tq, Tk, window, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr):
    """first(i) for one query or a vector of them."""
    first = i * 0
    if HAS_WINDOW:
        first = tl.maximum(first, i + (Tk - Tq) - window + 1)
    if HAS_DOCS:
        first = tl.maximum(first, tl.load(doc_start_ptr + i, mask=i < Tq, other=0))
    return first


@triton.jit
def visible(i, j, first, Tq, Tk, HAS_FIRST: tl.constexpr):
    """Whether query i sees key j, for i, j and first(i) that broadcast to a tile."""
    seen = j <= i + (Tk - Tq)
    if HAS_FIRST:
        seen = seen & (j >= first)
    return seen


@triton.jit
def end_query(j, doc_end_ptr, Tq, Tk, window, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr):
    """One more than the last query that sees key j, as far as window and documents go."""
    end = Tq
    if HAS_WINDOW:
        end = tl.maximum(tl.minimum(end, j + window - (Tk - Tq)), 0)  # 0: too old for every query
    if HAS_DOCS:
        end = tl.minimum(end, tl.load(doc_end_ptr + tl.minimum(j, Tk - 1)))
    return end


@triton.jit
def key_ranges(
    start_q, doc_start_ptr, Tq, Tk, window,
    HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """start, whole, cut, end: of the blocks of keys, queries start_q ... start_q + BLOCK_Q - 1 see those in [start,
    end), and those in [whole, cut) entirely; before, window or document cut them, after, the diagonal."""
    last_q = tl.minimum(start_q + BLOCK_Q, Tq) - 1
    end = last_q + (Tk - Tq) + 1
    cut = (start_q + (Tk - Tq) + 1) // BLOCK_K * BLOCK_K
    start = start_q * 0
    whole = start_q * 0
    if HAS_WINDOW or HAS_DOCS:
        start = first_key(start_q, doc_start_ptr, Tq, Tk, window, HAS_WINDOW, HAS_DOCS) // BLOCK_K * BLOCK_K
        whole = tl.cdiv(first_key(last_q, doc_start_ptr, Tq, Tk, window, HAS_WINDOW, HAS_DOCS), BLOCK_K) * BLOCK_K
    whole = tl.minimum(whole, end)
    return start, whole, tl.maximum(whole, cut), end


@triton.jit
def query_ranges(
    start_k, doc_end_ptr, Tq, Tk, window,
    HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """start, whole, cut, end: of the blocks of queries, those in [start, end) see some of keys start_k ...
    start_k + BLOCK_K - 1 and those in [whole, cut) all; before, the diagonal cuts, after, window or document."""
    last_k = tl.minimum(start_k + BLOCK_K, Tk) - 1
    start = tl.maximum(start_k - (Tk - Tq), 0) // BLOCK_Q * BLOCK_Q
    whole = tl.cdiv(tl.maximum(start_k + BLOCK_K - 1 - (Tk - Tq), 0), BLOCK_Q) * BLOCK_Q
    end = end_query(last_k, doc_end_ptr, Tq, Tk, window, HAS_WINDOW, HAS_DOCS)
    cut = end
    if HAS_WINDOW or HAS_DOCS:
        cut = end_query(start_k, doc_end_ptr, Tq, Tk, window, HAS_WINDOW, HAS_DOCS)
        cut = tl.minimum(cut, end) // BLOCK_Q * BLOCK_Q
    whole = tl.minimum(whole, end)
    return start, whole, tl.maximum(whole, cut), end


@triton.jit
def walk(start, whole, cut, end, MASKED: tl.constexpr, ONE_LOOP: tl.constexpr):
    """first, last, leap_at, leap: a loop over [first, last) visits each block, at its position, or `leap` further once
    it is at leap_at: with MASKED those outside of [whole, cut), else those inside; with ONE_LOOP all of them."""
    if ONE_LOOP:
        return start, end, end, end * 0
    elif MASKED:
        return start, end - (cut - whole), whole, cut - whole
    else:
        return whole, cut, cut, cut * 0


# ---- on the host -----------------------------------------------------------------------------------------------------


def padded_head_dim(head_dim):
    """The power of two, at least 16 (the tensor cores' K), that holds a head."""
    return max(16, next_power_of_2(head_dim))


def readable(x):
    """x (B, H, T, D) itself if the kernels can read it in place, else a contiguous copy: the last stride must be 1 and
    a tile's rows must lie within 2^31 elements of each other."""
    in_place = (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(2) * MAX_TILE_ROWS < 2**31
    return x if in_place else x.contiguous()


def tma_strides(x):
    """x's strides as a tensor map takes them (those of one-element dimensions are free), or None if it cannot."""
    B, H, T, D = x.shape
    stride_b, stride_h, stride_t, _ = x.stride()
    free, size = max(16, D), x.element_size()
    stride_b, stride_h, stride_t = stride_b if B > 1 else free, stride_h if H > 1 else free, stride_t if T > 1 else free
    if (stride_b * size | stride_h * size | stride_t * size | x.data_ptr()) % 16 or x.numel() == 0:
        return None
    fits = min(stride_b, stride_h, stride_t) > 0 and max(stride_b, stride_h, stride_t) * size < 2**40
    return [stride_b, stride_h, stride_t, 1] if fits else None


def plan(kernel, tensors, blocks, dropout=False):
    """(tile, kernel arguments) for (B, H, T, D) tensors that `kernel` reads in tiles of rows. `blocks` names each one's
    block: "qkk" for one walked in blocks of queries and two in blocks of keys. The arguments are tensor descriptors
    where the tile asks for them and every tensor allows it, else the tensors."""
    head_dim, first = tensors[0].shape[-1], tensors[0]
    maps = [tma_strides(x) for x in tensors]
    possible = all(m is not None for m in maps)
    tile = _tuning.attention_tile(
        kernel, _runtime.arch(first.device), head_dim, first.element_size(), dropout, possible,
        _runtime.fp32_precision(first.dtype) == "tf32",
    )  # fmt: skip
    if not tile.use_tma:
        return tile, list(tensors)
    block_d = padded_head_dim(head_dim)
    return tile, [
        TensorDescriptor(x, list(x.shape), m, [1, 1, tile.block_q if block == "q" else tile.block_k, block_d])
        for x, m, block in zip(tensors, maps, blocks, strict=True)
    ]


def strides(x):
    """Of batches, heads and tokens."""
    return x.stride()[:3]


def empty_heads(batch, heads, tokens, head_dim, like, dtype=None):
    """Uninitialized (B, H, T, D) laid out as (B, T, H, D): merging the heads afterwards is free. Where that would put a
    tile's rows more than 2^31 elements apart (see `readable`), laid out as (B, H, T, D)."""
    if heads * head_dim * MAX_TILE_ROWS >= 2**31:
        return like.new_empty((batch, heads, tokens, head_dim), dtype=dtype)
    return like.new_empty((batch, tokens, heads, head_dim), dtype=dtype).transpose(1, 2)


def heads_per_section(num_heads, streamed, programs_sharing, heads_read=1):
    """How many of `num_heads` heads run together so that the two tensors like `streamed` that they walk over stay in
    L2, when `programs_sharing` heads walk over the same ones, or each head walks over `heads_read` of them."""
    bytes_per_head = 2 * streamed.shape[2] * streamed.shape[3] * streamed.element_size() * heads_read
    return min(num_heads, programs_sharing * max(1, L2_BYTES_FOR_KV // bytes_per_head))


LOG2_E = math.log2(math.e)
