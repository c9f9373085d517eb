"""Everything a GPU can say about this project, in one command and a given number of minutes: `make gpu`.

    python3 bench/gpu.py
    python3 bench/gpu.py --minutes 25 --only tests,attention
    GPU_OUT=/somewhere python3 bench/gpu.py

Runs, each as a process of its own and the most telling first: a report of the environment, the tests that a GPU can
say something about, with the kernels compiled for real, the errors against float64, the benches on their key shapes,
training steps, the long tests, a memory checker, further shapes, and the plots. Needs an uninstalled checkout, python3
and torch 2.11 or newer, neither git nor network. Everything at leisure takes about half an hour.

The minutes are shared out: a step may take its share of what is left, and what it does not use goes to the later ones.
A step that fails or runs out of time is reported and passed over. Logs, CSVs and summary.json land in the folder
GPU_OUT (runs/gpu by default) as they come, and all of it in results.tar.gz there, rewritten after every step.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import report, table
from bench.arguments import Parser, folder, run

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = "results.tar.gz"
LEAST_S = 5  # a step with less time than this is not started
GRACE_S = 30  # for a step that is asked to stop: pytest gives its workers 10 s, then prints what failed so far
HOPPER, ONE_PASS = "kernels.attention.hopper:causal_attention", "kernels.attention.hopper:one_pass"
HOPPER_TESTS = "tests/test_hopper_on_gpu.py"
TEST_PROCESSES = 14  # most of the time they compile
PROBE = "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


@dataclass(frozen=True)
class Step:
    """A command, and its share of the time."""

    name: str
    share: float
    command: tuple


@dataclass
class Outcome:
    """What became of a step: "ok", "failed", "out of time" or "not started"."""

    name: str
    status: str
    seconds: float = 0.0
    limit_s: float = 0.0
    note: str = ""


def plan(device_name, out, commit=None):
    """All steps in order. On a CPU the same commands on shapes small enough to rehearse with."""
    python, device = sys.executable, "cpu" if device_name == "CPU" else "cuda"
    results = str(Path(out) / "results" / table.folder_name(device_name))
    tests = [python, "-m", "pytest", "tests", "-v", "--tb=short", "-p", "no:cacheprovider", "--maxfail=200"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    common = ["--device", device, "--out", results, *(["--commit", commit] if commit else [])]

    def bench(name, on_gpu, on_cpu):
        return (python, f"bench/{name}.py", *common, *(on_gpu if device != "cpu" else on_cpu).split())

    timed = "--mode fwd,bwd --budget 0.1"
    peers = "--providers sdpa,sdpa-flash,sdpa-cudnn,flex,triton"
    slow = "--providers reference,sdpa-math,sdpa-efficient,compiled,triton-softmax,triton"
    attention = f"{timed} {peers} --seq 1024,4096,16384,512,2048,8192 --head-dim 64,128"
    gpt2 = f"{timed} {peers} --seq 1024 --heads 12 --head-dim 64 --batch 8,16,32,64 --label gpt2"
    dropout = f"{timed} --providers sdpa-flash,triton --dropout 0.1 --seq 1024,4096,16384 --head-dim 64,128"
    rows = f"{timed} --length 1024,4096,16384,65536,2048,8192,32768"
    train = "--preset gpt2 --seq 1024 --batch 32"  # large enough that no launch is waited for
    first = "--attn sdpa+torch+torch,triton+triton+triton,flex+torch+torch"
    kinds = f"{first},sdpa+triton+torch,triton+torch+torch,sdpa+torch+triton"
    long = f"--preset gpt2 {first} --seq 2048,4096,8192,16384,32768 --steps 10"
    loss = "--tokens 16384 --classes 50257,32768,131072 --budget 0.1"
    classes = f"{timed} --length 50257,4096,32768,131072"
    curves = "--attn sdpa --steps 3 --data docs --batch-size 2 -- --n-layers 1 --tokenizer bytes"
    hopper = f"{timed} --providers sdpa-cudnn,triton,{HOPPER},{ONE_PASS}"
    on_hopper = f"{hopper} --seq 1024,4096,16384,512,2048,8192 --head-dim 64,128"
    few, one = "--seq 64 --providers reference,sdpa --budget 0.01", "--length 64 --providers reference,torch"
    tiny = "--preset tiny --n-layers 1 --seq 32 --steps 3 --attn reference+torch+torch,sdpa+torch+torch"
    return [
        Step("environment", 0.5, (python, "bench/environment.py")),
        Step("tests", 3.0, (*tests, "-m", "device and not deep")),
        Step("numerics", 0.8, bench("numerics", "", "--section rows --dtype fp32")),
        Step("attention", 1.5, bench("attention", attention, few)),
        Step("train", 1.0, bench("train", f"{train} {kinds},reference+torch+torch", tiny)),
        Step("attention-gpt2", 0.5, bench("attention", gpt2, f"{few} --batch 1,2 --label gpt2")),
        *(
            # A fault of its barriers would be a hang: it must not cost what other steps measure.
            Step("hopper-tests", 0.8, (*(HOPPER_TESTS if x == "tests" else x for x in tests), "--hopper")),
            Step("hopper-model-tests", 0.4, (*tests, "--attn", ONE_PASS)),
            Step("attention-hopper", 0.8, bench("attention", f"{on_hopper} --label hopper", "")),
        )[: 3 * any(name in device_name for name in ("H100", "H200"))],
        Step("softmax", 0.6, bench("softmax", f"{rows},131072", one)),
        Step("layernorm", 0.6, bench("layernorm", rows, one)),
        Step(
            "linear_cross_entropy",
            0.4,
            bench("linear_cross_entropy", loss, "--tokens 40 --classes 64 --providers reference,torch --budget 0.01"),
        ),
        Step("cross_entropy", 0.4, bench("cross_entropy", classes, one)),
        Step("host", 0.3, bench("host", "--calls 100", "--op softmax --calls 20")),
        Step("train-compiled", 1.5, bench("train", f"{train} {kinds} --compile", f"{tiny} --compile")),
        Step("tests-deep", 2.0, (*tests, "-m", "device and deep")),
        Step("memcheck", 0.7, (python, "bench/memcheck.py", "--device", device)),
        Step("attention-dropout", 0.4, bench("attention", f"{dropout} --label dropout", f"{few} --label dropout")),
        Step("train-long", 1.2, bench("train", f"{long} --label long", f"{tiny} --label long")),
        Step(
            "attention-slow",
            0.6,
            bench("attention", f"{timed} {slow} --seq 1024,4096 --head-dim 64 --label slow", f"{few} --label slow"),
        ),
        Step("curves", 1.5, bench("curves", "--steps 300", curves)),
        Step("ratios", 0.2, (python, "bench/ratios.py", "--out", results)),
        Step("report", 0.2, (python, "bench/report.py", "--results", str(Path(out) / "results"))),
    ]


def limit_of(steps, index, remaining_s):
    """Seconds that step `index` may take: its share of the time left to it and the steps after it."""
    return remaining_s * steps[index].share / sum(step.share for step in steps[index:])


def run_all(steps, minutes, out, run_step, now=time.monotonic):
    """Outcomes of all steps, saved and archived as they come. `run_step(step, limit_s, log)` gives one Outcome."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    end = now() + 60 * minutes
    outcomes = []
    for index, step in enumerate(steps):
        limit_s = limit_of(steps, index, end - now())
        if limit_s < LEAST_S:
            outcome = Outcome(step.name, "not started", note="no time left")
        else:
            print(f"[{index + 1}/{len(steps)}] {step.name}, at most {limit_s:.0f} s ...", flush=True)
            outcome = run_step(step, limit_s, out / f"{index + 1:02d}-{step.name}.log")
        print(f"    {outcome.status} after {outcome.seconds:.0f} s  {outcome.note}", flush=True)
        outcomes.append(outcome)
        save(outcomes, out)
    return outcomes


