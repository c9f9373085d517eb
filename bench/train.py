"""Whole training steps: tokens per second, step time, MFU and memory for every kind of attention, norm and loss.

    python bench/train.py
    python bench/train.py --preset gpt2 --attn reference,sdpa,flex,triton --norm torch,triton --seq 1024 --compile
    python bench/train.py --preset gpt2 --attn sdpa+torch,triton+triton+triton --seq 2048,8192,32768 --label long
    python bench/train.py --preset gpt2 --attn sdpa,triton,my.kernel:attend --loss torch,triton --find-batch

A step is the trainer's own (gptlib.train): batch to the device, forward, backward, clipping, AdamW; evaluation,
sampling and checkpoints stay out. Before its first row every contestant trains a two-layer model of the same widths for
a few steps on the same data and weights without dropout: one whose losses, or whose gradients of any weight matrix,
differ from the reference's is refused, not timed. Dropout is off unless asked for, since not every contestant has it.

MFU is by the common formula, which counts attention's whole square. "of ceiling" counts the causal half, the work that
has to be done, and holds it against the matrix product measured in the same run.
"""

import argparse
import dataclasses
import itertools
import math
import sys
import time
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from bench import command, environment, gate, output, providers, table, timing, tracing
from gptlib import backends, metrics
from gptlib.device import autocast_for, choose_device, choose_dtype
from gptlib.errors import UserError
from gptlib.flags import below_one, positive_int
from gptlib.model import PRESETS
from gptlib.options import DTYPES
from gptlib.train import build_model, make_optimizer, to_device, train_step

COLUMNS = [
    *("bench", "provider", "attn", "norm", "loss", "compile", "preset", "dtype", "batch", "seq", "drop_rate", "status"),
    *("tokens_per_s", "p20_ms", "p50_ms", "p80_ms", "mfu", "share", "peak_mib", "largest_batch"),
    *("loss_difference", "gradient_difference"),
    *("flops_per_token", "parameters", "device", "note"),
]
SHOWN = [
    *("seq", "attn", "norm", "loss", "batch", "tokens/s"),
    *("p20 ms", "p50 ms", "p80 ms", "MFU", "of ceiling", "peak MiB"),
]
CHECK_STEPS, CHECK_LAYERS, CHECK_BATCH, CHECK_SEQ = 3, 2, 1, 1024
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # nats; bf16 rounds a loss of 10 by up to 0.03 on the way
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of a matrix, relative; eager bf16 is 0.012 off fp32
WARMUP_STEPS, LR, SEED = 3, 1e-4, 0
LARGEST_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one row trains: a model's shape and how its parts are computed."""

    cfg: object
    attn: str
    norm: str
    loss: str
    batch: int
    dtype: torch.dtype
    device: torch.device
    compile: bool

    @property
    def name(self):
        return f"{self.attn}+{self.norm}+{self.loss}"


class Run:
    """A model in training as the trainer has it, on random tokens; `step()` is one whole update."""

    def __init__(self, setting):
        if setting.compile:
            torch._dynamo.reset()  # compiled for this model alone, not an eighth variant of the first
        self.setting, cfg = setting, setting.cfg
        names = {"attn": setting.attn, "norm": setting.norm, "loss": setting.loss}
        with setting.device:  # weights are drawn there: the same for all contestants, and quickly
            self.model = build_model(cfg, **names, device=setting.device, seed=SEED)
        self.optimizer = make_optimizer(self.model, lr=LR)
        self.loss_fn = torch.compile(self.model.loss) if setting.compile else self.model.loss
        self.autocast = autocast_for(setting.device, setting.dtype)
        self.generator = torch.Generator().manual_seed(SEED)

    def batch(self):
        cfg = self.setting.cfg
        tokens = torch.randint(cfg.vocab_size, (self.setting.batch, cfg.context_length + 1), generator=self.generator)
        return to_device((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), self.setting.device)

    def step(self):
        return train_step(self.loss_fn, self.optimizer, [self.batch()], lr=LR, autocast=self.autocast)[0]

    def gradients(self):
        """{name: gradient, on the CPU} of every weight matrix on a batch. Not of vectors: that of the keys' bias, which
        shifts all scores of a query alike, is nothing but rounding."""
        with self.autocast:
            loss = self.loss_fn(*self.batch())
        loss.backward()
        matrices = {n: p for n, p in self.model.named_parameters() if p.dim() >= 2}
        found = {n: (torch.zeros_like(p) if p.grad is None else p.grad).cpu() for n, p in matrices.items()}
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def peak_mib(self):
        """Memory of one more step at its peak, model and optimizer included."""
        if self.setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.setting.device)
            self.step()
            return metrics.peak_memory_mb(self.setting.device)
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        held = sum(t.numel() * t.element_size() for t in [*self.model.parameters(), *state])
        return (held + timing.HostTimer().extra_memory(self.step)) / timing.MIB


