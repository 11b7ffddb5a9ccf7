"""Models by their names on the hub: a cache that is made here, and a network that never answers."""

import json
import shutil
from types import SimpleNamespace

import diffusers_folder
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from ldm_jax import command_line, sample
from ldm_jax.errors import InputError
from ldm_jax.interop import hub
from ldm_jax.interop.pipelines import PIPELINES
from ldm_jax.pipeline import load as pipeline_load

SD, XL = PIPELINES["StableDiffusionPipeline"], PIPELINES["StableDiffusionXLPipeline"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "diffusion_pytorch_model"
NEEDED = [
    "model_index.json",
    "unet/config.json",
    f"unet/{MODEL}.safetensors",
    "vae/config.json",
    f"vae/{MODEL}.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
]
OTHERS = [
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    f"unet/{MODEL}.bin",
    f"unet/{MODEL}.fp16.safetensors",
    f"unet/{MODEL}.non_ema.safetensors",
    f"unet/{MODEL}.fp16.bin",
    "unet/model.onnx",
    "unet/flax_model.msgpack",
    f"vae/{MODEL}.bin",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.fp16.safetensors",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
    "vae_decoder/model.onnx",
]


def test_only_what_is_needed_is_fetched():
    assert sorted(hub.needed_files(NEEDED + OTHERS, SD)) == sorted(NEEDED)


def test_what_a_run_was_is_fetched_too():
    """Without its recipe it would sample as other such pipelines do, not as its config says."""
    names = [name for name in NEEDED if not name.startswith(("text_encoder", "tokenizer"))]
    files = hub.needed_files([*names, "recipe.json", "pipeline.py"], PIPELINES["LatentDiffusionPipeline"])
    assert sorted(files) == sorted([*names, "recipe.json"])


@pytest.mark.parametrize(
    "beside, chosen",
    [
        ([f"{MODEL}.bin", f"{MODEL}.fp16.bin"], [f"{MODEL}.bin"]),
        ([f"{MODEL}.fp16.safetensors"], [f"{MODEL}.fp16.safetensors"]),
        (
            [f"{MODEL}.safetensors.index.json", f"{MODEL}-00001-of-00002.safetensors",
             f"{MODEL}-00002-of-00002.safetensors", f"{MODEL}.fp16-00001-of-00001.safetensors"],
            [f"{MODEL}.safetensors.index.json", f"{MODEL}-00001-of-00002.safetensors",
             f"{MODEL}-00002-of-00002.safetensors"],
        ),
        (
            [f"{MODEL}.safetensors.index.fp16.json", f"{MODEL}.fp16-00001-of-00001.safetensors"],
            [f"{MODEL}.safetensors.index.fp16.json", f"{MODEL}.fp16-00001-of-00001.safetensors"],
        ),
        (
            [f"{MODEL}.safetensors.fp16.index.json", f"{MODEL}-00001-of-00001.fp16.safetensors"],
            [f"{MODEL}.safetensors.fp16.index.json", f"{MODEL}-00001-of-00001.fp16.safetensors"],
        ),
    ],
    ids=["pickled", "half", "shards", "shards of a variant", "shards of a variant as before 0.32"],
)  # fmt: skip
def test_which_weights(beside, chosen):
    names = {*NEEDED} - {f"unet/{MODEL}.safetensors"} | {f"unet/{name}" for name in beside}
    files = hub.needed_files(names, SD)
    assert sorted(f for f in files if MODEL in f and "unet" in f) == sorted(f"unet/{name}" for name in chosen)


@pytest.mark.parametrize(
    "removed, added, expected",
    [
        ([f"vae/{MODEL}.safetensors"], [], "vae has no weights"),
        (["unet/config.json"], [], "there is no unet/config.json"),
        (["scheduler/scheduler_config.json"], [], "there is no scheduler/scheduler_config.json"),
        (["tokenizer/merges.txt"], [], "tokenizer has no vocabulary"),
        (["tokenizer/tokenizer_config.json"], [], "there is no tokenizer/tokenizer_config.json"),
        ([], [f"unet/{MODEL}.safetensors.index.json"], "but none of the shards"),
        ([], [f"unet/{MODEL}.safetensors.index.json", f"unet/{MODEL}-00001-of-00002.safetensors"], "00002-of-00002"),
    ],
)
def test_what_a_repository_may_lack(removed, added, expected):
    with pytest.raises(InputError, match=expected):
        hub.needed_files({*NEEDED, *added} - {*removed}, SD)
    with pytest.raises(InputError, match="text_encoder_2 has no weights"):
        hub.needed_files(NEEDED, XL)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An LDM, as the smallest of what can be loaded."""
    return diffusers_folder.write_unconditional(tmp_path_factory.mktemp("hub") / "model")


def cached(cache, folder):
    """The folder as the newest revision of org/tiny in the cache; its snapshot."""
    storage = cache / "models--org--tiny"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(COMMIT)
    return shutil.copytree(folder, storage / "snapshots" / COMMIT)


def test_what_is_in_the_cache_is_used_without_a_network(cache, folder):
    snapshot = cached(cache, folder)
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        assert hub.find(name) == snapshot
    (model, _) = pipeline_load.load(hub.find("org/tiny"))
    assert model.origin.pipeline == "LDMPipeline"


def test_what_is_here_comes_first(cache, folder, tmp_path):
    cached(cache, folder)
    shutil.copytree(folder, tmp_path / "org" / "tiny")
    assert hub.find("org/tiny") == hub.Path("org/tiny")
    assert hub.find(str(tmp_path / "nothing")) == tmp_path / "nothing"
    assert hub.find("../a/b") == hub.Path("../a/b")


def test_what_is_missing_is_fetched(cache, folder, monkeypatch, capsys):
    """The list of files, the index, then what is needed and nothing else; another revision if asked for."""
    snapshot, requests = cached(cache, folder), []
    weights = snapshot / "unet" / f"{MODEL}.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: [*names, "model.ckpt"])
    from_cache = huggingface_hub.snapshot_download

    def download(name, revision, allow_patterns, local_files_only=False):
        if local_files_only:
            return from_cache(name, revision=revision, allow_patterns=allow_patterns, local_files_only=True)
        requests.append((name, revision, sorted(allow_patterns)))
        weights.write_bytes(kept)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.find("org/tiny") == snapshot
    assert requests == [("org/tiny", None, ["model_index.json"]), ("org/tiny", None, sorted(names))]
    assert "Downloading org/tiny from the hub" in capsys.readouterr().out
    assert hub.find("org/tiny") == snapshot and len(requests) == 2
    assert hub.find("org/tiny@old") == snapshot and requests[-1][1] == "old"


def refusal(kind, message="it failed"):
    """An error of the hub's client."""
    if issubclass(kind, errors.HfHubHTTPError):
        return kind(message, response=SimpleNamespace(headers={}, request=None, status_code=404))
    return kind(message)


FAILURES = {
    "unknown": (errors.RepositoryNotFoundError, "org/none", "the hub has no such repository, or it is private"),
    "gated": (
        errors.GatedRepoError,
        "org/none",
        "has it as a gated repository: accept its terms on https://huggingface.co/org/none",
    ),
    "no such revision": (errors.RevisionNotFoundError, "org/none@v9", "on the hub it has no revision v9"),
    "no network": (errors.LocalEntryNotFoundError, "org/none", "the hub cannot be reached (it failed)"),
    "no connection": (errors.HfHubHTTPError.__bases__[0], "org/none", "the hub cannot be reached (it failed)"),
    "the hub's own failure": (errors.HfHubHTTPError, "org/none", "cannot be reached (HfHubHTTPError: it failed)"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_why_a_model_cannot_be_had(case, cache, monkeypatch):
    kind, model, expected = FAILURES[case]

    def fail(*_, **__):
        raise refusal(kind)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(InputError) as caught:
        hub.find(model)
    assert expected in str(caught.value) and f"--model={model} is no folder or file here" in str(caught.value)


def test_the_command_says_so_in_one_line(cache, tmp_path, capsys):
    command = ["sample", "--model=org/none", f"--out={tmp_path / 'out'}"]
    for model in ("--model=org/none", "--model=org/no--ne"):  # a name that the hub allows, and one that it does not
        assert command_line.run(sample.main, [command[0], model, command[2]]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"sample: {model} is no folder or file here, and ")
    assert not (tmp_path / "out").exists()


def test_another_kind_of_model(cache, folder, monkeypatch):
    """Refused before its weights are fetched, or from the cache."""
    snapshot = cached(cache, folder)
    index = json.loads((snapshot / "model_index.json").read_text())
    (snapshot / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(InputError, match="is a FluxPipeline; supported are StableDiffusionPipeline"):
        hub.find("org/tiny")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["model_index.json", "model.safetensors"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(snapshot))
    with pytest.raises(InputError, match="is a FluxPipeline; supported are StableDiffusionPipeline"):
        hub.find("org/other")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["config.json", "model.safetensors"])
    with pytest.raises(InputError, match=r"--model=org/vae, on the hub: there is no model_index\.json"):
        hub._download("--model=org/vae", "org/vae", None)
