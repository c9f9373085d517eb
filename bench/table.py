"""Rows on the screen and on disk: aligned tables with the best of each line marked, CSV and JSON written whole."""

import csv
import io
import json
import os
import re
from pathlib import Path

BEST = "*"


def align(header, lines):
    """Columns of equal width, the first ones (text) to the left and numbers to the right."""
    cells = [[str(c) for c in header], *([str(c) for c in line] for line in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    numeric = [all(_looks_numeric(line[i]) for line in cells[1:]) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)).rstrip()
        for line in cells
    )


def compare_providers(rows, keys, value, *, lowest=False, digits=1):
    """A table with a line per distinct `keys` and a column per provider, the best `value` of each line marked with *.

    A cell without a value shows the row's status.
    """
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), {})[row["provider"]] = row
    lines = []
    for group, by_provider in groups.items():
        values = {p: row[value] for p, row in by_provider.items() if row.get(value) is not None}
        best = f"{(min if lowest else max)(values.values()):.{digits}f}" if values else None
        cells = []
        for provider in providers:
            if provider in values:
                cell = f"{values[provider]:.{digits}f}"
                cells.append(cell + (BEST if cell == best else " "))
            else:
                cells.append((by_provider[provider]["status"] if provider in by_provider else "-") + " ")
        lines.append([*group, *cells])
    return align([*keys, *(p + " " for p in providers)], lines)


def folder_name(device_name):
    """A device's folder under results/: "h100-80gb-hbm3" for "NVIDIA H100 80GB HBM3", "cpu" for "CPU"."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    return "-".join(w for w in words if w not in ("nvidia", "amd", "geforce"))


def write_csv(path, rows, columns):
    """All rows under fixed columns; floats with six digits, missing values empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(_csv_cell(row.get(c)) for c in columns)
    write_whole(path, text.getvalue())


def read_csv(path):
    """Rows as dicts with numbers where a cell is one and None where it is empty."""
    with open(path, newline="") as file:
        return [{k: _parse(v) for k, v in row.items()} for row in csv.DictReader(file)]


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=2) + "\n")


def write_whole(path, text):
    """Replace a file in one step, so that a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _csv_cell(value):
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _parse(text):
    if text == "" or text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return int(text) if text.lstrip("-").isdigit() else number


def _looks_numeric(cell):
    return cell.strip().rstrip("*%").replace(".", "", 1).lstrip("-").isdigit() or cell.strip() in ("", "-", "n/a")
