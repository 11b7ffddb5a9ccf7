"""Fine-tuning of a diffusers folder by the train command: what learns, what is drawn, and what is refused."""

import json
import shutil

import diffusers_folder
import jobs
import numpy as np
import pytest
from PIL import Image

from ldm_jax import commands, evaluate, sample, train, trained
from ldm_jax.run_folder import read_json, read_metrics

CAPTIONS = ("low", "lower", "low low", "wool")


def write_pictures(folder):
    """Eight small pictures of one colour each, and four captions."""
    folder.mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (20, 16), (30 * i, 255 - 30 * i, 100)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i % 4])
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and with pictures; runs lie beside them."""
    home = tmp_path_factory.mktemp("finetune")
    diffusers_folder.write_stable_diffusion(home / "model")
    write_pictures(home / "pictures")
    return home


def flags(home, run, *changes):
    given = {
        "--config": "configs/finetune.py",
        "--workdir": home / run,
        "--config.init_from": home / "model",
        "--config.data.path": home / "pictures",
        "--config.data.dir": home / "data",
        "--config.data.image_size": 16,
        "--config.diffusion.steps": 4,
        "--config.diffusion.batch_size": 4,
        "--config.diffusion.warmup_steps": 0,
        "--config.diffusion.learning_rate": 1e-3,
        "--config.diffusion.validation_examples": 8,
        "--config.evaluation.batch_size": 8,
        "--config.sampling.prompts": "('low','wool')",
        "--config.sampling.num": 2,
        "--config.sampling.steps": 2,
        "--config.sampling.batch_size": 8,
        "--config.sampling.progress_every": 0,
        "--config.log_every": 1,
    }
    given |= dict(change.split("=", 1) for change in changes)
    return [f"{name}={value}" for name, value in given.items()]


def fine_tune(home, run, *changes):
    return commands.run(train.main, ["train", *flags(home, run, *changes)])


@pytest.fixture(scope="module")
def run(home):
    """The run folder of a whole small job."""
    assert fine_tune(home, "run", "--config.sampling.progress_every=4") == 0
    return home / "run"


def draw(model, out, *flags):
    command = ["sample", f"--model={model}", f"--out={out}", "--steps=2", "--prompt=low", *flags]
    assert commands.run(sample.main, command) == 0
    return jobs.samples(out)["images"].astype(int)


def test_a_run_leaves_what_other_runs_leave(run):
    for name in ("report.html", "samples.png", "denoising.gif", "progress/diffusion_000004.png"):
        assert (run / name).is_file()
    assert jobs.samples(run)["labels"].tolist() == [0, 1]
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["stage"] == "diffusion"]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert any("validation_loss" in line for line in lines)
    assert read_json(run / "data.json")["class_names"] == sorted(set(CAPTIONS))


def test_the_unet_has_learnt_and_the_rest_stays(home, run):
    before, after = trained.load(home / "model"), trained.load(run)
    assert after.step == 4 and after.pretrained and before.pretrained
    assert sorted(after.params) == sorted(before.params)
    same = {
        name: all(map(np.array_equal, leaves(before.params[name]), leaves(after.params[name]))) for name in after.params
    }
    assert [name for name, equal in same.items() if not equal] == ["unet"]
    moved = [np.abs(a - b).max() for a, b in zip(leaves(before.params["unet"]), leaves(after.params["unet"]))]
    assert 1e-4 < max(moved) < 1e-2


def leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_the_run_is_drawn_by_prompts_as_its_model_is(home, run, tmp_path):
    before, after = draw(home / "model", tmp_path / "before"), draw(run, tmp_path / "after")
    assert before.shape == after.shape == (1, 16, 16, 3)
    assert (before != after).any()
    half = draw(run, tmp_path / "half", "--dtype=bfloat16")
    assert 0 < np.abs(half - after).mean() < 10


def test_the_same_command_again_says_that_all_is_done(home, run, capsys):
    assert fine_tune(home, "run", "--config.sampling.progress_every=4") == 0
    assert "All is done" in capsys.readouterr().out


def test_resumed_it_ends_as_one_that_was_left_alone(home, run):
    """Both of the same length, the second from a checkpoint of the first half."""
    rest = ["--config.checkpoint_every=2", "--config.sampling.progress_every=4"]
    assert fine_tune(home, "again", *rest) == 0
    for name in ("samples.npz", "samples.png", "evaluation.json", "report.html"):
        (home / "again" / name).unlink()
    shutil.rmtree(home / "again" / "diffusion" / "4")
    assert fine_tune(home, "again", *rest) == 0
    jobs.assert_same_training(home / "again", run, stages=("diffusion",))


def test_captions_matter(home, run):
    """Another caption for every picture, and other weights come of it."""
    shutil.copytree(home / "pictures", home / "others")
    for i in range(8):
        (home / "others" / f"{i}.txt").write_text("lower low wool")
    assert fine_tune(home, "other", f"--config.data.path={home}/others", "--config.sampling.num=0") == 0
    one, other = trained.load(run).params["unet"], trained.load(home / "other").params["unet"]
    assert any(map(lambda a, b: (a != b).any(), leaves(one), leaves(other)))


def another_model(home):
    other = shutil.copytree(home / "model", home / "damaged")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    return f"--config.init_from={other}"


REFUSED = {  # flags -> what the line must say
    "no such model": (["--config.init_from=HOME/gone"], "must be a diffusers folder, with a model_index.json"),
    "a model that is a file": (["--config.init_from=HOME/pictures/0.png"], "must be a diffusers folder"),
    "a model of another kind": (["--config.init_from=HOME/flux"], "FluxPipeline; supported are"),
    "a model that inpaints": (["--config.init_from=HOME/inpainting"], "is a model for inpainting"),
    "a size that does not halve": (["--config.data.image_size=15"], "needs a multiple of 2"),
    "grey pictures": (["--config.data.channels=1"], "takes pictures of 3"),
    "no captions asked for": (["--config.data.caption_key=none"], "config.data.caption_key must name"),
    "no path": (["--config.data.path="], "needs config.data.path"),
    "no pictures": (["--config.data.path=HOME/model/unet"], "has no picture with a caption"),
    "too many captions": (["--config.data.memory_limit_gb=1e-7"], "captions takes"),
    "a negative rank": (["--config.lora.rank=-1"], "config.lora.rank is -1; it must be 0 or more"),
    "an alpha of nothing": (["--config.lora.rank=2", "--config.lora.alpha=0.0"], "config.lora.alpha is 0"),
    "prompts that are numbers": (["--config.sampling.prompts=(1,2)"], "it must be texts"),
    "another stage": (["--config.stages=('autoencoder','diffusion')"], "it must be ('diffusion',)"),
    "a learned variance": (["--config.diffusion.variance=learned"], "it must be fixed"),
    "a sampler that cannot": (["--config.sampling.sampler=plms"], "skip_prk_steps"),
}


@pytest.fixture(scope="module")
def refused_models(home):
    diffusers_folder.write_stable_diffusion(home / "inpainting", inpainting=True)
    flux = shutil.copytree(home / "model", home / "flux")
    index = json.loads((flux / "model_index.json").read_text())
    (flux / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, home, refused_models, capsys):
    changes, expected = REFUSED[case]
    assert fine_tune(home, "refused", *(change.replace("HOME", str(home)) for change in changes)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line
    assert not (home / "refused").exists()


@pytest.mark.parametrize(
    "flag", ["--config.lora.rank=2", "--config.sampling.prompts=('a',)", "--config.sampling.sampler=own"]
)
def test_what_only_fine_tuning_has(flag, tmp_path, capsys):
    command = ["train", "--config=tests/tiny.py", f"--workdir={tmp_path / 'run'}", flag]
    assert commands.run(train.main, command) == 2
    assert "that needs config.init_from" in capsys.readouterr().err


def test_a_run_whose_model_has_changed_is_refused(home, run, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"init_from": str(tmp_path / "model")}))
    command = ["sample", f"--model={copied}", f"--out={tmp_path / 'out'}", "--prompt=low"]
    assert commands.run(sample.main, command) == 2
    assert "must be a diffusers folder" in capsys.readouterr().err
    diffusers_folder.write_stable_diffusion(tmp_path / "model", xl=True)
    assert commands.run(sample.main, command) == 2
    assert "was fine-tuned from another model" in capsys.readouterr().err


def test_evaluate_wants_a_run_of_our_own(run, tmp_path, capsys):
    assert commands.run(evaluate.main, ["evaluate", f"--model={run}", f"--out={tmp_path / 'out'}"]) == 2
    assert "is fine-tuned from a diffusers folder" in capsys.readouterr().err
