"""One call of causal_attention, forward and backward, held to the error rule. Shared by the attention tests."""

from dataclasses import dataclass, replace

import torch

import kernels
from gptlib import reference
from kernels import _dropout, _tuning
from kernels._runtime import INTERPRETED
from tests.oracle import assert_matches
from tests.philox import keep_mask


@dataclass(frozen=True)
class Call:
    B: int = 1
    H: int = 2
    Hkv: int = 2
    Tq: int = 64
    Tk: int = 64
    D: int = 64
    dtype: torch.dtype = torch.float32
    window: int | None = None
    docs: tuple | None = None  # boundaries
    dropout_p: float = 0.0
    layout: str = "bthd"  # how q, k, v lie in memory: see `make`
    scale: float | None = None
    magnitude: float = 1.0

    def __str__(self):
        default = Call()
        parts = [f"B{self.B}H{self.H}.{self.Hkv}T{self.Tq}.{self.Tk}D{self.D}", str(self.dtype).split(".")[1]]
        for field in ("window", "docs", "dropout_p", "layout", "scale", "magnitude"):
            if getattr(self, field) != getattr(default, field):
                parts.append(f"{field}={getattr(self, field)}")
        return "-".join(parts).replace(" ", "")

    with_ = replace


fp16, bf16 = torch.float16, torch.bfloat16
HOPPER_CALLS = [  # of what the warp-specialized kernels take
    Call(B=2, H=1, Hkv=1, Tq=1, Tk=1, D=64, dtype=bf16),
    Call(H=2, Hkv=2, Tq=113, Tk=113, D=64, dtype=fp16),
    Call(B=2, H=4, Hkv=2, Tq=200, Tk=200, D=128, dtype=bf16, layout="qkv"),
    Call(H=3, Hkv=1, Tq=384, Tk=384, D=64, dtype=bf16),
    Call(H=2, Hkv=1, Tq=129, Tk=700, D=128, dtype=fp16, layout="bhtd"),
    Call(H=1, Hkv=1, Tq=1, Tk=300, D=64, dtype=bf16),
    Call(H=1, Hkv=1, Tq=70, Tk=197, D=80, dtype=bf16, scale=0.3),
    Call(H=2, Hkv=1, Tq=65, Tk=128, D=40, dtype=fp16, layout="odd"),  # TMA cannot read it: copied
    Call(H=1, Hkv=1, Tq=130, Tk=130, D=8, dtype=bf16, layout="inner", magnitude=30.0),
]


def make(call, heads, tokens, device):
    """One input (B, heads, tokens, D) in the call's layout."""
    B, D = call.B, call.D
    options = {"dtype": torch.float32, "device": device}

    def randn(*shape):
        return (torch.randn(*shape, **options) * call.magnitude).to(call.dtype)

    if call.layout == "bthd":  # the module's own: a transposed view
        return randn(B, tokens, heads, D).transpose(1, 2)
    if call.layout == "bhtd":
        return randn(B, heads, tokens, D)
    if call.layout == "qkv":  # a slice of a fused projection
        return randn(B, tokens, 3, heads, D)[:, :, 1].transpose(1, 2)
    if call.layout == "odd":  # row stride D + 1: no tensor descriptor can read it
        return randn(B, heads, tokens, D + 1)[..., :D]
    if call.layout == "inner":  # last stride 2: needs the copy
        return randn(B, heads, tokens, 2 * D)[..., ::2]
    raise AssertionError(call.layout)


def check(call, device, attend=None):
    """Output, log-sum-exp and the gradients of both, by `attend` or our own kernel, against the reference."""
    q, k, v = (
        make(call, h, t, device).requires_grad_()
        for h, t in ((call.H, call.Tq), (call.Hkv, call.Tk), (call.Hkv, call.Tk))
    )
    dout = torch.randn(call.B, call.Tq, call.H, call.D, device=device).to(call.dtype).transpose(1, 2)
    dlse = torch.randn(call.B, call.H, call.Tq, device=device)
    cu_seqlens = None if call.docs is None else torch.tensor(call.docs, dtype=torch.int32, device=device)
    options = {"window": call.window, "cu_seqlens": cu_seqlens, "scale": call.scale, "return_lse": True}

    torch.manual_seed(1)
    out, lse = (attend or kernels.causal_attention)(q, k, v, dropout_p=call.dropout_p, **options)
    results = (out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse)))

    if call.dropout_p > 0:
        torch.manual_seed(1)
        threshold, rescale = _dropout.threshold_and_rescale(call.dropout_p)
        mask = keep_mask(_dropout.draw_rng(torch.device(device)), call.B, call.H, call.Tq, call.Tk, threshold)
        options |= {"dropout_p": 1 - 1 / rescale, "dropout_mask": mask.to(device)}

    def expected(dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        o, s = reference.causal_attention(*inputs, **options)
        return o, s, *torch.autograd.grad((o, s), inputs, (dout.to(o.dtype), dlse.to(s.dtype)))

    ref, eager = expected(torch.float64), expected(call.dtype)
    scales = intermediate_scales(call, ref, dout, dlse, q, k)
    for name, got, want, plain in zip(("out", "lse", "dq", "dk", "dv"), results, ref, eager, strict=True):
        assert_matches(f"{name} of {call}", got, want, plain, scale=scales.get(name))


def intermediate_scales(call, ref, dout, dlse, q, k):
    """Magnitudes of what the kernels round on their way to a result, where that exceeds the result itself.

    delta = rowsum(out * dout) sees out rounded, dp is a sum as long, and dp - delta may cancel to nothing, as it must
    where a query sees one key; dlse joins delta before that. And p = exp(s - lse) has an exponent rounded in fp32 at
    the magnitude of lse. Both show where eager's error is next to nothing: in fp32, and in 16 bits (the first alone)
    where no query sees more than three keys. lse itself goes to base 2 and back, four roundings where eager has two.
    """
    out, lse, dq, dk, dv = (x.abs().max().item() for x in ref)
    reach = min(call.Tk, call.window or call.Tk)
    if call.dtype != torch.float32 and reach > 3:
        return {"lse": 2 * lse}
    sums = 2 * (ref[0] * dout.double()).norm(dim=-1).max() + dlse.abs().max()
    delta = sums.item() * (call.scale or call.D**-0.5)
    exponent = max(1.0, lse) if call.dtype == torch.float32 else 1.0
    return {
        "out": exponent * out,
        "lse": 2 * lse,
        "dq": exponent * max(dq, delta * k.abs().max().item()),
        "dk": exponent * max(dk, delta * q.abs().max().item()),
        "dv": exponent * dv,
    }


def use_tile(monkeypatch, block_q, block_k, use_tma=True, loops="two"):
    """Every attention kernel takes this tile from now on, by descriptor if it can and may. Compiled fp32 kernels take
    32 x 32 at most: larger ones spill kilobytes, over which ptxas sits for minutes, or ask for too much memory."""

    def tile(kernel, arch, head_dim, dtype_bytes, dropout=False, descriptors=True, tf32=False):
        most = 32 if dtype_bytes == 4 and not INTERPRETED else 128
        size = min(block_q, most), min(block_k, most)
        return _tuning.Tile(
            *size, 8 if max(size) == 128 or most == 32 else 4, 1, loops, use_tma=use_tma and descriptors
        )

    monkeypatch.setattr(_tuning, "attention_tile", tile)
