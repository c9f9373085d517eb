"""Draw docs/rows-reduction.png: which program sums which part of dw, as observed while the kernels ran.

python docs/draw_rows.py
"""

import os
import sys
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # a drawing needs no GPU
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import torch
from triton.runtime.interpreter import interpreter_builder

from kernels import _tuning, layernorm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS, N = 40, 128
TABLES = {  # four programs, tiles of four rows
    "rows that fit in a program": _tuning.RowTable(((N, 512, 16),), (4, 128, 16)),
    "longer rows, split by columns": _tuning.RowTable((), (4, 64, 16)),
}


def observe(table):
    """Which program wrote each element of dh (rows, N) and of the partial sums of dw (P, N), run with `table`."""
    stores, seen, launch, store = [], {}, layernorm.launch, interpreter_builder.create_masked_store

    def watch_launch(kernel, grid, *args, **options):
        if kernel is layernorm.norm_backward_kernel:
            seen.update(dh=args[6], partials=args[7], grid=grid)
        stores.clear()
        launch(kernel, grid, *args, **options)

    def watch_store(pointers, value, mask, *args):
        addresses, mask = np.broadcast_arrays(pointers.data, mask.data)
        stores.append((tuple(interpreter_builder.grid_idx[:2]), addresses[mask].astype(np.int64)))
        return store(pointers, value, mask, *args)

    x, weight = torch.randn(ROWS, N), torch.randn(N)
    _, _, stats = layernorm.norm_forward(x, None, weight, None, 1e-5, False, x.dtype)
    found = {}

    def sum_partials(key, pairs):
        for name in ("dh", "partials"):
            found[name] = owners(seen[name], stores, seen["grid"])

    with (
        mock.patch.dict(_tuning.ROWS, interpret={"norm_backward": table}),
        mock.patch.object(layernorm, "launch", watch_launch),
        mock.patch.object(layernorm, "sum_partials", sum_partials),
        mock.patch.object(interpreter_builder, "create_masked_store", watch_store),
    ):
        layernorm.norm_backward(torch.randn(ROWS, N), None, x, stats, weight, False, weight.dtype, None)
    return found


def owners(tensor, stores, grid):
    """For each element of a tensor the number of the program that stored it."""
    result = np.full(tensor.numel(), -1)
    for (x, y), addresses in stores:
        at = (addresses - tensor.data_ptr()) // tensor.element_size()
        result[at[(at >= 0) & (at < result.size)]] = x * grid[1] + y
    assert (result >= 0).all()
    return result.reshape(tensor.shape)


def draw(axes, found):
    """dy and h by the program that reads them, its partial sums, and their sum."""
    programs = found["dh"].max() + 1
    look = {"aspect": "auto", "interpolation": "nearest", "cmap": "tab10", "vmin": 0, "vmax": 9}
    axes[0].imshow(found["dh"], **look)
    axes[0].set(ylabel=f"{ROWS} rows, in tiles of 4")
    axes[0].set_title("dy * xhat, by who adds it up\nin registers, tile by tile", fontsize=9)
    axes[1].imshow(found["partials"], **look)
    axes[1].set_title(f"partials, {len(found['partials'])} x N,\nwritten once", fontsize=9)
    axes[2].imshow(np.zeros((1, N)), cmap="Greys", vmin=-1, vmax=2, aspect="auto")
    axes[2].set_box_aspect(0.15)
    axes[2].set_title("dw, N: their sum,\nin a fixed order", fontsize=9)
    for ax in axes:
        ax.set(xticks=[0, N - 1], xticklabels=["0", "N"], yticks=[])
    for program in range(programs):
        rows, cols = np.nonzero(found["partials"] == program)
        axes[1].text(
            cols.mean(), rows.mean(), f"program {program}", ha="center", va="center", color="white", fontsize=8
        )


def main():
    figure = plt.figure(figsize=(12, 3.6), layout="constrained")
    for part, (title, table) in zip(figure.subfigures(1, 2, wspace=0.06), TABLES.items(), strict=True):
        part.suptitle(title)
        draw(part.subplots(1, 3, width_ratios=[3, 3, 2]), observe(table))
    path = Path(__file__).with_name("rows-reduction.png")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
