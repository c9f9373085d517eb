"""One runner for every kernel bench: providers x shapes x modes -> rows.

For each shape family every provider first passes the correctness gate (bench/parity.py, on the smallest shape, output
and gradients against float64); one that is wrong is refused, not timed. Then each (shape, mode) is timed for all
providers in turn, in one process, on the same random inputs. What happens to a provider is its row's status:

    ok           timed
    parity       right, and not timed: it ran in Triton's interpreter, whose speed means nothing
    wrong        failed the gate
    oom          out of memory
    unsupported  it says itself that it cannot do this
    failed       it raised something else

`fwd` is a forward that saves what a backward needs, `bwd` the backward alone, `fwd+bwd` both.
"""

import contextlib
import importlib.util
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from bench import command, environment, parity, providers, table, timing
from gptlib.device import choose_device

MEASURED = ["status", "p20_ms", "p50_ms", "p80_ms", "rate", "unit", "share", "peak_mib"]
CHECKED = ["checked_at", "max_error", "error_bound", "flops", "bytes", "device", "note"]
GATE_SEED, TIMING_SEED = 1, 0


class KernelBench:
    """One op's shapes, inputs and cost model; bench/attention.py and its neighbours fill this in.

    A case is a dict of the columns that say the shape, "dtype" among them ("bf16").
    """

    name = ""  # of the bench and its files
    unit = "TFLOP/s"  # or "GB/s": what the op is bound by

    def cases(self, args, device):
        """The list of cases of a run."""
        raise NotImplementedError

    def op(self, case):
        """Name of the op in bench/providers.py."""
        raise NotImplementedError

    def inputs(self, case, device):
        """{name: tensor}, random normal, requiring grad where a gradient is wanted."""
        raise NotImplementedError

    def call(self, function, inputs, case):
        """Run a provider's callable; a tensor or a tuple of them."""
        raise NotImplementedError

    def flops(self, case, mode):
        raise NotImplementedError

    def bytes(self, case, mode):
        raise NotImplementedError

    def gate_case(self, case, cases):
        """The shape on which `case`'s family is checked; equal for all cases of a family."""
        raise NotImplementedError

    def summed_rows(self, case, name):
        """For a gradient that is a sum over rows, how many; else None (the error rule's sqrt law)."""
        return None


# ---- the correctness gate --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a provider on one shape."""

    status: str  # "ok", or a row's status
    interpreted: bool = False
    worst: parity.Comparison | None = None
    note: str = ""


class Gate:
    """Checks providers against the float64 reference, one verdict per (provider, checked shape)."""

    def __init__(self, bench, reference, device, with_gradients):
        self.bench, self.reference, self.device, self.with_gradients = bench, reference, device, with_gradients
        self._expected, self._verdicts = {}, {}

    def verdict(self, provider, case):
        key = (provider.name, *case.items())
        if key not in self._verdicts:
            self._verdicts[key] = self._check(provider, case)
        return self._verdicts[key]

    def _check(self, provider, case):
        inputs, upstream, ref, eager = self._expectation(case)
        try:
            with count_interpreted_launches() as launches:
                results = self._results(provider.call, inputs, upstream, case)
        except Exception as e:
            timing.free_memory()
            return Verdict(status_of(e), note=providers.first_line(e))
        compared = {}
        for name, tensor in results.items():
            rows = self.bench.summed_rows(case, name)
            compared[name] = parity.compare(tensor, ref[name], eager[name], rows=rows)
        name, worst = max(compared.items(), key=lambda item: relative_error(item[1]))
        if worst.problem:
            return Verdict("wrong", worst=worst, note=f"{name}: {worst.problem}")
        return Verdict("ok", interpreted=launches() > 0, worst=worst)

    def _expectation(self, case):
        key = tuple(case.items())
        if key not in self._expected:
            self._expected.clear()  # one shape at a time: float64 scores are large
            torch.manual_seed(GATE_SEED)
            inputs = self.bench.inputs(case, self.device)
            doubles = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in inputs.items()}
            outs = as_tuple(self.bench.call(self.reference, inputs, case))
            upstream = [torch.randn_like(o) for o in outs]
            eager = self._results(self.reference, inputs, upstream, case)
            ref = self._results(self.reference, doubles, [g.double() for g in upstream], case)
            self._expected[key] = inputs, upstream, ref, eager
        return self._expected[key]

    def _results(self, function, inputs, upstream, case):
        """{"out": ..., "d<input>": ...} of one forward and backward."""
        outs = as_tuple(self.bench.call(function, inputs, case))
        results = {f"out{i or ''}": out.detach() for i, out in enumerate(outs)}
        if self.with_gradients:
            wanted = {n: x for n, x in inputs.items() if x.requires_grad}
            gradients = torch.autograd.grad(outs, list(wanted.values()), upstream)
            results |= {f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}
        return results