# ---- the same losses and gradients first -----------------------------------------------------------------------------


class Check:
    """Contestants beside the reference, on a small model. Each trains it when it is first asked for."""

    def __init__(self, settings):
        self.seq = min(CHECK_SEQ, *(s.cfg.context_length for s in settings))
        self.expected, self.found = None, {}

    def verdict(self, setting):
        """(status, largest difference of a loss, of a matrix' gradient, note)"""
        if setting.name not in self.found:
            cfg = dataclasses.replace(setting.cfg, n_layers=CHECK_LAYERS, drop_rate=0.0, context_length=self.seq)
            small = dataclasses.replace(setting, cfg=cfg, batch=CHECK_BATCH, compile=False)
            if self.expected is None:
                self.expected = trial(dataclasses.replace(small, attn="reference", norm="reference", loss="reference"))
            self.found[setting.name] = compare(small, *self.expected)
            timing.free_memory()
        return self.found[setting.name]


def compare(setting, expected_losses, expected_gradients):
    """(status, largest difference of a loss, of a matrix' gradient, note) of one contestant on the small model."""
    try:
        with gate.count_interpreted_launches() as launches:
            losses, gradients = trial(setting)
    except Exception as e:
        return gate.status_of(e), None, None, providers.first_line(e)
    loss = max((abs(a - b) for a, b in zip(losses, expected_losses, strict=True)), key=nan_last)
    apart = {n: relative_distance(gradients[n], expected) for n, expected in expected_gradients.items()}
    worst = max(apart, key=lambda n: nan_last(apart[n]))
    found = nan_last(loss), nan_last(apart[worst])
    for difference, what, allowed in (
        (found[0], "losses differ", TOLERANCE[setting.dtype]),
        (found[1], f"the gradient of {worst} differs", GRADIENT_TOLERANCE[setting.dtype]),
    ):
        if difference > allowed:
            return "wrong", *found, f"{what} from the reference's by {difference:.1e}, allowed {allowed:.0e}"
    return ("parity" if launches() else "ok"), *found, ""


def trial(setting):
    """(losses of a few steps, gradients of the first)"""
    run = Run(setting)
    gradients = run.gradients()
    return [float(run.step()) for _ in range(CHECK_STEPS)], gradients


def relative_distance(x, expected):
    return float((x - expected).norm() / expected.norm())


def nan_last(x):
    return math.inf if math.isnan(x) else x


# ---- measuring -------------------------------------------------------------------------------------------------------


def step_times(step, steps, device):
    """Milliseconds from the end of each step to the end of the next; on a GPU nothing waits in between."""
    for _ in range(WARMUP_STEPS):
        step()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def measure(setting, steps, ceiling):
    """Columns of one timed row."""
    run = Run(setting)
    T = setting.cfg.context_length
    p20, p50, p80 = timing.percentiles(step_times(run.step, steps, setting.device))
    tokens_per_s = setting.batch * T / (p50 / 1e3)
    return {
        "tokens_per_s": tokens_per_s,
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "mfu": metrics.mfu(run.model, T, tokens_per_s, setting.device),
        "share": metrics.flops_per_token(run.model, T, causal_half=True) * tokens_per_s / ceiling,
        "peak_mib": run.peak_mib(),
        "flops_per_token": metrics.flops_per_token(run.model, T),
        "parameters": run.model.n_params(),
    }


def fits(setting, batch):
    """Whether two steps with this micro-batch stay within the device's memory."""
    try:
        run = Run(dataclasses.replace(setting, batch=batch))
        run.step()
        float(run.step())
    except Exception as e:
        if not timing.is_out_of_memory(e):
            raise
        return False
    finally:
        run = None
        timing.free_memory()
    return True


