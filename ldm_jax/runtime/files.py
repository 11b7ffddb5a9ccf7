"""Files that are never half there, and JSON read with errors that one understands."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.errors import InputError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")  # other hosts may write it too
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # a write that failed, on a full disk, does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, flag: str) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path` when the block ends well; else nothing is left of it.

    Raises:
      InputError: `path` is a file, or a folder with something in it, or cannot be made; the line names --`flag`.
    """
    final = path.resolve()
    if final.exists() and not final.is_dir():
        raise InputError(f"--{flag}={path} is a file; it must be a new or an empty folder")
    if final.is_dir() and any(final.iterdir()):
        raise InputError(f"--{flag}={path} is not empty; choose a new or an empty folder")
    above = next(parent for parent in final.parents if parent.exists())  # on the same disk as `final` will be
    temporary = above / f".{final.name}.{secrets.token_hex(4)}"
    try:
        temporary.mkdir()
    except OSError as error:
        raise InputError(f"--{flag}={path}: no folder can be made in {above}: {error.strerror}") from error
    try:
        yield temporary
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as readable JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path, *wanted: str) -> Any:
    """Reads a JSON file, one with the fields `wanted`; raises InputError if it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise InputError(f"{path} is damaged: {error}") from error
    missing = [name for name in wanted if not (isinstance(value, dict) and name in value)]
    if missing:
        raise InputError(f"{path} is damaged: it has no {' and no '.join(missing)}")
    return value


def content_hash(tree: Any, *parts: str) -> str:
    """A hash of a tree of arrays, and of whatever else is to be told apart."""
    import jax  # here, as train.py reads this module before JAX may be imported

    digest = hashlib.sha256("\n".join(parts).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]