def relative_error(comparison):
    """Error over its bound: above 1 fails. An error without a bound counts as infinite."""
    if comparison.error == 0:
        return 0.0
    return comparison.error / comparison.bound if comparison.bound > 0 else math.inf


@contextlib.contextmanager
def count_interpreted_launches():
    """Counts the kernels that Triton's interpreter ran inside; a GPU process never has any."""
    launched = []
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield lambda: 0
        return
    from triton.runtime.interpreter import GridExecutor

    original = GridExecutor.__call__

    def counting(self, *args, **kwargs):
        launched.append(1)
        return original(self, *args, **kwargs)

    GridExecutor.__call__ = counting
    try:
        yield lambda: len(launched)
    finally:
        GridExecutor.__call__ = original


def status_of(error):
    """The row status that an exception stands for."""
    if timing.is_out_of_memory(error):
        return "oom"
    refusals = ("no available kernel", "not support", "unsupported", "not implemented")
    if isinstance(error, ValueError | NotImplementedError) or any(r in str(error).lower() for r in refusals):
        return "unsupported"
    return "failed"


# ---- timing ----------------------------------------------------------------------------------------------------------


def measure(bench, function, inputs, case, mode, timer, budget_s):
    """Times, rate and memory of one provider on one case and mode, as columns."""
    wanted = [x for x in inputs.values() if x.requires_grad]
    outs = as_tuple(bench.call(function, inputs, case))
    upstream = [torch.randn_like(o) for o in outs]
    del outs

    def forward(_=None):
        return as_tuple(bench.call(function, inputs, case))

    def backward(outs):
        return torch.autograd.grad(outs, wanted, upstream)

    step, prepare = {
        "fwd": (forward, lambda: None),
        "bwd": (backward, forward),
        "fwd+bwd": (lambda _: backward(forward()), lambda: None),
    }[mode]
    durations = timing.sample(timer, step, prepare, budget_s=budget_s)
    p20, p50, p80 = timing.percentiles(durations)
    held = sum(x.numel() * x.element_size() for x in inputs.values())
    work = bench.flops(case, mode) / 1e12 if bench.unit == "TFLOP/s" else bench.bytes(case, mode) / 1e9
    return {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "rate": work / (p50 / 1e3),
        "peak_mib": (held + timer.extra_memory(lambda: step(prepare()))) / timing.MIB,
    }


def run(bench, cases, competitors, modes, *, reference, device, timer, ceilings, budget_s, on_row=lambda rows: None):
    """Rows for every case, mode and provider. `on_row(rows)` is called after each new one."""
    gate = Gate(bench, reference, device, with_gradients=any(m != "fwd" for m in modes))
    rows = []
    with tqdm(total=len(cases) * len(modes) * len(competitors), unit="row", disable=None, file=sys.stderr) as progress:
        for case in cases:
            verdicts = {p.name: gate.verdict(p, bench.gate_case(case, cases)) for p in competitors}
            torch.manual_seed(TIMING_SEED)
            inputs = bench.inputs(case, device)
            for mode in modes:
                for provider in competitors:
                    progress.set_postfix_str(f"{provider.name} {mode} " + " ".join(map(str, case.values())))
                    row = new_row(bench, provider, case, mode, device, bench.gate_case(case, cases))
                    fill_row(row, bench, provider, inputs, case, mode, verdicts[provider.name], timer, budget_s)
                    if row["status"] == "ok":
                        ceiling = ceilings["copy" if bench.unit == "GB/s" else f"matmul {case['dtype']}"]
                        row["share"] = row["rate"] / ceiling
                    rows.append(row)
                    on_row(rows)
                    progress.update()
            del inputs
            timing.free_memory()
    return rows


def new_row(bench, provider, case, mode, device, checked):
    return {
        "bench": bench.name,
        "op": bench.op(case),
        "provider": provider.name,
        "mode": mode,
        **case,
        "unit": bench.unit,
        "checked_at": " ".join(f"{k}={v}" for k, v in checked.items()),
        "flops": bench.flops(case, mode),
        "bytes": bench.bytes(case, mode),
        "device": environment.device_name(device),
    }


def fill_row(row, bench, provider, inputs, case, mode, verdict, timer, budget_s):
    """Status, and figures where the provider was right and its speed means something."""
    row["status"], row["note"] = verdict.status, verdict.note
    if verdict.worst is not None:
        row["max_error"], row["error_bound"] = verdict.worst.error, verdict.worst.bound
    if verdict.status != "ok":
        return
    if verdict.interpreted:
        row["status"] = "parity"
        return
    try:
        row.update(measure(bench, provider.call, inputs, case, mode, timer, budget_s))
    except Exception as e:
        row["status"], row["note"] = status_of(e), providers.first_line(e)
        timing.free_memory()


