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
    if capability in (86, 87, 89) or capability >= 120:  # about 100 KB of shared memory, against 164 KB and more
        return "sm_120" if capability >= 120 and "sm_120" in tables else "sm_86"
    return "sm_80" if capability < 90 else "sm_90" if capability < 100 else "sm_100"


# ---- attention -------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """One program's tile of queries and keys."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    loops: str = "two"  # see below
    maxnreg: int | None = None  # see below
    use_tma: bool = False  # tensor descriptors wherever strides allow


def attention_tile(kernel, arch, head_dim, dtype_bytes, dropout=False, descriptors=True, tf32=False):
    """Tile of `kernel` ("forward", "dkdv", "dq", "decode") for a head dimension of 8 to 256 in 2- or 4-byte floats.
    Without `descriptors`, for strides no tensor map or 16-byte load can take, architectures that use them have rows
    of their own: pointers need registers that the others have spent. fp32 has one row for all architectures, and one
    with `tf32` products, which asks for more shared memory than sm_86 and sm_120 have."""
    if arch == "interpret":
        return INTERPRET._replace(use_tma=descriptors)
    tables = ATTENTION[f"{kernel} with dropout" if dropout else kernel]
    key = table_arch(arch, tables)
    if dtype_bytes == 4:
        key = "tf32" if tf32 and "tf32" in tables and key not in ("sm_86", "sm_120") else "fp32"
    row = tables["pointers" if tables[key][0].use_tma and not descriptors else key]
    column = next(i for i, longest in enumerate(HEAD_DIMS) if head_dim <= longest)
    odd = None if descriptors or dropout else ODD_STRIDES.get((kernel, key, HEAD_DIMS[column]))
    return odd or row[column]


def _pointers(*tiles):
    return [Tile(*tile) for tile in tiles]


def _tma(*tiles):
    return [Tile(*tile, use_tma=True) for tile in tiles]


# fmt: off
LOOPS = ("two", "one", "overlap")
HEAD_DIMS = (64, 128, 256)  # the columns below: up to 64, to 128, to 256

# The interpreter pays per program and per operation, hardly per element: few, large tiles.
INTERPRET = Tile(128, 128, 4, 1, use_tma=True)

