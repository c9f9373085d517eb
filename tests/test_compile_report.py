"""The compile report: its mechanics on small kernels, and its command line."""

import contextlib
import json
import os
import warnings
from functools import partial

import pytest

from bench import command, compile_cases, compile_report, compiled, table
from bench.compiled import WorkerDied, Workers, faults, programs_per_sm
from gptlib.errors import UserError
from tests import compile_toys as toys


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Compiling processes with a cache of their own, so that nothing compiled earlier passes a test."""
    with Workers(1, cache=tmp_path_factory.mktemp("triton")) as workers:
        yield workers


@pytest.fixture(scope="module")
def toy_rows(pool):
    """{(case, arch): row}"""
    jobs = pool.list_jobs(toys.ALL, ["sm_90"]) + pool.list_jobs([toys.MATMUL], ["sm_80", "sm_100", "gfx942"])
    return {(row["case"], row["arch"]): row for row in pool.compile(jobs)}


# ---- what is compiled ------------------------------------------------------------------------------------------------


def test_a_worker_has_neither_the_interpreter_nor_our_environment(pool, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = pool.run(toys.environment)
    assert seen["TRITON_INTERPRET"] == "0" and "triton" in seen["TRITON_CACHE_DIR"]
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_arguments_are_specialized_as_a_launch_would(pool):
    matmul, softmax, odd = pool.list_jobs([toys.MATMUL, toys.SOFTMAX, toys.ODD_SOFTMAX], ["sm_90"])
    assert matmul.signature["a_desc"] == "tensordesc<bf16[128, 64]>" and matmul.signature["c_ptr"] == "*bf16"
    assert matmul.config == "BLOCK_M=128 BLOCK_N=128 BLOCK_K=64" and matmul.types == "bf16"
    assert softmax.signature["bias_ptr"] == "constexpr", "None is a constant"
    assert softmax.signature["scale"] == "fp32" and softmax.signature["N"] == "i32"
    assert (4,) in softmax.attributes and softmax.attributes[4,] == [["tt.divisibility", 16]]
    assert odd.attributes[4,] == [], "1001 is no multiple of 16"
    assert matmul.expects == ("HGMMA", "UTMALDG")


def test_a_specialization_is_compiled_once(pool):
    again = compiled.Case("again", toys.SOFTMAX.call)
    assert [job.case for job in pool.list_jobs([toys.SOFTMAX, again, toys.ODD_SOFTMAX], ["sm_80"])] == [
        "softmax",
        "odd-softmax",
    ]


def test_a_case_that_raises_is_named(pool):
    with pytest.raises(RuntimeError, match=r"unreal on sm_90: .*ZeroDivisionError"):
        pool.list_jobs([compiled.Case("unreal", toys.divide_by_zero)], ["sm_90"])


# ---- what is read off the code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, instructions",
    [
        ("sm_80", {"HMMA": 64}),
        ("sm_90", {"HGMMA": 4, "UTMALDG": 6}),  # 64x128x16 four times for K = 64; two tiles, three stages
        ("sm_100", {"UTCHMMA": 8, "UTMALDG": 8}),
        ("gfx942", {"MFMA": 16}),
    ],
)
def test_matmul_uses_the_matrix_unit_of_its_architecture(toy_rows, arch, instructions):
    row = toy_rows["matmul", arch]
    assert row["status"] == "ok" and faults(row) == []
    assert set(row["instructions"]) == set(instructions) and all(row["instructions"].values())
    assert 64 <= row["registers"] <= 255 and row["shared"] >= 16384


def test_bound_of_the_matmul_loop_is_what_its_size_demands(toy_rows):
    row = toy_rows["matmul", "sm_90"]
    assert row["loop"] and row["cycles_tensor"] == 2 * 128 * 128 * 64 / 4096
    assert row["cycles_l2"] == round(2 * 128 * 64 * 2 / 38.8)  # what the two barriers of an iteration wait for
    assert (row["bound"], row["peak"], row["peak_share"]) == ("l2", "tensor", 0.606)
    assert toy_rows["matmul", "sm_80"]["cycles_tensor"] == 2 * 128 * 128 * 64 / 2048


def test_bound_of_a_row_kernel_is_its_bytes(toy_rows):
    row = toy_rows["softmax", "sm_90"]
    assert not row["loop"] and row["bound"] == row["peak"] == "memory"
    assert row["cycles_memory"] == round(2 * 1024 * 2 / 13.9)
    assert row["instructions"]["LDG.128"] == 1 and row["instructions"]["MUFU"] >= 8


def test_faults_are_found(toy_rows):
    (spills,) = faults(toy_rows["spilling", "sm_90"])
    assert spills.startswith("spills")
    assert faults(toy_rows["spilling", "sm_90"], {"sm_90": {"spilling softmax_kernel": 10**6}}) == []
    assert faults(toy_rows["small-matmul", "sm_90"]) == ["lacks HGMMA"], "16 rows are too few for wgmma"
    assert faults(toy_rows["odd-softmax", "sm_90"]) == ["lacks LDG.128"]
    (broken,) = faults(toy_rows["broken", "sm_90"])
    assert broken.startswith("CompilationError") and "8 and 16" in broken
    twice = toy_rows["matmul", "sm_90"] | {"redundancy": 2.0}
    assert faults(twice) == ["does 2 times the matrix work of its tile"]
    assert faults(twice | {"case": "attention-bf16-d256-plain"}) == [], "this may, as it may spill"
    slow = toy_rows["matmul", "sm_90"] | {"wgmma_waits": 1.0}
    assert faults(slow) == ["waits for every wgmma by itself"]
    greedy = toy_rows["matmul", "sm_90"] | {"shared": 300_000, "programs_per_sm": 0}
    assert faults(greedy) == ["asks for 300000 bytes of shared memory, sm_90 has 232448"]


def test_ceilings_only_fall():
    ceilings = {"sm_90": {"a k_kernel": 64, "b k_kernel": 8, "c k_kernel": 16, "gone k_kernel": 4}}
    row = {"arch": "sm_90", "kernel": "k_kernel", "status": "ok"}
    spills = [("a", 40), ("a", 48), ("b", 800), ("c", 0), ("new", 24)]
    rows = [row | {"case": case, "spill_bytes": spill} for case, spill in spills]
    rows.append({"arch": "sm_90", "case": "b", "kernel": "k_kernel", "status": "crashed"})
    assert compiled.lowered(ceilings, rows) == {"sm_90": {"a k_kernel": 48, "b k_kernel": 8, "gone k_kernel": 4}}


@pytest.mark.parametrize(
    "arch, registers, warps, shared, programs",
    [
        ("sm_90", 168, 8, 80_000, 1),  # 5376 registers a warp: 3 warps a quarter, 12 in all
        ("sm_90", 128, 8, 80_000, 2),
        ("sm_90", 32, 4, 0, 16),  # 64 warps
        ("sm_90", 32, 4, 57_344, 4),  # 58,368 with the driver's share, four times 233,472
        ("sm_90", 32, 4, 57_345, 3),
        ("sm_90", 64, 4, 232_449, 0),
        ("sm_80", 255, 4, 49_152, 2),
        ("sm_86", 32, 4, 0, 12),  # 48 warps
        ("gfx942", 128, 4, 16_384, 4),
        ("gfx942", 512, 4, 16_384, 1),
    ],
)
def test_programs_per_sm(arch, registers, warps, shared, programs):
    assert programs_per_sm(arch, registers, warps, shared) == programs


def test_tensor_memory_limits_programs():
    assert programs_per_sm("sm_100", 64, 4, 1024, tensor_memory=256) == 2


def test_amd_metadata():
    assembly = """
	v_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
	v_exp_f32_e32 v1, v2
    .private_segment_fixed_size: 332
    .vgpr_count:     512
    .vgpr_spill_count: 80
