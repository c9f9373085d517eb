"""Names to callables: every implementation against the reference, and clear words for what cannot be."""

import os
import re
import sys

import pytest
import torch

from gptlib import backends, reference
from gptlib.device import autocast_for, choose_device, choose_dtype
from gptlib.errors import UserError

CPU = torch.device("cpu")


def inputs(device, H=4, Hkv=4, Tq=9, Tk=9, D=16):
    def heads(h, t):  # as the model passes them: (B, T, H, D) memory seen as (B, H, T, D)
        return torch.randn(2, t, h, D, device=device).transpose(1, 2).requires_grad_()

    return heads(H, Tq), heads(Hkv, Tk), heads(Hkv, Tk)


def output_and_gradients(function, tensors, **options):
    out = function(*tensors, **options)
    gradients = torch.autograd.grad(out, tensors, torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out))
    return out, *gradients


ANYWHERE = ["reference", "sdpa", "sdpa-math", "triton-softmax", "triton"]


@pytest.mark.parametrize("shape", [{}, {"Tq": 1}, {"Tq": 4}, {"Hkv": 2}, {"Tq": 3, "Hkv": 1}], ids=str)
@pytest.mark.parametrize("name", ANYWHERE)
def test_attention_equals_the_reference(name, shape, device):
    tensors = inputs(device, **shape)
    for scale in (None, 0.2):
        expected = output_and_gradients(reference.causal_attention, tensors, scale=scale)
        got = output_and_gradients(backends.attention(name), tensors, scale=scale, dropout_p=0.0)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ANYWHERE)
