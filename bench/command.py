"""The command line that all benches share."""

import argparse
import re

import torch

from bench.arguments import Parser, folder, run  # noqa: F401  (for every bench)
from gptlib.flags import positive_int

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODES = ("fwd", "bwd", "fwd+bwd")


def positives(text):
    """Comma-separated positive integers."""
    return [positive_int(part) for part in text.split(",")]


def names(text):
    """Comma-separated names."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("at least one name is needed")
    return found


def one_of(known):
    """Comma-separated names out of `known`."""

    def parse(text):
        for name in names(text):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown; known: {', '.join(known)}")
        return names(text)

    return parse


def label(text):
    """A word that can be part of a file's name."""
    if not re.fullmatch(r"[a-z0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of a to z and 0 to 9 alone")
    return text


def parser(doc):
    """The flags common to every bench, whose docstring is the help."""
    p = Parser(doc)
    p.add_argument("--device", default="auto", help="auto (the default), cuda, cuda:1 or cpu")
    p.add_argument("--out", type=folder, default="runs/bench", metavar="DIR", help="for CSV and JSON (runs/bench)")
    p.add_argument("--publish", action="store_true", help="also replace this bench's files under results/")
    p.add_argument("--label", type=label, help="writes <bench>-LABEL, so that a run of other shapes has its own files")
    p.add_argument("--commit", help="commit id to record, for a checkout without git")
    p.add_argument("--profile", action="store_true", help="also write a Chrome trace and print the top kernels")
    return p
