"""The page's logic without gradio: from the form's values to samples, previews and files."""

import json
import socket
import threading
from dataclasses import replace
from importlib import util
from pathlib import Path

import diffusers_folder
import jax
import numpy as np
import pytest
import random_runs
from PIL import Image

from ldm_jax import command_line
from ldm_jax.demo import __main__ as demo
from ldm_jax.demo.background import Stopped, reports
from ldm_jax.demo.form import (
    ALL_CLASSES,
    Bounds,
    Form,
    bounds_of,
    class_choices,
    controls_of,
    lora_of,
    recipe_of,
    save_edit,
)
from ldm_jax.demo.loaded_model import LoadedModel, _batch_size
from ldm_jax.demo.previews import fit_linear, linear_decode
from ldm_jax.demo.results import KEPT, Results, as_markdown, captions_of, recipe_text
from ldm_jax.errors import InputError
from ldm_jax.interop.lora import init_lora, save_lora
from ldm_jax.models.conditioning import NoConditioning
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import Origin
from ldm_jax.runtime.xla import CompileClock
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.sampling.recipe import from_json, solving_defaults
from ldm_jax.sampling.sample_images import sample_images

FORM = Form(label=ALL_CLASSES, sampler="ddim", steps=4, guidance=2.0, seed=3, num=4, lora_scale=1.0)
BOUNDS = Bounds(size=16, num=8, steps=20)


