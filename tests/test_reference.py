"""The reference against PyTorch's own operators and against its definition, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from gptlib import reference

F64 = torch.float64


def qkv(B=2, H=4, Hkv=4, Tq=5, Tk=5, D=8, dtype=F64):
    return torch.randn(B, H, Tq, D, dtype=dtype), *torch.randn(2, B, Hkv, Tk, D, dtype=dtype)


@pytest.mark.parametrize("Tq, Tk", [(1, 1), (7, 7), (1, 9), (4, 9)])
@pytest.mark.parametrize("Hkv", [1, 2, 4])
def test_attention_equals_sdpa(Tq, Tk, Hkv):
    q, k, v = qkv(Hkv=Hkv, Tq=Tq, Tk=Tk)
    expected = F.scaled_dot_product_attention(q, k, v, causal_lower_right(Tq, Tk), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(reference.causal_attention(q, k, v, scale=0.3), expected)


def test_attention_by_hand():
    q = torch.tensor([[[[1.0], [2.0]]]], dtype=F64)
    k = torch.tensor([[[[1.0], [3.0]]]], dtype=F64)
    v = torch.tensor([[[[5.0], [7.0]]]], dtype=F64)
    out, lse = reference.causal_attention(q, k, v, return_lse=True)
    e2, e6 = math.exp(2), math.exp(6)
    torch.testing.assert_close(out.flatten(), torch.tensor([5.0, (5 * e2 + 7 * e6) / (e2 + e6)], dtype=F64))
    torch.testing.assert_close(lse.flatten(), torch.tensor([1.0, math.log(e2 + e6)], dtype=F64))


def test_the_future_does_not_matter():
    q, k, v = qkv(Tq=6, Tk=6)
    before = reference.causal_attention(q, k, v)
    k[:, :, 4:] += 1
    v[:, :, 4:] += 1
    after = reference.causal_attention(q, k, v)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.allclose(before[:, :, 4:], after[:, :, 4:])


def test_window_and_documents_by_hand():
    window = reference.causal_mask(2, 4, window=2)
    assert window.tolist() == [[False, True, True, False], [False, False, True, True]]
    documents = reference.causal_mask(4, 4, cu_seqlens=torch.tensor([0, 1, 1, 4], dtype=torch.int32))
    assert documents.tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, True, True, False],
        [False, True, True, True],
    ]


def test_documents_equal_separate_calls():
    q, k, v = qkv(B=1, Tq=9, Tk=9)
    packed = reference.causal_attention(q, k, v, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32))
    apart = [reference.causal_attention(*(t[:, :, a:b] for t in (q, k, v))) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(packed, torch.cat(apart, dim=2))


def test_a_given_dropout_mask_and_a_drawn_one():
    q, k, _ = qkv(D=5)
    identity = torch.eye(5, dtype=F64).expand(2, 4, 5, 5)
    mask = torch.rand(2, 4, 5, 5) < 0.5
    weights = reference.causal_attention(q, k, identity)
    masked = reference.causal_attention(q, k, identity, dropout_p=0.5, dropout_mask=mask)
    torch.testing.assert_close(masked, weights * mask * 2)
    drawn = reference.causal_attention(q, k, identity, dropout_p=0.25)
    kept = drawn != 0
    torch.testing.assert_close(drawn[kept], weights[kept] / 0.75)
    assert 0 < kept.sum() < (weights != 0).sum()


def test_attention_gradients():
    inputs = [t.requires_grad_() for t in qkv(B=1, H=2, Hkv=1, Tq=3, Tk=4, D=3)]
    mask = torch.rand(1, 2, 3, 4) < 0.7
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference.causal_attention(
            q, k, v, window=3, dropout_p=0.3, dropout_mask=mask, return_lse=True
        ),
        inputs,
    )


def test_attention_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match=r"3 heads.*2"):
        reference.causal_attention(*qkv(H=3, Hkv=2))
    with pytest.raises(ValueError, match=r"6 positions.*5"):
        reference.causal_attention(*qkv(Tq=6, Tk=5))


def test_softmaxes():
    scores = torch.randn(2, 3, 4, 6, dtype=F64)
    torch.testing.assert_close(reference.softmax(scores), torch.softmax(scores, -1))
    weights = reference.causal_softmax(scores, 0.5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4, dtype=F64))
    assert torch.equal(weights, weights.tril(2))
    torch.testing.assert_close(weights[..., 1, :4], torch.softmax(scores[..., 1, :4] * 0.5, -1))
    assert torch.autograd.gradcheck(lambda s: reference.causal_softmax(s, 0.5), scores[:1, :1].clone().requires_grad_())


@pytest.mark.parametrize("N", [1, 7, 64])
def test_norms_equal_torch(N):
    x, residual = torch.randn(2, 3, N, dtype=F64)
    weight, bias = torch.randn(2, N, dtype=F64)
    torch.testing.assert_close(reference.layer_norm(x, weight, bias), F.layer_norm(x, (N,), weight, bias))
    torch.testing.assert_close(reference.layer_norm(x, None, None), F.layer_norm(x, (N,)))
    torch.testing.assert_close(reference.rms_norm(x, weight), F.rms_norm(x, (N,), weight, eps=1e-6))
    normed, total = reference.add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, F.layer_norm(x + residual, (N,), weight, bias))


def test_norm_gradients():
    x, weight, bias = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((3, 5), (5,), (5,)))
    assert torch.autograd.gradcheck(lambda *a: reference.add_layer_norm(a[0], a[0] * 2, a[1], a[2]), (x, weight, bias))
    assert torch.autograd.gradcheck(reference.rms_norm, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_function_keeps_the_dtype(dtype):
    x = torch.randn(4, 8, dtype=dtype)
    weight = torch.randn(8)
    assert reference.layer_norm(x, weight, weight).dtype == dtype
    assert reference.rms_norm(x, weight).dtype == dtype
    assert reference.softmax(x).dtype == reference.causal_softmax(x, 1.0).dtype == dtype
    out, lse = reference.causal_attention(*qkv(dtype=dtype), return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert reference.cross_entropy(x, torch.arange(4)).dtype == torch.float32


def test_losses():
    x, weight = torch.randn(2, 3, 8, dtype=F64), torch.randn(11, 8, dtype=F64)
    targets = torch.randint(11, (2, 3))
    expected = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(reference.linear_cross_entropy(x, weight, targets), expected)
    logits = x @ weight.T
    targets[0, 1] = 7
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=7, reduction=reduction)
        got = reference.cross_entropy(logits, targets, ignore_index=7, reduction=reduction)
        torch.testing.assert_close(got.flatten() if reduction == "none" else got, expected)
    assert torch.autograd.gradcheck(
        lambda *t: reference.linear_cross_entropy(*t, targets, ignore_index=7),
        (x.requires_grad_(), weight.requires_grad_()),
    )
