"""Checkpoints of a training stage: written by Orbax, named by step, verified when read.

A checkpoint is a flat dict, path in the state -> array, and a note: the identity of its run and each array's CRC-32.
Of sharded arrays each host writes and reads the shards of its own devices, and the note has `sharded.checksums`; they
can be read in another sharding, or as whole arrays.

Orbax writes to a temporary folder and renames it, or in an object store writes an object that marks it as finished, so
that a killed save leaves the previous checkpoint; the CRC detects later damage, which Orbax alone would not, nor fall
back to an older checkpoint, nor refuse another dtype.
"""

import logging
import shutil
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from ldm_jax.config import io as config_io
from ldm_jax.config.fields import SCHEDULE
from ldm_jax.errors import InputError, RunError
from ldm_jax.run_folder import store
from ldm_jax.run_folder.orbax_s3 import support_s3
from ldm_jax.run_folder.read_errors import is_no_damage
from ldm_jax.run_folder.sharded import any_host, checksums, is_sharded
from ldm_jax.runtime.object_store import is_url
from ldm_jax.runtime.parallel import wait_for_hosts

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every save, and errors that it raises too
# Of a damaged checkpoint each array's error is raised in a future, of which Orbax retrieves the first.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())

NO_SPACE = "No space left on device"  # the system's words
MARGIN = 1 << 18  # bytes: of a checkpoint's files other than its arrays

# Name of a component in memory -> in checkpoints, where it is that of the first version.
STORED_NAMES = {"denoiser": "unet", "conditioning": "conditioner", "first_stage": "autoencoder"}

# The config fields that the checkpoints of a stage depend on.
AUTOENCODER_FIELDS = ("seed", "dtype", "data", "autoencoder")
DENOISER_FIELDS = ("denoiser", "unet", "dit", "concat")
IDENTITY_FIELDS = {
    "autoencoder": AUTOENCODER_FIELDS,
    "clip": ("seed", "dtype", "data", "clip"),
    "diffusion": (
        *AUTOENCODER_FIELDS,
        *("diffusion", "mean_flow", "consistency"),
        *DENOISER_FIELDS,
        *("init_from", "lora", "textual_inversion"),
    ),
    "classifier": (*AUTOENCODER_FIELDS, *(f"diffusion.{name}" for name in SCHEDULE), "classifier"),
}


def identity(config: ConfigDict, stage: str) -> dict[str, str]:
    """The identity recorded in the checkpoints of `stage`: a hash of the config fields that they depend on."""
    return {"config": config_io.identity(config, IDENTITY_FIELDS[stage])}


def flatten(tree: Any) -> dict[str, Any]:
    """A tree as path -> array on the host, e.g. "params/unet/conv_in/kernel"; sharded arrays stay where they are."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    whole = jax.device_get([leaf for _, leaf in leaves if not is_sharded(leaf)])
    on_host = iter(whole)
    return {_name(path): leaf if is_sharded(leaf) else np.asarray(next(on_host)) for path, leaf in leaves}


def unflatten(flat: dict[str, np.ndarray], like: Any, *, where: str) -> Any:
    """The arrays of `flat` in the structure of `like`; raises InputError if names, shapes or dtypes differ."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    expected = {_name(path): leaf for path, leaf in leaves}
    missing, unexpected = sorted(expected.keys() - flat), sorted(flat.keys() - expected)
    if missing or unexpected:
        counts = f"{len(missing)} arrays are missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        raise InputError(f"{where} belongs to another model: {counts}")
    for name, leaf in expected.items():
        saved, here = (f"{array.dtype}{list(array.shape)}" for array in (flat[name], leaf))
        if saved != here:
            raise InputError(f"{where} belongs to another model: {name} is {saved} there, {here} here")
    return jax.tree_util.tree_unflatten(treedef, [flat[name] for name in expected])


