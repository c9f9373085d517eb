"""LayerNorm and RMSNorm over the last dimension, with or without the residual add before them, forward and backward.

Forward, for a row h = x (+ residual), in fp32, with var the biased variance and w, b optional:

    xhat = (h - mean) * rstd        rstd = 1 / sqrt(var + eps)        y = xhat * w + b
    RMSNorm: mean = 0, var = the mean of squares

A mean of 1e4 has no room in fp32 for the digits that matter to a row of unit variance. So it is kept as mean + low,
where `mean` is any float near it and `low` the mean of h - mean, a difference that is exact. Saved: h, and per row
rstd, mean and low (RMSNorm: rstd).

Backward, with dh_out the gradient of the second output x + residual:

    g  = dy * w
    dh = rstd * (g - mean(g) - xhat * mean(g * xhat)) (+ dh_out)           RMSNorm: without the term mean(g)
    dw = sum over rows of dy * xhat        db = sum over rows of dy

Forward: one program holds a tile of whole rows, or walks one long row twice in blocks. Backward: a fixed number of
programs share the tiles of rows in turn; dh is written tile by tile, while a program's share of dw and db stays in
registers until its last tile and leaves as one row of `partials`, which `sum_partials` adds up. No atomics, no
locks: on one machine the same input gives the same bits. Rows too long for this (`_tuning`) are split by columns:
`norm_row_sums_kernel` first finds both means of every row, and then each program keeps the sums of its own columns.

Bytes, for R rows of N elements of s bytes (R N s = one tensor; weights and statistics, 12 R, are small beside it):

    forward    read x, write y                          2 R N s   (+ read residual, write h: 4 R N s)
               longer rows read their inputs again, from the cache
    backward   read dy and h, write dh                  3 R N s   (+ read dh_out: 4 R N s)
               longer rows: dy and h twice              5 R N s   (6 R N s)
               dw and db: P programs write and read     8 P N each, P a few times the number of multiprocessors

Supported: float32, float16, bfloat16, mixed between rows and weights; any strides (read in place when the innermost
is 1 and the leading dimensions collapse to one row stride, else copied once); any row length.
Sources: Ba, Kiros, Hinton, "Layer Normalization", 2016; Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

import math

import torch
import triton
import triton.language as tl

from kernels import _runtime, _tuning
from kernels._rows import alignment, as_rows, empty_rows, load_tile, store_tile, sum_partials
from kernels._runtime import TL_DTYPES, arch, autocast_dtype, cast, cdiv, check_tensors, launch


@triton.jit
def load_columns(ptr, cols, n_cols, ALIGN: tl.constexpr):
    """A weight or bias in fp32, (1, BLOCK_N), or (ROWS, BLOCK_N) from a column of pointers; kept in the cache."""
    mask = (cols // ALIGN * ALIGN < n_cols)[None, :]
    return tl.load(ptr + cols[None, :], mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def load_sum(
    x_ptr,
    residual_ptr,
    rows,
    stride_x,
    stride_r,
    cols,
    lengths,
    H_DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    EVICT: tl.constexpr,
):
    """h = x + residual as the second output will hold it, rounded; x alone without a residual."""
    h = load_tile(x_ptr, rows, stride_x, cols, lengths, ALIGN, EVICT)
    if residual_ptr is not None:
        h += load_tile(residual_ptr, rows, stride_r, cols, lengths, ALIGN, EVICT)
        h = cast(h, H_DTYPE).to(tl.float32)
    return h


@triton.jit
def scale_shift(xhat, weight_ptr, bias_ptr, cols, n_cols, ALIGN: tl.constexpr):
    """xhat * w + b, each optional."""
    if weight_ptr is not None:
        xhat *= load_columns(weight_ptr, cols, n_cols, ALIGN)
    if bias_ptr is not None:
        xhat += load_columns(bias_ptr, cols, n_cols, ALIGN)
    return xhat


@triton.jit
def store_statistics(stats_ptr, rows, n_rows, mean, low, rstd, RMS: tl.constexpr):
    """stats (3, n_rows): rstd, mean, low; RMSNorm (1, n_rows): rstd."""
    tl.store(stats_ptr + rows, rstd, mask=rows < n_rows)
    if not RMS:
        tl.store(stats_ptr + rows + n_rows, mean, mask=rows < n_rows)
        tl.store(stats_ptr + rows + n_rows + n_rows, low, mask=rows < n_rows)


@triton.jit
def normalize(h, stats_ptr, rows, n_rows, RMS: tl.constexpr):
    """xhat and rstd of a tile from saved statistics."""
    rstd = tl.load(stats_ptr + rows, mask=rows < n_rows, other=0.0)
    if not RMS:
        mean = tl.load(stats_ptr + rows + n_rows, mask=rows < n_rows, other=0.0)
        low = tl.load(stats_ptr + rows + n_rows + n_rows, mask=rows < n_rows, other=0.0)
        h = (h - mean[:, None]) - low[:, None]
    return h * rstd[:, None], rstd


@triton.jit
def norm_forward_kernel(
    x_ptr,  # (n_rows, n_cols), row stride stride_x
    residual_ptr,  # likewise with stride_r, or None
    weight_ptr,  # (n_cols,) or None
    bias_ptr,  # (n_cols,) or None
    y_ptr,  # (n_rows, n_cols), row stride n_cols
    h_ptr,  # likewise, or None without a residual
    stats_ptr,
    stride_x,
    stride_r,
    n_rows,
    n_cols,
    eps,
    RMS: tl.constexpr,
    H_DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    lengths = tl.where(rows < n_rows, n_cols, 0)
    h = load_sum(x_ptr, residual_ptr, rows, stride_x, stride_r, cols, lengths, H_DTYPE, ALIGN, "evict_first")
    mean = tl.zeros((ROWS,), tl.float32)
    low = mean
    centred = h
    if not RMS:
        mean = tl.sum(h, axis=1) / n_cols
        centred = tl.where(cols[None, :] < n_cols, h - mean[:, None], 0.0)
        low = tl.sum(centred, axis=1) / n_cols
        centred = tl.where(cols[None, :] < n_cols, centred - low[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)
    y = scale_shift(centred * rstd[:, None], weight_ptr, bias_ptr, cols, n_cols, ALIGN)
    store_tile(y_ptr, y, rows, n_cols, cols, lengths, ALIGN)
    if h_ptr is not None:
        store_tile(h_ptr, h, rows, n_cols, cols, lengths, ALIGN)
    store_statistics(stats_ptr, rows, n_rows, mean, low, rstd, RMS)


@triton.jit
def norm_forward_blocks_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    stats_ptr,
    stride_x,
    stride_r,
    n_rows,
    n_cols,
    eps,
    RMS: tl.constexpr,
    H_DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lengths = tl.where(rows < n_rows, n_cols, 0)
    cols = tl.arange(0, BLOCK_N)
    mean = tl.zeros((ROWS,), tl.float32)
    low = mean
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        h = load_sum(x_ptr, residual_ptr, rows, stride_x, stride_r, start + cols, lengths, H_DTYPE, ALIGN, "evict_last")
        if not RMS and start == 0:
            mean = tl.sum(h, axis=1) / BLOCK_N  # of the first block: near enough to the row's, see `low`
        centred = tl.where((start + cols)[None, :] < n_cols, h - mean[:, None], 0.0)
        sums += centred
        squares += centred * centred
    if not RMS:
        low = tl.sum(sums, axis=1) / n_cols
    variance = tl.maximum(tl.sum(squares, axis=1) / n_cols - low * low, 0.0)
    rstd = 1.0 / tl.sqrt(variance + eps)
    last = (n_cols - 1) // BLOCK_N * BLOCK_N
    for back in range(0, n_cols, BLOCK_N):  # backwards: what was read last is still in the cache
        block = last - back + cols
        h = load_sum(x_ptr, residual_ptr, rows, stride_x, stride_r, block, lengths, H_DTYPE, ALIGN, "evict_first")
        xhat = ((h - mean[:, None]) - low[:, None]) * rstd[:, None]
        y = scale_shift(xhat, weight_ptr, bias_ptr, block, n_cols, ALIGN)
        store_tile(y_ptr, y, rows, n_cols, block, lengths, ALIGN)
        if h_ptr is not None:
            store_tile(h_ptr, h, rows, n_cols, block, lengths, ALIGN)
    store_statistics(stats_ptr, rows, n_rows, mean, low, rstd, RMS)


@triton.jit
def norm_row_sums_kernel(
    dy_ptr,
    h_ptr,
    weight_ptr,
    stats_ptr,
    means_ptr,  # (2, n_rows) out: mean(g * xhat), mean(g)
    stride_dy,
    stride_h,
    n_rows,
    n_cols,
    RMS: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lengths = tl.where(rows < n_rows, n_cols, 0)
    sum_gx = tl.zeros((ROWS, BLOCK_N), tl.float32)
    sum_g = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g = load_tile(dy_ptr, rows, stride_dy, cols, lengths, ALIGN, "")
        if weight_ptr is not None:
            g *= load_columns(weight_ptr, cols, n_cols, ALIGN)
        h = load_tile(h_ptr, rows, stride_h, cols, lengths, ALIGN, "")
        xhat, _ = normalize(h, stats_ptr, rows, n_rows, RMS)
        sum_gx += g * xhat
        sum_g += g
    tl.store(means_ptr + rows, tl.sum(sum_gx, axis=1) / n_cols, mask=rows < n_rows)
    tl.store(means_ptr + rows + n_rows, tl.sum(sum_g, axis=1) / n_cols, mask=rows < n_rows)


@triton.jit
def norm_backward_kernel(
    dy_ptr,  # (n_rows, n_cols), row stride stride_dy
    dh_out_ptr,  # likewise with stride_dh, or None
    h_ptr,  # likewise with stride_h
    weight_ptr,  # (n_cols,) or None
    stats_ptr,
    means_ptr,  # (2, n_rows), or None where this program sees whole rows
    dh_ptr,  # (n_rows, n_cols), row stride n_cols
    dweight_ptr,  # (programs, n_cols) fp32, or None where not wanted
    dbias_ptr,  # likewise
    stride_dy,
    stride_dh,
    stride_h,
    n_rows,
    n_cols,
    RMS: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # on the axis that has room for any number of them
    if weight_ptr is not None:  # a whole tile of it: it then has the layout of the others, and stays in registers
        w = load_columns(weight_ptr + tl.zeros((ROWS, 1), tl.int32), cols, n_cols, ALIGN)
    dweight = tl.zeros((ROWS, BLOCK_N), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_N), tl.float32)
    # STAGES - 1 tiles are on their way through shared memory while one is worked on.
    for tile in tl.range(tl.program_id(1), tl.cdiv(n_rows, ROWS), tl.num_programs(1), num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        lengths = tl.where(rows < n_rows, n_cols, 0)
        dy = load_tile(dy_ptr, rows, stride_dy, cols, lengths, ALIGN, "")
        h = load_tile(h_ptr, rows, stride_h, cols, lengths, ALIGN, "")
        xhat, rstd = normalize(h, stats_ptr, rows, n_rows, RMS)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        g = dy
        if weight_ptr is not None:
            g = dy * w
        if means_ptr is None:
            mean_gx = tl.sum(g * xhat, axis=1) / n_cols
        else:
            mean_gx = tl.load(means_ptr + rows, mask=rows < n_rows, other=0.0)
        dh = g - xhat * mean_gx[:, None]
        if not RMS:
            if means_ptr is None:
                mean_g = tl.sum(g, axis=1) / n_cols
            else:
                mean_g = tl.load(means_ptr + rows + n_rows, mask=rows < n_rows, other=0.0)
            dh -= mean_g[:, None]
        dh *= rstd[:, None]
        if dh_out_ptr is not None:
            dh += load_tile(dh_out_ptr, rows, stride_dh, cols, lengths, ALIGN, "")
        store_tile(dh_ptr, dh, rows, n_cols, cols, lengths, ALIGN)
    partial = tl.program_id(1).to(tl.int64) * n_cols + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=cols < n_cols)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=cols < n_cols)


# ---- launchers -------------------------------------------------------------------------------------------------------


def norm_forward(x, residual, weight, bias, eps, rms, dtype):
    """x, residual (..., N) -> y in `dtype`; h = x + residual in their promoted dtype (no elements without a residual);
    statistics, fp32 (3, rows), RMSNorm (1, rows)."""
    n_cols = x.shape[-1]
    n_rows = math.prod(x.shape[:-1])
    y = empty_rows(x, dtype)
    h = x.new_empty(0) if residual is None else empty_rows(x, _sum_dtype(x, residual))
    stats = x.new_empty((1 if rms else 3, n_rows), dtype=torch.float32)
    if x.numel() == 0:
        return y, h, stats
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    inputs = [None if t is None else as_rows(t) for t in (x, residual)]
    tile = _tuning.row_tile(arch(x.device), "norm_forward", n_cols)
    launch(
        norm_forward_kernel if tile.holds_row else norm_forward_blocks_kernel,
        (cdiv(n_rows, tile.rows),),
        *(*inputs, weight, bias, y, None if residual is None else h, stats, *_row_strides(inputs), n_rows, n_cols, eps),
        num_warps=tile.num_warps,
        RMS=rms,
        H_DTYPE=TL_DTYPES[h.dtype],
        ALIGN=alignment(*(t for t in inputs if t is not None)),
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
    )
    return y, h, stats


def norm_backward(dy, dh_out, h, stats, weight, rms, dweight_dtype, dbias_dtype):
    """dy and dh_out (or None), h (..., N) -> dh in h's dtype; dweight and dbias (N,) in the dtypes given (no elements
    where that is None)."""
    n_cols = h.shape[-1]
    dh = empty_rows(h, h.dtype)
    dweight, dbias = (_sums_like(h, dtype) for dtype in (dweight_dtype, dbias_dtype))
    if h.numel() == 0:
        return dh, dweight.zero_(), dbias.zero_()
    weight = None if weight is None else weight.contiguous()
    grads = [None if t is None else as_rows(t) for t in (dy, dh_out, h)]
    n_rows = grads[0].shape[0]
    key = arch(h.device)
    tile = _tuning.row_tile(key, "norm_backward", n_cols)
    column_blocks = cdiv(n_cols, tile.block_n)
    programs = cdiv(_runtime.multiprocessors(h.device) * _tuning.persistent_programs(tile), column_blocks)
    programs = min(programs, cdiv(n_rows, tile.rows))
    partials = [
        None if dtype is None else h.new_empty((programs, n_cols), dtype=torch.float32)
        for dtype in (dweight_dtype, dbias_dtype)
    ]
    means = None if tile.holds_row else _row_means(grads[0], grads[2], weight, stats, rms, tile)
    launch(
        norm_backward_kernel,
        (column_blocks, programs),
        *(*grads, weight, stats, means, dh, *partials, *_row_strides(grads), n_rows, n_cols),
        num_warps=tile.num_warps,
        RMS=rms,
        ALIGN=alignment(*(t for t in grads if t is not None)),
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
        STAGES=_tuning.pipeline_stages(key, tile, sum(t.element_size() for t in grads if t is not None)),
    )
    sum_partials(key, [(p, out) for p, out in zip(partials, (dweight, dbias), strict=True) if p is not None])
    return dh, dweight, dbias


def _row_means(dy, h, weight, stats, rms, tile):
    """mean(g * xhat) and mean(g) of every row, (2, rows)."""
    n_rows, n_cols = h.shape
    means = h.new_empty((2, n_rows), dtype=torch.float32)
    launch(
        norm_row_sums_kernel,
        (cdiv(n_rows, tile.rows),),
        *(dy, h, weight, stats, means, *_row_strides((dy, h)), n_rows, n_cols),
        num_warps=tile.num_warps,
        RMS=rms,
        ALIGN=alignment(dy, h),
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
    )
    return means


def _row_strides(matrices):
    return [0 if m is None else m.stride(0) for m in matrices]


def _sums_like(h, dtype):
    """(N,) for the sum of rows like h's, or no elements where it is not wanted."""
    return h.new_empty(0 if dtype is None else h.shape[-1], dtype=dtype or torch.float32)


