"""Executes a warp-specialized Gluon kernel for Hopper on a CPU, and is as unkind to it as the hardware may be.

    with emulated(Schedule("last", "late")):
        out, lse = hopper_forward(q, k, v, scale)

runs the functions that the compiler would compile, with `gl`, `mbarrier`, `tma` and wgmma replaced by what stands
below. Each partition is a thread, but only one runs at a time: it hands over at every operation that others can notice,
and the schedule decides who is next. What the hardware does on its own happens when the schedule says:

    early     at once: a copy lands before the next operation, a product is done when it is issued
    late      at the last moment: when nobody can go on, a copy lands that somebody waits for; products at their wait
    random    in between, drawn from a seed

Registers are torch tensors, 16-bit types rounded by torch. Shared memory is NaN until written, and from the start of a
copy until it lands. These end a run with a ProtocolError:

    a result that no wait has been passed yet is used, or goes through a wait that need not cover it
    memory is written while a product or a store may read it, or read while a copy may write it
    a product or TMA takes a tile that was not fenced since it was written, or not by all threads that wrote it
    more arrivals at a barrier than it counts, or a barrier used before it was initialized
    nobody can go on (who waits for which phase is listed)
    the program ends with something on its way

Not modelled: layouts (the compiler checks those), the threads inside a partition but for that (the compiler's barriers
keep them together where one of them uses what another wrote), and registers that an operand in flight still needs
(ptxas knows them). Kernels that are not Gluon's go to Triton's interpreter.
"""

import inspect
import itertools
import random
import re
import textwrap
import threading
import types
from typing import NamedTuple

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from kernels._runtime import record_launches
from tests.gluon_memory import Barrier, Buffer, Descriptor, Pointer, Product, ProtocolError, Ring, View


class Schedule(NamedTuple):
    """Who runs next among those who can ("first", "last" of the partitions or "random"), and when the hardware works
    ("early", "late" or "random")."""

    order: str
    hardware: str
    seed: int = 0


SCHEDULES = [
    *(Schedule(order, hardware) for order in ("first", "last") for hardware in ("early", "late")),
    *(Schedule("random", "random", seed) for seed in range(4)),
]


class Partition(threading.Thread):
    """A partition: a thread that runs when the machine says so."""

    def __init__(self, machine, name, function):
        super().__init__(daemon=True)
        self.machine, self.label, self.function = machine, name, function
        self.turn = threading.Semaphore(0)
        self.can_go_on, self.waits_for, self.barrier = None, "", None
        self.products, self.stores, self.error, self.done = [], [], None, False

    def run(self):
        self.turn.acquire()
        try:
            if not self.machine.stopped:
                self.function()
                if self.products or self.stores:
                    raise ProtocolError(f"{self.label} ends with a product or a store on its way")
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.machine.turn.release()


class Stopped(Exception):
    """Another partition has failed: unwind."""


# ---- the machine -----------------------------------------------------------------------------------------------------