class Checkpoints:
    """The newest `keep` checkpoints of a run's stage, in one folder. A context manager: saves are asynchronous."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int | None,
        identity: dict[str, str],
        earlier: Collection[dict[str, str]] = (),
        always: Collection[int] = (),
    ) -> None:
        """`earlier` are identities before a change of the fields that may change (see `config.io.CONTINUED`).

        `keep` None keeps all checkpoints; those of the steps in `always` are kept besides.
        """
        self.folder, self._workdir = _place(folder), folder.parent
        self._identity, self._earlier = identity, tuple(earlier)
        policies = [preservation.LatestN(n=keep), preservation.CustomSteps(steps=always)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation.AnyPreservationPolicy(policies=policies),
            cleanup_tmp_directories=True,
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=folder.name),
        )
        with store.run_errors(self.folder):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type | None, *_: object) -> None:
        if error is None:
            self.wait()
        self._manager.close()

    def save(self, state: Any) -> None:
        """Starts to save the state under its own step, unless that is there; raises RunError if that fails."""
        flat = flatten(state)
        step = int(flat["step"])
        if step in self._manager.all_steps():
            return
        if jax.process_index() == 0:
            store.push(self._workdir)  # first, so that the metrics in a store go to its newest checkpoint at least
        _check_room(self.folder, sum(array.nbytes for array in flat.values()))
        sharded = {name: array for name, array in flat.items() if is_sharded(array)}
        whole = {name: array for name, array in flat.items() if name not in sharded}
        note = self._identity | {"crc32": {name: zlib.crc32(np.ascontiguousarray(a)) for name, a in whole.items()}}
        note |= {"checksums": checksums(sharded)} if sharded else {}
        args = ocp.args.Composite(state=ocp.args.StandardSave(flat), note=ocp.args.JsonSave(note))
        try:
            self._manager.save(step, args=args)
        except Exception as error:
            raise RunError(f"could not save step {step} to {self.folder}: {_reason(error)}") from error

    def wait(self) -> None:
        """Waits until all saves are on disk; raises RunError if one failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise RunError(f"could not save to {self.folder}: {_reason(error)}") from error

    def restore(self, like: Any) -> Any | None:
        """The newest undamaged checkpoint in the structure of `like`; None if the folder has no checkpoints.

        All hosts call it. Arrays that are sharded there and in `like` get the sharding of `like`, others are NumPy's.

        A damaged one is reported and renamed to `damaged.STEP`. Raises InputError if all are damaged, or one belongs
        to another run or model; RunError if one cannot be read for another reason, as want of memory or permission.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        leaves, _ = jax.tree_util.tree_flatten_with_path(like)
        shards = {_name(path): leaf for path, leaf in leaves if is_sharded(leaf)}
        for step in steps:
            path = self.folder / str(step)
            try:
                flat = _read(self.folder, step, (self._identity, *self._earlier), shards)
                return unflatten(flat, like, where=str(path))
            except _DamagedError as error:
                print(f"Checkpoint {path} is damaged ({error}); going back to the one before.")
                if jax.process_index() == 0:
                    store.set_aside(path, f"damaged.{step}")
                wait_for_hosts(f"{path} set aside")
                self._manager.reload()
        if steps:
            raise InputError(f"no checkpoint in {self.folder} can be read; move the folder away to start over")
        return None


def load_latest(folder: Path, up_to: float = np.inf) -> dict[str, np.ndarray]:
    """The newest undamaged checkpoint of a stage, of step `up_to` at most, as a flat dict.

    Raises InputError if there is none, RunError as `Checkpoints.restore`. The folder is not changed.
    """
    place = _place(folder)
    for step in sorted((step for step in store.checkpoint_steps(folder) if step <= up_to), reverse=True):
        try:
            return _read(place, step)
        except _DamagedError as error:
            print(f"Checkpoint {place / str(step)} is damaged ({error}); using the one before.")
    raise InputError(f"there is no readable checkpoint in {folder}; has the run got that far?")


def load_at(folder: Path, step: int) -> dict[str, np.ndarray]:
    """The checkpoint of a step, as a flat dict; raises InputError if it is damaged, RunError as `restore`."""
    try:
        return _read(_place(folder), step)
    except _DamagedError as error:
        raise InputError(f"{folder / str(step)} is damaged ({error})") from error


def ema_params(flat: dict[str, np.ndarray], like: Any, where: Path, prefix: str = "ema_params/") -> dict[str, Any]:
    """The EMA parameters in a stage's checkpoint, in the structure of `like`; those below another `prefix`."""
    flat = {name.removeprefix(prefix): array for name, array in flat.items() if name.startswith(prefix)}
    return unflatten(flat, like, where=str(where))


