"""Fused causal attention: the public op and its registration. The kernels are in forward.py, backward.py, decode.py."""

import math

import torch

from kernels import _dropout, _runtime
from kernels.attention import backward as _backward
from kernels.attention import decode as _decode
from kernels.attention import forward as _forward
from kernels.attention.tiles import empty_heads, readable

MAX_HEAD_DIM = 256


# ---- registration ----------------------------------------------------------------------------------------------------


def _document_bounds(cu_seqlens, tokens):
    """First token and end (one past the last) of each token's document, (tokens,) int32 each, without leaving the
    device. Clamped, so that wrong values on a GPU (which are not read back to be checked) cannot lead outside."""
    if cu_seqlens is None:
        return None, None
    if cu_seqlens.device.type == "cpu":
        _check_document_values(cu_seqlens, tokens)
    index = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, index, right=True, out_int32=True)
    start = cu_seqlens[(document - 1).clamp(min=0)].minimum(index).clamp(min=0)
    end = cu_seqlens[document.clamp(max=cu_seqlens.numel() - 1)].maximum(index + 1).clamp(max=tokens)
    return start.int(), end.int()


def _check_document_values(cu_seqlens, tokens):
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"causal_attention: cu_seqlens must start at 0, never decrease and end at T = {tokens}, "
            f"got {cu_seqlens.tolist() if cu_seqlens.numel() <= 8 else '[...]'}"
        )


def _run_forward(q, k, v, scale, dropout_p, rng, window, cu_seqlens):
    window = _effective(window, k)
    if _decode.applies(q, k, dropout_p, cu_seqlens):
        return _decode.attention_decode(q, k, v, scale, window)
    doc_start, _ = _document_bounds(cu_seqlens, q.shape[2])
    return _forward.attention_forward(q, k, v, scale, dropout_p, rng, window, doc_start)


def _run_backward(dout, dlse, q, k, v, out, lse, scale, dropout_p, rng, window, cu_seqlens):
    window = _effective(window, k)
    doc_start, doc_end = _document_bounds(cu_seqlens, q.shape[2])
    return _backward.attention_backward(
        readable(dout), None if dlse is None else dlse.float().contiguous(), q, k, v, out, lse,
        scale, dropout_p, rng, window, doc_start, doc_end,
    )  # fmt: skip


def _effective(window, k):
    """0, no window, for one that hides nothing: faster, and j + window stays within 32 bits in the kernels."""
    return 0 if window >= k.shape[2] else window


def _fake_forward(q, k, v, scale, dropout_p, rng, window, cu_seqlens):
    B, H, Tq, D = q.shape
    return empty_heads(B, H, Tq, D, like=q), q.new_empty((B, H, Tq), dtype=torch.float32)


def _fake_backward(dout, dlse, q, k, v, out, lse, scale, dropout_p, rng, window, cu_seqlens):
    def like(x):
        B, H, T, D = x.shape
        return empty_heads(B, H, T, D, like=x)

    return like(q), like(k), like(v)


backward_op = _runtime.register_op(
    "attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, float dropout_p, "
    "Tensor? rng, int window, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    q, k, v, scale, dropout_p, rng, window, cu_seqlens = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, rng, cu_seqlens)
    ctx.scale, ctx.dropout_p, ctx.window = scale, dropout_p, window
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dout, dlse):
    q, k, v, out, lse, rng, cu_seqlens = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 8
    dout = torch.zeros_like(out) if dout is None else dout
    grads = backward_op(
        dout, dlse, q, k, v, out, lse, ctx.scale, ctx.dropout_p, rng, ctx.window, cu_seqlens
    )  # fmt: skip
    return *grads, None, None, None, None, None


_attention = _runtime.register_op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? rng, int window, Tensor? cu_seqlens) "
    "-> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    _setup_context,
    _autograd_backward,
)


# ---- the public function ---------------------------------------------------------------------------------------------


