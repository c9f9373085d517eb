"""Who competes. Attention and norm names are gptlib.backends' own (anyone's `package.module:function` included);
the names here exist in the benches only: torch.compile of the reference, and other people's kernels where installed.

A provider is one callable with the signature of our kernel of that op. A peer that is not installed is reported in one
line; it is never an error.
"""

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gptlib import backends, reference
from gptlib.errors import UserError


@dataclass(frozen=True)
class Provider:
    """A name of the table and what it calls."""

    name: str
    call: Callable


# ---- attention: f(q, k, v, *, scale=None, dropout_p=0.0) on (B, H, T, D), causal -------------------------------------


def xformers_attention():
    """Memory-efficient attention, (B, T, H, D)."""
    ops = importlib.import_module("xformers.ops")

    def attend(q, k, v, *, scale=None, dropout_p=0.0):
        mask = ops.LowerTriangularMask()
        return tokens_first(lambda *qkv: ops.memory_efficient_attention(*qkv, mask, dropout_p, scale), q, k, v)

    return attend


def flash_attention(module):
    """FlashAttention-2 (flash_attn), -3 (flash_attn_interface) or -4 (flash_attn.cute), (B, T, H, D)."""
    flash = importlib.import_module(module).flash_attn_func

    def attend(q, k, v, *, scale=None, dropout_p=0.0):
        options = {"softmax_scale": scale, "causal": True}
        if dropout_p and module == "flash_attn":
            options["dropout_p"] = dropout_p
        elif dropout_p:
            raise ValueError(f"{module} has no dropout, got dropout_p={dropout_p}")
        return tokens_first(lambda *qkv: flash(*qkv, **options), q, k, v)

    return attend


def fla_attention():
    """flash-linear-attention's softmax attention in Triton, (B, T, H, D)."""
    parallel_attn = importlib.import_module("fla.ops.attn").parallel_attn

    def attend(q, k, v, *, scale=None, dropout_p=0.0):
        if dropout_p:
            raise ValueError(f"fla has no dropout, got dropout_p={dropout_p}")
        return tokens_first(lambda *qkv: parallel_attn(*qkv, scale=scale), q, k, v)

    return attend


