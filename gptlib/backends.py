"""Names to callables: the one place that knows which implementations exist, and the only file that imports kernels.

A name is resolved once, when a model is built. `attention(name)` gives f(q, k, v, *, scale=None, dropout_p=0.0) on
(B, H, T, D) tensors, causal at the bottom right; `norm(name)` gives f(x, weight, bias, eps), and `add_norm(name)` the
same of a sum; `loss(name)` gives f(x, head_weight, targets). `package.module:function` names anyone's own function.
"""

import contextlib
import functools
import importlib
import inspect
import math
import os
import sys

import torch
import torch.nn.functional as F

from gptlib import reference
from gptlib.errors import UserError, kind_of

INTERPRETER_NOTE = "triton without a GPU runs in Triton's interpreter: right to the last digit that counts, but slow"


def sdpa(q, k, v, *, scale=None, dropout_p=0.0):
    """torch's scaled_dot_product_attention. Its is_causal is aligned top-left, so Tq < Tk takes a mask object."""
    Tq, Tk = q.shape[2], k.shape[2]
    mask = None
    if 1 < Tq < Tk:
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(Tq, Tk)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=1 < Tq == Tk, scale=scale, enable_gqa=gqa)


def sdpa_with(backend):
    """sdpa held to one of torch's own implementations; it raises RuntimeError where that one cannot run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, k, v, *, scale=None, dropout_p=0.0):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return sdpa(q, k, v, scale=scale, dropout_p=dropout_p)

    return attend


def flex():
    """torch's FlexAttention, compiled. It has no dropout, and no backward on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A symbolic length costs masked loads in every tile, even of lengths that tiles divide; only decoding, where each
    # token has a length of its own, is better off with it than with a compilation per shape.
    square, growing = torch.compile(flex_attention, dynamic=False), torch.compile(flex_attention)

    @functools.lru_cache(maxsize=16)
    def block_mask(Tq, Tk, device):
        return create_block_mask(lambda b, h, i, j: j <= i + (Tk - Tq), None, None, Tq, Tk, device=device)

    def attend(q, k, v, *, scale=None, dropout_p=0.0):
        if dropout_p > 0:
            raise ValueError(f"flex has no dropout on the attention weights, got dropout_p={dropout_p}")
        Tq, Tk = q.shape[2], k.shape[2]
        mask, compiled = block_mask(Tq, Tk, q.device), square if Tq == Tk else growing
        return compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def triton_softmax():
    """Matrix products by torch, the causal softmax between them by our kernel."""
    causal_softmax = kernel("causal_softmax")

    def attend(q, k, v, *, scale=None, dropout_p=0.0):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        weights = causal_softmax(q @ k.transpose(-2, -1), scale)  # (B, H, Tq, Tk)
        return F.dropout(weights, dropout_p) @ v

    return attend


def torch_layer_norm(x, weight, bias, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def torch_head_loss(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).flatten(0, -2).float(), targets.flatten())


# name -> a function without arguments that gives the callable, and may import what it needs
ATTENTION = {
    "reference": lambda: reference.causal_attention,
    "sdpa": lambda: sdpa,
    "sdpa-math": lambda: sdpa_with("MATH"),
    "sdpa-flash": lambda: sdpa_with("FLASH_ATTENTION"),
    "sdpa-efficient": lambda: sdpa_with("EFFICIENT_ATTENTION"),
    "sdpa-cudnn": lambda: sdpa_with("CUDNN_ATTENTION"),
    "flex": flex,
    "triton-softmax": triton_softmax,
    "triton": lambda: kernel("causal_attention"),
}
NORM = {
    "reference": lambda: reference.layer_norm,
    "torch": lambda: torch_layer_norm,
    "triton": lambda: kernel("layer_norm"),
}
LOSS = {
    "reference": lambda: reference.linear_cross_entropy,
    "torch": lambda: torch_head_loss,
    "triton": lambda: kernel("linear_cross_entropy"),
}
TRUSTED = ("reference", "sdpa", "flex")  # attentions not tried: two run anywhere, and flex would compile for a trial


def attention(name):
    """The callable of a name in ATTENTION, or of `package.module:function`."""
    return _resolve("attn", name, ATTENTION, "(q, k, v, *, scale=None, dropout_p=0.0)", _call_as_attention)


def norm(name):
    """The callable of a name in NORM, or of `package.module:function`."""
    return _resolve("norm", name, NORM, "(x, weight, bias, eps=1e-5)", _call_as_norm)