# ---- registration ----------------------------------------------------------------------------------------------------


def _sum_dtype(x, residual):
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _forward_fake(x, residual, weight, bias, eps, rms, dtype):
    y = empty_rows(x, dtype)
    h = x.new_empty(0) if residual is None else empty_rows(x, _sum_dtype(x, residual))
    rows = math.prod(x.shape[:-1])
    return y, h, x.new_empty((1 if rms else 3, rows), dtype=torch.float32)


def _backward_fake(dy, dh_out, h, stats, weight, rms, dweight_dtype, dbias_dtype):
    dh = empty_rows(h, h.dtype)
    return dh, _sums_like(h, dweight_dtype), _sums_like(h, dbias_dtype)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.rms, _ = inputs
    _, h, stats = output
    ctx.save_for_backward(x if residual is None else h, stats, weight)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
    ctx.mark_non_differentiable(stats, *([h] if residual is None else []))
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh_out, _):
    h, stats, weight = ctx.saved_tensors
    x_dtype, residual_dtype, weight_dtype, bias_dtype = ctx.dtypes
    needs = ctx.needs_input_grad
    dh, dweight, dbias = dh_out, None, None
    if dy is not None:
        dtypes = weight_dtype if needs[2] else None, bias_dtype if needs[3] else None
        dh, dweight, dbias = _norm_backward(dy, dh_out, h, stats, weight, ctx.rms, *dtypes)
    dx = dh.to(x_dtype) if dh is not None and needs[0] else None
    dresidual = dh.to(residual_dtype) if dh is not None and needs[1] else None
    return dx, dresidual, dweight if needs[2] else None, dbias if needs[3] else None, None, None, None


