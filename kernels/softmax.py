"""Softmax over the last dimension, and the scaled causal softmax of attention scores, forward and backward.

Forward, for a row x and a factor c = scale * log2(e), in fp32:

    m = max(x)        p = exp2((x - m) * c)        l = sum(p)        y = p / l

Subtracting before scaling keeps the difference exact where the maximum is large. Backward, from the saved output alone:

    dx = scale * y * (dy - sum(y * dy))

Causal rows: row i of Tq queries sees the first i + 1 + Tk - Tq keys (aligned at the bottom right); what lies to the
right is zero in y and in dx. It has no influence, whatever it holds: loads stop at the group of at most 8 elements
(16 bytes) that holds the diagonal, and nothing beyond the diagonal is used.

One program holds a tile of whole rows in registers: many short rows, or one long row. Rows too long for that (the
tables in `_tuning`) are read twice in blocks: the first pass keeps a running maximum and rescales the running sum when
the maximum grows (`_rows.max_and_sum`), the second writes. It walks backwards, so that what was read last is met first
in the cache.

Bytes, for R rows of N elements of s bytes (R N s = one tensor):

    forward    read x, write y           2 R N s     longer rows: 3 R N s, of which the second read comes from the cache
    backward   read y and dy, write dx   3 R N s     longer rows: 5 R N s, likewise
    causal     the reads are halved: of T x T scores only the T (T + 1) / 2 on and below the diagonal are read; all of
               y and dx is written, once, the zeros by the same store as the values.

Supported: float32, float16, bfloat16; any strides (read in place when the innermost is 1 and the leading dimensions
collapse to one row stride, else copied once); any row length; rows and elements beyond 2^31.
"""

import math

import triton
import triton.language as tl

from kernels import _tuning
from kernels._rows import alignment, as_rows, empty_rows, finite_or_zero, load_visible, max_and_sum, store_tile
from kernels._runtime import arch, autocast_dtype, cdiv, check_tensors, launch, register_op

LOG2_E = math.log2(math.e)


@triton.jit
def visible_columns(rows, n_rows, n_cols, n_queries, CAUSAL: tl.constexpr):
    """How many leading columns each row sees: none for rows past the end."""
    if CAUSAL:
        visible = rows % n_queries + 1 + n_cols - n_queries
    else:
        visible = n_cols
    return tl.where(rows < n_rows, visible, 0)


