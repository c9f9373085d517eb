"""Do whole training runs with different kinds of attention follow the same loss curve?

    python bench/curves.py
    python bench/curves.py --attn reference,sdpa,triton,my.kernel:attend --norm reference,triton --steps 400
    python bench/curves.py --preset tiny --steps 20 --attn triton -- --n-layers 1 --lr 1e-3

Trains the reference with two seeds, then every --attn with every --norm with the first of them, each by the trainer
itself (python -m gptlib.train, a process of its own) on the same text and without dropout. Same seed means same weights
and same batches, so a right contestant repeats the reference's losses up to rounding. It is "within the spread" if it
lies no farther from the reference of its own seed than the reference's other seed does; bench/spread.py says how far
is measured, and why the ratio of the two should be far below 1 all the same. By default norms and loss are the
reference's everywhere, and attention alone differs.

A contestant that is wrong only where the model does not look yet goes unnoticed: attention matters little in the first
steps. Give --steps as many as you have time for. Flags after -- go to every training: --n-layers 2 --lr 1e-3 --compile.

Exit code: 0 if all contestants are within the spread, 1 if one is not, 2 for bad input.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import command, environment, output, spread, table
from gptlib import options, train
from gptlib.device import choose_device
from gptlib.errors import UserError
from gptlib.flags import positive_int
from gptlib.metrics import read_metrics
from gptlib.model import PRESETS
from gptlib.prepare import prepare

MEASURED = ["step", "tokens", "train_loss", "val_loss", "tokens_per_s"]
COLUMNS = ["bench", "provider", "attn", "norm", "seed", "preset", "dtype", *MEASURED, "device"]
SHOWN = ["attention+norm", "training rms", "largest", "validation rms", "at the end", "of the spread", ""]
ROWS, EVALUATIONS, EVAL_WINDOWS = 40, 10, 64  # the same windows in all runs: few are enough to compare
ON_GPU = {"preset": "seed-124m", "attn": ["reference", "sdpa", "triton"], "steps": 1000}
ON_CPU = {"preset": "tiny", "attn": ["reference", "sdpa"], "steps": 200}
OURS = (  # flags of the trainer that cannot be passed on
    *("preset", "attn", "norm", "steps", "seed", "batch_size", "data", "drop_rate", "device", "out"),
    *("resume", "overwrite", "stop_at", "profile"),
)


@dataclass(frozen=True)
class Training:
    """One run of the trainer: what differs between them."""

    attn: str
    norm: str
    seed: int

    @property
    def provider(self):
        return f"{self.attn}+{self.norm}"

    def folder(self, out):
        return Path(out) / "curves" / re.sub(r"[^\w.]+", "-", f"{self.attn}-{self.norm}-{self.seed}")


# ---- what is trained -------------------------------------------------------------------------------------------------


def seeds(text):
    """Two different seeds, comma-separated."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or int(parts[0]) == int(parts[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not two different seeds, such as 0,1")
    return [int(part) for part in parts]