_norm_backward = _runtime.register_op(
    "norm_backward",
    "(Tensor dy, Tensor? dh_out, Tensor h, Tensor stats, Tensor? weight, bool rms, ScalarType? dweight_dtype, "
    "ScalarType? dbias_dtype) -> (Tensor, Tensor, Tensor)",
    norm_backward,
    _backward_fake,
)
_norm = _runtime.register_op(
    "norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, ScalarType dtype) -> "
    "(Tensor, Tensor, Tensor)",
    norm_forward,
    _forward_fake,
    _setup_context,
    _backward,
)


# ---- public ----------------------------------------------------------------------------------------------------------


def layer_norm(x, weight, bias, eps=1e-5):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, with the biased variance.

    Args:
        x: (..., N), float32, float16 or bfloat16, any strides.
        weight, bias: (N,) of any of these dtypes, or None.
        eps: added to the variance, not negative.

    Returns:
        (..., N), contiguous, in x's dtype (under autocast, in the autocast dtype); computed in fp32.

    Raises:
        ValueError: wrong types, dtypes, shapes or devices, or tensors where the kernels cannot run.
        NotImplementedError: second derivatives, forward-mode derivatives, vmap.
    """
    _check("layer_norm", eps, x, weight, bias)
    return _norm(x, None, weight, bias, float(eps), False, autocast_dtype(x) or x.dtype)[0]


def add_layer_norm(x, residual, weight, bias, eps=1e-5):
    """The residual add and the norm after it in one pass: (layer_norm(x + residual), x + residual).

    Args:
        x, residual: (..., N) of one shape, float32, float16 or bfloat16, any strides.
        weight, bias, eps: as for layer_norm.

    Returns:
        normed: (..., N), contiguous, in the dtype of the sum (under autocast, in the autocast dtype); computed in fp32
            from the rounded sum.
        sum: (..., N), contiguous, in the promoted dtype of x and residual. Gradients of both outputs are followed.

    Raises:
        ValueError, NotImplementedError: as for layer_norm.
    """
    _check("add_layer_norm", eps, x, weight, bias, residual=residual)
    dtype = autocast_dtype(x) or _sum_dtype(x, residual)
    return _norm(x, residual, weight, bias, float(eps), False, dtype)[:2]


def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: (..., N), float32, float16 or bfloat16, any strides.
        weight: (N,) of any of these dtypes, or None.
        eps: added to the mean square, not negative.

    Returns:
        (..., N), contiguous, in x's dtype (under autocast, in the autocast dtype); computed in fp32.

    Raises:
        ValueError, NotImplementedError: as for layer_norm.
    """
    _check("rms_norm", eps, x, weight)
    return _norm(x, None, weight, None, float(eps), True, autocast_dtype(x) or x.dtype)[0]


def _check(op, eps, x, weight, bias=None, **residual):
    """ValueError unless the arguments of a norm fit together."""
    affine = {name: t for name, t in (("weight", weight), ("bias", bias)) if t is not None}
    check_tensors(op, x=x, **residual, **affine)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has no dimension; it needs at least one, (..., N)")
    for name, t in residual.items():
        if t.shape != x.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; x has {tuple(x.shape)}, and they must agree")
    for name, t in affine.items():
        if t.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; rows of x have {x.shape[-1]} elements")
    if not (isinstance(eps, int | float) and 0 <= eps < math.inf):
        raise ValueError(f"{op}: eps is {eps!r}; it must be a finite number, zero or more")
