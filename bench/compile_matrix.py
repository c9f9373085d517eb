"""The compile report's core configurations under three of the supported Tritons, each in a throw-away folder.

    python bench/compile_matrix.py
    python bench/compile_matrix.py --triton 3.6.0,3.9.0 --arch sm_90 --publish

Each version is installed with pip into a temporary folder (about 500 MB, gone afterwards) that comes first on the path
of a process of its own; torch and all else stay those of this environment. Prints a line per version and architecture,
then every configuration with a fault in some version, and writes both to runs/bench/compiled/matrix.csv and .json.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import command, compiled, environment, table
from gptlib.errors import UserError
from gptlib.flags import positive_int

VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
NUMPY = "numpy<2.4"  # Triton 3.6's interpreter fails with newer ones
COLUMNS = ["triton", "arch", "kernels", "configurations", "spilling", "most_spill_bytes", "faults", "not_compiling"]


def install(version, folder):
    """Put Triton `version` into `folder`; UserError with pip's own last words if it cannot be had."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, f"triton=={version}", NUMPY], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"pip cannot install triton=={version}: {lines[-1] if lines else 'no message'}")


def report(folder, archs, jobs):
    """Rows of the core configurations with the Triton in `folder`."""
    out = Path(folder, "report")
    path = os.pathsep.join([str(folder), str(environment.ROOT)])
    script = environment.ROOT / "bench" / "compile_report.py"
    run = [sys.executable, str(script), "--core", "--arch", ",".join(archs), "--out", str(out)]
    variables = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(Path(folder, "cache"))}
    done = subprocess.run([*run, *(["--jobs", str(jobs)] if jobs else [])], stdout=subprocess.DEVNULL, env=variables)
    if done.returncode:
        raise UserError(f"{script.name} failed (exit status {done.returncode}); its message is above")
    return [row for arch in archs for row in table.read_csv(out / arch / "report.csv")]


def summarize(version, rows):
    """A line of the matrix per architecture."""
    for arch in dict.fromkeys(row["arch"] for row in rows):
        own = [row for row in rows if row["arch"] == arch]
        spills = [row["spill_bytes"] for row in own if row["spill_bytes"]]
        yield {
            "triton": version,
            "arch": arch,
            "kernels": len({row["kernel"] for row in own}),
            "configurations": len(own),
            "spilling": len(spills),
            "most_spill_bytes": max(spills, default=0),
            "faults": sum(bool(compiled.faults(row)) for row in own),
            "not_compiling": sum(row["status"] != "ok" for row in own),
        }


def compare(rows_by_version):
    """{configuration: {version: its faults}} of the configurations with a fault in some version."""
    found = {}
    for version, rows in rows_by_version.items():
        for row in rows:
            if faults := compiled.faults(row):
                name = " ".join(str(row[c]) for c in ("arch", "case", "kernel", "config"))
                found.setdefault(name, {})[version] = "; ".join(faults)
    return found


def main(argv=None):
    p = command.Parser(__doc__)
    p.add_argument("--triton", type=command.names, default=list(VERSIONS), metavar="V,...")
    p.add_argument("--arch", type=command.one_of(compiled.LIMITS), default=["sm_80", "sm_90"], metavar="A,...")
    p.add_argument("--jobs", type=positive_int, metavar="N", help="processes; default: one per core")
    p.add_argument("--out", type=command.folder, default="runs/bench/compiled", metavar="DIR")
    p.add_argument("--publish", action="store_true", help="also replace results/compiled/matrix.csv and .json")
    p.add_argument("--commit", help="commit id to record, for a checkout without git")
    args = p.parse_args(argv)
    rows_by_version = {}
    for version in args.triton:
        with tempfile.TemporaryDirectory(prefix="triton-") as folder:
            print(f"Triton {version}", flush=True)
            install(version, folder)
            rows_by_version[version] = report(folder, args.arch, args.jobs)
    lines = [line for version, rows in rows_by_version.items() for line in summarize(version, rows)]
    differences = compare(rows_by_version)
    facts = {"bench": "compile_matrix", **environment.describe("cpu", args.commit), "faults": differences}
    for folder in [args.out, *([environment.ROOT / "results" / "compiled"] if args.publish else [])]:
        table.write_csv(Path(folder) / "matrix.csv", lines, COLUMNS)
        table.write_json(Path(folder) / "matrix.json", facts)
    print(table.align(COLUMNS, [[line[c] for c in COLUMNS] for line in lines]))
    for name, faults in differences.items():
        print(name, *(f"\n  {version}: {text}" for version, text in faults.items()))


if __name__ == "__main__":
    sys.exit(command.run(main))
