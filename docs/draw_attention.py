"""Draw docs/attention-tiles.png: which tiles of the score matrix the kernels visit, asked of the kernels' own code.

python docs/draw_attention.py
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # a drawing needs no GPU
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import torch
import triton
import triton.language as tl

from kernels import _runtime
from kernels.attention.tiles import key_ranges

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Rectangle

BLOCK_Q, BLOCK_K = 32, 16
SKIPPED, WHOLE, CUT = "#eeeeee", "#4477aa", "#ee9944"
CASES = {  # title: (Tq, Tk, window, document bounds)
    "causal": (128, 128, 0, None),
    "new tokens against a cache\nTq = 64, Tk = 128": (64, 128, 0, None),
    "sliding window of 40": (128, 128, 40, None),
    "documents of 50, 20, 58": (128, 128, 0, (0, 50, 70, 128)),
}


@triton.jit
def ranges_kernel(
    out_ptr, doc_start_ptr, Tq, Tk, window,
    HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    start, whole, cut, end = key_ranges(
        block * BLOCK_Q, doc_start_ptr, Tq, Tk, window, HAS_WINDOW, HAS_DOCS, BLOCK_Q, BLOCK_K
    )
    tl.store(out_ptr + 4 * block, start)
    tl.store(out_ptr + 4 * block + 1, whole)
    tl.store(out_ptr + 4 * block + 2, cut)
    tl.store(out_ptr + 4 * block + 3, end)


def first_of_document(bounds, tokens):
    """The first token of each token's document, (tokens,) int32, or None."""
    if bounds is None:
        return None
    bounds = torch.tensor(bounds, dtype=torch.int32)
    return bounds[torch.searchsorted(bounds, torch.arange(tokens, dtype=torch.int32), right=True) - 1]


def ranges(Tq, Tk, window, bounds):
    """(start, whole, cut, end) for each block of queries, as the kernels compute them."""
    out = torch.empty(-(-Tq // BLOCK_Q), 4, dtype=torch.int32)
    flags = {"HAS_WINDOW": window > 0, "HAS_DOCS": bounds is not None}
    doc_start = first_of_document(bounds, Tk)
    _runtime.launch(
        ranges_kernel, (len(out),), out, doc_start, Tq, Tk, window, **flags, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K
    )
    return out.tolist()


def draw(axes, title, Tq, Tk, window, bounds):
    for block, (start, whole, cut, end) in enumerate(ranges(Tq, Tk, window, bounds)):
        for key in range(0, Tk, BLOCK_K):
            color = WHOLE if whole <= key < cut else CUT if start <= key < end else SKIPPED
            axes.add_patch(Rectangle((key, block * BLOCK_Q), BLOCK_K, BLOCK_Q, facecolor=color, edgecolor="white"))
    queries = torch.arange(Tq)
    last = queries + Tk - Tq + 1
    first = torch.zeros(Tq) if window == 0 else (last - window).clamp(min=0)
    if bounds is not None:
        first = torch.maximum(first, first_of_document(bounds, Tk))
    edge = {"color": "black", "linewidth": 1, "where": "pre"}
    for keys in (first, last):
        steps = torch.cat([keys[:1], keys])
        axes.step(steps, torch.arange(Tq + 1), **edge)
    axes.set(xlim=(0, Tk), ylim=(Tq, 0), aspect="equal", title=title, xlabel="keys", ylabel="queries")
    axes.set_xticks([0, Tk // 2, Tk])
    axes.set_yticks([0, Tq // 2, Tq])


def main():
    figure, panels = plt.subplots(1, len(CASES), figsize=(13, 3.9), layout="constrained")
    for axes, (title, case) in zip(panels, CASES.items(), strict=True):
        draw(axes, title, *case)
    names = {"seen whole: no mask": WHOLE, "cut by an edge: masked": CUT, "never loaded": SKIPPED}
    handles = [Patch(facecolor=color, label=name) for name, color in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    path = Path(__file__).with_name("attention-tiles.png")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
