"""A run told of texts by a CLIP of its own: what it leaves, and what one can do with it."""

import jobs
import pytest

TEXTS = (
    "--config.stages=('autoencoder','clip','diffusion')",
    "--config.data.caption_key=auto",
    "--config.sampling.sampler=ddim",
    "--config.evaluation.zero_shot_key=label",
)


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "run"
    assert jobs.train_here(tiny_data, folder, *TEXTS) == 0
    return folder


def test_a_run_leaves_what_other_runs_leave(run):
    for name in ("report.html", "samples.png", "evaluation.json", "clip/tokenizer/vocab.json"):
        assert (run / name).is_file()
    assert len(jobs.samples(run)["images"]) == 8
