"""Dropout masks from a counter, the same for every tile size, orientation, device and pass.

Element (row, column) of head `bh` keeps its value when its byte is at least `threshold`. The bytes come from
Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011: 7 rounds pass every test there, and 10
are a margin that costs 40 % more arithmetic where arithmetic is what dropout costs) with

    key = rng[0]  (64 bits)        counter = (column // 16, row, bh, rng[1] mod 2^31)

whose 4 words of 4 bytes, little end first, serve 16 neighbouring columns: one call per 16 elements. The rng tensor
(2,) int64 stays on the device, so a CUDA graph replays with fresh values and the backward draws the forward's mask.
A byte resolves 1/256: p becomes round(256 p)/256, and kept values are rescaled by the probability really kept.
"""

import torch
import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


def draw_rng(device):
    """Seed and offset (2,) int64 on `device`, from torch's generator there, so that torch.manual_seed repeats them."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def threshold_and_rescale(p):
    """The byte below which an element is dropped, and 1 / (probability of keeping one)."""
    if p == 0.0:
        return 0, 1.0
    threshold = min(max(round(256 * p), 1), 255)
    return threshold, 256 / (256 - threshold)


@triton.jit
def load_rng(rng_ptr):
    """The key (64 bits) and the last counter word (31 bits)."""
    return tl.load(rng_ptr), (tl.load(rng_ptr + 1) & 0x7FFFFFFF).to(tl.uint32)


@triton.jit
def keep_mask(key, counter, bh, rows, start_col, threshold, COLS: tl.constexpr):
    """(ROWS, COLS) booleans for `rows` (ROWS,) and columns start_col ... start_col + COLS - 1; start_col % 16 == 0."""
    groups = (start_col // 16 + tl.arange(0, COLS // 16)).to(tl.uint32)  # (COLS / 16,)
    words = _philox_words(key, counter, bh, rows.to(tl.uint32)[:, None], groups[None, :])  # (ROWS, COLS / 16, 4)
    return _bytes(words).reshape(rows.shape[0], COLS) >= tl.cast(threshold, tl.uint8)


@triton.jit
def keep_mask_transposed(key, counter, bh, rows, start_col, threshold, COLS: tl.constexpr):
    """The transpose of `keep_mask`, (COLS, ROWS), built without transposing."""
    groups = (start_col // 16 + tl.arange(0, COLS // 16)).to(tl.uint32)
    words = _philox_words(key, counter, bh, rows.to(tl.uint32)[None, :], groups[:, None])  # (COLS / 16, ROWS, 4)
    return _bytes(words).permute(0, 2, 3, 1).reshape(COLS, rows.shape[0]) >= tl.cast(threshold, tl.uint8)


@triton.jit
def _philox_words(key, counter, bh, rows, groups):
    zero = rows * 0 + groups * 0
    w0, w1, w2, w3 = tl.philox(key, groups + zero, rows + zero, bh.to(tl.uint32) + zero, counter + zero, ROUNDS)
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # last two dimensions: (low bit, high bit) of the word's index
    return pairs.reshape(zero.shape[0], zero.shape[1], 4)


@triton.jit
def _bytes(words):
    """(..., 4 words) -> (..., 4 words, 4 bytes), as bytes: where layouts differ they cross shared memory, one each."""
    shifts = (8 * tl.arange(0, 4)).to(tl.uint32)
    return (words[:, :, :, None] >> shifts[None, None, None, :]).to(tl.uint8)
