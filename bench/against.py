"""Today's kernels beside those of another commit, in one run: `--against <git ref>` of the kernel benches.

Two versions of one package, with operators of the same name, cannot live in one process. So the other commit's
`kernels/` folder, and nothing else of it, is unpacked into a temporary folder and served by a second process that runs
today's benches and reference on it. It measures one row at a time, when asked, while this process waits: both versions
take turns on the same device, shape by shape.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path

from bench import environment
from gptlib.errors import UserError


class OtherCommit:
    """A competitor whose rows are measured by a second process on another commit's kernels."""

    def __init__(self, ref, bench, op, device, budget_s, with_gradients):
        self.name = f"triton@{ref}"
        self.folder = tempfile.TemporaryDirectory(prefix="kernels-")
        unpack_kernels(ref, self.folder.name)
        settings = {
            "bench": bench.name,
            "op": op,
            "device": str(device),
            "budget_s": budget_s,
            "with_gradients": with_gradients,
        }
        script = "import sys; from bench import against; against.serve()"
        path = os.pathsep.join([self.folder.name, str(environment.ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder.name,
            env={**os.environ, "PYTHONPATH": path},
        )

    def measure(self, case, mode, checked):
        """Columns of one row: status, figures, note."""
        try:
            self.process.stdin.write(json.dumps({"case": case, "mode": mode, "checked": checked}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"status": "failed", "note": f"the process of {self.name} ended"}

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
        self.folder.cleanup()


def unpack_kernels(ref, folder):
    """Write the kernels/ folder of a commit, branch or tag into `folder`."""
    command = ["git", "-C", str(environment.ROOT), "archive", "--format=tar", ref, "kernels"]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError:
        raise UserError("--against needs git, and git is not installed") from None
    except subprocess.CalledProcessError as e:
        reason = e.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"--against {ref}: git cannot give that commit's kernels: {' '.join(reason)}") from None
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def serve():
    """The second process: one JSON request a line on stdin, one row's columns a line on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to stderr
    settings = json.loads(sys.argv[1])
    from bench import gate, harness, providers, timing
    from gptlib.device import choose_device

    device = choose_device(settings["device"])
    bench, op = bench_named(settings["bench"]), settings["op"]
    found, missing = providers.resolve(op, ["triton"])
    expect_other_kernels()
    checks = gate.Gate(bench, providers.reference_of(op), device, settings["with_gradients"])
    timer = timing.timer_for(device)
    for line in sys.stdin:
        request = json.loads(line)
        row = {"status": "failed", "note": " ".join(missing)}
        for provider in found:
            verdict = checks.verdict(provider, request["checked"])
            inputs = partial(harness.timing_inputs, bench, request["case"], device)
            harness.fill_row(
                row, bench, provider, inputs, request["case"], request["mode"], verdict, timer, settings["budget_s"]
            )
        timing.free_memory()
        answers.write(json.dumps(row) + "\n")
        answers.flush()


def expect_other_kernels():
    """The unpacked folder comes before the checkout on the path; anything else would compare a version with itself."""
    import kernels

    assert not Path(kernels.__file__).resolve().is_relative_to(environment.ROOT), kernels.__file__


def bench_named(name):
    from bench import attention, layernorm, softmax

    benches = (attention.Attention(), softmax.Softmax(), layernorm.LayerNorm())
    return next(b for b in benches if b.name == name)
