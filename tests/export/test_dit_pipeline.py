"""Class-conditional DiT to DiTPipeline folders and back; what diffusers does not have is refused in one line."""

import json
import shutil
from dataclasses import replace

import jobs
import numpy as np
import pytest
import random_runs
import tiny

from ldm_jax import command_line, convert, sample
from ldm_jax.errors import InputError
from ldm_jax.export.diffusers_folder import write_diffusers
from ldm_jax.export.dit_pipeline import check
from ldm_jax.export.single_file import write_single_file
from ldm_jax.interop import hub
from ldm_jax.interop.modules import dit_from_config
from ldm_jax.interop.pipelines import PIPELINES
from ldm_jax.interop.weights import read_state_dict, write_safetensors
from ldm_jax.models.conditioning import ClassConditioning, ClassEmbedder
from ldm_jax.models.dit import DiT
from ldm_jax.pipeline.from_run import on_paper
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import apply_denoiser
from ldm_jax.pipeline.scheduler import scheduler_of_run

DIT = {"denoiser": "dit", "dit.patch_size": 2, "dit.hidden_size": 8, "dit.depth": 2, "dit.heads": 2}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder of a DiT with a learned variance, on four classes."""
    changes = DIT | {"diffusion.variance": "learned", "sampling.spacing": "leading"}
    return random_runs.random_run(tmp_path_factory.mktemp("dit") / "run", changes)


@pytest.fixture(scope="module")
def exported(run):
    """The run as a diffusers folder; read it, or copy it."""
    folder = run.parent / "folder"
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={folder}"]) == 0
    return folder


def predictions(where):
    """The network's outputs for two classes and the null condition."""
    model, params = load(where)
    rows = model.conditioning.table()[[0, 3, -1]]
    cond = model.conditioning.encode(params["conditioning"], rows)
    z_t = np.random.default_rng(0).normal(size=(3, *model.latent_shape)).astype(np.float32)
    return apply_denoiser(model, params, z_t, np.array([1, 10, 19]), cond)


def test_the_files_of_a_folder(exported):
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", f"transformer/{WEIGHTS}",
        "vae/config.json", f"vae/{WEIGHTS}",
    }  # fmt: skip
    assert sorted(hub.needed_files(files, PIPELINES["DiTPipeline"])) == sorted(files)
    index = json.loads((exported / "model_index.json").read_text())
    assert (index["_class_name"], index["transformer"]) == ("DiTPipeline", ["diffusers", "DiTTransformer2DModel"])
    assert index["id2label"] == {str(k): name for k, name in enumerate(tiny.CLASS_NAMES)}
    config = json.loads((exported / "transformer" / "config.json").read_text())
    assert (config["num_embeds_ada_norm"], config["out_channels"], config["sample_size"]) == (1000, 4, 4)
    state = read_state_dict(exported / "transformer")
    name = "norm1.emb.class_embedder.embedding_table.weight"
    tables = [np.asarray(state[f"transformer_blocks.{i}.{name}"]) for i in (0, 1)]
    assert tables[0].shape == (1001, 8)
    np.testing.assert_array_equal(*tables)
    np.testing.assert_array_equal(tables[0][4:], np.tile(tables[0][-1], (997, 1)))  # null


def test_there_and_back(run, exported, tmp_path):
    model, before = load(exported)[0], load(run)[0]
    assert (model.class_names, model.image_shape, model.learned_variance) == (tiny.CLASS_NAMES, (8, 8, 1), True)
    assert model.denoiser == before.denoiser and model.concat is None
    np.testing.assert_array_equal(predictions(exported), predictions(run))
    again = tmp_path / "again"
    assert command_line.run(convert.main, ["convert", f"--model={exported}", f"--to={again}", "--dtype=float32"]) == 0
    for name in ("transformer", "vae", "scheduler"):
        for file in (exported / name).iterdir():
            assert (again / name / file.name).read_bytes() == file.read_bytes()
    assert (again / "model_index.json").read_bytes() == (exported / "model_index.json").read_bytes()


