"""What the tests of softmax and of the norms share: tensors in many layouts, one op run three ways, counted traffic."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import kernels
from gptlib import reference
from kernels import _tuning
from kernels._runtime import INTERPRETED, arch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "sliced", "strided", "transposed", "expanded")
FEW_EXAMPLES, MANY_EXAMPLES = (
    settings(
        max_examples=n, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    for n in (12, 40 if INTERPRETED else 16)  # compiled, every example has kernels of its own
)


def make(shape, dtype, device, layout="contiguous"):
    """Random tensor: `sliced` starts off any alignment, `strided` has no unit stride, `transposed` and `expanded` have
    leading dimensions that do not collapse."""
    *lead, n = shape
    if layout == "sliced":
        x = torch.randn(*lead, n + 3, device=device)[..., 1 : n + 1]
    elif layout == "strided":
        x = torch.randn(*lead, 2 * n, device=device)[..., ::2]
    elif layout == "transposed" and len(lead) > 1:
        x = torch.randn(*lead[::-1], n, device=device).permute(*range(len(lead) - 1, -1, -1), len(lead))
    elif layout == "expanded" and lead:
        x = torch.randn(1, *lead[1:], n, device=device).expand(shape)
    else:
        x = torch.randn(shape, device=device)
    return _cast_keeping_strides(x, dtype)


def _cast_keeping_strides(x, dtype):
    base = torch.as_strided(x, (x.untyped_storage().nbytes() // 4,), (1,), 0).to(dtype)
    return torch.as_strided(base, x.shape, x.stride(), x.storage_offset())


@st.composite
def row_tensors(draw, longest=300, min_dims=1):
    """(shape, dtype, layout)"""
    lead = draw(st.lists(st.integers(1, 4), min_size=min_dims - 1, max_size=3))
    return (*lead, draw(st.integers(1, longest))), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))


def run(op, tensors, grads, dtype=None):
    """Outputs of op(*tensors), each backpropagated with its gradient, then the gradients of the tensors (None is left
    out). With `dtype`, everything is converted to it first."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [g.to(o.dtype) if dtype else g for g, o in zip(grads, outputs, strict=True)])
    return [o.detach() for o in outputs] + [t.grad for t in leaves if t is not None]


def run_three_ways(call, tensors, grads):
    """run() of call(module, *tensors): the kernels, the reference in the same dtype, the reference in float64."""
    ops = [lambda *t, m=m: call(m, *t) for m in (kernels, reference)]
    return run(ops[0], tensors, grads), run(ops[1], tensors, grads), run(ops[1], tensors, grads, torch.float64)


def rounding_scale(ref, intermediate, dtype):
    """The oracle's `scale` where fp32 values as large as `intermediate` cancel in a result of `dtype`: one of their
    roundings is eps(fp32) * intermediate, next to the eps(dtype) * max|ref| of rounding the result."""
    return max(ref.abs().max().item(), float(intermediate) * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)


def use_small_tiles(monkeypatch, device):
    """Tables that send rows of more than 64 elements down the path of rows that fit no program, and add up the partial
    sums of several programs in more than one step."""
    key = _tuning.table_arch(arch(torch.device(device)), _tuning.ROWS)
    table = _tuning.RowTable(((64, 512, 4),), (8, 64, 4))
    monkeypatch.setitem(_tuning.ROWS, key, dict.fromkeys(_tuning.ROWS[key], table))
    monkeypatch.setitem(_tuning.PARTIALS_TILE, key, (2, 64, 4))


@contextlib.contextmanager
def drawn_tiles(small, device):
    """Small tiles inside if they were drawn: for hypothesis, whose examples share one monkeypatch fixture."""
    with pytest.MonkeyPatch.context() as patch:
        if small:
            use_small_tiles(patch, device)
        yield


class Traffic:
    """How often each element was loaded and stored, as the interpreter saw it."""

    def __init__(self):
        self.loads, self.stores = [], []

    def reads(self, tensor):
        return self._count(self.loads, tensor)

    def writes(self, tensor):
        return self._count(self.stores, tensor)

    def total_bytes(self, cached=None):
        """Of all loads and stores; those of the tensor `cached` count once, for only the first leaves the cache."""
        total = sum(addresses.size * size for addresses, size in self.loads + self.stores)
        return total if cached is None else total - int((self.reads(cached) - 1).sum()) * cached.element_size()

    def _count(self, accesses, tensor):
        """int64, contiguous `tensor`'s shape."""
        first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        counts = np.zeros(tensor.numel(), np.int64)
        for addresses, _ in accesses:
            inside = addresses[(addresses >= first) & (addresses < end)]
            np.add.at(counts, (inside - first) // tensor.element_size(), 1)
        return torch.from_numpy(counts).view(tensor.shape)


@contextlib.contextmanager
def counted_traffic():
    """Yields a Traffic that counts every access of the kernels run inside; for the interpreter only."""
    assert INTERPRETED
    from triton.runtime.interpreter import interpreter_builder as builder

    traffic, load, store = Traffic(), builder.create_masked_load, builder.create_masked_store

    def note(accesses, pointers, mask):
        addresses, mask = np.broadcast_arrays(pointers.data, mask.data)
        accesses.append((addresses[mask].astype(np.int64), pointers.get_element_ty().primitive_bitwidth // 8))

    def counting_load(pointers, mask, *args):
        note(traffic.loads, pointers, mask)
        return load(pointers, mask, *args)

    def counting_store(pointers, value, mask, *args):
        note(traffic.stores, pointers, mask)
        return store(pointers, value, mask, *args)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    try:
        yield traffic
    finally:
        del builder.create_masked_load, builder.create_masked_store
