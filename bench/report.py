"""Pictures and tables from results/: python bench/report.py

Reads what the benches published (results/<device>/<bench>.csv and .json), draws a PNG beside each and rewrites the
tables of results/README.md and README.md between their markers. No number in those tables is typed by hand, and
nothing here needs torch or a GPU. `--results DIR` does the same for another folder, its own README.md included.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import spread, table
from bench.arguments import Parser, run

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ROW_BENCHES = ("softmax", "layernorm", "cross_entropy")
BENCHES = ("attention", *ROW_BENCHES, "linear_cross_entropy", "train", "train-compiled", "curves", "host")
ALSO = ("batch", "dropout")  # columns that tell shapes apart only in some runs
SHAPES = {
    "attention": ("head_dim", "seq", "mode"),
    **dict.fromkeys(ROW_BENCHES, ("length", "mode")),
    "linear_cross_entropy": ("tokens", "classes", "mode"),
}
CAUSES = {"oom": "out of memory", "parity": "checked, not timed (interpreter)", "wrong": "refused: wrong"}


@dataclass(frozen=True)
class Result:
    """One run of a bench: its device's folder, the name of its files, its rows and what its JSON says of the run."""

    folder: Path
    name: str  # the bench's, or with a label behind it: "attention-gpt2"
    bench: str
    rows: list
    facts: dict

    @property
    def timed(self):
        return [row for row in self.rows if row.get("status") == "ok"]

    @property
    def judged(self):
        """Verdicts on loss curves; none of other benches, nor of a run that was cut short."""
        return self.facts.get("verdicts", [])

    @property
    def on_cpu(self):
        return self.facts["device"] == "CPU"

    @property
    def label(self):
        return self.name.removeprefix(self.bench).removeprefix("-")

    @property
    def keys(self):
        """The columns that tell the shapes of a kernel bench apart."""
        keys = ["op", "dtype", *SHAPES[self.bench]]
        for column in ALSO:
            if column in self.rows[0] and self._repeats(keys):
                keys.insert(-1, column)
        return [k for k in keys if k == "mode" or len({r[k] for r in self.rows}) > 1]

    def _repeats(self, keys):
        return len({(r["provider"], *(r[k] for k in keys)) for r in self.rows}) < len(self.rows)


def load(results):
    """All Results under a folder: GPUs before CPUs, benches in the order of BENCHES, labelled runs last."""
    found = []
    for folder in sorted(p for p in Path(results).glob("*") if p.is_dir()):
        found += read_folder(folder)
    found += read_folder(Path(results))
    return sorted(found, key=lambda r: (r.on_cpu, r.folder.name, r.label != "", BENCHES.index(r.bench), r.label))


def read_folder(folder):
    found = []
    for path in sorted(folder.glob("*.csv")):
        rows, described = table.read_csv(path), path.with_suffix(".json")
        facts = json.loads(described.read_text()) if described.is_file() else {}
        if rows and facts.get("bench") in BENCHES:
            found.append(Result(folder, path.stem, facts["bench"], rows, facts))
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown(header, lines):
    """A Markdown table, numbers to the right."""
    rule = ["---" if i == 0 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, rule, *lines])


def speed_table(result, value="rate", *, lowest=False, modes=None):
    """Providers side by side, a line per shape and mode, the best in bold."""
    rows = [r for r in result.rows if modes is None or r["mode"] in modes]
    keys = result.keys
    names = list(dict.fromkeys(r["provider"] for r in rows))
    lines = {}
    for row in rows:
        lines.setdefault(tuple(row[k] for k in keys), {})[row["provider"]] = row
    seen = {value: i for i, value in enumerate(dict.fromkeys(value for key in lines for value in key))}
    body = []
    for key in sorted(lines, key=lambda key: [seen[v] if isinstance(v, str) else v for v in key]):  # shapes by size
        by_name = lines[key]
        values = [r[value] for r in by_name.values() if r.get(value) is not None]
        best = f"{(min if lowest else max)(values):.1f}" if values else None
        body.append([*key, *(cell(by_name.get(name), value, best) for name in names)])
    return markdown([*keys, *names], body)


