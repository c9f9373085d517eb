"""What the row kernels (softmax, the norms) share: a tensor seen as a matrix of rows, and tiles of that matrix.

A tile is (ROWS, BLOCK_N) elements in fp32. ALIGN is a power of two that divides the row length and every row stride:
loads and stores are masked in groups of ALIGN columns, so that the compiler may move 16 bytes with one instruction
also where Triton's own argument specialization (multiples of 16 elements) sees nothing to use.
"""

import math

import torch
import triton
import triton.language as tl

from kernels._runtime import cast


def as_rows(x):
    """x (..., N) as a matrix (rows, N) of unit inner stride: a view where the strides allow it, else one copy."""
    n_cols = x.shape[-1]
    matrix = x.reshape(x.numel() // n_cols, n_cols)
    return matrix if matrix.stride(1) == 1 or n_cols == 1 else matrix.contiguous()


def alignment(*matrices):
    """Columns per group: the largest power of two, up to 8, that divides the row length and every row stride."""
    return math.gcd(8, *(m.shape[1] for m in matrices), *(m.stride(0) for m in matrices))


def multiprocessors(device):
    """How many programs of a persistent kernel run at once, one per multiprocessor; 4 in the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if device.type == "cpu" else 132  # meta: an H100's


@triton.jit
def row_offsets(rows, stride, cols, ALIGN: tl.constexpr):
    """Offsets of a tile's elements; rows are int64, for a tensor may hold more than 2^31 elements."""
    return rows[:, None] * (stride // ALIGN * ALIGN) + cols[None, :]  # says aloud that ALIGN divides the stride


@triton.jit
def column_mask(cols, lengths, ALIGN: tl.constexpr):
    """Columns below each row's length, rounded up to whole groups of ALIGN."""
    return (cols // ALIGN * ALIGN)[None, :] < lengths[:, None]


@triton.jit
def load_tile(ptr, rows, stride, cols, lengths, ALIGN: tl.constexpr, EVICT: tl.constexpr = ""):
    """Tile in fp32, zero beyond each row's length (rounded up to a group of ALIGN)."""
    mask = column_mask(cols, lengths, ALIGN)
    x = tl.load(ptr + row_offsets(rows, stride, cols, ALIGN), mask=mask, other=0.0, eviction_policy=EVICT)
    return x.to(tl.float32)


@triton.jit
def store_tile(ptr, x, rows, stride, cols, lengths, ALIGN: tl.constexpr):
    """Round a tile to the tensor's dtype and store each row up to its length."""
    mask = column_mask(cols, lengths, ALIGN)
    tl.store(ptr + row_offsets(rows, stride, cols, ALIGN), cast(x, ptr.dtype.element_ty), mask=mask)
