"""Every type of model through the whole job."""

import shutil

import jobs
import numpy as np
import pytest

from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.runtime.files import read_json, write_json
from ldm_jax.sampling.image_grids import read_recipe


@pytest.fixture(scope="module")
def pixel_run(tiny_data, tmp_path_factory):
    """Diffusion on pixels, with a learned variance."""
    run = tmp_path_factory.mktemp("pixels") / "run"
    changes = ["autoencoder.type=none", "diffusion.prediction=v", "diffusion.variance=learned", "diffusion.steps=4"]
    changes += ["sampling.sampler=ddpm", "sampling.variance=learned", "sampling.progress_every=4"]
    changes += ["evaluation.vlb_examples=12"]
    assert jobs.train_here(tiny_data, run, *(f"--config.{change}" for change in changes)) == 0
    return run


@pytest.mark.slow
def test_diffusion_on_pixels(pixel_run):
    assert not (pixel_run / "autoencoder").exists()
    assert jobs.samples(pixel_run)["images"].shape == (8, 8, 8, 1)
    assert all(np.isfinite(array).all() for array in load_latest(pixel_run / "diffusion").values())
    assert (pixel_run / "report.html").stat().st_size
    assert read_recipe(pixel_run / "samples.png")["solving"]["variance"] == "learned"


@pytest.mark.slow
def test_a_learned_variance_logs_both_losses_and_reports_bits_per_dimension(pixel_run):
    lines = read_metrics(pixel_run / "metrics.jsonl")
    training = [line for line in lines if "simple" in line]
    assert training
    for line in training:
        assert line["loss"] == pytest.approx(line["simple"] + 0.001 * line["vlb"], rel=1e-4)
    assert any("validation_loss" in line for line in lines)
    card = read_json(pixel_run / "evaluation.json")["model"]["bits/dim"]
    assert card["n"] == 12
    assert "8-bit pixels, given the class; learned variance; 20 timesteps in 6 ranges" in card["method"]
    vlb = read_json(pixel_run / "bits_per_dim.json")
    assert vlb["total"] == card["value"] == pytest.approx(vlb["prior"] + sum(vlb["ranges"]))
    assert len(vlb["terms"]) == 20
    assert 0 < card["value"] < 50
    assert "bits/dim" in (pixel_run / "report.html").read_text()


@pytest.mark.slow
def test_colour_images_without_labels_through_a_codebook(tiny_data, tmp_path):
    run = tmp_path / "run"
    changes = ["autoencoder.type=vq", "data.channels=3", "data.label_key=none", "data.flip=True", "diffusion.steps=2"]
    changes += ["sampling.progress_every=2", "autoencoder.steps=2"]
    assert jobs.train_here(tiny_data, run, jobs.NO_ATTENTION, *(f"--config.{change}" for change in changes)) == 0
    samples = jobs.samples(run)
    assert samples["images"].shape == (8, 8, 8, 3)
    assert (samples["labels"] == -1).all()
    assert read_json(run / "data.json")["class_names"] == []
    metrics = read_metrics(run / "metrics.jsonl")
    assert any("perplexity" in line for line in metrics)
    assert any("validation_loss" in line for line in metrics)
    assert sorted(path.name for path in (run / "progress").iterdir()) == [
        "autoencoder_000002.png",
        "diffusion_000002.png",
    ]


@pytest.mark.slow
def test_data_on_disk_train_the_same_model(tiny_data, trained_run, tmp_path):
    """Nothing may stay in memory or on the device: the same batches come from the disk, read ahead."""
    run = tmp_path / "run"
    assert jobs.train_here(tiny_data, run, "--config.data.memory_limit_gb=0.0", "--config.sampling.num=0") == 0
    jobs.assert_same_but_for_rounding(run, trained_run, stages=("autoencoder", "diffusion"))
    assert jobs.losses(run) == pytest.approx(jobs.losses(trained_run), rel=1e-5)


def test_a_reused_autoencoder(tiny_data, trained_run, tmp_path):
    """Another run's autoencoder serves as it is, with the scale that this run measures, on the latents cached there."""
    run = tmp_path / "run"
    changes = f"--config.autoencoder.checkpoint={trained_run}", "--config.sampling.num=0"
    assert jobs.train_here(tiny_data, run, *changes) == 0
    assert list((trained_run / "latents").iterdir()) and not (run / "latents").exists()
    before, after = load_latest(trained_run / "autoencoder"), load_latest(run / "autoencoder")
    names = [name for name in before if name.startswith("ema_params/")]
    assert names
    for name in names:
        np.testing.assert_array_equal(after[name], before[name])
    assert read_json(run / "autoencoder" / "scale.json") == read_json(trained_run / "autoencoder" / "scale.json")


def test_an_autoencoder_that_is_still_trained_is_noted(tiny_data, trained_run, tmp_path, capsys):
    other = shutil.copytree(trained_run, tmp_path / "other")
    config = read_json(other / "config.json")
    config["autoencoder"]["steps"] = 1_000
    write_json(other / "config.json", config)
    for reused, noted in ((trained_run, False), (other, True)):
        assert (
            jobs.train_here(tiny_data, tmp_path / "run", f"--config.autoencoder.checkpoint={reused}", "--dry_run=True")
            == 0
        )
        note = f"note: config.autoencoder.checkpoint={reused} is trained for 8 of 1,000 steps so far"
        assert (note in capsys.readouterr().out) == noted
