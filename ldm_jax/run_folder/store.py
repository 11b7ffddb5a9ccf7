"""Run folders in an object store: a URL, gs://bucket/run or s3://bucket/run, in place of a path.

A process works in a mirror of the run, a temporary folder that is its own: all files but the checkpoints are downloaded
to it once, and the primary host uploads what it writes, each file whole, as objects cannot be appended to. Checkpoints
never are in the mirror: Orbax writes and reads them in the store itself, each host its own shards, and marks a finished
one by an object that is written last (see `checkpoint`). So a machine needs nothing but the URL to go on with a run.

Files go through fsspec (gcsfs, s3fs), arrays through TensorStore's own drivers.
"""

import atexit
import importlib.util
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ldm_jax.config.fields import STAGES
from ldm_jax.errors import InputError, Interrupted, RunError
from ldm_jax.runtime.files import read_json_object, write_json

MIRROR = ".store.json"  # in a mirror: its URL, the files that are the same there, and this process's claim
CLAIM = ".lock"  # in the store: the process that trains the run
COMMITTED = "commit_success.txt"  # Orbax's object in a finished checkpoint
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> its file system of fsspec
TIMEOUT = 15.0  # seconds in which a store must answer at the start; later its clients retry for minutes
UNUSED = ("latents", "progress", "wandb")  # folders that only training needs


def is_url(where: str | Path) -> bool:
    """Whether a run folder is given as a URL."""
    return re.match(r"[a-z][a-z0-9+.-]*://", str(where)) is not None


