"""What a figure depends on besides the code: machine, versions, command and commit. `python bench/environment.py`
prints it."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import table

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [
    *("torch", "triton", "pytorch-triton-rocm", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "numpy", "tiktoken"),
    *("xformers", "flash-attn", "flash-attn-3", "flash-attn-4", "flash-linear-attention", "liger-kernel"),
    *("quack-kernels", "tokenizers"),
]


def describe(device, commit=None):
    """The environment of this process as a flat, JSON-ready dict; `commit` overrides what git says."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command_line(),
        "commit": commit or git_commit(),
        "device": device_name(device),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "float32_matmul": torch.get_float32_matmul_precision(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = gpu_facts()
    return facts


def gpu_facts():
    """What torch and the driver say about the current CUDA (or ROCm) device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory // 2**20,
        "l2_mib": getattr(properties, "L2_cache_size", 0) // 2**20,
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "cudnn": torch.backends.cudnn.version(),
    }
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.memory,clocks.sm,temperature.gpu"
    answer = run_quietly(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
    if answer:
        facts.update(zip(query.split(","), (v.strip() for v in answer.splitlines()[0].split(",")), strict=False))
    return facts


def device_name(device):
    """ "NVIDIA H100 80GB HBM3", or "CPU"."""
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"


def results_folder(device):
    """The device's folder of published results: results/h100-80gb-hbm3, results/cpu."""
    return ROOT / "results" / table.folder_name(device_name(device))


def git_commit():
    """Short commit id of the checkout, "+changes" when files differ from it, "unknown" without git."""
    commit = run_quietly(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return "unknown"
    changed = run_quietly(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+changes" if changed else "")


def command_line():
    """How this process was started, with the script named from the checkout's root."""
    script = Path(sys.argv[0])
    name = script.name
    if script.is_absolute() or script.exists():
        full = script.resolve()
        name = str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else full.name
    return " ".join(["python", name, *sys.argv[1:]])


def cpu_name():
    """The processor's own name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def package_version(name):
    """Installed version of a distribution, None without it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_quietly(command):
    """Standard output of a command, stripped; empty when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    print(json.dumps(describe("cuda" if torch.cuda.is_available() else "cpu"), indent=2))
