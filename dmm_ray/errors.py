"""The two expected kinds of failure; any other is also shown in one line, with its traceback kept in a file."""


class UserError(ValueError):
    """Bad input: the message is one line that names the field or file and the remedy. Exit code 2."""


class CheckFailed(Exception):
    """A check failed, or the work failed for a reason other than bad input. Exit code 1."""
