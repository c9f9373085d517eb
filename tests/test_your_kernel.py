"""What an attention function must do to be used here: `pytest tests --attn my.kernel:attend` runs these tests on yours.

Without the flag they run on our own kernel. docs/your_kernel.md says how to write one. On a CPU the tests use fp32 (the
interpreter multiplies bf16 wrongly unless a kernel takes care), on a GPU fp16 and bf16.
"""

import pytest
import torch

from gptlib import backends, reference
from gptlib.errors import UserError
from gptlib.model import GPTConfig, GPTModel
from tests.oracle import assert_matches

SHAPES = [(2, 2, 64, 32), (1, 3, 113, 64), (1, 1, 1, 64), (1, 2, 203, 64)]  # B, H, T, D
DTYPES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]


@pytest.fixture(scope="module")
def attend(request):
    return backends.attention(request.config.getoption("--attn") or "triton")


def draw(shape, dtype, device):
    """q, k, v and an upstream gradient as the model has them: (B, T, H, D) in memory, seen as (B, H, T, D)."""
    B, H, T, D = shape
    return [torch.randn(B, T, H, D, device=device).to(dtype).transpose(1, 2) for _ in range(4)]


def forward_and_backward(attend, q, k, v, dout, **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, **options)
    return {"out": out, **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), dout), strict=True))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "scale"), [*((s, None) for s in SHAPES), (SHAPES[0], 0.3)], ids=str)
def test_output_and_gradients(attend, shape, scale, dtype, device):
    inputs = draw(shape, dtype, device)
    found = forward_and_backward(attend, *inputs, scale=scale, dropout_p=0.0)
    eager = forward_and_backward(reference.causal_attention, *inputs, scale=scale)
    ref = forward_and_backward(reference.causal_attention, *(x.double() for x in inputs), scale=scale)
    size = max(x.abs().max().item() for x in inputs)
    for name, tensor in found.items():
        # where one key is all there is, dq and dk are 0 = (dp - delta) k, and delta comes from the rounded out x dout
        rounded = size**3 if shape[2] == 1 and name in ("dq", "dk") else None
        assert_matches(name, tensor, ref[name], eager[name], scale=rounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_future_is_not_seen(attend, dtype, device):
    q, k, v, _ = draw((1, 2, 97, 64), dtype, device)
    out = attend(q, k, v, scale=None, dropout_p=0.0)
    now = 40
    k, v = k.clone(), v.clone()
    k[:, :, now + 1 :] += 3.0
    v[:, :, now + 1 :] -= 5.0
    changed = attend(q, k, v, scale=None, dropout_p=0.0)
    assert torch.equal(out[:, :, : now + 1], changed[:, :, : now + 1])
    assert not torch.equal(out[:, :, now + 1 :], changed[:, :, now + 1 :])


def test_a_model_learns_with_it_as_with_the_reference(request, device):
    cfg = GPTConfig(vocab_size=61, context_length=48, emb_dim=64, n_heads=2, n_layers=1, drop_rate=0.0)
    tokens = torch.randint(61, (2, 49), generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for name in ("reference", request.config.getoption("--attn") or "triton"):
        torch.manual_seed(0)
        model = GPTModel(cfg, attn=name).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(3):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    expected, found = losses
    assert found == pytest.approx(expected, abs=2e-2 if device == "cuda" else 1e-3)


def test_a_function_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="cannot be called as"):
        backends.attention("math:sqrt")
