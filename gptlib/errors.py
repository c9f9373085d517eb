"""A user's mistakes, and the command lines that report them."""

import argparse


class UserError(Exception):
    """Bad input from the user: one clear line that says what, why and what to do; a command line exits with code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")
