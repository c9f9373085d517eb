"""The run folder: which one a run gets, and config.json, which says how to repeat it."""

import dataclasses
import platform
import re
import reprlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from gptlib import checkpoint, options
from gptlib.errors import UserError, writing

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
    if resume or overwrite:
        return
    if checkpoint.exists(out):
        raise UserError(f"--out {out} holds a run; add --resume or --overwrite, or name another folder")
    if (Path(out) / "config.json").exists():
        raise UserError(
            f"--out {out} holds a run that ended before its first checkpoint; add --overwrite to replace its files, "
            "or name another folder"
        )


def claim(args):
    """The run folder, made (or emptied of the run that --overwrite gives up)."""
    if args.out is None:
        base = "runs/" + re.sub(r"[^\w.]+", "-", f"{args.preset}-{args.attn}")
        with writing(base):
            return _first_free(base)
    run = Path(args.out)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {run} cannot be made: {e.strerror}; name another folder") from e
    if args.overwrite:
        with writing(run):
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
    """The arguments a run was started with, by flag name; UserError for values that its flags would not take."""
    path = Path(run) / "config.json"
    try:
        config = checkpoint.read_json(path)
        if "converted_from" in config and "arguments" not in config:
            raise UserError(
                f"{run} is an imported model, with no training to resume; it can be sampled from (gptlib.generate) and "
                "exported (gptlib.convert --to-hf)"
            )
        arguments = config.get("arguments")
        if not isinstance(arguments, dict) or not arguments.keys() >= set(options.FIXED_ON_RESUME):
            raise ValueError(f"arguments is {reprlib.repr(arguments)}, not the run's")
        inherited = vars(options.parse([])).keys() - set(options.NOT_INHERITED)
        for name in sorted(inherited & arguments.keys()):  # a run of another version may lack some and have others
            if not _is_valid(name, arguments[name]):
                raise ValueError(f"{name} is {reprlib.repr(arguments[name])}")
        return arguments
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); --resume needs the config.json of the run") from e
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); --resume needs it as the run wrote it") from e


def _is_valid(name, value):
    """Whether the trainer's own parser, given this value, reads the same."""
    if value is None:
        return options.DEFAULTS[""].get(name) is None
    if isinstance(value, list):
        return value != [] and all(_read_back(name, item) == [item] for item in value)
    return _read_back(name, value) == value


def _read_back(name, value):
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        word = flag if value else flag.replace("--", "--no-", 1)
    else:
        word = f"{flag}={value}"
    try:
        return vars(options.parse([word]))[name]
    except UserError:
        return None


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
