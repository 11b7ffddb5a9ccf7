"""The two ways a command may fail, each told in one line: what is wrong, what was given, what would be right."""


class InputError(Exception):
    """The user's input is wrong (a flag, a file, a config field); nothing was written. The command exits with 2."""


class RunError(Exception):
    """The run itself went wrong (a full disk, a loss that is not finite); progress is kept. The status is 1."""
