"""Softmax and causal softmax against gptlib.reference, and the promises of their docstrings."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from gptlib import reference
from kernels import _tuning
from kernels._runtime import INTERPRETED, record_launches
from kernels.softmax import softmax_backward, softmax_forward
from tests import rows
from tests.oracle import assert_matches

SCALE = 0.3
interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's loads and stores")


def check(x, causal):
    """Output and gradient of kernels.softmax or causal_softmax held to the rule."""
    grad = torch.randn(x.shape, device=x.device).to(x.dtype)
    call = (lambda m, t: m.causal_softmax(t, SCALE)) if causal else (lambda m, t: m.softmax(t))
    out, eager, ref = rows.run_three_ways(call, [x], [grad])
    assert_matches("y", out[0], ref[0], eager[0])
    products = (ref[0] * grad.double()).abs()  # dx = y dy - y sum(y dy), from y as it was rounded
    cancelled = (products + ref[0] * products.sum(-1, keepdim=True)).max()
    assert_matches("dx", out[1], ref[1], eager[1], scale=cancelled)
    return out


@pytest.fixture(params=["whole rows", "blocks"])
def tiles(request, monkeypatch, device):
    if request.param == "blocks":
        rows.use_small_tiles(monkeypatch, device)


@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 7), (2, 3, 113), (5, 203), (3, 256), (2, 1, 1000)], ids=str)
def test_softmax_matches_the_reference(shape, dtype, device, tiles, poisoned):
    check(4 * rows.make(shape, dtype, device), causal=False)


@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 40, 40), (1, 7, 113), (2, 96, 128), (2, 1, 203)], ids=str)
def test_causal_softmax_matches_the_reference(shape, dtype, device, tiles, poisoned):
    check(4 * rows.make(shape, dtype, device), causal=True)


@given(case=rows.row_tensors(min_dims=2), causal=st.booleans(), small=st.booleans())
@rows.FEW_EXAMPLES
def test_any_shape_dtype_and_stride(case, causal, small, device):
    shape, dtype, layout = case
    with rows.drawn_tiles(small, device):
        check(rows.make(shape, dtype, device, layout), causal=causal and shape[-2] <= shape[-1])


@pytest.mark.deep
@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 31, 1023, 1024, 1025, 4096, 8191, 16384, 32768, 50257, 65537, 262144])
def test_every_length_of_row(n, dtype, device, poisoned):
    check(rows.make((3, n), dtype, device), causal=False)


@pytest.mark.deep
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [64, 1000, 4096, 8192, 16384, 32768, 40000])
def test_the_tiles_that_ship_for_gpus(n, causal, device, monkeypatch):
    if INTERPRETED:
        monkeypatch.setitem(_tuning.ROWS, "interpret", _tuning.ROWS["sm_90"])
    check(rows.make((2, 3, n), torch.float16, device), causal)


@pytest.mark.deep
@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
def test_causal_softmax_of_long_sequences(dtype, device, poisoned):
    check(rows.make((1, 1023, 1023), dtype, device), causal=True)


@pytest.mark.deep
@given(case=rows.row_tensors(longest=2000, min_dims=2), causal=st.booleans(), small=st.booleans())
@rows.MANY_EXAMPLES
def test_any_shape_dtype_and_stride_at_length(case, causal, small, device):
    test_any_shape_dtype_and_stride.hypothesis.inner_test(case, causal, small, device)


@pytest.mark.parametrize("layout", rows.LAYOUTS)
def test_strides(layout, device):
    x = rows.make((2, 3, 40), torch.float32, device, layout)
    assert torch.equal(kernels.softmax(x), kernels.softmax(x.contiguous()))
    assert kernels.softmax(x).is_contiguous()


def test_gradient_of_zero_strides(device):
    x = rows.make((3, 20), torch.float32, device).requires_grad_()
    kernels.softmax(x).sum().backward()
    assert x.grad.abs().max() < 1e-6  # rows sum to one whatever x is


def test_rows_sum_to_one_and_ignore_shifts(device, tiles):
    x = torch.randint(-8, 8, (6, 300), device=device).float()
    y = kernels.softmax(x)
    assert torch.allclose(y.sum(-1), torch.ones(6, device=device), atol=1e-6)
    assert torch.equal(y, kernels.softmax(x + 1e4))  # exact integers: the same differences, so the same bits
    assert torch.allclose(kernels.softmax(torch.full_like(x, 3e38)), torch.full_like(x, 1 / 300), atol=0, rtol=1e-6)


def test_minus_infinity_and_nan_as_torch_does(device, tiles):
    x = rows.make((5, 100), torch.float32, device)
    x[0, :70] = -math.inf
    x[1] = -math.inf
    x[2, 7] = math.nan
    x[3, 80] = math.inf
    expected = torch.softmax(x, -1)
    assert torch.allclose(kernels.softmax(x), expected, atol=1e-6, equal_nan=True)
    assert expected[1].isnan().all() and expected[2].isnan().all()


def test_causal_rows_of_minus_infinity_are_zero(device, tiles):
    scores = rows.make((1, 90, 90), torch.float32, device)
    scores[:, :, 0] = -math.inf
    scores[:, 70] = -math.inf
    scores.requires_grad_()
    y = kernels.causal_softmax(scores, SCALE)
    y.backward(torch.ones_like(y))
    assert (y[:, [0, 70]] == 0).all() and torch.isfinite(y).all()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("Tk", [60, 64, 133])
def test_nothing_above_the_diagonal_is_used(Tk, device, tiles):
    Tq = 60
    hidden = ~reference.causal_mask(Tq, Tk, device=device)
    scores = rows.make((1, Tq, Tk), torch.float32, device)
    grad = rows.make((1, Tq, Tk), torch.float32, device)
    y, dx = rows.run(lambda t: kernels.causal_softmax(t, SCALE), [scores], [grad])
    for poison in (math.nan, math.inf, 1e30):
        poisoned_scores, poisoned_grad = scores.masked_fill(hidden, poison), grad.masked_fill(hidden, poison)
        again = rows.run(lambda t: kernels.causal_softmax(t, SCALE), [poisoned_scores], [poisoned_grad])
        assert torch.equal(y, again[0]) and torch.equal(dx, again[1])
    assert (y[:, hidden] == 0).all() and (dx[:, hidden] == 0).all()


def test_the_future_changes_nothing(device):
    scores = rows.make((20, 30), torch.float32, device)
    y = kernels.causal_softmax(scores, SCALE)
    scores[:, 25:] += 1
    changed = (kernels.causal_softmax(scores, SCALE) != y).any(dim=1)
    assert not changed[:15].any() and changed[15:].all()  # query 15 is the first that sees key 25


def test_empty_inputs(device):
    for shape in ((0,), (0, 5), (5, 0), (2, 0, 3)):
        x = torch.empty(shape, device=device, requires_grad=True)
        y = kernels.softmax(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
    assert kernels.causal_softmax(torch.empty(3, 0, 4, device=device), SCALE).shape == (3, 0, 4)


meta = functools.partial(torch.empty, device="meta")  # refused before anything asks where it could run


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: kernels.softmax([1.0]), "x must be a tensor, got list"),
        (lambda: kernels.softmax(meta(3, dtype=torch.float64)), "x has dtype torch.float64"),
        (lambda: kernels.softmax(meta(())), "x has no dimension"),
        (lambda: kernels.causal_softmax(meta(3), 1.0), r"scores has shape \(3,\)"),
        (lambda: kernels.causal_softmax(meta(3, 2), 1.0), "3 queries but only 2 keys"),
        (lambda: kernels.causal_softmax(meta(2, 2), 0.0), "scale is 0.0"),
        (lambda: kernels.causal_softmax(meta(2, 2), math.nan), "scale is nan"),
        (lambda: kernels.causal_softmax(meta(2, 2), "half"), "scale is 'half'"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- as a PyTorch operator -------------------------------------------------------------------------------------------


def test_operator_registration(device):
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.kernels.softmax.default, (x, 0.5, True, torch.float32))
    torch.library.opcheck(torch.ops.kernels.softmax_backward.default, (x.detach(), x.detach(), 0.5, False, x.dtype))


def test_compiles_without_graph_breaks(device):
    def f(x):
        return kernels.softmax(x * 2).square().sum() + (kernels.causal_softmax(x, SCALE) * x).sum()

    x = torch.randn(2, 5, 8, device=device, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    (expected,), (got,) = torch.autograd.grad(f(x), x), torch.autograd.grad(compiled(x), x)
    assert torch.allclose(expected, got, atol=1e-6)


def test_autocast_writes_its_dtype(device):
    x = torch.randn(4, 50, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = kernels.softmax(x)
        y_causal = kernels.causal_softmax(x.view(1, 4, 50), SCALE)
    assert y.dtype == y_causal.dtype == torch.bfloat16
    assert_matches("y", y, torch.softmax(x.detach().double(), -1), torch.softmax(x.detach(), -1).bfloat16())
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32


# ---- bytes and indices -----------------------------------------------------------------------------------------------


@interpreter_only
@pytest.mark.parametrize("n", [40, 100])
def test_whole_rows_move_two_and_three_tensors(n):
    x, dy = torch.randn(7, n).half(), torch.randn(7, n).half()
    with rows.counted_traffic() as forward:
        y = softmax_forward(x, 1.0, False, x.dtype)
    with rows.counted_traffic() as backward:
        dx = softmax_backward(y, dy, 1.0, False, x.dtype)
    assert (forward.reads(x) == 1).all() and (forward.writes(y) == 1).all()
    assert (backward.reads(y) == 1).all() and (backward.reads(dy) == 1).all() and (backward.writes(dx) == 1).all()
    assert forward.total_bytes() == 2 * x.nbytes == x.nbytes + y.nbytes
    assert backward.total_bytes() == 3 * x.nbytes


@interpreter_only
def test_blocks_read_twice_and_write_once(monkeypatch):
    rows.use_small_tiles(monkeypatch, "cpu")
    x, dy = torch.randn(3, 203).half(), torch.randn(3, 203).half()
    with rows.counted_traffic() as forward:
        y = softmax_forward(x, 1.0, False, x.dtype)
    with rows.counted_traffic() as backward:
        dx = softmax_backward(y, dy, 1.0, False, x.dtype)
    assert forward.total_bytes() == 3 * x.nbytes and (forward.writes(y) == 1).all()
    assert backward.total_bytes() == 5 * x.nbytes and (backward.writes(dx) == 1).all()


@interpreter_only
@pytest.mark.parametrize("T, group", [(61, 1), (128, 8)])
def test_causal_reads_stop_at_the_diagonal(T, group):
    x = torch.randn(2, T, T).half()
    with rows.counted_traffic() as forward:
        y = softmax_forward(x, 1.0, True, x.dtype)
    with rows.counted_traffic() as backward:
        dx = softmax_backward(y, y, 1.0, True, x.dtype)
    diagonal_group = (torch.arange(T)[None, :] // group * group <= torch.arange(T)[:, None]).long().expand(2, T, T)
    assert torch.equal(forward.reads(x), diagonal_group)
    assert torch.equal(backward.reads(y), 2 * diagonal_group)  # as y and as dy
    assert (forward.writes(y) == 1).all() and (backward.writes(dx) == 1).all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("n", [100, 4096, 262144])
def test_launches_touch_the_counted_tensors_only(arch, n):
    launches = []
    x = torch.empty(1000, n, dtype=torch.bfloat16, device="meta")
    with record_launches(arch, lambda *launch: launches.append(launch)):
        softmax_backward(softmax_forward(x, 1.0, False, x.dtype), x, 1.0, False, x.dtype)
    sizes = [sum(a.nbytes for a in args if isinstance(a, torch.Tensor)) for _, _, args, *_ in launches]
    assert sizes == [2 * x.nbytes, 3 * x.nbytes]


def test_offsets_beyond_31_bits(device):
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device)  # 4 GiB of address space, two pages of memory
    x = storage.as_strided((2, 64), (2**31, 1))
    x.copy_(torch.randn(2, 64))
    assert torch.allclose(kernels.softmax(x).float(), torch.softmax(x.float(), -1), atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2**31 // 512 + 3, 512), (2**27, 17), (3, 2**30)], ids=str)
def test_more_than_31_bits_of_elements(shape):
    x = torch.randn(shape, dtype=torch.float16, device="cuda")
    y = kernels.softmax(x)
    for row in (0, shape[0] // 2, shape[0] - 1):
        error = torch.softmax(x[row], -1, dtype=torch.float32).sub_(y[row]).abs_().max()  # gigabytes, so in place
        assert error < 1e-3
