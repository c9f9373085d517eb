"""What the kernels for Hopper share: how a producer hands tiles to its consumers, and tensor maps.

A program's warps part. One, the producer, copies tiles from global to shared memory by TMA, ahead of those who need
them; the others, two consumer warpgroups of four warps, multiply (wgmma) and do the arithmetic. They meet at barriers
in shared memory. Tile n of a kind lives in slot n mod SLOTS of a ring:

    full[slot]   counts the bytes of the tile that lands there      a consumer waits before it multiplies
    empty[slot]  counts the consumers done with the tile            the producer waits before it loads the next one

A barrier has phases: it completes one, and starts the next, when all that it counts has come. A wait names the parity
of a phase, and that of visit number i to a slot is the parity of i: the ring needs no other state. A ring with as many
slots as there are tiles is loaded once and never released.
"""

import torch
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention import tiles
from kernels.attention.tiles import readable, tma_strides

MAX_HEAD_DIM = 128
ROWS = gl.constexpr(64)  # of a tile that one wgmma multiplies
CONSUMERS = gl.constexpr(2)
# A multiprocessor's 65536 registers for 12 warps (a lone one costs four), and how the three warpgroups share them.
REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS = 168, 240, 24

# Arguments of which Triton shall make no constants: one code for all shapes, whose registers have been counted.
SIZES = ("H", "Hkv", "Tq", "Tk", "num_heads", "num_blocks", "heads_per_section")

# Names that Triton 3.9 changed.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@builtin
def async_atomic_add(tensor_desc, coord, src, _semantic=None):
    """Have a tile in shared memory added to global memory, element by element. Triton 3.9 has it under this name."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


tma_add = getattr(tma, "async_atomic_add", async_atomic_add)
schedule = gluon.jit(tiles.schedule.fn)


# ---- inside the kernels ----------------------------------------------------------------------------------------------


@gluon.jit
def allocate_ring(desc, SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Shared memory for SLOTS tiles of `desc`, and their barriers: (tiles, full, empty)."""
    TILE: gl.constexpr = desc.block_type.shape  # (1, 1, rows, D)
    buffers = gl.allocate_shared_memory(desc.dtype, [SLOTS, 1, 1, TILE[2], TILE[3]], desc.layout)
    full = allocate_barriers(SLOTS, 1)
    empty = allocate_barriers(SLOTS, READERS)
    return buffers, full, empty


@gluon.jit
def allocate_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """Barriers whose phases are complete after COUNT arrivals each."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def place(n, ring):
    """Slot of tile n, and the parity of this visit to it."""
    SLOTS: gl.constexpr = ring[0].shape[0]
    return n % SLOTS, n // SLOTS & 1


@gluon.jit
def load(ring, n, desc, b, h, start):
    """Have rows start... of head (b, h) copied to the ring as tile n, once its slot is free."""
    buffers, full, empty = ring
    slot, parity = place(n, ring)
    mbarrier.wait(empty.index(slot), parity ^ 1)  # of the visit before; the first one passes at once
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma_load(desc, [b, h, start, 0], full.index(slot), buffers.index(slot))


@gluon.jit
def wait_for(ring, n, exists=True):
    _, full, _ = ring
    slot, parity = place(n, ring)
    mbarrier.wait(full.index(slot), parity, pred=exists)


@gluon.jit
def tile(ring, n):
    """Tile n, which has landed, as a matrix (rows, D) in shared memory."""
    buffers, _, _ = ring
    slot, _ = place(n, ring)
    return buffers.index(slot).reshape((buffers.shape[3], buffers.shape[4]))


@gluon.jit
def release(ring, n, exists=True):
    _, _, empty = ring
    slot, _ = place(n, ring)
    mbarrier.arrive(empty.index(slot), count=1, pred=exists)


@gluon.jit
def start_product(a, b, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """a b (ROWS, COLUMNS) in fp32, on its way."""
    zeros = gl.zeros((ROWS, COLUMNS), gl.float32, LAYOUT)
    return warpgroup_mma(a, b, zeros, use_acc=False, is_async=True)


# ---- on the host -----------------------------------------------------------------------------------------------------

GL_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


def padded_head_dim(head_dim):
    """64 or 128: rows of a tile are whole 128-byte lines, as TMA and wgmma swizzle them."""
    return 64 if head_dim <= 64 else 128


def descriptor(x, rows, columns=None):
    """Tensor map of x (B, H, T, D) for tiles of `rows` positions of one head, swizzled for wgmma; with `columns`, for
    tiles of (rows, columns) as they are."""
    shape = [1, 1, rows, columns or padded_head_dim(x.shape[-1])]
    layout = gl.NVMMASharedLayout.get_default_for(shape, GL_DTYPES[x.dtype])
    if columns is not None:
        layout = gl.NVMMASharedLayout(0, x.element_size() * 8, 4)
    return TensorDescriptor(x, list(x.shape), tma_strides(x), shape, layout)


def tma_readable(x):
    """x itself if TMA can read it, else a contiguous copy."""
    x = readable(x)
    return x if tma_strides(x) is not None else x.clone(memory_format=torch.contiguous_format)
