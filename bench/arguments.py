"""Command lines that teach, and complain in one line: for every bench, torch or no torch."""

import argparse
import sys

from gptlib import errors


class Parser(errors.Parser):
    """Help is the script's docstring, the flags after its first paragraph."""

    def __init__(self, doc, **options):
        first, _, rest = doc.strip().partition("\n\n")
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=first, epilog=rest, formatter_class=formatter, allow_abbrev=False, **options)


class GaveUp(Exception):
    """A run that cannot go on through no fault of its user; what it found so far is saved."""


def run(main, argv=None):
    """Exit status: what `main(argv)` returns, 0 for None; 2 and one line on stderr for a user's mistake, 1 and one line
    where it gave up, 130 when interrupted."""
    try:
        return main(argv) or 0
    except errors.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except GaveUp as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