def causal_attention(
    q, k, v, *, scale=None, dropout_p=0.0, window=None, cu_seqlens=None, deterministic=True, return_lse=False
):
    """softmax(scale * q k^T + causal mask) v, without ever storing the scores.

    Causal at the bottom right: query i sees keys j <= i + Tk - Tq, so that Tq new tokens attend to a cache of Tk.
    Strides are read in place as long as the last one is 1: pass `(B, T, H, D).transpose(1, 2)` views or slices of a
    fused projection. Under autocast the inputs are cast to its dtype, as torch's scaled_dot_product_attention does.

    Args:
        q: (B, H, Tq, D), float32, float16 or bfloat16, 8 <= D <= 256.
        k, v: (B, Hkv, Tk, D) in q's dtype with Tk >= Tq and H a multiple of Hkv (grouped or multi-query attention).
        scale: factor of the scores, positive; 1 / sqrt(D) by default.
        dropout_p: probability of dropping an attention weight, in [0, 1), applied as round(256 p) / 256. The mask
            follows torch.manual_seed and does not depend on tile sizes or on the device.
        window: query i sees only the `window` last keys it could see, itself included. Default: all.
        cu_seqlens: (documents + 1,) int32, the cumulated lengths of documents packed along T (then B = 1 and
            Tq = Tk); nothing attends across documents. Values are checked on a CPU; on a GPU, where a check would
            have to wait for the device, they are clamped to valid bounds.
        deterministic: the backward gives the same bits on every run. False would permit a faster one that does
            not; here there is none (kernels.attention.hopper has one, for H100s).
        return_lse: return the log-sum-exp of the scaled scores too. Gradients flow through it.

    Returns:
        out (B, H, Tq, D) in q's dtype, stored as (B, Tq, H, D) so that merging the heads is free;
        with return_lse, (out, lse) with lse (B, H, Tq) float32.

    Raises:
        ValueError: an argument outside of the above (named, with its value), or a GPU older than Ampere.
        NotImplementedError: second derivatives, forward-mode derivatives, vmap.

    Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
    """
    check(q, k, v, scale, dropout_p, window, cu_seqlens)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if (dtype := _runtime.autocast_dtype(q)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    rng = _dropout.draw_rng(q.device) if dropout_p > 0.0 else None
    out, lse = _attention(readable(q), readable(k), readable(v), scale, float(dropout_p), rng, window or 0, cu_seqlens)
    return (out, lse) if return_lse else out


def check(q, k, v, scale, dropout_p, window, cu_seqlens):
    """ValueError for a call of causal_attention outside of its docstring."""
    op = "causal_attention"
    _runtime.check_tensors(op, q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must be (B, H, T, D), got shape {tuple(x.shape)}")
        if x.dtype != q.dtype and _runtime.autocast_dtype(q) is None:
            raise ValueError(f"{op}: {name} is {x.dtype} but q is {q.dtype}; use one dtype")
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    if k.shape != v.shape:
        raise ValueError(f"{op}: k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"{op}: k must share q's batch and head dimension ({B}, {D}), got {tuple(k.shape)}")
    if H < 1 or Hkv < 1 or H % Hkv:
        raise ValueError(f"{op}: the query heads ({H}) must be a positive multiple of the key heads ({Hkv})")
    if Tq < 1 or Tk < Tq:
        raise ValueError(f"{op}: 1 <= Tq <= Tk is needed, got Tq = {Tq}, Tk = {Tk}")
    if not 8 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: the head dimension must be 8 to {MAX_HEAD_DIM}, got {D}")
    if scale is not None and not 0.0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be positive and finite, got {scale}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"{op}: window must be an int of at least 1, or None, got {window!r}")
    if cu_seqlens is not None:
        _check_documents(op, cu_seqlens, q.device, B, Tq, Tk)


def _check_documents(op, cu_seqlens, device, B, Tq, Tk):
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        what = tuple(cu_seqlens.shape) if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"{op}: cu_seqlens must be an int32 tensor (documents + 1,), got {what}")
    if cu_seqlens.device != device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device} but q is on {device}; use one device")
    if cu_seqlens.numel() < 2:
        raise ValueError(f"{op}: cu_seqlens must have documents + 1 >= 2 entries, got {cu_seqlens.numel()}")
    if B != 1 or Tq != Tk:
        raise ValueError(f"{op}: with cu_seqlens B must be 1 and Tq = Tk, got B = {B}, Tq = {Tq}, Tk = {Tk}")