class Emulator:
    """Runs launches, program after program. `edits`: {a piece of the kernel's source: what to run instead of it}."""

    def __init__(self, schedule=SCHEDULES[0], edits=None):
        self.schedule, self.edits, self.unused_edits = schedule, edits or {}, set(edits or {})
        self.random = random.Random(schedule.seed)
        self.turn = threading.Semaphore(0)
        self.functions, self.names = {}, self.vocabulary()

    def __call__(self, kernel, grid, args, constexprs, options):
        if isinstance(kernel, InterpretedFunction):
            kernel[grid](*args, **constexprs)
            return
        function = self.function(kernel.fn)
        args, self.grid = [self.argument(x) for x in args], grid
        for self.program in itertools.product(*map(range, grid)):
            self.partitions, self.copies, self.buffers, self.stopped = [], [], [], False
            self.barriers = itertools.count()
            self.start("kernel", lambda: function(*args, **constexprs))
            self.run()
        assert not self.unused_edits, f"the kernel has no {self.unused_edits}"

    @staticmethod
    def argument(x):
        if isinstance(x, torch.Tensor):
            return Pointer(x.view(-1))
        return Descriptor(x) if hasattr(x, "block_shape") else x

    # -- who runs

    def start(self, name, function):
        partition = Partition(self, name, function)
        self.partitions.append(partition)
        partition.start()
        return partition

    def run(self):
        """Until all partitions are done; whatever one of them raises is raised here."""
        try:
            while alive := [x for x in self.partitions if not x.done]:
                self.let_hardware_work()
                ready = [x for x in alive if x.can_go_on is None or x.can_go_on()]
                if ready:
                    self.resume({"first": ready[0], "last": ready[-1]}.get(self.schedule.order) or self.pick(ready))
                elif self.copies:
                    self.land(self.last_moment())
                else:
                    raise ProtocolError("; ".join(f"{x.label} waits for {x.waits_for}" for x in alive[1:] or alive))
            if self.copies:
                raise ProtocolError("the program ends with a copy on its way")
        finally:
            self.stopped = True
            for partition in self.partitions:
                partition.turn.release()

    def resume(self, partition):
        self.partition = partition
        partition.turn.release()
        self.turn.acquire()
        if partition.error is not None:
            raise partition.error

    def pause(self, can_go_on=None, waits_for="", barrier=None):
        """Called by the partition that runs: hand over, until it may go on and is chosen."""
        partition = self.partition
        partition.can_go_on, partition.waits_for, partition.barrier = can_go_on, waits_for, barrier
        self.turn.release()
        partition.turn.acquire()
        if self.stopped:
            raise Stopped

    def pick(self, choices):
        return choices[self.random.randrange(len(choices))]

    def let_hardware_work(self):
        if self.schedule.hardware == "random" and self.random.random() < 0.3:
            products = [next((p for p in x.products if p.result is None), None) for x in self.partitions]
            pending = [*self.copies, *filter(None, products)]
            work = self.pick(pending) if pending else None
            if isinstance(work, Product):
                work.compute()
            elif work is not None:
                self.copies.remove(work)
                self.land(work)

    # -- copies and products

    def last_moment(self):
        """The newest copy, if possible of those that somebody waits for."""
        awaited = [x.barrier for x in self.partitions if not x.done]
        needed = [i for i, (_, _, barrier, _) in enumerate(self.copies) if any(barrier is b for b in awaited)]
        return self.copies.pop(needed[-1] if needed else -1)

    def land(self, copy):
        desc, coordinates, barrier, view = copy
        view.data.copy_(desc.load(coordinates))
        view.buffer.writers -= 1
        barrier.land(desc.block_type.nbytes)

    def tma_load(self, desc, coordinates, barrier, view):
        self.pause()
        view.buffer.start_writing("a copy")
        self.copies.append((desc, coordinates, barrier, view))
        if self.schedule.hardware == "early":
            self.land(self.copies.pop())

    def tma_store(self, desc, coordinates, view):
        self.leave(desc.save, coordinates, view)

    def tma_add(self, desc, coordinates, view):
        self.leave(desc.add, coordinates, view)

    def leave(self, write, coordinates, view):
        self.pause()
        view.buffer.start_reading_by_hardware("TMA")
        self.partition.stores.append((write, coordinates, view))

    def store_wait(self, pendings):
        self.pause()
        while len(self.partition.stores) > pendings:
            write, coordinates, view = self.partition.stores.pop(0)
            write(coordinates, view.data)
            view.buffer.readers -= 1

    def warpgroup_mma(self, a, b, acc, use_acc=True, is_async=False):
        self.pause()
        product = Product(a, b, acc if use_acc else None)
        self.partition.products.append(product)
        if self.schedule.hardware == "early":
            product.compute()
        return product if is_async else self.warpgroup_mma_wait(0, (product,))

    def warpgroup_mma_wait(self, num_outstanding, deps):
        self.pause()
        while len(self.partition.products) > num_outstanding:
            product = self.partition.products.pop(0)
            product.compute()
            for buffer in product.shared:
                buffer.readers -= 1
        if any(dep is product for dep in deps for product in self.partition.products):
            raise ProtocolError("a product goes through a wait that lets it be unfinished")
        found = tuple(dep.result if isinstance(dep, Product) else dep for dep in deps)
        return found[0] if len(found) == 1 else found

    def fence_async_shared(self):
        self.pause()
        for buffer in self.buffers:
            if buffer.unfenced is self.partition:
                buffer.unfenced, buffer.fenced_late = None, self.partition if buffer.met else None

    def meet(self):
        """The threads of the partition that runs wait for each other, as the compiler has them do round barriers."""
        for buffer in self.buffers:
            buffer.met |= buffer.unfenced is self.partition
            if buffer.fenced_late is self.partition:
                buffer.fenced_late = None

    # -- barriers and partitions

    def expect(self, barrier, number):
        self.pause()
        self.meet()
        barrier.arrive(expected_bytes=number)

    def arrive(self, barrier, count=1, pred=True):
        if pred:
            self.pause()
            self.meet()
            barrier.arrive(count)

    def wait(self, barrier, parity, pred=True):
        if pred:
            self.meet()
            self.pause(lambda: barrier.passed(parity), f"parity {parity} of {barrier.name}", barrier)

    def warp_specialize(self, functions, warps, registers):
        partitions = [
            self.start(f"partition {i}", lambda function=function, args=args: function(*args))
            for i, (function, args) in enumerate(functions)
        ]
        self.pause(lambda: all(partition.done for partition in partitions), "the partitions")

    def allocate_shared_memory(self, dtype, shape, layout):
        if dtype == torch.int64:
            names = (f"barrier {next(self.barriers)}" for _ in range(shape[0]))
            return Ring(shape, dtype, [Barrier(name) for name in names])
        buffers = [Buffer(torch.empty(shape[1:], dtype=dtype)) for _ in range(shape[0])]
        self.buffers += buffers
        return Ring(shape, dtype, [View(self, buffer, buffer.data) for buffer in buffers])

    # -- from source to functions

    def function(self, fn):
        """`fn` from its source, with the edits made and its module's names translated."""
        if fn not in self.functions:
            source = textwrap.dedent(inspect.getsource(fn))
            source = source[source.index("def ") :]
            for old, new in self.edits.items():
                if old in source:
                    self.unused_edits.discard(old)
                    source = source.replace(old, new)
            space = {}
            exec("from __future__ import annotations\n" + source, space)
            self.functions[fn] = space[fn.__name__]
            used = {name for name in space[fn.__name__].__code__.co_names if name in fn.__globals__}
            space.update({name: self.translate(fn.__globals__[name]) for name in used})
        return self.functions[fn]

    def translate(self, value):
        """What stands here for `value`, found in a kernel's module."""
        if isinstance(value, JITFunction | InterpretedFunction):
            return self.function(value.fn)
        if isinstance(value, tl.constexpr):
            return value.value
        name = getattr(value, "__name__", "")
        return self.names.get(name.removeprefix("triton.experimental.").removeprefix("gluon."), value)

    def vocabulary(self):
        """{name of a module or function of Gluon's: what stands for it}"""
        nothing = lambda *args, **options: None  # noqa: E731
        language = types.SimpleNamespace(
            float32=torch.float32, int64=torch.int64, static_range=range, cast=lambda x, dtype: int(x),
            minimum=min, cdiv=lambda a, b: -(-a // b),
            program_id=lambda axis: self.program[axis], num_programs=lambda axis: self.grid[axis],
            arange=lambda start, end, layout: torch.arange(start, end),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            maximum=maximum, where=where, max=largest,
            sum=lambda x, axis: values(x).sum(axis), exp2=torch.exp2, log2=torch.log2, store=store,
            convert_layout=lambda x, layout: x, NVMMADistributedLayout=nothing, SliceLayout=nothing,
            DotOperandLayout=nothing, NVMMASharedLayout=nothing,
            allocate_shared_memory=self.allocate_shared_memory, warp_specialize=self.warp_specialize,
        )  # fmt: skip
        barriers = types.SimpleNamespace(
            MBarrierLayout=nothing, init=Barrier.init, expect=self.expect, arrive=self.arrive, wait=self.wait
        )
        hopper = "language.nvidia.hopper"
        return {
            "language": language, "triton.language": language, f"{hopper}.mbarrier": barriers,
            f"{hopper}.tma": types.SimpleNamespace(store_wait=self.store_wait),
            **dict.fromkeys(("async_load", "async_copy_global_to_shared"), self.tma_load),
            **dict.fromkeys(("async_store", "async_copy_shared_to_global"), self.tma_store),
            "warpgroup_mma": self.warpgroup_mma, "warpgroup_mma_wait": self.warpgroup_mma_wait,
            "async_atomic_add": self.tma_add, "fence_async_shared": self.fence_async_shared,
        }  # fmt: skip


# ---- for tests -------------------------------------------------------------------------------------------------------


def emulated(schedule=SCHEDULES[0], edits=None):
    """A context in which kernels are launched here, as for a Hopper."""
    return record_launches("sm_90", Emulator(schedule, edits))


def assert_caught(attempt, old, new, complaint):
    """`attempt`, run with `new` in the place of `old` in the kernel's source, raises an AssertionError in which the
    pattern `complaint` is found: by one schedule at least, since what is in time when all goes early may be late."""
    heard = []
    for schedule in SCHEDULES:
        try:
            with emulated(schedule, {old: new}):
                attempt()
        except AssertionError as error:
            heard.append(str(error))
            if re.search(complaint, heard[-1]):
                return
    raise AssertionError(heard or "it passes")


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def values(x):
    """A register tensor's elements: a product has none before its wait."""
    return x.elements if isinstance(x, Product) else x


def where(condition, x, y):
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, values(x), values(y))
    return x if condition else y


def maximum(x, y):
    return torch.fmax(x, y) if isinstance(x, torch.Tensor) else max(x, y)


def largest(x, axis):
    x = values(x)
    return x.masked_fill(x.isnan(), -torch.inf).amax(axis)  # as the GPU's max: of what is a number


def store(pointer, x, mask):
    pointer.memory[pointer.offset[mask]] = x[mask].to(pointer.memory.dtype)
