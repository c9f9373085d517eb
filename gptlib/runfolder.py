"""The run folder: which one a run gets, and config.json, which says how to repeat it."""

import dataclasses
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from gptlib import checkpoint
from gptlib.errors import UserError

FILES = ("config.json", "tokenizer.json", "metrics.csv", "loss.png")
FOLDERS = ("checkpoint", "checkpoint.new", "checkpoint.partial", "profile")


def refuse_taken(out, *, resume, overwrite):
    """UserError unless --out, --resume and --overwrite fit together and what is on the disk."""
    if resume and out is None:
        raise UserError("--resume needs the run folder: --resume --out DIR")
    if overwrite and out is None:
        raise UserError("--overwrite needs the run folder: --overwrite --out DIR")
    if resume:
        checkpoint.find(out)
    if out is None:
        return
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if _holds_run(out) and not (resume or overwrite):
        raise UserError(f"--out {out} holds a run; add --resume or --overwrite, or name another folder")


def claim(args):
    """The run folder, made (or emptied of the run that --overwrite gives up)."""
    if args.out is None:
        base = "runs/" + re.sub(r"[^\w.]+", "-", f"{args.preset}-{args.attn}")
        return _first_free(base)
    run = Path(args.out)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {run} cannot be made: {e.strerror}; name another folder") from e
    if args.overwrite:
        for name in FOLDERS:
            shutil.rmtree(run / name, ignore_errors=True)
        for name in FILES:
            (run / name).unlink(missing_ok=True)
    return run


def write_config(run, args, cfg, corpus, device, dtype):
    """config.json: every argument, the model's shape, the data, versions, machine and commit."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    checkpoint.write_json(
        run / "config.json",
        {
            "command": shlex.join(["python", "-m", "gptlib.train", *sys.argv[1:]]),
            "arguments": vars(args),
            "model": dataclasses.asdict(cfg),
            "tokenizer": {
                "name": corpus.tokenizer.name,
                "n_vocab": corpus.tokenizer.n_vocab,
                "hash": corpus.tokenizer.hash,
            },
            "data": {
                "fingerprint": corpus.fingerprint,
                "train_tokens": len(corpus.train),
                "val_tokens": len(corpus.val),
                "train_bytes": corpus.train_bytes,
                "val_bytes": corpus.val_bytes,
                "val_unigram_entropy": corpus.val_unigram_entropy,
            },
            "machine": {
                "device": str(device),
                "gpu": gpu,
                "dtype": str(dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "platform": platform.platform(),
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **_versions()},
            "commit": _commit(),
        },
    )


def stored_arguments(run):
    """The arguments a run was started with, by flag name."""
    path = Path(run) / "config.json"
    try:
        return json.loads(path.read_text())["arguments"]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{path} cannot be read ({e}); --resume needs the config.json of the run") from e


def _holds_run(folder):
    return checkpoint.exists(folder) or (Path(folder) / "config.json").exists()


def _first_free(base):
    number = 1
    while True:
        run = Path(base if number == 1 else f"{base}-{number}")
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            number += 1


def _versions():
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("triton", "numpy", "tiktoken", "tokenizers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _commit():
    """The checkout's commit, "-dirty" if files differ from it; None outside a checkout or without git."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