def test_the_folder_samples_as_the_run(run, exported, tmp_path):
    images = []
    for model, name in ((run, "one"), (exported, "other")):
        command = ["sample", f"--model={model}", f"--out={tmp_path / name}", "--label=dark,bright", "--num=8"]
        assert command_line.run(sample.main, [*command, "--guidance=2", "--steps=4", "--nosave_trajectory"]) == 0
        images.append(jobs.samples(tmp_path / name)["images"].astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1 and images[0].std() > 10


def test_each_block_may_have_its_own_embedding(exported, tmp_path):
    """Such as diffusers trains them; a new folder has all of them."""
    old = shutil.copytree(exported, tmp_path / "old")
    state = {name: np.asarray(tensor) for name, tensor in read_state_dict(old / "transformer").items()}
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    write_safetensors(old / "transformer" / WEIGHTS, state | {name: state[name] + 1})
    model, params = load(old)
    assert model.denoiser.separate_embeddings and model.conditioning.embedder.tokens == 2
    assert np.abs(predictions(old) - predictions(exported)).max() > 1e-3
    write_diffusers(model, params, tmp_path / "new")
    written = read_state_dict(tmp_path / "new" / "transformer")
    assert written.keys() == state.keys()
    np.testing.assert_array_equal(written[name], state[name] + 1)


def test_older_folders(exported, tmp_path):
    """The general class, with fields that this one lacks, positions among the weights, and no names of classes."""
    old = shutil.copytree(exported, tmp_path / "old")
    config = json.loads((old / "transformer" / "config.json").read_text())
    more = {"_class_name": "Transformer2DModel", "attention_type": "default", "num_vector_embeds": None}
    (old / "transformer" / "config.json").write_text(json.dumps(config | more))
    state = {name: np.asarray(tensor) for name, tensor in read_state_dict(old / "transformer").items()}
    positions = {"pos_embed.pos_embed": np.zeros((1, 4, 8), np.float32)}
    write_safetensors(old / "transformer" / WEIGHTS, state | positions)
    index = json.loads((old / "model_index.json").read_text())
    del index["id2label"]
    (old / "model_index.json").write_text(json.dumps(index))
    assert load(old)[0].class_names == tuple(map(str, range(1000)))
    np.testing.assert_array_equal(predictions(old), predictions(exported))
    assert command_line.run(convert.main, ["convert", f"--model={old}", f"--to={tmp_path / 'new'}"]) == 0


DAMAGE = {  # fields of transformer/config.json; those of model_index.json; the message
    "labels without numbers": ({}, {"id2label": {"cat": "0"}}, "it must have id2label, from 0$"),
    "too many labels": ({"num_embeds_ada_norm": 3}, {}, "size mismatch: .1001, 8. for .4, 8."),
    "another norm": ({"norm_type": "layer_norm"}, {}, 'norm_type="layer_norm" is not supported'),
    "another class": ({"_class_name": "SD3Transformer2DModel"}, {}, "is of no supported model"),
    "patches that do not divide": ({"patch_size": 3}, {}, "patch_size=3 must divide sample_size=4"),
    "a block too many": ({"num_layers": 3}, {}, "missing keys .5.: transformer_blocks.2.norm1.emb"),
    "other channels": ({"in_channels": 3}, {}, "size mismatch"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders(name, exported, tmp_path):
    fields, settings, message = DAMAGE[name]
    folder = shutil.copytree(exported, tmp_path / "model")
    for file, changes in (("transformer/config.json", fields), ("model_index.json", settings)):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_more_labels_than_classes(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    names = {str(k): str(k) for k in range(1001)}
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    with pytest.raises(InputError, match=r"id2label has 1001 classes, but .* num_embeds_ada_norm is 1000"):
        load(folder)


def test_xl_2_has_the_defaults_of_both():
    assert dit_from_config({"_class_name": "DiTTransformer2DModel", "out_channels": 8}) == (DiT(), 1000)


REFUSED = {  # changes of tests/tiny.py; the message
    "norm": ({"dit.norm": "rms"}, "has no config.dit.norm = 'rms'; it must be 'layer'"),
    "qk_norm": ({"dit.qk_norm": "rms"}, "has no config.dit.qk_norm = 'rms'; it must be 'none'"),
    "mlp_ratio": ({"dit.mlp_ratio": 2.0}, "has no config.dit.mlp_ratio = 2.0; it must be 4.0"),
    "concat": ({"concat.type": "inpainting"}, "config.concat.type must be 'none'"),
    "codes": ({"autoencoder.type": "vq"}, "config.autoencoder.type must be 'kl'"),
    "pixels": ({"autoencoder.type": "none"}, "config.autoencoder.type must be 'kl'"),
    "texts": (
        {"stages": ("autoencoder", "clip", "diffusion"), "data.caption_key": "auto", "sampling.sampler": "ddim"},
        "DiTPipeline is conditioned on classes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_diffusers_does_not_have(name, tmp_path):
    changes, message = REFUSED[name]
    model, _ = on_paper(random_runs.random_config(DIT | changes), tiny.CLASS_NAMES)
    with pytest.raises(InputError, match=message):
        write_diffusers(model, {}, tmp_path / "to")
    with pytest.raises(InputError, match="single files are of"):
        write_single_file(model, {}, tmp_path / "to.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_another_size_and_too_many_classes(run):
    model, _ = load(run)
    with pytest.raises(InputError, match="samples latents of the DiT's sample_size, 4x4; this model has 8x8"):
        check(model.at_size((16, 16)))
    many = ClassConditioning(ClassEmbedder(1001, 8))
    with pytest.raises(InputError, match="1,001 classes, which must be at most 1,000"):
        check(replace(model, conditioning=many))


SCHEDULERS = {  # changes of tests/tiny.py -> class, note
    "as it is": ({"sampling.spacing": "leading"}, "DDIMScheduler", ""),
    "unipc": ({"sampling.sampler": "unipc"}, "UniPCMultistepScheduler", ""),
    "uneven": ({}, "DDIMScheduler", "takes 20 // steps"),
    "k-diffusion": ({"sampling.sampler": "heun"}, "DDIMScheduler", "does not scale the initial noise"),
    "learned": (
        {"sampling.sampler": "ddpm", "sampling.variance": "learned", "diffusion.variance": "learned"},
        "DDIMScheduler",
        "leaves the learned variance out",
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_of_a_dit(name):
    changes, class_name, note = SCHEDULERS[name]
    fields, notes = scheduler_of_run(random_runs.random_config(DIT | changes), "DiTPipeline")
    assert fields["_class_name"] == class_name
    assert note in " ".join(notes) and bool(note) == bool(notes)