def largest_batch(fits, most=LARGEST_BATCH):
    """The largest batch up to `most` for which `fits(batch)` holds: doubled until it fails, then bisected. 0: none."""
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def fill_row(row, setting, args, ceiling):
    """Figures of a contestant that is right."""
    try:
        row.update(measure(setting, args.steps, ceiling))
    except Exception as e:
        row["status"], row["note"] = gate.status_of(e), providers.first_line(e)
    timing.free_memory()
    if args.find_batch and row["status"] in ("ok", "oom"):
        row["largest_batch"] = largest_batch(lambda batch: fits(setting, batch))


# ---- the command -----------------------------------------------------------------------------------------------------


def parse(argv):
    p = command.parser(__doc__)
    p.add_argument("--preset", choices=PRESETS, help="default gpt2, on a CPU tiny")
    p.add_argument(
        "--attn",
        type=command.names,
        help="names, or package.module:function; triton+torch+torch names norm and loss too",
    )
    p.add_argument("--norm", type=command.names, help="names; every --attn that names none runs with every --norm")
    p.add_argument("--loss", type=command.names, help="likewise; default torch, on a GPU triton")
    p.add_argument("--seq", type=command.positives, metavar="T,...", help="context lengths; default the preset's")
    p.add_argument("--batch", type=positive_int, metavar="B", help="windows a step; default 16384 tokens, CPU 1024")
    p.add_argument("--steps", type=positive_int, default=20, help="steps timed (20)")
    p.add_argument("--n-layers", type=positive_int, help="instead of the preset's")
    p.add_argument("--drop-rate", type=below_one, default=0.0, help="(0)")
    p.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model")
    p.add_argument("--find-batch", action="store_true", help="also search the largest micro-batch that fits (GPU)")
    return p.parse_args(argv)


