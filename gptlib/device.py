"""Where to run, and in which dtype. Every entry point calls `choose_device` straight after parsing its arguments."""

import contextlib
import os

import torch

from gptlib.errors import UserError

NO_AUTOCAST = contextlib.nullcontext()


def choose_device(name="auto"):
    """ "auto" (the GPU where there is one), "cpu", "cuda" or "cuda:1" -> torch.device.

    On a CPU the kernels run in Triton's interpreter, which has to be chosen before anything imports Triton, and torch
    imports it when an AdamW is made: hence here, first thing, and not where the kernels are loaded.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name or "meta")
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda or cuda:1")
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    elif (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; use cpu"
        )
    return device


def choose_dtype(name, device):
    """The dtype of matrix products; "auto" is bfloat16 on a GPU that has it in hardware, else float32."""
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return getattr(torch, name)


_NO_MEMORY = ("can't allocate memory", "size calculation overflowed")  # in torch's words


@contextlib.contextmanager
def memory_for(cfg, advice="make it smaller: --preset, --n-layers, --emb-dim, --context-length or --vocab-size"):
    """UserError where a model of this shape finds no memory."""
    try:
        yield
    except RuntimeError as e:
        if not (isinstance(e, torch.OutOfMemoryError) or any(words in str(e) for words in _NO_MEMORY)):
            raise
        raise UserError(f"out of memory for a model of {cfg.n_params:,} parameters; {advice}") from e


def autocast_for(device, dtype):
    """A context for forward passes: autocast for bfloat16, nothing for float32."""
    if dtype == torch.float32:
        return NO_AUTOCAST
    return torch.autocast(device.type, dtype=dtype)
