"""One runner for every kernel bench: providers x shapes x modes -> rows.

Each (shape, mode) is timed for all providers in turn, in one process, on the same random inputs. Before a provider's
first row of a shape family it passes the correctness gate (bench/parity.py, on the smallest shape, output and gradients
against float64); one that is wrong is refused, not timed. What happens to a provider is its row's status:

    ok           timed
    parity       right, and not timed: it ran in Triton's interpreter, whose speed means nothing
    wrong        failed the gate
    oom          out of memory
    unsupported  it says itself that it cannot do this
    failed       it raised something else

`fwd` is a forward that saves what a backward needs, `bwd` the backward alone, `fwd+bwd` both.
"""

import contextlib
import functools
import sys
from functools import partial

import torch
from tqdm import tqdm

from bench import command, compiled, environment, gate, output, providers, timing, tracing
from bench.against import OtherCommit
from bench.gate import as_tuple
from gptlib.device import choose_device
from gptlib.errors import UserError
from gptlib.flags import positive_float

SEED = 0


class KernelBench:
    """One op's shapes, inputs and cost model; bench/attention.py and its neighbours fill this in.

    A case is a dict of the columns that say the shape, "dtype" among them ("bf16").
    """

    name = ""  # of the bench and its files
    bound = "flops"  # or "bytes": what the op is limited by, and so what its rate counts

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

    def intermediate(self, case, name):
        """Magnitude of the largest rounded intermediate of a result, for the error rule; None: the result's own."""
        return None

    def compile_case(self, case):
        """The call that the compile report makes for this op and shape (bench/compiled.py), in bf16."""
        raise NotImplementedError


# ---- timing ----------------------------------------------------------------------------------------------------------


def timing_inputs(bench, case, device):
    """The inputs that every provider is timed on."""
    torch.manual_seed(SEED)
    return bench.inputs(case, device)


def steps_of(bench, function, inputs, case, mode):
    """(step, prepare) of a mode: `step(prepare())` with only the step to be timed."""
    wanted = [x for x in inputs.values() if x.requires_grad]
    outs = as_tuple(bench.call(function, inputs, case))
    upstream = [torch.randn_like(o) for o in outs]
    del outs

    def forward(_=None):
        return as_tuple(bench.call(function, inputs, case))

    def backward(outs):
        return torch.autograd.grad(outs, wanted, upstream)

    return {
        "fwd": (forward, lambda: None),
        "bwd": (backward, forward),
        "fwd+bwd": (lambda _: backward(forward()), lambda: None),
    }[mode]


def measure(bench, function, inputs, case, mode, timer, budget_s):
    """Times and memory of one provider on one case and mode, as columns."""
    step, prepare = steps_of(bench, function, inputs, case, mode)
    durations = timing.sample(timer, step, prepare, budget_s=budget_s)
    p20, p50, p80 = timing.percentiles(durations)
    held = sum(x.numel() * x.element_size() for x in inputs.values())
    return {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "peak_mib": (held + timer.extra_memory(lambda: step(prepare()))) / timing.MIB,
    }


def run(bench, cases, competitors, modes, *, reference, device, timer, ceilings, budget_s, on_row=lambda rows: None):
    """Rows for every case, mode and provider. `on_row(rows)` is called after each new one."""
    checks = gate.Gate(bench, reference, device, with_gradients=any(m != "fwd" for m in modes))
    rows = []
    with tqdm(total=len(cases) * len(modes) * len(competitors), unit="row", disable=None, file=sys.stderr) as progress:
        for case in cases:
            checked = bench.gate_case(case, cases)
            inputs = functools.cache(partial(timing_inputs, bench, case, device))
            for mode in modes:
                for provider in competitors:
                    progress.set_postfix_str(f"{provider.name} {mode} " + " ".join(map(str, case.values())))
                    row = new_row(bench, provider, case, mode, device, checked)
                    if isinstance(provider, OtherCommit):
                        timing.free_memory()  # the other process needs it
                        row |= provider.measure(case, mode, checked)
                    else:
                        verdict = checks.verdict(provider, checked)  # only now: a fault must not cost others' rows
                        fill_row(row, bench, provider, inputs, case, mode, verdict, timer, budget_s)
                    if row["status"] == "ok":
                        add_rate(row, ceilings["copy" if bench.bound == "bytes" else f"matmul {case['dtype']}"])
                    rows.append(row)
                    on_row(rows)
                    progress.update()
                    if not right(row):
                        timing.require_device(device, f"{provider.name} {mode} {row['checked_at']}")
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
        "unit": output.rate_unit(bench.bound, device),
        "checked_at": " ".join(f"{k}={v}" for k, v in checked.items()),
        "flops": bench.flops(case, mode),
        "bytes": bench.bytes(case, mode),
        "device": environment.device_name(device),
    }


def fill_row(row, bench, provider, inputs, case, mode, verdict, timer, budget_s):
    """Status, and figures where the provider was right and its speed means something. `inputs()` gives the inputs:
    they may be what does not fit."""
    row["status"], row["note"] = verdict.status, verdict.note
    if verdict.worst is not None:
        row["max_error"], row["error_bound"] = verdict.worst.error, verdict.worst.bound
    if verdict.status != "ok":
        return
    if verdict.interpreted:
        row["status"] = "parity"
        return
    try:
        row.update(measure(bench, provider.call, inputs(), case, mode, timer, budget_s))
    except Exception as e:
        row["status"], row["note"] = gate.status_of(e), providers.first_line(e)
    if row["status"] != "ok":
        timing.free_memory()  # only now: an exception being handled holds what its frames hold


