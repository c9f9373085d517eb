"""Finds the fastest tiles of the kernels on the GPU of this machine, and writes the rows for kernels/_tuning.py.

    python bench/tune.py
    python bench/tune.py --kernel forward,dkdv --head-dim 64 --dropout 0.1
    python bench/tune.py --kernel softmax_forward --length 1024,4096

Candidates are compiled first, for this GPU's architecture and without touching it, and only those that the compile
report admits go on: no spills, the expected tensor-core and copy instructions, no more shared memory than there is, and
a bound (see bench/sass.py) within reach of the best; of these the most promising, and the shipped one in any case. Each
is then checked against the shipped tile's results and timed: everything briefly, the fastest third again and longer,
until three are left for a last round. Rows go to the screen and to runs/bench/tune/<gpu>.json; they become the shipped
ones by hand, after the tests passed with them.

Compiling is most of the work and needs no GPU: `--arch sm_90` does it anywhere and writes the candidates to be timed to
candidates-sm_90.json; with `--candidates` that file's, and no others, are compiled again and timed.
"""

import itertools
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from bench import command, compile_cases, compiled, environment, table, timing
from gptlib.errors import UserError
from gptlib.flags import positive_int

ATTENTION_KERNELS = {"forward": "attention_forward_kernel", "dkdv": "dkdv_kernel", "dq": "dq_kernel"}
ROW_KERNELS = ("softmax_forward", "softmax_backward", "norm_forward", "norm_backward", "cross_entropy")
ROUND_SECONDS = (0.02, 0.1, 0.5)  # of timing per candidate; the last round is for the three fastest
REACH = 0.8  # of the best bound: a candidate below has no chance
MOST = 24  # candidates that are timed, those first whose programs fill each other's gaps best
TOLERANCE = 0.02  # of the largest element: tiles sum in different orders, miscompiled code is far off


@dataclass(frozen=True)
class Point:
    """One row to find: a kernel at a head dimension or row length, and a call of the launchers that run it."""

    kernel: str
    size: int
    prepare: partial  # of compile_cases: makes the inputs, on the meta device or on `device=`, and returns the call
    expects: tuple = ()
    products: tuple = ()
    dtype_bytes: int = 2
    dropout: bool = False


def attention_candidates(kernel, arch):
    """Every tile of `kernel` worth a try on `arch`, as a launch table would hold it."""
    from kernels._tuning import Tile

    amd = arch.startswith("gfx")
    fewer = {4: 168, 8: 128}  # registers that let one more program in: three of 4 warps, or two of 8
    found = []
    for block_q, block_k, warps in itertools.product((64, 128), (32, 64, 128), (4, 8)):
        forms = [("two", None), ("one", None)]
        if kernel == "forward":
            forms.append(("overlap", None))
        if not amd:
            forms += [("two", fewer[warps]), ("overlap", 255) if kernel == "forward" else ("one", fewer[warps])]
        for stages, (loops, maxnreg) in itertools.product((1,) if amd else (1, 2, 3), forms):
            found.append(Tile(block_q, block_k, warps, stages, loops, maxnreg))
    return found