@contextmanager
def local_folder(where: str | Path, *, flag: str, train: bool = False) -> Iterator[Path]:
    """Yields the local folder of a run, `where` itself or a new mirror of that URL, which remains to the process's end.

    Args:
      where: the value of `flag`, a flag or config field.
      train: the run will be trained: the store must be writable, and files that only training needs are downloaded.

    Raises:
      InputError: another scheme; its package is missing; the store cannot be reached, read or, to train, written to.
      Errors of the block, with the URL in place of the mirror's path.
    """
    if not is_url(where):
        yield Path(where)
        return
    given = f"{flag}={where}"
    url = _checked_url(str(where), given)
    folder = Path(tempfile.mkdtemp(prefix="ldm_jax_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    mirror = folder / url.rpartition("/")[2]
    mirror.mkdir()
    _write_state(mirror, {"url": url, "same": {}, "claim": ""})
    if train:
        _attempt(f"{given} cannot be written to", partial(_probe, url))
    keep = (lambda name: True) if train else (lambda name: name.split("/")[0] not in UNUSED)
    names = _attempt(f"{given} cannot be read", partial(_files, url))
    _attempt(f"{given} cannot be read", partial(_download, mirror, names, keep=keep), timeout=None)
    try:
        yield mirror
    except (InputError, RunError, Interrupted) as error:
        error.args = (str(error).replace(str(mirror), url),)
        raise


def address(workdir: Path) -> str:
    """The URL of a mirror; of another folder its path."""
    return _state(workdir)["url"] if _is_mirror(workdir) else str(workdir)


def checkpoint_folder(folder: Path) -> Any:
    """The folder of a stage's checkpoints, below a run folder: of a mirror the path in the store, an `epath.Path`."""
    if not _is_mirror(folder.parent):
        return folder.absolute()
    from etils import epath

    url = _state(folder.parent)["url"]
    _file_system(url)  # sets what epath's has in common with it
    return epath.Path(f"{url}/{folder.name}")


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints in a stage's folder, below a run folder."""
    if not _is_mirror(folder.parent):
        return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    url = f"{_state(folder.parent)['url']}/{folder.name}"
    parts = [name.split("/") for name in _files(url)]
    return [int(step) for step, *rest in parts if step.isdecimal() and rest == [COMMITTED]]


def set_aside(checkpoint: Any, name: str) -> None:
    """Renames the folder of a checkpoint; in a store, where that takes a while, it counts as unfinished at once."""
    if not is_url(checkpoint):
        checkpoint.rename(checkpoint.parent / name)
        return
    (checkpoint / COMMITTED).unlink()
    files, url = _file_system(str(checkpoint)), str(checkpoint)
    for path in _files(url):
        files.cp_file(f"{url}/{path}", f"{checkpoint.parent}/{name}/{path}")
    files.rm(url, recursive=True)


def claim(workdir: Path, holder: str) -> None:
    """Makes this process the one that trains the run of a mirror; an earlier one stops at its next `push`.

    A killed process cannot give a claim back, so that the last one counts.
    """
    if _is_mirror(workdir):
        state = _state(workdir)
        state["claim"] = f"{holder} {secrets.token_hex(4)}"
        with _run_errors(state["url"]):
            _file_system(state["url"]).pipe_file(f"{state['url']}/{CLAIM}", state["claim"].encode())
        _write_state(workdir, state)


def push(workdir: Path) -> None:
    """Uploads the files of a mirror that have changed, in the order of their times; nothing of any other folder.

    Raises RunError if the store refuses, or another process has claimed the run.
    """
    if not _is_mirror(workdir):
        return
    state = _state(workdir)
    url, same, files = state["url"], state["same"], _file_system(state["url"])
    with _run_errors(url):
        if state["claim"] and (holder := files.cat_file(f"{url}/{CLAIM}").decode()) != state["claim"]:
            now = holder.rpartition(" ")[0]
            raise RunError(f"{url} is trained by {now}; this process, which started before, ends")
        versions = _versions(workdir)
        for name, version in versions.items():
            if same.get(name) != version:
                files.put_file(str(workdir / name), f"{url}/{name}")
        for name in same.keys() - versions:
            files.rm_file(f"{url}/{name}")
    if versions != same:
        _write_state(workdir, state | {"same": versions})


def share(workdir: Path, point: str, folder: str) -> None:
    """A barrier of all hosts, named `point`, after which they have what the primary one wrote to a folder of the run.

    The checkpoints in it are not meant, which all of them see.
    """
    import jax

    from ldm_jax.runtime.parallel import wait_for_hosts

    primary = jax.process_index() == 0
    if primary:
        push(workdir)
    wait_for_hosts(point)
    if _is_mirror(workdir) and not primary:
        url = _state(workdir)["url"]
        with _run_errors(url):
            _download(workdir, _files(url), keep=lambda name: name.startswith(f"{folder}/"))


def kvstore(url: str) -> dict[str, Any]:
    """TensorStore's specification of the key-value store below a URL (s3:/ for s3:// is understood, too).

    TensorStore itself reads TENSORSTORE_GCS_HTTP_URL, but not AWS_ENDPOINT_URL.
    """
    scheme, _, path = url.partition(":/")
    bucket, _, key = path.lstrip("/").partition("/")
    spec: dict[str, Any] = {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": key}
    if scheme != "s3":
        return spec
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint} | ({"aws_region": region} if region else {})
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else it prints which other credentials it did not find, for each array
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def _is_mirror(workdir: Path) -> bool:
    return (workdir / MIRROR).exists()


def _state(mirror: Path) -> dict[str, Any]:
    return read_json_object(mirror / MIRROR)


def _write_state(mirror: Path, state: dict[str, Any]) -> None:
    write_json(mirror / MIRROR, state)


def _versions(mirror: Path) -> dict[str, list[int]]:
    """The files of a mirror, oldest first -> [time in ns, size]; without hidden ones, which are temporary or local."""
    paths = [path for path in mirror.rglob("*") if path.is_file() and not path.name.startswith(".")]
    stats = {path.relative_to(mirror).as_posix(): path.stat() for path in paths}
    ordered = sorted(stats.items(), key=lambda item: item[1].st_mtime_ns)
    return {name: [stat.st_mtime_ns, stat.st_size] for name, stat in ordered}


def _checked_url(url: str, given: str) -> str:
    """The URL without a / at its end; raises InputError if it has no known scheme, bucket and path, or no package."""
    scheme, _, path = url.partition("://")
    path = path.strip("/")
    if scheme not in PACKAGES:
        raise InputError(f"{given} is not supported; a run folder is a path, gs://BUCKET/RUN or s3://BUCKET/RUN")
    if not re.fullmatch(r"[^/\s]+(/[^/\s]+)+", path):
        raise InputError(f"{given} is no run folder; it must be {scheme}://BUCKET/RUN")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        package = PACKAGES[scheme]
        raise InputError(f'{given} needs {package}: pip install "ldm_jax[{scheme}]", or pip install {package}')
    return f"{scheme}://{path}"


def _file_system(url: str) -> Any:
    """fsspec's file system of a URL; as epath's it keeps no listings in memory, which TensorStore would outdate."""
    os.environ.setdefault("EPATH_USE_TF", "false")  # else epath takes TensorFlow's, if that is installed
    import fsspec

    scheme = url.partition("://")[0]
    logging.getLogger(PACKAGES[scheme]).setLevel(logging.CRITICAL)  # it logs each retry; the error is raised
    name = {"gs": "gcs"}.get(scheme, scheme)
    fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem(name)


def _files(url: str) -> list[str]:
    """The names of all objects below a URL."""
    bucket_path = url.partition("://")[2]
    return [name.removeprefix(f"{bucket_path}/") for name in _file_system(url).find(bucket_path)]


def _download(mirror: Path, names: list[str], *, keep: Callable[[str], bool]) -> None:
    """Downloads the files in `names` that are to be kept, no checkpoints and no hidden files."""
    state = _state(mirror)
    for name in filter(keep, names):
        *folders, file = name.split("/")
        checkpoint = len(folders) > 1 and folders[0] in STAGES and folders[1].rpartition(".")[2].isdecimal()
        if not checkpoint and file and not file.startswith("."):
            (mirror / name).parent.mkdir(parents=True, exist_ok=True)
            _file_system(state["url"]).get_file(f"{state['url']}/{name}", str(mirror / name))
    _write_state(mirror, state | {"same": _versions(mirror)})


def _probe(url: str) -> None:
    """Writes an object by fsspec and by TensorStore, which have settings of their own, and deletes it."""
    import tensorstore

    files, name = _file_system(url), f".probe.{secrets.token_hex(4)}"
    files.pipe_file(f"{url}/{name}", b"fsspec")
    try:
        tensorstore.KvStore.open(kvstore(f"{url}/")).result().write(name, b"TensorStore").result()
    finally:
        files.rm_file(f"{url}/{name}")


def _attempt(problem: str, action: Callable[[], Any], timeout: float | None = TIMEOUT) -> Any:
    """The result of `action()`; raises InputError, which begins with `problem`, if it fails or takes too long."""
    results: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            results.append((action(), None))
        except Exception as error:
            results.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if not results:
        raise InputError(
            f"{problem}: no answer within {timeout:.0f} s; check the network, the endpoint and the credentials"
        )
    value, error = results[0]
    if error is not None:
        raise InputError(f"{problem}: {_reason(error)}; check the bucket, the credentials and the endpoint") from error
    return value


@contextmanager
def _run_errors(url: str) -> Iterator[None]:
    """Turns the errors of a store into one RunError."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise RunError(
            f"{url} failed: {_reason(error)}; once it works, the same command goes on from the last checkpoint"
        ) from error


def _reason(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.partition(" [")[0][:200].rstrip(".")  # [...]: details of TensorStore's errors
