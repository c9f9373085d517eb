"""Cross-entropy of logits and targets, and the output head fused with it: the loss without the logits.

For a row x of V logits (in nats) and its target t, in fp32:

    m = max(x)     l = sum(exp(x - m))     loss = (m - x_t) + log(l)     dx_j = dloss (exp(x_j - m) / l - [j = t])

The maximum is subtracted from x_t and x_j before anything else, which is exact near it however large the logits are.
A row whose target is `ignore_index` has loss 0 and gradient 0; a target outside of [0, V) gives NaN in both.

`linear_cross_entropy` is the head x W^T and this loss, for x (R, C) and W (V, C). The R x V logits are most of the
memory of a small GPT's step (R = 16,384, V = 50,257: 1.6 GB in bf16, and at its peak eager PyTorch holds three tensors
of their size in fp32), so they exist in chunks of rows only, one after the other in one buffer:

    logits = x_chunk W^T                         matrix product (torch)
    loss, logits <- d loss / d logits            this file's kernel, in place
    dx_chunk = logits W      dW += logits^T x_chunk     matrix products (torch), accumulated in fp32

The gradients are thus made in the forward, with the FLOPs of an ordinary head, and the backward only multiplies them by
the gradient of the loss. They are made for a sum of losses; 1 / (number of targets) and dloss come last, in fp32, so
that fp16 does not underflow. Rows of the buffer start at multiples of 16 bytes whatever V is: a vocabulary of 50,257
costs the matrix products no more than a padded one.

One program owns a tile of rows. It reads them twice in blocks: for m and l (`_rows.max_and_sum`), then, walking
backwards through what the cache still holds, to write the gradient. Bytes for R rows of s-byte logits:

    forward     read                  R V s
    backward    read, write         2 R V s
    in place    read twice, write   3 R V s, the second read from the cache

Supported: float32, float16, bfloat16; int64 targets; any V up to 2^30 and any number of rows; logits of any strides.

Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024 (why the logits must go); Hsu et
al., "Liger Kernel", 2024 (chunks whose gradients are made in the forward).
"""

import math

import torch
import triton
import triton.language as tl

from kernels import _tuning
from kernels._rows import alignment, as_rows, empty_rows, load_visible, max_and_sum, store_tile
from kernels._runtime import arch, autocast_dtype, cdiv, check_tensors, launch, register_op

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
REDUCTIONS = ("mean", "sum", "none")
ROW_ALIGNMENT = 64  # elements: rows of the logits' buffer start at multiples of it,
BUFFER_ALIGN = 8  # and so its kernels may read and write groups of 8 (see `_rows`), the last of a row into the padding


# ---- what a program does with its rows -------------------------------------------------------------------------------


