"""The pictures of results/: colours that colour-blind readers can tell apart, each with a marker of its own, and one
provider looks the same in every picture. Ours is the thick vermilion line."""

import itertools
import os

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench import spread

# Okabe and Ito's palette without its yellow, which is too pale on white
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"),
)
GREY = "#767676"
STYLES = {  # provider: colour, marker, line
    "reference": (BLACK, "o", "-"),
    "compiled": (GREY, "v", "-"),
    "torch": (BLUE, "s", "-"),
    "sdpa": (BLUE, "s", "-"),
    "sdpa-math": (GREY, "s", ":"),
    "sdpa-flash": (SKY, "^", "--"),
    "sdpa-efficient": (SKY, "D", ":"),
    "sdpa-cudnn": (GREEN, "P", "-"),
    "flex": (ORANGE, "X", "-"),
    "triton-softmax": (VERMILION, "o", ":"),
    "triton": (VERMILION, "*", "-"),
    "xformers": (PURPLE, "h", ":"),
    "flash-attn-2": (PURPLE, "<", "--"),
    "flash-attn-3": (PURPLE, ">", "-"),
    "flash-attn-4": (PURPLE, "d", "-."),
    "fla": (ORANGE, "p", ":"),
    "liger": (PURPLE, "D", "-"),
    "quack": (GREEN, "P", "-"),
}
SPARE = list(itertools.product((ORANGE, GREEN, BLUE, PURPLE), ("H", "8", "1", "2"), ("-.",)))
AXES = {"seq": "sequence length", "length": "row length", "classes": "classes"}
PANEL, HEADER = (4.3, 3.2), 0.65  # inches


def draw_all(found):
    """Draw every picture of a list of bench/report.py's Results; the paths."""
    for result in found:
        if result.timed and result.bench == "attention":
            x = "batch" if "batch" in result.keys and "seq" not in result.keys else "seq"
            yield by_length(result, x, "rate", f"{result.name}.png", panels=("head_dim", "mode"))
            yield by_length(result, x, "peak_mib", f"{result.name}-memory.png", panels=("head_dim", "mode"))
        elif result.timed and result.bench in ("softmax", "layernorm", "cross_entropy"):
            yield by_length(result, "length", "rate", f"{result.name}.png", panels=("op", "mode"))
        elif result.timed and result.bench == "linear_cross_entropy":
            yield by_length(result, "classes", "rate", f"{result.name}.png", panels=("tokens", "mode"))
            yield by_length(result, "classes", "peak_mib", f"{result.name}-memory.png", panels=("tokens", "mode"))
        elif result.bench == "curves" and result.judged:
            yield loss_curves(result)
        elif result.timed:
            yield training_bars(result)
    for folder in dict.fromkeys(r.folder for r in found):
        own = [r for r in found if r.folder == folder and r.timed and "ceilings" in r.facts and not r.label]
        own = [r for r in own if not r.bench.startswith("train")]
        if own:
            yield roofline(folder, own)


def style(provider):
    """Colour, marker and line of a provider; of one we do not know, always the same ones too."""
    return STYLES.get(provider) or SPARE[sum(map(ord, provider)) % len(SPARE)]


def new_figure(width, height, rows, columns, title, subtitle, **options):
    """A figure of width x height inches under a title, and its grid of axes."""
    figure = Figure(figsize=(width, height + HEADER), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top = height + HEADER
    figure.get_layout_engine().set(rect=(0, 0, 1, height / top), h_pad=0.08, w_pad=0.08)
    figure.text(0.12 / width, 1 - 0.1 / top, title, va="top", fontsize=13, fontweight="bold")
    figure.text(0.12 / width, 1 - 0.38 / top, subtitle, va="top", fontsize=8.5, color=GREY)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def finish(figure, path):
    """Write a figure whole."""
    partial = f"{path}.partial"
    figure.savefig(partial, format="png", metadata={"Software": None})
    os.replace(partial, path)
    return path


def tidy(axes):
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)


def add_legend(figure, providers, extra=(), lines=True):
    handles = [
        Line2D([], [], color=c, marker=m, linestyle=line * lines, label=p, markersize=5 + 4 * (p == "triton"))
        for p, (c, m, line) in ((p, style(p)) for p in providers)
    ]
    figure.legend(handles=[*handles, *extra], loc="outside right center", frameon=False, fontsize=9)


def where(result):
    facts = result.facts
    return f"{facts['cpu'] if result.on_cpu else facts['device']}, {facts['date'][:10]}, commit {facts['commit']}"


# ---- lines by length -------------------------------------------------------------------------------------------------


