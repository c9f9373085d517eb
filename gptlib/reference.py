"""What correct means here: attention, softmax, normalization and loss in eager PyTorch, one readable function each.

Every kernel is tested against these functions in float64 and allowed twice the error that they make in the kernel's own
dtype. The signatures are the kernels' own. Matrix products run in the input dtype, exponentials and statistics in fp32
(fp64 for fp64 inputs), as careful eager GPTs do. Nothing here is fast, and nothing here is meant to be.

Letters: B batch, H query heads, Hkv key/value heads, Tq and Tk positions, D head dim, N row length, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F


def causal_attention(
    q,
    k,
    v,
    *,
    scale=None,
    dropout_p=0.0,
    window=None,
    cu_seqlens=None,
    deterministic=True,
    return_lse=False,
    dropout_mask=None,
):
    """softmax(scale * q k^T + causal mask) v, with dropout on the weights.

    q: (B, H, Tq, D). k, v: (B, Hkv, Tk, D), H a multiple of Hkv, Tq <= Tk. Float dtypes.
    scale: default 1/sqrt(D).  dropout_p: in [0, 1).  window, cu_seqlens: see `causal_mask`.
    deterministic: accepted for the kernels' sake; this function always is.
    dropout_mask: bool (B, H, Tq, Tk), True keeps; fixes the mask that dropout_p would draw (tests).
    Returns out (B, H, Tq, D) in q's dtype, with `return_lse` also the log-sum-exp of the scaled, masked scores
    (B, H, Tq) in fp32 (fp64 for fp64). Every query sees at least its own position, so no row is empty.
    Raises ValueError for Tq > Tk and for heads that do not divide.
    """
    H, Tq, D = q.shape[1:]
    Hkv, Tk = k.shape[1:3]
    if H % Hkv:
        raise ValueError(f"q has {H} heads, k and v have {Hkv}: the first must be a multiple of the second")
    if Tq > Tk:
        raise ValueError(f"q has {Tq} positions but k only {Tk}: a query would have no key")
    scale = 1 / math.sqrt(D) if scale is None else scale
    k = k.repeat_interleave(H // Hkv, dim=1)  # (B, H, Tk, D)
    v = v.repeat_interleave(H // Hkv, dim=1)

    visible = causal_mask(Tq, Tk, window=window, cu_seqlens=cu_seqlens, device=q.device)
    scores = (q @ k.transpose(-2, -1) * scale).to(accumulation_dtype(q.dtype))  # (B, H, Tq, Tk)
    scores = scores.masked_fill(~visible, -math.inf)
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    if dropout_mask is not None:
        weights = weights * dropout_mask / (1 - dropout_p)
    elif dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    out = weights @ v
    return (out, torch.logsumexp(scores, dim=-1)) if return_lse else out


def causal_mask(Tq, Tk, *, window=None, cu_seqlens=None, device=None):
    """Which keys each query sees: bool (Tq, Tk), aligned at the bottom right, so that the last query sees the last key.

    window=W: the W newest visible keys, the query's own position included.
    cu_seqlens: (documents + 1,) boundaries along T (Tq == Tk); a query sees its own document alone.
    """
    i = torch.arange(Tk - Tq, Tk, device=device)[:, None]  # a query's position among the keys
    j = torch.arange(Tk, device=device)[None, :]
    visible = j <= i
    if window is not None:
        visible = visible & (j > i - window)
    if cu_seqlens is not None:
        inner = cu_seqlens.to(device=visible.device, dtype=torch.int64)[1:-1]
        document = torch.bucketize(torch.arange(Tk, device=visible.device), inner, right=True)
        visible = visible & (document[i] == document[j])
    return visible


def softmax(x):
    """Softmax over the last dimension, in fp32 (fp64 for fp64), returned in x's dtype."""
    return torch.softmax(x.to(accumulation_dtype(x.dtype)), dim=-1).to(x.dtype)


def causal_softmax(scores, scale):
    """Softmax of scale * scores over the keys each query may see, zero elsewhere. scores: (..., Tq, Tk), Tq <= Tk."""
    Tq, Tk = scores.shape[-2:]
    if Tq > Tk:
        raise ValueError(f"scores have {Tq} queries but only {Tk} keys: a query would have no key")
    hidden = ~causal_mask(Tq, Tk, device=scores.device)
    scaled = scores.to(accumulation_dtype(scores.dtype)) * scale
    return torch.softmax(scaled.masked_fill(hidden, -math.inf), dim=-1).to(scores.dtype)


def layer_norm(x, weight, bias, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension; biased variance.

    x: (..., N). weight, bias: (N,) or None, of any float dtype. Returns (..., N) in x's dtype.
    """
    rows = x.to(accumulation_dtype(x.dtype))
    centered = rows - rows.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + eps)
    return scale_and_shift(centered * rstd, weight, bias).to(x.dtype)


def add_layer_norm(x, residual, weight, bias, eps=1e-5):
    """The residual add and the norm after it: (layer_norm(s), s) for s = x + residual, in their promoted dtype."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: (..., N); weight: (N,) or None."""
    rows = x.to(accumulation_dtype(x.dtype))
    rstd = torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + eps)
    return scale_and_shift(rows * rstd, weight, None).to(x.dtype)


def cross_entropy(logits, targets, *, ignore_index=-100, reduction="mean"):
    """-log softmax(logits)[target] in nats, in fp32 (fp64 for fp64). logits: (..., V); targets: (...) int64.

    Rows whose target is ignore_index count nowhere. reduction: "mean" over the others, "sum", or "none": (...).
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    counts = targets != ignore_index
    picked = logits.gather(-1, targets.where(counts, 0).unsqueeze(-1)).squeeze(-1)
    losses = (torch.logsumexp(logits, dim=-1) - picked).masked_fill(~counts, 0)
    if reduction == "none":
        return losses
    return losses.sum() / (counts.sum() if reduction == "mean" else 1)


def linear_cross_entropy(x, weight, targets, *, ignore_index=-100, reduction="mean"):
    """The output head and its loss: cross_entropy(x weight^T, targets). x: (..., C); weight: (V, C); targets: (...)."""
    return cross_entropy(F.linear(x, weight), targets, ignore_index=ignore_index, reduction=reduction)


def scale_and_shift(x, weight, bias):
    """x * weight + bias in x's dtype, where either may be None."""
    if weight is not None:
        x = x * weight.to(x.dtype)
    if bias is not None:
        x = x + bias.to(x.dtype)
    return x


def accumulation_dtype(dtype):
    """fp32 for the 16-bit types, the dtype itself otherwise."""
    return torch.promote_types(dtype, torch.float32)
