"""configs/own_pictures.py and own_captions.py on a few images: from a folder to a report."""

import numpy as np
import pytest
from jobs import flags
from PIL import Image

from ldm_jax import command_line, evaluate, train
from ldm_jax.config import defaults
from ldm_jax.evaluation.scoring import scores_left_out
from ldm_jax.runtime.files import read_json

SMALLER = (
    "--config.data.image_size=16",
    "--config.autoencoder.steps=2",
    "--config.diffusion.steps=2",
    "--config.autoencoder.block_out_channels=(8,8)",
    "--config.unet.norm_num_groups=4",
    "--config.autoencoder.norm_num_groups=4",
    "--config.autoencoder.mid_block_attention=False",
    "--config.unet.block_out_channels=(8,)",
    "--config.unet.attention=(False,)",
    "--config.sampling.num=6",
    "--config.sampling.steps=2",
    "--config.sampling.batch_size=2",
    "--config.autoencoder.batch_size=2",
    "--config.autoencoder.loss.perceptual_every=2",
    "--config.diffusion.batch_size=2",
    "--config.diffusion.timesteps=20",
    "--config.evaluation.batch_size=2",
    "--config.evaluation.resize=16",
    "--config.evaluation.vlb_examples=2",
)
CLIP = (
    "--config.clip.steps=2",
    "--config.clip.batch_size=2",
    "--config.clip.text_layers=1",
    "--config.clip.image_layers=1",
    "--config.unet.attention=(True,)",
)


def draw(folder, num, captions=False):
    """Images of random colours, some not square."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20 + i % 3, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        if captions:
            (folder / f"{i}.txt").write_text(f"a picture with number {i % 5}")


def run(config, tmp_path, *changes):
    """Runs the config on tmp_path/photos; returns the run folder."""
    changes = (f"--config=configs/{config}.py", f"--config.data.path={tmp_path / 'photos'}", *SMALLER, *changes)
    arguments = flags(tmp_path / "data", tmp_path / "run", *changes)
    assert command_line.run(train.main, ["train", *arguments]) == 0
    assert (tmp_path / "run" / "report.html").exists()
    return tmp_path / "run"


@pytest.mark.slow
def test_images_with_classes(tmp_path, capsys):
    for name, num in (("disc", 12), ("square", 6)):
        draw(tmp_path / "photos" / name, num)
    folder = run("own_pictures", tmp_path)
    output = capsys.readouterr().out
    assert "train: 18 images in 2 classes: disc (12), square (6)\n" in output
    assert "Data: images, 14 images to train on, 4 to test, 2 classes\n" in output
    assert "too few" not in output
    assert "FD-VGG16" in read_json(folder / "evaluation.json")["samples"]
    with np.load(folder / "samples.npz") as samples:
        assert samples["images"].shape == (6, 16, 16, 3) and samples["labels"].tolist() == [0, 1] * 3


@pytest.mark.slow
def test_two_images(tmp_path, capsys):
    draw(tmp_path / "photos", 2)
    folder = run("own_pictures", tmp_path)
    output = capsys.readouterr().out
    assert "Data: images, 1 images to train on, 1 to test, 0 classes\n" in output
    assert output.index("1 training images and 1 test images: too few for scores") < output.index("autoencoder took")
    cards = read_json(folder / "evaluation.json")
    assert cards["samples"] == cards["autoencoder"] == {} and cards["model"]
    assert command_line.run(evaluate.main, ["evaluate", f"--model={folder}", "--num=4"]) == 2
    assert "1 training images and 1 test images: too few for scores" in capsys.readouterr().err


@pytest.mark.slow
def test_fields_of_the_images_are_recorded_and_kept(tmp_path, capsys):
    """With the number of samples, the channels and the widths of the latents left open."""
    draw(tmp_path / "photos", 12)
    folder = run("own_pictures", tmp_path)
    config = read_json(folder / "config.json")
    assert config["data"]["channels"] == 3 and config["autoencoder"]["latent_channels"] == 8
    assert config["autoencoder"]["loss"]["adversarial_start"] == 1
    capsys.readouterr()
    run("own_pictures", tmp_path)
    output = capsys.readouterr().out
    assert f"As in {folder / 'config.json'}: data.channels=3, " in output and "All is done" in output


@pytest.mark.slow
def test_captioned_images_in_folders_of_splits(tmp_path, capsys):
    draw(tmp_path / "photos" / "train", 12, captions=True)
    draw(tmp_path / "photos" / "test", 5, captions=True)
    run("own_captions", tmp_path, *CLIP)
    assert "Data: folder, 12 images to train on, 5 to test, 5 captions\n" in capsys.readouterr().out


@pytest.mark.slow
def test_images_with_captions(tmp_path, capsys):
    draw(tmp_path / "photos", 30, captions=True)
    folder = run("own_captions", tmp_path, *CLIP)
    assert "Data: folder, 26 images to train on, 4 to test, 5 captions\n" in capsys.readouterr().out
    assert (folder / "prompts" / "training.png").exists()
    assert {"prompts", "clip"} <= read_json(folder / "evaluation.json").keys()


@pytest.mark.parametrize(
    ("samples", "training", "test", "expected"),
    [
        (100, 200, 20, ""),
        (4, 4, 4, ""),
        (100, 27, 3, "3 test images: too few for scores (Fréchet and kernel distance, precision and recall), which"),
        (2, 1, 9, "2 samples and 1 training images: too few"),
        (100, 3, 1, "3 training images and 1 test images: too few for scores (Fréchet and kernel distance, precision "
                    "and recall and those of decoding), which need 4 of each; they are left out"),
    ],
)  # fmt: skip
def test_scores_of_too_few_images_are_named(samples, training, test, expected):
    found = scores_left_out(samples, defaults.get_config(), range(training), range(test))
    assert found.startswith(expected) and bool(found) == bool(expected)
