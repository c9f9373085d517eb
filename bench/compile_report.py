"""What the compiler makes of every kernel that ships, with no GPU.

    python bench/compile_report.py
    python bench/compile_report.py --arch sm_90 --kernel dkdv --config bf16-d128
    python bench/compile_report.py --arch sm_90 --kernel dq --config bf16-d128-plain --tile 64,64,4,2
    python bench/compile_report.py --arch sm_90 --kernel forward --config bf16-d64-plain --tile 128,128,8,2,overlap,255
    python bench/compile_report.py --publish

Compiles every configuration of bench/compile_cases.py and prints one row each: registers and spilled bytes per thread,
bytes of shared memory, programs that one multiprocessor holds, and counts of tensor-core, TMA and special-function
instructions. For sm_80 and sm_90 a row ends with the bound of the kernel's hottest loop (bench/sass.py has the model):
cycles of one iteration asked of each part of the multiprocessor, the part that asks most, and the share of the peak
that it leaves to the tensor cores (or, where there is no matmul, to the memory): `share` with everything overlapped,
`in step` for one program that has the multiprocessor to itself, its warps side by side. CSV and JSON go to
runs/bench/compiled/<arch>/.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from bench import command, compile_cases, compiled, environment, sass, table
from gptlib.errors import UserError
from gptlib.flags import positive_int

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
COLUMNS = [
    *("arch", "case", "kernel", "types", "config", "num_warps", "num_stages", "maxnreg"),
    *("registers", "spill_bytes", "shared", "programs_per_sm"),
    *(*compiled.INSTRUCTIONS, *(f"cycles_{part}" for part in sass.PARTS)),
    *("bound", "peak", "peak_share", "in_step_share", "redundancy", "wgmma_waits", "loop", "missing", "status"),
]
# Headings on the screen and the columns under them.
SHOWN = dict.fromkeys(("arch", "case", "kernel", "tile"))
SHOWN |= {"warps": "num_warps", "stages": "num_stages", "regs": "registers", "spill": "spill_bytes", "smem B": "shared"}
SHOWN |= {"progs": "programs_per_sm", "matmul": None, "TMA": "tma", "MUFU op": "MUFU"}
SHOWN |= {part: f"cycles_{part}" for part in sass.PARTS}
SHOWN |= {"bound": None, "share": "peak_share", "in step": "in_step_share", "redundant": "redundancy", "status": None}
TILED = ("forward", "dkdv", "dq")
TILE_SIZES = ("ROWS", "BLOCK_P", "BLOCK_Q", "BLOCK_K", "BLOCK_M", "BLOCK_N")


def parse_tile(text):
    """A _tuning.Tile as its rows write one: "128,64,8,2" or "128,64,8,2,overlap,255"."""
    from kernels._tuning import LOOPS, Tile

    sizes, form = text.split(",")[:4], text.split(",")[4:]
    loops, registers = form[:1] or ["two"], form[1:]
    numbers = [*sizes, *registers]
    well_formed = len(sizes) == 4 and len(registers) < 2 and loops[0] in LOOPS and all(n.isdecimal() for n in numbers)
    if well_formed and any((n := int(size)) < 1 or n & (n - 1) for size in sizes[:3]):
        raise UserError(f"--tile {text}: queries, keys and warps are powers of two, such as 128,64,8,2")
    if not well_formed:
        raise UserError(
            f"--tile {text}: needs queries,keys,warps,stages and may go on with loops ({', '.join(LOOPS)}) and the "
            "registers of a thread, such as 128,64,8,2 or 128,64,8,2,overlap,255"
        )
    return Tile(*map(int, sizes), loops[0], *map(int, registers))


def select(jobs, kernels, configs):
    """The jobs whose kernel name contains one of `kernels` and whose case or constexprs contain one of `configs`."""
    if kernels:
        jobs = [job for job in jobs if any(name in job.kernel for name in kernels)]
    if configs:
        jobs = [job for job in jobs if any(text in f"{job.case} {job.config}" for text in configs)]
    return jobs


def compile_all(archs, kernels=(), configs=(), workers=None, cases=None):
    """Rows of facts, in the order of the cases, for all launches of `cases` (every shipped one) on `archs`."""
    cases = compile_cases.cases() if cases is None else cases
    with compiled.Workers(workers or os.cpu_count()) as pool:
        jobs = select(pool.list_jobs(cases, archs), kernels, configs)
        if not jobs:
            raise UserError(
                "no kernel or configuration has such a name; the first columns of a run without filters list them"
            )
        progress = tqdm(pool.compile(jobs), total=len(jobs), unit="kernel", desc="compile", disable=None)
        rows = list(progress)
    order = {_identity(job.labels): i for i, job in enumerate(jobs)}
    return sorted(rows, key=lambda row: order[_identity(row)])


def _identity(labels):
    return labels["arch"], labels["case"], labels["kernel"], labels["config"]


# ---- on the screen and on disk ---------------------------------------------------------------------------------------


def flat(row):
    """A row with its instruction counts as columns."""
    counts = row.get("instructions")
    return row if counts is None else row | {name: counts.get(name, 0) for name in compiled.INSTRUCTIONS}


def show(rows):
    """The table: a line per kernel, its columns those that some row fills."""
    lines = [[_screen(row).get(column or heading) for heading, column in SHOWN.items()] for row in rows]
    used = [i for i in range(len(SHOWN)) if any(line[i] not in (None, "") for line in lines)]
    cells = [["-" if line[i] is None else line[i] for i in used] for line in lines]
    return table.align([list(SHOWN)[i] for i in used], cells)


def _screen(row):
    """A row as the screen shows it: what is narrow instead of what is complete."""
    counts = row.get("instructions", {})
    config = dict(word.partition("=")[::2] for word in row["config"].split())
    return flat(row) | {
        "kernel": row["kernel"].removesuffix("_kernel"),
        "tile": "x".join(config[name] for name in TILE_SIZES if name in config),
        "matmul": " ".join(f"{op} {counts[op]}" for op in compiled.TENSOR_OPS if op in counts),
        "tma": counts.get("UTMALDG", 0) + counts.get("UTMASTG", 0),
        "status": f"lacks {row['missing']}" if row.get("missing") else row["status"],
    }


def summary(rows):
    """One line: kernels, configurations, spills, what is wrong, and the worst bound."""
    done = [row for row in rows if row["status"] == "ok"]
    archs = ", ".join(dict.fromkeys(row["arch"] for row in rows))
    parts = [f"{len({row['kernel'] for row in rows})} kernels, {len(rows)} configurations on {archs}"]
    spilling = [row for row in done if row["spill_bytes"]]
    most = max(spilling, key=lambda row: row["spill_bytes"], default=None)
    parts.append(f"{len(spilling)} spill" + (f" (most: {most['spill_bytes']} bytes, {_name(most)})" if most else ""))
    wrong = {
        "do not compile": len(rows) - len(done),
        "lack an expected instruction": sum(bool(row["missing"]) for row in done),
        "ask for more shared memory than there is": sum(row["programs_per_sm"] == 0 for row in done),
    }
    parts += [f"{count} {what}" for what, count in wrong.items() if count]
    worst = min((r for r in done if r.get("peak") == "tensor"), key=lambda r: r["peak_share"], default=None)
    if worst:
        parts.append(f"worst bound: {worst['bound']}, {worst['peak_share']:.0%} of the tensor peak, {_name(worst)}")
    return "; ".join(parts)


def _name(row):
    return f"{row['kernel'].removesuffix('_kernel')} of {row['case']} on {row['arch']}"


def save(rows, folder, facts):
    """<folder>/<arch>/report.csv and .json, each architecture's rows whole."""
    for arch in dict.fromkeys(row["arch"] for row in rows):
        own = [flat(row) for row in rows if row["arch"] == arch]
        base = Path(folder) / arch / "report"
        table.write_csv(base.with_suffix(".csv"), own, COLUMNS)
        about = {"bench": "compile_report", "arch": arch, **facts, "summary": summary(own)}
        if arch in sass.RATES:
            about["rates"] = vars(sass.RATES[arch])
        table.write_json(base.with_suffix(".json"), about)


