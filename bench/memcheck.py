"""Our kernels under compute-sanitizer's memcheck: no access outside of a tensor, even one that does no harm.

    python bench/memcheck.py

Small calls of every op, forward and backward, with lengths that end inside a tile, every tensor in an allocation of its
own. Needs a GPU and NVIDIA's compute-sanitizer (it comes with CUDA); without the tool one line says so. `--device cpu`
makes the calls in the interpreter, unchecked.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import command
from gptlib.device import choose_device
from gptlib.errors import UserError

ATTENTION = (  # H, Hkv, Tq, Tk, D, dtype, options
    (3, 3, 203, 203, 64, "bf16", {}),
    (2, 2, 203, 203, 128, "bf16", {}),
    (4, 2, 113, 203, 40, "fp16", {"dropout_p": 0.1}),
    (2, 2, 130, 130, 33, "bf16", {"documents": (0, 5, 100, 130), "window": 50}),  # no tensor map: rows of 66 bytes
    (4, 2, 3, 1500, 64, "bf16", {}),  # split over the keys
)
ON_HOPPER = ((6, 2, 203, 203, 64, "bf16"), (4, 2, 113, 333, 80, "fp16"))
ROWS = ((5, 1023), (3, 40001))
LOSSES = ((203, 1023), (5, 50257))
TOOL = "compute-sanitizer"


def find_tool():
    """compute-sanitizer on the path, beside CUDA, or in one of NVIDIA's Python packages; None without it."""
    if found := shutil.which(TOOL):
        return found
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", TOOL), *wheels()]
    return next((str(path) for path in places if os.access(path, os.X_OK)), None)


def wheels():
    try:
        import nvidia
    except ImportError:
        return []
    return [path for folder in nvidia.__path__ for path in sorted(Path(folder).glob(f"**/{TOOL}")) if path.is_file()]


def calls(device):
    """Make every call once; yields what each was."""
    import kernels
    from kernels import _runtime

    for H, Hkv, Tq, Tk, D, dtype, options in ATTENTION:
        options = dict(options)
        if documents := options.pop("documents", None):
            options["cu_seqlens"] = torch.tensor(documents, dtype=torch.int32, device=device)
        backward(kernels.causal_attention(*heads(H, Hkv, Tq, Tk, D, dtype, device), **options))
        yield f"attention of {Tq} queries, {Tk} keys, D = {D}, {dtype}"
    for rows, n in ROWS:
        x, residual = (normal(rows, n, dtype="bf16", device=device).requires_grad_() for _ in range(2))
        weight, bias = (normal(n, dtype="bf16", device=device).requires_grad_() for _ in range(2))
        backward(kernels.softmax(x))
        backward(kernels.layer_norm(x, weight, bias))
        backward(sum(kernels.add_layer_norm(x, residual, weight, bias)))
        backward(kernels.rms_norm(x, weight))
        yield f"softmax and norms of {rows} rows of {n}"
    for rows, classes in LOSSES:
        x, weight = (normal(n, 40, dtype="bf16", device=device).requires_grad_() for n in (rows, classes))
        targets = torch.randint(classes, (rows,), device=device)
        backward(kernels.cross_entropy((x @ weight.T).detach().requires_grad_(), targets))
        backward(kernels.linear_cross_entropy(x, weight, targets))
        yield f"loss of {rows} rows of {classes}"
    backward(kernels.causal_softmax(normal(2, 60, 133, dtype="bf16", device=device).requires_grad_(), 0.3))
    yield "causal softmax of 60 queries, 133 keys"
    for H, Hkv, Tq, Tk, D, dtype in ON_HOPPER if _runtime.arch(device) == "sm_90" else ():
        from kernels.attention import hopper

        backward(hopper.one_pass(*heads(H, Hkv, Tq, Tk, D, dtype, device)))
        yield f"Hopper's attention of {Tq} queries, {Tk} keys, D = {D}, {dtype}"


def heads(H, Hkv, Tq, Tk, D, dtype, device):
    """q, k and v that want gradients."""
    shapes = (1, Tq, H, D), (1, Tk, Hkv, D), (1, Tk, Hkv, D)
    return [normal(*shape, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for shape in shapes]


def normal(*shape, dtype, device):
    return torch.randn(shape, device=device).to(command.DTYPES[dtype])


def backward(out):
    out.backward(torch.randn_like(out))


def main(argv=None):
    p = command.Parser(__doc__)
    p.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or cpu")
    p.add_argument("--unchecked", action="store_true", help="make the calls in this process, without the tool")
    args = p.parse_args(argv)
    device = choose_device(args.device)
    if args.unchecked or device.type != "cuda":
        for made in calls(device):
            print(made, flush=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        else:
            print("no GPU: the calls were made in Triton's interpreter, and no access was checked")
        return
    tool = find_tool()
    if tool is None:
        print(f"{TOOL}: not installed, nothing checked")
        return
    options = ["--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "20"]
    program = [sys.executable, __file__, "--unchecked", "--device", args.device]
    # torch would hand out parts of large allocations, where the next tensor is not out of bounds
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if code := subprocess.run([tool, *options, *program], env=environment).returncode:
        raise UserError(f"{TOOL} found something, or its program failed (exit code {code}): see above")


if __name__ == "__main__":
    sys.exit(command.run(main))
