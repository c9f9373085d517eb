"""kernels.causal_attention as PyTorch sees it: operator checks, compilation, autocast, the schedule and bad input."""

import re

import pytest
import torch
import triton
import triton.language as tl

import kernels
from gptlib import reference
from kernels import _runtime
from kernels.attention.tiles import schedule

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16


def _inputs(device, B=1, H=2, T=20, D=16, dtype=fp32, grad=False):
    return [torch.randn(B, T, H, D, device=device).to(dtype).transpose(1, 2).requires_grad_(grad) for _ in range(3)]


def test_opcheck(device):
    q, k, v = _inputs(device, grad=True)
    cu_seqlens = torch.tensor([0, 8, 20], dtype=torch.int32, device=device)
    rng = torch.tensor([3, 4], device=device)
    for args in ((q, k, v, 0.25, 0.0, None, 0, None), (q, k, v, 0.25, 0.1, rng, 5, cu_seqlens)):
        torch.library.opcheck(torch.ops.kernels.attention.default, args)


def test_compiles_without_a_graph_break(device):
    q, k, v = _inputs(device, grad=True)

    def loss(q, k, v):
        return kernels.causal_attention(q * 1.0, k, v).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    want = torch.autograd.grad(loss(q, k, v), (q, k, v))
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_for_any_scale(device):
    q, k, v = _inputs(device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    attend = torch.compile(
        lambda scale: kernels.causal_attention(q, k, v, scale=scale), fullgraph=True, backend=backend
    )
    for scale in (0.1, 0.2, 0.3):  # from the second on, a symbol
        torch.testing.assert_close(attend(scale), kernels.causal_attention(q, k, v, scale=scale))


def test_compiled_dropout_draws_new_masks(device):
    q, k, v = _inputs(device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    attend = torch.compile(lambda: kernels.causal_attention(q, k, v, dropout_p=0.5), fullgraph=True, backend=backend)
    assert not torch.equal(attend(), attend())


def test_autocast_runs_in_its_dtype(device):
    q, k, v = _inputs(device)
    with torch.autocast(device, dtype=bf16):
        out = kernels.causal_attention(q, k.to(bf16), v)
    assert out.dtype == bf16
    torch.testing.assert_close(out, kernels.causal_attention(q.to(bf16), k.to(bf16), v.to(bf16)))


def test_dropout_follows_the_seed(device):
    q, k, v = _inputs(device)

    def draw(seed):
        torch.manual_seed(seed)
        return kernels.causal_attention(q, k, v, dropout_p=0.5)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_inference_and_frozen_inputs(device):
    q, k, v = _inputs(device)
    with torch.inference_mode():
        kernels.causal_attention(q, k, v)
    v.requires_grad_()
    kernels.causal_attention(q, k, v).sum().backward()
    assert v.grad is not None and q.grad is None


@triton.jit
def _schedule_kernel(out_ptr, num_blocks, num_heads, heads_per_section):
    block, head = schedule(tl.program_id(0), num_blocks, num_heads, heads_per_section)
    tl.store(out_ptr + 2 * tl.program_id(0), block)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, head)


@pytest.mark.parametrize("heads_per_section", [1, 4, 10, 64])
def test_the_schedule_visits_every_tile_once_section_by_section(heads_per_section, device):
    num_blocks, num_heads = 3, 10
    visits = torch.empty(num_blocks * num_heads, 2, dtype=torch.int32, device=device)
    _runtime.launch(_schedule_kernel, (len(visits),), visits, num_blocks, num_heads, heads_per_section)
    visits = [tuple(v) for v in visits.tolist()]
    assert sorted(visits) == [(b, h) for b in range(num_blocks) for h in range(num_heads)]
    sections = [(h // heads_per_section, b) for b, h in visits]
    assert sections == sorted(sections), "sections in order, and inside one the blocks in order"


BAD = {
    "q must be a tensor": lambda q, k, v: ([1], k, v, {}),
    "k has dtype torch.int64": lambda q, k, v: (q, k.long(), v, {}),
    "v is torch.float16 but q is torch.float32": lambda q, k, v: (q, k, v.half(), {}),
    "q must be (B, H, T, D), got shape (2, 20, 16)": lambda q, k, v: (q[0], k, v, {}),
    "k is on meta but q is on": lambda q, k, v: (q, k.to("meta"), v, {}),
    "k and v must have one shape": lambda q, k, v: (q, k, v[:, :, :10], {}),
    "query heads (2) must be a positive multiple of the key heads (3)": lambda q, k, v: (q, *_three_heads(k, v), {}),
    "got Tq = 20, Tk = 10": lambda q, k, v: (q, k[:, :, :10], v[:, :, :10], {}),
    "got Tq = 0": lambda q, k, v: (q[:, :, :0], k, v, {}),
    "the head dimension must be 8 to 256, got 4": lambda q, k, v: (q[..., :4], k[..., :4], v[..., :4], {}),
    "the head dimension must be 8 to 256, got 257": lambda *qkv: (*(x.new_empty(1, 2, 20, 257) for x in qkv), {}),
    "k must share q's batch and head dimension": lambda q, k, v: (q[:0], k, v, {}),
    "dropout_p must be in [0, 1), got 1.0": lambda q, k, v: (q, k, v, {"dropout_p": 1.0}),
    "dropout_p must be in [0, 1), got nan": lambda q, k, v: (q, k, v, {"dropout_p": float("nan")}),
    "window must be an int of at least 1, or None, got 0": lambda q, k, v: (q, k, v, {"window": 0}),
    "scale must be positive and finite, got -1.0": lambda q, k, v: (q, k, v, {"scale": -1.0}),
    "cu_seqlens must be an int32 tensor": lambda q, k, v: (q, k, v, {"cu_seqlens": [0, 20]}),
    "with cu_seqlens B must be 1": lambda *x: (*(torch.cat([t, t]) for t in x), {"cu_seqlens": _docs(x[0], 0, 20)}),
    "documents + 1 >= 2 entries, got 1": lambda q, k, v: (q, k, v, {"cu_seqlens": _docs(q, 0)}),
}  # fmt: skip


def _three_heads(*tensors):
    return [torch.cat([x, x[:, :1]], dim=1) for x in tensors]


def _docs(q, *bounds):
    return torch.tensor(bounds, dtype=torch.int32, device=q.device)


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message, device):
    q, k, v, options = BAD[message](*_inputs(device))
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.causal_attention(q, k, v, **options)


@pytest.mark.parametrize("bounds", [(0, 12, 8, 20), (1, 20), (0, 19)])
def test_wrong_document_bounds_are_refused_or_harmless(bounds, device):
    """A CPU tensor is checked; a GPU's would have to be waited for, so there they are clamped and reads stay inside."""
    q, k, v = _inputs(device)
    if device == "cpu":
        with pytest.raises(ValueError, match="cu_seqlens must start at 0, never decrease and end at T = 20"):
            kernels.causal_attention(q, k, v, cu_seqlens=_docs(q, *bounds))
    else:
        assert kernels.causal_attention(q, k, v, cu_seqlens=_docs(q, *bounds)).isfinite().all()


def test_the_cpu_is_refused_where_kernels_are_compiled(monkeypatch):
    monkeypatch.setattr(_runtime, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        kernels.causal_attention(*_inputs("cpu"))


def test_interpreting_on_a_gpu_is_said(monkeypatch):
    monkeypatch.setattr(_runtime, "INTERPRETED", True)
    with pytest.warns(UserWarning, match="interpreter, slowly: TRITON_INTERPRET is set"):
        _runtime.check_device("causal_attention", "q", torch.device("cuda"))


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(_runtime, "INTERPRETED", False)
    monkeypatch.setattr(_runtime, "_gpu", lambda device: ("sm_75", 40))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"Tesla T4 has CUDA capability 7\.5"):
        _runtime.check_device("causal_attention", "q", torch.device("cuda"))


def test_interface_equals_the_reference():
    import inspect

    ours = inspect.signature(kernels.causal_attention).parameters
    theirs = inspect.signature(reference.causal_attention).parameters
    assert list(ours) == [p for p in theirs if p != "dropout_mask"]
