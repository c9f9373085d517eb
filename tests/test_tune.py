"""The search for tiles, with times that a formula gives instead of a GPU."""

import argparse
import dataclasses
import json
from functools import partial

import pytest
import torch

from bench import command, compile_cases, compiled, tune
from gptlib.errors import UserError


class FakeTimer:
    """Times by formula, noisy in short rounds; some candidates do not run."""

    def __init__(self, broken=()):
        self.broken, self.asked = broken, []

    def __call__(self, candidate, seconds):
        self.asked.append((candidate, seconds))
        if candidate in self.broken:
            raise RuntimeError("results differ from the shipped tile's by 1.0e+00 of the largest element\nand more")
        return abs(candidate - 17) + 1 + (candidate * 7 % 3) * 0.01 / seconds


def test_search_finds_the_fastest():
    timer = FakeTimer()
    found = tune.search(range(30), timer, rounds=(0.01, 0.1, 1.0))
    assert found[0][1] == 17 and found[0][0] == pytest.approx(1.02)
    assert [times[0] for times in found] == sorted(times[0] for times in found)
    rounds = [[c for c, s in timer.asked if s == seconds] for seconds in (0.01, 0.1, 1.0)]
    assert [len(r) for r in rounds] == [30, 10, 4], "every round but the last keeps a third"
    assert len(found) == 4


def test_search_drops_what_does_not_run(capsys):
    timer = FakeTimer(broken=(17, 18))
    assert tune.search(range(12, 20), timer)[0][1] == 16
    assert capsys.readouterr().out.splitlines()[0].startswith("dropped 17: results differ")
    assert sum(candidate == 17 for candidate, _ in timer.asked) == 1


def test_search_with_few_candidates_times_them_to_the_end():
    assert [c for _, c in tune.search([3, 2], FakeTimer())] == [3, 2]
    assert tune.search([17], FakeTimer(broken=(17,))) == []


def test_candidates_are_tiles_of_the_table():
    pytest.importorskip("triton")
    from kernels import _tuning

    forward, dq = (tune.attention_candidates(kernel, "sm_90") for kernel in ("forward", "dq"))
    assert {tile.loops for tile in forward} == {"two", "one", "overlap"} and {tile.loops for tile in dq} == {
        "two",
        "one",
    }
    assert {(t.num_stages, t.maxnreg) for t in tune.attention_candidates("dq", "gfx942")} == {(1, None)}
    for kernel in ("forward", "dkdv", "dq"):
        shipped = [tune.shipped(tune.Point(kernel, head_dim, None), "sm_90") for head_dim in (64, 128)]
        assert set(shipped) <= set(tune.attention_candidates(kernel, "sm_90"))
        row = _tuning.attention_tile(kernel, "sm_90", 128, 2, dropout=True)
        assert tune.shipped(tune.Point(kernel, 128, None, dropout=True), "sm_90")[:6] == row[:6]
    assert tune.shipped(tune.Point("norm_forward", 768, None), "sm_90") == _tuning.row_tile(
        "sm_90", "norm_forward", 768
    )


