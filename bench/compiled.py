"""Compiles kernels for any GPU on any machine, and reads registers, spills and instructions off the machine code.

A `Case` is a call of launchers on meta tensors. `list_jobs` makes the calls with launches recorded instead of executed,
so the tile tables, grids and flags are those that ship, and turns every launch into the same specialization that
Triton's JIT would compile. `compile_job` compiles one and returns its facts as a flat dict. Both need a process that
never saw Triton's interpreter: `Workers` keeps such processes and survives compilers that crash.
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from bench import sass

LENIENT = re.compile(r"(attention|decode)-(fp32-|\w+-d256-)")  # cases that may spill, within their ceilings
CEILINGS = Path(__file__).with_name("compile_ceilings.json")
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # those of a launch that a report has columns for
TIMEOUT_S = 600  # ptxas is quick or, on a kernel that spills kilobytes, very slow


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor (compute unit) holds."""

    registers: int  # per quarter, 32 lanes to a warp (64 on AMD)
    warps: int
    programs: int
    shared: int  # bytes
    shared_per_program: int  # bytes, the most a program may ask for
    reserved: int = 1024  # bytes of shared memory that the driver takes per program
    tensor_memory: int = 0  # columns


# CUDA programming guide, "Technical specifications per compute capability"; AMD's CDNA3 ISA guide.
LIMITS = {
    "sm_80": Limits(16384, 64, 32, 164 << 10, 163 << 10),
    "sm_86": Limits(16384, 48, 16, 100 << 10, 99 << 10),
    "sm_90": Limits(16384, 64, 32, 228 << 10, 227 << 10),
    "sm_100": Limits(16384, 64, 32, 228 << 10, 227 << 10, tensor_memory=512),
    "sm_120": Limits(16384, 48, 24, 100 << 10, 99 << 10),
    "gfx942": Limits(512, 32, 32, 64 << 10, 64 << 10, reserved=0),
}
TENSOR_OPS = ("HMMA", "HGMMA", "UTCHMMA", "MFMA")  # mma.sync, wgmma, tcgen05, AMD's
INSTRUCTIONS = (*TENSOR_OPS, "UTMALDG", "UTMASTG", "MUFU", "LDG.128", "USETMAXREG")  # counted in every kernel
_MMA = {arch: "HMMA" if arch.startswith("sm_") else "MFMA" for arch in LIMITS}
# What a case may expect of its kernels' code (see compile_cases), in each architecture's words if it has one.
SPELLINGS = {
    "tensor": _MMA | {"sm_90": "HGMMA", "sm_100": "UTCHMMA"},
    "mma": _MMA,
    "tma_load": {"sm_90": "UTMALDG", "sm_100": "UTMALDG"},
    "tma_store": {"sm_90": "UTMASTG", "sm_100": "UTMASTG"},
    "setmaxnreg": {"sm_90": "USETMAXREG"},
    "wide_load": {arch: "LDG.128" for arch in LIMITS if arch.startswith("sm_")},
}


@dataclass(frozen=True)
class Case:
    """A named call of launchers on meta tensors; `call` is picklable and imports `kernels` only when called."""

    name: str
    call: Callable[[], object]
    expects: dict = field(default_factory=dict, hash=False)  # {kernel: what its code must contain, see SPELLINGS}
    products: dict = field(default_factory=dict, hash=False)  # {kernel: matrix products of its tile per iteration}
    core: bool = True  # part of the smaller set that the long tests and the version matrix compile
    loop_warps: dict = field(default_factory=dict, hash=False)  # {kernel: warps that run its loop, if not all do}
    archs: tuple = ()  # the only ones that it is for, if not for all


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one architecture, with everything that Triton's JIT would compile it with."""

    arch: str
    case: str
    module: str
    kernel: str
    signature: dict = field(hash=False)
    constexprs: dict = field(hash=False)  # {path of the argument: value}
    attributes: dict = field(hash=False)
    options: dict = field(hash=False)  # of `_runtime.launch`: num_warps, num_stages, maxnreg where one is set, ...
    expects: tuple = ()
    products: int = 0
    loop_warps: int = 0  # 0: all

    @property
    def sizes(self):
        """{name of a constexpr: value}"""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1}

    @property
    def tile_flops(self):
        """FLOP of the matrix products that one iteration of the kernel's loop is for; 0 where the case does not say."""
        sizes = self.sizes
        return (
            self.products * 2 * math.prod(sizes[name] for name in ("BLOCK_Q", "BLOCK_K", "BLOCK_D"))
            if self.products
            else 0
        )

    @property
    def config(self):
        """The constexprs that are capital letters, as text: "BLOCK_Q=128 BLOCK_K=64 ..."."""
        return " ".join(f"{name}={value}" for name, value in self.sizes.items() if name.isupper())

    @property
    def types(self):
        """Element types of the arguments in memory: "bf16", or "bf16 fp32"."""
        found = (re.search(r"(?:\*|tensordesc<)(\w+)", t) for t in self.signature.values() if isinstance(t, str))
        return " ".join(dict.fromkeys(match[1] for match in found if match))

    @property
    def labels(self):
        """The columns of a row that say what was compiled."""
        names = ("arch", "case", "kernel", "types", "config")
        options = {name: self.options[name] for name in OPTIONS if name in self.options}
        return {name: getattr(self, name) for name in names} | options

    @property
    def specialization(self):
        """Equal for jobs that compile to the same code."""
        parts = (self.arch, self.module, self.kernel, self.signature, self.constexprs, self.attributes, self.options)
        return repr(parts)