def settings_of(args, device):
    """One Setting per row, in the order of the table."""
    on_gpu = device.type == "cuda"
    base = PRESETS[args.preset or ("gpt2" if on_gpu else "tiny")]
    base = dataclasses.replace(base, drop_rate=args.drop_rate, n_layers=args.n_layers or base.n_layers)
    attns = args.attn or (["reference", "sdpa", "flex", "triton"] if on_gpu else ["reference", "sdpa", "triton"])
    _, norm, loss = backends.default_names(device)
    kinds = contestants(attns, args.norm or [norm], args.loss or [loss])
    for attn, norm, loss in kinds:
        check_name("attn", attn, backends.ATTENTION, backends.attention)
        check_name("norm", norm, backends.NORM, backends.norm)
        check_name("loss", loss, backends.LOSS, backends.loss)
    dtype = choose_dtype(args.dtype, device)
    found = []
    for seq in args.seq or [base.context_length]:
        batch = args.batch or max(1, (16384 if on_gpu else 1024) // seq)
        cfg = dataclasses.replace(base, context_length=seq)
        found += [Setting(cfg, *names, batch, dtype, device, args.compile) for names in kinds]
    return found


def contestants(attns, norms, losses):
    """[(attn, norm, loss)]: every attention that is named alone with every norm and loss, then the a+n and a+n+l."""
    found = [(a, n, l) for l, n, a in itertools.product(losses, norms, attns) if "+" not in a]
    for name in attns:
        if "+" in name:
            attn, norm, *loss = name.split("+", 2)
            found += [(attn, norm, l) for l in loss or losses]
    return found


def check_name(flag, name, known, resolve):
    """UserError for a name that nobody knows, or a function that cannot be imported or called."""
    if name not in known:
        resolve(name)  # says what is wrong with it
    if name == "flex":
        providers.allow_many_shapes()


def new_row(setting, preset, verdict):
    status, loss, gradient, note = verdict
    return {
        "bench": "train-compiled" if setting.compile else "train",
        "provider": setting.name,
        "attn": setting.attn,
        "norm": setting.norm,
        "loss": setting.loss,
        "compile": setting.compile,
        "preset": preset,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "batch": setting.batch,
        "seq": setting.cfg.context_length,
        "drop_rate": setting.cfg.drop_rate,
        "status": status,
        "loss_difference": loss,
        "gradient_difference": gradient,
        "device": environment.device_name(setting.device),
        "note": note,
    }


def show(rows):
    """A line per row, the fastest of each sequence length marked."""
    best = {}
    for row in rows:
        best[row["seq"]] = max(best.get(row["seq"], 0), row.get("tokens_per_s") or 0)
    lines = []
    for row in rows:
        line = [row["seq"], row["attn"], row["norm"], row["loss"], row["batch"]]
        if row.get("tokens_per_s"):
            mark = table.BEST if row["tokens_per_s"] == best[row["seq"]] else " "
            line += [f"{row['tokens_per_s']:.0f}{mark}", *(f"{row[p]:.1f}" for p in ("p20_ms", "p50_ms", "p80_ms"))]
            line += ["n/a" if row["mfu"] is None else f"{row['mfu']:.1%}", f"{row['share']:.1%}"]
            line += [f"{row['peak_mib']:.0f}"]
        else:
            line += [row["status"], *[""] * 6]
        lines.append(line)
    header = list(SHOWN)
    if any("largest_batch" in row for row in rows):
        header.append("largest batch")
        lines = [[*line, row.get("largest_batch", "")] for line, row in zip(lines, rows, strict=True)]
    return table.align(header, lines)


def run(settings, preset, args, facts, save):
    """All rows, one contestant after the other, each timed only if it is right. `save(rows)` after each."""
    checks, rows = Check(settings), []
    for setting in tqdm(settings, unit="row", disable=None):
        row = new_row(setting, preset, checks.verdict(setting))
        rows.append(row)
        if row["status"] == "ok":
            fill_row(row, setting, args, facts["ceilings"][f"matmul {timing.dtype_name(setting.dtype)}"])
        save(rows)
        if row["status"] not in ("ok", "parity"):
            timing.require_device(setting.device, f"{row['provider']} at {row['seq']}")
    return rows


def notes(rows):
    """A line for every row without figures: why."""
    for row in rows:
        if row["status"] == "parity":
            yield (
                f"{row['provider']}: losses within {row['loss_difference']:.1e} of the reference's; not timed, "
                "since without a GPU it runs in Triton's interpreter"
            )
        elif row["status"] != "ok":
            yield f"{row['provider']} at {row['seq']}: {row['status']}: {row['note']}"


def profile(settings, rows, device, path):
    """Trace the contestants that were timed at the last sequence length; a table of what took longest."""
    last = settings[-1].cfg
    timed = [s for s, row in zip(settings, rows, strict=True) if row["status"] == "ok" and s.cfg == last]
    top = tracing.trace({s.name: Run(s).step for s in timed}, device, path)
    return f"\n{top}\ntrace, for chrome://tracing or ui.perfetto.dev: {path}"


def main(argv=None):
    args = parse(argv)
    device = choose_device(args.device)
    if args.find_batch and device.type != "cuda":
        raise UserError("--find-batch fills a GPU's memory and needs one; leave it out on a CPU")
    settings = settings_of(args, device)
    preset = args.preset or ("gpt2" if device.type == "cuda" else "tiny")
    bench = "train-compiled" if args.compile else "train"
    name = output.file_name(bench, args.label)
    facts = {"bench": bench, "complete": False, **environment.describe(device, args.commit)}
    ceilings = timing.measure_ceilings(timing.timer_for(device), device, [settings[0].dtype], budget_s=0.2)
    facts |= {"ceilings": ceilings, "mfu_formula": metrics.MFU_FORMULA}
    timing.free_memory()
    rows = run(settings, preset, args, facts, lambda rows: output.save(args.out, name, rows, COLUMNS, facts))
    facts["complete"] = True
    for folder in [args.out, environment.results_folder(device)][: 1 + args.publish]:
        output.save(folder, name, rows, COLUMNS, facts)
    title = f"{preset}{', compiled' if args.compile else ''}, {rows[0]['dtype']} on {rows[0]['device']}"
    print(f"\n{title}: whole training steps, {table.BEST} fastest of a length\n\n{show(rows)}\n")
    for line in [f"MFU = {metrics.MFU_FORMULA}", *output.ceiling_lines(ceilings, device), *notes(rows)]:
        print(line)
    if args.profile:
        print(profile(settings, rows, device, Path(args.out) / f"{name}-trace.json"))
    print(f"wrote {args.out}/{name}.csv and .json")


if __name__ == "__main__":
    sys.exit(command.run(main))
