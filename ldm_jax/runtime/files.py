"""Files: written atomically, JSON with readable errors, hashes of their content."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from ldm_jax.errors import InputError


@contextmanager
def atomic(path: Path, host: int | None = None) -> Iterator[Path]:
    """Yields a temporary path next to `path`, which replaces it when the block succeeds.

    With `host`, the index of this process, it first removes what this host left there when it was killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}." if host is None else f".{path.name}.{host}."  # other hosts may write it too
    for leftover in list(path.parent.iterdir()) if host is not None else ():
        if leftover.name.startswith(prefix):
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f"{prefix}{secrets.token_hex(4)}{path.suffix}")
    try:
        with named_errors(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Names the file `path` in an OSError of the block: a failed write, as on a full disk, names none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def new_folder(path: Path, *, flag: str) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block succeeds and is deleted otherwise.

    Raises InputError: `path` is a file or a folder that is not empty, or cannot be created; the message names --`flag`.
    """
    final = path.resolve()
    if final.exists() and not final.is_dir():
        raise InputError(f"--{flag}={path} is a file; it must be a new or an empty folder")
    if final.is_dir() and any(final.iterdir()):
        raise InputError(f"--{flag}={path} is not empty; choose a new or an empty folder")
    above = next(parent for parent in final.parents if parent.exists())  # on the same disk as `final`
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


@contextmanager
def new_file(path: Path, *, flag: str) -> Iterator[Path]:
    """Yields a temporary path that becomes the file `path` when the block succeeds and is deleted otherwise.

    Raises InputError: `path` exists, or cannot be written; the message names --`flag`.
    """
    if path.exists():
        raise InputError(f"--{flag}={path} exists; choose a new file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"--{flag}={path}: no file can be made in {path.parent}: {error.strerror}") from error
    with atomic(path) as temporary:
        yield temporary


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path, *required: str) -> Any:
    """The content of a JSON file; InputError if it is missing, damaged, or has no object with the `required` keys."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise InputError(f"{path} is damaged: {error}") from error
    missing = [name for name in required if not (isinstance(value, dict) and name in value)]
    if missing:
        raise InputError(f"{path} is damaged: it has no {' and no '.join(missing)}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError if it is missing, damaged, or holds anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object")
    return value


@contextmanager
def prefix_errors(path: Path | str) -> Iterator[None]:
    """Puts `path` in front of the message of an InputError raised in the block, unless the message names it already."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}" if str(path) in str(error) else f"{path}: {error}") from error


def content_hash(tree: Any, *parts: str) -> str:
    """A hash (16 hex digits) of a tree of arrays, with its paths, and of further strings."""
    import jax  # here, as train.py imports this module before JAX may be imported

    digest = hashlib.sha256("\n".join(parts).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]