@triton.jit
def softmax_forward_kernel(
    x_ptr,  # (n_rows, n_cols), row stride stride_x
    y_ptr,  # (n_rows, n_cols), row stride n_cols
    stride_x,
    n_rows,
    n_cols,
    n_queries,
    exponent_scale,
    CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    visible = visible_columns(rows, n_rows, n_cols, n_queries, CAUSAL)  # (ROWS,)
    x = load_visible(x_ptr, rows, stride_x, cols, visible, float("-inf"), ALIGN, "evict_first")
    m = tl.max(x, axis=1)
    if CAUSAL:
        m = finite_or_zero(m)
    p = tl.exp2((x - m[:, None]) * exponent_scale)
    l = tl.sum(p, axis=1)
    if CAUSAL:
        l = tl.where(l == 0.0, 1.0, l)  # nothing to attend to: a row of zeros
    y = p * (1.0 / l)[:, None]
    store_tile(y_ptr, y, rows, n_cols, cols, tl.where(rows < n_rows, n_cols, 0), ALIGN)


@triton.jit
def softmax_forward_blocks_kernel(
    x_ptr,
    y_ptr,
    stride_x,
    n_rows,
    n_cols,
    n_queries,
    exponent_scale,
    CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    visible = visible_columns(rows, n_rows, n_cols, n_queries, CAUSAL)
    m, total = max_and_sum(x_ptr, rows, stride_x, visible, exponent_scale, ALIGN, ROWS, BLOCK_N)
    if CAUSAL:
        m = finite_or_zero(m)
        total = tl.where(total == 0.0, 1.0, total)
    lengths = tl.where(rows < n_rows, n_cols, 0)
    last = (n_cols - 1) // BLOCK_N * BLOCK_N
    for back in range(0, n_cols, BLOCK_N):
        cols = last - back + tl.arange(0, BLOCK_N)
        x = load_visible(x_ptr, rows, stride_x, cols, visible, float("-inf"), ALIGN, "evict_first")
        y = tl.exp2((x - m[:, None]) * exponent_scale) * (1.0 / total)[:, None]
        store_tile(y_ptr, y, rows, n_cols, cols, lengths, ALIGN)


@triton.jit
def softmax_backward_kernel(
    y_ptr,  # (n_rows, n_cols), row stride stride_y
    dy_ptr,  # (n_rows, n_cols), row stride stride_dy
    dx_ptr,  # (n_rows, n_cols), row stride n_cols
    stride_y,
    stride_dy,
    n_rows,
    n_cols,
    n_queries,
    scale,
    CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    visible = visible_columns(rows, n_rows, n_cols, n_queries, CAUSAL)
    y = load_visible(y_ptr, rows, stride_y, cols, visible, 0.0, ALIGN, "evict_first")
    dy = load_visible(dy_ptr, rows, stride_dy, cols, visible, 0.0, ALIGN, "evict_first")
    dot = tl.sum(y * dy, axis=1)
    dx = scale * y * (dy - dot[:, None])
    store_tile(dx_ptr, dx, rows, n_cols, cols, tl.where(rows < n_rows, n_cols, 0), ALIGN)


@triton.jit
def softmax_backward_blocks_kernel(
    y_ptr,
    dy_ptr,
    dx_ptr,
    stride_y,
    stride_dy,
    n_rows,
    n_cols,
    n_queries,
    scale,
    CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    visible = visible_columns(rows, n_rows, n_cols, n_queries, CAUSAL)
    products = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, tl.max(visible, axis=0), BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        y = load_visible(y_ptr, rows, stride_y, cols, visible, 0.0, ALIGN, "evict_last")
        dy = load_visible(dy_ptr, rows, stride_dy, cols, visible, 0.0, ALIGN, "evict_last")
        products += y * dy
    dot = tl.sum(products, axis=1)
    lengths = tl.where(rows < n_rows, n_cols, 0)
    last = (n_cols - 1) // BLOCK_N * BLOCK_N
    for back in range(0, n_cols, BLOCK_N):
        cols = last - back + tl.arange(0, BLOCK_N)
        y = load_visible(y_ptr, rows, stride_y, cols, visible, 0.0, ALIGN, "evict_first")
        dy = load_visible(dy_ptr, rows, stride_dy, cols, visible, 0.0, ALIGN, "evict_first")
        store_tile(dx_ptr, scale * y * (dy - dot[:, None]), rows, n_cols, cols, lengths, ALIGN)


# ---- launchers -------------------------------------------------------------------------------------------------------


def softmax_forward(x, scale, causal, dtype):
    """x (..., N), or (..., Tq, Tk) when causal -> y in `dtype`, contiguous."""
    y = empty_rows(x, dtype)
    if x.numel() == 0:
        return y
    matrix = as_rows(x)
    n_rows, n_cols = matrix.shape
    tile = _tuning.row_tile(arch(x.device), "softmax_forward", n_cols)
    launch(
        softmax_forward_kernel if tile.holds_row else softmax_forward_blocks_kernel,
        (cdiv(n_rows, tile.rows),),
        *(matrix, y, matrix.stride(0), n_rows, n_cols, x.shape[-2] if causal else 1, scale * LOG2_E),
        num_warps=tile.num_warps,
        CAUSAL=causal,
        ALIGN=alignment(matrix),
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
    )
    return y


def softmax_backward(y, dy, scale, causal, dtype):
    """y, dy (..., N) -> dx in `dtype`, contiguous."""
    dx = empty_rows(y, dtype)
    if y.numel() == 0:
        return dx
    y_rows, dy_rows = as_rows(y), as_rows(dy)
    n_rows, n_cols = y_rows.shape
    tile = _tuning.row_tile(arch(y.device), "softmax_backward", n_cols)
    strides = y_rows.stride(0), dy_rows.stride(0)
    launch(
        softmax_backward_kernel if tile.holds_row else softmax_backward_blocks_kernel,
        (cdiv(n_rows, tile.rows),),
        *(y_rows, dy_rows, dx, *strides, n_rows, n_cols, y.shape[-2] if causal else 1, scale),
        num_warps=tile.num_warps,
        CAUSAL=causal,
        ALIGN=alignment(y_rows, dy_rows),
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
    )
    return dx


# ---- registration ----------------------------------------------------------------------------------------------------


def _empty(x, *args):
    return empty_rows(x, args[-1])


def _setup_context(ctx, inputs, output):
    x, ctx.scale, ctx.causal, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy):
    if dy is None:
        return None, None, None, None
    (y,) = ctx.saved_tensors
    return _softmax_backward(y, dy, ctx.scale, ctx.causal, ctx.dtype), None, None, None


_softmax_backward = register_op(
    "softmax_backward",
    "(Tensor y, Tensor dy, float scale, bool causal, ScalarType dtype) -> Tensor",
    softmax_backward,
    _empty,
)
_softmax = register_op(
    "softmax",
    "(Tensor x, float scale, bool causal, ScalarType dtype) -> Tensor",
    softmax_forward,
    _empty,
    _setup_context,
    _backward,
)


# ---- public ----------------------------------------------------------------------------------------------------------


def softmax(x):
    """Softmax over the last dimension.

    Args:
        x: (..., N), float32, float16 or bfloat16, any strides.

    Returns:
        (..., N), contiguous, in x's dtype (under autocast, in the autocast dtype); computed in fp32. As in
        torch.softmax, -inf entries give 0 and a row of nothing but -inf gives NaN.

    Raises:
        ValueError: x is no tensor, has another dtype, has no dimension, or is where the kernels cannot run.
        NotImplementedError: second derivatives, forward-mode derivatives, vmap.
    """
    check_tensors("softmax", x=x)
    if x.dim() < 1:
        raise ValueError("softmax: x has no dimension; it needs at least one, (..., N)")
    return _softmax(x, 1.0, False, autocast_dtype(x) or x.dtype)


def causal_softmax(scores, scale):
    """softmax(scores * scale) of attention scores under a causal mask aligned at the bottom right.

    Args:
        scores: (..., Tq, Tk), float32, float16 or bfloat16, any strides. Nothing above the diagonal is used.
        scale: what the scores are multiplied with, a positive number, usually 1 / sqrt(head dimension).

    Returns:
        (..., Tq, Tk), contiguous, in scores' dtype (under autocast, in the autocast dtype); computed in fp32. Query i
        weighs keys j <= i + Tk - Tq; all else is 0. A query whose keys all score -inf gives zeros.

    Raises:
        ValueError: scores is no tensor, has another dtype, has fewer than two dimensions or more queries than keys, or
            is where the kernels cannot run; scale is not a positive finite number.
        NotImplementedError: second derivatives, forward-mode derivatives, vmap.
    """
    check_tensors("causal_softmax", scores=scores)
    if scores.dim() < 2:
        raise ValueError(f"causal_softmax: scores has shape {tuple(scores.shape)}; it must be (..., Tq, Tk)")
    if scores.shape[-2] > scores.shape[-1]:
        raise ValueError(
            f"causal_softmax: scores have {scores.shape[-2]} queries but only {scores.shape[-1]} keys; Tq <= Tk is "
            "supported, for else a query would have no key"
        )
    if not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise ValueError(f"causal_softmax: scale is {scale!r}; it must be a positive finite number")
    return _softmax(scores, float(scale), True, autocast_dtype(scores) or scores.dtype)
