"""What a run reports: rows of metrics.csv, the loss curve, FLOPs per token and model FLOPs utilization."""

import math
import os
import re
import sys

import torch

from gptlib.errors import UserError, writing

COLUMNS = (
    "step",
    "tokens",
    "train_loss",
    "val_loss",
    "bits_per_byte",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "peak_memory_mb",
)
HEADER, END = ",".join(COLUMNS), "\r\n"

# Dense bf16 tensor-core peaks from the vendor's data sheets, in FLOP/s, by pattern of torch.cuda.get_device_name().
PEAK_FLOPS = {
    r"A100": 312e12,
    r"H100.*HBM3$": 989e12,
    r"H100 PCIe$": 756e12,
    r"H200$": 989e12,
    r"L40S$": 362e12,
    r"RTX 4090$": 165e12,
}

MFU_FORMULA = "(6 N + 12 L C T) x tokens/s / dense bf16 peak, N without position embeddings (PaLM, appendix B)"


def flops_per_token(model, T, *, causal_half=False):
    """Floating-point operations of forward and backward for one token in a sequence of T.

    6 for each parameter that multiplies (position embeddings and an untied token embedding are looked up, not
    multiplied) and 12 L C T for q k^T and the weighted sum of v; `causal_half` counts only the half below the diagonal.
    """
    cfg = model.cfg
    N = model.n_params() - model.pos_emb.weight.numel()
    if not cfg.tie_weights:
        N -= model.tok_emb.weight.numel()
    attention = 12 * cfg.n_layers * cfg.emb_dim * T
    return 6 * N + (attention / 2 if causal_half else attention)


def peak_flops(device_name):
    """FLOP/s of a GPU by its name, or None if it is not in the table."""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, device_name)), None)


def mfu(model, T, tokens_per_s, device):
    """Share of the device's peak that the model's own arithmetic reaches, or None where the peak is not known."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if peak is None else flops_per_token(model, T) * tokens_per_s / peak


def bits_per_byte(loss, n_tokens, n_bytes):
    """A loss in nats per token as bits per byte of the text: comparable between tokenizers."""
    return loss / math.log(2) * n_tokens / n_bytes


def peak_memory_mb(device):
    """Peak of the allocated GPU memory since its last reset, or of this process's resident memory on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class MetricsFile:
    """metrics.csv: one row per report, appended as it comes. Rows beyond `last_step` (of a run resumed) are dropped."""

    def __init__(self, path, last_step=0):
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= last_step] if os.path.exists(path) else []
        partial = f"{path}.partial"
        with writing(path):
            with open(partial, "w", newline="") as f:
                f.writelines([HEADER + END, *map(_line, kept)])
            os.replace(partial, path)

    def append(self, **row):
        """One value per column, None where nothing was measured."""
        with writing(self.path), open(self.path, "a", newline="") as f:
            f.write(_line(row))


def read_metrics(path):
    """The rows of metrics.csv: numbers by column name, None for an empty cell.

    A last row that was cut off, as by a power cut, is left out. UserError for a file that is damaged otherwise.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}; move it away to go on") from e
    *lines, cut_off = text.split("\n")
    if not lines and HEADER.startswith(cut_off):
        return []
    if not lines or lines[0] != HEADER:
        raise UserError(f"{path} does not begin with the columns step, tokens ... of a run; move it away to go on")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(_row(line))
        except ValueError as e:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is damaged ({e}); take that line out to go on") from e
    return rows


def _row(line):
    """The numbers of one line; ValueError if it is no whole row."""
    cells = line.split(",")
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} cells, not {len(COLUMNS)}")
    row = dict(zip(COLUMNS, map(_number, cells), strict=True))
    if not isinstance(row["step"], int):
        raise ValueError(f"step {cells[0]!r}")
    return row


def _line(row):
    return ",".join(_cell(row[name]) for name in COLUMNS) + END


def _cell(value):
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _number(cell):
    if not cell:
        return None
    return int(cell) if re.fullmatch(r"-?\d{1,18}", cell) else float(cell)


def draw_loss_curve(rows, path, *, unigram_entropy, title):
    """loss.png: training and validation loss by step, and what predicting by frequency alone would reach."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [r for r in rows if r["train_loss"] is not None]
    evaluated = [r for r in rows if r["val_loss"] is not None]
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(unigram_entropy, color="#8a8a8a", linewidth=1.2, linestyle=(0, (5, 4)))
    axes.annotate(
        f"unigram entropy {unigram_entropy:.2f}",
        (1, unigram_entropy),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        color="#666666",
    )
    axes.plot(*_series(trained, "train_loss"), color="#9dc3e6", linewidth=1.6, label="training")
    axes.plot(
        *_series(evaluated, "val_loss"), color="#1f4e79", linewidth=2, marker="o", markersize=4, label="validation"
    )
    if evaluated:
        last = evaluated[-1]
        axes.annotate(
            f"{last['val_loss']:.2f}",
            (last["step"], last["val_loss"]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color="#1f4e79",
            fontweight="bold",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    partial = f"{path}.partial"
    with writing(path):
        figure.savefig(partial, format="png")
        os.replace(partial, path)


def _series(rows, column):
    return [r["step"] for r in rows], [r[column] for r in rows]