def by_length(result, x, value, name, panels):
    """One panel per combination of `panels`: `value` by sequence or row length, a line per provider."""
    down, across = ([*dict.fromkeys(r[p] for r in result.timed)] for p in panels)
    what = "peak memory, MiB" if value == "peak_mib" else result.timed[0]["unit"]
    dtype = ", ".join(dict.fromkeys(r["dtype"] for r in result.timed))
    size = PANEL[0] * len(across) + 1.7, PANEL[1] * len(down) + 0.2
    title = f"{result.name.replace('-', ', ')}, {dtype}: {what}"
    figure, grid = new_figure(*size, len(down), len(across), title, where(result))
    providers = [
        p for p in dict.fromkeys(r["provider"] for r in result.rows) if p in {r["provider"] for r in result.timed}
    ]
    for axes, (row, column) in zip(grid.flat, itertools.product(down, across), strict=True):
        rows = [r for r in result.timed if r[panels[0]] == row and r[panels[1]] == column]
        for provider in providers:
            points = sorted((r[x], r[value]) for r in rows if r["provider"] == provider)
            colour, marker, line = style(provider)
            ours = provider == "triton"
            axes.plot(
                *zip(*points, strict=True) if points else ([], []),
                color=colour,
                marker=marker,
                linestyle=line,
                linewidth=2.8 if ours else 1.4,
                markersize=10 if ours else 5,
                zorder=3 if ours else 2,
            )
        panel_axes(axes, result, rows, x, value)
        axes.set_title(
            " ".join(f"{label(p)} {v}".strip() for p, v in zip(panels, (row, column), strict=True)), fontsize=10
        )
    for axes in grid[-1]:
        axes.set_xlabel(AXES.get(x, x), fontsize=9)
    add_legend(figure, providers, ceiling_handle(result, value))
    return finish(figure, result.folder / name)


def label(panel):
    return {"head_dim": "D", "tokens": "tokens"}.get(panel, "")


def panel_axes(axes, result, rows, x, value):
    """Scales and the ceiling of one panel."""
    axes.set_xscale("log", base=2)
    lengths = sorted({r[x] for r in rows})
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.minorticks_off()
    if value == "peak_mib":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda mib, _: f"{mib:,.0f}")
    else:
        if result.rows[0]["unit"] == "GB/s":
            axes.axhline(result.facts["ceilings"]["copy"] / 1e9, color=BLACK, linestyle=(0, (2, 2)), linewidth=1)
        axes.set_ylim(bottom=0)
    tidy(axes)


def ceiling_handle(result, value):
    if value == "peak_mib" or result.rows[0]["unit"] != "GB/s":
        return []
    return [Line2D([], [], color=BLACK, linestyle=(0, (2, 2)), linewidth=1, label="a large copy")]


# ---- bars and the roofline -------------------------------------------------------------------------------------------


def training_bars(result):
    """Tokens per second, a bar per contestant with its p20 to p80, a group per sequence length."""
    lengths = list(dict.fromkeys(r["seq"] for r in result.timed))
    first = result.timed[0]
    title = f"{first['preset']}{', compiled' * ('compiled' in result.bench)}, {first['dtype']}: training tokens/s"
    most = max(sum(r["seq"] == n for r in result.timed) for n in lengths)
    height = 0.5 + (0.42 * most + 0.45) * len(lengths)
    figure, grid = new_figure(8, height, len(lengths), 1, title, where(result), sharex=True)
    for axes, seq in zip(grid[:, 0], lengths, strict=True):
        rows = [r for r in result.timed if r["seq"] == seq][::-1]
        speeds = [r["tokens_per_s"] for r in rows]
        tokens = [r["batch"] * seq * 1e3 for r in rows]
        slow = [s - t / r["p80_ms"] for s, t, r in zip(speeds, tokens, rows, strict=True)]
        fast = [t / r["p20_ms"] - s for s, t, r in zip(speeds, tokens, rows, strict=True)]
        names = [f"{r['attn']} attention, {r['norm']} norm, {r.get('loss') or 'torch'} loss" for r in rows]
        colours = [style(r["attn"])[0] for r in rows]
        axes.barh(names, speeds, xerr=[slow, fast], color=colours, height=0.62, error_kw={"ecolor": GREY, "capsize": 3})
        for i, speed in enumerate(speeds):
            inside = {"ha": "left", "va": "center", "fontsize": 9, "color": "white", "fontweight": "bold"}
            axes.annotate(f"{speed:,.0f}", (0, i), xytext=(6, 0), textcoords="offset points", **inside)
        axes.set_title(f"sequence length {seq}, batch {rows[0]['batch']}", fontsize=10, loc="left")
        tidy(axes)
        axes.grid(axis="y", visible=False)
    grid[-1, 0].xaxis.set_major_formatter(lambda speed, _: f"{speed:,.0f}")
    grid[-1, 0].set_xlabel("tokens per second at the median, from p20 to p80", fontsize=9)
    return finish(figure, result.folder / f"{result.name}.png")