def as_tuple(outs):
    return outs if isinstance(outs, tuple) else (outs,)


# ---- the command -----------------------------------------------------------------------------------------------------


def parser(description):
    """The flags of every kernel bench."""
    p = command.parser(description)
    p.add_argument("--dtype", type=command.one_of(command.DTYPES), help="fp32, fp16, bf16; default bf16, on a CPU fp32")
    p.add_argument("--mode", type=command.one_of(command.MODES), default=["fwd", "bwd"], help="fwd, bwd, fwd+bwd")
    p.add_argument("--providers", type=command.names, help="names, or package.module:function; default all")
    p.add_argument("--budget", type=command.seconds, default=0.2, metavar="S", help="seconds of repeats a row")
    return p


def main(bench, args):
    """Run a kernel bench as its command line asks: table on stdout, progress on stderr, CSV and JSON in --out."""
    device = choose_device(args.device)
    args.dtype = args.dtype or (["bf16"] if device.type == "cuda" else ["fp32"])
    cases = bench.cases(args, device)
    ops = list(dict.fromkeys(bench.op(case) for case in cases))
    report = Report(bench, device, args, list(cases[0]))
    timer = timing.timer_for(device)
    ceilings = timing.measure_ceilings(timer, device, [command.DTYPES[d] for d in args.dtype], args.budget)
    report.facts |= {"ceilings": ceilings, "missing": []}
    for op in ops:
        competitors, missing = providers.resolve(op, args.providers or default_names(op, device))
        report.facts["missing"] += missing
        rows = run(
            bench,
            [case for case in cases if bench.op(case) == op],
            competitors,
            args.mode,
            reference=providers.reference_of(op),
            device=device,
            timer=timer,
            ceilings=ceilings,
            budget_s=args.budget,
            on_row=report.save,
        )
        report.finish_op(op, rows)
    report.finish()


def default_names(op, device):
    """Everything on a GPU; on a CPU what runs there."""
    known = providers.known_names(op)
    on_cpu = ("reference", "torch", "sdpa", "compiled", "triton-softmax", "triton")
    return known if device.type == "cuda" else [name for name in known if name in on_cpu]


class Report:
    """Where rows go: CSV and JSON after every row, tables at the end."""

    def __init__(self, bench, device, args, shape_columns):
        self.bench, self.args, self.device = bench, args, device
        self.columns = ["bench", "op", "provider", "mode", *shape_columns, *MEASURED, *CHECKED]
        self.facts = {"bench": bench.name, "complete": False, **environment.describe(device, args.commit)}
        self.done = []

    def save(self, rows, folder=None):
        base = Path(folder or self.args.out) / self.bench.name
        table.write_csv(base.with_suffix(".csv"), [*self.done, *rows], self.columns)
        table.write_json(base.with_suffix(".json"), self.facts)

    def finish_op(self, op, rows):
        self.done += rows
        shape = [c for c in rows[0] if c in self.columns[4 : self.columns.index("status")]]
        print(f"\n{op}: {self.bench.unit} on {rows[0]['device']}, median; {table.BEST} marks the best of a line\n")
        print(table.compare_providers(rows, [*shape, "mode"], "rate", digits=2))
        print("\nmost memory at once, MiB, inputs included\n")
        print(table.compare_providers(rows, [*shape, "mode"], "peak_mib", lowest=True))
        for line in notes(rows):
            print(line)

    def finish(self):
        self.facts["complete"] = True
        self.save([])
        if self.args.publish:
            self.save([], environment.ROOT / "results" / environment.device_folder(self.device))
        print()
        for name, value in self.facts["ceilings"].items():
            print(f"ceiling {name}: {value:.1f} {'GB/s' if name == 'copy' else 'TFLOP/s'}, measured in this run")
        for line in self.facts["missing"]:
            print(line)
        if self.device.type == "cpu":
            print(
                "No GPU here: these are CPU times, and Triton kernels were checked in the interpreter, not timed. "
                "On a GPU the same command times them beside every peer; `make gpu` runs all benches."
            )
        print(f"wrote {self.args.out}/{self.bench.name}.csv and .json")


def notes(rows):
    """One line per provider and status worth a word: why it was refused, or how exact it is."""
    lines = {}
    for row in rows:
        if row["status"] == "parity":
            lines[row["provider"], "parity"] = (
                f"{row['provider']}: parity only, in the interpreter at {row['checked_at']}: "
                f"largest error {row['max_error']:.2e}, allowed {row['error_bound']:.2e}"
            )
        elif row["status"] != "ok":
            lines.setdefault(
                (row["provider"], row["status"]), f"{row['provider']} {row['mode']}: {row['status']}: {row['note']}"
            )
    return lines.values()
