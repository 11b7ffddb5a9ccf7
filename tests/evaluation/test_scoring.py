"""The likelihood of models of any conditioning, and the config that a foreign model is scored by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_runs
import tiny

from ldm_jax.config import io as config_io
from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.from_config import load_split
from ldm_jax.errors import InputError
from ldm_jax.evaluation import scoring
from ldm_jax.runtime.files import read_json


@pytest.fixture(scope="module")
def test_set(tiny_data):
    return load_dataset("tiny", "test", data_dir=tiny_data, image_size=8, channels=1)


def config_of(**fields):
    config = tiny.get_config().unlock()
    config.evaluation.update(fields)
    return config.lock()


def test_the_likelihood_of_latents(test_set, tmp_path):
    model, params = random_runs.random_model()
    assert scoring.score_likelihood(model, params, config_of(), test_set, tmp_path) == {}
    config = config_of(vlb_examples=99)  # more than there are
    ((name, card),) = scoring.score_likelihood(model, params, config, test_set, tmp_path).items()
    assert name == "bits/dim (latents)"
    assert (card["n"], card["reference"]) == (16, "test")
    assert np.isfinite(card["value"]) and card["std"] > 0
    assert "given the class" in card["method"]
    assert (tmp_path / "bits_per_dim.json").exists()


def test_the_condition_is_the_class_only_where_the_classes_are_the_same(test_set, tmp_path):
    examples = test_set[np.arange(3)]
    (model, _), (other, _) = random_runs.random_model(), random_runs.random_model((), ("a", "b"))
    rows, condition = scoring.condition_rows(model, test_set, examples)
    assert (rows.tolist(), condition) == (examples["label"].tolist(), "class")
    rows, condition = scoring.condition_rows(other, test_set, examples)
    assert (rows.tolist(), condition) == ([2, 2, 2], "")
    rows, condition = scoring.condition_rows(model, test_set, {"x": examples["x"]})
    assert rows.tolist() == [4, 4, 4]


def test_reconstructions(test_set):
    model, params = random_runs.random_model()
    images, autoencoder = test_set[np.arange(5)]["x"], model.first_stage.module

    @jax.jit
    def by_hand(params, x):
        mean, _ = jnp.split(autoencoder.apply({"params": params}, x, method="encode"), 2, axis=-1)
        return autoencoder.apply({"params": params}, mean, method="decode")

    expected = np.clip((np.asarray(by_hand(params["first_stage"], images / np.float32(127.5) - 1)) + 1) * 127.5, 0, 255)
    reconstructions = scoring.reconstruct(model, params, images, 4)
    assert reconstructions.shape == images.shape and reconstructions.dtype == np.uint8
    np.testing.assert_allclose(reconstructions, expected, rtol=0, atol=1)
    assert (reconstructions != images).any((1, 2, 3)).all()
    pixels, params = random_runs.random_model((("autoencoder.type", "none"),))
    assert scoring.reconstruct(pixels, params, images, 4) is None


def test_an_autoencoder_alone_has_the_scores_that_it_has_in_a_whole_run(trained_run):
    config = config_io.from_json(trained_run / "config.json")
    test_set = load_split(config, config.data.test_split)
    whole = read_json(trained_run / "evaluation.json")["autoencoder"]
    assert {"rFD-VGG16", "PSNR"} < whole.keys()
    assert scoring.score_autoencoder(trained_run, config, test_set) == whole
    assert scoring.score_autoencoder(trained_run, config, load_split(config, "test[:1]")) == {}


def test_the_config_of_a_foreign_model_has_its_size():
    model, _ = random_runs.random_model((("data.image_size", 16), ("data.channels", 3)))
    config = scoring.at_size_of(config_of(), model)
    assert (config.data.image_size, config.data.channels) == (16, 3)
    with pytest.raises(InputError, match="images are 16x24; data sets are of square ones"):
        scoring.at_size_of(config_of(), model.at_size((16, 24)))
    inpaints, _ = random_runs.random_model((("concat.type", "inpainting"),))
    with pytest.raises(InputError, match="needs an image to sample from"):
        scoring.at_size_of(config_of(), inpaints)
