"""How exact the kernels are: largest errors against float64, ours beside eager PyTorch's and its fused operators'.

    python bench/numerics.py
    python bench/numerics.py --section rows --publish

Prints one line per result (an output or a gradient): the largest absolute error of each implementation, in units of
eps(dtype) * max|result|, so that 0.5 is one correct rounding of the largest element, and the error that the project's
rule allows ours (bench/parity.py). On a CPU the kernels run in Triton's interpreter, whose sums are NumPy's and not a
GPU's: the roundings are of the same kind, their order differs.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F

import kernels
from bench import command, environment, output, table
from bench.parity import compare
from gptlib import reference
from gptlib.device import choose_device

COLUMNS = ["op", "result", "dtype", "shape", "input", "unit", "triton", "eager", "torch", "allowed", "within"]


@dataclass(frozen=True)
class Case:
    """One call: `ours`, `eager` and `torch` take the tensors and return one output or several."""

    op: str
    shape: tuple
    kind: str
    tensors: dict  # name -> fp32 tensor; all are cast to the dtype under test
    ours: object
    eager: object
    torch: object
    summed: dict  # name of a result -> rows that it sums


def run(function, tensors, grads):
    """{name: output or gradient} of one implementation."""
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    outputs = function(*leaves.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return dict(zip(("y", "sum"), outputs, strict=False)) | {f"d{name}": t.grad for name, t in leaves.items()}


def measure(case, dtype):
    """One row per result of a case."""
    tensors = {name: t.to(dtype) for name, t in case.tensors.items()}
    with torch.no_grad():
        outputs = case.eager(*tensors.values())
    grads = [torch.randn_like(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
    ref = run(case.eager, {name: t.double() for name, t in tensors.items()}, grads)
    found = [run(f, tensors, grads) for f in (case.ours, case.eager, case.torch)]
    for result, exact in ref.items():
        ours, eager, fused = (results[result] for results in found)
        compared = compare(ours, exact, eager, rows=case.summed.get(result))
        unit = torch.finfo(dtype).eps * exact.abs().max().item()
        errors = compared.error, compared.eager_error, (fused.double() - exact).abs().max().item(), compared.bound
        scaled = (e / unit if unit else 0.0 for e in errors)
        labels = case.op, result, str(dtype).removeprefix("torch."), "x".join(map(str, case.shape)), case.kind, unit
        yield dict(zip(COLUMNS, (*labels, *scaled, "no" if compared.problem else "yes"), strict=True))


# ---- sections --------------------------------------------------------------------------------------------------------


def row_cases(device):
    """Softmax and the norms: rows of a GPT, a vocabulary, long rows, rows far from zero."""
    for shape, kind in (((512, 768), "normal"), ((64, 1023), "x 10"), ((8, 50257), "x 10")):
        x = torch.randn(shape, device=device) * (10 if kind == "x 10" else 1)
        yield Case(
            "softmax", shape, kind, {"x": x}, kernels.softmax, reference.softmax, partial(torch.softmax, dim=-1), {}
        )
    scores = torch.randn(2, 4, 256, 256, device=device)
    call = [partial(f, scale=0.125) for f in (kernels.causal_softmax, reference.causal_softmax, masked_softmax)]
    yield Case("causal_softmax", tuple(scores.shape), "normal", {"x": scores * 8}, *call, {})
    for shape, kind in (
        ((512, 768), "normal"),
        ((512, 768), "mean 1e4"),
        ((64, 1023), "normal"),
        ((16, 65536), "normal"),
    ):
        x = torch.randn(shape, device=device) + (1e4 if kind == "mean 1e4" else 0)
        weights = {name: torch.randn(shape[1], device=device) for name in ("weight", "bias")}
        summed = dict.fromkeys(("dweight", "dbias"), shape[0])
        rest = (shape, kind), weights, summed
        yield norm_case("layer_norm", {"x": x}, *rest, torch_layer_norm)
        yield norm_case("add_layer_norm", {"x": x, "residual": torch.randn_like(x)}, *rest, torch_add_layer_norm)
        yield norm_case("rms_norm", {"x": x}, *rest, torch_rms_norm)


def norm_case(op, tensors, what, weights, summed, fused):
    names = ["weight"] if op == "rms_norm" else ["weight", "bias"]
    tensors = tensors | {name: weights[name] for name in names}
    return Case(op, *what, tensors, getattr(kernels, op), getattr(reference, op), fused, summed)


def masked_softmax(scores, scale):
    hidden = ~reference.causal_mask(*scores.shape[-2:], device=scores.device)
    return torch.softmax((scores * scale).masked_fill(hidden, -torch.inf), dim=-1)


def torch_layer_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias)


def torch_add_layer_norm(x, residual, weight, bias):
    h = x + residual
    return F.layer_norm(h, weight.shape, weight, bias), h


def torch_rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-6)


SECTIONS = {"rows": row_cases}  # name -> cases on a device


def main(argv=None):
    p = command.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--section", type=command.one_of(SECTIONS), default=list(SECTIONS), metavar="NAME,...")
    p.add_argument("--dtype", type=command.one_of(command.DTYPES), default=list(command.DTYPES), metavar="DTYPE,...")
    p.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or cpu")
    p.add_argument("--out", default="runs/bench", metavar="DIR", help="where the CSV and JSON go")
    p.add_argument("--publish", action="store_true", help="also replace these tables under results/")
    p.add_argument("--commit", help="commit id to record, for a checkout without git")
    args = p.parse_args(argv)
    device = choose_device(args.device)
    for section in args.section:
        torch.manual_seed(0)
        found = [
            row for case in SECTIONS[section](device) for d in args.dtype for row in measure(case, command.DTYPES[d])
        ]
        print(f"\n{section} on {environment.device_name(device)}: largest errors in eps(dtype) * max|result|\n")
        print(show(found))
        facts = {"section": section, **environment.describe(device, args.commit)}
        for folder in [args.out, *([environment.results_folder(device)] if args.publish else [])]:
            output.save(folder, f"numerics_{section}", found, COLUMNS, facts)


def show(found):
    """The table on the screen."""
    header = [c for c in COLUMNS if c != "unit"]
    lines = [[f"{row[c]:.3g}" if isinstance(row[c], float) else row[c] for c in header] for row in found]
    return table.align(header, lines)


if __name__ == "__main__":
    sys.exit(command.run(main))
