"""Lines on the terminal: warnings, which a caller may collect; its encoding, which may lack characters of names."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_collected: ContextVar[list[str] | None] = ContextVar("warnings", default=None)


def warn(line: str) -> None:
    """Prints a warning to the standard error, and adds it to those of an enclosing `collect_warnings`."""
    print(line, file=sys.stderr)
    if (lines := _collected.get()) is not None:
        lines.append(line)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Yields a list to which the warnings of the block are added, of this thread alone."""
    lines: list[str] = []
    token = _collected.set(lines)
    try:
        yield lines
    finally:
        _collected.reset(token)


def print_any_text() -> None:
    """Makes print escape the characters that the encoding of the standard output lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
