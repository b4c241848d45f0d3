"""The one exception for bad input."""


class InputError(ValueError):
    """Bad input: a file, flag, setting or argument that cannot be used.

    Its message is one clear line that names the thing, its value, and the way out. The commands
    print it without a traceback and leave with exit code 2; in a notebook it is a ``ValueError``.
    """