def main(argv=None):
    p = command.Parser(__doc__)
    archs = command.one_of(compiled.LIMITS)
    p.add_argument("--arch", type=archs, default=list(ARCHS), metavar="A,...", help=f"default: {','.join(ARCHS)}")
    p.add_argument("--kernel", type=command.names, default=(), metavar="NAME,...", help="parts of kernels' names")
    p.add_argument(
        "--config",
        type=command.names,
        default=(),
        metavar="TEXT,...",
        help="parts of cases or constexprs: hopper-bf16-d64, BLOCK_Q=128",
    )
    p.add_argument("--tile", metavar="Q,K,W,S,...", help="a tile for --kernel forward, dkdv or dq to try instead")
    p.add_argument("--core", action="store_true", help="only the smaller set that the long tests compile")
    p.add_argument("--jobs", type=positive_int, metavar="N", help="processes; default: one per core")
    p.add_argument(
        "--out", type=command.folder, default="runs/bench/compiled", metavar="DIR", help="where the CSV and JSON go"
    )
    p.add_argument("--publish", action="store_true", help="also replace results/compiled/<arch>/")
    p.add_argument("--lower-ceilings", action="store_true", help=f"bring {compiled.CEILINGS.name} down to this run")
    p.add_argument("--commit", help="commit id to record, for a checkout without git")
    args = p.parse_args(argv)
    if args.publish and (args.kernel or args.config or args.core or args.tile):
        raise UserError("--publish replaces the whole report; run it without --kernel, --config, --core and --tile")
    cases = [case for case in compile_cases.cases() if case.core or not args.core]
    if args.tile:
        if len(args.kernel) != 1 or args.kernel[0] not in TILED:
            raise UserError(f"--tile is for one attention kernel; add --kernel {' or '.join(TILED)}")
        tile = parse_tile(args.tile)
        cases = [replace(c, call=partial(compile_cases.with_tile, args.kernel[0], tile, c.call)) for c in cases]
    rows = compile_all(args.arch, args.kernel, args.config, args.jobs, cases)
    print(show(rows))
    facts = environment.describe("cpu", args.commit)
    save(rows, args.out, facts)
    if args.publish:
        save(rows, environment.ROOT / "results" / "compiled", facts)
    if args.lower_ceilings:
        table.write_json(compiled.CEILINGS, compiled.lowered(compiled.load_ceilings(), rows))
    print(summary(rows))


if __name__ == "__main__":
    sys.exit(command.run(main))
