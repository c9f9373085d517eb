"""What one call costs on the host: microseconds in Python before the GPU can begin, which small batches wait for.

    python bench/host.py
    python bench/host.py --op layer_norm --providers torch,triton

Calls each op on small inputs, forward alone (no gradient asked for), forward with its graph, and forward with backward,
and never waits for the GPU inside a measurement. A provider that does not pass the correctness gate is not measured.
Without a GPU the launches of our kernels are left out: what remains is everything before Triton takes over, to be
compared with itself before and after a change (other providers do their work there, and so do the matrix products of
linear_cross_entropy).
"""

import contextlib
import sys
import time
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from bench import command, environment, gate, harness, output, providers, table, timing
from bench.attention import Attention
from bench.cross_entropy import CrossEntropy
from bench.layernorm import LayerNorm
from bench.linear_cross_entropy import LinearCrossEntropy
from bench.softmax import Softmax
from gptlib.device import choose_device
from gptlib.flags import positive_int

HEADS = {"dtype": "bf16", "batch": 1, "heads": 12, "seq": 128, "head_dim": 64, "dropout": 0.0}
ROWS = {"dtype": "fp32", "rows": 128, "length": 768}
CASES = {  # op -> the bench that makes its inputs, and their shape
    "causal_attention": (Attention(), HEADS),
    **{op: (LayerNorm(), {"op": op, **ROWS}) for op in ("layer_norm", "add_layer_norm", "rms_norm")},
    "softmax": (Softmax(), {"op": "softmax", **ROWS}),
    "causal_softmax": (Softmax(), {"op": "causal_softmax", "dtype": "fp32", "rows": 12 * 64, "length": 64}),
    "cross_entropy": (CrossEntropy(), {"op": "cross_entropy", **ROWS}),
    "linear_cross_entropy": (LinearCrossEntropy(), {"dtype": "bf16", "tokens": 128, "width": 64, "classes": 768}),
}
PROVIDERS = {"cuda": ["reference", "sdpa", "torch", "liger", "triton"], "cpu": ["triton"]}  # those that an op has
MODES = ("no grad", "fwd", "fwd+bwd")
COLUMNS = ["bench", "op", "provider", "mode", "status", "p20_us", "p50_us", "p80_us", "calls", "device", "note"]
NO_LAUNCH = "without Triton's launch"
WARM_UP = 20  # calls that compile and fill caches


def call_of(bench, case, function, inputs, mode):
    """A call without arguments."""
    step, _ = harness.steps_of(bench, function, inputs, case, "fwd" if mode == "no grad" else mode)
    return torch.no_grad()(step) if mode == "no grad" else step


def microseconds(call, calls, device):
    """Host time of each of `calls` calls."""
    times = []
    for done in range(WARM_UP + calls):
        if done % 20 == 0 and device.type == "cuda":
            torch.cuda.synchronize(device)  # or a full queue would be what is measured
        start = time.perf_counter()
        call(None)
        times.append(1e6 * (time.perf_counter() - start))
    return times[WARM_UP:]


def leave_out_launches():
    """A context in which Triton has nothing to do."""
    from kernels._runtime import record_launches

    return record_launches("sm_90", lambda *launch: None)


def measure(op, provider, checks, device, calls):
    """A row for every mode: status "measured", or what the gate or the call said instead."""
    bench, case = CASES[op]
    verdict = checks.verdict(provider, case)
    leave_out = provider.name == "triton" and device.type == "cpu"
    rows = []
    for mode in MODES:
        row = {"bench": "host", "op": op, "provider": provider.name, "mode": mode, "calls": calls}
        row |= {"device": environment.device_name(device), "status": verdict.status, "note": verdict.note}
        rows.append(row)
        if verdict.status != "ok":
            continue
        try:
            with leave_out_launches() if leave_out else contextlib.nullcontext():
                call = call_of(bench, case, provider.call, harness.timing_inputs(bench, case, device), mode)
                times = sorted(microseconds(call, calls, device))
        except Exception as e:
            row |= {"status": gate.status_of(e), "note": providers.first_line(e)}
            continue
        p20, p50, p80 = (times[int(share * calls)] for share in (0.2, 0.5, 0.8))
        row |= {"status": "measured", "note": NO_LAUNCH * leave_out, "p20_us": p20, "p50_us": p50, "p80_us": p80}
    if any(row["status"] != "measured" for row in rows):
        timing.require_device(device, f"{provider.name} {op}")
    return rows


def main(argv=None):
    p = command.parser(__doc__)
    p.add_argument("--op", type=command.one_of(CASES), default=list(CASES), metavar="NAME,...", help="default: all")
    default = ",".join(PROVIDERS["cuda"])
    p.add_argument("--providers", type=command.names, metavar="NAME,...", help=f"default: {default}; on a CPU triton")
    p.add_argument("--calls", type=positive_int, default=400, metavar="N", help="measured of each kind (400)")
    args = p.parse_args(argv)
    device = choose_device(args.device)
    torch.set_num_threads(1)  # torch's ops on a CPU would wake others for nothing
    names = args.providers or PROVIDERS[device.type]
    for name in names:
        providers.check_known(args.op, name)
    facts = {"bench": "host", "complete": False, **environment.describe(device, args.commit)}
    rows = []
    for op in tqdm(args.op, unit="op", desc="host", disable=None):
        found, _ = providers.resolve(op, [name for name in names if name in providers.known_names(op)])
        checks = gate.Gate(CASES[op][0], providers.reference_of(op), device, with_gradients=True)
        for provider in found:
            rows += measure(op, provider, checks, device, args.calls)
        output.save(args.out, output.file_name("host", args.label), rows, COLUMNS, facts)
    facts["complete"] = True
    for folder in [args.out, *([environment.results_folder(device)] if args.publish else [])]:
        output.save(folder, output.file_name("host", args.label), rows, COLUMNS, facts)
    print(f"host time of a call on {environment.device_name(device)}, microseconds at the median\n")
    print(table.compare_providers(rows, ["op", "mode"], "p50_us", lowest=True))
    print()
    for line in dict.fromkeys(f"{row['provider']}: {row['status']}: {row['note']}" for row in rows if row["note"]):
        print(line)


if __name__ == "__main__":
    sys.exit(command.run(main))