def parse(argv):
    """The flags of this bench, and in `trainer` the trainer's own, which stand after --."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    p = command.Parser(__doc__, usage="%(prog)s [flags] [-- flags of the trainer]")
    p.add_argument("--preset", choices=PRESETS, help="default seed-124m, on a CPU tiny")
    p.add_argument(
        "--attn", type=command.names, help="names, or package.module:function; default reference,sdpa,triton"
    )
    p.add_argument("--norm", type=command.names, default=["reference"], help="names; every --attn meets every --norm")
    p.add_argument("--steps", type=positive_int, help="of every training; default 1000, on a CPU 200")
    p.add_argument("--batch-size", type=positive_int, metavar="B", help="windows a step; default the trainer's")
    p.add_argument(
        "--seeds", type=seeds, default=[0, 1], metavar="A,B", help="all train with A, the reference with B too"
    )
    p.add_argument("--data", nargs="+", metavar="PATH", help="files, folders, globs (the Python standard library)")
    p.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or cpu")
    p.add_argument(
        "--out",
        type=command.folder,
        default="runs/bench",
        metavar="DIR",
        help="for CSV, JSON and run folders, which are replaced (runs/bench)",
    )
    p.add_argument("--publish", action="store_true", help="also replace this bench's files under results/")
    p.add_argument("--commit", help="commit id to record, for a checkout without git")
    args = p.parse_args(argv[:end])
    args.trainer = argv[end + 1 :]
    return args


def trainings_of(args):
    """The reference with both seeds, then the contestants, each once."""
    base = [Training("reference", "reference", seed) for seed in args.seeds]
    named = [Training(attn, norm, args.seeds[0]) for norm in args.norm for attn in args.attn]
    contestants = [t for t in dict.fromkeys(named) if t not in base]
    if not contestants:
        raise UserError("--attn and --norm name the reference alone: nothing to compare it with")
    return base + contestants


def flags_of(training, args, device):
    """The trainer's command line for one training. Flags after -- override the first of these, not the last."""
    log_every = max(1, args.steps // ROWS)
    defaults = options.DEFAULTS[""] | options.DEFAULTS.get(args.preset, {})
    first = {
        "loss": "reference",
        "warmup-steps": min(defaults["warmup_steps"], args.steps // 2),  # too few, and rounding alone parts the curves
        "log-every": log_every,
        "eval-every": log_every * max(1, args.steps // log_every // EVALUATIONS),
        "eval-windows": EVAL_WINDOWS,
        "sample-every": args.steps,
        "save-every": args.steps,
    }
    same = {"preset": args.preset, "steps": args.steps, "batch-size": args.batch_size, "drop-rate": 0, "device": device}
    own = {"attn": training.attn, "norm": training.norm, "seed": training.seed, "out": training.folder(args.out)}
    last = {name: value for name, value in {**same, **own}.items() if value is not None}
    before, after = ([word for name, value in d.items() for word in (f"--{name}", str(value))] for d in (first, last))
    return [*before, *args.trainer, *after, "--overwrite", *(["--data", *args.data] if args.data else [])]


def refuse_early(trainings, args, device):
    """UserError for whatever the trainer would refuse, before the first training. Writes the text's tokens only."""
    passed = vars(options.parse(args.trainer))
    for name in OURS:
        if passed[name] not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} cannot stand after --: this bench sets it (--help)")
    for training in trainings:
        with contextlib.redirect_stderr(io.StringIO()):  # the note on the interpreter comes with the training
            settled, cfg, _, _ = train.settle(options.parse(flags_of(training, args, device)))
    prepare(settled.data, settled.tokenizer, cfg.vocab_size, progress=sys.stderr.isatty())


# ---- training --------------------------------------------------------------------------------------------------------


def start_trainer(flags, log):
    """The exit code of `python -m gptlib.train` with these flags; its words to `log`, its bar and errors to stderr."""
    path = os.pathsep.join([str(environment.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log, "w") as words:
        return subprocess.call(
            [sys.executable, "-m", "gptlib.train", *flags],
            stdout=words,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )


def run(training, args, device):
    """(exit code, rows) of one training; no rows where the trainer did not come to its first report."""
    folder = training.folder(args.out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # a run of before must not be taken for this one
    try:
        code = start_trainer(flags_of(training, args, device), folder.with_name(folder.name + ".log"))
    finally:
        for weights in folder.glob("checkpoint*"):  # gigabytes that nobody goes on from
            shutil.rmtree(weights, ignore_errors=True)
    metrics = folder / "metrics.csv"
    labels = {"bench": "curves", "provider": training.provider, "attn": training.attn, "norm": training.norm}
    labels |= {"seed": training.seed, "preset": args.preset, "device": environment.device_name(device)}
    if not metrics.exists():
        return code, []
    labels["dtype"] = stored_config(folder)["machine"]["dtype"]
    return code, [{**labels, **{name: row[name] for name in MEASURED}} for row in read_metrics(metrics)]


def stored_config(folder):
    return json.loads((folder / "config.json").read_text())


def run_all(trainings, args, device, facts):
    """All rows, saved as they come; facts gains every command. UserError if the reference cannot be trained."""
    rows = []
    for number, training in enumerate(trainings, 1):
        print(f"[{number}/{len(trainings)}] {training.provider}, seed {training.seed} ...", flush=True)
        start = time.monotonic()
        code, found = run(training, args, device)
        print(f"    {outcome(code, found)} after {time.monotonic() - start:.0f} s", flush=True)
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        if code and training.provider == spread.BASE:
            raise UserError(f"{training.provider}, seed {training.seed}, cannot be trained: nothing to compare with")
        rows += found
        flags = shlex.join(flags_of(training, args, device))
        facts["runs"].append({"command": f"python -m gptlib.train {flags}", "exit": code})
        output.save(args.out, "curves", rows, COLUMNS, facts)
    config = stored_config(trainings[0].folder(args.out))
    facts |= {name: config[name] for name in ("model", "tokenizer", "data")}
    return rows


def outcome(code, rows):
    """What became of a training, in a few words."""
    if code:
        return f"the trainer ended with exit code {code}"
    return f"training loss {rows[-1]['train_loss']:.4f}, validation loss {rows[-1]['val_loss']:.4f}"


# ---- the command -----------------------------------------------------------------------------------------------------


def show(facts):
    """A line per contestant, then the two seeds; losses in nats per token."""
    lines = []
    for v in [*facts["verdicts"], {**facts["spread"], "provider": "reference, other seed", "ratio": 1.0}]:
        figures = [f"{v[name]:.2e}" for name in (*spread.JUDGED, "val_last")] if "train_rms" in v else [""] * 4
        ratio = "" if v["ratio"] is None else f"{v['ratio']:.2g}"
        said = {True: "within", False: "OUTSIDE", None: "the spread"}[v.get("within")]
        lines.append([v["provider"], *figures, ratio, f"{said} {v.get('note', '')}".strip()])
    return table.align(SHOWN, lines)


def main(argv=None):
    args = parse(argv)
    device = choose_device(args.device)
    for name, value in (ON_GPU if device.type == "cuda" else ON_CPU).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    trainings = trainings_of(args)
    refuse_early(trainings, args, device)
    facts = {"bench": "curves", "complete": False, **environment.describe(device, args.commit)}
    facts |= {"preset": args.preset, "steps": args.steps, "seeds": args.seeds, "runs": []}
    rows = run_all(trainings, args, device, facts)
    contestants = [t.provider for t in trainings[2:]]
    facts["spread"], facts["verdicts"] = spread.judge(spread.runs_of(rows), contestants, args.seeds)
    facts["complete"] = True
    for folder in [args.out, environment.results_folder(device)][: 1 + args.publish]:
        output.save(folder, "curves", rows, COLUMNS, facts)
    title = f"{args.preset}, {rows[0]['dtype']} on {rows[0]['device']}, {args.steps} steps"
    print(f"\n{title}: differences in nats per token\n\n{show(facts)}\n")
    outside = [v["provider"] for v in facts["verdicts"] if not v["within"]]
    print(f"outside the spread: {', '.join(outside)}" if outside else "all within the spread of two seeds")
    print(f"wrote {args.out}/curves.csv and .json; the runs are in {args.out}/curves")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(command.run(main))
