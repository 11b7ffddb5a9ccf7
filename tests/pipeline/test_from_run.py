"""A text-to-image run with a CLIP of its own: its files and scores, sampling, export, resuming."""

import shutil

import jax
import jobs
import numpy as np
import pytest
import tiny

from ldm_jax import command_line, convert, evaluate, sample
from ldm_jax.errors import InputError
from ldm_jax.pipeline.clip import load_clip
from ldm_jax.pipeline.load import load
from ldm_jax.runtime.files import read_json
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.training import clip_data


@pytest.fixture
def run(text_run):
    return text_run


def test_a_run_leaves_what_other_runs_leave(run):
    for name in ("report.html", "samples.png", "evaluation.json", "clip/tokenizer/vocab.json"):
        assert (run / name).is_file()
    assert len(jobs.samples(run)["images"]) == 8


def test_a_run_scores_its_clip_and_its_samples(run):
    cards = read_json(run / "evaluation.json")
    assert {"text_to_image_recall@1", "image_to_text_recall@1", "zero_shot"} <= cards["clip"].keys()
    assert cards["clip"]["zero_shot"]["n"] == 16
    for split in ("train", "test"):
        assert 0 <= cards["prompts"][f"clip_score_{split}"]["value"] <= 100
        assert 0 <= cards["prompts"][f"r_precision_{split}"]["floor"] <= 1
    (card,) = cards["model"].values()
    assert np.isfinite(card["value"]) and "given the caption" in card["method"]
    for name in ("training", "held_out", "guidance"):
        assert (run / "prompts" / f"{name}.png").is_file()


def test_the_vocabulary_covers_the_captions(run):
    trained = load_clip(run)
    assert not trained.tokenizer(["horizontal", "a dark picture"]).truncated.any()
    assert trained.clip.text.vocab_size == trained.tokenizer.vocab_size


@pytest.mark.parametrize("left", [None, "vocab.json"])
def test_a_vocabulary_is_copied_to_the_run(run, left, tmp_path):
    """Also where a run was killed while it was written."""
    config, folder = load(run)[0].origin.config.copy_and_resolve_references().unlock(), tmp_path / "tokenizer"
    config.clip.tokenizer = str(run / "clip" / "tokenizer")
    if left:
        folder.mkdir()
        (folder / left).write_text("{")
    tokenizer = clip_data.make_tokenizer(config, folder, None)
    texts, known = ["horizontal", "a dark picture", "zebra"], load_clip(run).tokenizer
    np.testing.assert_array_equal(tokenizer(texts).ids, known(texts).ids)
    config.clip.tokenizer = "nowhere"
    np.testing.assert_array_equal(clip_data.make_tokenizer(config, folder, None)(texts).ids, known(texts).ids)


def test_samples_are_those_of_their_prompts(run, four_devices, tmp_path):
    """In the order of the prompts, and one alone as among others: on four devices one sample each, to the bit.

    Hardly trained, the UNet attends but little: hence the guidance.
    """

    def sampled(name, *flags):
        out = tmp_path / name
        command = ["sample", f"--model={run}", f"--out={out}", "--steps=3", "--guidance=1e5", "--batch_size=4", *flags]
        assert command_line.run(sample.main, command) == 0
        return jobs.samples(out)["images"]

    both = sampled("both", "--prompt=dark", "--prompt=bright", "--num=4")
    assert both.shape == (4, 8, 8, 1)
    np.testing.assert_array_equal(sampled("one", "--prompt=dark", "--num=1"), both[:1])
    away = sampled("away", "--prompt=dark", "--negative_prompt=bright", "--num=1")
    assert (away != both[:1]).any()


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_bits(run, tiny_data, tmp_path):
    """From the diffusion model's first checkpoint; the rest is there already."""
    again = shutil.copytree(run, tmp_path / "again")
    for name in ("diffusion/8", "samples.png", "evaluation.json", "prompts"):
        shutil.rmtree(again / name) if (again / name).is_dir() else (again / name).unlink()
    assert jobs.train_here(tiny_data, again, *jobs.TEXTS) == 0
    jobs.assert_same_training(again, run, stages=("diffusion",))
    np.testing.assert_array_equal(jobs.samples(again)["images"], jobs.samples(run)["images"])
    assert (again / "prompts" / "held_out.png").read_bytes() == (run / "prompts" / "held_out.png").read_bytes()