def subtree(flat: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """The nested dict below `prefix`, e.g. "ema_params/unet"; raises InputError if it is missing."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        if name.startswith(prefix + "/"):
            *parents, leaf = name.removeprefix(prefix + "/").split("/")
            node = nested
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
    if not nested:
        raise InputError(f"the checkpoint has no {prefix!r}; it holds {sorted({n.split('/')[0] for n in flat})}")
    return nested


def _place(folder: Path) -> Any:
    """Where the checkpoints of a stage are: its folder, or in an object store an `epath.Path`."""
    place = store.checkpoint_folder(folder)
    if is_url(place):
        support_s3()
    return place


class _DamagedError(Exception):
    pass


def _read(
    folder: Path, step: int, identities: Sequence[dict[str, str]] = (), shards: Mapping[str, jax.Array] | None = None
) -> dict[str, Any]:
    """The checkpoint of a step; sharded arrays as those in `shards`, which all hosts read or none, or for None whole.

    Raises _DamagedError, or RunError for an error that is not of the checkpoint (see `read_errors`), which stays.
    """
    unreadable = False
    try:
        with _first_error_alone():
            flat, note = _read_unchecked(folder, step, shards or {})
        crcs = note["crc32"].items()
        problem = _difference(name for name, crc in crcs if name not in flat or zlib.crc32(flat[name]) != crc)
    except Exception as error:
        problem = _first_line(error)
        unreadable = is_no_damage(error)
    if shards is not None and any_host(bool(problem)):
        problem, unreadable = problem or "another host cannot read it", any_host(unreadable)
    if unreadable:
        raise RunError(f"could not read {folder / str(step)}: {problem}")
    if not problem:
        expected = note.get("checksums", {})
        found = checksums({name: flat[name] for name in expected})
        problem = _difference(name for name, checksum in expected.items() if found[name] != checksum)
    if problem:
        raise _DamagedError(problem)
    if identities and not any(all(note.get(key) == value for key, value in one.items()) for one in identities):
        key, value = next((key, value) for key, value in identities[0].items() if note.get(key) != value)
        raise InputError(f"{folder / str(step)} belongs to another run: its {key} is {note.get(key)!r}, not {value!r}")
    return flat


@contextmanager
def _first_error_alone() -> Iterator[None]:
    """Orbax raises the error of the first array that it cannot read; those of the others are not printed any more."""
    hook = sys.unraisablehook

    def ignore_late_reads(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    sys.unraisablehook = ignore_late_reads
    yield
    sys.unraisablehook = hook  # after an error it stays, as reads are still under way


def _difference(names: Iterable[str]) -> str:
    """What is wrong with a checkpoint of which these arrays differ; "" without any."""
    wrong = list(names)
    return f"{len(wrong)} arrays differ from what was saved, the first is {wrong[0]}" if wrong else ""


def _read_unchecked(folder: Path, step: int, shards: Mapping[str, jax.Array]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, note) of a checkpoint."""
    # Reads on this host alone: Orbax would wait for all hosts, but only the primary one samples and evaluates.
    host = jax.process_index()
    hosts = {"primary_host": host, "active_processes": {host}, "barrier_sync_key_prefix": f"read_{host}"}
    alone = ocp.options.MultiprocessingOptions(**hosts)
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
    handlers = {"state": ocp.PyTreeCheckpointHandler, "note": ocp.JsonCheckpointHandler}
    handlers = {name: handler(multiprocessing_options=alone) for name, handler in handlers.items()}
    with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
        note = dict(manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore())).note)
        sharded, stored = note.get("checksums", {}), manager.item_metadata(step)["state"] if shards else {}
        restore = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in (*note["crc32"], *sharded)}
        for name, like in shards.items():
            if name in sharded and stored[name].shape == like.shape:
                restore[name] = ocp.ArrayRestoreArgs(sharding=like.sharding)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=restore))
        flat = manager.restore(step, args=args).state
    return {name: value if is_sharded(value) else np.asarray(value) for name, value in flat.items()}, note


def _check_room(folder: Path, size: int) -> None:
    """Raises RunError if the disk has no room for a checkpoint of `size` bytes: Orbax would fail at length."""
    if is_url(folder):
        return
    needed, free = size + size // 10 + MARGIN, shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"could not save to {folder}: {NO_SPACE}: {free / 1e6:.1f} MB are free, a checkpoint takes "
            f"{needed / 1e6:.1f} MB; with more room the same command goes on from the last one"
        )


def _name(path: tuple) -> str:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return "/".join(STORED_NAMES.get(name, name) for name in names)


def _reason(error: BaseException) -> str:
    return NO_SPACE if NO_SPACE.lower() in str(error).lower() else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
