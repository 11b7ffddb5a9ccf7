"""A run whose data set, or pretrained model, has changed under the same name is refused, before anything is written."""

import json
import shutil

import jobs
import pytest
import tiny
from test_bad_input import contents, fails

from ldm_jax import evaluate, train
from ldm_jax.data.datasets import load_dataset
from ldm_jax.errors import InputError
from ldm_jax.pipeline.data_record import check_unchanged, data_record

SWAPPED = ("vertical", "horizontal", "bright", "dark")
CHANGES = {  # arguments of `tiny.prepare` -> what the line must say
    "fewer images": ({"train": 60}, "its training split has changed: it had 64 images, and has 60 now"),
    "more test images": ({"test": 20}, "its test split has changed: it had 16 images, and has 20 now"),
    "other images": ({"seed": 7}, "its training split has changed: as many images as before, but their pixels"),
    "other labels": ({"shift": 1}, "its training split has changed: as many images as before, but their pixels"),
    "renamed classes": ({"class_names": SWAPPED}, "class 0 was 'horizontal', and is 'vertical' now"),
    "one class more": ({"class_names": (*tiny.CLASS_NAMES, "grey")}, "it had 4 classes, and has 5 now"),
}


@pytest.fixture(scope="module")
def changed_data(tmp_path_factory):
    """Prepares a changed data set once: case -> its folder."""
    folders = {}

    def prepare(case):
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp("changed")
            tiny.prepare(folders[case], **CHANGES[case][0])
        return folders[case]

    return prepare


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("case", CHANGES)
def test_train_refuses(case, finished, trained_run, tiny_data, changed_data, tmp_path, capsys):
    run, data = shutil.copytree(trained_run, tmp_path / "run"), changed_data(case)
    if not finished:
        (run / "report.html").unlink()
        shutil.rmtree(run / "diffusion")
    before = contents(run)
    line = fails(train.main, jobs.flags(data, run), capsys)
    assert CHANGES[case][1] in line and f"--workdir={run}" in line
    assert line.endswith("; put it back as it was, or train in another --workdir")
    assert contents(run) == before
    if finished:
        assert jobs.train_here(tiny_data, run) == 0  # put back
        assert "All is done" in capsys.readouterr().out


@pytest.mark.parametrize("case", CHANGES)
def test_evaluate_refuses(case, trained_run, changed_data, tmp_path, capsys):
    run = shutil.copytree(trained_run, tmp_path / "run")
    fields = json.loads((run / "config.json").read_text())
    fields["data"]["dir"] = str(changed_data(case))
    (run / "config.json").write_text(json.dumps(fields))
    line = fails(evaluate.main, [f"--model={run}", "--num=4", f"--out={tmp_path / 'out'}"], capsys)
    assert CHANGES[case][1] in line
    assert not (tmp_path / "out").exists()


def splits(folder, **options):
    return [load_dataset("tiny", split, data_dir=folder, **options) for split in ("train", "test")]


def test_the_same_data_elsewhere_and_on_the_disk(tiny_data, tmp_path):
    """Of the same content, prepared in another folder; data on the disk have fingerprints of their own kind."""
    tiny.prepare(tmp_path)
    recorded, on_disk = data_record(*splits(tiny_data)), data_record(*splits(tiny_data, memory_limit=0))
    check_unchanged(recorded, data_record(*splits(tmp_path)), "run")
    check_unchanged(recorded, on_disk, "run")
    assert recorded["train_fingerprint"] != on_disk["train_fingerprint"]


def test_changed_data_on_the_disk(tiny_data, changed_data):
    recorded = data_record(*splits(tiny_data, memory_limit=0))
    with pytest.raises(InputError, match="pixels, labels or order differ"):
        check_unchanged(recorded, data_record(*splits(changed_data("other labels"), memory_limit=0)), "run")


def test_records_of_older_versions(tiny_data):
    now = data_record(*splits(tiny_data))
    older = {name: value for name, value in now.items() if not name.endswith("in_memory")}
    check_unchanged(older, now, "run")
    check_unchanged({"class_names": now["class_names"]}, now, "run")
    with pytest.raises(InputError, match="pixels"):
        check_unchanged(older | {"test_fingerprint": "0"}, now, "run")


def test_another_pretrained_model(tiny_data):
    recorded = data_record(*splits(tiny_data), init_from="a")
    check_unchanged(recorded, recorded, "run")
    for other in ("b", ""):
        with pytest.raises(InputError, match=r"fine-tuned from another model than config\.init_from"):
            check_unchanged(recorded, data_record(*splits(tiny_data), init_from=other), "run")
