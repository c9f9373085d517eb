class UserError(Exception):
    """Bad input from the user: one clear line that says what, why and what to do; a command line exits with code 2."""
