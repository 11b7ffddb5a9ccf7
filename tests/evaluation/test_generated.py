"""Images made by any program: read from a folder or an .npz, and scored by the command."""

import jax.numpy as jnp
import jobs
import numpy as np
import pytest
import tiny
from flax import linen as nn
from PIL import Image
from safetensors.numpy import save_file

from ldm_jax import command_line, evaluate
from ldm_jax.errors import InputError
from ldm_jax.evaluation import features, scoring
from ldm_jax.evaluation.features import FeatureExtractor
from ldm_jax.evaluation.generated import read_generated
from ldm_jax.interop import inception_weights
from ldm_jax.models.inception import conv_relu, inception_input
from ldm_jax.runtime.files import read_json

IMAGES, _ = tiny.pictures(12, seed=5)


@pytest.fixture
def made(tmp_path):
    """The same images as a folder, as an .npz of `sample`, and as one of guided-diffusion."""
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for i, image in enumerate(IMAGES):
        Image.fromarray(image[..., 0]).save(tmp_path / "folder" / ("below" if i > 9 else ".") / f"x{i:02d}.png")
    (tmp_path / "folder" / ".hidden.png").write_bytes(b"")
    (tmp_path / "folder" / "notes.txt").write_text("none")
    np.savez(tmp_path / "samples.npz", images=IMAGES, labels=np.zeros(12, np.int32))
    np.savez(tmp_path / "guided_diffusion.npz", IMAGES)
    return tmp_path


@pytest.mark.parametrize("name", ["folder", "samples.npz", "guided_diffusion.npz"])
def test_what_is_read(name, made):
    found = read_generated(made / name, size=8, channels=1)
    assert sorted(map(bytes, found)) == sorted(map(bytes, IMAGES))
    assert read_generated(made / name, size=4, channels=3).shape == (12, 4, 4, 3)


def test_what_is_refused(made):
    np.savez(made / "floats.npz", images=IMAGES / 255)
    np.savez(made / "other.npz", x=IMAGES)
    np.save(made / "array.npy", IMAGES)
    (made / "empty").mkdir()
    (made / "folder" / "broken.png").write_bytes(b"no")
    for name, words in (
        ("floats.npz", r"must have `images` \(or arr_0\), uint8 .*; it has float64 \[12, 8, 8, 1\]"),
        ("other.npz", "it has no array of that name"),
        ("array.npy", "cannot be read as .npz"),
        ("gone", "cannot be read as .npz"),
        ("empty", "has no images"),
        ("folder", r"broken\.png: not an image"),
    ):
        with pytest.raises(InputError, match=words) as error:
            read_generated(made / name, size=8, channels=1)
        assert f"--images={made / name}" in str(error.value) or name == "folder"


@pytest.fixture
def quarters(monkeypatch):
    """The means of each image's quarters, in place of the features of VGG16."""

    def apply(params, images):
        return jnp.mean(images.reshape(len(images), 2, 4, 2, 4, 1).astype(np.float32), axis=(2, 4, 5)).reshape(-1, 4)

    def extractor(resize, batch_size):
        return FeatureExtractor("VGG16", "quarters", resize, "ab" * 32, {}, apply, batch_size)

    monkeypatch.setattr(scoring, "vgg16_features", extractor)


def test_the_command(made, quarters, tiny_data, capsys):
    config = [jobs.SMALL[0], f"--config.data.dir={tiny_data}"]
    command = ["evaluate", f"--images={made / 'folder'}", *config, f"--out={made / 'out'}"]
    assert command_line.run(evaluate.main, command) == 0
    cards = read_json(made / "out" / "evaluation.json")
    (name, *_) = [name for name in cards["samples"] if name.startswith("FD")]
    assert cards["num"] == 12 and cards["samples"][name]["n"] == 12 and np.isfinite(cards["samples"][name]["value"])
    assert "autoencoder" not in cards
    assert "Cards: " in capsys.readouterr().out
    for flags, words in (
        ([f"--images={made / 'folder'}", "--out=x"], "--images needs --config=FILE"),
        ([f"--images={made / 'folder'}", "--model=x", *config, "--out=x"], "and no --model"),
        ([f"--images={made / 'folder'}", *config], "--out is missing"),
        ([f"--images={made / 'folder'}", *config, "--out=x", "--num=5"], "--num is for sampling from --model"),
    ):
        assert command_line.run(evaluate.main, ["evaluate", *flags]) == 2
        assert words in capsys.readouterr().err


class OneLayer(nn.Module):
    """A network with Inception's input and the name of its first layer, of four features."""

    @nn.compact
    def __call__(self, images):
        return jnp.mean(conv_relu(inception_input(images), "Conv2d_1a_3x3", 4), axis=(1, 2))


@pytest.mark.parametrize("flag", ["--inception_weights", "--config.evaluation.inception_weights"])
def test_fid_by_a_file_of_weights(flag, made, quarters, tiny_data, monkeypatch):
    """Dowson & Landau 1982: |m - n|^2 + tr(C + D - 2 (C D)^(1/2)) of means m, n and covariances C, D."""
    rng, shapes = np.random.default_rng(0), {"conv.weight": (4, 3, 1, 1), "bn.weight": 4, "bn.bias": 4}
    shapes |= {"bn.running_mean": 4, "bn.running_var": 4}
    weights = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file({f"Conv2d_1a_3x3.{name}": tensor for name, tensor in weights.items()}, made / "inception.safetensors")
    for module in (features, inception_weights):
        monkeypatch.setattr(module, "InceptionV3", OneLayer)
    command = ["evaluate", f"--images={made / 'samples.npz'}", jobs.SMALL[0], f"--config.data.dir={tiny_data}"]
    command += [f"--out={made / 'out'}", f"{flag}={made / 'inception.safetensors'}"]
    assert command_line.run(evaluate.main, command) == 0
    cards = read_json(made / "out" / "evaluation.json")["samples"]

    def by_hand(images):
        kernel, gamma, beta, mean, variance = (weights[name].astype(np.float64) for name in shapes)
        x = np.asarray(inception_input(images), np.float64) @ kernel[:, :, 0, 0].T
        return np.maximum(gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta, 0).mean((1, 2))

    x, y = by_hand(IMAGES), by_hand(tiny.pictures(16, seed=1)[0])  # of the test split
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(c @ d).real, 0))
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c + d) - 2 * roots.sum()
    np.testing.assert_allclose(cards["FID"]["value"], expected, rtol=1e-3)
    assert {"KID", "precision-Inception", "recall-Inception"} < cards.keys()


def test_a_singular_covariance_is_said(tiny_data, monkeypatch, capsys):
    """With fewer images than features."""

    def features(resize, batch_size):
        flat = lambda params, images: jnp.asarray(images, jnp.float32).reshape(len(images), -1)  # noqa: E731
        return FeatureExtractor("VGG16", "pixels", resize, "cd" * 32, {}, flat, batch_size)

    monkeypatch.setattr(scoring, "vgg16_features", features)
    config = tiny.get_config().unlock()
    config.data.dir = str(tiny_data)
    sets = [scoring.load_split(config, split) for split in ("train", "test")]
    scoring.score_images(config.lock(), IMAGES, *sets)
    assert "12 samples and 16 real images for 64 features: a covariance is singular" in capsys.readouterr().err