# ---- in a worker: what to compile ------------------------------------------------------------------------------------


def target(arch):
    """Triton's GPUTarget of "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def list_jobs(cases, arch):
    """[Job] of every launch that `cases` make on `arch`, if it is one of theirs; each specialization once, under its
    first case's name."""
    from kernels._runtime import record_launches

    jobs = {}
    for case in cases:
        if case.archs and arch not in case.archs:
            continue

        def recorder(kernel, grid, args, constexprs, options, case=case):
            job = specialize(case, arch, kernel, args, constexprs, options)
            jobs.setdefault(job.specialization, job)

        try:
            with record_launches(arch, recorder):
                case.call()
        except Exception as error:
            raise RuntimeError(f"{case.name} on {arch}: {_one_line(error)}") from error
    return list(jobs.values())


def specialize(case, arch, kernel, args, constexprs, options):
    """The Job of one launch that `case` made, its arguments specialized by Triton's own binder."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target(arch))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound_args, specialization, bound = binder(*args, **constexprs, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, bound, bound_args, specialization, bound)
    expects = tuple(SPELLINGS[word][arch] for word in case.expects.get(kernel.__name__, ()) if arch in SPELLINGS[word])
    names = case.name, kernel.module, kernel.__name__
    numbers = case.products.get(kernel.__name__, 0), case.loop_warps.get(kernel.__name__, 0)
    return Job(arch, *names, signature, constants, attributes, dict(options), expects, *numbers)


# ---- in a worker: compile and look -----------------------------------------------------------------------------------


def compile_job(job):
    """The facts of one kernel as a flat dict; `status` is "ok" or the compiler's complaint."""
    start = time.perf_counter()
    row = job.labels
    try:
        row |= _facts(job, _compile(job))
        row["missing"] = " ".join(word for word in job.expects if word not in row["instructions"])
        row["status"] = "ok"
    except Exception as error:
        row["status"] = _one_line(error)
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def _compile(job):
    import triton

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    else:
        from triton.compiler import ASTSource

    source = ASTSource(kernel, job.signature, job.constexprs, job.attributes)
    return triton.compile(source, target=target(job.arch), options=job.options)


