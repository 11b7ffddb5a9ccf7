"""Config fields that follow from the training images: the rules, what they read, and resuming."""

import importlib
import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax import command_line, train
from ldm_jax.config import io as config_io
from ldm_jax.config import rules as config_rules
from ldm_jax.data.from_images import TrainingImages, fill, resolve
from ldm_jax.data.images import is_grey
from ldm_jax.errors import InputError


def config_of(name, **fields):
    """A config of configs/ with some fields, dots written as two underscores."""
    config = importlib.import_module(f"configs.{name}").get_config().copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config.lock()


def draw(folder, num, size=(20, 20), colour=True, captions=False):
    """Noise, stored in colour even if it is grey."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3 if colour else 1), np.uint8)
        Image.fromarray(np.broadcast_to(pixels, (*size, 3)).copy()).save(folder / f"{folder.name}{i}.png")
        if captions:
            (folder / f"{folder.name}{i}.txt").write_text(f"number {i % 5}")


RULES = {  # images -> fields
    (26, 4, 2, 128, False): {"data.image_size": 64, "data.channels": 3, "autoencoder.latent_channels": 4,
                             "autoencoder.steps": 1_200, "autoencoder.loss.adversarial_start": 840,
                             "autoencoder.loss.perceptual_start": 840,
                             "diffusion.steps": 1_200, "sampling.num": 100, "evaluation.resize": 64},
    (200, 20, 150, 50, True): {"data.image_size": 48, "data.channels": 1, "autoencoder.steps": 2_000,
                               "diffusion.steps": 2_000, "sampling.num": 150, "evaluation.resize": 48},
    (5_000, 500, 10, 28, True): {"data.image_size": 28, "autoencoder.latent_channels": 8, "autoencoder.steps": 4_500,
                                 "diffusion.steps": 4_500, "sampling.num": 500, "evaluation.resize": 32},
    (10**6, 10**5, 3_000, 9, True): {"data.image_size": 16, "autoencoder.steps": 8_000, "diffusion.steps": 8_000,
                                     "sampling.num": 1_000},
}  # fmt: skip


@pytest.mark.parametrize("images", RULES)
def test_the_rules(images):
    values = fill(config_of("own_pictures"), TrainingImages(*images))
    assert {name: values[name] for name in RULES[images]} == RULES[images]
    assert all(type(value) is int for value in values.values())


@pytest.mark.parametrize("name", ["own_pictures", "own_captions"])
@pytest.mark.parametrize("side", range(4, 80))
def test_any_resolution_gives_a_valid_config(name, side):
    splits = {"data__train_split": "train", "data__test_split": "test"} if name == "own_captions" else {}
    config = config_of(name, **splits)
    values = fill(config, TrainingImages(100, 10, 2, side, False))
    filled = {field.replace(".", "__"): value for field, value in values.items()}
    config_rules.validate(config_of(name, **splits, **filled))


def test_what_is_given_replaces_a_rule():
    config = config_of("own_pictures", autoencoder__steps=300, data__image_size=32)
    values = fill(config, TrainingImages(200, 20, 2, 128, False))
    assert not {"autoencoder.steps", "data.image_size"} & values.keys()
    assert values["autoencoder.loss.adversarial_start"] == 210 and values["autoencoder.latent_channels"] == 8


@pytest.mark.parametrize(("size", "colour"), [((28, 28), False), ((20, 90), True)])
def test_size_and_colour_are_those_of_the_images(size, colour, tmp_path, capsys):
    draw(tmp_path / "photos", 12, size, colour)
    config = config_of("own_pictures", data__path=str(tmp_path / "photos"), data__dir=str(tmp_path / "data"))
    resolved = resolve(config, tmp_path / "run")
    side = min(size)
    assert resolved.data.image_size == side and resolved.data.channels == (3 if colour else 1)
    assert not config_io.open_fields(resolved) and config_io.open_fields(config)
    found = f"(9 images to train on, {side} pixels, {'in colour' if colour else 'grey'}): data.image_size={side}, "
    assert found in capsys.readouterr().out


def test_one_image_in_colour_among_grey_ones(tmp_path):
    draw(tmp_path / "photos" / "train", 300, (4, 4), colour=False)
    draw(tmp_path / "photos" / "test", 4, (4, 4), colour=False)
    config = config_of("own_pictures", data__path=str(tmp_path / "photos"), data__dir=str(tmp_path / "data"))
    assert resolve(config, tmp_path / "run").data.channels == 1
    Image.new("RGB", (4, 4), "red").save(tmp_path / "photos" / "train" / "z.png")
    assert resolve(config, tmp_path / "run").data.channels == 3


@pytest.mark.parametrize(("image", "expected"), [
    (Image.new("L", (4, 4), 9), True),
    (Image.new("RGB", (4, 4), (100, 104, 108)), True),
    (Image.new("RGB", (4, 4), (100, 104, 109)), False),
    (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), True),  # on white
    (Image.new("P", (4, 4)), True),
    (np.zeros((4, 4, 1), np.uint8), True),
    (np.uint8([[[0, 0, 0], [0, 0, 9]]]), False),
])  # fmt: skip
def test_grey_images(image, expected):
    assert is_grey(image) == expected


@pytest.mark.parametrize(("folders", "expected"), [
    (("train", "test"), ("train", "test")),
    (("train", "validation"), ("train", "validation")),
    (("",), ("train[:26]", "train[26:]")),
])  # fmt: skip
def test_splits_of_captioned_images(folders, expected, tmp_path):
    for folder in folders:
        draw(tmp_path / "photos" / folder, 30, captions=True)
    config = config_of("own_captions", data__path=str(tmp_path / "photos"), data__dir=str(tmp_path / "data"))
    resolved = resolve(config, tmp_path / "run")
    assert (resolved.data.train_split, resolved.data.test_split) == expected
    config_rules.validate(resolved)


def test_a_run_that_was_started_keeps_its_values(tmp_path, capsys):
    draw(tmp_path / "photos", 12)
    config = config_of("own_pictures", data__path=str(tmp_path / "photos"), data__dir=str(tmp_path / "data"))
    first, run = resolve(config, tmp_path / "run"), tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(config_io.to_json(first))
    draw(tmp_path / "photos", 900, (40, 40))  # with which the rules would give others
    capsys.readouterr()
    assert resolve(config, run).to_dict() == first.to_dict()
    assert f"As in {run / 'config.json'}: " in capsys.readouterr().out
    assert resolve(config, tmp_path / "another").diffusion.steps > first.diffusion.steps


def test_a_field_without_a_rule_must_have_a_value(tmp_path):
    with pytest.raises(InputError, match=r"config\.seed is None; it must have a value"):
        resolve(config_of("own_pictures", seed=None), tmp_path)


def test_open_fields_are_printed_as_null(capsys):
    assert command_line.run(train.main, ["train", "--config=configs/own_pictures.py", "--print_config"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["diffusion"]["steps"] is None and printed["diffusion"]["batch_size"] == 32
