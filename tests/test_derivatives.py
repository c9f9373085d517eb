"""Derivatives that the kernels do not have are refused, never wrong; what is no tensor is refused by name."""

import importlib
from pathlib import Path

import pytest
import torch
import triton
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import _runtime
from kernels.attention import hopper

TARGETS = torch.tensor([1, 0, 3])
OPS = {
    "causal_attention": lambda x: kernels.causal_attention(*(x.repeat(1, 4)[None, None],) * 3),
    "softmax": lambda x: kernels.softmax(x),
    "causal_softmax": lambda x: kernels.causal_softmax(x, 0.5),
    "layer_norm": lambda x: kernels.layer_norm(x, None, None),
    "add_layer_norm": lambda x: kernels.add_layer_norm(x, x, None, None)[0],
    "rms_norm": lambda x: kernels.rms_norm(x, None),
    "cross_entropy": lambda x: kernels.cross_entropy(x, TARGETS.to(x.device)),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x, x + 1, TARGETS.to(x.device) % 3),
}
every_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture
def x(device):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(device)


def test_every_public_kernel_is_here():
    assert OPS.keys() == set(kernels.__all__)


@every_op
def test_second_derivatives_are_refused(op, x):
    (gradient,) = torch.autograd.grad(OPS[op](x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        gradient.sum().backward()


@every_op
def test_vmap_is_refused(op, x):
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(OPS[op])(x.expand(2, 3, 4))


def nested(inner):
    """f of the outer variable alone, differentiated again inside by another."""

    def way(f, x):
        return torch.func.jvp(lambda a: inner(lambda b: f(a).sum() * b.sum(), x), (x,), (x,))

    return way


JVP = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "grad inside": nested(lambda f, x: torch.func.grad(f)(x)),
    "jvp inside": nested(lambda f, x: torch.func.jvp(f, (x,), (x,))[1]),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("way", JVP)
@every_op
def test_forward_mode_is_refused(op, way, x):
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        JVP[way](OPS[op], x)


@pytest.mark.parametrize("compiled", [False, True])
@every_op
def test_dual_tensors_are_refused(op, compiled, x):
    f = torch.compile(OPS[op], backend="aot_eager") if compiled else OPS[op]
    # torch.compile may wrap the error in one of its own, with the same text
    with pytest.raises(Exception, match="no forward-mode"), forward_ad.dual_level():
        f(forward_ad.make_dual(x, x))
    with forward_ad.dual_level():
        OPS[op](x)  # has no tangent


@every_op
def test_torch_func_is_refused(op, x):
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda t: OPS[op](t).sum())(x)


@pytest.mark.parametrize("name, call", [
    ("causal_attention: k", lambda x: kernels.causal_attention(x[None, None], None, None)),
    ("causal_attention: v", lambda x: hopper.causal_attention(x[None, None], x[None, None], None)),
    ("softmax: x", lambda x: kernels.softmax(None)),
    ("causal_softmax: scores", lambda x: kernels.causal_softmax(None, 1.0)),
    ("layer_norm: x", lambda x: kernels.layer_norm(None, x, x)),
    ("layer_norm: bias", lambda x: kernels.layer_norm(x, x[0], 0.0)),
    ("add_layer_norm: residual", lambda x: kernels.add_layer_norm(x, None, None, None)),
    ("rms_norm: x", lambda x: kernels.rms_norm(None, x)),
    ("cross_entropy: logits", lambda x: kernels.cross_entropy(None, TARGETS)),
    ("linear_cross_entropy: weight", lambda x: kernels.linear_cross_entropy(x, None, TARGETS)),
])  # fmt: skip
def test_what_is_no_tensor_is_refused_by_name(name, call, x):
    with pytest.raises(ValueError, match=f"{name} must be a tensor, got (NoneType|float)"):
        call(x)


def test_operators_may_be_traced_by_torch_compile():
    """Without the tag a compiled region that is checkpointed draws other masks than the same region without."""
    assert all(callable(getattr(kernels, name)) for name in OPS)  # imported on first use, and registered then
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kernels::")]
    assert len(names) >= 10
    for name in names:
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.kernels, name.removeprefix("kernels::")).default.tags


@pytest.mark.deep
def test_backward_draws_the_forwards_mask_however_it_is_run(device):
    """out is linear in v, so that <out, dout> = <v, dv> if both passes drop the same weights."""

    def attend(*tensors):
        return kernels.causal_attention(*tensors, dropout_p=0.4)

    def checkpointed(*tensors):
        return checkpoint(attend, *tensors, use_reentrant=False)

    outs = {}
    for name, call in {"eager": attend, "checkpointed": checkpointed}.items():
        for compiled in (False, True):
            run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
            torch.manual_seed(0)
            q, k, v = (torch.randn(1, 2, 40, 16, device=device, requires_grad=True) for _ in range(3))
            dout = torch.randn(1, 2, 40, 16, device=device)
            torch.manual_seed(5)
            outs[name, compiled] = out = run(q, k, v)
            (dv,) = torch.autograd.grad(out, v, dout)
            torch.testing.assert_close((out * dout).sum(), (v * dv).sum(), rtol=1e-4, atol=1e-4)
    for out in outs.values():
        torch.testing.assert_close(out, outs["eager", False])


def test_dynamo_sees_no_frame_inside_an_operator(x):
    """A frame that torch.compile gave up runs as it is, with Dynamo looking at every Python function it calls."""
    import torch._dynamo  # noqa: F401
    from torch._C._dynamo.eval_frame import set_eval_frame
    from torch._dynamo.types import ConvertFrameReturn

    x.requires_grad_()
    for op in OPS.values():
        op(x)  # compiled or interpreted once
    seen = set()

    def look(frame, *_):
        seen.add((frame.f_code.co_filename, frame.f_code.co_name))
        return ConvertFrameReturn()

    def watched():
        for op in OPS.values():
            op(x).sum().backward()

    before = set_eval_frame(look)
    try:
        watched()
    finally:
        set_eval_frame(before)
    assert (__file__, "watched") in seen
    inside = [str(Path(triton.__file__).parent), _runtime.launch.__code__.co_filename]
    hidden = {name for file, name in seen if file.startswith(inside[0])}
    assert not hidden and (inside[1], "launch") not in seen


def test_a_module_can_be_reloaded(x):
    """As a notebook does while a kernel is being written."""
    module = importlib.import_module("kernels.softmax")
    expected = module.softmax(x)
    importlib.reload(module)
    (gradient,) = torch.autograd.grad(module.softmax(x.requires_grad_()).square().sum(), x)
    torch.testing.assert_close(module.softmax(x), expected)
    assert gradient.isfinite().all()
