"""Where a kernel runs, how it is launched and registered, and the arithmetic that must agree in both places.

With a GPU the kernels are compiled. Without one (or with TRITON_INTERPRET=1) they run in Triton's interpreter, which
executes each program with NumPy. Three of its habits need care, all handled here so that no kernel has to:

* it multiplies bf16 as if it were a 16-bit integer: `dot` and every other arithmetic must see fp32 operands;
* it truncates fp32 to bf16 instead of rounding to nearest even: `cast` rounds by hand;
* it patches `triton.language` on every helper call: once per launch is enough, and twice as fast.
"""

import contextlib
import functools
import os
import types
import warnings
from contextvars import ContextVar

import torch
from torch.autograd import forward_ad

if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

INTERPRETED = bool(triton.knobs.runtime.interpret)
IS_INTERPRETED = tl.constexpr(INTERPRETED)

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest even in the interpreter too."""
    if IS_INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc (M, N), None for 0, + a (M, K) @ b (K, N) in fp32. INPUT_PRECISION: "ieee" or "tf32", for fp32 operands."""
    if IS_INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


def fp32_precision(dtype):
    """How a dot of fp32 operands may round: "tf32" where torch's own CUDA matmuls are allowed to, else "ieee"."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip
    return "tf32" if allowed else "ieee"


# ---- the machine -----------------------------------------------------------------------------------------------------

_target_arch: ContextVar[str | None] = ContextVar("target_arch", default=None)
_recorder: ContextVar = ContextVar("launch_recorder", default=None)


def arch(device):
    """Key of the tuning tables: "interpret", "sm_80", "sm_90", ..., "gfx942"."""
    if _target_arch.get() is not None:
        return _target_arch.get()
    if INTERPRETED:
        return "interpret"
    return _gpu(device)[0]


@functools.cache
def _gpu(device):
    """(architecture, multiprocessors) of a GPU, asked for once: every call of a kernel needs them."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def multiprocessors(device):
    """How many multiprocessors share the work: an H100's for the meta device, 4 in the interpreter."""
    if device.type == "cuda" and not INTERPRETED:
        return _gpu(device)[1]
    return 132 if device.type == "meta" else 4


@contextlib.contextmanager
def record_launches(target_arch, recorder):
    """Inside, launchers choose their tables for `target_arch` and every launch goes to
    `recorder(kernel, grid, args, constexprs, options)` instead of a device. With tensors on the meta device this lists
    what would be compiled for any GPU, on any machine."""
    tokens = _target_arch.set(target_arch), _recorder.set(recorder)
    try:
        yield
    finally:
        _target_arch.reset(tokens[0])
        _recorder.reset(tokens[1])


def launch(kernel, grid, *args, num_warps=4, num_stages=2, maxnreg=None, **constexprs):
    """Run `kernel` over `grid` (a tuple): positional run-time arguments, then constexprs by name. `maxnreg`: registers
    that a thread may use, if the compiler is not to decide. Multiplications and additions may fuse: said aloud, because
    Triton 3.9 warns where it is not and means to stop fusing by default."""
    device = device_of(args)  # first, so that a launch without a device fails wherever it is tried
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    if (recorder := _recorder.get()) is not None:
        recorder(kernel, grid, args, constexprs, options)
        return
    if 0 in grid:
        return
    if INTERPRETED:
        kernel[grid](*args, **constexprs)
        return
    guard = torch.cuda.device(device) if device.index != torch.cuda.current_device() else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **options, **constexprs)


def device_of(args):
    """Where the first tensor of a launch's arguments is; a tensor map has one as its base."""
    for a in args:
        if isinstance(x := getattr(a, "base", a), torch.Tensor):
            return x.device
    raise ValueError("a launch knows its device by its tensors, and has none")


