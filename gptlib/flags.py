"""Types of flags: a flag's text to its value, or one line that says what is wrong with it."""

import argparse
import math


def positive_int(text):
    value = _number(int, text, "a positive integer")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return _in_64_bits(value)


def non_negative_int(text):
    value = _number(int, text, "an integer of at least 0")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return _in_64_bits(value)


def positive_float(text):
    value = _number(float, text, "a positive number")
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def non_negative_float(text):
    value = _number(float, text, "a number of at least 0")
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def fraction(text):
    value = _number(float, text, "a number above 0 and at most 1")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def below_one(text):
    value = _number(float, text, "a number of at least 0 and below 1")
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def file_name(text):
    """Not the empty text, which an unset variable leaves and which would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; name a file or folder (. is the current one)")
    return text


def _in_64_bits(value):
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not below 2^63")
    return value


def _number(kind, text, wanted):
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