def roofline(folder, found):
    """Rate by arithmetic intensity under the two ceilings: each provider's best of every op and mode."""
    figure, grid = new_figure(9, 4.8, 1, 1, "Roofline", where(found[0]))
    axes = grid[0, 0]
    copy = max(r.facts["ceilings"]["copy"] for r in found)
    attention = [r for r in found if r.bench == "attention"] or found
    dtype = attention[0].timed[0]["dtype"]
    matmul = attention[0].facts["ceilings"][f"matmul {dtype}"]
    best, points = {}, []
    for row in (row for r in found for row in r.timed if row["dtype"] == dtype):
        key = row["op"], row["mode"], row["provider"]
        if key not in best or row["share"] > best[key]["share"]:
            best[key] = row
    for (op, mode, provider), row in best.items():
        colour, marker, _ = style(provider)
        point = row["flops"] / row["bytes"], row["flops"] / (row["p50_ms"] / 1e3)
        points.append((*point, f"{op.removeprefix('causal_')} {mode}"))
        axes.plot(*point, color=colour, marker=marker, markersize=11 if provider == "triton" else 6, linestyle="")
    left, right = min(p[0] for p in points) / 3, max(max(p[0] for p in points), matmul / copy) * 3
    axes.plot([left, matmul / copy, right], [left * copy, matmul, matmul], color=BLACK, linewidth=1.5, zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for what in dict.fromkeys(p[2] for p in points):
        x, y = max((p[:2] for p in points if p[2] == what), key=lambda p: p[1])
        side = {"xytext": (-7, 5), "ha": "right"} if what.endswith("fwd") else {"xytext": (8, -3), "ha": "left"}
        axes.annotate(what, (x, y), textcoords="offset points", fontsize=8, color=GREY, **side)
    axes.set_xlabel("FLOP per byte (least bytes possible)", fontsize=9)
    axes.set_ylabel("FLOP/s", fontsize=9)
    axes.set_title(f"roofs: copy {copy / 1e9:,.0f} GB/s, {dtype} matmul {matmul / 1e12:,.3g} TFLOP/s", fontsize=9)
    tidy(axes)
    add_legend(figure, list(dict.fromkeys(key[2] for key in best)), lines=False)
    return finish(figure, folder / "roofline.png")


# ---- loss curves -----------------------------------------------------------------------------------------------------

LEAST = 1e-5  # nats: losses are stored with six digits


def loss_curves(result):
    """Losses over steps, and below how far each run lies from the reference of its seed, beside the other seed's."""
    facts = result.facts
    title = f"{facts['preset']}, {result.rows[0]['dtype']}: loss by kind of attention, without dropout"
    options = {"sharex": True, "height_ratios": [3, 2.4]}
    figure, ((above,), (below,)) = new_figure(9.5, 6.2, 2, 1, title, where(result), **options)
    runs = spread.runs_of(result.rows)
    seed, other = facts["seeds"]
    base, second = runs.pop((spread.BASE, seed)), runs.pop((spread.BASE, other))
    draw_run(above, second, GREY, 1.4, "-")
    draw_run(above, base, BLACK, 3 + 1.2 * len(runs), "-", alpha=0.3)
    band = [(step, max(abs(d), LEAST)) for step, d in spread.differences(second, base, "train_loss")]
    below.fill_between(*zip(*band, strict=True), LEAST, color=GREY, alpha=0.25, linewidth=0)
    draw_distance(below, second, base, GREY, "-")
    handles = [Line2D([], [], color=BLACK, alpha=0.3, linewidth=5, label=f"reference, seed {seed}")]
    handles += [Line2D([], [], color=GREY, label=f"reference, seed {other}")]
    for left, ((provider, _), run) in zip(range(len(runs), 0, -1), runs.items(), strict=True):
        colour, _, line = style(run[0]["attn"] if run[0]["norm"] == "reference" else provider)
        draw_run(above, run, colour, 1.2 * left, line)  # where curves coincide, the one below shows at the sides
        draw_distance(below, run, base, colour, line)
        handles += [Line2D([], [], color=colour, linestyle=line, label=provider.removesuffix("+reference"))]
    handles += [Line2D([], [], color=GREY, marker="o", markersize=4, linestyle="", label="validation")]
    handles += [Patch(color=GREY, alpha=0.25, linewidth=0, label=f"nearer than seed {other}")]
    above.set_ylabel("loss, nats per token", fontsize=9)
    below.set_ylabel(f"distance from the reference, seed {seed}", fontsize=9)
    below.set_yscale("log")
    below.set_ylim(bottom=LEAST)
    below.set_xlabel("step", fontsize=9)
    for axes in (above, below):
        tidy(axes)
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    return finish(figure, result.folder / "curves.png")


def draw_run(axes, run, colour, width, line, **look):
    """Training losses as a line, validation losses as points."""
    axes.plot([r["step"] for r in run], [r["train_loss"] for r in run], line, color=colour, linewidth=width, **look)
    evaluated = [r for r in run if r["val_loss"] is not None]
    axes.plot(
        [r["step"] for r in evaluated], [r["val_loss"] for r in evaluated], "o", color=colour, ms=width + 2, **look
    )


def draw_distance(axes, run, base, colour, line):
    """The same for the differences of two runs, without their sign; LEAST stands for all that is smaller."""
    for column, look in (("train_loss", {"linestyle": line}), ("val_loss", {"marker": "o", "ms": 4, "linestyle": ""})):
        points = [(step, max(abs(d), LEAST)) for step, d in spread.differences(run, base, column)]
        axes.plot(*zip(*points, strict=True) if points else ([], []), color=colour, linewidth=1.4, **look)
