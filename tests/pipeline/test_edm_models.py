"""Models of diffusers' EDM schedulers, Playground v2.5 and CosXL in small: read, sampled, converted, or refused."""

import json
import shutil

import diffusers_folder
import finetuning
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_models import check_edits, check_samplers, refusal
from scheduler_configs import EDM

import ldm_jax
from ldm_jax import command_line, convert, sample
from ldm_jax.models.pixels import to_pixels
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import apply_denoiser, encode_images

MEAN, STD = [-1.6, 1.1, 0.4, 0.0], [8.4, 5.9, 3.5, 5.7]
SCALING = {"playground_2_5": {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5}, "cosxl": {}}
WRITERS = {
    "xl": lambda folder: diffusers_folder.write_stable_diffusion(folder, xl=True),
    "inpainting": lambda folder: diffusers_folder.write_stable_diffusion(folder, inpainting=True),
    "upscaling": lambda folder: diffusers_folder.write_stable_diffusion(folder, upscaling=True),
    "unconditional": diffusers_folder.write_unconditional,
}


def with_fields(path, fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def write_edm(folder, model="playground_2_5", kind="xl", scheduler="scheduler"):
    """A folder of `kind` with the scheduler of a published EDM model, and of "xl" its scaling of latents."""
    WRITERS[kind](folder)
    (folder / scheduler / "scheduler_config.json").write_text(json.dumps(EDM[model]))
    with_fields(folder / "model_index.json", {scheduler: ["diffusers", EDM[model]["_class_name"]]})
    if kind == "xl":
        with_fields(folder / "vae" / "config.json", SCALING[model])
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(published model): made once; to be read or copied."""
    folders = {model: write_edm(tmp_path_factory.mktemp(model) / "model", model) for model in EDM}
    return folders.__getitem__


@pytest.mark.parametrize("name", EDM)
def test_the_denoiser_is_conditioned_on_c_noise(name, folder_of):
    model, params = load(folder_of(name))
    config = EDM[name]
    assert (model.prediction, model.sigma_data) == ({"cosxl": "v"}.get(name, "edm"), config["sigma_data"])
    z, t = jax.random.normal(jax.random.key(0), (3, *model.latent_shape)), jnp.array([0, 500.25, 999])
    sigma = config["sigma_min"] * (config["sigma_max"] / config["sigma_min"]) ** (np.array([0, 500.25, 999]) / 999)
    table, _ = model.conditioning.table(["low", "lower", "wool"], None, (16, 16))
    cond = model.conditioning.encode(params["conditioning"], jax.tree.map(lambda rows: rows[:3], table))
    got = apply_denoiser(model, params, z, t, cond)
    expected = model.denoiser.apply({"params": params["denoiser"]}, z, jnp.asarray(np.log(sigma) / 4), **cond)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(got - model.denoiser.apply({"params": params["denoiser"]}, z, t, **cond)).max() > 0.1


def test_latents_are_divided_by_sigma_data_beyond_the_scaling_of_the_autoencoder(folder_of):
    model, params = load(folder_of("playground_2_5"))
    np.testing.assert_array_equal(params["shift"], np.float32(MEAN))
    np.testing.assert_allclose(params["scale"], 0.5 / np.array(STD) / 0.5, rtol=1e-6)
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    moments = model.first_stage.encode(params["first_stage"], to_pixels(images))
    scaled = (model.first_stage.mode(moments) - np.array(MEAN)) / np.array(STD) * 0.5  # diffusers' latents
    np.testing.assert_allclose(encode_images(model, params, images), scaled / 0.5, atol=1e-5)
    cosxl, its_params = load(folder_of("cosxl"))
    assert cosxl.sigma_data == 1.0
    np.testing.assert_array_equal(its_params["scale"], np.full(4, 0.18215, np.float32))


@pytest.mark.slow
def test_every_sampler_but_those_of_distilled_models(folder_of):
    assert load(folder_of("playground_2_5"))[0].defaults.sampler == "dpmpp_2m"
    check_samplers(folder_of("playground_2_5"), "of an EDM model")


def test_lcm_is_refused_by_the_command(folder_of, capsys):
    command = [f"--model={folder_of('cosxl')}", "--prompt=low", "--sampler=lcm", "--out=none"]
    assert "the sampler lcm is for distilled models; the scheduler EDMEulerScheduler is of an EDM model" in refusal(
        capsys, sample.main, *command
    )


def test_image_to_image_and_inpainting(folder_of, tmp_path):
    check_edits(folder_of("playground_2_5"), tmp_path, weak_error=3)


@pytest.mark.parametrize("name", EDM)
def test_convert_keeps_the_scheduler_and_the_images(name, folder_of, tmp_path):
    folder, to = folder_of(name), tmp_path / "to"
    assert command_line.run(convert.main, ["convert", f"--model={folder}", f"--to={to}"]) == 0
    assert json.loads((to / "scheduler" / "scheduler_config.json").read_text()) == EDM[name]
    index = json.loads((to / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", EDM[name]["_class_name"]]
    vae = json.loads((to / "vae" / "config.json").read_text())
    assert vae["scaling_factor"] == {"playground_2_5": 0.5, "cosxl": 0.18215}[name]
    options = {"prompts": ["low"], "num": 1, "steps": 4}
    images = [ldm_jax.sample(*load(path), **options).astype(int) for path in (folder, to)]
    assert np.abs(images[0] - images[1]).max() <= 1 and images[0].std() > 10
    (model, params), (again, params_again) = load(folder), load(to)
    assert (again.edm, again.process, again.prediction) == (model.edm, model.process, model.prediction)
    picture = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    z, z_again = encode_images(model, params, picture), encode_images(again, params_again, picture)
    np.testing.assert_allclose(z, z_again, atol=1e-4)


def test_another_autoencoder_of_the_same_scaling(folder_of, tmp_path, capsys):
    """Which is compared with the folder's own scaling, not with that of latents over sigma_data."""
    folder = folder_of("playground_2_5")
    same = shutil.copytree(folder / "vae", tmp_path / "same")
    command = [f"--model={folder}", "--prompt=low", "--steps=2", f"--out={tmp_path / 'out'}"]
    assert command_line.run(sample.main, ["sample", *command, f"--vae={same}"]) == 0
    with_fields(same / "config.json", {"scaling_factor": 1.0})
    assert "has other latents than --model: their scale is" in refusal(capsys, sample.main, *command, f"--vae={same}")


@pytest.mark.parametrize("name", EDM)
def test_single_files_are_not_written(name, folder_of, tmp_path, capsys):
    """Whether it predicts v, as some Stable Diffusion does, or not."""
    line = refusal(capsys, convert.main, f"--model={folder_of(name)}", f"--to={tmp_path / 'model.safetensors'}")
    assert line.endswith("single files of EDM models, which do not state their noise schedule, are not written; "
                         "choose a folder")  # fmt: skip
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [[], ["--config.lora.rank=2"]])
def test_fine_tuning_is_refused(changes, folder_of, tmp_path, capsys):
    shutil.copytree(folder_of("cosxl"), tmp_path / "model")
    finetuning.write_pictures(tmp_path / "pictures")
    line = refusal(capsys, ldm_jax.train.main, *finetuning.flags(tmp_path, "run", *changes))
    assert "is an EDM model (Karras 2022), trained at noise levels that no loss here samples" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "kind, scheduler",
    [
        ("inpainting", "scheduler"),
        ("upscaling", "scheduler"),
        ("upscaling", "low_res_scheduler"),
        ("unconditional", "scheduler"),
    ],
)
def test_other_models_with_an_edm_scheduler_are_refused(kind, scheduler, tmp_path, capsys):
    folder = write_edm(tmp_path / "model", "cosxl", kind, scheduler)
    line = refusal(capsys, sample.main, f"--model={folder}", "--out=none", "--sampler=euler")
    assert "has an EDM scheduler; these are for text-to-image models without other inputs" in line
