"""LayerNorm, add + LayerNorm and RMSNorm against gptlib.reference, and the promises of their docstrings."""

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
from kernels.layernorm import norm_backward, norm_forward
from tests import rows
from tests.oracle import assert_matches

OPS = ("layer_norm", "add_layer_norm", "rms_norm")
interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's loads and stores")


def inputs(op, x, weight_dtype=None, weight=True, bias=True):
    """Tensors of a call of `op`: x, a residual like it, weight and bias, each None where the case has none."""
    n, device = x.shape[-1], x.device
    weights = [
        torch.randn(n, device=device).to(weight_dtype or x.dtype) if wanted else None for wanted in (weight, bias)
    ]
    residual = [torch.randn(x.shape, device=device).to(x.dtype)] if op == "add_layer_norm" else []
    return [x, *residual, *weights[: 1 if op == "rms_norm" else 2]]


def check(op, tensors, eps=1e-5):
    """Outputs and gradients of a norm held to the rule."""
    x, weight = tensors[0], tensors[2 if op == "add_layer_norm" else 1]
    grads = [torch.randn(x.shape, device=x.device).to(x.dtype) for _ in range(2 if op == "add_layer_norm" else 1)]
    out, eager, ref = rows.run_three_ways(lambda m, *t: getattr(m, op)(*t, eps=eps), tensors, grads)
    names = ["y", "h"][: len(grads)] + [f"gradient {i}" for i, t in enumerate(tensors) if t is not None]
    h = x.double() + (tensors[1].double() if op == "add_layer_norm" else 0)
    spread = h if op == "rms_norm" else h - h.mean(-1, keepdim=True)
    rstd = (spread.square().mean(-1, keepdim=True) + eps).rsqrt()
    g = grads[0].double().abs() * (1 if weight is None else weight.double().abs())
    cancelled = (g.amax(-1, keepdim=True) * rstd * (1 + spread.abs() * rstd)).max()  # rstd * (g - xhat * mean(g xhat))
    for name, got, expected, plain in zip(names, out, ref, eager, strict=True):
        if expected.shape == x.shape and name.startswith("gradient"):
            assert_matches(name, got, expected, plain, scale=rows.rounding_scale(expected, cancelled, got.dtype))
        else:
            is_sum = name.startswith("gradient")
            assert_matches(name, got, expected, plain, rows=x.numel() // x.shape[-1] if is_sum else None)
    return out


@pytest.fixture(params=["whole rows", "blocks"])
def tiles(request, monkeypatch, device):
    if request.param == "blocks":
        rows.use_small_tiles(monkeypatch, device)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape, dtype, weight_dtype",
    [
        ((7,), torch.float32, torch.float32),
        ((3, 1), torch.float16, torch.float16),
        ((2, 5, 33), torch.bfloat16, torch.float32),
        ((19, 113), torch.float32, torch.bfloat16),
        ((1, 3, 203), torch.float16, torch.float32),
        ((40, 256), torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_norms_match_the_reference(op, shape, dtype, weight_dtype, device, tiles, poisoned):
    check(op, inputs(op, 2 * rows.make(shape, dtype, device) + 1, weight_dtype))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("weight, bias", [(False, False), (True, False), (False, True)])
def test_weight_and_bias_are_optional(op, weight, bias, device, tiles, poisoned):
    check(op, inputs(op, rows.make((9, 100), torch.float32, device), weight=weight, bias=bias))


@given(case=rows.row_tensors(), op=st.sampled_from(OPS), small=st.booleans(), weight_dtype=st.sampled_from(rows.DTYPES))
@rows.FEW_EXAMPLES
def test_any_shape_dtype_and_stride(case, op, small, weight_dtype, device):
    shape, dtype, layout = case
    with rows.drawn_tiles(small, device):
        check(op, inputs(op, rows.make(shape, dtype, device, layout), weight_dtype))


@pytest.mark.deep
@given(
    case=rows.row_tensors(2000), op=st.sampled_from(OPS), small=st.booleans(), weight_dtype=st.sampled_from(rows.DTYPES)
)
@rows.MANY_EXAMPLES
def test_any_shape_dtype_and_stride_at_length(case, op, small, weight_dtype, device):
    test_any_shape_dtype_and_stride.hypothesis.inner_test(case, op, small, weight_dtype, device)


@pytest.mark.deep
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
@pytest.mark.parametrize("n", [768, 1023, 1024, 1600, 4096, 8193, 16384, 65536])
def test_every_length_of_row(op, n, dtype, device, poisoned):
    check(op, inputs(op, rows.make((5, n), dtype, device), torch.float32))


@pytest.mark.deep
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n", [64, 512, 768, 2048, 4000, 8192, 16384, 20000])
def test_the_tiles_that_ship_for_gpus(op, n, device, monkeypatch):
    if INTERPRETED:
        monkeypatch.setitem(_tuning.ROWS, "interpret", _tuning.ROWS["sm_90"])
    check(op, inputs(op, rows.make((5, n), torch.bfloat16, device), torch.float32))


@pytest.mark.deep
@pytest.mark.parametrize("op", OPS)
def test_many_rows(op, device, poisoned):
    check(op, inputs(op, rows.make((5000, 96), torch.float16, device), torch.float32))


# ---- particular values -----------------------------------------------------------------------------------------------


def test_a_mean_of_ten_thousand_costs_no_digits(device, tiles):
    x = torch.randn(6, 500, device=device) + 1e4
    x[0] -= 2e4
    x[1, :90] += 3e4  # the first blocks say nothing about the mean
    dy = torch.randn(6, 500, device=device)
    y, dx = rows.run(lambda t: kernels.layer_norm(t, None, None), [x], [dy])
    ref, dref = rows.run(lambda t: reference.layer_norm(t, None, None), [x], [dy], torch.float64)
    assert (y - ref).abs().max() < 4e-7 * ref.abs().max()
    assert (dx - dref).abs().max() < 1e-6 * dref.abs().max()


def test_constant_and_one_element_rows(device, tiles):
    bias = torch.randn(90, device=device)
    x = torch.tensor([[0.1], [-3e4], [1e8]], device=device).expand(3, 90)
    assert torch.allclose(kernels.layer_norm(x, None, bias), bias.expand(3, 90), atol=1e-6)
    assert (kernels.layer_norm(x[:, :1], None, None) == 0).all()
    assert torch.allclose(kernels.rms_norm(x, None).abs(), torch.ones(3, 90, device=device), rtol=1e-3)


def test_nan_stays_in_its_row(device, tiles):
    x = rows.make((4, 100), torch.float32, device)
    x[2, 3] = math.nan
    y = kernels.layer_norm(x, None, None)
    assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()


def test_gradients_are_the_same_bits_every_time(device, tiles):
    tensors = inputs("layer_norm", rows.make((200, 100), torch.float32, device))
    grad = rows.make((200, 100), torch.float32, device)
    first, second = (rows.run(kernels.layer_norm, tensors, [grad]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("use", [(True, False), (False, True), (True, True)], ids=str)
def test_either_output_of_the_sum_may_be_unused(use, device):
    x, residual, weight, bias = (
        t.requires_grad_() for t in inputs("add_layer_norm", rows.make((6, 40), torch.float32, device))
    )
    outputs = [o for o, wanted in zip(kernels.add_layer_norm(x, residual, weight, bias), use, strict=True) if wanted]
    expected = [o for o, wanted in zip(reference.add_layer_norm(x, residual, weight, bias), use, strict=True) if wanted]
    leaves = (x, residual, weight, bias) if use[0] else (x, residual)
    got = torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)
    plain = torch.autograd.grad(sum(o.square().sum() for o in expected), leaves)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
def test_what_is_normalized_is_the_sum_that_is_returned(dtype, device, tiles):
    x, residual, weight, bias = inputs("add_layer_norm", rows.make((6, 100), dtype, device))
    y, h = kernels.add_layer_norm(x, residual, weight, bias)
    assert torch.equal(h, x + residual) and torch.equal(y, kernels.layer_norm(h, weight, bias))


def test_a_sum_of_two_dtypes_is_promoted(device):
    x = rows.make((6, 40), torch.bfloat16, device).requires_grad_()
    residual = rows.make((6, 40), torch.float32, device).requires_grad_()
    y, h = kernels.add_layer_norm(x, residual, None, None)
    assert y.dtype == h.dtype == torch.float32 and torch.equal(h, x + residual)
    (y * h).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and residual.grad.dtype == torch.float32
    assert torch.equal(x.grad, residual.grad.bfloat16())


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_wanted_gradients_are_made(needs, device):
    tensors = [t.requires_grad_(n) for t, n in zip(inputs("layer_norm", torch.randn(5, 30)), needs, strict=True)]
    tensors = [t.detach().to(device).requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
    kernels.layer_norm(*tensors).square().sum().backward()
    assert tuple(t.grad is not None for t in tensors) == needs


@pytest.mark.parametrize("layout", rows.LAYOUTS)
def test_strides(layout, device):
    x = rows.make((2, 3, 40), torch.float32, device, layout)
    assert torch.equal(kernels.layer_norm(x, None, None), kernels.layer_norm(x.contiguous(), None, None))
    x.requires_grad_()
    kernels.layer_norm(x, None, None).sum().backward()  # a gradient of zero strides
    assert x.grad.abs().max() < 1e-5


def test_weights_of_any_stride(device):
    x, weight = rows.make((5, 40), torch.float32, device), torch.randn(80, device=device)
    assert torch.equal(kernels.rms_norm(x, weight[::2]), kernels.rms_norm(x, weight[::2].contiguous()))


def test_empty_inputs(device):
    for shape in ((0,), (0, 5), (5, 0)):
        x, weight, bias = inputs("layer_norm", torch.empty(shape, device=device))
        tensors = [t.requires_grad_() for t in (x, weight, bias)]
        y = kernels.layer_norm(*tensors)
        y.sum().backward()
        assert y.shape == shape and all((t.grad == 0).all() for t in tensors)
        assert [t.shape for t in kernels.add_layer_norm(x, x, weight, bias)] == [torch.Size(shape)] * 2


meta = functools.partial(torch.empty, device="meta")  # refused before anything asks where it could run
ROW = meta(2, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: kernels.layer_norm(ROW.double(), None, None), "x has dtype torch.float64"),
        (lambda: kernels.layer_norm(meta(()), None, None), "x has no dimension"),
        (lambda: kernels.layer_norm(ROW, meta(4), None), r"weight has shape \(4,\); rows of x have 3"),
        (lambda: kernels.layer_norm(ROW, None, meta(1, 3)), r"bias has shape \(1, 3\)"),
        (lambda: kernels.layer_norm(ROW, None, 1.0), "bias must be a tensor, got float"),
        (lambda: kernels.layer_norm(ROW, None, None, eps=-1.0), "eps is -1.0"),
        (lambda: kernels.rms_norm(ROW, None, eps=math.inf), "eps is inf"),
        (lambda: kernels.add_layer_norm(ROW, ROW[:1], None, None), r"residual has shape \(1, 3\); x has \(2, 3\)"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- as PyTorch operators --------------------------------------------------------------------------------------------


def test_operator_registration(device):
    x, weight, bias = (t.requires_grad_() for t in inputs("layer_norm", torch.randn(3, 4, 10, device=device)))
    norm = torch.ops.kernels.norm.default
    torch.library.opcheck(norm, (x, None, weight, bias, 1e-5, False, torch.float32))
    residual = torch.randn(3, 4, 10, device=device, requires_grad=True)
    torch.library.opcheck(norm, (x, residual, weight, None, 1e-5, True, torch.float32))


def test_compiles_without_graph_breaks(device):
    def f(x, weight, bias):
        y, h = kernels.add_layer_norm(x, x * 2, weight, bias)
        return (kernels.rms_norm(kernels.layer_norm(y + h, weight, None), weight) * x).sum()

    tensors = [t.requires_grad_() for t in inputs("layer_norm", torch.randn(5, 16, device=device))]
    compiled = torch.compile(f, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    expected, got = torch.autograd.grad(f(*tensors), tensors), torch.autograd.grad(compiled(*tensors), tensors)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, got, strict=True))


def test_autocast_writes_its_dtype(device):
    tensors = [t.requires_grad_() for t in inputs("add_layer_norm", rows.make((6, 40), torch.float32, device))]
    x, _, weight, bias = tensors
    with torch.autocast(device, dtype=torch.bfloat16):
        y, h = kernels.add_layer_norm(*tensors)
        assert kernels.layer_norm(x, weight, bias).dtype == kernels.rms_norm(x, weight).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32  # the sum is promoted as torch's + is
    exact = reference.layer_norm(h.double(), weight.double(), bias.double())
    assert_matches("y", y, exact.detach(), reference.layer_norm(h, weight, bias).bfloat16())
    y.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


def test_rows_of_any_length_fit_the_grid():
    """Only the first of a grid's axes takes more than 65,535 programs."""
    grids = []
    x = torch.empty(2, 2**27 + 8, device="meta", dtype=torch.bfloat16)
    with record_launches("sm_90", lambda kernel, grid, *_: grids.append(grid)):
        y, _, stats = norm_forward(x, None, None, None, 1e-5, False, x.dtype)
        norm_backward(y, None, x, stats, None, False, torch.float32, torch.float32)
    assert len(grids) == 4 and max(grid[0] for grid in grids) > 65_535
    assert all(size <= 65_535 for grid in grids for size in grid[1:])


# ---- bytes -----------------------------------------------------------------------------------------------------------


def traffic(x, residual, weight, bias):
    """Traffic of forward and backward, and the tensors they moved: (forward, backward, y, h, stats, dy, dh)."""
    with rows.counted_traffic() as forward:
        y, h, stats = norm_forward(x, residual, weight, bias, 1e-5, False, x.dtype)
    h = x if residual is None else h
    dy, dh_out = torch.randn_like(x), None if residual is None else torch.randn_like(x)
    with rows.counted_traffic() as backward:
        dh, *_ = norm_backward(dy, dh_out, h, stats, weight, False, weight.dtype, bias.dtype)
    return forward, backward, y, h, stats, dy, dh


@interpreter_only
@pytest.mark.parametrize("with_residual", [False, True])
def test_whole_rows_are_read_once_and_written_once(with_residual):
    x, weight, bias = inputs("layer_norm", torch.randn(50, 40).half())
    residual = torch.randn_like(x) if with_residual else None
    forward, backward, y, h, stats, dy, dh = traffic(x, residual, weight, bias)
    for tensor in (x, residual) if with_residual else (x,):
        assert (forward.reads(tensor) == 1).all()
    assert (forward.writes(y) == 1).all() and (forward.writes(stats) == 1).all()
    assert (backward.reads(dy) == 1).all() and (backward.reads(h) == 1).all() and (backward.writes(dh) == 1).all()
    tensors = 4 if with_residual else 2
    assert forward.total_bytes() == tensors * x.nbytes + stats.nbytes + weight.nbytes + bias.nbytes
    partials = 2 * 4 * x.shape[1]  # of the one program that ran: dw and db in fp32
    small = stats.nbytes + weight.nbytes + 2 * partials + weight.nbytes + bias.nbytes
    assert backward.total_bytes(cached=weight) == (4 if with_residual else 3) * x.nbytes + small


@interpreter_only
def test_long_rows_are_read_twice_and_written_once(monkeypatch):
    rows.use_small_tiles(monkeypatch, "cpu")
    x, weight, bias = inputs("layer_norm", torch.randn(30, 200).half())
    forward, backward, y, h, _, dy, dh = traffic(x, None, weight, bias)
    assert (forward.reads(x) == 2).all() and (forward.writes(y) == 1).all()
    assert (backward.reads(h) == 2).all() and (backward.reads(dy) == 2).all() and (backward.writes(dh) == 1).all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("n, tensors", [(768, 3), (4096, 3), (32768, 5)])
def test_launches_touch_the_counted_tensors_only(arch, n, tensors):
    launches = []
    x = torch.empty(20000, n, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(n, device="meta")
    with record_launches(arch, lambda *launch: launches.append(launch)):
        _, _, stats = norm_forward(x, None, weight, weight, 1e-5, False, x.dtype)
        norm_backward(x, None, x, stats, weight, False, weight.dtype, weight.dtype)
    moved = [sum(a.nbytes for a in args if isinstance(a, torch.Tensor)) for _, _, args, *_ in launches]
    assert moved[0] == 2 * x.nbytes + stats.nbytes + 2 * weight.nbytes
    rest = sum(moved[1:]) - tensors * x.nbytes
    programs = 4 * 132  # four on each multiprocessor at most
    assert 0 < rest <= 4 * stats.nbytes + 3 * weight.nbytes + 2 * 8 * programs * n
