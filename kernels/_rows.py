"""What the row kernels (softmax, norms, loss) share: a tensor seen as a matrix of rows, and tiles of that matrix.

A tile is (ROWS, BLOCK_N) elements in fp32. ALIGN is a power of two that divides the row length and every row stride:
loads and stores are masked in groups of ALIGN columns, so that the compiler may move 16 bytes with one instruction
also where Triton's own argument specialization (multiples of 16 elements) sees nothing to use.

Rows too long for registers are normalized online (`max_and_sum`: Milakov and Gimelshein, "Online normalizer calculation
for softmax", 2018). Sums over rows, of which every program holds a part, are added up by `sum_partials`, always in the
same order.
"""

import math

import torch
import triton
import triton.language as tl

from kernels import _tuning
from kernels._runtime import cast, cdiv, launch


def as_rows(x):
    """x (..., N) as a matrix (rows, N) of unit inner stride: a view where the strides allow it, else one copy."""
    n_cols = x.shape[-1]
    matrix = x if x.dim() == 2 else x.reshape(x.numel() // n_cols, n_cols)
    return matrix if matrix.stride(1) == 1 or n_cols == 1 else matrix.contiguous()


def empty_rows(x, dtype):
    """Uninitialized, contiguous, of x's shape."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def alignment(*matrices):
    """Columns per group: the largest power of two, up to 8, that divides the row length and every row stride."""
    return math.gcd(8, *(m.shape[1] for m in matrices), *(m.stride(0) for m in matrices))


@triton.jit
def row_offsets(rows, stride, cols, ALIGN: tl.constexpr):
    """Offsets of a tile's elements; rows are int64, for a tensor may hold more than 2^31 elements."""
    return rows[:, None] * (stride // ALIGN * ALIGN) + cols[None, :]  # says aloud that ALIGN divides the stride


@triton.jit
def column_mask(cols, lengths, ALIGN: tl.constexpr):
    """Columns below each row's length, rounded up to whole groups of ALIGN."""
    return (cols // ALIGN * ALIGN)[None, :] < lengths[:, None]


@triton.jit
def load_tile(ptr, rows, stride, cols, lengths, ALIGN: tl.constexpr, EVICT: tl.constexpr):
    """Tile in fp32, zero beyond each row's length (rounded up to a group of ALIGN)."""
    mask = column_mask(cols, lengths, ALIGN)
    x = tl.load(ptr + row_offsets(rows, stride, cols, ALIGN), mask=mask, other=0.0, eviction_policy=EVICT)
    return x.to(tl.float32)


@triton.jit
def load_visible(ptr, rows, stride, cols, lengths, OTHER, ALIGN: tl.constexpr, EVICT: tl.constexpr):
    """Tile in fp32, OTHER beyond each row's length."""
    x = load_tile(ptr, rows, stride, cols, lengths, ALIGN, EVICT)
    return tl.where(cols[None, :] < lengths[:, None], x, OTHER)


@triton.jit
def finite_or_zero(m):
    """A maximum that can be subtracted from -inf: zero where a row has seen nothing but -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def max_and_sum(
    x_ptr, rows, stride, lengths, exponent_scale, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """m = max(x) and l = sum(exp2((x - m) * exponent_scale)) of each row, both (ROWS,), in one pass over its blocks."""
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS, BLOCK_N), tl.float32)  # one sum per lane: summed across lanes once, at the end
    for start in range(0, tl.max(lengths, axis=0), BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = load_visible(x_ptr, rows, stride, cols, lengths, float("-inf"), ALIGN, "evict_last")
        m_new = tl.maximum(m, tl.max(x, axis=1))
        m_safe = finite_or_zero(m_new)
        shrink = tl.exp2((m - m_safe) * exponent_scale)
        l = l * shrink[:, None] + tl.exp2((x - m_safe[:, None]) * exponent_scale)
        m = m_new
    return m, tl.sum(l, axis=1)


@triton.jit
def store_tile(ptr, x, rows, stride, cols, lengths, ALIGN: tl.constexpr):
    """Round a tile to the tensor's dtype and store each row up to its length."""
    mask = column_mask(cols, lengths, ALIGN)
    tl.store(ptr + row_offsets(rows, stride, cols, ALIGN), cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_partials(partials_ptr, out_ptr, n_partials, n_cols, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (n_cols,) = sum of partials (n_partials, n_cols) for this program's columns."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, n_partials, BLOCK_P):
        partials = start + tl.arange(0, BLOCK_P)
        mask = (partials < n_partials)[:, None] & (cols < n_cols)[None, :]
        total += tl.load(partials_ptr + partials[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, cast(tl.sum(total, axis=0), out_ptr.dtype.element_ty), mask=cols < n_cols)


@triton.jit
def sum_partials_kernel(
    partials_0_ptr,  # (n_partials, n_cols) fp32
    partials_1_ptr,  # likewise, for the second row of programs
    sum_0_ptr,  # (n_cols,)
    sum_1_ptr,
    n_partials,
    n_cols,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if tl.program_id(1) == 0:
        add_partials(partials_0_ptr, sum_0_ptr, n_partials, n_cols, BLOCK_P, BLOCK_N)
    else:
        add_partials(partials_1_ptr, sum_1_ptr, n_partials, n_cols, BLOCK_P, BLOCK_N)


def sum_partials(key, pairs):
    """For one or two pairs (partials (P, N) in fp32, sum (N,)): sum becomes that of the rows of partials.

    `key`: the tuning tables' key of the architecture.
    """
    if not pairs:
        return
    partials, sums = zip(*pairs, strict=True)
    n_partials, n_cols = partials[0].shape
    block_p, block_n, num_warps = _tuning.PARTIALS_TILE[_tuning.table_arch(key, _tuning.PARTIALS_TILE)]
    launch(
        sum_partials_kernel,
        (cdiv(n_cols, block_n), len(pairs)),
        *(partials[0], partials[-1], sums[0], sums[-1], n_partials, n_cols),
        num_warps=num_warps,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
    )
