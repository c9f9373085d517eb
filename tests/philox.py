"""Philox4x32 in NumPy, from the paper (Salmon et al., SC 2011), and the dropout mask that follows from it."""

import numpy as np
import torch

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL0, WEYL1 = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counter, key, rounds=7):
    """counter: four uint64 arrays holding 32-bit words; key: two ints. Returns four such arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = M0 * c0, M1 * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & LOW,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & LOW,
        )
        k0, k1 = (k0 + WEYL0) & 0xFFFFFFFF, (k1 + WEYL1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def keep_mask(rng, B, H, Tq, Tk, threshold):
    """(B, H, Tq, Tk) booleans that kernels.causal_attention must use for the rng tensor (2,) int64."""
    seed, offset = (int(x) for x in rng.tolist())
    groups = -(-Tk // 16)
    shape = (B * H, Tq, groups)
    head, row, group = (
        np.broadcast_to(x, shape).astype(np.uint64) for x in np.ogrid[: shape[0], : shape[1], : shape[2]]
    )
    last = np.full(shape, offset & 0x7FFFFFFF, np.uint64)
    words = np.stack(philox4x32((group, row, head, last), (seed & 0xFFFFFFFF, seed >> 32)), axis=-1)
    shifts = np.arange(0, 32, 8, dtype=np.uint64)
    values = ((words[..., None] >> shifts) & np.uint64(0xFF)).reshape(B, H, Tq, groups * 16)[..., :Tk]
    return torch.from_numpy(values >= threshold)