def row_candidates(n):
    """Tiles that hold rows of n elements whole, several to a program when short, and tiles that hold a block of one
    row, with 8 to 64 elements a thread."""
    from kernels._tuning import RowTile

    block = max(16, 1 << (n - 1).bit_length())
    counts = [rows for rows in (1, 2, 4, 8, 16, 32, 64) if rows * block <= max(4096, block)]
    tiles = [(rows, block, True) for rows in counts]
    tiles += [(1, part, False) for part in (1024, 2048, 4096, 8192, 16384) if 2 * part <= n]
    pairs = itertools.product(tiles, (1, 2, 4, 8, 16, 32))
    return [RowTile(r, b, warps, whole) for (r, b, whole), warps in pairs if 8 <= r * b // (32 * warps) <= 64]


def shipped(point, arch):
    """The table's tile for a point, in aligned strides."""
    from kernels import _tuning

    if point.kernel in ATTENTION_KERNELS:
        tile = _tuning.attention_tile(point.kernel, arch, point.size, point.dtype_bytes, point.dropout)
        return tile._replace(use_tma=False)  # as candidates are: the call itself knows
    return _tuning.row_tile(arch, point.kernel, point.size)


def admit(point, candidates, arch, pool):
    """Candidates that the compile report admits, the most promising first."""
    call = partial(compile_cases.launch, point.prepare)
    calls = [partial(compile_cases.with_tile, point.kernel, tile, call) for tile in candidates]
    cases = [compiled.Case(str(i), call, dict(point.expects), dict(point.products)) for i, call in enumerate(calls)]
    jobs = [job for job in pool.list_jobs(cases, [arch]) if _belongs(job.kernel, point.kernel)]
    compiling = tqdm(pool.compile(jobs), total=len(jobs), desc=f"compile {point.kernel} {point.size}", disable=None)
    return [candidates[i] for i in promising(compiling)]


def promising(rows):
    """Numbers (the cases' names) of the candidates without a fault and within REACH of the best bound. Where the report
    has a model of the machine code, those come first whose programs together can fill most of the peak, MOST of them.
    """
    reach, faulty, has_model = {}, set(), False
    for row in rows:
        i = int(row["case"])
        if compiled.faults(row, {}):
            faulty.add(i)
        bound, programs = row.get("peak_share", 1.0), row.get("programs_per_sm", 1)
        together = min(bound, programs * row.get("in_step_share", bound))
        has_model |= "in_step_share" in row
        reach[i] = min(reach.get(i, (1.0, 1.0)), (bound, together))
    good = sorted((i for i in reach if i not in faulty), key=lambda i: reach[i][::-1], reverse=True)
    best = max((reach[i][0] for i in good), default=0.0)
    near = [i for i in good if reach[i][0] >= REACH * best]
    return near[:MOST] if has_model else near


def _belongs(compiled_name, kernel):
    return compiled_name.startswith(ATTENTION_KERNELS.get(kernel, kernel))


def search(candidates, time_one, rounds=ROUND_SECONDS):
    """[(milliseconds, candidate)], fastest first, of the last round.

    `time_one(candidate, seconds)` returns milliseconds or raises, which drops the candidate. Every round but the last
    keeps the fastest third, never fewer than three.
    """
    timed = [(0.0, candidate) for candidate in candidates]
    for seconds in rounds:
        results = []
        for _, candidate in timed:
            try:
                results.append((time_one(candidate, seconds), candidate))
            except Exception as error:
                print(f"dropped {candidate}: {error}".splitlines()[0])
        results.sort(key=lambda pair: pair[0])
        timed = results if seconds == rounds[-1] else results[: max(3, -(-len(results) // 3))]
    return timed


# ---- on the GPU ------------------------------------------------------------------------------------------------------


class GpuTimer:
    """time_one for `search`: runs a point with a tile, checked against the shipped tile's results."""

    def __init__(self, point, device):
        self.point, self.timer = point, timing.timer_for(device)
        self.run = point.prepare(device=device)
        self.expected = [t.float() for t in self.run()]
        self.checked = set()

    def __call__(self, tile, seconds):
        def step(_=None):
            return compile_cases.with_tile(self.point.kernel, tile, self.run)

        if tile not in self.checked:
            self.check(step())
            self.checked.add(tile)
        return timing.percentiles(timing.sample(self.timer, step, budget_s=seconds))[1]

    def check(self, outputs):
        for expected, out in zip(self.expected, outputs, strict=True):
            error = (out.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-20)
            if not error <= TOLERANCE:
                raise RuntimeError(f"results differ from the shipped tile's by {error:.1e} of the largest element")


def points(args):
    """What the command line asks to tune."""
    found, dtype = [], compile_cases.DTYPES[args.dtype]
    for kernel in args.kernel:
        if kernel in ATTENTION_KERNELS:
            for head_dim in args.head_dim:
                part = "forward" if kernel == "forward" else "backward"
                call = partial(
                    compile_cases.prepare_attention, dtype, head_dim, args.dropout, tokens=args.seq, part=part
                )
                expects = compile_cases.ATTENTION_EXPECTS if args.dtype != "fp32" else {}
                products = compile_cases.PRODUCTS
                size = 4 if args.dtype == "fp32" else 2
                found.append(
                    Point(
                        kernel, head_dim, call, tuple(expects.items()), tuple(products.items()), size, args.dropout > 0
                    )
                )
        else:
            for n in args.length:
                calls = {
                    "norm": partial(compile_cases.prepare_norm, dtype, n, "add-layer-norm"),
                    "softmax": partial(compile_cases.prepare_softmax, dtype, n, False),
                    "cross": partial(compile_cases.prepare_loss, dtype, n, False),
                }
                found.append(Point(kernel, n, calls[kernel.split("_")[0]]))
    return found


def row_text(point, tile):
    """A line for the tables of kernels/_tuning.py."""
    if point.kernel in ATTENTION_KERNELS:
        return f"{point.kernel} D = {point.size}: {tuple(tile[:6])}"
    if not tile.holds_row:
        return f"{point.kernel} N = {point.size} in blocks: ({tile.rows}, {tile.block_n}, {tile.num_warps})"
    return f"{point.kernel} N <= {point.size}: ({point.size}, {tile.rows * tile.block_n}, {tile.num_warps})"


def candidates(point, arch):
    """Every tile worth a try for a point."""
    attention = point.kernel in ATTENTION_KERNELS
    return attention_candidates(point.kernel, arch) if attention else row_candidates(point.size)


def point_name(point):
    """The point's key in a file of candidates."""
    return f"{point.kernel} {point.size}, {point.dtype_bytes} bytes{', dropout' * point.dropout}"


def preselect(args, arch):
    """Write the candidates of all points that the compile report admits for `arch`, without timing any."""
    with compiled.Workers(args.jobs or os.cpu_count()) as pool:
        found = {point_name(point): admit(point, candidates(point, arch), arch, pool) for point in points(args)}
    path = Path(args.out) / f"candidates-{arch}.json"
    table.write_json(path, {"arch": arch, **environment.describe("cpu", args.commit), "candidates": found})
    print(f"wrote {path}: {', '.join(f'{name}: {len(tiles)}' for name, tiles in found.items())}")


def preselected(path, point):
    """The candidates of a point in a file that `preselect` wrote."""
    from kernels._tuning import RowTile, Tile

    kind = Tile if point.kernel in ATTENTION_KERNELS else RowTile
    try:
        return [kind(*fields) for fields in json.loads(Path(path).read_text())["candidates"][point_name(point)]]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"--candidates {path}: nothing for {point_name(point)} ({type(e).__name__}: {e})") from e


def tune(args, device):
    from kernels import _runtime

    arch = _runtime.arch(device)
    if arch not in compiled.LIMITS:
        raise UserError(f"{arch} is unknown to the compile report, which knows {', '.join(compiled.LIMITS)}")
    wanted = [(p, preselected(args.candidates, p) if args.candidates else candidates(p, arch)) for p in points(args)]
    facts = {"bench": "tune", "arch": arch, **environment.describe(device, args.commit)}
    path = Path(args.out) / f"{environment.results_folder(device).name}.json"
    rows = []
    with compiled.Workers(args.jobs or os.cpu_count()) as pool:
        for point, tiles in wanted:
            own = shipped(point, arch)  # always timed, so that the fastest is known to be faster
            admitted = [own, *(t for t in admit(point, tiles, arch, pool) if t != own)]
            print(f"{point.kernel} {point.size}: {len(admitted)} of {len(tiles)} candidates admitted")
            timer = GpuTimer(point, device)
            for ms, tile in search([own], timer, ROUND_SECONDS[-1:]):
                print(f"  {ms:9.4f} ms  {row_text(point, tile)}  shipped")
            for ms, tile in search(admitted, timer):
                rows.append({"kernel": point.kernel, "size": point.size, "ms": ms, "row": row_text(point, tile)})
                print(f"  {ms:9.4f} ms  {row_text(point, tile)}", flush=True)
            table.write_json(path, {**facts, "rows": rows})
    print(f"wrote {path}")


def main(argv=None):
    p = command.Parser(__doc__)
    kernels = (*ATTENTION_KERNELS, *ROW_KERNELS)
    p.add_argument("--kernel", type=command.one_of(kernels), default=list(ATTENTION_KERNELS), metavar="NAME,...")
    p.add_argument("--head-dim", type=command.positives, default=[64, 128], metavar="D,...", help="default: 64,128")
    p.add_argument("--seq", type=positive_int, default=1024, metavar="T", help="of attention; default: 1024")
    p.add_argument("--length", type=command.positives, default=[768, 1024, 4096], metavar="N,...", help="of rows")
    p.add_argument("--dtype", choices=list(compile_cases.DTYPES), default="bf16")
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--arch", choices=compiled.LIMITS, help="write the candidates for this architecture; needs no GPU")
    p.add_argument("--candidates", metavar="FILE", help="time these, which --arch wrote, and no others")
    p.add_argument("--jobs", type=positive_int, metavar="N", help="compiling processes; default: one per core")
    p.add_argument("--out", type=command.folder, default="runs/bench/tune", metavar="DIR")
    p.add_argument("--commit", help="commit id to record, for a checkout without git")
    args = p.parse_args(argv)
    if args.arch:
        preselect(args, args.arch)
        return
    if not torch.cuda.is_available():
        raise UserError(
            "tuning measures, and this machine has no GPU that torch can use: run it on the machine whose rows you "
            "want (NVIDIA of compute capability 8.0 or newer, or AMD's gfx942). Without one, --arch sm_90 compiles and "
            "selects the candidates for it"
        )
    tune(args, torch.device("cuda"))


if __name__ == "__main__":
    sys.exit(command.run(main))
