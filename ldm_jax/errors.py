"""How a command ends early, each printed as one line: what is wrong, what was given, what would be right."""


class InputError(Exception):
    """The user's input is wrong (a flag, a file, a config field) and nothing was written: exit status 2."""


class RunError(Exception):
    """The run failed (a full disk, a loss that is not finite) and its progress is saved: exit status 1."""


class Interrupted(Exception):
    """A signal stopped the run and its progress is saved: exit status 143 (SIGTERM) or 130 (SIGINT), `status`."""

    status = 143
