"""Models whose own scheduler is not supported: they load, and are sampled with another."""

import json
import shutil

import diffusers_folder
import finetuning
import numpy as np
import pytest

from ldm_jax import command_line, convert, sample
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.errors import InputError
from ldm_jax.pipeline.from_diffusers import from_diffusers

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDE = {"_class_name": "DPMSolverSDEScheduler", **BETAS}
REASONS = {
    "a class": (SDE, "the scheduler DPMSolverSDEScheduler is not supported"),
    "an order": (
        {"_class_name": "DPMSolverMultistepScheduler", **BETAS, "solver_order": 4},
        "DPMSolverMultistepScheduler: solver_order = 4 is not supported",
    ),
    "an interpolation": (
        {"_class_name": "EulerDiscreteScheduler", **BETAS, "interpolation_type": "log_linear"},
        "EulerDiscreteScheduler: interpolation_type = 'log_linear' is not supported",
    ),
    "thresholds": ({"_class_name": "DDIMScheduler", **BETAS, "thresholding": True}, "the scheduler has thresholding"),
    "the runge-kutta steps of PNDM": (
        {"_class_name": "PNDMScheduler", **BETAS},
        "PNDMScheduler: skip_prk_steps = False",
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return diffusers_folder.write_stable_diffusion(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def folder_of(plain, tmp_path):
    """folder_of(config): a folder with this scheduler_config.json."""

    def make(config):
        folder = shutil.copytree(plain, tmp_path / "model")
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", config["_class_name"]]
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make


def refusal(capsys, main, command):
    """The one line with which a command is refused."""
    assert command_line.run(main, command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("case", REASONS)
def test_the_model_loads_and_its_own_sampler_says_why_not(case, folder_of):
    config, reason = REASONS[case]
    model, _ = from_diffusers(folder_of(config))
    assert model.process == make_process("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012)
    assert model.prediction == "eps"
    with pytest.raises(InputError) as error:
        model.defaults.solver(model.defaults.sampler)
    assert str(error.value).startswith(reason)
    _, _, others = str(error.value).partition("; choose another with --sampler: ")
    assert "ddpm" in others.split(", ") or case == "thresholds"
    for other in others.split(", "):
        assert len(model.defaults.solver(other).process) == 1000


def test_a_field_that_carries_over_is_refused_for_that_sampler_by_name(folder_of):
    own = {"_class_name": "DPMSolverMultistepScheduler", **BETAS, "solver_order": 3, "lower_order_final": False}
    model, _ = from_diffusers(folder_of(own))
    for sampler in (model.defaults.sampler, "dpmpp_3m", "deis"):
        assert "lower_order_final = False is not supported" in model.defaults.solvers[sampler]
    assert "solver_order = 3 is not supported" in model.defaults.solvers["unipc"]
    for sampler in ("euler", "dpmpp_2m"):  # without such a field; with the order that the sampler's name says
        assert model.defaults.solver(sampler).options["spacing"] == "linspace"


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "prediction_type = 'sample'"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "rho": 3.0}, "rho = 3.0 is not supported; supported: 7.0"),
        (SDE | {"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "prediction_type = 'epsilon'"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type = 'continuous'"),
    ],
)
def test_another_process_is_refused_whatever_the_sampler(config, reason, folder_of, capsys):
    command = ["sample", f"--model={folder_of(config)}", "--prompt=low", "--sampler=euler", "--out=none"]
    assert reason in refusal(capsys, sample.main, command)


def test_sampling_asks_for_another_sampler_and_takes_it(folder_of, tmp_path, capsys):
    folder = folder_of(SDE)
    command = ["sample", f"--model={folder}", f"--out={tmp_path / 'out'}", "--prompt=low", "--steps=2", "--num=1"]
    line = refusal(capsys, sample.main, command)
    assert "DPMSolverSDEScheduler is not supported; choose another with --sampler: ddpm, " in line
    assert not (tmp_path / "out").exists()
    assert command_line.run(sample.main, [*command, "--sampler=euler"]) == 0
    assert np.load(tmp_path / "out" / "samples.npz")["images"].shape == (1, 16, 16, 3)


def test_convert_keeps_the_scheduler(folder_of, tmp_path):
    config = SDE | {"noise_sampler_seed": 3, "a_field_of_tomorrow": [1, 2]}
    folder = folder_of(config)
    assert command_line.run(convert.main, ["convert", f"--model={folder}", f"--to={tmp_path / 'to'}"]) == 0
    assert json.loads((tmp_path / "to" / "scheduler" / "scheduler_config.json").read_text()) == config
    index = json.loads((tmp_path / "to" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DPMSolverSDEScheduler"]


def test_fine_tuning_with_the_models_own_sampler_is_refused_alike(folder_of, tmp_path, capsys):
    folder_of(SDE)
    finetuning.write_pictures(tmp_path / "pictures")
    assert finetuning.fine_tune(tmp_path, "run", "--config.sampling.sampler=own") == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert "DPMSolverSDEScheduler is not supported; choose another with --sampler: ddpm, " in line
    assert not (tmp_path / "run").exists()
