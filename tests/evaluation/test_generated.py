"""Images made by any program: read from a folder or an .npz, and scored by the command."""

import jax.numpy as jnp
import jobs
import numpy as np
import pytest
import tiny
from PIL import Image

from ldm_jax import command_line, evaluate
from ldm_jax.errors import InputError
from ldm_jax.evaluation import scoring
from ldm_jax.evaluation.features import FeatureExtractor
from ldm_jax.evaluation.generated import read_generated
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


def test_the_command(made, tiny_data, monkeypatch, capsys):
    def quarters(params, images):
        return jnp.mean(images.reshape(len(images), 2, 4, 2, 4, 1).astype(np.float32), axis=(2, 4, 5)).reshape(-1, 4)

    def features(resize, batch_size):
        return FeatureExtractor("VGG16", "quarters", resize, "ab" * 32, {}, quarters, batch_size)

    monkeypatch.setattr(scoring, "vgg16_features", features)
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
    ):
        assert command_line.run(evaluate.main, ["evaluate", *flags]) == 2
        assert words in capsys.readouterr().err


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
