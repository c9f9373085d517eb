"""Tile sizes, warps and pipeline stages per architecture: tables, read by the launchers and by the compile report.

Rows are chosen without a GPU by `python bench/compile_report.py` (no spills, tensor cores used, most programs in
flight) and refined on one by `python bench/tune.py`. An architecture without rows of its own uses its family's.
"""

from typing import NamedTuple


def table_arch(arch, tables):
    """The key in `tables` that serves `arch` ("sm_90", "gfx942", "interpret")."""
    if arch in tables:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    capability = int(arch.removeprefix("sm_"))
    if capability in (86, 87, 89) or capability >= 120:
        return "sm_86"  # about 100 KB of shared memory a program, against 164 KB and more
    return "sm_80" if capability < 90 else "sm_90" if capability < 100 else "sm_100"


# ---- attention -------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """One program's tile of queries and keys."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    use_tma: bool = False  # tensor descriptors wherever strides allow


def attention_tile(kernel, arch, head_dim, dtype_bytes):
    """Tile of `kernel` ("forward", "dkdv", "dq", "decode") for a head dimension of 8 to 256 in 2- or 4-byte floats."""
    tables = ATTENTION[kernel]
    block_d = 16 if head_dim <= 16 else 1 << (head_dim - 1).bit_length()
    return tables[table_arch(arch, tables)][dtype_bytes, block_d]


# The interpreter pays per program and per operation, hardly per element: few, large tiles.
_INTERPRET = {(size, d): Tile(128, 128, 4, 1, True) for size in (2, 4) for d in (16, 32, 64, 128, 256)}

# fp32 dots run as FFMA loops that keep operands in registers: only small tiles avoid spills.
_FP32_FORWARD = {
    (4, 16): Tile(32, 32, 4, 2),
    (4, 32): Tile(32, 32, 4, 2),
    (4, 64): Tile(16, 32, 4, 2),
    (4, 128): Tile(32, 32, 8, 1),
    (4, 256): Tile(16, 32, 8, 1),
}
_FP32_BACKWARD = {
    (4, 16): Tile(32, 32, 4, 1),
    (4, 32): Tile(32, 32, 4, 1),
    (4, 64): Tile(32, 32, 8, 1),
    (4, 128): Tile(16, 32, 8, 1),
    (4, 256): Tile(16, 16, 8, 1),
}