def cell(row, value, best, digits=1):
    if row is None:
        return "-"
    if row.get(value) is None:
        return row["status"]
    text = f"{row[value]:.{digits}f}"
    return f"**{text}**" if text == best else text


def train_table(result):
    """A line per contestant and sequence length, the fastest of each length in bold."""
    lines = []
    for row in result.rows:
        line = [row["preset"], row["seq"], row["attn"], row["norm"], row.get("loss") or "torch", row["batch"]]
        if row["tokens_per_s"] is None:
            lines.append([*line, row["status"], *[""] * 4])
            continue
        fastest = max(r["tokens_per_s"] for r in result.timed if r["seq"] == row["seq"])
        speed = f"{row['tokens_per_s']:,.0f}"
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        step = f"{row['p50_ms']:.1f} ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})"
        speed = f"**{speed}**" if row["tokens_per_s"] == fastest else speed
        lines.append([*line, speed, step, mfu, f"{row['share']:.0%}", f"{row['peak_mib']:,.0f}"])
    header = ["preset", "seq", "attn", "norm", "loss", "batch", "tokens/s", "step ms, p50 (p20 to p80)", "MFU"]
    return markdown([*header, "of ceiling", "peak MiB"], lines)


def host_table(result):
    """Microseconds at the median: a line per op and mode, a column per provider."""
    names = list(dict.fromkeys(row["provider"] for row in result.rows))
    lines = {}
    for row in result.rows:
        lines.setdefault((row["op"], row["mode"]), {})[row["provider"]] = cell(row, "p50_us", None, digits=0)
    return markdown(["op", "mode", *names], [[*key, *(line.get(n, "-") for n in names)] for key, line in lines.items()])


def host_words(result):
    """What the table of host times holds."""
    notes = {f"{row['provider']} {row['note']}" for row in result.rows if row["note"] and row["status"] == "measured"}
    return f"Microseconds at the median before the GPU can begin{''.join(f'; {n}' for n in sorted(notes))}."


def curves_table(result):
    """A line per contestant, then the two seeds of the reference: what a contestant must not exceed."""
    seed, other = result.facts["seeds"]
    lines = []
    for v in result.judged:
        names = v["provider"].rsplit("+", 1)
        if v["ratio"] is None:
            lines.append([*names, *[""] * 5, f"**outside**: {v['note']}"])
        else:
            verdict = "within" if v["within"] else "**outside**"
            lines.append([*names, *distances(v), f"{v['ratio']:.2g}", verdict])
    lines.append(["reference", f"reference, seed {other}", *distances(result.facts["spread"]), 1, "the spread"])
    header = ["attn", f"norm, seed {seed}", "training, rms", "largest", "validation, rms", "at the end"]
    return markdown([*header, "of the spread", "verdict"], lines)


def distances(found):
    """Cells of one distance, in nats per token."""
    return [*(f"{found[name]:.1e}" for name in spread.JUDGED), f"{found['val_last']:+.1e}"]


def curves_words(result):
    """What was trained and how the table is to be read."""
    facts = result.facts
    tokens = result.rows[-1]["tokens"] // result.rows[-1]["step"]
    return (
        f"`{facts['preset']}`, {result.rows[0]['dtype']}, {facts['steps']} steps of {tokens:,} tokens without dropout, "
        "each run a whole training. Differences from the reference's losses with the same seed, in nats per token; the "
        "last line is the reference with another seed. A run is within the spread if it exceeds that line in none of "
        'the first three columns; "of the spread" is the largest of the three quotients.'
    )


def provenance(result):
    """Where figures come from, in one line."""
    facts = result.facts
    versions = ", ".join(f"{n} {facts['packages'][n]}" for n in ("torch", "triton") if n in facts["packages"])
    threads = f"{facts['torch_threads']} thread" + "s" * (facts["torch_threads"] > 1)
    device = f"{facts['cpu']}, {threads}" if result.on_cpu else facts["device"]
    partial = "" if facts["complete"] else " The run was cut short."
    return f"`{facts['command']}`, {facts['date'][:10]}, commit {facts['commit']}, {device}, {versions}.{partial}"


