"""What a kernel bench leaves behind: CSV and JSON after every row, tables and notes at the end."""

from pathlib import Path

from bench import environment, table

MEASURED = ["status", "p20_ms", "p50_ms", "p80_ms", "rate", "unit", "share", "peak_mib"]
CHECKED = ["checked_at", "max_error", "error_bound", "flops", "bytes", "device", "note"]
UNITS = {"TFLOP/s": (1e12, "flops"), "GFLOP/s": (1e9, "flops"), "GB/s": (1e9, "bytes")}  # size, column of the work


def rate_unit(bound, device):
    """The unit in which a rate of `bound` ("flops" or "bytes") is a number of readable size on `device`."""
    return "GB/s" if bound == "bytes" else "TFLOP/s" if device.type == "cuda" else "GFLOP/s"


def save(folder, name, rows, columns, facts):
    """<folder>/<name>.csv and .json, each replaced whole."""
    base = Path(folder) / name
    table.write_csv(base.with_suffix(".csv"), rows, columns)
    table.write_json(base.with_suffix(".json"), facts)


def file_name(bench, label):
    """What the files of a run are called, without suffix: "attention", or "attention-gpt2" of a labelled run."""
    return f"{bench}-{label}" if label else bench


def ceiling_lines(ceilings, device):
    """What the ceilings of a run are, one line each."""
    for name, value in ceilings.items():
        unit = rate_unit("bytes" if name == "copy" else "flops", device)
        yield f"ceiling, measured in this run: {name} {value / UNITS[unit][0]:.1f} {unit}"


class Report:
    """Where rows go: CSV and JSON after every row, tables at the end."""

    def __init__(self, bench, device, args, shape_columns):
        self.bench, self.args, self.device = bench, args, device
        self.shape = [c for c in shape_columns if c != "op"]
        self.columns = ["bench", "op", "provider", "mode", *self.shape, *MEASURED, *CHECKED]
        self.name = file_name(bench.name, args.label)
        self.facts = {"bench": bench.name, "complete": False, **environment.describe(device, args.commit)}
        self.done = []

    def save(self, rows, folder=None):
        save(folder or self.args.out, self.name, [*self.done, *rows], self.columns, self.facts)

    def finish_op(self, op, rows):
        self.done += rows
        varying = [c for c in self.shape if len({row[c] for row in rows}) > 1]
        fixed = "  ".join(f"{c} {rows[0][c]}" for c in self.shape if c not in varying)
        keys = [*varying, "mode"]
        print(
            f"\n{op} on {rows[0]['device']}: {rows[0]['unit']} at the median, {table.BEST} best of a line.  {fixed}\n"
        )
        print(table.compare_providers(rows, keys, "rate", digits=1))
        print("\npeak memory, MiB, inputs included\n")
        print(table.compare_providers(rows, keys, "peak_mib", lowest=True))
        for line in notes(rows):
            print(line)

    def trace_path(self, op):
        return Path(self.args.out) / f"{self.name}-{op}-trace.json"

    def show_profile(self, op, top):
        print(f"\n{top}\ntrace of the last shape, for chrome://tracing or ui.perfetto.dev: {self.trace_path(op)}")

    def show_compiled(self, archs, compile_cases):
        """What the compiler makes of our kernels for `archs`: read off machine code, with no such GPU, not measured."""
        from bench import compile_report

        rows = compile_report.compile_all(archs, cases=list(compile_cases))
        print(
            "\ncompiled in bf16, read off the machine code and not measured (columns: docs/performance.md, Bounds):\n"
        )
        print(compile_report.show(rows))
        self.facts.setdefault("compiled", []).extend(rows)

    def finish(self):
        self.facts["complete"] = True
        self.save([])
        if self.args.publish:
            self.save([], environment.results_folder(self.device))
        print()
        for line in [*ceiling_lines(self.facts["ceilings"], self.device), *self.facts["missing"]]:
            print(line)
        if self.device.type == "cpu":
            print(
                "No GPU here: these are CPU times, and Triton kernels were checked in the interpreter, not timed. "
                "On a GPU the same command times them beside every peer; `make gpu` runs all benches."
            )
        print(f"wrote {self.args.out}/{self.name}.csv and .json")


def notes(rows):
    """One line per provider and status worth a word: why it was refused, or how exact it is."""
    lines = {}
    for row in rows:
        if row["status"] == "parity":
            lines[row["provider"], "parity"] = (
                f"{row['provider']}: parity only, in the interpreter at {row['checked_at']}: "
                f"largest error {row['max_error']:.2e}, allowed {row['error_bound']:.2e}"
            )
        elif row["status"] != "ok":
            lines.setdefault(
                (row["provider"], row["status"]), f"{row['provider']} {row['mode']}: {row['status']}: {row['note']}"
            )
    return lines.values()
