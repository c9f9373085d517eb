"""kernels.causal_attention against the reference: values, gradients, and the properties that define it."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import kernels
from gptlib import reference
from kernels._runtime import INTERPRETED
from tests.attention_cases import Call, check, use_tile

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.usefixtures("poisoned")

# Pairwise: lengths around tile edges, head dimensions with and without padding, groups, layouts, every flag.
FAST = [
    Call(B=2, H=3, Hkv=3, Tq=203, Tk=203, D=64, dtype=fp32),
    Call(B=2, H=4, Hkv=2, Tq=113, Tk=203, D=40, dtype=bf16, layout="qkv"),
    Call(H=4, Hkv=1, Tq=128, Tk=256, D=80, dtype=fp16, window=50),
    Call(H=2, Hkv=2, Tq=203, Tk=203, D=33, dtype=fp32, docs=(0, 5, 100, 130, 130, 203)),
    Call(H=2, Hkv=1, Tq=300, Tk=300, D=32, dtype=bf16, docs=(0, 7, 290, 300), window=17, dropout_p=0.2),
    Call(B=2, H=1, Hkv=1, Tq=1, Tk=1, D=8, dtype=bf16),
    Call(H=5, Hkv=5, Tq=3, Tk=3, D=96, dtype=fp16, layout="bhtd"),
    Call(H=1, Hkv=1, Tq=3, Tk=113, D=128, dtype=bf16, dropout_p=0.5, layout="odd"),
    Call(B=2, H=2, Hkv=2, Tq=113, Tk=113, D=64, dtype=fp16, layout="inner", dropout_p=0.1),
    Call(H=3, Hkv=3, Tq=1, Tk=1023, D=64, dtype=fp32),  # takes the split over keys
    Call(B=2, H=4, Hkv=2, Tq=3, Tk=1024, D=40, dtype=bf16, window=300),
    Call(H=2, Hkv=2, Tq=64, Tk=64, D=256, dtype=fp32, scale=0.3),
    Call(H=2, Hkv=2, Tq=130, Tk=130, D=20, dtype=fp32, window=1),
    Call(H=1, Hkv=1, Tq=96, Tk=96, D=64, dtype=fp32, magnitude=100.0),  # logits of 1e4 and more
]
DEEP = [
    Call(B=2, H=3, Hkv=1, Tq=1023, Tk=1023, D=64, dtype=bf16),
    Call(B=1, H=2, Hkv=2, Tq=1024, Tk=1024, D=128, dtype=bf16),
    Call(B=1, H=2, Hkv=2, Tq=1024, Tk=1024, D=64, dtype=fp32, window=200),
    Call(H=2, Hkv=2, Tq=1024, Tk=1024, D=64, dtype=fp16, docs=(0, 100, 101, 640, 1024), dropout_p=0.1),
    Call(H=8, Hkv=2, Tq=16, Tk=1500, D=96, dtype=bf16, window=700),
    Call(H=2, Hkv=2, Tq=203, Tk=1023, D=256, dtype=bf16, dropout_p=0.3),
    *(
        Call(H=3, Hkv=3, Tq=203, Tk=203, D=d, dtype=t)
        for d in (8, 16, 32, 40, 64, 80, 96, 128)
        for t in (fp32, fp16, bf16)
    ),
]


@pytest.mark.parametrize("call", FAST, ids=str)
def test_matches_the_reference(call, device):
    check(call, device)


@pytest.mark.deep
@pytest.mark.parametrize("call", DEEP, ids=str)
def test_matches_the_reference_on_more_shapes(call, device):
    check(call, device)


TILE_SIZES = [
    (16, 64, True, "one"),
    (64, 16, False, "two"),
    (32, 32, False, "one"),
    (64, 32, True, "overlap"),
    (16, 32, False, "overlap"),
]


@pytest.mark.parametrize("tile", TILE_SIZES, ids=str)
def test_every_tile_size_and_way_of_loading_and_looping(tile, device, monkeypatch):
    use_tile(monkeypatch, *tile)
    check(Call(H=2, Hkv=1, Tq=75, Tk=101, D=24, dtype=bf16, dropout_p=0.3), device)
    check(Call(H=1, Hkv=1, Tq=101, Tk=101, D=24, window=37, docs=(0, 20, 70, 101)), device)
    check(Call(H=1, Hkv=1, Tq=40, Tk=150, D=16, window=30), device)  # keys that no query sees


@st.composite
def calls(draw):
    tq = draw(st.integers(1, 150))
    docs = draw(st.one_of(st.none(), st.lists(st.integers(0, tq), max_size=4)))
    hkv = draw(st.integers(1, 2))
    return Call(
        B=1 if docs is not None else draw(st.integers(1, 2)),
        H=hkv * draw(st.integers(1, 3)),
        Hkv=hkv,
        Tq=tq,
        Tk=tq if docs is not None else tq + draw(st.integers(0, 150)),
        D=draw(st.integers(8, 72)),
        dtype=draw(st.sampled_from([fp32, fp16, bf16])),
        window=draw(st.one_of(st.none(), st.integers(1, 320))),
        docs=None if docs is None else (0, *sorted(docs), tq),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.7])),
        layout=draw(st.sampled_from(["bthd", "bhtd", "qkv", "odd", "inner"])),
    )


def _draw_calls(examples):
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )


TILES = st.sampled_from(
    [(128, 128, True, "one"), (64, 128, True, "two"), (128, 32, False, "two"), (128, 64, True, "overlap")]
)


@_draw_calls(6)
@hypothesis.given(call=calls(), tile=TILES)
def test_drawn_calls(call, tile, device):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tile(monkeypatch, *tile)
        check(call, device)


@pytest.mark.deep
@_draw_calls(80 if INTERPRETED else 16)  # compiled, every call has kernels of its own: ten seconds each
@hypothesis.given(call=calls(), tile=TILES)
def test_many_drawn_calls(call, tile, device):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tile(monkeypatch, *tile)
        check(call, device)


# ---- properties ------------------------------------------------------------------------------------------------------


def _inputs(device, B=1, H=2, T=150, D=32, dtype=fp32):
    return [torch.randn(B, T, H, D, device=device).to(dtype).transpose(1, 2) for _ in range(3)]


def test_the_future_changes_nothing(device):
    q, k, v = _inputs(device)
    before = kernels.causal_attention(q, k, v)
    k[:, :, 100:], v[:, :, 100:] = 1e4, 1e4
    after = kernels.causal_attention(q, k, v)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


def test_equal_keys_give_the_running_mean(device):
    q, k, v = _inputs(device)
    out = kernels.causal_attention(q, torch.ones_like(k), v)
    steps = torch.arange(1, 151, device=device)[:, None]
    torch.testing.assert_close(out, v.cumsum(2) / steps, atol=2e-6, rtol=1e-5)


def test_documents_equal_separate_calls(device):
    q, k, v = _inputs(device, T=200)
    cu_seqlens = torch.tensor([0, 64, 64, 190, 200], dtype=torch.int32, device=device)
    packed = kernels.causal_attention(q, k, v, cu_seqlens=cu_seqlens)
    for start, end in ((0, 64), (64, 190), (190, 200)):
        alone = kernels.causal_attention(*(x[:, :, start:end] for x in (q, k, v)))
        torch.testing.assert_close(packed[:, :, start:end], alone, atol=2e-6, rtol=1e-5)


def test_a_window_as_long_as_the_keys_is_no_window(device):
    q, k, v = (x.requires_grad_() for x in _inputs(device))
    plain = torch.autograd.grad(kernels.causal_attention(q, k, v).sum(), (q, k, v))
    for window in (150, 2**31 - 1, 2**62):
        wide = torch.autograd.grad(kernels.causal_attention(q, k, v, window=window).sum(), (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(wide, plain, strict=True))


def test_the_backward_gives_the_same_bits_every_time(device):
    q, k, v = (x.requires_grad_() for x in _inputs(device, dtype=bf16))
    out = kernels.causal_attention(q, k, v)
    runs = [torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_output_and_gradients_merge_heads_for_free(device):
    q, k, v = (x.requires_grad_() for x in _inputs(device))
    out = kernels.causal_attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    out.sum().backward()  # delivers an expanded gradient of stride 0
    assert all(x.grad.transpose(1, 2).is_contiguous() for x in (q, k, v))


def test_gradients_of_lse_alone_and_of_nothing(device):
    q, k, v = (x.double().float().requires_grad_() for x in _inputs(device, T=40))
    _, lse = kernels.causal_attention(q, k, v, return_lse=True)
    _, expected = reference.causal_attention(q, k, v, return_lse=True)
    for got, want in zip(
        torch.autograd.grad(lse.sum(), (q, k)), torch.autograd.grad(expected.sum(), (q, k)), strict=True
    ):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_spans", [2, 3, 7])
@pytest.mark.parametrize("window", [0, 100])
def test_splitting_the_keys_changes_nothing_but_the_order(num_spans, window, device):
    from kernels.attention.decode import attention_decode
    from kernels.attention.forward import attention_forward

    q, k, v = _inputs(device, H=4, T=700, D=40)
    q, k, v = q[:, :, -3:], k[:, :2], v[:, :2]
    whole, lse = attention_forward(q, k, v, 0.2, window=window)
    split, split_lse = attention_decode(q, k, v, 0.2, window=window, num_spans=num_spans)
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(split_lse, lse, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("D, dtype, tiles", [(40, fp32, 3), (136, bf16, 2), (40, bf16, 1)])
def test_more_rows_than_a_tile_of_decoding(D, dtype, tiles, device):
    from kernels._runtime import cdiv
    from kernels.attention.decode import attention_decode, rows_of, rows_per_tile
    from kernels.attention.forward import attention_forward

    q, k, v = (x.to(dtype) for x in _inputs(device, H=12, T=600, D=D))
    q, k, v = q[:, :, -7:], k[:, ::6], v[:, ::6]  # 42 rows: 6 heads of 7 queries
    assert rows_of(q, k) == 42 and cdiv(42, rows_per_tile(q, k)) == tiles
    whole, lse = attention_forward(q, k, v, 0.2)
    split, split_lse = attention_decode(q, k, v, 0.2, num_spans=2)
    torch.testing.assert_close(split.float(), whole.float(), atol=1e-6 if dtype == fp32 else 0.01, rtol=0.01)
    torch.testing.assert_close(split_lse, lse, atol=1e-5, rtol=1e-6)


def test_empty_batch(device):
    q, k, v = (torch.empty(0, 2, 5, 16, device=device, requires_grad=True) for _ in range(3))
    out = kernels.causal_attention(q, k, v)
    out.sum().backward()
    assert out.shape == (0, 2, 5, 16) and q.grad.shape == q.shape


@pytest.mark.deep
def test_offsets_beyond_31_bits(device):
    """Two batches more than 2^31 elements apart, in memory that is never touched in between."""
    far = 2**31 + 64
    storage = torch.empty(far + 4096, dtype=fp16, device=device)
    q = torch.as_strided(storage, (2, 2, 16, 32), (far, 32, 64, 1))
    q.normal_()
    out = kernels.causal_attention(q, q, q)
    torch.testing.assert_close(out, reference.causal_attention(q, q, q), atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("heads, layout", [(128, "BTHD"), (132_200, "BHTD")])
def test_rows_of_very_many_heads_stay_within_31_bits(heads, layout):
    """128 rows of (1, 132200, 128, 128), heads innermost, span more than 2^31 elements: 4 GB in bf16."""
    from kernels.attention.tiles import empty_heads, readable

    out = empty_heads(1, heads, 128, 128, like=torch.empty(0, device="meta", dtype=bf16))
    assert out.shape == (1, heads, 128, 128)
    assert (
        out.stride()
        == {"BTHD": (128 * heads * 128, 128, heads * 128, 1), "BHTD": (heads * 128**2, 128**2, 128, 1)}[layout]
    )
    assert readable(out) is out


@pytest.mark.gpu
def test_more_heads_than_a_grid_dimension_holds(device):
    q = torch.randn(70_000, 1, 16, 16, device=device, dtype=fp16)
    out = kernels.causal_attention(q, q, q)
    torch.testing.assert_close(out, reference.causal_attention(q, q, q), atol=2e-3, rtol=1e-2)