@pytest.fixture(scope="module")
def classes():
    """A model of the classes horizontal, vertical, bright, dark, on 8x8 grey pixels, and its parameters."""
    return random_runs.random_model()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text-to-image model, of 16x16 pixels, and its parameters."""
    return load(diffusers_folder.write_stable_diffusion(tmp_path_factory.mktemp("texts") / "model"))


@pytest.fixture(scope="module")
def loaded(classes):
    return LoadedModel(*classes, BOUNDS)


def test_a_form_is_a_recipe(classes):
    model, _ = classes
    recipe = recipe_of(model, FORM._replace(label="bright"), BOUNDS)
    assert (recipe.labels, recipe.num, recipe.seed, recipe.size) == ([2], 4, 3, [8, 8])
    assert recipe.solving == solving_defaults(model, "ddim", 4) and recipe.guidance.scale == 2
    assert recipe_of(model, FORM, BOUNDS).labels == [0, 1, 2, 3]


def test_classes_of_one_name_are_chosen_by_their_number():
    names = ("crane", "crab", "crane", ALL_CLASSES)
    model, _ = random_runs.random_model(class_names=names)
    choices = class_choices(names)
    assert [*choices] == ["crane (0)", "crab", "crane (2)", f"{ALL_CLASSES} (3)"]
    for choice, index in choices.items():
        assert recipe_of(model, FORM._replace(label=choice), BOUNDS).labels == [index]
    assert recipe_of(model, FORM, BOUNDS).labels == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "concat", [{"concat.type": "inpainting"}, {"concat.type": "low_resolution", "concat.factor": 2}]
)
def test_a_class_without_an_image_is_refused_of_a_model_that_restores_images(concat, tmp_path):
    """Its samples are of test images, which have their own classes."""
    model, _ = random_runs.random_model(concat)
    assert recipe_of(model, FORM, BOUNDS).concat.split == "test"
    with pytest.raises(InputError, match=r"^Class: bright: without an image this model restores test images, which"):
        recipe_of(model, FORM._replace(label="bright"), BOUNDS)
    image = Image.new("L", (8, 8), 255)
    image.save(tmp_path / "a.png")
    files = {"image": str(tmp_path / "a.png")} | (
        {} if "concat.factor" in concat else {"mask": str(tmp_path / "a.png")}
    )
    assert recipe_of(model, FORM._replace(label="bright", **files), BOUNDS).labels == [2]


def test_prompts_are_lines(texts):
    form = FORM._replace(prompt=" low \n\nlower --steps=9\n", negative_prompt="new", num=1)
    recipe = recipe_of(texts[0], form, Bounds(32, 8))
    assert recipe.prompts == ["low", "lower --steps=9"] and recipe.num == 2  # an image of each prompt
    assert recipe.guidance.negative_prompt == "new" and recipe.solving.steps == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "Steps is 0; it must be a whole number from 1 to 20"),
        ({"steps": 2.5}, "Steps is 2.5"),
        ({"steps": None}, "Steps is empty"),
        ({"steps": "many"}, "Steps is many"),
        ({"num": 9}, "Images is 9; it must be a whole number from 1 to 8"),
        ({"seed": -1}, "Seed is -1; it must be a whole number from 0 to 4294967295"),
        ({"guidance": float("nan")}, "Guidance is nan; it must be a number from 0 to 30"),
        ({"guidance": float("inf")}, "Guidance is inf"),
        ({"sampler": "magic"}, "there is no sampler 'magic'"),
        ({"label": "shoe"}, "Class: shoe is no class; the model has 0 horizontal, 1 vertical, 2 bright, 3 dark"),
        ({"height": 7, "width": 8}, "Height: 7 must be a multiple of 2"),
        ({"height": 64, "width": 8}, "Height is 64; it must be a whole number from 1 to 16"),
        ({"mask": "mask.png"}, "there is paint, but no image below it"),
        ({"image": "/tmp/nowhere/photo.png", "strength": 0.5}, "Image: photo.png: No such file"),
        ({"image": "photo.png", "strength": 0}, "Strength is 0; it must be a number from 0.01 to 1"),
    ],
)
def test_wrong_values_are_refused_in_words(loaded, changes, message):
    with pytest.raises(InputError) as error:
        loaded.sample(FORM._replace(**changes), print)
    assert message in str(error.value) and "--" not in str(error.value) and "\n" not in str(error.value)


def test_a_text_model_needs_a_prompt_and_no_more_than_there_is_room_for(texts):
    for prompt, message in ((" \n", "the prompt is empty"), ("a\nb\nc", "there are 3 prompts, one a line")):
        with pytest.raises(InputError, match=message):
            recipe_of(texts[0], FORM._replace(prompt=prompt, num=1, sampler="ddim"), Bounds(16, 2))


def test_bounds(classes):
    model, _ = classes
    assert bounds_of(model, None, 9) == Bounds(size=16, num=9, steps=20)  # the model has 20 timesteps
    assert bounds_of(model, 8, 9).size == 8
    with pytest.raises(InputError, match="--max_size=7 is less than"):
        bounds_of(model, 7, 9)


def test_the_controls_are_those_of_the_model(classes, texts, tmp_path):
    controls = controls_of(classes[0])
    assert controls.class_names and controls.guided and controls.paint and not controls.texts
    assert "ddim" in controls.samplers and controls.size_step == 2
    controls = controls_of(texts[0])
    assert controls.texts and controls.size_step == 2
    inpaints = load(diffusers_folder.write_stable_diffusion(tmp_path / "inpaint", inpainting=True))[0]
    controls = controls_of(inpaints)
    assert (controls.image, controls.needs_image, controls.paint, controls.strength) == (
        "init_image",
        True,
        True,
        False,
    )
    upscales = load(diffusers_folder.write_stable_diffusion(tmp_path / "upscale", upscaling=True))[0]
    controls = controls_of(upscales)
    assert (controls.image, controls.needs_image, controls.paint, controls.size_step) == (
        "concat_image",
        True,
        False,
        0,
    )
    form = FORM._replace(prompt="low", sampler=controls.samplers[0])
    with pytest.raises(InputError, match=r"^this model needs an image$"):
        recipe_of(upscales, form, Bounds(64, 4))
    Image.new("RGB", (24, 24)).save(tmp_path / "small.png")
    with pytest.raises(InputError, match="the samples would be 96x96; here a side has at most 64 pixels"):
        recipe_of(upscales, form._replace(image=str(tmp_path / "small.png")), Bounds(64, 4))


def test_a_model_without_conditions_has_the_guidance_of_its_own_checkpoint(classes):
    model = replace(classes[0], conditioning=NoConditioning(), origin=Origin(step=3))
    assert not controls_of(model).guided
    assert recipe_of(model, FORM._replace(guidance=None), BOUNDS).guidance.guide_model is None
    model = replace(model, defaults=model.defaults._replace(guide_step=1))
    assert controls_of(model).guided
    guidance = recipe_of(model, FORM, BOUNDS).guidance
    assert (guidance.scale, guidance.guide_model) == (2, "@1")


def test_the_painted_part_of_an_image_is_the_mask(classes, tmp_path):
    image, layer = Image.new("RGBA", (8, 8), (9, 9, 9, 255)), Image.new("RGBA", (8, 8))
    assert set(save_edit(tmp_path, image, [layer])) == {"image"}  # nothing is painted
    layer.putpixel((5, 2), (255, 0, 90, 255))
    files = save_edit(tmp_path, image, [layer])
    mask = np.asarray(Image.open(files["mask"]))
    assert mask[2, 5] == 255 and mask.sum() == 255 and Image.open(files["image"]).mode == "RGB"
    recipe = recipe_of(classes[0], FORM._replace(**files, strength=0.5), BOUNDS)
    assert (recipe.edit.init_image, recipe.edit.mask, recipe.edit.strength) == (files["image"], files["mask"], 0.5)
    assert save_edit(tmp_path, None, []) == {}


def test_the_samples_are_those_of_the_recipe_and_are_previewed(classes, loaded):
    model, params = classes
    seen = []
    samples, warnings = loaded.sample(FORM._replace(num=6), seen.append)
    recipe = from_json(samples.recipe, "")
    expected = sample_images(model, params, recipe, batch_size=6)
    np.testing.assert_allclose(samples.images.astype(int), expected.images.astype(int), atol=1)
    assert samples.recipe == expected.recipe and warnings == []
    assert [preview.fraction for preview in seen] == sorted(preview.fraction for preview in seen)
    assert seen[-1].fraction == 1 and seen[-1].images.shape == samples.images.shape
    assert captions_of(model, samples)[:5] == ["horizontal", "vertical", "bright", "dark", "horizontal"]


def test_an_edit_keeps_what_is_not_painted(classes, loaded, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    layer = np.zeros((8, 8, 4), np.uint8)
    layer[:, 4:] = 255
    files = save_edit(tmp_path, Image.fromarray(image), [Image.fromarray(layer)])
    images = loaded.sample(FORM._replace(**files, strength=1.0), lambda _: None)[0].images
    assert (images[:, :, :4, 0] == image[:, :4]).all() and (images[:, :, 4:, 0] != image[:, 4:]).any()


def test_no_slider_but_those_of_number_and_size_compiles_anything(loaded):
    loaded.sample(FORM, lambda _: None)
    clock = CompileClock()
    for changes in ({"seed": 9}, {"steps": 7}, {"guidance": 0.5}, {"sampler": "unipc"}, {"label": "dark"}):
        loaded.sample(FORM._replace(**changes), lambda _: None)
    assert clock.count == 0


@pytest.mark.parametrize(
    ("num", "most", "expected"), [(1, 64, 1), (3, 64, 2), (4, 1, 1), (5, 64, 2), (9, 64, 4), (16, 64, 16), (16, 4, 4)]
)
def test_few_batch_sizes_are_compiled_and_hardly_padded(num, most, expected):
    assert _batch_size(num, most) == expected


def test_warnings_come_with_the_samples(texts):
    """In the words of the page, and of its own run alone."""
    loaded = LoadedModel(*texts, Bounds(32, 4))
    form = FORM._replace(prompt="low (red:1.2)", num=1, guidance=0.5)
    _, (guidance, weights, truncated) = loaded.sample(form, lambda _: None)
    assert guidance.startswith("warning: a guidance scale of 0.5 means, as in diffusers, no guidance")
    assert "--" not in guidance
    assert weights.startswith("note: (red:1.2) is part of the text")
    assert truncated.startswith("warning: 1 of the prompts are longer than the text encoder's context")
    assert loaded.sample(form._replace(prompt="low", guidance=2.0), lambda _: None)[1] == []


@pytest.mark.parametrize(("warning", "shown"), [
    ("warning: a scale of 0.5 means, none", "Warning: a scale of 0.5 means, none"),
    ("note: (red:1.2) <b> *x* `y`", "Note: \\(red:1.2\\) \\<b\\> \\*x\\* \\`y\\`"),
])  # fmt: skip
def test_warnings_as_markdown(warning, shown):
    assert as_markdown(warning) == shown


def test_a_lora_is_added_once_and_named_in_the_recipe(texts, tmp_path):
    model, params = texts
    lora = init_lora(jax.random.key(0), params["denoiser"], 2)
    lora = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, lora)
    save_lora(tmp_path / "style.safetensors", lora, 1.0)
    loaded = LoadedModel(model, params, Bounds(32, 4))
    form = FORM._replace(prompt="low", sampler="ddim", num=1)
    plain, _ = loaded.sample(form, lambda _: None)
    form = form._replace(lora=str(tmp_path / "style.safetensors"), lora_scale=0.5)
    added = [loaded.sample(form, lambda _: None)[0] for _ in range(2)]
    assert loaded._with_lora.cache_info().hits == 1
    assert (added[0].images != plain.images).any() and (added[0].images == added[1].images).all()
    assert added[0].recipe["lora"] == {"file": "style.safetensors", "scale": 0.5}
    assert added[0].recipe["model"] != plain.recipe["model"]
    assert lora_of(form._replace(lora_scale=0)) is None
    (tmp_path / "other.safetensors").write_bytes(b"none")
    with pytest.raises(InputError, match=r"other.safetensors") as error:
        loaded.sample(form._replace(lora=str(tmp_path / "other.safetensors")), lambda _: None)
    assert str(tmp_path) not in str(error.value)


def test_a_run_that_is_stopped_leaves_the_model_free(loaded):
    stop = threading.Event()
    run = reports(lambda report: loaded.sample(FORM._replace(steps=20), report), stop)
    assert next(run)[0] == "report"
    stop.set()
    with pytest.raises(Stopped):
        list(run)
    assert len(loaded.sample(FORM, lambda _: None)[0].images) == 4


def test_reports_end_with_the_result_or_the_error():
    def work(report):
        report(1)
        return 2

    assert [*reports(work, threading.Event())][-1] == ("done", 2)
    with pytest.raises(ZeroDivisionError):
        [*reports(lambda report: 1 / 0, threading.Event())]


def test_results_are_found_again_by_their_names_alone(loaded, classes, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm_jax.demo.results.KEPT", 2)
    results, samples = Results(tmp_path), loaded.sample(FORM, lambda _: None)[0]
    folders = [results.new()]
    result = results.save(folders[0], samples, captions_of(classes[0], samples), "4 images")
    assert results.read(folders[0].name) == result and [caption for _, caption in result.images][1] == "vertical"
    assert read_recipe(Path(result.grid)) == samples.recipe == json.loads(recipe_text(result.recipe))
    for name in (None, "", "..", "../results", folders[0].name[:-1], "0" * 32, 7):
        assert results.read(name) is None
    folders += [results.new() for _ in range(3)]
    assert len([*tmp_path.iterdir()]) == 2 < KEPT and results.read(folders[0].name) is None


def test_the_linear_preview_is_the_decoder_if_that_is_linear():
    weights = np.random.default_rng(1).uniform(-9, 9, (5, 3))
    weights[-1] = 120

    def decode(z):  # constant within each latent's 2x2 pixels
        return linear_decode(weights, z).repeat(2, axis=1).repeat(2, axis=2)

    fitted = fit_linear(decode, (6, 10, 4))
    np.testing.assert_allclose(fitted, weights, atol=0.2)  # rounded to levels of 255


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "gradio" else util.find_spec(name))
    assert command_line.run(demo.main, ["demo", "--model=anything"]) == 2
    assert capsys.readouterr().err == ("demo: the page needs gradio: pip install gradio\n")


def test_a_port_that_is_in_use_is_refused_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        assert command_line.run(demo.main, ["demo", "--model=anything", f"--port={port}"]) == 2
    assert f"--port={port} cannot be listened on: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--port=0", "port"),
        ("--password=", "--password is empty"),
        ("--dtype=int8", "--dtype"),
        ("--nonsense=1", "no flag"),
    ],
)
def test_wrong_flags_of_the_command_are_refused(argument, message, capsys):
    assert command_line.run(demo.main, ["demo", "--model=anything", argument]) == 2
    assert message in capsys.readouterr().err
