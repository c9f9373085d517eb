"""How exact the kernels are: largest errors against float64, ours beside eager PyTorch's and its fused operators'.

    python bench/numerics.py
    python bench/numerics.py --section rows --publish

Prints one line per result (an output y or a gradient): the largest absolute error of each implementation, in units of
eps(dtype) * max|result|, so that 0.5 is one correct rounding of the largest element, and the error that the project's
rule allows ours (bench/parity.py). A call of ours that fails is a row that says so, and makes the exit code 1.

On a CPU the kernels run in Triton's interpreter, whose sums are NumPy's and not a GPU's: the roundings are of the same
kind, their order differs.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F

from bench import command, environment, gate, output, providers, table, timing
from bench.numerics_attention import attention_calls
from bench.parity import compare
from gptlib import reference
from gptlib.device import choose_device

LABELS = ["op", "result", "dtype", "shape", "input", "unit"]
VERDICT = ["allowed", "within"]


@dataclass(frozen=True)
class Case:
    """One call: `ours`, `eager` and each of `peers` take the tensors and return one output or several."""

    op: str
    shape: tuple
    kind: str
    tensors: dict  # name -> fp32 tensor; all are cast to the dtype under test
    ours: object
    eager: object
    peers: dict  # name -> torch's own
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
    ours, eager = run(case.ours, tensors, grads), run(case.eager, tensors, grads)
    peers = {name: attempt(f, tensors, grads) for name, f in case.peers.items()}
    for result, exact in ref.items():
        compared = compare(ours[result], exact, eager[result], rows=case.summed.get(result))
        unit = torch.finfo(dtype).eps * exact.abs().max().item()
        errors = {"triton": compared.error, "eager": compared.eager_error}
        errors |= {name: (found[result].double() - exact).abs().max().item() for name, found in peers.items() if found}
        scaled = {name: e / unit if unit else 0.0 for name, e in (errors | {"allowed": compared.bound}).items()}
        labels = case.op, result, str(dtype).removeprefix("torch."), "x".join(map(str, case.shape)), case.kind, unit
        yield dict(zip(LABELS, labels, strict=True)) | scaled | {"within": "no" if compared.problem else "yes"}


def measure_all(cases, dtypes, device, save):
    """Rows of all cases; `save(rows)` after each one, so that nothing is lost where the next one fails."""
    rows = []
    for case in cases:
        for dtype in dtypes:
            try:
                rows += measure(case, dtype)
                continue
            except Exception as e:
                labels = case.op, "", str(dtype).removeprefix("torch."), "x".join(map(str, case.shape)), case.kind, None
                why = f"{gate.status_of(e)}: {providers.first_line(e)}"
                rows.append(dict(zip(LABELS, labels, strict=True)) | {"within": why})
            finally:
                save(rows)
            timing.free_memory()
            timing.require_device(device, f"{case.op} {case.shape} {case.kind} {dtype}")
    return rows


def attempt(function, tensors, grads):
    """The results of a peer, or None for what it does not do (a dtype, a head dimension, grouped heads)."""
    try:
        return run(function, tensors, grads)
    except RuntimeError:
        return None


# ---- sections --------------------------------------------------------------------------------------------------------


def row_cases(device):
    """Softmax and the norms: rows of a GPT, a vocabulary, long rows, rows far from zero."""
    import kernels

    for shape, kind in (((512, 768), "normal"), ((64, 1023), "x 10"), ((8, 50257), "x 10")):
        x = torch.randn(shape, device=device) * (10 if kind == "x 10" else 1)
        peers = {"torch": partial(torch.softmax, dim=-1)}
        yield Case("softmax", shape, kind, {"x": x}, kernels.softmax, reference.softmax, peers, {})
    scores = torch.randn(2, 4, 256, 256, device=device)
    ours, eager, fused = (
        partial(f, scale=0.125) for f in (kernels.causal_softmax, reference.causal_softmax, masked_softmax)
    )
    yield Case("causal_softmax", tuple(scores.shape), "normal", {"x": scores * 8}, ours, eager, {"torch": fused}, {})
    x = torch.randn(512, 768, device=device) + 1e4
    yield norm_case("layer_norm", x, "mean 1e4", torch_layer_norm)
    for shape in ((512, 768), (64, 1023), (16, 65536)):
        x = torch.randn(shape, device=device)
        yield norm_case("layer_norm", x, "normal", torch_layer_norm)
        yield norm_case("add_layer_norm", x, "normal", torch_add_layer_norm)
        yield norm_case("rms_norm", x, "normal", torch_rms_norm)


def loss_cases(device):
    """The loss of rows of logits, alone and with the head; logits far from zero."""
    import kernels

    targets = torch.randint(1023, (64,), device=device)
    for kind, offset in (("x 5", 0.0), ("x 5, mean 1e4", 1e4)):
        logits = 5 * torch.randn(64, 1023, device=device) + offset
        ours, eager, fused = (
            partial(f, **{name: targets})
            for f, name in (
                (kernels.cross_entropy, "targets"),
                (reference.cross_entropy, "targets"),
                (F.cross_entropy, "target"),
            )
        )
        yield Case("cross_entropy", tuple(logits.shape), kind, {"logits": logits}, ours, eager, {"torch": fused}, {})
    tensors = {"x": torch.randn(64, 256, device=device), "weight": torch.randn(1023, 256, device=device) / 16}
    ours, eager = (partial(m.linear_cross_entropy, targets=targets) for m in (kernels, reference))
    yield Case("linear_cross_entropy", (64, 256, 1023), "normal", tensors, ours, eager, {}, {"dweight": 64})


def norm_case(op, x, kind, fused):
    import kernels

    names = {"layer_norm": ["weight", "bias"], "add_layer_norm": ["residual", "weight", "bias"], "rms_norm": ["weight"]}
    tensors = {name: torch.randn_like(x if name == "residual" else x[0]) for name in names[op]}
    summed = dict.fromkeys(("dweight", "dbias"), x.shape[0])
    calls = getattr(kernels, op), getattr(reference, op), {"torch": fused}
    return Case(op, tuple(x.shape), kind, {"x": x} | tensors, *calls, summed)


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


def attention_cases(device):
    """Attention over a ladder of shapes, beside each of torch's own implementations that exists here."""
    for call in attention_calls(device):
        yield Case(*call, {})