def cdiv(a, b):
    """ceil(a / b) of positive integers. triton.cdiv, made for kernels too, takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n):
    """The smallest power of two that is at least n, a positive integer."""
    return 1 << (n - 1).bit_length()


# ---- arguments -------------------------------------------------------------------------------------------------------


def check_tensors(op, **tensors):
    """ValueError unless all are floating tensors on one device, and that device can run."""
    first_name, first = next(iter(tensors.items()))
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{op}: {name} has dtype {t.dtype}; float32, float16 and bfloat16 are supported")
        if t.device != first.device:
            raise ValueError(f"{op}: {name} is on {t.device} but {first_name} is on {first.device}; use one device")
    if not torch.compiler.is_compiling():
        check_device(op, first_name, first.device)


def check_device(op, name, device):
    """ValueError unless kernels can run on `device` in this process."""
    if _recorder.get() is not None or device.type == "meta":
        return
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            f"{op}: {name} is on the CPU but the kernels are compiled for the GPU in this process; "
            "move it to cuda, or set TRITON_INTERPRET=1 before Python starts (the trainer: --device cpu)"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{op}: {name} is on {device}; cuda (or cpu, through Triton's interpreter) is supported")
    if device.type == "cuda" and INTERPRETED:
        warnings.warn(
            "the kernels run in Triton's interpreter, slowly: TRITON_INTERPRET is set, by hand or by a process that "
            "saw no GPU and started this one; unset it",
            stacklevel=4,
        )
    if device.type == "cuda" and not INTERPRETED and (found := _gpu(device)[0]).startswith("sm_"):
        capability = int(found.removeprefix("sm_"))
        if capability < 80:
            raise ValueError(
                f"{op}: {torch.cuda.get_device_name(device)} has CUDA capability {capability / 10}; "
                "8.0 (Ampere) or newer is needed"
            )


def autocast_dtype(x):
    """The dtype autocast asks for on x's device, or None outside autocast."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return None


def unit_inner_stride(x):
    """x itself if its last stride is 1 (or that dimension has one element), else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# ---- registration ----------------------------------------------------------------------------------------------------


_libraries = {}  # operator -> its own library, which it lives as long as


def _library_of(name):
    """A new library for an operator; one of before, of a module that is being reloaded, is given up."""
    if name in _libraries:
        _libraries[name]._destroy()
    _libraries[name] = torch.library.Library("kernels", "FRAGMENT")
    return _libraries[name]


def register_op(name, schema, run, fake, setup_context=None, backward=None):
    """Make `kernels::name` a PyTorch operator with a fake (shape) rule and autograd, and return it.

    One opaque operator serves GPU and interpreter alike, so that what the tests prove on a CPU is what a GPU runs, and
    torch.compile never looks inside. `backward=None` marks an operator that is itself a backward: differentiating it
    again raises NotImplementedError. So do vmap, which would otherwise fail deep inside with no reason given, and
    forward-mode derivatives, in which an opaque operator would silently have no tangent.

    Registered piece by piece, not by torch.library.custom_op: its checks on every call take longer than a small kernel.
    Two things that it does are needed: the tag, and hiding what runs inside from Dynamo, which else would trace an
    operator called by a frame that it gave up.
    """
    library = _library_of(name)
    library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    op = getattr(torch.ops.kernels, name).default
    library.impl(name, torch._disable_dynamo(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"kernels::{name}", fake, lib=library)

    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        if backward is not None:
            setup_context(ctx, args, output)
        return output

    def refuse_second_derivatives(ctx, *grads):
        raise NotImplementedError(f"kernels.{name} has no double backward; use the reference for second derivatives")

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward or refuse_second_derivatives)}
    function = type(f"kernels.{name}", (torch.autograd.Function,), methods)

    def differentiable(*args):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(f"kernels.{name} has no forward-mode derivatives (jvp); use the reference")
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    library.impl(name, torch._disable_dynamo(differentiable), "Autograd")

    def refuse_vmap(info, in_dims, *args):
        raise NotImplementedError(f"kernels.{name} does not support vmap; fold the mapped dimension into the batch")

    torch.library.register_vmap(f"kernels::{name}", refuse_vmap, lib=library)
    return op


# ---- the interpreter, repaired and made faster -----------------------------------------------------------------------


def _set_up_interpreter():
    if isinstance(tl.sum, JITFunction):
        # Triton was imported before TRITON_INTERPRET was set (torch does that when it makes an optimizer or compiles):
        # its own helpers (tl.sum, tl.zeros, ...) are compiled functions for good, so let the interpreter call them.
        def call(self, *args, **kwargs):
            return interpreter.InterpretedFunction(self.fn)(*args, **kwargs)

        JITFunction.__call__ = call
        for member, value in list(vars(tl.tensor).items()):
            if isinstance(value, JITFunction):
                setattr(tl.tensor, member, _as_method(value))

    options = getattr(interpreter.interpreter_builder, "options", None)
    if options is not None and hasattr(options, "sanitize_overflow"):
        object.__setattr__(options, "sanitize_overflow", False)  # it checks every integer add in 64 bits
    # Patch triton.language whole and once per launch, not the modules a helper happens to see on each of its calls.
    patch_lang = interpreter._patch_lang
    sees_everything = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda fn: patch_lang(sees_everything)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")


def _as_method(jit_function):
    def method(self, *args, **kwargs):
        return jit_function(self, *args, **kwargs)

    return method


if INTERPRETED:
    _set_up_interpreter()