def ceilings(result):
    """The ceilings of a run in words."""
    size, unit = (1e9, "GFLOP/s") if result.on_cpu else (1e12, "TFLOP/s")
    return "Ceilings measured in the same run: " + ", ".join(
        f"{name} {value / 1e9:,.0f} GB/s" if name == "copy" else f"{name} {value / size:,.1f} {unit}"
        for name, value in result.facts["ceilings"].items()
    )


def section(result, link):
    """One bench of results/README.md. `link(name)` is the path of a picture as seen from there."""
    titles = {
        "train": "Training steps", "train-compiled": "Training steps, compiled", "curves": "Loss curves",
        "host": "Host time of a call",
    }  # fmt: skip
    title = titles.get(result.bench, result.bench.replace("_", " ").capitalize())
    lines = [f"### {title}{f', {result.label}' * bool(result.label)}", "", provenance(result), ""]
    if result.bench in SHAPES:
        unit = next((r["unit"] for r in result.rows), "")
        share = best_share(result)
        lines += [f"{unit} at the median; bold is the best of a line. {ceilings(result)}.{share}", ""]
        lines += [speed_table(result), "", "Peak memory in MiB, inputs included:", ""]
        lines += [speed_table(result, "peak_mib", lowest=True)]
    elif result.bench == "curves":
        lines += [curves_words(result), "", curves_table(result)] if result.judged else []
    elif result.bench == "host":
        lines += [host_words(result), "", host_table(result)]
    else:
        lines += [f"MFU = {result.facts['mfu_formula']}. {ceilings(result)}.", "", train_table(result)]
    lines += causes(result)
    for name in pictures(result):
        lines += ["", f"![{name}]({link(result.folder / name)})"]
    return "\n".join(lines)


def causes(result):
    """What the words in place of a figure mean."""
    found = sorted({r.get("status") for r in result.rows} & set(CAUSES))
    return ["", "; ".join(f"{status}: {CAUSES[status]}" for status in found) + "."] if found else []


def best_share(result):
    """The highest share of its ceiling that anyone reaches, in words."""
    if not result.timed:
        return ""
    row = max(result.timed, key=lambda r: r["share"])
    shape = ", ".join(f"{k} {row[k]}" for k in SHAPES[result.bench])
    return f" The highest share of its ceiling: {row['provider']}, {row['share']:.0%} ({shape})."


def results_page(found, folder):
    """The text of results/README.md."""
    parts = ["# Results", "", "Written by `python bench/report.py` from the CSVs beside it; nothing is typed by hand."]
    for name in dict.fromkeys(r.folder for r in found):
        own = [r for r in found if r.folder == name]
        parts += ["", f"## {own[0].facts['device'] if not own[0].on_cpu else own[0].facts['cpu'] + ' (CPU)'}"]
        parts += ["\n" + section(result, lambda path: path.relative_to(folder).as_posix()) for result in own]
        roofline = name / "roofline.png"
        if any(r.timed and r.bench in SHAPES and not r.label for r in own):
            parts += ["", "### Roofline", "", f"![roofline]({roofline.relative_to(folder).as_posix()})"]
    return "\n".join([*parts, *machine_code(folder)]) + "\n"


def machine_code(folder):
    """Lines of results/README.md on what the compile report published."""
    reports = {path.parent.name: table.read_csv(path) for path in sorted(folder.glob("compiled/*/report.csv"))}
    if not reports:
        return []
    header = ["GPU architecture", "kernels", "configurations", "spilling", "most bytes", "where", "made"]
    lines = []
    for arch, rows in reports.items():
        spilling = [row for row in rows if row["spill_bytes"]]
        most = max(spilling, key=lambda row: row["spill_bytes"], default=None)
        where = f"{most['kernel'].removesuffix('_kernel')} of {most['case']}" if most else ""
        counts = len({row["kernel"] for row in rows}), len(rows), len(spilling), most["spill_bytes"] if most else 0
        facts = json.loads((folder / "compiled" / arch / "report.json").read_text())
        made = f"{facts['date'][:10]}, {facts['commit']}, triton {facts['packages']['triton']}"
        lines.append([f"[{arch}](compiled/{arch}/report.csv)", *counts, where, made])
    made = "Each made by `python bench/compile_report.py --arch NAME --publish` at the commit that its row names."
    parts = ["", "## Machine code, compiled without a GPU", "", made, "", markdown(header, lines)]
    matrix = folder / "compiled" / "matrix.csv"
    if matrix.is_file():
        rows = table.read_csv(matrix)
        parts += [
            "",
            "The core configurations with three of the supported Tritons ([faults](compiled/matrix.json)):",
            "",
        ]
        parts += [markdown(list(rows[0]), [list(row.values()) for row in rows])]
    return parts


