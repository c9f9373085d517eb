"""Pictures and tables from stored CSVs, with no torch: what they say is what the files say, and nothing else."""

import json
import subprocess
import sys

import pytest

from bench import plots, report, table

FACTS = {
    "device": "NVIDIA H100 80GB HBM3",
    "cpu": "Some CPU",
    "torch_threads": 8,
    "date": "2026-11-23T10:00:00Z",
    "commit": "abc123",
    "command": "python bench/attention.py",
    "complete": True,
    "packages": {"torch": "2.11.0", "triton": "3.6.0"},
    "ceilings": {"matmul bf16": 790e12, "copy": 3.0e12},
    "mfu_formula": "a formula",
}


def attention_rows():
    shape = {"bench": "attention", "op": "causal_attention", "dtype": "bf16", "batch": 16, "heads": 32, "head_dim": 64}
    work = {"unit": "TFLOP/s", "flops": 10**12, "bytes": 10**9}
    figures = {  # provider: rate and MiB at 1024, at 2048
        "reference": [(40.0, 900.0), None],
        "sdpa-cudnn": [(290.04, 100.0), (330.0, 200.0)],
        "triton": [(300.0, 90.0), (310.0, 250.0)],
    }
    rows = []
    for i, seq in enumerate((1024, 2048)):
        for provider, values in figures.items():
            row = {**shape, **work, "provider": provider, "mode": "fwd", "seq": seq, "status": "oom"}
            if values[i]:
                rate, mib = values[i]
                ms = {"p20_ms": 900 / rate, "p50_ms": 1000 / rate, "p80_ms": 1100 / rate}
                row |= {"status": "ok", "rate": rate, "peak_mib": mib, "share": rate / 790, **ms}
            rows.append(row)
    return rows


def train_rows():
    rows = []
    for attn, norm, speed in (("sdpa", "torch", 400_000.0), ("triton", "triton", 420_000.0), ("flex", "torch", None)):
        row = {
            "bench": "train",
            "provider": f"{attn}+{norm}",
            "attn": attn,
            "norm": norm,
            "preset": "gpt2",
            "seq": 1024,
        }
        row |= {"batch": 16, "dtype": "bfloat16", "status": "ok" if speed else "unsupported"}
        if speed:
            ms = 16 * 1024 / speed * 1e3
            row |= {"tokens_per_s": speed, "p20_ms": ms * 0.9, "p50_ms": ms, "p80_ms": ms * 1.1, "mfu": 0.345678}
            row |= {"share": 0.43, "peak_mib": 12345.0}
        rows.append(row)
    return rows


def store(folder, name, rows, **facts):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table.write_csv(folder / f"{name}.csv", rows, columns)
    table.write_json(folder / f"{name}.json", FACTS | {"bench": name} | facts)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    store(folder / "h100", "attention", attention_rows())
    store(folder / "h100", "train", train_rows())
    cpu = [{**row, "unit": "GFLOP/s", "dtype": "fp32"} for row in attention_rows()]
    store(folder / "cpu", "attention", cpu, device="CPU", ceilings={"matmul fp32": 8e10, "copy": 1e10})
    return folder


def test_tables_bold_the_best_and_show_why_a_cell_is_empty(results):
    attention, train, cpu = report.load(results)
    assert [r.folder.name for r in (attention, train, cpu)] == ["h100", "h100", "cpu"]
    lines = report.speed_table(attention).splitlines()
    assert lines[0] == "| seq | mode | reference | sdpa-cudnn | triton |"
    assert lines[2] == "| 1024 | fwd | 40.0 | 290.0 | **300.0** |"
    assert lines[3] == "| 2048 | fwd | oom | **330.0** | 310.0 |"
    assert report.speed_table(attention, "peak_mib", lowest=True).splitlines()[2].endswith("| **90.0** |")
    lines = report.train_table(train).splitlines()
    assert lines[2].startswith(
        "| gpt2 | 1024 | sdpa | torch | torch | 16 | 400,000 | 41.0 (36.9 to 45.1) | 34.6% | 43% |"
    )
    assert "**420,000**" in lines[3] and "unsupported" in lines[4]


def test_shapes_stand_in_order_of_size_however_they_came(results):
    attention = report.load(results)[0]
    lines = report.speed_table(attention).splitlines()
    attention.rows.sort(key=lambda row: (-row["seq"], row["provider"]))
    assert [line.split()[1] for line in report.speed_table(attention).splitlines()[2:]] == ["1024", "2048"]
    assert len(lines) == 4


def test_a_labelled_run_has_files_a_table_and_pictures_of_its_own(results):
    rows = [{**row, "batch": batch, "dropout": 0} for row in attention_rows()[:3] for batch in (8, 16)]
    store(results / "h100", "attention-gpt2", rows, bench="attention")
    store(results / "h100", "train-long", train_rows(), bench="train")
    found = report.load(results)
    names = [r.name for r in found if r.folder.name == "h100"]
    assert names == ["attention", "train", "attention-gpt2", "train-long"]
    by_batch = found[names.index("attention-gpt2")]
    lines = report.speed_table(by_batch).splitlines()
    assert lines[0] == "| batch | mode | reference | sdpa-cudnn | triton |"
    assert lines[2:] == [f"| {batch} | fwd | 40.0 | 290.0 | **300.0** |" for batch in (8, 16)]
    assert len(list(report.digest(by_batch))) == 2
    assert {path.name for path in plots.draw_all(found)} >= {
        *("attention.png", "attention-gpt2.png", "attention-gpt2-memory.png", "train.png", "train-long.png")
    }
    page = report.results_page(found, results)
    assert "### Attention, gpt2" in page and "](h100/attention-gpt2.png)" in page
    region = report.readme_region(found, results.parent)
    assert "gpt2.png" not in region and region.count("Whole training steps") == 1