"""
    facts = compiled.amd_facts(assembly)
    assert facts == {"registers": 512, "spill_bytes": 332, "instructions": {"MFMA": 1, "MUFU": 1}}


def test_work_done_twice_does_not_count(pool):
    """mma.sync takes 16 rows a warp: eight warps of a chained product on 64 rows repeat each other."""
    tiles = {"good": (64, 64, 4, 2), "twice": (64, 64, 8, 2)}
    cases = [
        compiled.Case(name, partial(toys.call_with_tile, "dq", tile), products={"dq_kernel": 3})
        for name, tile in tiles.items()
    ]
    jobs = [job for job in pool.list_jobs(cases, ["sm_80"]) if job.kernel == "dq_kernel"]
    rows = {row["case"]: row for row in pool.compile(jobs)}
    assert rows["good"]["redundancy"] == 1.0 and rows["twice"]["redundancy"] == 2.0
    assert rows["twice"]["peak_share"] <= 0.5
    assert faults(rows["twice"], {}) == ["does 2 times the matrix work of its tile"]


# ---- processes -------------------------------------------------------------------------------------------------------


def test_a_crashing_compiler_is_reported_and_replaced(pool):
    pool.run(warnings.warn, "of a call that went well")
    with pytest.raises(WorkerDied, match=r"exit code 134\): assertion failed: out of luck"):
        pool.run(toys.die)
    assert pool.run(toys.environment)["TRITON_INTERPRET"] == "0"


def test_a_compiler_that_hangs_is_stopped(pool):
    with pytest.raises(WorkerDied, match=r"no answer within 0\.2 s"):
        pool.run(toys.sleep, timeout=0.2)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def only_toys(monkeypatch, pool):
    """Toys instead of the shipped kernels, compiled by the processes that already run."""
    monkeypatch.setattr(compile_cases, "cases", lambda: [toys.SOFTMAX, toys.ODD_SOFTMAX, toys.BROKEN])
    monkeypatch.setattr(compiled, "Workers", lambda count: contextlib.nullcontext(pool))


def test_report_prints_saves_and_sums_up(only_toys, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        command.run(compile_report.main, ["--arch", "gfx942", "--jobs", "1", "--out", str(out), "--commit", "abc"]) == 0
    )
    *lines, last = capsys.readouterr().out.strip().splitlines()
    assert lines[0].split()[:4] == ["arch", "case", "kernel", "tile"] and len(lines) == 4
    assert last.startswith("2 kernels, 3 configurations on gfx942; 0 spill; 1 do not compile")
    header, *csv = (out / "gfx942" / "report.csv").read_text().splitlines()
    assert header.split(",") == compile_report.COLUMNS and len(csv) == 3
    about = json.loads((out / "gfx942" / "report.json").read_text())
    assert about["commit"] == "abc" and about["packages"]["triton"] and about["summary"] == last


def test_report_filters(only_toys, tmp_path, capsys):
    arguments = ["--arch", "gfx942", "--config", "odd", "--jobs", "1", "--out", str(tmp_path)]
    assert command.run(compile_report.main, arguments) == 0
    assert "1 kernels, 1 configurations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "tile"),
    [("128,64,8,2", (128, 64, 8, 2, "two", None)), ("64,32,4,1,overlap,255", (64, 32, 4, 1, "overlap", 255))],
)
def test_a_tile_to_try_is_written_like_a_row(text, tile):
    assert compile_report.parse_tile(text)[:6] == tile


@pytest.mark.parametrize("text", ["128,64,8", "128,64,8,2,three", "128,x,8,2", "128,64,8,2,one,128,1", ""])
def test_a_tile_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match="needs queries,keys,warps,stages"):
        compile_report.parse_tile(text)


def test_a_tile_is_tried_in_the_place_of_the_row(tmp_path, capsys):
    arguments = [
        "--arch",
        "sm_90",
        "--kernel",
        "dq",
        "--config",
        "bf16-d64-plain",
        "--tile",
        "64,64,4,1",
        "--jobs",
        "1",
    ]
    assert command.run(compile_report.main, [*arguments, "--out", str(tmp_path)]) == 0
    (row,) = table.read_csv(tmp_path / "sm_90" / "report.csv")
    assert "BLOCK_Q=64 BLOCK_K=64" in row["config"] and (row["num_warps"], row["num_stages"]) == (4, 1)
    assert row["UTMALDG"] > 0 and row["programs_per_sm"] > 2
    assert command.run(compile_report.main, ["--tile", "64,64,4,1", "--out", str(tmp_path)]) == 2
    assert "--kernel forward or dkdv or dq" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "sm_70"], "sm_70' is unknown; known: sm_80"),
        (["--arch", "gfx942", "--kernel", "nonesuch", "--jobs", "1"], "no kernel or configuration has such a name"),
        (["--publish", "--kernel", "softmax"], "--publish replaces the whole report"),
        (["--kernel", "dq", "--tile", "100,64,4,2"], "powers of two"),
    ],
)
def test_mistakes_are_one_line(only_toys, tmp_path, capsys, arguments, message):
    assert command.run(compile_report.main, [*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and not any(tmp_path.iterdir())


def test_summary_names_the_worst():
    names = {"arch": "sm_90", "kernel": "k_kernel", "status": "ok", "peak": "tensor"}
    rows = [
        names
        | {"case": "c", "spill_bytes": 16, "missing": "", "programs_per_sm": 1, "peak_share": 0.5, "bound": "mufu"},
        names
        | {"case": "d", "spill_bytes": 8, "missing": "HGMMA", "programs_per_sm": 0, "peak_share": 0.9, "bound": "alu"},
    ]
    assert compile_report.summary(rows) == (
        "1 kernels, 2 configurations on sm_90; 2 spill (most: 16 bytes, k of c on sm_90); 1 lack an expected "
        "instruction; 1 ask for more shared memory than there is; worst bound: mufu, 50% of the tensor peak, "
        "k of c on sm_90"
    )