def test_long_rows_are_tried_whole_and_in_blocks():
    from kernels import _tuning

    tiles = tune.row_candidates(16384)
    assert {(t.block_n, t.holds_row) for t in tiles if t.rows == 1} >= {(16384, True), (8192, False), (1024, False)}
    assert all(8 <= t.rows * t.block_n // (32 * t.num_warps) <= 64 for t in tiles)
    assert all(t.holds_row for t in tune.row_candidates(1024)) and len(set(tiles)) == len(tiles)
    for kernel in tune.ROW_KERNELS:
        for n in (768, 4096, 50257):
            shipped = tune.shipped(tune.Point(kernel, n, None), "sm_90")
            assert shipped in tune.row_candidates(n) or kernel == "norm_backward", "its rows are worked off in turn"
    assert _tuning.ROWS["sm_90"].keys() == set(tune.ROW_KERNELS)


def test_the_loss_is_a_point_too(tmp_path):
    from kernels._tuning import RowTile

    point = tune.Point("cross_entropy", 4096, partial(compile_cases.prepare_loss, "bfloat16", 4096, False))
    tile = RowTile(1, 1024, 4, False)
    with compiled.Workers(1, cache=tmp_path) as pool:
        assert tune.admit(point, [tile], "sm_90", pool) == [tile]
    assert tune.row_text(point, tile) == "cross_entropy N = 4096 in blocks: (1, 1024, 4)"


def compiled_row(i, **facts):
    names = {"arch": "sm_90", "case": str(i), "kernel": "k", "status": "ok", "spill_bytes": 0, "missing": ""}
    return names | {"programs_per_sm": 1} | facts


def test_the_most_promising_come_first_and_the_hopeless_never():
    share = {"peak_share": 1.0}
    rows = [
        compiled_row(0, **share, in_step_share=0.5),
        compiled_row(1, **share, in_step_share=0.4, programs_per_sm=2),
        compiled_row(2, **share, in_step_share=0.9, spill_bytes=8),
        compiled_row(3, peak_share=0.7, in_step_share=0.7),
        compiled_row(4, **share, in_step_share=0.6),
    ]
    assert tune.promising(rows) == [1, 4, 0]
    many = [compiled_row(i, **share, in_step_share=i / 100) for i in range(60)]
    assert tune.promising(many) == list(range(59, 59 - tune.MOST, -1))


def test_without_a_model_of_the_code_all_that_is_clean_is_timed():
    assert tune.promising([compiled_row(i) for i in range(60)]) == list(range(60))
    assert tune.promising([compiled_row(i, spill_bytes=8) for i in range(3)]) == []


def test_a_point_runs_with_the_tile_it_is_given():
    from kernels import _tuning

    tile = _tuning.Tile(16, 16, 4, 1)
    seen = compile_cases.with_tile(
        "dq", tile, lambda: [_tuning.attention_tile(k, "sm_90", 64, 2) for k in ("dq", "dkdv")]
    )
    assert seen[0] == tile._replace(use_tma=True) and seen[1][:6] != tile[:6]
    assert _tuning.attention_tile("dq", "sm_90", 64, 2)[:6] != tile[:6], "and only while it runs"
    by_pointers = compile_cases.with_tile(
        "dq", tile, lambda: _tuning.attention_tile("dq", "sm_90", 64, 2, False, False)
    )
    assert by_pointers == tile, "strides that no descriptor takes"


@pytest.mark.parametrize(
    ("part", "kernels"),
    [("forward", ["attention_forward_kernel"]), ("backward", ["delta_kernel", "dkdv_kernel", "dq_kernel"])],
)
def test_attention_is_timed_by_half(part, kernels):
    from kernels._runtime import record_launches

    launched = []
    with record_launches("sm_90", lambda kernel, *_: launched.append(kernel.__name__)):
        run = compile_cases.prepare_attention("bfloat16", 64, tokens=4096, part=part)
        launched.clear()
        run()
    assert launched == kernels


def test_only_what_the_report_admits_is_timed(tmp_path):
    from kernels._tuning import RowTile

    point = tune.Point("softmax_forward", 8192, partial(compile_cases.prepare_softmax, "float16", 8192, False))
    good, spilling = RowTile(1, 8192, 8, True), RowTile(1, 8192, 1, True)
    with compiled.Workers(1, cache=tmp_path) as pool:
        assert tune.admit(point, [spilling, good], "sm_90", pool) == [good]


def test_candidates_found_without_a_gpu_are_those_that_are_timed(tmp_path, monkeypatch, capsys):
    from kernels._tuning import RowTile

    tiles = [RowTile(1, 8192, warps, True) for warps in (8, 16)]
    monkeypatch.setattr(tune, "candidates", lambda point, arch: tiles)
    flags = ["--kernel", "softmax_forward", "--length", "8192", "--out", str(tmp_path), "--jobs", "1"]
    assert command.run(tune.main, [*flags, "--arch", "sm_90", "--commit", "abc"]) == 0
    assert "softmax_forward 8192, 2 bytes: 2" in capsys.readouterr().out
    (point,) = tune.points(argparse.Namespace(kernel=["softmax_forward"], length=[8192], dtype="bf16"))
    found = tune.preselected(tmp_path / "candidates-sm_90.json", point)
    assert set(found) == set(tiles) and isinstance(found[0], RowTile)
    with pytest.raises(UserError, match="nothing for softmax_forward 1024, 2 bytes"):
        tune.preselected(tmp_path / "candidates-sm_90.json", dataclasses.replace(point, size=1024))


def test_rows_are_saved_as_they_are_found(tmp_path, monkeypatch, capsys):
    """The whole command but for the GPU: the second point is interrupted, the first is on disk."""
    from kernels import _runtime
    from kernels._tuning import RowTile

    class Timer:
        def __init__(self, point, device):
            if point.size == 2048:
                raise KeyboardInterrupt

        def __call__(self, tile, seconds):
            return tile.num_warps

    tiles = [RowTile(1, 8192, warps, True) for warps in (16, 2)]
    monkeypatch.setattr(tune, "GpuTimer", Timer)
    monkeypatch.setattr(tune, "candidates", lambda point, arch: tiles)
    monkeypatch.setattr(tune, "admit", lambda point, tiles, arch, pool: tiles)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_runtime, "arch", lambda device: "sm_90")
    facts = {"device": "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(tune.environment, "describe", lambda device, commit: facts)
    monkeypatch.setattr(tune.environment, "device_name", lambda device: facts["device"])
    flags = ["--kernel", "softmax_forward", "--length", "8192,2048", "--out", str(tmp_path), "--jobs", "1"]
    assert command.run(tune.main, flags) == 130
    rows = json.loads((tmp_path / "h100-80gb-hbm3.json").read_text())["rows"]
    assert [row["ms"] for row in rows] == [2, 8, 16], "8 is the shipped one"
    assert "softmax_forward N <= 8192: (8192, 8192, 8)  shipped" in capsys.readouterr().out


def test_a_tile_whose_results_differ_is_refused():
    timer = object.__new__(tune.GpuTimer)
    timer.expected = [torch.tensor([1.0, -4.0])]
    timer.check([torch.tensor([1.0, -4.05])])
    for wrong in ([1.0, -4.2], [1.0, float("nan")]):
        with pytest.raises(RuntimeError, match="differ from the shipped"):
            timer.check([torch.tensor(wrong)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_explains_and_exits_2(capsys, tmp_path):
    assert command.run(tune.main, ["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no GPU" in error and "--arch sm_90" in error and len(error.splitlines()) == 1


@pytest.mark.gpu
def test_tuning_a_row_kernel_on_the_gpu(tmp_path):
    arguments = ["--kernel", "softmax_forward", "--length", "1024", "--out", str(tmp_path), "--commit", "test"]
    assert command.run(tune.main, arguments) == 0
    assert len(list(tmp_path.glob("*.json"))) == 1
