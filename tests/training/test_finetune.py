"""Fine-tuning of a diffusers folder by the train command: what is trained, what is sampled, and what is refused."""

import json
import shutil

import diffusers_folder
import jax
import jobs
import numpy as np
import pytest
from finetuning import CAPTIONS, fine_tune, fine_tune_and_kill, leaves, write_pictures
from PIL import Image

from configs import finetune as finetune_config
from ldm_jax import command_line, convert, evaluate, sample, train
from ldm_jax.data import from_config as data_from_config
from ldm_jax.data.image_folder import prepare
from ldm_jax.errors import InputError
from ldm_jax.interop.lora import FILE
from ldm_jax.pipeline.load import load, load_base
from ldm_jax.pipeline.lora import with_lora
from ldm_jax.pipeline.model import fingerprint
from ldm_jax.pipeline.trainable import merge_trained, trainable_of
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.runtime.files import read_json
from ldm_jax.sampling import concat_inputs
from ldm_jax.sampling.image_grids import read_recipe, save_png
from ldm_jax.sampling.recipe import from_png

WHOLE = ("init_from=HOME/inpainting", "sampling.progress_every=4", "sampling.prompts=()", "sampling.num=3")
LORA = ("lora.rank=2", "lora.alpha=6.0", "sampling.num=0")
WHOLE, LORA = (tuple(f"--config.{change}" for change in (*changes, "checkpoint_every=2")) for changes in (WHOLE, LORA))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with models, images and runs."""
    home = tmp_path_factory.mktemp("finetune")
    diffusers_folder.write_stable_diffusion(home / "model")
    diffusers_folder.write_stable_diffusion(home / "inpainting", inpainting=True)
    write_pictures(home / "pictures")
    return home


@pytest.fixture(scope="module")
def run(home):
    """The run folder of a whole small job: of an inpainting model, without prompts of its own."""
    assert fine_tune(home, "run", *WHOLE) == 0
    return home / "run"


@pytest.fixture(scope="module")
def lora_run(home):
    """Of a text-to-image model by LoRA, without samples."""
    assert fine_tune(home, "lora", *LORA) == 0
    return home / "lora"


def test_a_run_leaves_what_other_runs_leave(run):
    for name in ("report.html", "samples.png", "denoising.gif", "progress/diffusion_000004.png"):
        assert (run / name).is_file()
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["stage"] == "diffusion"]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert any("validation_loss" in line for line in lines)
    assert read_json(run / "data.json")["class_names"] == sorted(set(CAPTIONS))


def test_the_denoiser_is_trained_and_the_rest_stays(home, run):
    (before, old), (after, new) = load(home / "inpainting"), load(run)
    assert after.origin.step == 4 and after.origin.pipeline == before.origin.pipeline
    assert after == before and sorted(new) == sorted(old)
    same = {name: all(map(np.array_equal, leaves(old[name]), leaves(new[name]))) for name in new}
    assert [name for name, equal in same.items() if not equal] == ["denoiser"]
    moved = [np.abs(a - b).max() for a, b in zip(leaves(old["denoiser"]), leaves(new["denoiser"]))]
    assert 1e-4 < max(moved) < 1e-2


def test_held_out_images_are_inpainted_by_their_captions(run):
    """Random parts of the first ones; what is not masked stays as it is."""
    (model, _), recipe = load(run), read_recipe(run / "samples.png")
    dataset = data_from_config.load_split(model.origin.config, "train")
    captions = [dataset.class_names[label] for label in dataset[np.arange(3)]["label"]]
    assert [recipe["prompts"][label] for label in recipe["labels"]] == captions
    assert (recipe["concat"]["split"], recipe["solving"]["sampler"]) == ("train", "ddim")
    assert (recipe["guidance"]["scale"], recipe["step"]) == (7.5, 4)
    images = jobs.samples(run)["images"]
    inputs = concat_inputs.from_split(model, dataset, 3, 0, 8).degraded
    masked = np.broadcast_to(inputs["mask"] == 1, images.shape)
    np.testing.assert_array_equal(images[~masked], inputs["x"][~masked])
    assert (images[masked] != inputs["x"][masked]).mean() > 0.5
    assert f"Prompts: “{recipe['prompts'][0]}”" in (run / "report.html").read_text()


def test_a_run_is_handed_back_as_the_pipeline_that_it_was(run, tmp_path):
    folder = tmp_path / "folder"
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={folder}"]) == 0
    assert read_json(folder / "model_index.json")["_class_name"] == "StableDiffusionInpaintPipeline"
    assert fingerprint(*load(folder)) == fingerprint(*load(run))


def test_a_recipe_from_before_some_fields(run, tmp_path):
    """The default of a field stands in for it: the same images; but not of what has no default."""
    recipe, image = read_recipe(run / "samples.png"), Image.open(run / "samples.png")
    lacking = (("concat", "noise_level"), ("edit", "to_image"), ("edit", "resample_jump"))
    older = {**recipe, **{name: dict(recipe[name]) for name in ("concat", "edit", "solving")}}
    for section, name in lacking:
        del older[section][name]
    save_png(image, tmp_path / "older.png", older)
    command = ["sample", f"--model={run}", f"--out={tmp_path / 'out'}", f"--from_recipe={tmp_path}/older.png"]
    assert command_line.run(sample.main, command) == 0
    for name, array in jobs.samples(run).items():
        np.testing.assert_array_equal(jobs.samples(tmp_path / "out")[name], array)
    for section, name in ((older, "size"), (older["solving"], "spacing")):
        del section[name]
        save_png(image, tmp_path / "oldest.png", older)
        with pytest.raises(InputError, match=rf"of another version: its recipe lacks {name}$"):
            from_png(tmp_path / "oldest.png", *load(run))


def test_test_images_have_a_size_of_their_own(run, tmp_path, capsys):
    command = ["sample", f"--model={run}", f"--out={tmp_path / 'out'}", "--prompt=low", "--height=8"]
    assert command_line.run(sample.main, command) == 2
    assert "--height=8: without an image this model restores test images" in capsys.readouterr().err


@pytest.mark.slow
def test_images_of_several_shapes(home, capsys):
    """Images of 16 x 20 pixels and a portrait one; a resumed run ends with the same bits."""
    images = shutil.copytree(home / "pictures", home / "shapes")
    Image.new("RGB", (12, 20), "navy").save(images / "high.png")
    (images / "high.txt").write_text("low")
    changes = ["--config.data.path=HOME/shapes", "--config.data.bucket_step=4", "--config.sampling.num=0"]
    changes += ["--config.lora.rank=2", "--config.checkpoint_every=2"]
    assert fine_tune(home, "of_shapes", *changes) == 0
    assert "height x width of the images: 20x12 (1), 16x16 (8)" in capsys.readouterr().out
    shapes = {np.load(path, mmap_mode="r").shape for path in (home / "of_shapes" / "latents").glob("*.moments.npy")}
    assert {shape[:1] + shape[2:4] for shape in shapes} == {(1, 10, 6), (8, 8, 8)}
    again = shutil.copytree(home / "of_shapes", home / "of_shapes_again")
    shutil.rmtree(again / "diffusion" / "4")
    (again / "evaluation.json").unlink()
    assert fine_tune(home, "of_shapes_again", *changes) == 0
    jobs.assert_same_training(again, home / "of_shapes", stages=("diffusion",))


def test_the_same_command_again_says_that_all_is_done(home, run, capsys):
    assert fine_tune(home, "run", *WHOLE) == 0
    assert "All is done" in capsys.readouterr().out


@pytest.mark.slow
def test_resumed_it_ends_as_one_that_was_left_alone(home, run):
    shutil.copytree(run, home / "again")
    shutil.rmtree(home / "again" / "diffusion" / "4")
    (home / "again" / "evaluation.json").unlink()
    assert fine_tune(home, "again", *WHOLE, "--config.sampling.progress_every=0") == 0
    jobs.assert_same_training(home / "again", run, stages=("diffusion",))
    assert jobs.losses(home / "again") == jobs.losses(run)
    assert (home / "again" / "samples.npz").stat().st_mtime == (run / "samples.npz").stat().st_mtime  # not sampled anew


@pytest.mark.slow
def test_killed_and_resumed_it_ends_as_one_that_was_left_alone(home, lora_run):
    fine_tune_and_kill(home, "killed", *LORA)
    assert sorted(path.name for path in (home / "killed" / "diffusion").glob("[0-9]")) in ([], ["2"])
    assert fine_tune(home, "killed", *LORA) == 0
    jobs.assert_same_training(home / "killed", lora_run, stages=("diffusion",))
    assert jobs.losses(home / "killed") == jobs.losses(lora_run)
    assert (home / "killed" / FILE).read_bytes() == (lora_run / FILE).read_bytes()


def test_lora_begins_as_the_model_itself(home):
    config = finetune_config.get_config().unlock()
    config.init_from, config.data.image_size, config.lora.rank = str(home / "model"), 16, 2
    (model, params), config = load_base(config.lock())
    trainable = trainable_of(config, model)
    trained = trainable.init(jax.random.key(0), params)
    layer = trained["lora"]["down_blocks_0"]["attentions_0"]["transformer_blocks_0"]["attn2"]["to_k"]["lora"]
    down, up = (layer[name]["kernel"] for name in ("down", "up"))
    assert down.shape == (16, 2) and up.shape == (2, 8)
    assert np.asarray(down).any() and not np.asarray(up).any()
    jax.tree.map(np.testing.assert_array_equal, merge_trained(trainable, params, trained), params)


def test_only_the_lora_is_trained_and_kept(lora_run):
    names = {name.split("/")[1] for name in load_latest(lora_run / "diffusion") if name.startswith(("params", "ema"))}
    assert names == {"lora"}
    assert not (lora_run / "samples.npz").exists()


def test_the_lora_file_is_what_the_run_has_trained(home, lora_run):
    (model, params), (_, trained) = load(home / "model"), load(lora_run)
    by_file = with_lora(model, params, lora_run / FILE, 1.0)
    assert any((a != b).any() for a, b in zip(leaves(params), leaves(trained)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), by_file, trained)


@pytest.mark.slow
def test_lora_of_the_text_encoder_too(home):
    """Trained, resumed, and as the file that diffusers reads."""
    changes = [*LORA, "--config.diffusion.train_text_encoder=True"]
    assert fine_tune(home, "lora_text", *changes) == 0
    flat = load_latest(home / "lora_text" / "diffusion")
    assert {name.split("/")[1] for name in flat if name.startswith(("params", "ema"))} == {"lora", "lora_text"}
    (model, params), (_, trained) = load(home / "model"), load(home / "lora_text")
    assert any((a != b).any() for a, b in zip(leaves(params["conditioning"]), leaves(trained["conditioning"])))
    by_file = with_lora(model, params, home / "lora_text" / FILE, 1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), by_file, trained)
    again = shutil.copytree(home / "lora_text", home / "lora_text_again")
    shutil.rmtree(again / "diffusion" / "4")
    (again / "evaluation.json").unlink()
    assert fine_tune(home, "lora_text_again", *changes) == 0
    jobs.assert_same_training(again, home / "lora_text", stages=("diffusion",))


def test_a_lora_is_added_as_strongly_as_asked(home, lora_run):
    (model, params), file = load(home / "model"), lora_run / FILE
    plain, half, whole = (with_lora(model, params, file, scale)["denoiser"] for scale in (0.0, 0.5, 1.0))
    jax.tree.map(np.testing.assert_array_equal, plain, params["denoiser"])
    assert any((a != b).any() for a, b in zip(leaves(plain), leaves(whole)))
    jax.tree.map(lambda *p: np.testing.assert_allclose((p[0] + p[2]) / 2, p[1], atol=1e-6), plain, half, whole)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--lora=gone.safetensors"], "does not exist"), (["--lora_scale=2"], "1 --lora_scale for 0 --lora")],
)
def test_sample_refuses(flags, expected, home, tmp_path, capsys):
    command = ["sample", f"--model={home / 'model'}", f"--out={tmp_path / 'out'}", "--prompt=low", *flags]
    assert command_line.run(sample.main, command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line


REFUSED = {  # flags -> what the line must say
    "no such model": (["--config.init_from=HOME/gone"], "must be a diffusers folder, with a model_index.json"),
    "a model that is a file": (["--config.init_from=HOME/pictures/0.png"], "must be a diffusers folder"),
    "prompts for a model of none": (["--config.init_from=HOME/unconditional"], "is not conditioned on texts"),
    "a set without captions": (["--config.data.name=plain"], "has no caption, only image"),
    "an unsupported pipeline": (["--config.init_from=HOME/flux"], "FluxPipeline; supported are"),
    "a size that does not halve": (["--config.data.image_size=15"], "needs a multiple of 2"),
    "grey images": (["--config.data.channels=1"], "takes images of 3"),
    "buckets that do not halve": (["--config.data.bucket_step=3"], "it must be a multiple of 2, no more than"),
    "buckets with groups": (
        ["--config.data.bucket_step=4", "--config.data.group_key=label"],
        "group_key must be 'none'",
    ),
    "buckets beyond the size": (["--config.data.bucket_step=32"], "it must be a multiple of 2, no more than"),
    "a size without buckets": (
        ["--config.data.image_size=32", "--config.data.bucket_step=18"],
        "for which config.data.image_size=32 has no bucket; it must be at most half of that",
    ),
    "the text encoder of a model of none": (
        [
            "--config.init_from=HOME/unconditional",
            "--config.diffusion.train_text_encoder=True",
            "--config.sampling.prompts=()",
        ],
        "has no text encoder",
    ),
    "no captions": (["--config.data.caption_key=none"], "config.data.caption_key must name"),
    "no path": (["--config.data.path="], "needs config.data.path"),
    "no images": (["--config.data.path=HOME/model/unet"], "has no image with a caption"),
    "too many captions": (["--config.data.memory_limit_gb=1e-7"], "captions take"),
    "a negative rank": (["--config.lora.rank=-1"], "config.lora.rank is -1; it must be 0 or more"),
    "an alpha of nothing": (["--config.lora.rank=2", "--config.lora.alpha=0.0"], "config.lora.alpha is 0"),
    "LoRA by Muon": (
        ["--config.lora.rank=2", "--config.diffusion.optimizer=muon"],
        "with LoRA or textual inversion it must be adamw",
    ),
    "prompts that are numbers": (["--config.sampling.prompts=(1,2)"], "it must be a tuple of texts"),
    "another stage": (["--config.stages=('autoencoder','diffusion')"], "it must be ('diffusion',)"),
    "a learned variance": (["--config.diffusion.variance=learned"], "it must be fixed"),
    "a sampler that cannot": (["--config.sampling.sampler=plms"], "skip_prk_steps"),
}


@pytest.fixture(scope="module")
def refused_models(home):
    diffusers_folder.write_unconditional(home / "unconditional")
    prepare(home / "pictures", "plain", home / "data")
    flux = shutil.copytree(home / "model", home / "flux")
    index = json.loads((flux / "model_index.json").read_text())
    (flux / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, home, refused_models, capsys):
    changes, expected = REFUSED[case]
    assert fine_tune(home, "refused", *changes) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line
    assert not (home / "refused").exists()


def test_a_model_that_the_hub_does_not_have_is_named_by_its_field(home, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: ["README.md"])
    assert fine_tune(home, "refused", "--config.init_from=org/none") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "config.init_from=org/none, on the hub: there is no model_index.json" in line


@pytest.mark.parametrize(
    ("flag", "needs"),
    [
        ("--config.lora.rank=2", "config.init_from"),
        ("--config.sampling.sampler=own", "config.init_from"),
        ("--config.data.bucket_step=4", "config.init_from"),
        ("--config.sampling.prompts=('a',)", "a text-conditional model"),
        ("--config.diffusion.train_text_encoder=True", "a text-conditional model"),
    ],
)
def test_what_only_fine_tuning_has(flag, needs, tmp_path, capsys):
    command = ["train", "--config=tests/tiny.py", f"--workdir={tmp_path / 'run'}", flag]
    assert command_line.run(train.main, command) == 2
    assert f"that needs {needs}" in capsys.readouterr().err


def test_a_run_whose_model_has_changed_is_refused(home, run, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"init_from": str(tmp_path / "model")}))
    command = ["sample", f"--model={copied}", f"--out={tmp_path / 'out'}", "--prompt=low"]
    assert command_line.run(sample.main, command) == 2
    assert "must be a diffusers folder" in capsys.readouterr().err
    diffusers_folder.write_stable_diffusion(tmp_path / "model", xl=True)
    assert command_line.run(sample.main, command) == 2
    assert "was fine-tuned from another model" in capsys.readouterr().err


def test_evaluate_wants_a_run_of_our_own(run, tmp_path, capsys):
    assert command_line.run(evaluate.main, ["evaluate", f"--model={run}", f"--out={tmp_path / 'out'}"]) == 2
    assert "has no data set to be compared with; set one by --config=FILE" in capsys.readouterr().err
