"""The attention cases of bench/numerics.py: a ladder of shapes, and what torch itself offers beside our kernel."""

import torch

from gptlib import backends, reference

LADDER = (  # B, H, Hkv, Tq, Tk, D, kind
    (2, 4, 4, 64, 64, 64, "normal"),
    (1, 4, 4, 256, 256, 64, "normal"),
    (1, 2, 2, 1024, 1024, 64, "normal"),
    (1, 2, 2, 256, 256, 128, "normal"),
    (1, 4, 1, 203, 300, 80, "normal"),
    (1, 2, 2, 256, 256, 64, "q, k x 10"),
    (1, 2, 2, 256, 256, 64, "v + 100"),
)


def attention_calls(device):
    """(op, shape, kind, tensors, ours, eager, peers) of each case; tensors are fp32 and peers {name: function}."""
    import kernels

    peers = {name: backends.attention(name) for name in sdpa_names(device)}
    for B, H, Hkv, Tq, Tk, D, kind in LADDER:
        q = torch.randn(B, Tq, H, D, device=device).transpose(1, 2)
        k, v = (torch.randn(B, Tk, Hkv, D, device=device).transpose(1, 2) for _ in range(2))
        if kind == "q, k x 10":
            q, k = 10 * q, 10 * k
        if kind == "v + 100":
            v = v + 100
        shape = (B, H, Hkv, Tq, Tk, D)
        tensors = {"q": q, "k": k, "v": v}
        yield "attention", shape, kind, tensors, kernels.causal_attention, reference.causal_attention, peers


def sdpa_names(device):
    """SDPA held to each implementation that exists on the device."""
    everywhere = ("sdpa-math", "sdpa-flash")
    return everywhere if device.type == "cpu" else (*everywhere, "sdpa-efficient", "sdpa-cudnn")
