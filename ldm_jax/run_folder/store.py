"""Run folders in an object store: a URL, gs://bucket/run or s3://bucket/run, in place of a path.

A process works in a mirror of the run, a temporary folder that is its own: all files but the checkpoints are downloaded
to it once, and the primary host uploads what it writes, each file whole, as objects cannot be appended to. Checkpoints
never are in the mirror: Orbax writes and reads them in the store itself, each host its own shards, and marks a finished
one by an object that is written last (see `checkpoint`). So a machine needs nothing but the URL to go on with a run.
"""

import atexit
import itertools
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ldm_jax.config.fields import STAGES
from ldm_jax.errors import InputError, Interrupted, RunError
from ldm_jax.runtime.files import read_json_object, write_json
from ldm_jax.runtime.object_store import attempt, checked_url, file_system, is_url, objects, probe, reason

SNAPSHOTS = "ema_snapshots"  # the folder of the power function averages: see `snapshots`
MIRROR = ".store.json"  # in a mirror: its URL, the files that are the same there, and this process's claim
CLAIM = ".lock"  # in the store: the process that trains the run
COMMITTED = "commit_success.txt"  # Orbax's object in a finished checkpoint
CHECKPOINTS = (*STAGES, SNAPSHOTS)  # folders of a run that have checkpoints
UNUSED = ("latents", "progress", "wandb")  # folders that only training needs


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
    url = checked_url(str(where), given)
    folder = Path(tempfile.mkdtemp(prefix="ldm_jax_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    mirror = folder / url.rpartition("/")[2]
    mirror.mkdir()
    _write_state(mirror, {"url": url, "same": {}, "claim": ""})
    if train:
        attempt(f"{given} cannot be written to", partial(probe, url))
    keep = (lambda name: True) if train else (lambda name: name.split("/")[0] not in UNUSED)
    names = attempt(f"{given} cannot be read", partial(objects, url))
    attempt(f"{given} cannot be read", partial(_download, mirror, names, keep=keep), timeout=None)
    try:
        yield mirror
    except (InputError, RunError, Interrupted) as error:
        error.args = (str(error).replace(str(mirror), url),)
        raise


def address(workdir: Path) -> str:
    """The URL of a mirror; of another folder its path."""
    return _state(workdir)["url"] if _is_mirror(workdir) else str(workdir)


def place_among_hosts(workdir: Path) -> tuple[int, int]:
    """(Index, number) of this process among those that see the same files of a run: (0, 1) of a mirror."""
    import jax

    return (0, 1) if _is_mirror(workdir) else (jax.process_index(), jax.process_count())


def checkpoint_folder(folder: Path) -> Any:
    """The folder of a stage's checkpoints, below a run folder: of a mirror the path in the store, an `epath.Path`."""
    if not _is_mirror(folder.parent):
        return folder.absolute()
    from etils import epath

    url = _state(folder.parent)["url"]
    file_system(url)  # sets what epath's has in common with it
    return epath.Path(f"{url}/{folder.name}")


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints in a stage's folder, below a run folder."""
    if not _is_mirror(folder.parent):
        return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    url = f"{_state(folder.parent)['url']}/{folder.name}"
    with run_errors(url):
        parts = [name.split("/") for name in objects(url)]
    return [int(step) for step, *rest in parts if step.isdecimal() and rest == [COMMITTED]]


def set_aside(checkpoint: Any, name: str) -> None:
    """Renames the folder of a checkpoint to `name`; on a disk, if that is taken, to `name`.2, `name`.3, ...

    In a store, where that takes a while, it counts as unfinished at once, and is deleted by Orbax with the next start.
    """
    if not is_url(checkpoint):
        names = itertools.chain([name], (f"{name}.{k}" for k in itertools.count(2)))
        checkpoint.rename(next(path for path in map(checkpoint.with_name, names) if not path.exists()))
        return
    url = str(checkpoint)
    with run_errors(url):
        files = file_system(url)
        files.rm_file(f"{url}/{COMMITTED}")
        for path in objects(url):
            files.cp_file(f"{url}/{path}", f"{checkpoint.parent}/{name}/{path}")
        files.rm(url, recursive=True)


def claim(workdir: Path, holder: str) -> None:
    """Makes this process the one that trains the run of a mirror; an earlier one stops at its next `push`.

    A killed process cannot give a claim back, so that the last one counts.
    """
    if _is_mirror(workdir):
        state = _state(workdir)
        state["claim"] = f"{holder} {secrets.token_hex(4)}"
        with run_errors(state["url"]):
            file_system(state["url"]).pipe_file(f"{state['url']}/{CLAIM}", state["claim"].encode())
        _write_state(workdir, state)


def push(workdir: Path) -> None:
    """Uploads the files of a mirror that have changed, in the order of their times; nothing of any other folder.

    Raises RunError if the store refuses, or another process has claimed the run.
    """
    if not _is_mirror(workdir):
        return
    state = _state(workdir)
    url, same, files = state["url"], state["same"], file_system(state["url"])
    with run_errors(url):
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
        with run_errors(url):
            _download(workdir, objects(url), keep=lambda name: name.startswith(f"{folder}/"))


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


def _download(mirror: Path, names: list[str], *, keep: Callable[[str], bool]) -> None:
    """Downloads the files in `names` that are to be kept, no checkpoints and no hidden files."""
    state = _state(mirror)
    for name in filter(keep, names):
        *folders, file = name.split("/")
        checkpoint = len(folders) > 1 and folders[0] in CHECKPOINTS and folders[1].rpartition(".")[2].isdecimal()
        if not checkpoint and file and not file.startswith("."):
            (mirror / name).parent.mkdir(parents=True, exist_ok=True)
            file_system(state["url"]).get_file(f"{state['url']}/{name}", str(mirror / name))
    _write_state(mirror, state | {"same": _versions(mirror)})


@contextmanager
def run_errors(url: Any) -> Iterator[None]:
    """Turns the errors of a store into one RunError; those of a local path remain."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        if not is_url(url):
            raise
        raise RunError(
            f"{url} failed: {reason(error)}; once it works, the same command goes on from the last checkpoint"
        ) from error
