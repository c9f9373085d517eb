"""Runs the trainer in this process on a small real text, as its command line would."""

import contextlib
import io
import json.scanner
import textwrap
from pathlib import Path

from gptlib import train
from gptlib.metrics import read_metrics

SHAPE = (
    *("--n-layers", "2", "--n-heads", "2", "--emb-dim", "32", "--context-length", "32"),
    *("--batch-size", "4", "--tokenizer", "bytes", "--device", "cpu"),
)


def real_text(folder):
    """Two modules of the standard library as documents, 22 kB in all."""
    folder.mkdir(exist_ok=True)
    for module in (json.scanner, textwrap):
        source = Path(module.__file__)
        (folder / source.name).write_text(source.read_text())
    return str(folder)


def run(*flags, data=None):
    """(exit code, stdout, stderr) of the trainer with the small shape and these flags."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.main([*SHAPE, *(["--data", data] if data else []), *(str(f) for f in flags)])
    return code, out.getvalue(), err.getvalue()


def losses(folder):
    """The training loss of every row of metrics.csv."""
    return [row["train_loss"] for row in read_metrics(Path(folder) / "metrics.csv")]
