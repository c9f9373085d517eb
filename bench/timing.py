"""How time and memory are measured, on a GPU and on a CPU, and the ceilings that every figure is held against.

GPU: device events around the step. Before each repeat a buffer larger than any L2 cache is overwritten, so that the
step finds its inputs in memory and not in the cache; and so many times over that meanwhile the host has queued the
whole step, else what it takes to launch kernels would be counted as theirs. CPU: the host's clock, no flush.
"""

import contextlib
import gc
import math
import os
import statistics
import time

import torch

from bench.arguments import GaveUp

MIB = 2**20
FLUSH_BYTES = 256 * MIB  # five times an H100's L2
LEAST_PASSES, MOST_PASSES = 3, 60  # of the flush; one is about 0.1 ms on an H100
HEADROOM = 1.5  # how much longer than the queueing of the step they take
MOST_REPEATS, LEAST_REPEATS = 200, 3


class DeviceTimer:
    """CUDA (or ROCm) events. `repeat(step, prepare, times)` gives one duration in milliseconds per repeat."""

    def __init__(self, device):
        self.device = torch.device(device)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # events are recorded on the current one
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        for _ in range(2):  # the first launches take longer
            self.pass_s = self._events_around(self.flushed.zero_)() / 1e3
        self.passes = LEAST_PASSES

    def repeat(self, step, prepare, times):
        waiting, queued_s = [], float("inf")
        for _ in range(times):
            prepared = prepare()
            for _ in range(self.passes):
                self.flushed.zero_()
            start = time.perf_counter()
            waiting.append(self._events_around(lambda prepared=prepared: step(prepared)))
            queued_s = min(queued_s, time.perf_counter() - start)  # the least: a full queue makes the host wait
            self.passes = flush_passes(queued_s, self.pass_s)
        return [milliseconds() for milliseconds in waiting]

    def _events_around(self, run):
        """Queue `run()`; what is returned waits for it and says how long it took."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()

        def milliseconds():
            end.synchronize()
            return start.elapsed_time(end)

        return milliseconds

    def now(self):
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def extra_memory(self, run):
        """Most bytes allocated at once while `run()` runs, beyond those allocated before it."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def flush_passes(queued_s, pass_s):
    """How often to overwrite the buffer, so that it takes longer than the step to be queued."""
    return max(LEAST_PASSES, min(MOST_PASSES, math.ceil(HEADROOM * queued_s / pass_s)))


class HostTimer:
    """The host's clock and, for memory, the CPU allocator's own record."""

    def repeat(self, step, prepare, times):
        durations = []
        for _ in range(times):
            prepared = prepare()
            start = time.perf_counter()
            step(prepared)
            durations.append(1e3 * (time.perf_counter() - start))
        return durations

    def now(self):
        return time.perf_counter()

    def extra_memory(self, run):
        quiet_profiler()
        gc.collect()
        with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
            run()
        events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak


def timer_for(device):
    return DeviceTimer(device) if torch.device(device).type == "cuda" else HostTimer()


def sample(timer, step, prepare=lambda: None, *, budget_s):
    """Durations in ms of `step(prepare())`, only the step timed: as many repeats as `budget_s` seconds hold, after two
    that compile, allocate and warm up."""
    timer.repeat(step, prepare, 2)
    start = timer.now()
    timer.repeat(step, prepare, 1)
    cost = max(timer.now() - start, 1e-6)
    return timer.repeat(step, prepare, min(MOST_REPEATS, max(LEAST_REPEATS, int(budget_s / cost))))


def percentiles(durations):
    """(p20, p50, p80) of a list of durations."""
    if len(durations) == 1:
        return (durations[0],) * 3
    deciles = statistics.quantiles(durations, n=10, method="inclusive")
    return deciles[1], statistics.median(durations), deciles[7]


def measure_ceilings(timer, device, dtypes, budget_s):
    """{"matmul <dtype>": FLOP/s, ..., "copy": bytes/s}: what a large matrix product and a large copy reach here.

    The copy's bytes are those read plus those written.
    """
    on_gpu = torch.device(device).type == "cuda"
    ceilings = {}
    for dtype in dtypes:
        size = 1024 if not on_gpu else 4096 if dtype == torch.float32 else 8192
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        p50_ms = percentiles(sample(timer, lambda _, a=a, b=b: a @ b, budget_s=budget_s))[1]
        ceilings[f"matmul {dtype_name(dtype)}"] = 2 * size**3 / p50_ms * 1e3
        del a, b
    source = torch.randn((1024 if on_gpu else 128) * MIB // 4, device=device)
    target = torch.empty_like(source)
    p50_ms = percentiles(sample(timer, lambda _: target.copy_(source), budget_s=budget_s))[1]
    ceilings["copy"] = 2 * source.numel() * 4 / p50_ms * 1e3
    return ceilings


def quiet_profiler():
    """Keep torch's profiler from reporting its own start and stop on stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def dtype_name(dtype):
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def is_out_of_memory(error):
    """Whether an exception says that a device or the host ran out of memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def free_memory():
    """Give back what a failed or finished measurement held."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # of a lost device, which `require_device` reports by name
            torch.cuda.empty_cache()


def require_device(device, culprit):
    """GaveUp if a kernel's fault (an illegal address, say) took the GPU away from this process: all that follows would
    fail, and be blamed on others. To be called after whatever failed."""
    if torch.device(device).type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as e:
        reason = str(e).strip().splitlines()[0]
        raise GaveUp(
            f"{culprit}: {reason}. After that this process has no GPU; the rows so far are saved, "
            "for the others run again without it"
        ) from e