def readme_region(found, root):
    """What the project's README shows: the first device's attention and training figures."""
    first = [r for r in found if r.folder == found[0].folder and not r.label]
    parts = []
    for result in first:
        picture = result.folder / f"{result.bench}.png"
        if result.bench == "attention":
            parts += [f"Causal attention, {result.rows[0]['unit']}. {ceilings(result)}. {provenance(result)}"]
            parts += [
                "",
                speed_table(result),
                *causes(result),
                "",
                f"![attention]({picture.relative_to(root).as_posix()})",
                "",
            ]
        elif result.bench in ("train", "train-compiled"):
            parts += [f"Whole training steps{', compiled' * ('compiled' in result.bench)}. {provenance(result)}"]
            parts += ["", train_table(result), ""]
    others = (found[0].folder.parent / "README.md").relative_to(root).as_posix()
    return "\n".join([*parts, f"All tables, memory, row kernels and the roofline: [{others}]({others})."])


def replace_region(text, region):
    """`text` with what stands between the markers replaced."""
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{region}\n{END}{rest.split(END, 1)[1]}"


def digest(result):
    """Ours beside the fastest other, one line per shape: for the end of a run."""
    for v in result.judged:
        verdict = "within" if v["within"] else "OUTSIDE"
        share = "nothing to compare" if v["ratio"] is None else f"{v['ratio']:.2g} of it"
        yield f"curves {result.facts['preset']}: {v['provider']} {verdict} the spread of seeds, {share}"
    kernels = result.bench in SHAPES
    speed = "rate" if kernels else "tokens_per_s"
    keys = (
        dict.fromkeys(("op", "dtype", *SHAPES[result.bench], *result.keys)) if kernels else ("bench", "preset", "seq")
    )
    shapes = {}
    for row in result.timed:
        shapes.setdefault(tuple(row[k] for k in keys), []).append(row)
    for shape, rows in shapes.items():
        ours = [r for r in rows if "triton" in r["provider"].split("+")]
        peers = [r for r in rows if "triton" not in r["provider"]]
        if ours and peers:
            best, peer = (max(group, key=lambda r: r[speed]) for group in (ours, peers))
            yield (
                f"{' '.join(map(str, shape))}: {best['provider']} {best[speed]:,.1f} {best.get('unit', 'tokens/s')}, "
                f"{best[speed] / peer[speed]:.2f} x {peer['provider']} ({peer[speed]:,.1f})"
            )


def pictures(result):
    """Names of the pictures drawn for a bench."""
    if not (result.timed or result.judged):
        return []
    memory = [f"{result.name}-memory.png"] if result.bench in ("attention", "linear_cross_entropy") else []
    return [f"{result.name}.png", *memory]


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--results", default=str(ROOT / "results"), metavar="DIR")
    p.add_argument("--readme", default=str(ROOT / "README.md"), metavar="FILE", help="rewritten for results/ alone")
    args = p.parse_args(argv)
    folder = Path(args.results).resolve()
    found = load(folder)
    if not found:
        print(f"error: {args.results} holds no results; run a bench with --publish first", file=sys.stderr)
        return 2
    readme = Path(args.readme).resolve()
    text = readme.read_text() if folder == readme.parent / "results" else None
    if text is not None and (BEGIN not in text or END not in text):
        print(f"error: {readme.name} lacks the markers {BEGIN} and {END}", file=sys.stderr)
        return 2
    from bench import plots

    for path in plots.draw_all(found):
        print(f"drew {path}")
    table.write_whole(folder / "README.md", results_page(found, folder))
    print(f"wrote {folder / 'README.md'}")
    if text is not None:
        table.write_whole(readme, replace_region(text, readme_region(found, readme.parent)))
        print(f"wrote the tables of {readme}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
