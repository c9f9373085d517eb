"""Attention dropout: the mask itself, recovered from the kernels and compared with Philox in NumPy."""

import numpy as np
import pytest
import torch

import kernels
from kernels import _dropout
from tests.attention_cases import use_tile
from tests.philox import keep_mask, philox4x32

pytestmark = pytest.mark.usefixtures("poisoned")


def test_philox_in_numpy_gives_the_published_values():
    """Known answers of the authors' Random123 library."""
    zero = tuple(np.zeros(1, np.uint64) for _ in range(4))
    assert [int(w[0]) for w in philox4x32(zero, (0, 0))] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert [int(w[0]) for w in philox4x32(zero, (0, 0), 10)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = tuple(np.full(1, 0xFFFFFFFF, np.uint64) for _ in range(4))
    words = philox4x32(ones, (0xFFFFFFFF, 0xFFFFFFFF), 10)
    assert [int(w[0]) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def _weights(device, p, B=2, H=3, Tq=60, Tk=64):
    """Dropped attention weights times the number of visible keys, through equal scores and V = identity."""
    q, k = torch.zeros(B, H, Tq, Tk, device=device), torch.zeros(B, H, Tk, Tk, device=device)
    v = torch.eye(Tk, device=device).expand(B, H, Tk, Tk).contiguous()
    out = kernels.causal_attention(q, k, v, dropout_p=p)
    return out * torch.arange(Tk - Tq + 1, Tk + 1, device=device)[:, None]


def _visible(Tq, Tk):
    return torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq)


def _drawn_mask(device, p, B=2, H=3, Tq=60, Tk=64):
    threshold, rescale = _dropout.threshold_and_rescale(p)
    return keep_mask(_dropout.draw_rng(torch.device(device)), B, H, Tq, Tk, threshold), rescale


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_forward_mask_is_philox(p, device):
    torch.manual_seed(5)
    weights = _weights(device, p).cpu()
    torch.manual_seed(5)
    mask, rescale = _drawn_mask(device, p)
    torch.testing.assert_close(weights, mask * _visible(60, 64) * rescale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [(16, 32, True), (64, 16, False)])
def test_the_mask_does_not_depend_on_tiles(tile, device, monkeypatch):
    torch.manual_seed(5)
    before = _weights(device, 0.3)
    use_tile(monkeypatch, *tile)
    torch.manual_seed(5)
    assert torch.equal(_weights(device, 0.3) != 0, before != 0)


def test_the_backward_uses_the_forward_mask(device):
    """d out_i / d v_j is the dropped weight itself: with dout = identity, dv is its transpose."""
    Tq = Tk = 64
    q = k = torch.zeros(1, 1, Tk, Tk, device=device)
    v = torch.eye(Tk, device=device)[None, None].requires_grad_()
    out = kernels.causal_attention(q, k, v, dropout_p=0.4)
    (dv,) = torch.autograd.grad(out, v, torch.eye(Tq, device=device)[None, None])
    assert torch.equal((dv.mT != 0), (out != 0))


@pytest.mark.parametrize("p", [0.002, 0.1, 0.37, 0.9])
def test_the_rate_is_right_and_heads_differ(p, device):
    B, H, T = 2, 3, 256
    threshold, rescale = _dropout.threshold_and_rescale(p)
    mask = keep_mask(torch.tensor([11, 22]), B, H, T, T, threshold)
    assert abs(1 - mask.double().mean().item() - p) < 0.01
    assert abs(mask.double().mean().item() * rescale - 1) < 0.01
    centered = (mask.double() - mask.double().mean()).flatten(2).flatten(0, 1)  # (B * H, T * T)
    correlation = torch.corrcoef(centered) - torch.eye(B * H)
    assert correlation.abs().max() < 5 / T, "heads are independent: |r| is about 1 / T"


def test_the_mean_output_is_the_output_without_dropout(device):
    q, k, v = (torch.randn(64, 1, 33, 16, device=device)[:1].expand(64, 1, 33, 16).contiguous() for _ in range(3))
    dropped = kernels.causal_attention(q, k, v, dropout_p=0.5)
    plain = kernels.causal_attention(q[:1], k[:1], v[:1])
    error = (dropped.mean(0) - plain[0]).abs().mean()
    assert error < 3 * dropped.std(0).mean() / 8  # 64 independent heads
