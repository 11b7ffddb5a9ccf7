"""Models by the name that they have on the Hugging Face hub: found in its cache on this machine, or fetched into it.

What a pipeline is made of is told by the names of its files alone, so that nothing else is fetched: no pickle or half
precision beside full safetensors, no safety checker, no weights of other frameworks.
"""

import logging
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from ldm_jax.errors import InputError
from ldm_jax.interop import folder, pipelines, tokenizer
from ldm_jax.interop.pipelines import Family, family_of
from ldm_jax.interop.weights import best_weights

ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^\s@]+))?")
SHARD = re.compile(r"-00001-of-(\d{5})(?=\.)")


def find(model: str, *, flag: str = "--model") -> Path:
    """The folder or file that a user names: what is there under that name, else a model of the hub.

    Args:
      model: a path, or `organisation/name`, with `@revision` if it is not to be the newest: a branch, tag or commit.
      flag: or field by which it was named, for errors.

    Returns:
      A path; that of a model of the hub has all the files that it needs. A name that can be none is returned as it is.

    Raises:
      InputError: the hub has no such model, does not give it to everybody or cannot be reached, or a model of a kind
        that is not supported.
    """
    if not is_name(model):
        return Path(model)
    named = ID.fullmatch(model).groupdict()
    return _cached(**named) or _fetched(f"{flag}={model}", **named)


def is_name(model: str) -> bool:
    """Whether this can be none but a model of the hub: what is missing in a folder of one's own is no hub's."""
    path = Path(model)
    return not (path.exists() or path.parent.is_dir()) and ID.fullmatch(model) is not None


def needed_files(names: Collection[str], family: Family) -> list[str]:
    """Which of the files in a pipeline's folder it is made of, as paths within it.

    Raises:
      InputError: a component lacks its config or its weights.
    """
    files = [folder.INDEX, *(name for name in (pipelines.RECIPE,) if name in names)]
    for component in ("unet", family.autoencoder, *family.encoders):
        files += [f"{component}/config.json", *_weights(names, component)]
    files += [f"{scheduler}/scheduler_config.json" for scheduler in family.schedulers]
    for encoder in family.encoders:
        component = encoder.replace("text_encoder", "tokenizer")
        wholes = [layout for layout in tokenizer.LAYOUTS if all(f"{component}/{name}" in names for name in layout)]
        if not wholes:
            raise InputError(f"{component} has no vocabulary")
        others = [name for name in tokenizer.OTHER_FILES if f"{component}/{name}" in names]
        files += [f"{component}/{name}" for name in (tokenizer.CONFIG, *sum(wholes, ()), *others)]
    missing = [file for file in files if file not in names]
    if missing:
        raise InputError(f"there is no {missing[0]}")
    return files


def _weights(names: Collection[str], component: str) -> list[str]:
    """The file with a component's weights, or the list of its shards and all of these."""
    beside = {PurePosixPath(name).name for name in names if PurePosixPath(name).parent == PurePosixPath(component)}
    best = best_weights(beside)
    if best is None:
        raise InputError(f"{component} has no weights")
    if not best.endswith(".json"):
        return [f"{component}/{best}"]
    # The index of a variant is "x.safetensors.index.fp16.json"; its shards "x.fp16-00001-of-00002.safetensors".
    words = set(best.removesuffix(".json").split(".")) - {"index"}
    firsts = [name for name in beside if SHARD.search(name) and set(SHARD.sub("", name).split(".")) == words]
    if not firsts:
        raise InputError(f"{component} has no weights beside {best}, which lists them")
    count = SHARD.search(firsts[0])[1]
    shards = [SHARD.sub(f"-{k:05d}-of-{count}", firsts[0]) for k in range(1, int(count) + 1)]
    return [f"{component}/{name}" for name in (best, *shards)]


def _cached(name: str, revision: str | None) -> Path | None:
    """The model in the cache of this machine, without asking the network, if all that it needs is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[folder.INDEX]))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    if folder.INDEX not in there:
        return None
    family = family_of(path)[1]
    try:
        needed_files(there, family)
    except InputError:  # the rest is yet to be fetched
        return None
    return path


def _fetched(asked: str, name: str, revision: str | None) -> Path:
    """The model, fetched with a progress bar; `asked` is the flag or field that named it, with its value."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    of_the_network = HfHubHTTPError.__bases__[0]  # of the library beneath, which is another from version to version
    print(f"Looking for {name} on the hub ...", flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of each of its five attempts
    try:
        names = list_repo_files(name, revision=revision)
        if folder.INDEX not in names:
            raise InputError(f"there is no {folder.INDEX}, so it is no pipeline of diffusers")
        index = snapshot_download(name, revision=revision, allow_patterns=[folder.INDEX])
        files = needed_files(names, family_of(Path(index))[1])
        print(f"Fetching {name} from the hub, what is not in its cache yet: {len(files)} files", flush=True)
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except InputError as error:
        raise InputError(f"{asked}, on the hub: {error}") from error
    except (HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, of_the_network) as error:
        raise InputError(f"{asked} is no folder or file here, and {_reason(error, name, revision)}") from error


def _reason(error: Exception, name: str, revision: str | None) -> str:
    """Why a model cannot be had from the hub."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "on the hub it is gated: accept the terms on its page there, then run: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or it is private: for these, run: hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return f"on the hub it has no revision {revision}"
    if isinstance(error, HFValidationError):
        return "it is no name of a model on the hub either"
    first = (str(error).splitlines() or [""])[0].removeprefix("Got: ")
    told = f"{type(error).__name__}: {first}" if isinstance(error, HfHubHTTPError) else first
    return f"not all of it is in the hub's cache here, and the hub cannot be reached ({told or type(error).__name__})"