ATTENTION = {
    "forward": {
        "interpret": _INTERPRET,
        "sm_80": _FP32_FORWARD
        | {
            (2, 16): Tile(128, 64, 4, 3),
            (2, 32): Tile(128, 64, 4, 3),
            (2, 64): Tile(128, 64, 4, 3),
            (2, 128): Tile(128, 64, 8, 3),
            (2, 256): Tile(64, 64, 8, 2),
        },
        "sm_86": _FP32_FORWARD
        | {
            (2, 16): Tile(128, 64, 4, 3),
            (2, 32): Tile(128, 64, 4, 3),
            (2, 64): Tile(128, 64, 4, 3),
            (2, 128): Tile(128, 32, 8, 3),
            (2, 256): Tile(64, 32, 8, 2),
        },
        "sm_90": _FP32_FORWARD
        | {
            (2, 16): Tile(128, 128, 8, 2, True),
            (2, 32): Tile(128, 128, 8, 2, True),
            (2, 64): Tile(128, 128, 8, 2, True),
            (2, 128): Tile(128, 128, 8, 2, True),
            (2, 256): Tile(128, 64, 8, 2, True),
        },
        "sm_100": _FP32_FORWARD
        | {
            (2, 16): Tile(128, 128, 8, 2, True),
            (2, 32): Tile(128, 128, 8, 2, True),
            (2, 64): Tile(128, 128, 8, 2, True),
            (2, 128): Tile(128, 128, 8, 2, True),
            (2, 256): Tile(128, 64, 8, 2, True),
        },
        "gfx942": _FP32_FORWARD
        | {
            (2, 16): Tile(128, 64, 4, 1),
            (2, 32): Tile(128, 64, 4, 1),
            (2, 64): Tile(128, 64, 4, 1),
            (2, 128): Tile(128, 64, 4, 1),
            (2, 256): Tile(64, 32, 4, 1),
        },
    },
    "dkdv": {
        "interpret": _INTERPRET,
        "sm_80": _FP32_BACKWARD
        | {
            (2, 16): Tile(64, 128, 8, 2),
            (2, 32): Tile(64, 128, 8, 2),
            (2, 64): Tile(64, 128, 8, 2),
            (2, 128): Tile(64, 64, 8, 2),
            (2, 256): Tile(32, 64, 8, 1),
        },
        "sm_86": _FP32_BACKWARD
        | {
            (2, 16): Tile(64, 64, 4, 2),
            (2, 32): Tile(64, 64, 4, 2),
            (2, 64): Tile(64, 64, 4, 2),
            (2, 128): Tile(32, 64, 8, 2),
            (2, 256): Tile(16, 64, 8, 1),
        },
        "sm_90": _FP32_BACKWARD
        | {
            (2, 16): Tile(64, 128, 8, 2, True),
            (2, 32): Tile(64, 128, 8, 2, True),
            (2, 64): Tile(64, 128, 8, 2, True),
            (2, 128): Tile(64, 128, 8, 2, True),
            (2, 256): Tile(64, 64, 8, 1, True),
        },
        "sm_100": _FP32_BACKWARD
        | {
            (2, 16): Tile(64, 128, 8, 2, True),
            (2, 32): Tile(64, 128, 8, 2, True),
            (2, 64): Tile(64, 128, 8, 2, True),
            (2, 128): Tile(64, 128, 8, 2, True),
            (2, 256): Tile(64, 64, 8, 1, True),
        },
        "gfx942": _FP32_BACKWARD
        | {
            (2, 16): Tile(64, 64, 4, 1),
            (2, 32): Tile(64, 64, 4, 1),
            (2, 64): Tile(64, 64, 4, 1),
            (2, 128): Tile(32, 64, 4, 1),
            (2, 256): Tile(16, 64, 4, 1),
        },
    },
    "dq": {
        "interpret": _INTERPRET,
        "sm_80": _FP32_BACKWARD
        | {
            (2, 16): Tile(128, 64, 8, 2),
            (2, 32): Tile(128, 64, 8, 2),
            (2, 64): Tile(128, 64, 8, 2),
            (2, 128): Tile(128, 64, 8, 2),
            (2, 256): Tile(64, 32, 8, 1),
        },
        "sm_86": _FP32_BACKWARD
        | {
            (2, 16): Tile(64, 64, 4, 2),
            (2, 32): Tile(64, 64, 4, 2),
            (2, 64): Tile(64, 64, 4, 2),
            (2, 128): Tile(64, 32, 4, 2),
            (2, 256): Tile(64, 16, 8, 1),
        },
        "sm_90": _FP32_BACKWARD
        | {
            (2, 16): Tile(128, 64, 8, 2, True),
            (2, 32): Tile(128, 64, 8, 2, True),
            (2, 64): Tile(128, 64, 8, 2, True),
            (2, 128): Tile(128, 64, 8, 2, True),
            (2, 256): Tile(64, 64, 8, 1, True),
        },
        "sm_100": _FP32_BACKWARD
        | {
            (2, 16): Tile(128, 64, 8, 2, True),
            (2, 32): Tile(128, 64, 8, 2, True),
            (2, 64): Tile(128, 64, 8, 2, True),
            (2, 128): Tile(128, 64, 8, 2, True),
            (2, 256): Tile(64, 64, 8, 1, True),
        },
        "gfx942": _FP32_BACKWARD
        | {
            (2, 16): Tile(64, 64, 4, 1),
            (2, 32): Tile(64, 64, 4, 1),
            (2, 64): Tile(64, 64, 4, 1),
            (2, 128): Tile(64, 32, 4, 1),
            (2, 256): Tile(64, 16, 4, 1),
        },
    },
}
