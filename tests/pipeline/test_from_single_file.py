"""Single files sampled by the command: as the same model's folder, and what is refused."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import jobs
import ldm_files
import numpy as np
import pytest

from configs import finetune as finetune_config
from ldm_jax import command_line, convert, evaluate, sample
from ldm_jax.errors import InputError
from ldm_jax.evaluation import scoring
from ldm_jax.evaluation.features import FeatureExtractor, PerceptualDistance
from ldm_jax.interop import hub, ldm_families
from ldm_jax.interop.weights import read_weights, write_safetensors
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.pipeline.load import Overrides, load, load_base
from ldm_jax.pipeline.model import fingerprint
from ldm_jax.pipeline.vae import with_autoencoder

SD1, SD2, XL, REFINER, CLASSES, UPSCALER, PLAIN = ldm_files.UNETS


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """file_of(family): a tiny single file, its tokenizer beside it; made once, to be read or copied."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = ldm_files.write_file(tmp_path_factory.mktemp("file") / "model", family)
        return made[family]

    return make


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    """The sizes are those of the published models."""
    for family, fields in ldm_families.FAMILIES.items():
        monkeypatch.setitem(ldm_families.FAMILIES, family, fields._replace(sample_size=8))


def run(model, out, *flags):
    return command_line.run(sample.main, ["sample", f"--model={model}", f"--out={out}", "--steps=2", *flags])


@pytest.mark.parametrize("family", [XL, REFINER, UPSCALER])
def test_a_file_is_the_same_model_as_its_folder(family, file_of, tmp_path):
    """The same modules, parameters, tokenizers and scheduler, and so the same samples."""
    file, folder = load(file_of(family)), load(ldm_files.write_folder(tmp_path / "folder", family, size=8))
    assert_same_model(file, folder)
    if family == UPSCALER:
        assert file[0].concat.noise.max_noise_level == 350


def assert_same_model(one, other):
    """Of (model, params): equal by value, of equal defaults, schedulers, tokenizers and parameters."""
    (model, params), (other_model, other_params) = one, other
    sides = [replace(each, first_stage=replace(each.first_stage, sample_size=32)) for each in (model, other_model)]
    assert sides[0] == sides[1]  # a file does not tell the size of tiles
    assert fingerprint(model, params) == fingerprint(other_model, other_params)
    assert model.defaults == other_model.defaults
    for field in ("pipeline", "schedulers", "class_names"):
        assert getattr(model.origin, field) == getattr(other_model.origin, field)
    tokenizers = [getattr(each.conditioning, "tokenizers", ()) for each in (model, other_model)]
    for tokenizer, same in zip(*tokenizers, strict=True):
        np.testing.assert_array_equal(tokenizer(["low! lower"]).ids, same(["low! lower"]).ids)


@pytest.mark.parametrize("family", [SD2, XL, REFINER, UPSCALER, CLASSES])
def test_a_file_becomes_a_folder(family, file_of, tmp_path):
    """The same model to the bit, whose tokenizers pad as they should: with ! in SD 2 and in SDXL's second."""
    file, folder = file_of(family), tmp_path / "folder"
    assert command_line.run(convert.main, ["convert", f"--model={file}", f"--to={folder}"]) == 0
    assert_same_model(load(file), load(folder))


