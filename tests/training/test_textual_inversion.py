"""Textual inversion by the train command: what is trained, written, sampled and exported, and what is refused."""

import shutil

import diffusers_folder
import jax
import jobs
import numpy as np
import pytest
from finetuning import fine_tune, fine_tune_and_kill, write_pictures
from safetensors.numpy import load_file

from configs import textual_inversion as textual_inversion_config
from ldm_jax import command_line, convert, sample, train
from ldm_jax.data.prompt_templates import TEMPLATES
from ldm_jax.interop.textual_inversion import FILE, read_embedding
from ldm_jax.pipeline.load import load, load_base
from ldm_jax.pipeline.model import fingerprint
from ldm_jax.pipeline.textual_inversion import with_embedding
from ldm_jax.pipeline.trainable import TokenVectors, merge_trained, token_table, trainable_of
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.runtime.files import read_json
from ldm_jax.sampling.image_grids import read_recipe

TOKEN = "<x>"
INVERSION = (
    "--config=configs/textual_inversion.py",
    "--config.data.path=HOME/plain",
    f"--config.textual_inversion.token={TOKEN}",
    "--config.textual_inversion.init_word=low",
    "--config.sampling.prompts=()",
    "--config.checkpoint_every=2",
)
TWO = (*INVERSION, "--config.textual_inversion.vectors=2", "--config.sampling.progress_every=4")
XL = (*INVERSION, "--config.init_from=HOME/xl", "--config.sampling.num=0")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with models, images with captions and plain ones, and runs."""
    home = tmp_path_factory.mktemp("inversion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers_folder, "LENGTH", 48)  # the prompts have a token for nearly each letter
        diffusers_folder.write_stable_diffusion(home / "model")
        diffusers_folder.write_stable_diffusion(home / "xl", xl=True)
    write_pictures(home / "pictures")
    shutil.copytree(home / "pictures", home / "plain", ignore=shutil.ignore_patterns("*.txt"))
    return home


@pytest.fixture(scope="module")
def run(home):
    """The run folder of a whole small job, of a token of two vectors."""
    assert fine_tune(home, "run", *TWO) == 0
    return home / "run"


@pytest.fixture(scope="module")
def xl_run(home):
    """Of a model of two text encoders, without samples."""
    assert fine_tune(home, "xl_run", *XL) == 0
    return home / "xl_run"


def tables(params):
    return [np.asarray(token_table(tree)) for tree in params["conditioning"]]


def test_the_vectors_begin_as_that_of_the_word(home):
    config = textual_inversion_config.get_config().unlock()
    config.init_from, config.data.image_size = str(home / "xl"), 16
    config.textual_inversion.update(token=TOKEN, init_word="low", vectors=3)
    (model, params), config = load_base(config.lock())
    _, before = load(home / "xl")
    for table, old, tokenizer in zip(tables(params), tables(before), model.conditioning.tokenizers):
        (row,) = tokenizer.ids_of("low")
        np.testing.assert_array_equal(table, np.concatenate([old, old[[row, row, row]]]))
    trainable = trainable_of(config, model)
    trained = trainable.init(jax.random.key(0), params)
    assert trainable == TokenVectors(3) and [v.shape for v in trained["token"]] == [(3, 16)] * 2
    jax.tree.map(np.testing.assert_array_equal, merge_trained(trainable, params, trained), params)


@pytest.mark.parametrize("name", ["run", pytest.param("xl_run", marks=pytest.mark.slow)])
def test_the_vectors_alone_are_trained(name, home, request):
    """The rest is that of the model to the bit, and has no moments of the optimizer."""
    folder, base = request.getfixturevalue(name), home / {"run": "model", "xl_run": "xl"}[name]
    (_, params), (_, before) = load(folder), load(base)
    num = 2 if name == "run" else 1
    for table, old in zip(tables(params), tables(before)):
        np.testing.assert_array_equal(table[:-num], old)
        assert table.shape == (len(old) + num, 16)
    for tree in (*params["conditioning"], *before["conditioning"]):
        tree["embeddings"].pop("token_embedding")
    jax.tree.map(np.testing.assert_array_equal, params, before)
    shapes = {key: array.shape for key, array in load_latest(folder / "diffusion").items() if array.ndim}
    assert set(shapes.values()) == {(num, 16)} and len(shapes) == 4 * len(params["conditioning"])


def test_each_vector_moves_from_where_it_began(home, run):
    vectors, (_, before) = read_embedding(run / FILE).vectors[0], load(home / "model")
    start = tables(before)[0][load(run)[0].conditioning.tokenizers[0].ids_of("low")[0]]
    assert vectors.shape == (2, 16) and (np.abs(vectors - start).max(-1) > 1e-4).all()
    assert (vectors[0] != vectors[1]).any()


def test_the_prompts_of_images_without_captions(run):
    """Every template is one that training takes; the samples are of the first, with the token."""
    (class_name,) = read_json(run / "data.json")["class_names"]
    assert class_name == f"a photo of a {TOKEN}" == TEMPLATES["object"][0].format(TOKEN)
    assert read_recipe(run / "samples.png")["prompts"] == [class_name]
    assert (run / "progress" / "diffusion_000004.png").is_file() and (run / "report.html").is_file()
    for templates in TEMPLATES.values():
        assert len(set(templates)) == len(templates) and all(template.count("{}") == 1 for template in templates)


@pytest.mark.parametrize("name", ["run", pytest.param("xl_run", marks=pytest.mark.slow)])
def test_the_file_makes_of_the_model_what_the_run_is(name, home, request):
    folder, base = request.getfixturevalue(name), home / {"run": "model", "xl_run": "xl"}[name]
    names = {"run": {TOKEN}, "xl_run": {"clip_l", "clip_g"}}[name]
    assert load_file(folder / FILE).keys() == names
    model, params, token = with_embedding(*load(base), folder / FILE)
    trained_model, trained = load(folder)
    assert token == TOKEN and model.conditioning.encoders == trained_model.conditioning.encoders
    jax.tree.map(np.testing.assert_array_equal, params, trained)


def sampled(out, *flags):
    command = ["sample", f"--out={out}", f"--prompt=low {TOKEN}", "--prompt=wool", "--steps=2", "--seed=1", *flags]
    assert command_line.run(sample.main, command) == 0
    return jobs.samples(out)["images"]


@pytest.mark.slow
def test_the_run_its_file_and_its_export_make_the_same_images(home, run, tmp_path):
    command = ["convert", f"--model={run}", f"--to={tmp_path / 'folder'}"]
    assert command_line.run(convert.main, command) == 0
    model, params = load(tmp_path / "folder")
    assert fingerprint(model, params) == fingerprint(*load(run))
    of_run = sampled(tmp_path / "1", f"--model={run}", "--sampler=ddim", "--guidance=7.5")
    options = ("--sampler=ddim", "--guidance=7.5")
    np.testing.assert_array_equal(sampled(tmp_path / "2", f"--model={tmp_path / 'folder'}", *options), of_run)
    by_file = sampled(tmp_path / "3", f"--model={home / 'model'}", f"--embedding={run / FILE}", *options)
    np.testing.assert_array_equal(by_file, of_run)
    again = ["convert", f"--model={tmp_path / 'folder'}", f"--to={tmp_path / 'again'}"]
    assert command_line.run(convert.main, again) == 0
    ids = [load(where)[0].conditioning.tokenizers[0]([f"a {TOKEN}"]).ids for where in (run, tmp_path / "again")]
    np.testing.assert_array_equal(*ids)


def test_no_single_file_is_made_of_it(run, tmp_path, capsys):
    command = ["convert", f"--model={run}", f"--to={tmp_path / 'file.safetensors'}"]
    assert command_line.run(convert.main, command) == 2
    assert f"no tokens beyond CLIP's vocabulary, and this one has {TOKEN}; choose" in capsys.readouterr().err
    assert not (tmp_path / "file.safetensors").exists()


def test_the_same_command_again_says_that_all_is_done(home, run, capsys):
    assert fine_tune(home, "run", *TWO) == 0
    assert "All is done" in capsys.readouterr().out


@pytest.mark.slow
def test_resumed_it_ends_as_one_that_was_left_alone(home, xl_run):
    again = shutil.copytree(xl_run, home / "xl_again")
    shutil.rmtree(again / "diffusion" / "4")
    (again / "evaluation.json").unlink()
    (again / FILE).unlink()
    assert fine_tune(home, "xl_again", *XL) == 0
    jobs.assert_same_training(again, xl_run, stages=("diffusion",))
    assert jobs.losses(again) == jobs.losses(xl_run)
    assert (again / FILE).read_bytes() == (xl_run / FILE).read_bytes()


@pytest.mark.slow
def test_killed_and_resumed_it_ends_as_one_that_was_left_alone(home, xl_run):
    fine_tune_and_kill(home, "killed", *XL)
    assert fine_tune(home, "killed", *XL) == 0
    jobs.assert_same_training(home / "killed", xl_run, stages=("diffusion",))
    assert jobs.losses(home / "killed") == jobs.losses(xl_run)
    assert (home / "killed" / FILE).read_bytes() == (xl_run / FILE).read_bytes()


def captioned(home, name, captions):
    """The plain images, the first of them with captions."""
    folder = shutil.copytree(home / "plain", home / name)
    for i, caption in enumerate(captions):
        (folder / f"{i}.txt").write_text(caption)
    return f"--config.data.path={folder}"


@pytest.mark.slow
def test_captions_with_the_token_are_those_of_their_images(home):
    """The others have the prompts, here of a style."""
    changes = [*INVERSION, captioned(home, "captioned", [f"low {TOKEN}", f"lower {TOKEN}"]), "--config.sampling.num=3"]
    changes += ["--config.textual_inversion.learnable_property=style"]
    assert fine_tune(home, "captioned_run", *changes) == 0
    prompts = {TEMPLATES["style"][0].format(TOKEN), f"low {TOKEN}", f"lower {TOKEN}"}
    assert set(read_json(home / "captioned_run" / "data.json")["class_names"]) == prompts
    assert set(read_recipe(home / "captioned_run" / "samples.png")["prompts"]) == prompts


REFUSED = {  # flags -> what the line must say
    "a token of spaces": (["token=a b"], "token is 'a b'; it must be one word, without spaces"),
    "a word of the vocabulary": (["token=low"], "a word of the vocabulary of config.init_from="),
    "a special token": (["token=<|endoftext|>"], "a word of the vocabulary of"),
    "a word of several tokens": (["init_word=object"], "init_word is 'object', which is 6 tokens of the vocabulary"),
    "no word": (["init_word="], "init_word is ''; it must be one word"),
    "no vectors": (["vectors=0"], "textual_inversion.vectors is 0; it must be 1 or more"),
    "another property": (["learnable_property=face"], "must be one of object, style"),
    "no token": (["token="], "with config.data.name = 'concept' it must be a new word"),
    "LoRA": (["--config.lora.rank=2"], "config.lora.rank is 2; with config.textual_inversion.token"),
    "the text encoder": (["--config.diffusion.train_text_encoder=True"], "it must be False"),
    "no text encoder": (["--config.init_from=HOME/unconditional"], "which has no text encoder"),
    "captions without the token": (
        ["--config.data.path=HOME/pictures"],
        "is '<x>'; 4 captions of concept lack it, e.g. 'low'; each must contain it",
    ),
    "no images": (["--config.data.path=HOME/model/unet"], "has no image that can be read: left out are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, home, capsys):
    changes, expected = REFUSED[case]
    if case == "no text encoder" and not (home / "unconditional").exists():
        diffusers_folder.write_unconditional(home / "unconditional")
    changes = [change if change.startswith("--") else f"--config.textual_inversion.{change}" for change in changes]
    assert fine_tune(home, "refused", *INVERSION, *changes) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line
    assert not (home / "refused").exists()


def test_it_is_for_pretrained_models(tmp_path, capsys):
    command = [
        "train",
        "--config=tests/tiny.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.textual_inversion.token=<x>",
    ]
    assert command_line.run(train.main, command) == 2
    assert "config.textual_inversion.token is '<x>'; that needs config.init_from" in capsys.readouterr().err


def test_a_text_to_image_run_of_our_own(text_run, home, tmp_path):
    """Its export has the scale of the latents in its autoencoder, as that of the run itself."""
    size = [f"--config.data.{field}" for field in ("image_size=8", "channels=1")]
    changes = [*INVERSION, *size, f"--config.init_from={text_run}", "--config.textual_inversion.init_word=a"]
    assert fine_tune(home, "own_run", *changes) == 0
    (model, params), (before, old) = load(home / "own_run"), load(text_run)
    assert model.prediction == before.prediction and model.process == before.process
    ((table,), (base_table,), (tokenizer,)) = tables(params), tables(old), before.conditioning.tokenizers
    (row,) = tokenizer.ids_of("a")
    np.testing.assert_array_equal(table[:-1], base_table[: len(table) - 1])
    assert model.conditioning.tokenizers[0].ids_of(TOKEN) == [len(table) - 1] == [tokenizer.vocab_size]
    assert np.abs(table[-1] - base_table[row]).max() > 1e-4
    for name in ("denoiser", "first_stage", "shift", "scale"):
        jax.tree.map(np.testing.assert_array_equal, params[name], old[name])
    command = ["convert", f"--model={home / 'own_run'}", f"--to={tmp_path / 'folder'}"]
    assert command_line.run(convert.main, command) == 0
    options = ("--guidance=2", "--sampler=ddim")
    of_run = sampled(tmp_path / "1", f"--model={home / 'own_run'}", *options).astype(int)
    of_export = sampled(tmp_path / "2", f"--model={tmp_path / 'folder'}", *options).astype(int)
    assert np.abs(of_run - of_export).max() <= 1
