"""What a kernel holds in its hands in the emulator (gluon_emulator.py): tiles, barriers, tensor maps and products, and
what may not be done with them."""

import types
from typing import NamedTuple

import torch


class ProtocolError(AssertionError):
    """The kernel did what on a GPU may hang it, or give other numbers from run to run."""


class Buffer:
    """A tile of shared memory, with those who may be at it right now."""

    def __init__(self, data):
        self.data = data.fill_(torch.nan)
        self.readers = self.writers = 0  # counts of copies, products and TMA stores on their way
        self.unfenced = None  # who wrote to it last, until they fence
        self.met = False  # whether the threads of who wrote have met at a barrier since
        self.fenced_late = None  # who fenced after that, until their threads meet again

    def start_reading(self, what):
        if self.writers:
            raise ProtocolError(f"{what} reads a tile to which a copy is on its way")
        self.readers += 1

    def start_reading_by_hardware(self, what):
        if self.unfenced is not None:
            raise ProtocolError(f"{what} takes a tile without a fence after it was written")
        if self.fenced_late is not None:
            raise ProtocolError(f"{what} takes a tile that other threads may not have fenced yet")
        self.start_reading(what)

    def start_writing(self, what):
        if self.readers or self.writers:
            raise ProtocolError(f"{what} writes a tile that is being {'read' if self.readers else 'written'}")
        self.writers += 1
        self.data.fill_(torch.nan)


class View:
    """What Gluon calls a shared memory descriptor: a buffer, or a matrix made of its elements."""

    def __init__(self, machine, buffer, data):
        self.machine, self.buffer, self.data = machine, buffer, data
        self.shape, self.dtype = list(data.shape), data.dtype

    def reshape(self, shape):
        return View(self.machine, self.buffer, self.data.view(*shape))

    def permute(self, order):
        return View(self.machine, self.buffer, self.data.permute(*order))

    def slice(self, start, length, dim):
        return View(self.machine, self.buffer, self.data.narrow(dim, start, length))

    def load(self, layout):
        self.machine.pause()
        self.buffer.start_reading("a load")
        self.buffer.readers -= 1
        return self.data.clone()

    def store(self, value):
        self.machine.pause()
        self.buffer.start_writing("a store")
        self.data.copy_(value)
        self.buffer.writers -= 1
        self.buffer.unfenced, self.buffer.met, self.buffer.fenced_late = self.machine.partition, False, None


class Barrier:
    """An mbarrier: a phase is complete when its arrivals and its bytes have come."""

    def __init__(self, name):
        self.name, self.count = name, None

    def init(self, count):
        self.count = self.pending = count
        self.bytes = self.phases = 0

    def check(self):
        if self.count is None:
            raise ProtocolError("a barrier is used before it is initialized")

    def arrive(self, count=1, expected_bytes=0):
        self.check()
        self.pending -= count
        self.bytes += expected_bytes
        if self.pending < 0:
            raise ProtocolError(f"more than the {self.count} arrivals that a barrier counts in a phase")
        self._complete()

    def land(self, number):
        self.bytes -= number
        self._complete()

    def passed(self, parity):
        """try_wait.parity: the phase of that parity which is current, or was the last one, is complete."""
        self.check()
        return self.phases & 1 != parity

    def _complete(self):
        if self.pending == 0 and self.bytes == 0:
            self.phases += 1
            self.pending = self.count


class Ring(NamedTuple):
    """Shared memory for several tiles, or for as many barriers."""

    shape: list
    dtype: torch.dtype
    items: list

    def index(self, i):
        return self.items[i]


class Descriptor:
    """A tensor map: copies of blocks, zeros from outside of the tensor and nothing to there."""

    def __init__(self, host):
        self.tensor = host.base.as_strided(host.shape, host.strides, host.base.storage_offset())
        self.dtype, self.layout, shape = host.base.dtype, None, list(host.block_shape)
        self.block_type = types.SimpleNamespace(shape=shape, nbytes=torch.Size(shape).numel() * self.dtype.itemsize)

    def block(self, coordinates):
        """(part of the tensor that a block covers, where in the block it lies)"""
        sizes = [
            max(0, min(n, size - at))
            for n, size, at in zip(self.block_type.shape, self.tensor.shape, coordinates, strict=True)
        ]
        tensor = self.tensor[tuple(slice(at, at + n) for at, n in zip(coordinates, sizes, strict=True))]
        return tensor, tuple(slice(n) for n in sizes)

    def load(self, coordinates):
        tile = torch.zeros(self.block_type.shape, dtype=self.dtype)
        source, inside = self.block(coordinates)
        tile[inside] = source
        return tile

    def save(self, coordinates, tile):
        target, inside = self.block(coordinates)
        target.copy_(tile[inside])

    def add(self, coordinates, tile):
        target, inside = self.block(coordinates)
        target.add_(tile[inside])


class Pointer(NamedTuple):
    memory: torch.Tensor  # flat
    offset: object = 0

    def __add__(self, more):
        return Pointer(self.memory, self.offset + more)


class Product:
    """A wgmma that has been issued, in the place of its result: for a wait, or for a wgmma that adds to it."""

    def __init__(self, a, b, acc):
        self.a, self.b, self.acc, self.result = a, b, acc, None
        self.shared = [x.buffer for x in (a, b) if isinstance(x, View)]
        for buffer in self.shared:
            buffer.start_reading_by_hardware("a product")

    def compute(self):
        if self.result is None:
            a, b = ((x.data if isinstance(x, View) else x).float() for x in (self.a, self.b))
            acc = self.acc
            if isinstance(acc, Product):
                acc.compute()
                acc = acc.result
            self.result = a @ b if acc is None else acc + a @ b

    def __getattr__(self, name):
        raise ProtocolError("the result of a product is used without a wait")

    __add__ = __sub__ = __mul__ = __rmul__ = __getitem__ = lambda self, other: self.elements
