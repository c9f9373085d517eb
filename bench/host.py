"""What one call costs on the host: microseconds in Python before the GPU can begin, which small batches wait for.

    python bench/host.py
    python bench/host.py --op layer_norm --providers torch,triton

Calls each op on a small tensor, forward alone (no gradient asked for), forward with its graph, and forward with
backward, and never waits for the GPU inside a measurement. Without a GPU the launches of our kernels are left out:
what remains is everything before Triton takes over, to be compared with itself before and after a change (other
providers do their work there, and so do the matrix products of linear_cross_entropy). That results are right is the
business of the tests.
"""

import contextlib
import sys
import time
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from bench import command, environment, output, providers, table
from gptlib.device import choose_device
from gptlib.flags import positive_int

SHAPES = {  # of the tensors that an op is called with, which all want gradients
    "causal_attention": [(1, 12, 128, 64)] * 3,
    "layer_norm": [(128, 768), (768,), (768,)],
    "add_layer_norm": [(128, 768), (128, 768), (768,), (768,)],
    "rms_norm": [(128, 768), (768,)],
    "softmax": [(128, 768)],
    "causal_softmax": [(12, 64, 64)],
    "cross_entropy": [(128, 768)],
    "linear_cross_entropy": [(128, 64), (768, 64)],
}
PROVIDERS = {"cuda": ["reference", "sdpa", "torch", "liger", "triton"], "cpu": ["triton"]}  # those that an op has
MODES = ("no grad", "fwd", "fwd+bwd")
COLUMNS = ["bench", "op", "provider", "mode", "p20_us", "p50_us", "p80_us", "calls", "device", "note"]
NO_LAUNCH = "without Triton's launch"


def arguments(op, device):
    """(tensors that want gradients, what follows them) of a call."""
    dtype = torch.bfloat16 if op in ("causal_attention", "linear_cross_entropy") else torch.float32
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in SHAPES[op]]
    if op.endswith("cross_entropy"):
        return tensors, [torch.zeros(128, dtype=torch.int64, device=device)]
    return tensors, [0.125] if op == "causal_softmax" else []


def calls_of(op, function, device):
    """{mode: a call without arguments}."""
    tensors, rest = arguments(op, device)

    def forward():
        out = function(*tensors, *rest)
        return out[0] if isinstance(out, tuple) else out

    def no_grad():
        with torch.no_grad():
            return forward()

    gradient = torch.ones_like(forward())

    def both():
        torch.autograd.grad(forward(), tensors, gradient)

    return dict(zip(MODES, (no_grad, forward, both), strict=True))


def microseconds(call, calls, device):
    """Host time of each of `calls` calls, after some that compile and fill caches."""

    def timed():
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)

    times = []
    for done in range(20 + calls):
        if done % 20 == 0 and device.type == "cuda":
            torch.cuda.synchronize(device)  # or a full queue would be what is measured
        times.append(timed())
    return times[20:]


def launches(provider, device):
    """(context for a provider's calls, note): without a GPU Triton's launches are left out."""
    if device.type == "cuda" or provider != "triton":
        return contextlib.nullcontext(), ""
    from kernels._runtime import record_launches

    return record_launches("sm_90", lambda *launch: None), NO_LAUNCH


def measure(op, provider, device, calls):
    """A row for every mode."""
    context, note = launches(provider.name, device)
    rows = []
    with context:
        for mode, call in calls_of(op, provider.call, device).items():
            times = microseconds(call, calls, device)
            p20, p50, p80 = (sorted(times)[int(share * len(times))] for share in (0.2, 0.5, 0.8))
            rows.append(
                {
                    "bench": "host", "op": op, "provider": provider.name, "mode": mode, "p20_us": p20, "p50_us": p50,
                    "p80_us": p80, "calls": calls, "device": environment.device_name(device), "note": note,
                }
            )  # fmt: skip
    return rows


def main(argv=None):
    p = command.parser(__doc__)
    p.add_argument("--op", type=command.one_of(SHAPES), default=list(SHAPES), metavar="NAME,...", help="default: all")
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
        for provider in found:
            rows += measure(op, provider, device, args.calls)
        output.save(args.out, output.file_name("host", args.label), rows, COLUMNS, facts)
    facts["complete"] = True
    for folder in [args.out, *([environment.results_folder(device)] if args.publish else [])]:
        output.save(folder, output.file_name("host", args.label), rows, COLUMNS, facts)
    print(f"host time of a call on {environment.device_name(device)}, microseconds at the median\n")
    print(table.compare_providers(rows, ["op", "mode"], "p50_us", lowest=True))
    if any(row["note"] for row in rows):
        print(f"\ntriton: {NO_LAUNCH}, for there is no GPU here")


if __name__ == "__main__":
    sys.exit(command.run(main))
