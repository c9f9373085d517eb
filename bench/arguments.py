"""Command lines that teach, and complain in one line: for every bench, torch or no torch."""

import argparse
import os
import sys
from pathlib import Path

from gptlib import errors


class Parser(errors.Parser):
    """Help is the script's docstring, the flags after its first paragraph."""

    def __init__(self, doc, **options):
        first, _, rest = doc.strip().partition("\n\n")
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=first, epilog=rest, formatter_class=formatter, allow_abbrev=False, **options)


def folder(text):
    """A path that is a folder, or can become one, and can be written to."""
    path = Path(text).absolute()
    found = next(p for p in (path, *path.parents) if os.path.exists(p))
    if not text or not found.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is {'a file' if text else 'empty'}; name a folder")
    if not os.access(found, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written to; name another folder")
    return text


class GaveUp(Exception):
    """A run that cannot go on through no fault of its user; what it found so far is saved."""


def run(main, argv=None):
    """The exit status of `main(argv)`: as of every command (errors.exit_status), 1 and one line where it gave up."""

    def command():
        try:
            return main(argv)
        except GaveUp as e:
            print(f"error: {e}", file=sys.stderr)
            return 1

    return errors.exit_status(command)