def test_a_class_conditional_folder(file_of, tmp_path):
    command = ["convert", f"--model={file_of(CLASSES)}", f"--to={tmp_path / 'm'}", "--dtype=bfloat16"]
    assert command_line.run(convert.main, command) == 0
    folder, file = (load(path, "bfloat16") for path in (tmp_path / "m", file_of(CLASSES)))
    assert fingerprint(*folder) == fingerprint(*file)
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    assert index["id2label"] == {str(k): str(k) for k in range(ldm_files.CLASSES)}
    named = {str(k): f"class {k}" for k in range(ldm_files.CLASSES)}
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index | {"id2label": named}))
    assert load(tmp_path / "m")[0].class_names == tuple(named.values())
    assert "--label=0,4" in (tmp_path / "m" / "README.md").read_text()
    for change, words in (
        ({"id2label": 3}, "must have id2label, from 0, and class_tokens, 1 or more"),
        ({"id2label": {"1": "a"}}, "must have id2label, from 0"),
        ({"id2label": {"0": "a"}}, r"unet: the weights have no encoder_hid_proj of shape \(16, 2\)"),
        ({"latents_scale": [1.0]}, "latents_scale must be 3 numbers"),
        ({"vae": [None, None]}, "names no vae, which a LatentDiffusionPipeline needs"),
        ({"_class_name": ["pipeline", "Another"]}, "is a .*Another.*; supported are"),
    ):
        (tmp_path / "m" / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(InputError, match=words):
            load(tmp_path / "m")


def test_a_tokenizer_of_another_model(file_of, tmp_path):
    """The folder of a tokenizer, or of a model that has one; its own padding is of no matter."""
    alone = shutil.copy(file_of(SD1), tmp_path / "alone.safetensors")
    ldm_files.write_tokenizer(tmp_path / "other" / "tokenizer", length=20, pad_token="!")
    models = load(file_of(SD1)), load(alone, None, Overrides(tokenizer=str(tmp_path / "other")))
    tokens = [model.conditioning.tokenizers[0](["low! lower"]) for model, _ in models]
    np.testing.assert_array_equal(tokens[0].ids, tokens[1].ids)


def test_a_class_conditional_file(file_of, tmp_path):
    """Classes by number; here with another autoencoder, which decodes no red, and --prediction=v."""
    states = ldm_files.states_of(CLASSES)[1]["vae"]
    no_red = states | {"decoder.conv_out.bias": np.array([-100, 0, 0], np.float32)}
    write_safetensors(tmp_path / "vae.safetensors", ldm_files.autoencoder_to_ldm(no_red, 2, ""))
    model, more = file_of(CLASSES), [f"--vae={tmp_path}/vae.safetensors", "--prediction=v"]
    assert run(model, tmp_path / "out", "--label=1,3", "--num=4", *more) == 0
    samples = jobs.samples(tmp_path / "out")
    assert samples["labels"].tolist() == [1, 3, 1, 3]
    assert samples["images"].shape == (4, 16, 16, 3) and not samples["images"][..., 0].any()
    assert (samples["images"][0] != samples["images"][1]).any()
    again = ["sample", f"--model={model}", f"--from_recipe={tmp_path / 'out' / 'samples.png'}", more[0]]
    assert command_line.run(sample.main, [*again, f"--out={tmp_path / 'again'}"]) == 2  # of eps it is another model


def test_another_autoencoder_from_a_folder(file_of, tmp_path):
    """Its own, or that of a whole model."""
    folder, (model, params) = ldm_files.write_folder(tmp_path / "folder", SD1), load(file_of(SD1), "bfloat16")
    for path in (folder, folder / "vae"):
        other, other_params = with_autoencoder(model, params, str(path))
        assert other == model and other.first_stage.module.dtype == jnp.bfloat16
        assert other_params["first_stage"]["decoder"]["conv_in"]["kernel"].dtype == jnp.bfloat16
    with pytest.raises(InputError, match="their scale is"):
        with_autoencoder(model, params | {"scale": 2 * params["scale"]}, str(folder))
    classes, class_params = load(file_of(CLASSES))
    with pytest.raises(InputError, match="has other latents than --model: class"):
        with_autoencoder(classes, class_params | {"shift": params["shift"], "scale": params["scale"]}, str(folder))


def write_autoencoder(folder, family):
    """A folder with an autoencoder alone."""
    whole = ldm_files.write_folder(folder / "whole", family)
    name = ldm_families.FAMILIES[family].autoencoder
    return shutil.move(whole / name, folder / "other")


REFUSED = {  # family, flags -> what the line must say
    "no tokenizer": (SD1, ["--prompt=low", "--tokenizer=nowhere"], "--tokenizer=nowhere does not exist"),
    "no such prediction": (SD1, ["--prompt=low", "--prediction=z0"], "prediction"),
    "a class beyond the last": (CLASSES, ["--label=5"], "--label=5 is no class"),
    "a tokenizer for no texts": (CLASSES, ["--tokenizer=some"], "--tokenizer=some is for text-to-image models"),
    "no such autoencoder": (SD1, ["--prompt=low", "--vae=nowhere"], "there is no folder nowhere"),
    "another family's model as an autoencoder": (SD1, ["--prompt=low", "--vae=WHOLE"], "their scale is [0.13025"),
    "an autoencoder of other latents": (SD1, ["--prompt=low", "--vae=OTHER"], "has other latents than --model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sample_refuses(case, file_of, tmp_path, capsys):
    family, flags, words = REFUSED[case]
    other = write_autoencoder(tmp_path, XL) if "--vae=OTHER" in flags else ""
    flags = [flag.replace("WHOLE", str(file_of(XL))).replace("OTHER", str(other)) for flag in flags]
    assert_refused(file_of(family), flags, words, tmp_path, capsys)


def assert_refused(model, flags, words, tmp_path, capsys):
    assert run(model, tmp_path / "out", *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_tokenizer(file_of, tmp_path, capsys):
    alone = shutil.copy(file_of(SD1), tmp_path / "alone.safetensors")
    words = "nor can openai/clip-vit-large-patch14 be had from the hub; CLIP's vocab.json and merges.txt must be in a"
    assert_refused(alone, ["--prompt=low"], words, tmp_path, capsys)


def test_a_tokenizer_of_another_vocabulary(file_of, tmp_path, capsys):
    ldm_files.write_tokenizer(tmp_path / "tokenizer", [("l", "o")])
    flags = ["--prompt=low", f"--tokenizer={tmp_path}"]
    assert_refused(file_of(SD1), flags, "the tokenizer has 515 tokens; the text encoder of", tmp_path, capsys)


def test_code_is_not_run(tmp_path, capsys):
    more = f"Vcallbacks\ncposix\nsystem\n(Vtouch {tmp_path}/witness\ntRs"
    path = ldm_files.write_checkpoint(tmp_path / "m.ckpt", {"a": np.zeros(1, np.float32)}, more=more)
    assert_refused(path, ["--prompt=low"], "its pickle uses posix.system", tmp_path, capsys)
    assert not (tmp_path / "witness").exists()


def test_files_that_are_none(tmp_path, capsys):
    for name, content, words in (
        ("m.safetensors", b"", "is damaged: it ends within its header"),
        ("m.ckpt", b"hello", "not readable as a file of weights"),
        ("m.png", b"", "is a file of another type; it must be a run folder"),
    ):
        (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / name, ["--prompt=low"], words, tmp_path, capsys)


def fine_tuning(path):
    """The config of a fine-tuning that begins with this file."""
    config = finetune_config.get_config()
    config.init_from, config.data.image_size = str(path), 16
    return config


def test_fine_tuning_begins_with_a_file(file_of, tmp_path):
    """As with its folder; its fingerprint is of its content, wherever it is."""
    moved = shutil.copytree(file_of(SD1).parent, tmp_path / "moved") / "model.safetensors"
    ((base, params), config), ((other, _), _) = (load_base(fine_tuning(path)) for path in (file_of(SD1), moved))
    jax.tree.map(np.testing.assert_array_equal, params, load(file_of(SD1))[1])
    assert (config.diffusion.prediction, config.autoencoder.latent_channels) == ("eps", 4)
    assert base.origin.fingerprint == other.origin.fingerprint
    tensors = {name: np.array(tensor) for name, tensor in read_weights(moved).items()}
    tensors["model.diffusion_model.out.2.bias"] += 1
    write_safetensors(moved, tensors)
    (changed, _), _ = load_base(fine_tuning(moved))
    assert changed.origin.fingerprint != base.origin.fingerprint
    shutil.rmtree(moved.parent / "tokenizer")
    with pytest.raises(InputError, match=r"config\.init_from=.* has no tokenizer in it, nor next to it"):
        load_base(fine_tuning(moved))


def test_overrides_of_folders_are_refused(tmp_path, capsys):
    folder = ldm_files.write_folder(tmp_path / "folder", SD1)
    words = "--prediction is for models in a single file"
    assert_refused(folder, ["--prompt=low", "--prediction=v"], words, tmp_path, capsys)
    assert_refused(tmp_path, ["--vae=some"], "--vae is for diffusers folders and single files", tmp_path, capsys)


def test_evaluate_needs_data_to_compare_with(file_of, tmp_path, capsys, monkeypatch):
    """Before anything is read, or looked for on the hub."""
    monkeypatch.setattr(hub, "find", None)
    monkeypatch.setattr(pipeline_load, "load", None)
    for model in (file_of(PLAIN), "org/name", "org/name@main"):
        assert command_line.run(evaluate.main, ["evaluate", f"--model={model}", f"--out={tmp_path / 'out'}"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        problem = "has no data set to be compared with; set one by --config=FILE"
        assert line == f"evaluate: --model={model} {problem}"


@pytest.mark.slow
def test_evaluate_scores_a_file(file_of, tiny_data, tmp_path, monkeypatch):
    """By features that need no network: the mean of each quarter, and the mean difference."""

    def quarters(params, images):
        return jnp.mean(images.reshape(len(images), 2, 8, 2, 8, 3).astype(np.float32), axis=(2, 4, 5)).reshape(-1, 4)

    def features(resize, batch_size):
        return FeatureExtractor("VGG16", "quarters", resize, "ab" * 32, {}, quarters, batch_size)

    def distance(resize, batch_size):
        return PerceptualDistance(
            "LPIPS-vgg16", resize, 16, "ab" * 32, {}, lambda _, a, b: jnp.zeros(len(a)), batch_size
        )

    monkeypatch.setattr(scoring, "vgg16_features", features)
    monkeypatch.setattr(scoring, "lpips_distance", distance)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ["--config=tests/tiny.py", f"--config.data.dir={tiny_data}", "--num=8", "--steps=2", "--batch_size=8"]
    assert (
        command_line.run(evaluate.main, ["evaluate", f"--model={file_of(PLAIN)}", f"--out={tmp_path}/out", *flags]) == 0
    )
    cards = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (cards["samples"]["FD-VGG16"]["n"], cards["samples"]["FD-VGG16"]["reference_n"]) == (8, 16)
    assert cards["samples"]["FD-VGG16"]["value"] > 0 and "PSNR" in " ".join(cards["autoencoder"])
    assert jobs.samples(tmp_path / "out")["images"].shape == (8, 16, 16, 3)
