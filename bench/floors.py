"""The least time each kernel can take on a GPU: its FLOPs over the tensor cores' peak, its bytes over the bandwidth.

    python bench/floors.py
    python bench/floors.py --write

Counts what the algorithm must do for GPT-2's shapes, whatever the kernel: matrix products at the dense bf16 peak, every
tensor read or written once at the full bandwidth of the device memory. --write puts the table into docs/performance.md,
between its two markers.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import command, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- floors: python bench/floors.py --write -->", "<!-- end of floors -->"
BATCH, HEADS, TOKENS, HEAD_DIM = 16, 12, 1024, 64
WIDTH = HEADS * HEAD_DIM
CLASSES = 50257
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Gpu:
    name: str
    flops: float  # dense bf16 per second, data sheet
    bandwidth: float  # bytes per second, data sheet
    exponentials: float  # per second: 16 a cycle and multiprocessor, at the boost clock


GPUS = (
    Gpu("A100 SXM 80 GB", 312e12, 2.039e12, 16 * 108 * 1.41e9),
    Gpu("H100 SXM", 989e12, 3.35e12, 16 * 132 * 1.83e9),
    Gpu("B200", 2250e12, 8.0e12, 16 * 148 * 1.85e9),
)


@dataclass(frozen=True)
class Work:
    """What one call must do."""

    kernel: str
    flops: float
    bytes: float
    exponentials: float = 0


def attention_work():
    """Causal: half of the T x T scores. One matrix product over them is T^2 D multiply-adds per head."""
    product = BATCH * HEADS * TOKENS**2 * HEAD_DIM  # FLOP
    scores = BATCH * HEADS * TOKENS**2 / 2
    tensor = BATCH * HEADS * TOKENS * HEAD_DIM * BF16
    row = BATCH * HEADS * TOKENS * FP32  # lse, delta
    return [
        Work("attention forward", 2 * product, 4 * tensor + row, scores),
        Work("attention backward: delta", 0, 2 * tensor + row),
        Work("attention backward: dK, dV", 4 * product, 6 * tensor + 2 * row, scores),
        Work("attention backward: dQ", 3 * product, 5 * tensor + 2 * row, scores),
        Work("attention backward, if fused", 5 * product, 7 * tensor + 2 * row, scores),
    ]


def row_work():
    """Softmax of attention's scores and norms of the residual stream, whose per-row statistics count too."""
    scores = BATCH * HEADS * TOKENS * TOKENS * BF16
    stream = BATCH * TOKENS * WIDTH * BF16
    statistics = 3 * BATCH * TOKENS * FP32
    return [
        Work("softmax of scores, forward", 0, 2 * scores, scores / BF16),
        Work("softmax of scores, backward", 0, 3 * scores),
        Work("causal softmax of scores, forward", 0, 1.5 * scores, scores / BF16 / 2),
        Work("causal softmax of scores, backward", 0, 2 * scores),
        Work("LayerNorm forward", 0, 2 * stream + statistics),
        Work("LayerNorm backward", 0, 3 * stream + statistics),
        Work("add + LayerNorm forward", 0, 4 * stream + statistics),
        Work("add + LayerNorm backward", 0, 4 * stream + statistics),
    ]


def loss_work():
    """The head and its loss on every token of the batch, and the loss alone where the logits exist."""
    tokens = BATCH * TOKENS
    logits = tokens * CLASSES
    return [
        Work("head and loss, forward and backward", 6 * logits * WIDTH, 2 * (tokens + CLASSES) * WIDTH * BF16, logits),
        Work("cross-entropy of logits, forward", 0, logits * BF16, logits),
        Work("cross-entropy of logits, backward", 0, 2 * logits * BF16, logits),
    ]


def decode_work():
    """One new token per sequence against a cache of T keys: every key and value is read once."""
    cache = 2 * BATCH * HEADS * TOKENS * HEAD_DIM * BF16
    return [Work("attention, decoding one token", 4 * BATCH * HEADS * TOKENS * HEAD_DIM, cache)]


def floors(work, gpu):
    """Microseconds: (FLOPs, bytes, exponentials)."""
    amounts = work.flops / gpu.flops, work.bytes / gpu.bandwidth, work.exponentials / gpu.exponentials
    return tuple(1e6 * seconds for seconds in amounts)


def markdown():
    """The table: GFLOP, MB, and per GPU the three floors in microseconds, the highest in bold."""
    head = ["kernel", "GFLOP", "MB", *(gpu.name for gpu in GPUS)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for work in [*attention_work(), *row_work(), *loss_work(), *decode_work()]:
        cells = [work.kernel, f"{work.flops / 1e9:.1f}" if work.flops else "-", f"{work.bytes / 1e6:.1f}"]
        for gpu in GPUS:
            values = floors(work, gpu)
            cells.append(" / ".join(_bold(f"{v:.1f}", v == max(values)) if v else "-" for v in values))
        lines.append(f"| {' | '.join(cells)} |")
    shape = f"B = {BATCH}, T = {TOKENS}, H = {HEADS}, D = {HEAD_DIM}, C = {WIDTH}, V = {CLASSES:,}, bf16"
    return f"Microseconds for FLOPs / bytes / exponentials; {shape}.\n\n" + "\n".join(lines) + "\n"


def _bold(text, wanted):
    return f"**{text}**" if wanted else text


def insert(page, generated):
    """`page` with what stands between its markers replaced."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{generated}\n{END}{after}"


def main(argv=None):
    p = command.Parser(__doc__)
    p.add_argument("--write", action="store_true", help="replace the table in docs/performance.md")
    if p.parse_args(argv).write:
        table.write_whole(PAGE, insert(PAGE.read_text(), markdown()))
    else:
        print(markdown(), end="")


if __name__ == "__main__":
    sys.exit(command.run(main))
