"""Reading pickles that came from somewhere else: nothing but the names on a list can be looked up, let alone run."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ldm_jax.errors import InputError


class WhitelistUnpickler(pickle.Unpickler):
    """An unpickler that resolves only the given names, each to the stand-in given with it; nothing is ever imported.

    Args:
        file: an open binary file.
        allowed: (module, name) -> what the pickle gets for it. Prefer stand-ins of ours to the real classes.
    """

    def __init__(self, file: IO[bytes], allowed: Mapping[tuple[str, str], Any]):
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for module.name; `pickle.UnpicklingError` if it is not on the list."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a file of weights has no need of")
        return self._allowed[module, name]


def load_restricted(unpickler: pickle.Unpickler, path: Path) -> Any:
    """The unpickled object. Whatever goes wrong (a forbidden name, a truncated file) is one `InputError`."""
    try:
        return unpickler.load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not readable as a file of weights: {reason}") from error
