"""The measurement of feeding rates, on small sets."""

import json

import numpy as np
import pytest

from experiments.feeding import run
from ldm_jax.data.datasets import load_dataset


def test_the_set_has_images_and_captions_of_their_own(tmp_path):
    """Prepared once for each size."""
    name = run.prepare(tmp_path, 12, 4, 64)
    dataset = load_dataset(name, "train", data_dir=tmp_path, caption_key="caption")
    assert dataset.shape == (12, 64, 64, 3) and len({image.tobytes() for image in dataset.arrays["x"]}) == 12
    assert len(set(dataset.captions)) == 16 and sorted(dataset.arrays["label"]) == list(dataset.present)
    before = (tmp_path / "synthetic_64" / "1.12.4" / "dataset_info.json").stat().st_mtime_ns
    assert run.prepare(tmp_path, 12, 4, 64) == name
    assert (tmp_path / "synthetic_64" / "1.12.4" / "dataset_info.json").stat().st_mtime_ns == before


def test_random_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LATENTS", 1088)
    shards = run.shards_of_latents(tmp_path, 4)
    assert [len(rows) for rows in shards.rows] == [1024, 64]
    assert abs(np.std(shards[range(1088)]["moments"]) - 1) < 0.02


@pytest.mark.slow
def test_the_whole_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "LATENTS", 1024)
    flags = ["--num=100", "--num512=70", "--test=2", "--seconds=0.2", f"--folder={tmp_path / 'sets'}"]
    monkeypatch.setattr("sys.argv", ["run", *flags, f"--results={tmp_path / 'results.json'}"])
    run.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert list(rows) == ["JPEG, 256 px", "JPEG, 512 px", "latents, 256 px", "latents, 512 px"]
    assert all(
        row[threads][of] > 0 for row in rows.values() for threads in ("threads 1", "threads 8") for of in row[threads]
    )
    assert len(capsys.readouterr().out.splitlines()) == 4