def run_step(step, limit_s, log):
    """Run a step's command in a process group of its own, its output to `log`, killed when its time is over."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    environment |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.monotonic()
    with open(log, "w") as output:
        output.write("$ " + " ".join(step.command) + "\n")
        output.flush()
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell's background job ignores SIGINT, and so would its children: they must hear that their time is up.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            code = process.wait(limit_s)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "out of time"
        finally:
            stop(process)
    note = last_line(log)
    if status == "failed":
        note = f"exit code {code}: {note}"
    return Outcome(step.name, status, time.monotonic() - start, limit_s, note)


def stop(process):
    """End a step, and whatever it left running: an interrupt first, then for good."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log):
    """The last line of a log that says something, at most 120 characters."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", Path(log).read_text(errors="replace")).replace("\r", "\n").splitlines()
    return next((line.strip()[:120] for line in reversed(lines) if re.search(r"\w", line)), "")


def save(outcomes, out):
    """summary.json, and the archive of everything in `out`."""
    write = out / "summary.json.partial"
    write.write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")
    os.replace(write, out / "summary.json")
    partial = out / f".{ARCHIVE}"
    with tarfile.open(partial, "w:gz") as archive:
        for path in sorted(out.rglob("*")):
            inside = path.relative_to(out)
            weights = any(part.startswith("checkpoint") for part in inside.parts)  # of a training that was killed
            if path.is_file() and path.name not in (ARCHIVE, partial.name) and not weights:
                archive.add(path, arcname=Path("gpu") / inside)
    os.replace(partial, out / ARCHIVE)


def summary(outcomes):
    """The short table at the end."""
    width = max(len(o.name) for o in outcomes)
    return "\n".join(f"{o.name:<{width}}  {o.status:<11}  {o.seconds:>5.0f} s  {o.note}" for o in outcomes)


def figures(results):
    """Ours beside the fastest other provider, a line per shape, from the CSVs that the steps wrote."""
    return "\n".join(line for found in report.load(results) for line in report.digest(found))


def parse(argv):
    p = Parser(__doc__)
    p.add_argument("--minutes", type=float, default=10.0, help="for everything (10)")
    p.add_argument("--only", help="comma-separated steps; a wrong one lists them")
    p.add_argument(
        "--out",
        type=folder,
        default=os.environ.get("GPU_OUT", str(ROOT / "runs" / "gpu")),
        help="folder for logs and results (runs/gpu, or GPU_OUT)",
    )
    p.add_argument("--commit", help="commit id to record, for a checkout without git")
    p.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cuda; cpu rehearses the same commands on tiny shapes"
    )
    args = p.parse_args(argv)
    if not args.minutes > 0:
        p.error(f"--minutes {args.minutes:g} is not positive")
    return args


def probe(device):
    """The device's name and, where this machine cannot run, why (else None). torch is asked in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        return "", f"{sys.executable} cannot import torch: {done.stderr.strip().splitlines()[-1]}"
    version, _, name = done.stdout.strip().partition(" ")
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (2, 11):
        return name, f"torch {version} is too old; 2.11 or newer is needed"
    if device == "cpu":
        return "CPU", None
    return name, None if name else f"torch {version} sees no GPU here; --device cpu rehearses the steps without one"


def main(argv=None):
    args = parse(argv)
    out = Path(args.out).resolve()
    device_name, problem = probe(args.device)
    steps = plan(device_name, out, args.commit)
    names = [step.name for step in steps]
    wanted = args.only.split(",") if args.only else names
    if unknown := [name for name in wanted if name not in names]:
        problem = f"--only {','.join(unknown)} is unknown; steps: {', '.join(names)}"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    try:
        outcomes = run_all([s for s in steps if s.name in wanted], args.minutes, out, run_step)
    except KeyboardInterrupt:
        return 130
    print(f"\n{figures(out / 'results')}\n\n{summary(outcomes)}\n\nall of it: {out / ARCHIVE}")
    return 0 if all(o.status == "ok" for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(run(main))
