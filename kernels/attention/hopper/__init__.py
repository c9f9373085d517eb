"""Causal attention for Hopper (H100, H200) by warps of different trades (Shah et al., "FlashAttention-3", 2024).

forward.py and backward.py hold the kernels, ring.py what they share. The forward can be had with the portable backward,
the same bits on every run, or with a backward in one pass that adds up dq in whatever order programs come by.

Supported: bf16 and fp16, D up to 128 in multiples of 8 (padded to 64 or 128), any Tq <= Tk, grouped heads. Not:
dropout, windows, packed documents, fp32. All has been compiled for sm_90 and executed by an emulator of its barriers,
copies and products (tests/gluon_emulator.py), but not yet run on a GPU: kernels.causal_attention does not use it, it is
there for whoever asks by name.
"""

import math

import torch

from kernels import _runtime, attention
from kernels.attention.hopper.backward import hopper_backward
from kernels.attention.hopper.forward import hopper_forward
from kernels.attention.hopper.ring import MAX_HEAD_DIM
from kernels.attention.tiles import empty_heads, readable

OP = "hopper.causal_attention"
DTYPES = (torch.float16, torch.bfloat16)


# ---- registration ----------------------------------------------------------------------------------------------------


def _check_machine(device):
    if (arch := _runtime.arch(device)) != "sm_90":
        here = "Triton's interpreter" if arch == "interpret" else arch
        raise ValueError(f"{OP}: an H100 or H200 (sm_90) is needed, not {here}; use kernels.causal_attention")


def _run_forward(q, k, v, scale, deterministic):
    _check_machine(q.device)
    return hopper_forward(q, k, v, scale)


def _fake_forward(q, k, v, scale, deterministic):
    B, H, Tq, D = q.shape
    return empty_heads(B, H, Tq, D, like=q), q.new_empty((B, H, Tq), dtype=torch.float32)


def _run_backward(dout, dlse, q, k, v, out, lse, scale):
    dlse = None if dlse is None else dlse.float().contiguous()
    return hopper_backward(readable(dout), dlse, q, k, v, out, lse, scale)


def _fake_backward(dout, dlse, q, k, v, out, lse, scale):
    return tuple(empty_heads(*x.shape, like=x) for x in (q, k, v))


_backward_op = _runtime.register_op(
    "hopper_attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 5
    dout = torch.zeros_like(out) if dout is None else dout
    inputs = dout, dlse, q, k, v, out, lse, ctx.scale
    grads = attention.backward_op(*inputs, 0.0, None, 0, None) if ctx.deterministic else _backward_op(*inputs)
    return *grads, None, None


_attention = _runtime.register_op(
    "hopper_attention",
    "(Tensor q, Tensor k, Tensor v, float scale, bool deterministic) -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    _setup_context,
    _autograd_backward,
)


# ---- the public function ---------------------------------------------------------------------------------------------


def causal_attention(
    q, k, v, *, scale=None, dropout_p=0.0, window=None, cu_seqlens=None, deterministic=True, return_lse=False
):
    """kernels.causal_attention with the kernels of this folder: softmax(scale * q k^T + causal mask) v.

    Not yet run on a GPU: the machine code has been examined and the protocol emulated, see the top of this file.

    Args:
        q: (B, H, Tq, D), float16 or bfloat16, D a multiple of 8 up to 128. TMA reads q, k and v in place if their last
            stride is 1 and the others are multiples of 16 bytes; others are copied first.
        k, v: (B, Hkv, Tk, D) in q's dtype with Tk >= Tq and H a multiple of Hkv.
        scale: factor of the scores, positive; 1 / sqrt(D) by default.
        dropout_p, window, cu_seqlens: must be 0, None (or hide nothing) and None.
        deterministic: run the portable backward. False: the one of this folder, in one pass, whose dq may differ in its
            last bits from run to run.
        return_lse: return the log-sum-exp of the scaled scores too. Gradients flow through it.

    Returns:
        out (B, H, Tq, D) in q's dtype, stored as (B, Tq, H, D); with return_lse, (out, lse), lse (B, H, Tq) float32.

    Raises:
        ValueError: an argument outside of the above (named, with its value), or a GPU other than a Hopper.
        NotImplementedError: second derivatives, forward-mode derivatives, vmap.

    Source: Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", 2024.
    """
    attention.check(q, k, v, scale, dropout_p, window, cu_seqlens)
    if not torch.compiler.is_compiling():
        _check_machine(q.device)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if (dtype := _runtime.autocast_dtype(q)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _refuse(q, k, dropout_p, window, cu_seqlens)
    out, lse = _attention(q, k, v, scale, deterministic)
    return (out, lse) if return_lse else out


def one_pass(q, k, v, **options):
    """causal_attention with deterministic=False, under a name that `--attn` can be given."""
    return causal_attention(q, k, v, **{**options, "deterministic": False})


def _refuse(q, k, dropout_p, window, cu_seqlens):
    """ValueError for what kernels.causal_attention can do and this kernel cannot."""
    refused = {
        f"dtype {q.dtype}": q.dtype not in DTYPES,
        f"head dimension {q.shape[-1]}": q.shape[-1] > MAX_HEAD_DIM or q.shape[-1] % 8 != 0,
        f"dropout_p = {dropout_p}": dropout_p > 0.0,
        f"window = {window}": window is not None and window < k.shape[2],
        "cu_seqlens": cu_seqlens is not None,
    }
    for what, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"{OP}: {what} is not supported by this kernel; use kernels.causal_attention")
