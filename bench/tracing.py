"""`--profile` of the benches: one torch.profiler trace of every timed provider, and the kernels that took longest."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.timing import quiet_profiler

REPEATS, ROWS = 3, 12


def trace(steps, device, path):
    """Run each of `steps` ({label: callable}) a few times under the profiler; write a Chrome/Perfetto trace to `path`
    and return a table of the operators and kernels that took most time."""
    quiet_profiler()
    for step in steps.values():
        step()  # compiled and warm before the profiler looks
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as result:
        for label, step in steps.items():
            for _ in range(REPEATS):
                with record_function(label):
                    step()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    result.export_chrome_trace(str(path))
    return result.key_averages().table(
        sort_by=f"self_{device.type}_time_total", row_limit=ROWS, max_name_column_width=60
    )
