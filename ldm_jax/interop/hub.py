"""Models on the Hugging Face hub: found in this machine's cache, or downloaded into it.

The files of a pipeline are chosen by their names, so that nothing else is downloaded: no pickles or half precision
besides full safetensors, no safety checker, no weights of other frameworks.
"""

import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

from ldm_jax.errors import InputError
from ldm_jax.interop import folder, pipelines, tokenizer
from ldm_jax.interop.pipelines import Components, read_pipeline
from ldm_jax.interop.weights import best_weights

ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^\s@]+))?")
SHARD = re.compile(r"-00001-of-(\d{5})(?=\.)")


def find(model: str, *, flag: str = "--model") -> Path:
    """The local folder or file of a model: the path itself if it exists, else a hub id's snapshot in the cache.

    Args:
      model: a path, or a hub id `organisation/name`, with `@revision` for a branch, tag or commit.
      flag: the flag or config field, for errors.

    Returns:
      A path; a hub model has all required files there. What can be no hub id is returned unchanged.

    Raises InputError: the repository does not exist, is private or gated, the hub cannot be reached, or the pipeline is
    not supported.
    """
    if not is_hub_id(model):
        return Path(model)
    named = ID.fullmatch(model).groupdict()
    return _cached(**named) or _download(f"{flag}={model}", **named)


def find_vae(vae: str) -> Path:
    """As `find`, of an autoencoder for --vae, which a repository is (stabilityai/sd-vae-ft-mse) or has in vae/."""
    if not is_hub_id(vae):
        return Path(vae)
    named, prefixes = ID.fullmatch(vae).groupdict(), ("", "vae/")

    def files(names: Collection[str]) -> list[str]:
        for prefix in prefixes:
            component = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            best = best_weights({name for name in component if "/" not in name})
            if best and "config.json" in component and (prefix or folder.INDEX not in names):
                return [f"{prefix}config.json", f"{prefix}{best}"]
        raise InputError("has no autoencoder, with a config.json and weights, in it or in vae/")

    patterns = [f"{prefix}{pattern}" for prefix in prefixes for pattern in ("config.json", "diffusion_pytorch_model*")]
    cached = _snapshot(patterns=[*patterns, folder.INDEX], **named)
    try:
        if cached and files({file.relative_to(cached).as_posix() for file in cached.rglob("*")}):
            return cached
    except InputError:  # the rest is yet to be downloaded
        pass
    return _download(f"--vae={vae}", **named, files=files)


CLIP = "openai/clip-vit-large-patch14"  # whose vocabulary all text encoders of Stable Diffusion have


def find_vocabulary() -> Path | None:
    """The folder of CLIP's vocab.json and merges.txt in the hub's cache, or downloaded; None if the hub is offline."""
    cached = _snapshot(CLIP, None, patterns=list(tokenizer.LAYOUTS[0]))
    if cached and all((cached / name).is_file() for name in tokenizer.LAYOUTS[0]):
        return cached
    try:
        return _download(CLIP, CLIP, None, files=lambda names: list(tokenizer.LAYOUTS[0]))
    except InputError:
        return None


def is_hub_id(model: str) -> bool:
    """Whether this can only be a hub id: no such path exists, nor does its parent folder."""
    path = Path(model)
    return not (path.exists() or path.parent.is_dir()) and ID.fullmatch(model) is not None


def needed_files(names: Collection[str], components: Components) -> list[str]:
    """The paths of a pipeline's required files; InputError if a component lacks its config, weights or vocabulary."""
    files = [folder.INDEX, *(name for name in (pipelines.RECIPE,) if name in names)]
    for component in (components.denoiser, components.autoencoder, *components.encoders):
        files += [f"{component}/config.json", *_weights(names, component)]
    files += [f"{scheduler}/scheduler_config.json" for scheduler in components.schedulers]
    for encoder in components.encoders:
        component = encoder.replace("text_encoder", "tokenizer")
        wholes = [layout for layout in tokenizer.LAYOUTS if all(f"{component}/{name}" in names for name in layout)]
        if not wholes:
            raise InputError(f"{component} has no vocabulary")
        others = [name for name in tokenizer.OTHER_FILES if f"{component}/{name}" in names]
        files += [f"{component}/{name}" for name in (tokenizer.CONFIG, *sum(wholes, ()), *others)]
    if missing := [file for file in files if file not in names]:
        raise InputError(f"there is no {missing[0]}")
    return files