def test_digest_sets_ours_beside_the_fastest_other(results):
    attention, train, _ = report.load(results)
    assert list(report.digest(attention)) == [
        "causal_attention bf16 64 1024 fwd: triton 300.0 TFLOP/s, 1.03 x sdpa-cudnn (290.0)",
        "causal_attention bf16 64 2048 fwd: triton 310.0 TFLOP/s, 0.94 x sdpa-cudnn (330.0)",
    ]
    assert list(report.digest(train)) == [
        "train gpt2 1024: triton+triton 420,000.0 tokens/s, 1.05 x sdpa+torch (400,000.0)"
    ]


def test_the_whole_report(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\nbefore\n\n{report.BEGIN}\nold figures\n{report.END}\n\nafter\n")
    assert report.main(["--results", str(results), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("\nafter\n") and "old figures" not in text
    assert "**300.0**" in text and "**420,000**" in text and "fp32" not in text
    page = (results / "README.md").read_text()
    assert page.index("NVIDIA H100") < page.index("Some CPU (CPU)")
    assert "matmul bf16 790.0 TFLOP/s, copy 3,000 GB/s" in page and "matmul fp32 80.0 GFLOP/s" in page
    for name in ("h100/attention.png", "h100/attention-memory.png", "h100/train.png", "cpu/roofline.png"):
        assert f"]({name})" in page
        assert (results / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.partial"))
    assert report.main(["--results", str(results), "--readme", str(readme)]) == 0
    assert readme.read_text() == text, "running it again changes nothing"


def test_machine_code_has_a_section(results):
    assert "Machine code" not in report.results_page(report.load(results), results)
    row = {"kernel": "dq_kernel", "case": "attention-fp32-d256-plain", "spill_bytes": 176}
    rows = [row, {**row, "spill_bytes": 8}, {**row, "kernel": "dkdv_kernel", "spill_bytes": 0}]
    store(results / "compiled" / "sm_90", "report", rows, command="python bench/compile_report.py --publish")
    table.write_csv(results / "compiled" / "matrix.csv", [{"triton": "3.6.0", "faults": 0}], ["triton", "faults"])
    page = report.results_page(report.load(results), results)
    assert "`python bench/compile_report.py --arch NAME --publish`" in page
    row = "| [sm_90](compiled/sm_90/report.csv) | 2 | 3 | 2 | 176 | dq of attention-fp32-d256-plain "
    assert f"{row}| 2026-11-23, abc123, triton 3.6.0 |" in page
    assert "| triton | faults |" in page and "| 3.6.0 | 0 |" in page


def test_a_readme_without_markers_is_left_alone(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    assert report.main(["--results", str(results), "--readme", str(readme)]) == 2
    assert "lacks the markers" in capsys.readouterr().err
    assert readme.read_text() == "# Title\n"


def test_nothing_to_report_is_one_line_and_exit_2(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "--publish" in error


def test_a_run_where_nothing_was_timed_has_a_table_and_no_picture(tmp_path):
    rows = [{**row, "status": "parity", "rate": None, "peak_mib": None} for row in attention_rows()]
    store(tmp_path / "cpu", "attention", rows, device="CPU", complete=False)
    (result,) = report.load(tmp_path)
    assert report.pictures(result) == [] and list(plots.draw_all([result])) == []
    page = report.results_page([result], tmp_path)
    assert "| 1024 | fwd | parity | parity | parity |" in page and "cut short" in page and ".png" not in page


def test_every_provider_keeps_its_look():
    assert (
        len(set(plots.STYLES.values())) == len(plots.STYLES) - 2
    )  # torch is sdpa's rows, quack cuDNN's: never together
    assert plots.style("my.kernel:attend") == plots.style("my.kernel:attend")


def test_the_report_needs_neither_torch_nor_the_kernels():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'triton', 'kernels']))"
    code = f"{blocked}; from bench import report, plots, gpu"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=report.ROOT)


def test_committed_tables_are_what_the_report_writes():
    found = report.load(report.ROOT / "results")
    assert found, "results/ is empty"
    assert (report.ROOT / "results" / "README.md").read_text() == report.results_page(found, report.ROOT / "results")
    readme = (report.ROOT / "README.md").read_text()
    if report.BEGIN in readme:
        assert readme == report.replace_region(readme, report.readme_region(found, report.ROOT))
    for result in found:
        assert all((result.folder / name).is_file() for name in report.pictures(result))
        facts = json.loads((result.folder / f"{result.name}.json").read_text())
        own = {"curves": {"verdicts"}, "host": set()}.get(result.bench, {"ceilings"})
        assert {"command", "commit", "date"} | own <= set(facts)
