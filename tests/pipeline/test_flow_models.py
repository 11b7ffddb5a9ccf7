"""Models of diffusers' flow schedulers, and runs on rectified flow: read, sampled, edited, fine-tuned, converted."""

import json
import shutil

import diffusers_folder
import finetuning
import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest
import random_runs
from foreign_models import check_edits, check_samplers, refusal
from scheduler_configs import FLOW

import ldm_jax
from ldm_jax import command_line, convert, sample
from ldm_jax.diffusion.schedules import rectified_flow
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import apply_denoiser

RUN = {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "flow"}


def with_scheduler(folder, config):
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return diffusers_folder.write_stable_diffusion(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def folder_of(plain, tmp_path):
    """folder_of(published model, **changes of its scheduler): a folder with this scheduler."""
    return lambda name, **changes: with_scheduler(shutil.copytree(plain, tmp_path / "model"), FLOW[name] | changes)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_the_denoiser_is_conditioned_on_t_plus_1(name, folder_of):
    model, params = load(folder_of(name))
    assert (model.process, model.prediction, model.time_offset) == (rectified_flow(1000), "flow", 1)
    z, t = jax.random.normal(jax.random.key(0), (2, *model.latent_shape)), jnp.array([998.5, 499])
    cond = {"context": jnp.ones((2, 8, diffusers_folder.WIDTH))}
    got = apply_denoiser(model, params, z, t, cond)
    apply = model.denoiser.apply
    np.testing.assert_array_equal(got, apply({"params": params["denoiser"]}, z, jnp.array([999.5, 500]), **cond))
    assert (got != apply({"params": params["denoiser"]}, z, t, **cond)).any()


@pytest.mark.slow
def test_every_sampler_but_those_of_distilled_models(folder_of):
    check_samplers(folder_of("sd3"), "of a flow model")


def test_what_a_scheduler_is_refused_for(folder_of, capsys):
    command = [f"--model={folder_of('sd3', use_dynamic_shifting=True)}", "--prompt=low", "--out=none"]
    line = refusal(capsys, sample.main, *command)
    assert line.endswith("use_dynamic_shifting = True is not supported; supported: False")


def test_lcm_is_refused(folder_of, capsys):
    line = refusal(capsys, sample.main, f"--model={folder_of('wan')}", "--prompt=a", "--sampler=lcm", "--out=none")
    assert "the sampler lcm is for distilled models; the scheduler UniPCMultistepScheduler is of a flow model" in line


def test_image_to_image_and_inpainting(folder_of, tmp_path):
    check_edits(folder_of("sd3", shift=1.0), tmp_path, weak_error=8)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_convert_keeps_the_scheduler_and_the_images(name, folder_of, tmp_path):
    folder, to = folder_of(name), tmp_path / "to"
    assert command_line.run(convert.main, ["convert", f"--model={folder}", f"--to={to}"]) == 0
    assert json.loads((to / "scheduler" / "scheduler_config.json").read_text()) == FLOW[name]
    images = [ldm_jax.sample(*load(path), prompts=["low"], num=1, steps=4) for path in (folder, to)]
    np.testing.assert_array_equal(*images)
    assert images[0].std() > 10


def test_single_files_are_not_written(folder_of, tmp_path, capsys):
    line = refusal(capsys, convert.main, f"--model={folder_of('sd3')}", f"--to={tmp_path / 'model.safetensors'}")
    assert "single files are of Stable Diffusion 1, 2 and XL" in line


@pytest.mark.slow
def test_fine_tuning_learns_the_slope_at_the_schedulers_timesteps(folder_of, tmp_path):
    """With the model's own sampler, whose spacing is recorded; the run loads again, and its export."""
    folder_of("wan")
    finetuning.write_pictures(tmp_path / "pictures")
    assert finetuning.fine_tune(tmp_path, "run", "--config.sampling.sampler=own") == 0
    assert np.isfinite(list(jobs.losses(tmp_path / "run").values())).all()
    model, params = load(tmp_path / "run")
    assert (model.prediction, model.time_offset, model.defaults.sampler) == ("flow", 1, "unipc")
    assert model.defaults.solver("unipc").options["spacing"] == "flow"
    assert command_line.run(convert.main, ["convert", f"--model={tmp_path}/run", f"--to={tmp_path}/to"]) == 0
    options = {"prompts": ["low"], "num": 1, "steps": 3, "guidance": 2.0}
    np.testing.assert_array_equal(
        *(ldm_jax.sample(*each, **options) for each in ((model, params), load(tmp_path / "to")))
    )


@pytest.mark.parametrize("spacing", ["trailing", "flow"])
def test_a_run_becomes_a_folder_and_is_read_again(spacing, tmp_path):
    """With recipe.json as the run it was; without as diffusers has it: the same images."""
    changes = RUN | {"sampling.spacing": spacing, "sampling.steps": 7}
    made = random_runs.random_run(tmp_path / "run", changes)
    assert command_line.run(convert.main, ["convert", f"--model={made}", f"--to={tmp_path / 'to'}"]) == 0
    index = json.loads((tmp_path / "to" / "model_index.json").read_text())
    assert (index["timestep_offset"], index["timestep_spacing"]) == (-1, None if spacing == "flow" else spacing)
    scheduler = json.loads((tmp_path / "to" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["num_train_timesteps"], scheduler["shift"]) == (
        "FlowMatchEulerDiscreteScheduler", 20, 1.0)  # fmt: skip
    exported = load(tmp_path / "to")
    (tmp_path / "to" / "recipe.json").unlink()
    (model, params), again = load(made), load(tmp_path / "to")
    assert again[0].time_offset == exported[0].time_offset == model.time_offset == 0
    assert again[0].defaults.solver("euler").options["spacing"] == spacing
    images = [
        ldm_jax.sample(*each, labels=[0, 1, 2, 3], sampler="euler") for each in ((model, params), exported, again)
    ]
    assert images[0].std() > 5
    for other in images[1:]:
        assert np.abs(images[0].astype(int) - other).max() <= 1
    assert command_line.run(convert.main, ["convert", f"--model={tmp_path}/to", f"--to={tmp_path}/anew"]) == 0
    assert json.loads((tmp_path / "anew" / "model_index.json").read_text()) == index


@pytest.mark.parametrize(
    "name, value", [("timestep_offset", 1), ("timestep_offset", False), ("timestep_spacing", "leading")]
)
def test_a_folder_with_other_timesteps_is_damaged(name, value, tmp_path, capsys):
    made = random_runs.random_run(tmp_path / "run", RUN)
    assert command_line.run(convert.main, ["convert", f"--model={made}", f"--to={tmp_path / 'to'}"]) == 0
    (tmp_path / "to" / "recipe.json").unlink()
    path = tmp_path / "to" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    line = refusal(capsys, sample.main, f"--model={tmp_path}/to", "--out=none")
    assert f"model_index.json is damaged: {name} is {value!r}" in line


def test_a_run_that_diffusers_cannot_sample_is_not_written(tmp_path, capsys):
    changes = {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "z0"}
    made = random_runs.random_run(tmp_path / "run", changes)
    line = refusal(capsys, convert.main, f"--model={made}", f"--to={tmp_path / 'to'}")
    assert "diffusers has no scheduler for config.diffusion.prediction = 'z0'" in line
    assert not (tmp_path / "to").exists()