def _weights(names: Collection[str], component: str) -> list[str]:
    """The file with a component's weights, or the index of its shards and all of these."""
    files = {PurePosixPath(name).name for name in names if PurePosixPath(name).parent == PurePosixPath(component)}
    best = best_weights(files)
    if best is None:
        raise InputError(f"{component} has no weights")
    if not best.endswith(".json"):
        return [f"{component}/{best}"]
    # The index of a variant is "x.safetensors.index.fp16.json"; its shards "x.fp16-00001-of-00002.safetensors".
    words = set(best.removesuffix(".json").split(".")) - {"index"}
    firsts = [name for name in files if SHARD.search(name) and set(SHARD.sub("", name).split(".")) == words]
    if not firsts:
        raise InputError(f"{component} has {best}, but none of the shards that it lists")
    count = SHARD.search(firsts[0])[1]
    shards = [SHARD.sub(f"-{k:05d}-of-{count}", firsts[0]) for k in range(1, int(count) + 1)]
    return [f"{component}/{name}" for name in (best, *shards)]


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot in this machine's cache, without the network; None unless all required files are there."""
    path = _snapshot(name, revision, [folder.INDEX])
    if path is None:
        return None
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    if folder.INDEX not in files:
        return None
    components = read_pipeline(path)[1]
    try:
        needed_files(files, components)
    except InputError:  # the rest is yet to be downloaded
        return None
    return path


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The folder of a repository in this machine's cache, perhaps without all files of these patterns; or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _pipeline_files(name: str, revision: str | None, names: Collection[str]) -> list[str]:
    from huggingface_hub import snapshot_download

    if folder.INDEX not in names:
        raise InputError(f"there is no {folder.INDEX}, so it is no pipeline of diffusers")
    index = snapshot_download(name, revision=revision, allow_patterns=[folder.INDEX])
    return needed_files(names, read_pipeline(Path(index))[1])


def _download(
    argument: str, name: str, revision: str | None, files: Callable[[Collection[str]], list[str]] | None = None
) -> Path:
    """The snapshot, downloaded with a progress bar.

    `argument` is the flag or field with its value, for errors; `files` chooses the required ones from the names in the
    repository, None: those of a pipeline.
    """
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    network_error = HfHubHTTPError.__bases__[0]  # of the HTTP library, which varies with the version
    print(f"Looking for {name} on the hub ...", flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would log each of its five attempts
    try:
        names = list_repo_files(name, revision=revision)
        chosen = files(names) if files else _pipeline_files(name, revision, names)
        print(f"Downloading {name} from the hub: {len(chosen)} files, unless cached", flush=True)
        return Path(snapshot_download(name, revision=revision, allow_patterns=chosen))
    except InputError as error:
        raise InputError(f"{argument}, on the hub: {error}") from error
    except (HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, network_error) as error:
        raise InputError(f"{argument} is no folder or file here, and {_reason(error, name, revision)}") from error


def _reason(error: Exception, name: str, revision: str | None) -> str:
    """Why a model cannot be downloaded."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    reasons = {  # a gated repository is also one that is not found
        errors.GatedRepoError: f"the hub has it as a gated repository: accept its terms on {page}, then: hf auth login",
        errors.RepositoryNotFoundError: "the hub has no such repository, or it is private: then run: hf auth login",
        errors.RevisionNotFoundError: f"on the hub it has no revision {revision}",
        errors.HFValidationError: "it is no valid hub id (organisation/name) either",
    }
    for error_class, reason in reasons.items():
        if isinstance(error, error_class):
            return reason
    first = (str(error).splitlines() or [""])[0].removeprefix("Got: ")
    reason = f"{type(error).__name__}: {first}" if isinstance(error, errors.HfHubHTTPError) else first
    return f"it is not in the hub's cache here, and the hub cannot be reached ({reason or type(error).__name__})"
