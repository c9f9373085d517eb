"""Cross-entropy, alone and with the output head, against gptlib.reference, and the promises of their docstrings."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import kernels
from gptlib import reference
from kernels import _tuning
from kernels._runtime import INTERPRETED, record_launches
from kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward, linear_cross_entropy_forward
from tests import rows
from tests.oracle import assert_matches

IGNORED = -100
interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="about the interpreter, or about CPU tensors")


def make_targets(shape, classes, device, ignored=0.2):
    targets = torch.randint(classes, shape, device=device)
    return targets.masked_fill(torch.rand(shape, device=device) < ignored, IGNORED)


def check(logits, targets, **options):
    """Losses and gradients of kernels.cross_entropy held to the rule."""
    grad = torch.randn(targets.shape if options.get("reduction") == "none" else (), device=logits.device)
    out, eager, ref = rows.run_three_ways(lambda m, x: m.cross_entropy(x, targets, **options), [logits], [grad])
    # fp32 roundings that may cancel: the loss is a difference of logits, its gradient one of p <= 1 and 1
    counted = (
        (targets != options.get("ignore_index", IGNORED)).sum() if options.get("reduction") in (None, "mean") else 1
    )
    assert_scaled("loss", out[0], ref[0], eager[0], logits.abs().max())
    assert_scaled("dlogits", out[1], ref[1], eager[1], grad.abs().max() / counted)
    return out


def assert_scaled(name, out, ref, eager, intermediate, **options):
    """The rule, with fp32 intermediates as large as `intermediate`."""
    assert_matches(name, out, ref, eager, scale=rows.rounding_scale(ref, intermediate, out.dtype), **options)


def check_linear(x, weight, targets, **options):
    """Loss and gradients of kernels.linear_cross_entropy held to the rule."""
    grad = torch.tensor(0.7, device=x.device)
    counted = (targets != options.get("ignore_index", IGNORED)).sum() if options.get("reduction") != "sum" else 1
    dlogits = grad / counted
    out, eager, ref = rows.run_three_ways(
        lambda m, *t: m.linear_cross_entropy(*t, targets, **options), [x, weight], [grad]
    )
    assert_scaled("loss", out[0], ref[0], eager[0], (x.double().flatten(0, -2) @ weight.double().T).abs().max())
    assert_scaled("dx", out[1], ref[1], eager[1], dlogits * weight.abs().max())
    assert_scaled("dweight", out[2], ref[2], eager[2], dlogits * x.abs().max(), rows=targets.numel())
    return out


@pytest.fixture
def small_tiles(monkeypatch, device):
    rows.use_small_tiles(monkeypatch, device)


@pytest.fixture
def small_chunks(monkeypatch, device):
    """128 rows to a chunk, the least."""
    monkeypatch.setattr(_tuning, "LOSS_CHUNK", dict.fromkeys(_tuning.LOSS_CHUNK, 1))


# ---- logits given ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 7), (2, 3, 113), (40, 203), (3, 256)], ids=str)
def test_cross_entropy_matches_the_reference(shape, dtype, reduction, device, poisoned):
    targets = make_targets(shape[:-1], shape[-1], device)
    targets.view(-1)[:1] = 0  # one counts at least
    check(3 * rows.make(shape, dtype, device), targets, reduction=reduction)


@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
def test_rows_in_blocks(dtype, device, small_tiles, poisoned):
    check(3 * rows.make((19, 203), dtype, device), make_targets((19,), 203, device), reduction="none")


@given(case=rows.row_tensors(min_dims=2), small=st.booleans(), reduction=st.sampled_from(["mean", "sum", "none"]))
@rows.FEW_EXAMPLES
def test_any_shape_dtype_and_stride(case, small, reduction, device):
    shape, dtype, layout = case
    with rows.drawn_tiles(small, device):
        targets = make_targets(shape[:-1], shape[-1], device, ignored=0)
        check(rows.make(shape, dtype, device, layout), targets, reduction=reduction)


@pytest.mark.deep
@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 1000, 4096, 32000, 50257, 131072])
def test_every_vocabulary(classes, dtype, device, poisoned):
    check(rows.make((5, classes), dtype, device), make_targets((5,), classes, device, 0), reduction="none")


@pytest.mark.deep
@pytest.mark.parametrize("classes", [64, 1000, 50257])
def test_the_tiles_that_ship_for_gpus(classes, device, monkeypatch):
    if INTERPRETED:
        monkeypatch.setitem(_tuning.ROWS, "interpret", _tuning.ROWS["sm_90"])
    targets = make_targets((6,), classes, device, 0)
    check(rows.make((6, classes), torch.float16, device), targets)
    x, weight = rows.make((6, 16), torch.bfloat16, device), rows.make((classes, 16), torch.bfloat16, device)
    check_linear(x, weight, targets)


def test_large_logits_lose_nothing(device):
    """1e4 + small differences: fp32 keeps 1e-3 there, and m and x_t are subtracted before anything is rounded."""
    small = torch.randint(-8, 8, (6, 50), device=device).float()
    targets = make_targets((6,), 50, device, 0)
    near, far = (s.clone().requires_grad_() for s in (small, small + 1e4))
    losses = [kernels.cross_entropy(x, targets) for x in (near, far)]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (near, far), strict=True)))


def test_infinities_and_nan_as_torch_does(device):
    logits = rows.make((6, 90), torch.float32, device)
    logits[0, :70] = -math.inf  # of which the target is one, or not
    logits[1, :70] = -math.inf
    logits[2] = -math.inf
    logits[3, 7] = math.nan
    logits[4, 80] = math.inf
    targets = torch.tensor([3, 75, 1, 2, 5, 80], device=device)
    losses = kernels.cross_entropy(logits, targets, reduction="none")
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(losses, expected, atol=1e-5, equal_nan=True)
    assert losses[0] == math.inf and losses[2:5].isnan().all()


def test_ignored_rows_give_nothing_whatever_they_hold(device):
    logits = rows.make((4, 30), torch.float32, device)
    logits[1] = math.nan
    logits[2] = -math.inf
    logits.requires_grad_()
    targets = torch.tensor([3, 7, 7, 5], device=device)
    loss = kernels.cross_entropy(logits, targets, ignore_index=7)
    loss.backward()
    expected = F.cross_entropy(logits.detach()[[0, 3]], targets[[0, 3]])
    assert torch.allclose(loss, expected)
    assert (logits.grad[1:3] == 0).all() and torch.isfinite(logits.grad).all()


def test_no_row_that_counts(device):
    x, weight = torch.randn(3, 4, device=device).requires_grad_(), torch.randn(5, 4, device=device).requires_grad_()
    targets = torch.full((3,), IGNORED, device=device)
    for loss in (kernels.cross_entropy(x @ weight.T, targets), kernels.linear_cross_entropy(x, weight, targets)):
        assert loss.isnan()  # 0 / 0, as torch
        for gradient in torch.autograd.grad(loss, (x, weight)):
            assert (gradient == 0).all()


# ---- head and loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 3), (7, 24, 61), (33, 40, 203), (130, 16, 64)], ids=str)
def test_linear_matches_the_reference(shape, dtype, device, small_chunks, poisoned):
    n_rows, width, classes = shape
    x, weight = rows.make((n_rows, width), dtype, device), rows.make((classes, width), dtype, device)
    targets = make_targets((n_rows,), classes, device)
    targets[:1] = 0
    check_linear(x, weight, targets, reduction="mean")
    check_linear(x, weight, targets.clamp(min=0), reduction="sum", ignore_index=0)


@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
def test_many_chunks_in_blocks(dtype, device, small_chunks, small_tiles, poisoned):
    x, weight = rows.make((2, 200, 24), dtype, device), rows.make((131, 24), dtype, device)
    check_linear(x, weight, make_targets((2, 200), 131, device))


def test_chunks_change_nothing_but_the_order_of_sums(device, monkeypatch):
    x, weight = rows.make((400, 16), torch.float32, device), rows.make((50, 16), torch.float32, device)
    targets = make_targets((400,), 50, device)
    whole = linear_cross_entropy_forward(x, weight, targets, IGNORED, True, True)
    monkeypatch.setattr(_tuning, "LOSS_CHUNK", dict.fromkeys(_tuning.LOSS_CHUNK, 1))
    chunks = linear_cross_entropy_forward(x, weight, targets, IGNORED, True, True)
    for a, b in zip(whole, chunks, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n_rows, row_bytes, rows_", [(16384, 50304 * 2, 4096), (1, 100, 128), (5000, 2**40, 128)])
def test_rows_of_a_chunk(n_rows, row_bytes, rows_):
    found = _tuning.loss_chunk_rows("sm_90", n_rows, row_bytes)
    assert found == rows_ and (found == 128 or found * row_bytes <= _tuning.LOSS_CHUNK["sm_90"])


def test_only_the_gradients_asked_for_are_made(device):
    x, weight = rows.make((9, 8), torch.float32, device), rows.make((30, 8), torch.float32, device)
    targets = make_targets((9,), 30, device, 0)
    both = rows.run(
        lambda *t: kernels.linear_cross_entropy(*t, targets),
        [x, weight],
        [torch.ones((), device=device, dtype=torch.float32)],
    )
    for wanted in ((True, False), (False, True), (False, False)):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight), wanted, strict=True)]
        with record_kernels() as launched:
            loss = kernels.linear_cross_entropy(*leaves, targets)
        assert launched == ["loss_and_gradient_kernel" if any(wanted) else "cross_entropy_forward_kernel"]
        torch.testing.assert_close(loss.detach(), both[0])
        if any(wanted):
            loss.backward()
        for leaf, expected, w in zip(leaves, both[1:], wanted, strict=True):
            assert torch.equal(leaf.grad, expected) if w else leaf.grad is None
    with torch.no_grad(), record_kernels() as launched:
        kernels.linear_cross_entropy(x.requires_grad_(), weight, targets)
    assert launched == ["cross_entropy_forward_kernel"]


class record_kernels:
    """The names of the kernels launched inside."""

    def __enter__(self):
        self.module = importlib.import_module("kernels.cross_entropy")
        self.launch, launched = self.module.launch, []

        def launch(kernel, *args, **options):
            launched.append(kernel.fn.__name__)
            return self.launch(kernel, *args, **options)

        self.module.launch = launch
        return launched

    def __exit__(self, *_):
        self.module.launch = self.launch


def test_the_gradient_of_a_second_backward_is_the_same(device):
    x, weight = torch.randn(4, 8, device=device).requires_grad_(), torch.randn(9, 8, device=device)
    loss = kernels.linear_cross_entropy(x, weight, torch.arange(4, device=device))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, x)
    torch.testing.assert_close(3 * first, second)


def test_the_default_dtype_of_torch_changes_nothing(device):
    x, weight = rows.make((37, 8), torch.float32, device), rows.make((30, 8), torch.float32, device)
    targets = make_targets((37,), 30, device)

    def run():
        return rows.run(
            lambda *t: kernels.linear_cross_entropy(*t, targets),
            [x, weight],
            [torch.ones((), device=device, dtype=torch.float32)],
        )

    expected = run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_empty_inputs(device):
    x, weight = torch.empty(0, 4, device=device).requires_grad_(), torch.randn(5, 4, device=device).requires_grad_()
    targets = torch.empty(0, dtype=torch.int64, device=device)
    assert kernels.linear_cross_entropy(x, weight, targets).isnan()
    kernels.linear_cross_entropy(x, weight, targets, reduction="sum").backward()
    assert x.grad.shape == x.shape and (weight.grad == 0).all()
    assert kernels.cross_entropy(torch.empty(0, 3, device=device), targets, reduction="sum") == 0


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x, t: kernels.cross_entropy(x.double(), t), "logits has dtype torch.float64"),
        (lambda x, t: kernels.cross_entropy(x[0, 0], t), r"logits has shape \(\)"),
        (lambda x, t: kernels.cross_entropy(x[:, :0], t), r"logits has shape \(3, 0\)"),
        (lambda x, t: kernels.cross_entropy(x, [0, 0, 0]), "targets must be an int64 tensor, got list"),
        (lambda x, t: kernels.cross_entropy(x, t.int()), "targets must be an int64 tensor, got torch.int32"),
        (lambda x, t: kernels.cross_entropy(x, t[:2]), r"targets must have shape \(3,\) as logits has, got \(2,\)"),
        (lambda x, t: kernels.cross_entropy(x, t.to("meta")), "targets are on meta but logits is on"),
        (lambda x, t: kernels.cross_entropy(x, t, ignore_index=0.5), "ignore_index must be an int of 64 bits, got 0.5"),
        (lambda x, t: kernels.cross_entropy(x, t, ignore_index=2**63), "ignore_index must be an int of 64 bits"),
        (lambda x, t: kernels.cross_entropy(x, t, reduction="max"), "one of mean, sum, none, got 'max'"),
        (lambda x, t: kernels.linear_cross_entropy(x, x, t, reduction="none"), "one of mean, sum, got 'none'"),
        (lambda x, t: kernels.linear_cross_entropy(x, x[:, :2], t), r"weight must be \(V, C\).* C = 4.*got \(3, 2\)"),
        (lambda x, t: kernels.linear_cross_entropy(x, x[:0], t), r"V >= 1.*got \(0, 4\)"),
        (lambda x, t: kernels.linear_cross_entropy(x, x[0, 0], t), r"weight must be .*got \(\)"),
        (lambda x, t: kernels.linear_cross_entropy(x[0, 0], x, t), "weight must be .* C = None as x has"),
        (lambda x, t: kernels.linear_cross_entropy(x, x.half(), t), "weight is torch.float16 but x is torch.float32"),
    ],
)
def test_bad_input_is_named(call, words, device):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(3, 4, device=device), torch.zeros(3, dtype=torch.int64, device=device))


@interpreter_only
@pytest.mark.parametrize("target", [4, -1, -101, 2**40])
def test_targets_that_are_no_class(target):
    x, targets = torch.zeros(3, 4), torch.tensor([0, target, 3])
    weight = torch.zeros(4, 4)
    for call in (lambda: kernels.cross_entropy(x, targets), lambda: kernels.linear_cross_entropy(x, weight, targets)):
        with pytest.raises(ValueError, match=f"target {target} is not one of the 4 classes, 0 to 3"):
            call()


@pytest.mark.parametrize("target", [4, -1, 2**32, -(2**40)])
def test_where_they_are_not_checked_they_give_nan_in_their_row_alone(target, device):
    logits, targets = torch.randn(3, 4, device=device), torch.tensor([0, target, 3], device=device)
    losses, m, log2_l = cross_entropy_forward(logits, targets, IGNORED)
    dlogits = cross_entropy_backward(torch.ones(3, device=device), logits, targets, m, log2_l, IGNORED)
    for result in (losses, dlogits):
        assert result[1].isnan().all() and torch.isfinite(result[[0, 2]]).all()


# ---- as PyTorch operators --------------------------------------------------------------------------------------------


def test_operator_registration(device):
    logits, x, weight = (torch.randn(3, n, device=device, requires_grad=True) for n in (5, 4, 4))
    targets = torch.arange(3, device=device)
    ops, ones = torch.ops.kernels, torch.ones(3, device=device)
    torch.library.opcheck(ops.cross_entropy.default, (logits, targets, IGNORED))
    torch.library.opcheck(ops.cross_entropy_backward.default, (ones, logits.detach(), targets, ones, ones, IGNORED))
    torch.library.opcheck(
        ops.linear_cross_entropy.default, (x, weight, targets, IGNORED, True, torch.float32, True, True)
    )
    gradients = x.detach(), weight.detach(), torch.float32, torch.bfloat16
    torch.library.opcheck(ops.linear_cross_entropy_backward.default, (ones[0], ones[1], *gradients))


def test_compiles_without_graph_breaks(device):
    targets = make_targets((2, 5), 13, device)
    targets[0, 0] = 3

    def f(x, weight):
        fused = kernels.linear_cross_entropy(x * 2, weight, targets)
        return fused + kernels.cross_entropy(x @ weight.T, targets, reduction="sum")

    tensors = [torch.randn(s, device=device, requires_grad=True) for s in ((2, 5, 8), (13, 8))]
    compiled = torch.compile(f, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    expected, got = (torch.autograd.grad(g(*tensors), tensors) for g in (f, compiled))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_keeps_the_gradient_of_the_weight_exact(device):
    x, weight = torch.randn(20, 8, device=device), torch.randn(30, 8, device=device)
    targets = make_targets((20,), 30, device, 0)

    def run(function):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = function(*leaves, targets)
        assert loss.dtype == torch.float32
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def exact(*tensors):
        leaves = [t.to(torch.bfloat16).double().requires_grad_() for t in tensors]
        loss = reference.linear_cross_entropy(*leaves, targets)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    ours, eager, ref = run(kernels.linear_cross_entropy), run(reference.linear_cross_entropy), exact(x, weight)
    for name, *results in zip(("loss", "dx", "dweight"), ours, ref, eager, strict=True):
        assert_matches(name, *results)
    rounded = ours[2].bfloat16().float()
    assert ours[2].dtype == torch.float32 and not torch.equal(ours[2], rounded)


# ---- bytes and memory ------------------------------------------------------------------------------------------------


@interpreter_only
@pytest.mark.parametrize("classes", [40, 203])
def test_logits_are_read_once_forward_and_read_and_written_once_backward(classes):
    logits = torch.randn(7, classes).half()
    targets = torch.randint(classes, (7,))
    with rows.counted_traffic() as forward:
        losses, m, log2_l = cross_entropy_forward(logits, targets, IGNORED)
    with rows.counted_traffic() as backward:
        dlogits = cross_entropy_backward(losses, logits, targets, m, log2_l, IGNORED)
    hit = F.one_hot(targets, classes)
    assert torch.equal(forward.reads(logits), 1 + hit), "and the target's once more"
    assert (backward.reads(logits) == 1).all() and (backward.writes(dlogits) == 1).all()


def test_no_tensor_is_as_large_as_the_logits(device, small_chunks):
    """Of 1,000 rows and 4,096 classes in chunks of 128 rows, nothing larger than a chunk is ever allocated."""
    n_rows, classes, width = 1000, 4096, 8
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(o.numel() for o in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(o))
            return out

    with record_launches("interpret", lambda *launch: None), Watch():  # what is allocated, with no kernel run
        x, weight = torch.randn(n_rows, width, device=device), torch.randn(classes, width, device=device)
        linear_cross_entropy_forward(x, weight, torch.zeros(n_rows, dtype=torch.int64), IGNORED, True, True)
    assert max(largest) == 128 * classes < n_rows * classes


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_odd_vocabularies_are_read_sixteen_bytes_at_a_time(arch):
    launches = []
    x, weight = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (9000, 50257))
    with record_launches(arch, lambda *launch: launches.append(launch)):
        linear_cross_entropy_forward(x, weight, torch.empty(9000, dtype=torch.int64, device="meta"), 0, True, True)
    assert len(launches) == 2, "chunks"
    for _, grid, args, constexprs, _ in launches:
        assert grid == (4608,) or grid == (9000 - 4608,)
        assert args[0].stride() == (50304, 1) and args[3] == 50304 and constexprs["ALIGN"] == 8


@pytest.mark.gpu
def test_gradients_do_not_overtake_the_losses():
    """In place: what the fused kernel says of a logit that it overwrites is what the forward says of it."""
    logits = torch.randn(512, 50304, dtype=torch.bfloat16, device="cuda")[:, :50257]
    x, weight = torch.eye(512, dtype=torch.bfloat16, device="cuda"), logits.T.contiguous()
    targets = torch.randint(50257, (512,), device="cuda")
    expected = cross_entropy_forward(logits, targets, IGNORED)[0]
    for _ in range(20):
        losses = linear_cross_entropy_forward(x, weight, targets, IGNORED, True, False)[0]
        assert torch.equal(losses, expected)


@pytest.mark.gpu
def test_more_than_31_bits_of_logits():
    logits = torch.randn(2**31 // 50257 + 9, 50257, dtype=torch.bfloat16, device="cuda")
    targets = torch.randint(50257, logits.shape[:1], device="cuda")
    losses = kernels.cross_entropy(logits, targets, reduction="none")
    expected = F.cross_entropy(logits[-3:].float(), targets[-3:], reduction="none")
    torch.testing.assert_close(losses[-3:], expected)
