"""What watches a run: its clock, the signals that end it, the profiler."""

import contextlib
import signal
import time

import torch

from gptlib.errors import writing


class Interval:
    """Losses and time since the last report. Evaluation, samples and checkpoints fall between two intervals."""

    def __init__(self):
        self.losses = []
        self.start = time.perf_counter()

    def finish(self, tokens_per_step):
        """(mean loss, tokens/s), once the device has caught up."""
        mean = float(torch.stack(self.losses).mean())
        return mean, len(self.losses) * tokens_per_step / (time.perf_counter() - self.start)


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between steps; a second one acts at once."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.previous = {s: signal.signal(s, self.notice) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def notice(self, number, frame):
        self.signal = number
        self.restore()

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self.restore()


def profiler(run, device, enabled):
    """torch.profiler over steps 4 to 6 of this process, or a context that does nothing."""
    if not enabled:
        return contextlib.nullcontext()
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")

    def write(result):
        folder = run / "profile"
        order = f"self_{device.type}_time_total"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            result.export_chrome_trace(str(folder / "trace.json"))
            (folder / "top_ops.txt").write_text(result.key_averages().table(sort_by=order, row_limit=25) + "\n")

    return profile(activities=activities, schedule=schedule(wait=2, warmup=1, active=3, repeat=1), on_trace_ready=write)