# A tile is (block_q, block_k, warps, stages) and how it walks over its blocks, if not in two loops, masked and whole:
#   "one"      masks every block in one loop: fewer registers than two loops
#   "overlap"  (forward) multiplies for the next block's scores during this one's softmax: more registers
# Last comes, where the compiler is not to decide, how many registers a thread may use. Fewer let one more program in.
# More, up to 255, let ptxas move arithmetic up among the matmuls; on its own it would rather save registers.
# fp32 dots run as FFMA loops that keep their operands in registers: only small tiles avoid spills.
ATTENTION = {
    "forward": {
        "fp32": _pointers((16, 32, 4, 2), (16, 32, 8, 1, "one"), (16, 32, 8, 1, "one")),
        "tf32": _pointers((128, 32, 8, 1), (128, 32, 8, 2), (16, 32, 8, 1, "one")),
        "sm_80": _pointers((128, 64, 4, 3, "one"), (128, 32, 8, 3, "overlap"), (64, 32, 4, 2, "one")),
        "sm_86": _pointers((128, 64, 4, 3, "one"), (128, 32, 8, 3, "overlap"), (64, 32, 8, 2)),
        "sm_120": _pointers((128, 32, 4, 3, "one"), (128, 32, 8, 3, "overlap"), (64, 32, 8, 2)),
        "sm_90": _tma((128, 64, 4, 3), (128, 64, 8, 2, "overlap", 255), (128, 32, 8, 2, "overlap", 255)),
        "pointers": _pointers((128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2)),
        "sm_100": _tma((128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 2)),
        "gfx942": _pointers((128, 64, 4, 1), (128, 64, 8, 1), (64, 32, 8, 1)),
    },
    "forward with dropout": {
        "fp32": _pointers((16, 32, 4, 2), (16, 32, 8, 1, "one"), (16, 32, 8, 1, "one")),
        "tf32": _pointers((128, 32, 8, 1), (128, 32, 8, 2), (16, 32, 8, 1, "one")),
        "sm_80": _pointers((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 2, "one")),
        "sm_86": _pointers((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
        "sm_90": _tma((128, 64, 4, 3), (128, 64, 8, 2, "overlap", 255), (128, 32, 8, 2, "overlap", 255)),
        "pointers": _pointers((128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2)),
        "sm_100": _tma((128, 64, 4, 3), (128, 128, 8, 2, "one"), (128, 64, 8, 2, "one")),
        "gfx942": _pointers((128, 64, 4, 1), (128, 64, 8, 1, "one"), (64, 32, 8, 1)),
    },
    "dkdv": {
        "fp32": _pointers((32, 32, 8, 1), (16, 16, 8, 1, "one"), (16, 16, 8, 1, "one")),
        "tf32": _pointers((32, 64, 4, 1, "one"), (16, 128, 8, 1, "one"), (16, 16, 8, 1, "one")),
        "sm_80": _pointers((32, 128, 8, 2), (16, 128, 8, 2), (32, 64, 8, 1)),
        "sm_86": _pointers((32, 128, 8, 2), (16, 128, 8, 1), (16, 64, 8, 1)),
        "sm_120": _pointers((32, 128, 8, 2), (16, 128, 8, 1, "one"), (16, 64, 8, 1)),
        "sm_90": _tma((64, 64, 4, 2), (64, 128, 8, 2, "one"), (32, 64, 8, 1, "one")),
        "pointers": _pointers((64, 128, 8, 2), (32, 128, 8, 1, "one"), (32, 64, 8, 1, "one")),
        "sm_100": _tma((64, 128, 8, 2, "one"), (64, 64, 8, 2, "one"), (64, 64, 8, 1, "one")),
        "gfx942": _pointers((64, 128, 8, 1, "one"), (32, 64, 8, 1), (16, 64, 8, 1)),
    },
    "dkdv with dropout": {
        "fp32": _pointers((32, 32, 8, 1), (16, 16, 8, 1, "one"), (16, 16, 8, 1, "one")),
        "tf32": _pointers((32, 64, 4, 1, "one"), (16, 128, 8, 1, "one"), (16, 16, 8, 1, "one")),
        "sm_80": _pointers((32, 128, 8, 2, "one"), (16, 128, 8, 1, "one"), (32, 64, 8, 1)),
        "sm_86": _pointers((32, 128, 8, 2, "one"), (32, 64, 8, 1, "one"), (16, 64, 8, 1)),
        "sm_120": _pointers((32, 64, 8, 2, "one"), (32, 64, 8, 1, "one"), (16, 64, 8, 1)),
        "sm_90": _tma((64, 64, 4, 2), (32, 64, 4, 1, "one"), (32, 64, 8, 1, "one")),
        "pointers": _pointers((64, 128, 8, 2, "one"), (16, 128, 8, 2, "one"), (32, 64, 8, 1, "one")),
        "sm_100": _tma((64, 64, 8, 2, "one"), (64, 64, 8, 2, "one"), (64, 64, 8, 1, "one")),
        "gfx942": _pointers((64, 128, 8, 1, "one"), (16, 64, 8, 1, "one"), (16, 64, 8, 1, "one")),
    },
    "dq": {
        "fp32": _pointers((32, 32, 8, 1), (16, 16, 8, 1, "one"), (16, 16, 8, 1, "one")),
        "tf32": _pointers((128, 32, 8, 1), (64, 32, 4, 1, "one"), (16, 16, 8, 1, "one")),
        "sm_80": _pointers((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
        "sm_86": _pointers((128, 64, 8, 2), (128, 32, 8, 2), (64, 16, 8, 1)),
        "sm_90": _tma((128, 64, 8, 2, "one", 128), (128, 128, 8, 2), (128, 64, 8, 1, "one")),
        "pointers": _pointers((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
        "sm_100": _tma((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 1, "one")),
        "gfx942": _pointers((128, 64, 8, 1), (64, 64, 4, 1), (64, 16, 8, 1)),
    },
    "dq with dropout": {
        "fp32": _pointers((32, 32, 8, 1), (16, 16, 8, 1, "one"), (16, 16, 8, 1, "one")),
        "tf32": _pointers((128, 32, 8, 1), (64, 32, 4, 1, "one"), (16, 16, 8, 1, "one")),
        "sm_80": _pointers((128, 64, 8, 2, "one"), (128, 32, 8, 1, "one"), (64, 32, 8, 1)),
        "sm_86": _pointers((128, 64, 8, 1, "one"), (128, 32, 8, 1, "one"), (64, 16, 8, 1)),
        "sm_90": _tma((64, 64, 4, 2), (64, 64, 4, 2), (128, 32, 8, 1, "one")),
        "pointers": _pointers((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
        "sm_100": _tma((128, 64, 8, 2), (128, 64, 8, 2, "one"), (64, 64, 8, 1, "one")),
        "gfx942": _pointers((128, 64, 8, 1), (64, 64, 4, 1), (64, 16, 8, 1)),
    },
    "decode": {
        "fp32": _pointers((16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
        "sm_80": _pointers((16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
        "sm_86": _pointers((16, 64, 4, 3), (16, 32, 4, 3), (16, 32, 4, 2)),
        "sm_90": _tma((16, 128, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3)),
        "pointers": _pointers((16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
        "sm_100": _tma((16, 128, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3)),
        "gfx942": _pointers((16, 128, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1)),
    },
}

# Strides that no 16-byte load fits cost registers for addresses. Where that makes the tile above spill, another:
# {(kernel, architecture, head dimension up to): tile}
ODD_STRIDES = {
    ("forward", "sm_80", 64): Tile(128, 64, 8, 3),
    ("dq", "sm_80", 64): Tile(128, 64, 8, 2, "one"),
    ("dq", "sm_80", 128): Tile(128, 16, 8, 2),
    ("forward", "sm_86", 64): Tile(128, 64, 8, 3),
    ("forward", "sm_86", 128): Tile(64, 32, 4, 3, "one"),
    ("forward", "sm_120", 64): Tile(128, 64, 8, 3, "one"),
    ("forward", "sm_120", 128): Tile(64, 32, 8, 3),
    ("dkdv", "sm_86", 128): Tile(16, 128, 8, 1, "one"),
    ("dq", "sm_86", 128): Tile(128, 16, 8, 2),
    ("dq", "sm_100", 128): Tile(128, 32, 8, 2, "one"),
    ("forward", "gfx942", 128): Tile(128, 64, 8, 1, "one"),
    ("dkdv", "gfx942", 64): Tile(32, 64, 4, 1),
    ("dq", "gfx942", 128): Tile(64, 32, 4, 1, "one"),
}
# fmt: on


class HopperTile(NamedTuple):
    """What the warp-specialized forward of attention/hopper loads: blocks of keys, and how many ahead. With `turns`
    its consumers start their products one after the other."""

    block_k: int
    stages: int
    turns: bool = True


class HopperBackwardTile(NamedTuple):
    """How many tiles of q (at D = 64 at least 2: two are in use at once), and of dout, the backward of attention/hopper
    keeps, and whether it branches round the mask where nothing is masked."""

    q_stages: int
    stages: int
    branch: bool


# By padded head dimension.
HOPPER = {64: HopperTile(128, 4), 128: HopperTile(128, 2)}
HOPPER_BACKWARD = {64: HopperBackwardTile(2, 2, True), 128: HopperBackwardTile(2, 2, False)}


# ---- rows ------------------------------------------------------------------------------------------------------------


class RowTile(NamedTuple):
    """One program's tile of `rows` x `block_n` elements; `holds_row` if a whole row fits in it."""

    rows: int
    block_n: int
    num_warps: int
    holds_row: bool


class RowTable(NamedTuple):
    """`whole`: (longest row, elements in a tile, warps), ascending: rows that a program keeps in registers, several to
    a tile when short. `blocks`: (rows, elements in a block, warps) for longer rows."""

    whole: tuple[tuple[int, int, int], ...]
    blocks: tuple[int, int, int]


def row_tile(arch, kernel, n_cols):
    """Tile of `kernel` ("softmax_forward", "softmax_backward", "norm_forward", "norm_backward", "cross_entropy") for
    rows of n_cols."""
    table = ROWS[table_arch(arch, ROWS)][kernel]
    for longest, elements, num_warps in table.whole:
        if n_cols <= longest:
            block_n = max(16, 1 << (n_cols - 1).bit_length())
            return RowTile(max(1, elements // block_n), block_n, num_warps, True)
    return RowTile(*table.blocks, False)


def persistent_programs(tile):
    """Programs per multiprocessor of a kernel that stays: together 16 warps, of up to 128 registers."""
    return max(1, 16 // tile.num_warps)


def pipeline_stages(arch, tile, bytes_per_element):
    """Tiles in work and on their way at once, for inputs of so many bytes per element taken together: one is worked on
    in registers, the others each have a buffer."""
    shared = PIPELINE_SHARED[table_arch(arch, PIPELINE_SHARED)] // persistent_programs(tile)
    return min(4, 1 + shared // (tile.rows * tile.block_n * bytes_per_element))


# Interpreted programs cost by the operation, hardly by the element: as many rows to a program as the cache bears.
_INTERPRET_ROWS = RowTable(((65536, 65536, 4),), (1, 65536, 4))

# 16 to 32 elements per thread where a program loads once, 8 to 16 in the norms' backward, which keeps sums and weights.
_NVIDIA_ROWS = {
    "softmax_forward": RowTable(
        ((4096, 4096, 4), (8192, 8192, 8), (16384, 16384, 16), (32768, 32768, 32)), (1, 8192, 16)
    ),
    "softmax_backward": RowTable(
        ((2048, 2048, 4), (4096, 4096, 8), (8192, 8192, 16), (16384, 16384, 32)), (1, 4096, 16)
    ),
    "norm_forward": RowTable(
        ((256, 2048, 4), (1024, 1024, 2), (2048, 2048, 4), (4096, 4096, 8), (8192, 8192, 16), (16384, 16384, 32)),
        (1, 4096, 8),
    ),
    "norm_backward": RowTable(((2048, 2048, 8), (8192, 4096, 16)), (1, 2048, 8)),
    "cross_entropy": RowTable(((512, 1024, 4), (4096, 4096, 8)), (1, 4096, 8)),
}
_AMD_ROWS = {
    "softmax_forward": RowTable(((4096, 4096, 4), (8192, 8192, 8), (16384, 16384, 16)), (1, 8192, 16)),
    "softmax_backward": RowTable(((4096, 4096, 4), (8192, 8192, 8), (16384, 16384, 16)), (1, 4096, 8)),
    "norm_forward": RowTable(
        ((256, 4096, 4), (1024, 1024, 1), (2048, 2048, 2), (4096, 4096, 4), (8192, 8192, 8), (16384, 16384, 16)),
        (1, 4096, 4),
    ),
    "norm_backward": RowTable(((2048, 2048, 4), (8192, 4096, 8)), (1, 2048, 4)),
    "cross_entropy": RowTable(((512, 1024, 4), (4096, 4096, 8)), (1, 4096, 8)),
}

ROWS = {
    "interpret": dict.fromkeys(_NVIDIA_ROWS, _INTERPRET_ROWS),
    "sm_80": _NVIDIA_ROWS,
    "sm_86": _NVIDIA_ROWS,
    "sm_90": _NVIDIA_ROWS,
    "sm_100": _NVIDIA_ROWS,
    "gfx942": _AMD_ROWS,
}

# Tile in which dw and db are added up: (partial rows, columns, warps); 32 columns are 128 bytes side by side.
PARTIALS_TILE = dict.fromkeys(ROWS, (64, 32, 4)) | {"interpret": (4, 16384, 4)}

# Shared memory of a multiprocessor, in bytes, that tiles on their way may fill; 0: loads wait for themselves.
PIPELINE_SHARED = {
    "interpret": 0,
    "sm_80": 160 << 10,
    "sm_86": 96 << 10,
    "sm_90": 224 << 10,
    "sm_100": 224 << 10,
    "gfx942": 0,
}

# Bytes that the logits of one chunk of rows may take. Every chunk reads and writes the whole gradient of the head.
LOSS_CHUNK = dict.fromkeys(ROWS, 512 << 20) | {"interpret": 64 << 20}


def loss_chunk_rows(arch, n_rows, row_bytes):
    """Rows to a chunk: chunks of nearly equal size in multiples of 128 rows, the tensor cores' largest tile."""
    most = max(128, LOSS_CHUNK[table_arch(arch, LOSS_CHUNK)] // row_bytes // 128 * 128)
    chunks = max(1, -(-n_rows // most))
    return -(-n_rows // chunks // 128) * 128 if n_rows else 128
