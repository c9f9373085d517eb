"""Nothing is timed before it is right: the error rule (bench/parity.py) applied to every provider."""

import contextlib
import importlib.util
import math
from dataclasses import dataclass

import torch

from bench import parity, providers, timing

SEED = 1


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a provider on one shape."""

    status: str  # "ok", or a row's status
    interpreted: bool = False
    worst: parity.Comparison | None = None
    note: str = ""


class Gate:
    """Checks providers against the float64 reference, one verdict per (provider, checked shape)."""

    def __init__(self, bench, reference, device, with_gradients):
        self.bench, self.reference, self.device, self.with_gradients = bench, reference, device, with_gradients
        self._expected, self._verdicts = {}, {}

    def verdict(self, provider, case):
        key = (provider.name, *case.items())
        if key not in self._verdicts:
            self._verdicts[key] = self._check(provider, case)
        return self._verdicts[key]

    def _check(self, provider, case):
        inputs, upstream, ref, eager = self._expectation(case)
        try:
            with count_interpreted_launches() as launches:
                results = self._results(provider.call, inputs, upstream, case)
            compared = {n: self._compare(case, n, x, ref[n], eager[n]) for n, x in results.items()}
        except Exception as e:  # a kernel's fault shows where its result is first read
            compared, failure = None, Verdict(status_of(e), note=providers.first_line(e))
        if compared is None:
            timing.free_memory()  # only now: an exception being handled holds what its frames hold
            return failure
        name, worst = max(compared.items(), key=lambda item: relative_error(item[1]))
        if worst.problem:
            return Verdict("wrong", worst=worst, note=f"{name}: {worst.problem}")
        return Verdict("ok", interpreted=launches() > 0, worst=worst)

    def _compare(self, case, name, tensor, ref, eager):
        rows, scale = self.bench.summed_rows(case, name), self.bench.intermediate(case, name)
        return parity.compare(tensor, ref, eager, scale=scale, rows=rows)

    def _expectation(self, case):
        key = tuple(case.items())
        if key not in self._expected:
            self._expected.clear()  # one shape at a time: float64 scores are large
            torch.manual_seed(SEED)
            inputs = self.bench.inputs(case, self.device)
            doubles = {n: in_float64(x) for n, x in inputs.items()}
            outs = as_tuple(self.bench.call(self.reference, inputs, case))
            upstream = [torch.randn_like(o) for o in outs]
            eager = self._results(self.reference, inputs, upstream, case)
            ref = self._results(self.reference, doubles, [g.double() for g in upstream], case)
            self._expected[key] = inputs, upstream, ref, eager
        return self._expected[key]

    def _results(self, function, inputs, upstream, case):
        """{"out": ..., "d<input>": ...} of one forward and backward."""
        outs = as_tuple(self.bench.call(function, inputs, case))
        results = {f"out{i or ''}": out.detach() for i, out in enumerate(outs)}
        if self.with_gradients:
            wanted = {n: x for n, x in inputs.items() if x.requires_grad}
            gradients = torch.autograd.grad(outs, list(wanted.values()), upstream)
            results |= {f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}
        return results


def in_float64(x):
    """A leaf with x's values, in float64 if they are floats."""
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def relative_error(comparison):
    """Error over its bound: above 1 fails. An error without a bound counts as infinite."""
    if comparison.error == 0:
        return 0.0
    return comparison.error / comparison.bound if comparison.bound > 0 else math.inf


@contextlib.contextmanager
def count_interpreted_launches():
    """Counts the kernels that Triton's interpreter ran inside; compiled ones do not count."""
    launched = []
    if importlib.util.find_spec("triton") is None:
        yield lambda: 0
        return
    from triton.runtime.interpreter import GridExecutor

    original = GridExecutor.__call__

    def counting(self, *args, **kwargs):
        launched.append(1)
        return original(self, *args, **kwargs)

    GridExecutor.__call__ = counting
    try:
        yield lambda: len(launched)
    finally:
        GridExecutor.__call__ = original


def status_of(error):
    """The row status that an exception stands for."""
    if timing.is_out_of_memory(error):
        return "oom"
    refusals = ("no available kernel", "not support", "unsupported", "not implemented")
    if isinstance(error, ValueError | NotImplementedError) or any(r in str(error).lower() for r in refusals):
        return "unsupported"
    return "failed"


def as_tuple(outs):
    return outs if isinstance(outs, tuple) else (outs,)
