"""The two ways a command fails by itself; of anything else it shows one line too, and keeps the traceback in a file."""


class UserError(ValueError):
    """Bad input: the message is one line that names the field or file and the remedy. Exit code 2."""


class CheckFailed(Exception):
    """A check said no, or the work failed for a reason outside the input. Exit code 1."""