def test_the_diffusers_folder_of_a_run_samples_the_same(run, tmp_path):
    """Shift and scale of the latents are folded into the autoencoder there, so up to rounding."""
    out = tmp_path / "folder"
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={out}"]) == 0
    index = read_json(out / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    images = []
    for model in (run, out):
        flags = ["--prompt=dark", "--num=2", "--sampler=ddim", "--steps=4", "--guidance=2", "--batch_size=4"]
        command = ["sample", f"--model={model}", f"--out={tmp_path / model.name}_out", *flags]
        assert command_line.run(sample.main, command) == 0
        images.append(jobs.samples(tmp_path / f"{model.name}_out")["images"].astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.slow
def test_the_text_encoder_may_be_trained(run, tiny_data, tmp_path):
    along = tmp_path / "along"
    changes = (*jobs.TEXTS, f"--config.clip.checkpoint={run}", f"--config.autoencoder.checkpoint={run}")
    changes += ("--config.diffusion.train_text_encoder=True", "--config.sampling.num=0")
    assert jobs.train_here(tiny_data, along, *changes) == 0
    before, after = (load(folder)[1]["conditioning"][0] for folder in (run, along))
    moved = [np.abs(np.asarray(a) - b).max() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after))]
    assert max(moved) > 1e-4