def right(row):
    """Whether its provider passed the gate and did not fail later."""
    return row["status"] in ("ok", "parity")


def add_rate(row, ceiling):
    """Rate in the row's unit, and its share of the measured ceiling (FLOP/s or bytes/s)."""
    scale, work = output.UNITS[row["unit"]]
    per_second = row[work] / (row["p50_ms"] / 1e3)
    row["rate"], row["share"] = per_second / scale, per_second / ceiling


# ---- the command -----------------------------------------------------------------------------------------------------


def parser(doc, ops):
    """The flags of every kernel bench; `doc` is its docstring, `ops` what it can measure."""
    p = command.parser(doc)
    known = ", ".join(dict.fromkeys(name for op in ops for name in providers.known_names(op)))
    p.add_argument("--dtype", type=command.one_of(command.DTYPES), help="fp32, fp16, bf16; default bf16, on a CPU fp32")
    p.add_argument(
        "--mode", type=command.one_of(command.MODES), default=["fwd", "bwd"], help="of fwd, bwd, fwd+bwd (fwd,bwd)"
    )
    p.add_argument(
        "--providers", type=command.names, help=f"{known}, or package.module:function; default all that run here"
    )
    p.add_argument("--against", metavar="REF", help="also time the kernels of this git commit, branch or tag")
    archs = command.one_of(compiled.LIMITS)
    p.add_argument("--arch", type=archs, metavar="A,...", help="also compile our kernels for A; without a GPU sm_90")
    p.add_argument("--budget", type=positive_float, default=0.2, metavar="S", help="seconds of repeats a row (0.2)")
    return p


def main(bench, args):
    """Run a kernel bench as its command line asks: table on stdout, progress on stderr, CSV and JSON in --out."""
    device = choose_device(args.device)
    args.dtype = args.dtype or (["bf16"] if device.type == "cuda" else ["fp32"])
    cases = bench.cases(args, device)
    ops = list(dict.fromkeys(bench.op(case) for case in cases))
    chosen = choose_providers(ops, args.providers, device)
    competitors = {op: providers.resolve(op, chosen[op]) for op in ops}
    missing = [line for _, lines in competitors.values() for line in lines]
    if not args.against and not any(found for found, _ in competitors.values()):
        raise UserError(f"nobody is left to measure: {'; '.join(dict.fromkeys(missing))}")
    report = output.Report(bench, device, args, list(cases[0]))
    timer = timing.timer_for(device)
    ceilings = timing.measure_ceilings(timer, device, [command.DTYPES[d] for d in args.dtype], args.budget)
    report.facts |= {"ceilings": ceilings, "missing": list(dict.fromkeys(missing))}
    for op in ops:
        own = [case for case in cases if bench.op(case) == op]
        found, _ = competitors[op]
        settings = {"device": device, "timer": timer, "budget_s": args.budget, "ceilings": ceilings}
        with other_commit(args, bench, op, device) as others:
            reference = providers.reference_of(op)
            rows = run(bench, own, found + others, args.mode, reference=reference, on_row=report.save, **settings)
        if not rows:
            continue
        report.finish_op(op, rows)
        if args.profile:
            report.show_profile(op, profile(bench, own[-1], found, rows, device, report.trace_path(op)))
        archs = args.arch or (["sm_90"] if device.type == "cpu" else [])
        able = [c for c in own if any(r["provider"] == "triton" and right(r) and c.items() <= r.items() for r in rows)]
        if archs and able:
            report.show_compiled(archs, {c.name: c for c in map(bench.compile_case, able)}.values())
    report.finish()


@contextlib.contextmanager
def other_commit(args, bench, op, device):
    """[the competitor that --against asks for], or []."""
    if not args.against:
        yield []
        return
    other = OtherCommit(args.against, bench, op, device, args.budget, any(m != "fwd" for m in args.mode))
    try:
        yield [other]
    finally:
        other.close()


def profile(bench, case, competitors, rows, device, path):
    """Trace the last case for every provider and mode that was timed on it; a table of the top kernels."""
    inputs = timing_inputs(bench, case, device)
    timed = {(r["provider"], r["mode"]) for r in rows if r["status"] == "ok" and case.items() <= r.items()}
    steps = {}
    for provider in competitors:
        for mode in command.MODES:
            if (provider.name, mode) in timed:
                step, prepare = steps_of(bench, provider.call, inputs, case, mode)
                steps[f"{provider.name} {mode}"] = lambda step=step, prepare=prepare: step(prepare())
    return tracing.trace(steps, device, path)


def choose_providers(ops, asked, device):
    """{op: names}: those asked for that the op has; by default everything on a GPU, on a CPU what runs there."""
    on_cpu = ("reference", "torch", "torch-chunked", "sdpa", "compiled", "triton-softmax", "triton")
    for name in asked or []:
        providers.check_known(ops, name)
    return {
        op: [n for n in asked if ":" in n or n in providers.known_names(op)]
        if asked
        else [n for n in providers.known_names(op) if device.type == "cuda" or n in on_cpu]
        for op in ops
    }
