"""Unpickling of untrusted files: only whitelisted names can be looked up; no code of the pickle's choice runs."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ldm_jax.errors import InputError


class WhitelistUnpickler(pickle.Unpickler):
    """An unpickler that resolves whitelisted names alone, each to its replacement; nothing is imported.

    Args:
        file: an open binary file.
        allowed: (module, name) -> its replacement, preferably a class of this package rather than the real one.
    """

    def __init__(self, file: IO[bytes], allowed: Mapping[tuple[str, str], Any]):
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """The replacement for module.name; `pickle.UnpicklingError` if it is not whitelisted."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"its pickle uses {module}.{name}, which no file of weights needs")
        return self._allowed[module, name]


def load_restricted(unpickler: pickle.Unpickler, path: Path) -> Any:
    """The unpickled object; any failure (a forbidden name, a truncated file) becomes one `InputError`."""
    try:
        return unpickler.load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(f"{path}: not readable as a file of weights: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