def test_prompts_from_a_file(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("dark\n\n  a bright picture \n", encoding="utf-8-sig")
    command = ["sample", f"--model={run}", f"--out={tmp_path / 'out'}", f"--prompt_file={tmp_path / 'prompts.txt'}"]
    assert command_line.run(sample.main, [*command, "--steps=3", "--batch_size=4"]) == 0
    recipe = read_recipe(tmp_path / "out" / "samples.png")
    assert (recipe["prompts"], recipe["num"]) == (["dark", "a bright picture"], 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read: No such file"), (b"\n \n", "has no prompts"), (b"\xff\xfe\x00", "is not UTF-8 text")],
)
def test_a_file_of_prompts_is_refused(content, said, run, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    command = ["sample", f"--model={run}", f"--out={tmp_path / 'out'}", f"--prompt_file={path}"]
    assert command_line.run(sample.main, command) == 2
    assert said in capsys.readouterr().err
    assert command_line.run(sample.main, [*command, "--prompt=dark"]) == 2
    assert "choose one" in capsys.readouterr().err


def test_an_empty_prompt_and_a_long_one(run, tmp_path, capsys):
    """An empty prompt is the null condition, which guidance does not change. Of a long one the beginning counts."""

    def sampled(name, *flags):
        out = tmp_path / name
        command = ["sample", f"--model={run}", f"--out={out}", "--steps=3", "--batch_size=4", "--num=1", *flags]
        assert command_line.run(sample.main, command) == 0
        return jobs.samples(out)["images"].astype(int)

    nothing = sampled("nothing", "--prompt=", "--guidance=1")
    assert np.abs(sampled("guided", "--prompt=", "--guidance=1e5") - nothing).max() <= 1
    assert "warning" not in capsys.readouterr().err
    words = ["dark"] * load(run)[0].origin.config.clip.max_length
    long = sampled("long", f"--prompt={' '.join(words)}", "--guidance=1e5")
    assert "warning: 1 of the prompts are longer than the text encoder's context" in capsys.readouterr().err
    longer = sampled("longer", f"--prompt={' '.join([*words, 'bright'])}", "--guidance=1e5")
    np.testing.assert_array_equal(longer, long)


def test_evaluate_samples_by_the_captions_of_the_test_split(run, tmp_path, capsys):
    command = ["evaluate", f"--model={run}", f"--out={tmp_path}", "--num=8", "--steps=2", "--batch_size=8"]
    assert command_line.run(evaluate.main, command) == 0
    cards, recipe = read_json(tmp_path / "evaluation.json"), read_recipe(tmp_path / "samples.png")
    assert {"clip_score_test", "r_precision_test"} == cards["prompts"].keys() and cards["samples"]
    assert sorted(recipe["prompts"]) == sorted(tiny.CLASS_NAMES) and len(recipe["labels"]) == 8


def test_prompts_take_turns_in_an_evaluation(run, tmp_path, capsys, monkeypatch):
    """As many samples as without --prompt: a sample of each would be no score."""

    def stop(model, params, recipe, **_):
        raise InputError(f"{recipe.num} samples of {recipe.prompts}")

    monkeypatch.setattr("ldm_jax.sampling.sample_images.sample_images", stop)
    command = ["evaluate", f"--model={run}", f"--out={tmp_path / 'out'}", "--prompt=dark", "--prompt=bright"]
    assert command_line.run(evaluate.main, command) == 2
    assert "10000 samples of ['dark', 'bright']" in capsys.readouterr().err


def test_a_clip_alone(run, tiny_data, tmp_path):
    """Another run's, without a diffusion model; its scores are the same."""
    changes = (*jobs.TEXTS, "--config.stages=('clip',)", f"--config.clip.checkpoint={run}")
    assert jobs.train_here(tiny_data, tmp_path / "run", *changes) == 0
    reused, trained = (load_clip(folder).params for folder in (tmp_path / "run", run))
    jax.tree.map(np.testing.assert_array_equal, reused, trained)
    cards = read_json(tmp_path / "run" / "evaluation.json")
    assert cards["clip"] == read_json(run / "evaluation.json")["clip"] and not cards.keys() & {"samples", "prompts"}
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("--config.data.caption_key=none", "config.data.caption_key must name the feature with the captions"),
        ("--config.unet.context_dim=16", "config.unet.context_dim is 16; it must be config.clip.text_width = 8"),
        ("--config.clip.patch_size=3", "config.clip.patch_size is 3; it must divide config.data.image_size = 8"),
        ("--config.clip.text_heads=3", "config.clip.text_heads is 3; it must divide config.clip.text_width = 8"),
        ("--config.clip.vocab_size=100", "config.clip.vocab_size is 100; it must be 514 or more"),
        ("--config.clip.max_zoom=1.5", "config.clip.max_zoom is 1.5; it must be from 0.0 to 0.99"),
        ("--config.autoencoder.type=vq", "config.autoencoder.type is 'vq'; with 'clip' in config.stages"),
        ("--config.concat.type=inpainting", "config.concat.type is 'inpainting'; with 'clip' in config.stages"),
        ("--config.diffusion.variance=learned", "config.diffusion.variance is 'learned'; with 'clip'"),
        ("--config.sampling.prompts=(1,)", "it must be a tuple of texts"),
        ("--config.sampling.sampler=plms", "a text-to-image model must sample as diffusers does"),
        ("--config.clip.checkpoint=nowhere", "nowhere does not exist"),
        *(
            (f"--config.clip.checkpoint=RUN --config.clip.{field}", f"config.clip.{field.replace('=', ' is ')}; for")
            for field in ("text_heads=4", "image_heads=1", "image_layers=2", "projection_dim=4", "patch_size=2")
        ),
        ("--config.clip.tokenizer=nowhere", "nowhere"),
        ("--config.evaluation.zero_shot_key=nothing", "nothing"),
    ],
)
def test_a_config_is_refused(change, expected, run, tiny_data, tmp_path, capsys):
    changes = change.replace("RUN", str(run)).split()
    assert jobs.train_here(tiny_data, tmp_path / "run", *jobs.TEXTS, *changes) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