def _one_line(error):
    """A compiler's complaint without its excerpt of the source: the last line of what it was caused by."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]


def _facts(job, compiled):
    warps = compiled.metadata.num_warps  # of the whole program: warp specialization adds to the launch's
    facts = {"shared": compiled.metadata.shared}
    if job.arch.startswith("gfx"):
        facts |= amd_facts(compiled.asm["amdgcn"])
    else:
        facts |= nvidia_facts(
            compiled.asm["cubin"], compiled.asm["ptx"], job.arch, job.loop_warps or warps, job.tile_flops
        )
    facts["programs_per_sm"] = programs_per_sm(
        job.arch, facts["registers"], warps, facts["shared"], getattr(compiled.metadata, "tmem_size", 0)
    )
    return facts


def nvidia_facts(cubin, ptx, arch, num_warps, tile_flops=0):
    """Registers, stack and instruction counts of a cubin; for sm_80 and sm_90 the bound of its hottest loop, which
    `num_warps` run, too. Of the tensor cores' work only `tile_flops`, if given, count as useful."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _tool(knobs.nvidia.cuobjdump.path, "-res-usage", path)
        listing = _tool(knobs.nvidia.nvdisasm.path, "-c", path)
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    blocks = sass.parse(listing, sass.expected_bytes(ptx))
    counts = sass.count_instructions(blocks)
    counts["LDG.128"] = sass.wide_loads(blocks)
    facts = {
        "registers": registers,
        "spill_bytes": stack,
        "instructions": {name: counts[name] for name in INSTRUCTIONS if counts.get(name)},
    }
    if arch in sass.RATES:
        limit = sass.bound(blocks, arch, num_warps)
        facts |= {f"cycles_{part}": round(value) for part, value in limit.cycles.items()}
        facts |= {"loop": limit.is_loop, "bound": limit.limit, "peak": limit.peak}
        redundancy = limit.flops / tile_flops if tile_flops and limit.flops else 1.0  # fp32: no tensor cores
        shares = {"peak_share": limit.share / redundancy}
        if limit.in_step_share is not None:
            shares["in_step_share"] = limit.in_step_share / redundancy
        facts |= {name: round(value, 3) for name, value in (shares | {"redundancy": redundancy}).items()}
        facts["wgmma_waits"] = round(limit.wgmma_waits, 3)
    return facts