SECTIONS = {"rows": row_cases, "loss": loss_cases, "attention": attention_cases}  # name -> cases on a device


def main(argv=None):
    p = command.Parser(__doc__)
    p.add_argument(
        "--section",
        type=command.one_of(SECTIONS),
        default=list(SECTIONS),
        metavar="NAME,...",
        help=f"of {', '.join(SECTIONS)}; all",
    )
    p.add_argument(
        "--dtype",
        type=command.one_of(command.DTYPES),
        default=list(command.DTYPES),
        metavar="DTYPE,...",
        help="of fp32, fp16, bf16; all",
    )
    p.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or cpu")
    p.add_argument("--out", type=command.folder, default="runs/bench", metavar="DIR", help="where the CSV and JSON go")
    p.add_argument("--publish", action="store_true", help="also replace these tables under results/")
    p.add_argument("--commit", help="commit id to record, for a checkout without git")
    args = p.parse_args(argv)
    device = choose_device(args.device)
    failed = False
    for section in args.section:
        torch.manual_seed(0)
        facts = {"section": section, **environment.describe(device, args.commit)}

        def save(rows, folder=args.out, name=f"numerics_{section}", facts=facts):
            output.save(folder, name, rows, columns(rows), facts)

        found = measure_all(SECTIONS[section](device), [command.DTYPES[d] for d in args.dtype], device, save)
        print(f"\n{section} on {environment.device_name(device)}: largest errors in eps(dtype) * max|result|\n")
        print(show(found))
        if args.publish:
            save(found, environment.results_folder(device))
        failed = failed or any(row["within"] not in ("yes", "no") for row in found)
    return int(failed)


def columns(found):
    """Labels, then every implementation that some row has, then the verdict."""
    names = dict.fromkeys(name for row in found for name in row if name not in (*LABELS, *VERDICT))
    return [*LABELS, *names, *VERDICT]


def show(found):
    """The table on the screen; a dash where an implementation does not do the case."""
    header = [c for c in columns(found) if c != "unit"]
    lines = [[f"{row[c]:.3g}" if isinstance(row.get(c), float) else row.get(c, "-") for c in header] for row in found]
    return table.align(header, lines)


if __name__ == "__main__":
    sys.exit(command.run(main))
