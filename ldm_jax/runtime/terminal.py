"""The terminal's encoding, which may lack characters of the names of classes and files."""

import io
import sys


def print_any_text() -> None:
    """Makes print escape the characters that the encoding of the standard output lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