def tokens_first(attend, q, k, v):
    """Call an attention that wants (B, T, H, D) on (B, H, T, D); of several results the first is the output."""
    out = attend(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


# ---- rows ------------------------------------------------------------------------------------------------------------


def liger(function):
    """Liger's kernel of that name; its layer norm takes eps positionally, and its RMSNorm would write in place. Its
    cross-entropy does, over the logits it is given: it gets a copy, which counts."""
    kernel = getattr(importlib.import_module("liger_kernel.transformers.functional"), function)
    if function == "liger_cross_entropy":
        return lambda logits, targets: kernel(logits.clone(), targets)
    if function in ("liger_softmax", "liger_fused_linear_cross_entropy"):
        return kernel
    if function == "liger_layer_norm":
        return lambda x, weight, bias, eps=1e-5: kernel(x, weight, bias, eps)
    return lambda x, weight, eps=1e-6: kernel(x, weight, eps, in_place=False)


def quack(function):
    """QuACK's kernel of that name."""
    kernel = getattr(importlib.import_module("quack"), function)
    return (
        kernel if function in ("softmax", "cross_entropy") else lambda x, weight, eps=1e-6: kernel(x, weight, eps=eps)
    )


def torch_cross_entropy(logits, targets):
    return torch.nn.functional.cross_entropy(logits.float(), targets)


def chunked_head_loss():
    """torch's own head and loss in chunks of rows, from 2.13 on."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, targets: torch.nn.functional.linear_cross_entropy(x, weight, targets, options=options)


def cut_cross_entropy():
    """Apple's kernel: the logits are computed twice and stored never."""
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy


def torch_rms_norm(x, weight, eps=1e-6):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def compiled(function):
    """torch.compile of an eager function, one whole graph per shape as a training run would have."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def allow_many_shapes():
    """torch.compile gives up on a function after eight shapes, and FlexAttention then runs eagerly without a word."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 256


# ---- the names of each op --------------------------------------------------------------------------------------------

PEERS = {
    "causal_attention": {
        "compiled": lambda: compiled(reference.causal_attention),
        "xformers": xformers_attention,
        "flash-attn-2": functools.partial(flash_attention, "flash_attn"),
        "flash-attn-3": functools.partial(flash_attention, "flash_attn_interface"),
        "flash-attn-4": functools.partial(flash_attention, "flash_attn.cute"),
        "fla": fla_attention,
    },
    "layer_norm": {
        "compiled": lambda: compiled(reference.layer_norm),
        "liger": functools.partial(liger, "liger_layer_norm"),
    },
    "add_layer_norm": {
        "reference": lambda: reference.add_layer_norm,
        "compiled": lambda: compiled(reference.add_layer_norm),
        "triton": lambda: backends.kernel("add_layer_norm"),
    },
    "rms_norm": {
        "reference": lambda: reference.rms_norm,
        "torch": lambda: torch_rms_norm,
        "compiled": lambda: compiled(reference.rms_norm),
        "liger": functools.partial(liger, "liger_rms_norm"),
        "quack": functools.partial(quack, "rmsnorm"),
        "triton": lambda: backends.kernel("rms_norm"),
    },
    "softmax": {
        "reference": lambda: reference.softmax,
        "torch": lambda: functools.partial(torch.softmax, dim=-1),
        "compiled": lambda: compiled(reference.softmax),
        "liger": functools.partial(liger, "liger_softmax"),
        "quack": functools.partial(quack, "softmax"),
        "triton": lambda: backends.kernel("softmax"),
    },
    "cross_entropy": {
        "reference": lambda: reference.cross_entropy,
        "torch": lambda: torch_cross_entropy,
        "compiled": lambda: compiled(reference.cross_entropy),
        "liger": functools.partial(liger, "liger_cross_entropy"),
        "quack": functools.partial(quack, "cross_entropy"),
        "triton": lambda: backends.kernel("cross_entropy"),
    },
    "linear_cross_entropy": {
        "compiled": lambda: compiled(reference.linear_cross_entropy),
        "torch-chunked": chunked_head_loss,
        "liger": functools.partial(liger, "liger_fused_linear_cross_entropy"),
        "cut": cut_cross_entropy,
    },
    "causal_softmax": {
        "reference": lambda: reference.causal_softmax,
        "compiled": lambda: compiled(reference.causal_softmax),
        "triton": lambda: backends.kernel("causal_softmax"),
    },
}
BACKENDS = {  # op -> (names, resolver) of the registry that the trainer uses too
    "causal_attention": (backends.ATTENTION, backends.attention),
    "layer_norm": (backends.NORM, backends.norm),
    "linear_cross_entropy": (backends.LOSS, backends.loss),
}


def known_names(op):
    """Every provider name of an op, the reference first and our kernel last."""
    names = dict.fromkeys([*BACKENDS.get(op, ({},))[0], *PEERS[op]])
    return sorted(names, key=lambda name: (name != "reference") + (name == "triton"))


def check_known(ops, name):
    """UserError for a provider that none of the ops has."""
    known = list(dict.fromkeys(n for op in ops for n in known_names(op)))
    takes_functions = all(op in BACKENDS for op in ops)
    if name in known or (":" in name and takes_functions):
        return
    functions = ", or package.module:function" if takes_functions else ""
    raise UserError(f"provider {name!r} is unknown; {', '.join(ops)} can use {', '.join(known)}{functions}")


def resolve(op, names):
    """Known names -> (providers, lines about the ones that are missing here)."""
    from_registry = BACKENDS[op][1] if op in BACKENDS else None
    if {"compiled", "flex"} & set(names):
        allow_many_shapes()
    found, missing = [], []
    for name in dict.fromkeys(names):
        try:
            found.append(Provider(name, PEERS[op][name]() if name in PEERS[op] else from_registry(name)))
        except UserError as e:
            if ":" in name:
                raise UserError(re.sub(r"^--\w+", "--providers", str(e))) from e
            missing.append(f"{name}: {first_line(e)}")
        except (ImportError, OSError, AttributeError, RuntimeError) as e:  # absent, another version, other hardware
            missing.append(f"{name}: not usable here ({first_line(e)})")
    return found, missing


def first_line(error):
    """The first line of an exception's text, at most 160 characters, or its type's name."""
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def reference_of(op):
    """The definition of correct for an op."""
    return getattr(reference, op)