@triton.jit
def take_losses(
    x_ptr, target_ptr, loss_ptr, rows, stride, n_rows, n_cols, ignore_index,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the losses of rows, NaN for a target that is no column; targets, m and log2 l of each, (ROWS,)."""
    mask = rows < n_rows
    targets = tl.load(target_ptr + rows, mask=mask, other=-1)
    m, l = max_and_sum(x_ptr, rows, stride, tl.where(mask, n_cols, 0), LOG2_E, ALIGN, ROWS, BLOCK_N)
    log2_l = tl.log2(l)
    is_column = (targets >= 0) & (targets < n_cols)
    x_target = tl.load(x_ptr + rows * stride + targets, mask=is_column, other=float("nan")).to(tl.float32)
    losses = tl.where(targets == ignore_index, 0.0, (m - x_target) + log2_l * LN_2)
    tl.store(loss_ptr + rows, losses, mask=mask)
    return targets, m, log2_l


@triton.jit
def put_gradients(
    x_ptr, stride_x, dx_ptr, stride_dx, rows, cols, n_rows, n_cols, m, log2_l, targets, dloss, ignore_index,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block of logits (ROWS, BLOCK_N), for gradients dloss (ROWS,) of the losses."""
    lengths = tl.where(rows < n_rows, n_cols, 0)
    x = load_visible(x_ptr, rows, stride_x, cols, lengths, float("-inf"), ALIGN, "evict_first")
    is_column = (targets >= 0) & (targets < n_cols)
    column = tl.where(is_column, targets, -1).to(tl.int32)
    dloss = tl.where(is_column, dloss, float("nan"))
    p = tl.exp2((x - m[:, None]) * LOG2_E - log2_l[:, None])
    dx = (p - tl.where(cols[None, :] == column[:, None], 1.0, 0.0)) * dloss[:, None]
    dx = tl.where((targets == ignore_index)[:, None], 0.0, dx)
    store_tile(dx_ptr, dx, rows, stride_dx, cols, lengths, ALIGN)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def cross_entropy_forward_kernel(
    x_ptr,  # (n_rows, n_cols), row stride stride_x
    target_ptr,  # (n_rows,) int64
    loss_ptr,  # (n_rows,) fp32
    m_ptr,  # (n_rows,) fp32: the maximum of each row
    log2_l_ptr,  # (n_rows,) fp32: log2 of the sum of exp(x - m)
    stride_x,
    n_rows,
    n_cols,
    ignore_index,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    _, m, log2_l = take_losses(
        x_ptr, target_ptr, loss_ptr, rows, stride_x, n_rows, n_cols, ignore_index, ALIGN, ROWS, BLOCK_N
    )
    tl.store(m_ptr + rows, m, mask=rows < n_rows)
    tl.store(log2_l_ptr + rows, log2_l, mask=rows < n_rows)


@triton.jit
def cross_entropy_backward_kernel(
    x_ptr,  # (n_rows, n_cols), row stride stride_x
    target_ptr,  # (n_rows,) int64
    m_ptr,  # (n_rows,) fp32
    log2_l_ptr,  # (n_rows,) fp32
    dloss_ptr,  # (n_rows,) fp32
    dx_ptr,  # (n_rows, n_cols), row stride n_cols
    stride_x,
    n_rows,
    n_cols,
    ignore_index,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < n_rows
    targets = tl.load(target_ptr + rows, mask=mask, other=-1)
    m = tl.load(m_ptr + rows, mask=mask, other=0.0)
    log2_l = tl.load(log2_l_ptr + rows, mask=mask, other=0.0)
    dloss = tl.load(dloss_ptr + rows, mask=mask, other=0.0)
    for start in range(0, n_cols, BLOCK_N):
        put_gradients(
            x_ptr, stride_x, dx_ptr, n_cols, rows, start + tl.arange(0, BLOCK_N), n_rows, n_cols,
            m, log2_l, targets, dloss, ignore_index, ALIGN,
        )  # fmt: skip


@triton.jit
def loss_and_gradient_kernel(
    x_ptr,  # (n_rows, n_cols), row stride stride_x: the logits, replaced by the gradient of the sum of losses
    target_ptr,  # (n_rows,) int64
    loss_ptr,  # (n_rows,) fp32
    stride_x,
    n_rows,
    n_cols,
    ignore_index,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    targets, m, log2_l = take_losses(
        x_ptr, target_ptr, loss_ptr, rows, stride_x, n_rows, n_cols, ignore_index, ALIGN, ROWS, BLOCK_N
    )
    dloss = tl.full((ROWS,), 1.0, tl.float32)
    tl.debug_barrier()  # every thread has read the logits of the targets before any is overwritten
    last = (n_cols - 1) // BLOCK_N * BLOCK_N
    for back in range(0, n_cols, BLOCK_N):
        put_gradients(
            x_ptr, stride_x, x_ptr, stride_x, rows, last - back + tl.arange(0, BLOCK_N), n_rows, n_cols,
            m, log2_l, targets, dloss, ignore_index, ALIGN,
        )  # fmt: skip


# ---- launchers -------------------------------------------------------------------------------------------------------


def _launch(kernel, tensors, matrix, ignore_index, align):
    """`kernel` over the rows of `matrix` (R, V)."""
    n_rows, n_cols = matrix.shape
    tile = _tuning.row_tile(arch(matrix.device), "cross_entropy", n_cols)
    launch(
        kernel,
        (cdiv(n_rows, tile.rows),),
        *(*tensors, matrix.stride(0), n_rows, n_cols, ignore_index),
        num_warps=tile.num_warps,
        ALIGN=align,
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
    )


def cross_entropy_forward(logits, targets, ignore_index):
    """logits (..., V), targets (...) -> losses, m, log2_l, (R,) fp32 each."""
    matrix = as_rows(logits)
    losses, m, log2_l = (logits.new_empty(matrix.shape[0], dtype=torch.float32) for _ in range(3))
    targets = targets.reshape(-1).contiguous()
    _launch(cross_entropy_forward_kernel, (matrix, targets, losses, m, log2_l), matrix, ignore_index, alignment(matrix))
    return losses, m, log2_l


def cross_entropy_backward(dlosses, logits, targets, m, log2_l, ignore_index):
    """dlosses (R,) fp32 -> dlogits in logits' shape and dtype, contiguous."""
    matrix = as_rows(logits)
    dlogits = empty_rows(logits, logits.dtype)
    tensors = matrix, targets.reshape(-1).contiguous(), m, log2_l, dlosses.contiguous(), dlogits
    _launch(cross_entropy_backward_kernel, tensors, matrix, ignore_index, alignment(matrix))
    return dlogits


def linear_cross_entropy_forward(x, weight, targets, ignore_index, needs_dx, needs_dweight):
    """x (R, C) and weight (V, C) in one dtype, targets (R,) -> losses (R,), dx (R, C), dweight (V, C), all fp32.

    dx and dweight are those of the sum of the losses; one that is not needed has no elements.
    """
    (n_rows, width), vocabulary = x.shape, weight.shape[0]
    losses = x.new_empty(n_rows, dtype=torch.float32)
    dx = x.new_empty((n_rows, width) if needs_dx else 0, dtype=torch.float32)
    dweight = x.new_empty((vocabulary, width) if needs_dweight else 0, dtype=torch.float32)
    row_stride = cdiv(vocabulary, ROW_ALIGNMENT) * ROW_ALIGNMENT
    step = _tuning.loss_chunk_rows(arch(x.device), n_rows, row_stride * x.element_size())
    buffer = x.new_empty(min(step, n_rows), row_stride)
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        logits = buffer[: rows.stop - start, :vocabulary]
        torch.mm(x[rows], weight.T, out=logits)
        if not (needs_dx or needs_dweight):
            unused = torch.empty_like(losses[rows]), torch.empty_like(losses[rows])
            tensors = logits, targets[rows], losses[rows], *unused
            _launch(cross_entropy_forward_kernel, tensors, logits, ignore_index, BUFFER_ALIGN)
            continue
        _launch(loss_and_gradient_kernel, (logits, targets[rows], losses[rows]), logits, ignore_index, BUFFER_ALIGN)
        if needs_dx:
            product(logits, weight, dx[rows])
        if needs_dweight:
            product(logits.T, x[rows], dweight, accumulate=start > 0)
    return losses, dx, dweight if n_rows else dweight.zero_()


def product(a, b, out, accumulate=False):
    """out = a b, or out += a b, with out in fp32 whatever the dtype of a and b."""
    in_fp32 = torch.backends.cuda.matmul.allow_fp16_accumulation and a.dtype == torch.float16  # cuBLAS then refuses
    if a.device.type == "cuda" and a.dtype != torch.float32 and not in_fp32:
        if accumulate:
            torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    elif accumulate:
        out.addmm_(a.float(), b.float())
    else:
        torch.mm(a.float(), b.float(), out=out)


# ---- registration ----------------------------------------------------------------------------------------------------


def _fake_forward(logits, targets, ignore_index):
    n_rows = targets.numel()
    return tuple(logits.new_empty(n_rows, dtype=torch.float32) for _ in range(3))


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.ignore_index = inputs
    _, m, log2_l = output
    ctx.save_for_backward(logits, targets, m, log2_l)
    ctx.set_materialize_grads(False)


def _backward(ctx, dlosses, *_):
    if dlosses is None:
        return None, None, None
    return _cross_entropy_backward(dlosses, *ctx.saved_tensors, ctx.ignore_index), None, None


_cross_entropy_backward = register_op(
    "cross_entropy_backward",
    "(Tensor dlosses, Tensor logits, Tensor targets, Tensor m, Tensor log2_l, int ignore_index) -> Tensor",
    cross_entropy_backward,
    lambda dlosses, logits, *_: empty_rows(logits, logits.dtype),
)
_cross_entropy = register_op(
    "cross_entropy",
    "(Tensor logits, Tensor targets, int ignore_index) -> (Tensor, Tensor, Tensor)",
    cross_entropy_forward,
    _fake_forward,
    _setup_context,
    _backward,
)


def _run_linear(x, weight, targets, ignore_index, mean, dtype, needs_dx, needs_dweight):
    """-> loss (), factor () that the gradients still lack, dx, dweight."""
    losses, dx, dweight = linear_cross_entropy_forward(
        as_rows(x.to(dtype)), as_rows(weight.to(dtype)), targets.contiguous(), ignore_index, needs_dx, needs_dweight
    )
    count = (targets != ignore_index).sum(dtype=torch.float32) if mean else losses.new_ones(())
    return losses.sum() / count, count.clamp(min=1).reciprocal(), dx, dweight


def _fake_linear(x, weight, targets, ignore_index, mean, dtype, needs_dx, needs_dweight):
    scalars = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    dx = x.new_empty(x.shape if needs_dx else 0, dtype=torch.float32)
    dweight = weight.new_empty(weight.shape if needs_dweight else 0, dtype=torch.float32)
    return *scalars, dx, dweight


def _setup_linear(ctx, inputs, output):
    x, weight, *_, needs_dx, needs_dweight = inputs
    ctx.save_for_backward(*output[1:])
    ctx.dtypes, ctx.needed = (x.dtype, weight.dtype), (needs_dx, needs_dweight)
    ctx.set_materialize_grads(False)


def _backward_linear(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 8
    gradients = _scale_gradients(dloss, *ctx.saved_tensors, *ctx.dtypes)
    return *(g if needed else None for g, needed in zip(gradients, ctx.needed, strict=True)), *[None] * 6


def _run_scale(dloss, factor, dx, dweight, x_dtype, weight_dtype):
    factor = dloss * factor
    return (dx * factor).to(x_dtype), (dweight * factor).to(weight_dtype)


_scale_gradients = register_op(
    "linear_cross_entropy_backward",
    "(Tensor dloss, Tensor factor, Tensor dx, Tensor dweight, ScalarType x_dtype, ScalarType weight_dtype) "
    "-> (Tensor, Tensor)",
    _run_scale,
    lambda dloss, factor, dx, dweight, *dtypes: tuple(
        torch.empty(g.shape, dtype=dtype, device=g.device) for g, dtype in zip((dx, dweight), dtypes, strict=True)
    ),
)
_linear_cross_entropy = register_op(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool mean, ScalarType dtype, bool needs_dx, "
    "bool needs_dweight) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_linear,
    _fake_linear,
    _setup_linear,
    _backward_linear,
)


# ---- public ----------------------------------------------------------------------------------------------------------


def cross_entropy(logits, targets, *, ignore_index=-100, reduction="mean"):
    """Cross-entropy of logits with the class that each row should have, in nats.

    Args:
        logits: (..., V), float32, float16 or bfloat16, any strides.
        targets: (...) int64, each in [0, V) or `ignore_index`. Values are checked on a CPU; on a GPU, where a check
            would have to wait for the device, others make the loss NaN.
        ignore_index: rows with this target have no loss and no gradient, and do not count in the mean.
        reduction: "mean" over the rows that count (NaN if none does, as in torch), "sum", or "none".

    Returns:
        A scalar, or with "none" (...), float32, computed in fp32.

    Raises:
        ValueError: an argument outside of the above (named, with its value), or tensors where the kernels cannot run.
        NotImplementedError: second derivatives, forward-mode derivatives, vmap.
    """
    op = "cross_entropy"
    check_tensors(op, logits=logits)
    classes = logits.shape[-1] if logits.dim() else 0
    _check(op, "logits", logits, targets, classes, ignore_index, reduction, REDUCTIONS)
    losses, *_ = _cross_entropy(logits, targets, ignore_index)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / ((targets != ignore_index).sum() if reduction == "mean" else 1)


def linear_cross_entropy(x, weight, targets, *, ignore_index=-100, reduction="mean"):
    """cross_entropy(x weight^T, targets) without storing the logits: the output head of a language model and its loss.

    Gradients are made in the forward (unless nothing asks for them), in chunks of rows (128 at least) whose logits take
    half a gigabyte at most on a GPU, and accumulated in fp32. Under autocast x and weight are cast to its dtype, as
    linear layers do, and the gradient of an fp32 weight is not rounded to it.

    Args:
        x: (..., C), float32, float16 or bfloat16.
        weight: (V, C), in x's dtype, or under autocast in any.
        targets: (...) int64, ignore_index: as in `cross_entropy`.
        reduction: "mean" or "sum".

    Returns:
        The loss, a float32 scalar.

    Raises:
        ValueError: an argument outside of the above (named, with its value), or tensors where the kernels cannot run.
        NotImplementedError: second derivatives, forward-mode derivatives, vmap.
    """
    op = "linear_cross_entropy"
    check_tensors(op, x=x, weight=weight)
    width = x.shape[-1] if x.dim() else None
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != width:
        raise ValueError(f"{op}: weight must be (V, C), V >= 1 and C = {width} as x has, got {tuple(weight.shape)}")
    _check(op, "x", x, targets, weight.shape[0], ignore_index, reduction, REDUCTIONS[:2])
    dtype = autocast_dtype(x) or x.dtype
    if autocast_dtype(x) is None and weight.dtype != x.dtype:
        raise ValueError(f"{op}: weight is {weight.dtype} but x is {x.dtype}; use one dtype")
    differentiable = torch.is_grad_enabled()
    loss, *_ = _linear_cross_entropy(
        x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), ignore_index, reduction == "mean", dtype,
        differentiable and x.requires_grad, differentiable and weight.requires_grad,
    )  # fmt: skip
    return loss


def _check(op, name, x, targets, classes, ignore_index, reduction, reductions):
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; its last dimension needs at least one element")
    if not isinstance(targets, torch.Tensor) or targets.dtype != torch.int64:
        what = targets.dtype if isinstance(targets, torch.Tensor) else type(targets).__name__
        raise ValueError(f"{op}: targets must be an int64 tensor, got {what}")
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: targets must have shape {tuple(x.shape[:-1])} as {name} has, got {tuple(targets.shape)}"
        )
    if targets.device != x.device:
        raise ValueError(f"{op}: targets are on {targets.device} but {name} is on {x.device}; use one device")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int) or not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{op}: ignore_index must be an int of 64 bits, got {ignore_index!r}")
    if reduction not in reductions:
        raise ValueError(f"{op}: reduction must be one of {', '.join(reductions)}, got {reduction!r}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = targets[((targets < 0) | (targets >= classes)) & (targets != ignore_index)]
        if wrong.numel():
            raise ValueError(f"{op}: target {int(wrong[0])} is not one of the {classes} classes, 0 to {classes - 1}")