def test_attention_drops_weights(name, device):
    q, k, _ = inputs(device, D=16, Tq=16, Tk=16)
    identity = torch.eye(16, device=device).expand(2, 4, 16, 16)  # the output is then the weights themselves
    q, k = torch.zeros_like(q), torch.zeros_like(k)  # which are 1 / (i + 1)
    dropped = backends.attention(name)(q, k, identity, dropout_p=0.25)
    weights = reference.causal_attention(q, k, identity)
    kept = dropped[weights > 0] > 0
    assert 0.65 < kept.float().mean() < 0.85
    torch.testing.assert_close(dropped[dropped > 0], weights[dropped > 0] / 0.75, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", backends.NORM)
def test_norm_of_a_sum_equals_the_reference(name, device):
    torch.manual_seed(0)
    x, residual = (torch.randn(2, 5, 24, device=device) for _ in range(2))
    weight, bias = (torch.randn(24, device=device) for _ in range(2))

    def gradients(add_norm):
        inputs = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        normed, total = add_norm(*inputs, eps=1e-3)
        return normed, total, *torch.autograd.grad((normed.square() + total.exp()).sum(), inputs)

    for a, b in zip(gradients(backends.add_norm(name)), gradients(reference.add_layer_norm), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", backends.NORM)
def test_norm_equals_the_reference(name, device):
    x = torch.randn(3, 5, 24, device=device, requires_grad=True)
    weight, bias = (torch.randn(24, device=device, requires_grad=True) for _ in range(2))
    expected = output_and_gradients(reference.layer_norm, (x, weight, bias), eps=1e-3)
    for a, b in zip(output_and_gradients(backends.norm(name), (x, weight, bias), eps=1e-3), expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", backends.LOSS)
def test_loss_equals_the_reference(name, device):
    x, weight = (torch.randn(s, device=device, requires_grad=True) for s in ((2, 3, 8), (11, 8)))
    targets = torch.randint(11, (2, 3), device=device)
    losses = [loss(x, weight, targets) for loss in (backends.loss(name), reference.linear_cross_entropy)]
    got, expected = ((loss, *torch.autograd.grad(loss, (x, weight))) for loss in losses)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_loss_that_nobody_knows():
    with pytest.raises(UserError, match="--loss fused: unknown; it can be reference, torch, triton or package"):
        backends.loss("fused")


@pytest.fixture
def own_kernels(tmp_path, monkeypatch):
    (tmp_path / "own_kernels.py").write_text(
        "from gptlib.reference import layer_norm as norm\\n"
        "def attend(q, k, v, *, scale=None, dropout_p=0.0):\\n    return v\\n"
        "def short(q, k, v):\\n    return v\\n"
        "def broken(q, k, v, *, scale=None, dropout_p=0.0):\\n    raise RuntimeError('no such device')\\n"
        "def silent(q, k, v, *, scale=None, dropout_p=0.0):\\n    pass\\n"
        "def swapped(q, k, v, *, scale=None, dropout_p=0.0):\\n    return v.transpose(1, 2)\\n"
        "def wide(q, k, v, *, scale=None, dropout_p=0.0):\\n    return v.double()\\n"
        "number = 3\\n".replace("\\n", "\n")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    sys.modules.pop("own_kernels", None)


def test_anyones_kernel_is_found_in_the_working_directory(own_kernels):
    v = torch.randn(1, 2, 3, 4)
    assert backends.attention("own_kernels:attend")(v, v, v) is v
    assert backends.norm("own_kernels:norm") is reference.layer_norm


@pytest.mark.parametrize(
    "name, message",
    [
        ("flash", r"--attn flash: unknown; it can be reference, sdpa, .*package\.module:function"),
        ("own_kernels:", "unknown"),
        ("no_such_package.kernel:attend", "cannot be imported .*no_such_package.*reference, sdpa"),
        ("own_kernels:missing", "cannot be imported .*missing"),
        (".relative:attend", "cannot be imported"),
        ("torch:relu", "cannot be called as"),
        ("own_kernels:short", r"cannot be called as \(q, k, v, \*, scale=None, dropout_p=0\.0\)"),
        ("own_kernels:number", "cannot be called"),
    ],
)
def test_names_that_mean_nothing(own_kernels, name, message):
    with pytest.raises(UserError, match=message) as e:
        backends.attention(name)
    assert "\n" not in str(e.value)


def check(name, dropout_p=0.0, device=CPU):
    backends.check_training(name, device=device, n_heads=2, head_dim=8, dropout_p=dropout_p)


def test_what_cannot_train_is_refused(own_kernels, device):
    with pytest.raises(UserError, match=r"flex has no dropout: give --drop-rate 0 \(it is 0.1\)"):
        check("flex", 0.1)
    with pytest.raises(UserError, match="flex has no backward on a CPU"):
        check("flex")
    with pytest.raises(UserError, match="sdpa-cudnn cannot train here: "):
        check("sdpa-cudnn")
    with pytest.raises(UserError, match="own_kernels:broken cannot train here: no such device"):
        check("own_kernels:broken")
    for name in (*ANYWHERE, "own_kernels:attend"):
        check(name, 0.1, torch.device(device))


@pytest.mark.parametrize("n_heads, head_dim, T", [(2, 4, 8), (8, 4, 16), (16, 8, 32), (8, 16, 32)])
@pytest.mark.parametrize("purpose", ["training", "generating"])
def test_what_an_attention_returns_must_be_like_q(own_kernels, purpose, n_heads, head_dim, T):
    def check(name):
        options = {"dropout_p": 0.0} if purpose == "training" else {}
        function = getattr(backends, f"check_{purpose}")
        function(f"own_kernels:{name}", device=CPU, n_heads=n_heads, head_dim=head_dim, **options)

    q = f"where q is float32 (1, {n_heads}, {T}, {head_dim}); it must return"
    for name, returned in (
        ("silent", "NoneType"),
        ("swapped", f"float32 (1, {T}, {n_heads}, {head_dim})"),
        ("wide", f"float64 (1, {n_heads}, {T}, {head_dim})"),
    ):
        with pytest.raises(UserError, match=re.escape(f"--attn own_kernels:{name} returned {returned} {q}")):
            check(name)


def test_what_cannot_generate_is_refused(own_kernels, device):
    def check(name, device=CPU):
        backends.check_generating(name, device=device, n_heads=2, head_dim=8)

    with pytest.raises(UserError, match="sdpa-cudnn cannot generate here: "):
        check("sdpa-cudnn")
    with pytest.raises(UserError, match="own_kernels:broken cannot generate here: no such device"):
        check("own_kernels:broken")
    with pytest.raises(UserError, match=r"returned float32 \(1, 2, 16, 8\) where q is float32 \(1, 2, 1, 8\)"):
        check("own_kernels:attend")  # as many rows as keys: it never saw that one token asks alone
    for name in (*ANYWHERE, "flex"):
        check(name, torch.device(device))


def test_defaults_by_device():
    assert backends.default_names(CPU) == ("sdpa", "torch", "torch")
    assert backends.default_names(torch.device("cuda")) == ("triton", "triton", "triton")
    assert not backends.is_interpreted("sdpa", "torch", "torch", CPU)
    for names in (("sdpa", "triton", "torch"), ("triton-softmax", "torch", "torch"), ("sdpa", "torch", "triton")):
        assert backends.is_interpreted(*names, CPU)
    assert not backends.is_interpreted("triton", "triton", "triton", torch.device("cuda"))


def test_a_cpu_run_chooses_the_interpreter_first_thing(monkeypatch):
    for asked, expected in ((None, "1"), ("0", "0")):  # what the user has set stays
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if asked is not None:
            monkeypatch.setenv("TRITON_INTERPRET", asked)
        assert choose_device("cpu") == CPU and os.environ["TRITON_INTERPRET"] == expected
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_dtypes_by_device():
    assert choose_dtype("auto", CPU) == choose_dtype("float32", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    with autocast_for(CPU, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast_for(CPU, torch.float32):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_flex_is_compiled_for_the_very_length_unless_it_decodes(monkeypatch):
    asked = []

    def compile_for(function, dynamic=None):
        return lambda *tensors, **options: asked.append(dynamic)

    monkeypatch.setattr(torch, "compile", compile_for)
    monkeypatch.setattr("torch.nn.attention.flex_attention.create_block_mask", lambda *_, **device: None)
    attend = backends.attention("flex")
    q, k = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 8, 16)
    attend(k, k, k)
    attend(q, k, k)
    assert asked == [False, None]


@pytest.mark.deep
def test_flex_equals_the_reference(device):
    attend = backends.attention("flex")
    for shape in ({"Tq": 128, "Tk": 128}, {"Tq": 5, "Tk": 128}, *({"Tq": 1, "Tk": n} for n in range(60, 64))):
        tensors = [t.detach() for t in inputs(device, **shape)]
        torch.testing.assert_close(attend(*tensors), reference.causal_attention(*tensors), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no dropout"):
        attend(*tensors, dropout_p=0.1)