def add_norm(name):
    """f(x, residual, weight, bias, eps) -> (norm of x + residual, x + residual): one kernel where ours is asked for."""
    if name == "triton":
        return kernel("add_layer_norm")
    normalize = norm(name)

    def add_then_normalize(x, residual, weight, bias, eps=1e-5):
        total = x + residual
        return normalize(total, weight, bias, eps), total

    return add_then_normalize


def loss(name):
    """The callable of a name in LOSS, or of `package.module:function`."""
    return _resolve("loss", name, LOSS, "(x, head_weight, targets)", _call_as_loss)


def kernel(op):
    """One of our Triton kernels, or a UserError where Triton cannot be imported."""
    try:
        import kernels

        return getattr(kernels, op)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] != "triton":
            raise
        raise UserError(
            f"triton cannot be imported ({e}); install it (Linux: pip install triton), or use "
            "--attn sdpa --norm torch --loss torch"
        ) from None


def default_names(device):
    """(attn, norm, loss) for a device: our kernels on a GPU, torch's own on a CPU, where Triton is only interpreted."""
    return ("triton", "triton", "triton") if device.type == "cuda" else ("sdpa", "torch", "torch")


def is_interpreted(attn, norm, loss, device):
    """Whether one of these names runs our kernels without a GPU."""
    return device.type == "cpu" and (attn in ("triton", "triton-softmax") or "triton" in (norm, loss))


def check_training(name, *, device, n_heads, head_dim, dropout_p, dtype=torch.float32):
    """UserError unless this kind of attention can train here: what is known to fail, then a few positions tried."""
    if name == "flex" and dropout_p > 0:
        raise UserError(f"--attn flex has no dropout: give --drop-rate 0 (it is {dropout_p}) or another --attn")
    if name == "flex" and device.type == "cpu":
        raise UserError("--attn flex has no backward on a CPU: use --attn sdpa, or a GPU")
    if name in TRUSTED:
        return
    with _told_in_a_line(name, "train"):
        q = _some_positions(n_heads, head_dim, device=device, dtype=dtype, requires_grad=True)
        out = attention(name)(q, q, q, scale=None, dropout_p=dropout_p)
        _check_result(name, out, q)
        out.sum().backward()


@torch.no_grad()
def check_generating(name, *, device, n_heads, head_dim, dtype=torch.float32):
    """UserError unless this kind of attention can read a prompt here, and then one token more."""
    if name in TRUSTED:
        return
    with _told_in_a_line(name, "generate"):
        k = _some_positions(n_heads, head_dim, device=device, dtype=dtype)
        for q in (k, k[:, :, -1:]):
            _check_result(name, attention(name)(q, k, k, dropout_p=0.0), q)


@contextlib.contextmanager
def _told_in_a_line(name, verb):
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # whatever somebody's own function does
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"--attn {name} cannot {verb} here: {reason}; use another --attn, such as sdpa") from e


def _some_positions(n_heads, head_dim, **options):
    """Zeros as the model passes them, (1, H, T, D) seen in (1, T, H, D) memory, with a T that is neither H nor D."""
    T = next(n for n in (8, 16, 32) if n not in (n_heads, head_dim))
    return torch.zeros(1, T, n_heads, head_dim, **options).transpose(1, 2)


def _check_result(name, out, q):
    if kind_of(out) != kind_of(q):
        raise UserError(
            f"--attn {name} returned {kind_of(out)} where q is {kind_of(q)}; it must return a tensor (B, H, T, D) "
            "with q's shape and dtype"
        )


def _resolve(flag, name, known, signature, call):
    if name in known:
        return known[name]()
    accepted = f"{', '.join(known)} or package.module:function with the signature {signature}"
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(f"--{flag} {name}: unknown; it can be {accepted}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as e:
        raise UserError(f"--{flag} {name}: cannot be imported ({e}); it can be {accepted}") from e
    try:
        call(inspect.signature(function))
    except (TypeError, ValueError) as e:
        raise UserError(f"--{flag} {name}: cannot be called as {signature} ({e})") from e
    return function


def _call_as_attention(signature):
    signature.bind("q", "k", "v", scale=None, dropout_p=0.0)


def _call_as_norm(signature):
    signature.bind("x", "weight", "bias", 1e-5)


def _call_as_loss(signature):
    signature.bind("x", "head_weight", "targets")