def amd_facts(assembly):
    """Registers, spills and instruction counts from the assembly of a gfx target, which ends in its own metadata."""

    def value(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    def count(pattern):
        return len(re.findall(rf"^\s*{pattern}", assembly, re.MULTILINE))

    counts = {"MFMA": count("v_s?mfma"), "MUFU": count("v_(?:exp|log|rcp|rsq|sqrt)_f")}
    return {
        "registers": value("vgpr_count"),  # on CDNA3 it counts the accumulation registers too
        "spill_bytes": max(4 * value("vgpr_spill_count"), value("private_segment_fixed_size")),
        "instructions": {name: n for name, n in counts.items() if n},
    }


def _tool(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout


def programs_per_sm(arch, registers, num_warps, shared, tensor_memory=0):
    """How many programs one multiprocessor can hold at once: the scarcest of registers, warps, shared memory, slots."""
    limits = LIMITS[arch]
    if arch.startswith("gfx"):
        warps = 4 * min(8, limits.registers // max(8, -(-registers // 8) * 8))
    else:
        per_warp = -(-registers * 32 // 256) * 256  # allocated to a warp in pieces of 256
        warps = 4 * (limits.registers // max(256, per_warp))
    fits = [limits.programs, min(warps, limits.warps) // num_warps]
    fits.append(limits.shared // max(1, shared + limits.reserved))
    if tensor_memory:
        fits.append(limits.tensor_memory // tensor_memory)
    return 0 if shared > limits.shared_per_program else min(fits)


def load_ceilings():
    """{arch: {"case kernel": bytes}}: what fp32 attention and head dimension 256 may spill; all else, nothing."""
    return json.loads(CEILINGS.read_text())


def lowered(ceilings, rows):
    """`ceilings` with those that `rows` stay below brought down to what they spill, and gone where that is nothing."""
    result = {arch: dict(names) for arch, names in ceilings.items()}
    most = {}
    for row in rows:
        if row["status"] == "ok":
            name = row["arch"], f"{row['case']} {row['kernel']}"
            most[name] = max(most.get(name, 0), row["spill_bytes"])
    for (arch, name), spill in most.items():
        if result.get(arch, {}).get(name, 0) > spill:
            result[arch][name] = spill
    return {arch: {name: n for name, n in names.items() if n} for arch, names in result.items()}


def spill_ceiling(row, ceilings):
    return ceilings.get(row["arch"], {}).get(f"{row['case']} {row['kernel']}", 0)


def faults(row, ceilings=None):
    """What keeps a row from being shipped, in words: none if it compiles, spills no more than its ceiling allows, uses
    the instructions that its case expects, multiplies nothing twice and without a pause after every product, and fits
    the architecture's shared memory."""
    if row["status"] != "ok":
        return [row["status"]]
    ceiling = spill_ceiling(row, load_ceilings() if ceilings is None else ceilings)
    found = []
    if row["spill_bytes"] > ceiling:
        found.append(f"spills {row['spill_bytes']} bytes per thread, at most {ceiling} allowed")
    if row["missing"]:
        found.append(f"lacks {row['missing']}")
    if (row.get("redundancy") or 1.0) > 1.01 and not LENIENT.match(row["case"]):
        found.append(f"does {row['redundancy']:.2g} times the matrix work of its tile")
    if (row.get("wgmma_waits") or 0) >= 1:
        found.append("waits for every wgmma by itself")
    if row["programs_per_sm"] == 0:
        most = LIMITS[row["arch"]].shared_per_program
        found.append(f"asks for {row['shared']} bytes of shared memory, {row['arch']} has {most}")
    return found


# ---- processes -------------------------------------------------------------------------------------------------------


_environment_lock = threading.Lock()


@contextlib.contextmanager
def _environment(**variables):
    """os.environ with `variables` set, for the process started inside: it reads them before any module of its own."""
    with _environment_lock:
        before = dict(os.environ)
        os.environ.update(variables)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _serve(connection, log):
    """A worker's life: answer (function, arguments) until the pipe closes."""
    with open(log, "a") as stream:  # the compilers write to the terminal by themselves
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, arguments = connection.recv()
            os.truncate(log, 0)  # what an earlier call said explains no crash of this one
            try:
                connection.send((True, function(*arguments)))
            except Exception as error:
                connection.send((False, f"{type(error).__name__}: {error}"))


class WorkerDied(Exception):
    """The process of a call ended, or took too long, before it answered."""


class Worker:
    """One process that runs functions of modules that import Triton; restarted after a crash."""

    def __init__(self, folder, cache=None):
        self.log = Path(tempfile.mkstemp(dir=folder, suffix=".log")[1])
        self.cache = cache
        self.process = None

    def call(self, function, *arguments, timeout=TIMEOUT_S):
        """function(*arguments) there; RuntimeError with its message if it raised, WorkerDied if the process ended."""
        if self.process is None or not self.process.is_alive():
            self._start()
        self.connection.send((function, arguments))
        try:
            if not self.connection.poll(timeout):
                raise EOFError
            done, value = self.connection.recv()
        except (EOFError, ConnectionError):
            raise WorkerDied(self._last_words(timeout)) from None
        if not done:
            raise RuntimeError(value)
        return value

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.log), daemon=True)
        cache = {"TRITON_CACHE_DIR": str(self.cache)} if self.cache else {}
        with _environment(TRITON_INTERPRET="0", OMP_NUM_THREADS="1", **cache):
            self.process.start()
        theirs.close()

    def _last_words(self, timeout):
        self.process.join(1)
        if self.process.is_alive():
            self.close()
            return f"no answer within {timeout} s"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"the compiler crashed (exit code {self.process.exitcode}): {lines[0] if lines else 'no message'}"[:200]

    def close(self):
        if self.process is not None and self.process.is_alive():
            self.process.terminate()
            self.process.join()


class Workers:
    """`count` workers. Use as a context; `cache` is Triton's cache directory (its own default if None)."""

    def __init__(self, count, cache=None):
        self.count, self.cache = count, cache

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="compile-")
        self.idle = [Worker(self.folder.name, self.cache) for _ in range(self.count)]
        self.threads = ThreadPoolExecutor(self.count)
        return self

    def __exit__(self, *_):
        self.threads.shutdown(cancel_futures=True)
        for worker in self.idle:
            worker.close()
        self.folder.cleanup()

    def run(self, function, *arguments, timeout=TIMEOUT_S):
        """function(*arguments) in an idle worker; at most `count` calls at a time."""
        worker = self.idle.pop()
        try:
            return worker.call(function, *arguments, timeout=timeout)
        finally:
            self.idle.append(worker)

    def list_jobs(self, cases, archs):
        """[Job] of all cases on all architectures."""
        futures = [self.threads.submit(self.run, list_jobs, cases, arch) for arch in archs]
        return [job for future in futures for job in future.result()]

    def compile(self, jobs):
        """Yield a row of facts per job, as they finish; a crash of the compiler is a row with that status."""
        futures = {self.threads.submit(self.run, compile_job, job): job for job in jobs}
        for future in as_completed(futures):
            try:
                yield future.result()
            except (WorkerDied, RuntimeError) as error:
                yield futures[future].labels | {"status": str(error)}
