"""Autoguidance and adaptive projected guidance from the command line: with an earlier checkpoint, a smaller run."""

import json
import shutil
from dataclasses import replace

import jax
import jobs
import numpy as np
import pytest
import random_runs
from absl.flags import FlagValues

from ldm_jax import command_line, convert, sample
from ldm_jax.diffusion.denoiser import from_network
from ldm_jax.diffusion.forward import NoiseLevel
from ldm_jax.errors import InputError
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import apply_denoiser
from ldm_jax.sampling.from_arguments import recipe_from_arguments
from ldm_jax.sampling.from_flags import recipe_from_flags
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.sampling.sampler import PerSample, Shared, guided_denoiser

SMALL = {"unet.context_dim": 4}
GUIDED = {"sampling.guide_step": 4, "checkpoint_every": 4, "sampling.guidance": 2.0}  # by its own earlier checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """strong, and weak: a smaller network on the same latents."""
    folder = tmp_path_factory.mktemp("runs")
    random_runs.random_run(folder / "strong")
    random_runs.random_run(folder / "weak", SMALL)
    random_runs.random_run(folder / "flow", {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "flow"})
    random_runs.random_run(folder / "others", class_names=("a", "b", "c", "d"))
    random_runs.random_run(folder / "concat", {"concat.type": "inpainting"})
    random_runs.random_run(folder / "pixels", {"autoencoder.type": "none"})
    random_runs.random_run(folder / "unconditional", class_names=())
    return folder


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A run whose config has autoguidance by its checkpoint of step 4, of other parameters than the last one's."""
    return random_runs.random_run(tmp_path_factory.mktemp("guided") / "run", GUIDED)


def run(model, out, *flags):
    command = ["sample", f"--model={model}", f"--out={out}", "--steps=3", "--num=4", "--nosave_trajectory", *flags]
    return command_line.run(sample.main, command)


def converted(model, to):
    return command_line.run(convert.main, ["convert", f"--model={model}", f"--to={to}"])


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sampled(model, out, *flags):
    assert run(model, out, *flags) == 0
    return jobs.samples(out)["images"].astype(int)


@pytest.mark.parametrize("guide_null", [False, True])
def test_the_guided_denoiser_is_that_of_its_parts(guide_null, runs):
    (model, params), (weak, weak_params) = load(runs / "strong"), load(runs / "weak")
    assert weak.denoiser != model.denoiser
    rng = np.random.default_rng(0)
    z_t, labels = rng.normal(size=(4, *model.latent_shape)).astype(np.float32), np.arange(4, dtype=np.int32)
    scale = np.float32([1, 2, 3, 0])
    shared = Shared(np.array([4], np.int32), np.float32([0, 1]), np.float32(0), np.float32(0), np.float32(np.inf),
                    np.zeros(model.latent_shape, np.float32), np.ones((*model.latent_shape[:2], 1), bool),
                    guide_null=np.bool_(guide_null))  # fmt: skip
    level = NoiseLevel(*np.float32([7, model.process.alpha[7], model.process.sigma[7]]))
    denoise = guided_denoiser(model, params | {"guide_model": weak_params}, PerSample(labels, labels, scale), shared,
                              guide=weak)  # fmt: skip

    def z0(model, params, labels):
        cond = model.conditioning.encode(params["conditioning"], labels)
        network = lambda z, t, cond: apply_denoiser(model, params, z, t, cond)  # noqa: E731
        return from_network(network, model.prediction, model.process)(z_t, level, cond)

    strong, other = z0(model, params, labels), z0(weak, weak_params, np.full(4, 4) if guide_null else labels)
    expected = other + scale[:, None, None, None] * (strong - other)
    np.testing.assert_allclose(jax.jit(denoise)(z_t, level), expected, rtol=1e-4, atol=1e-4)


def test_a_smaller_run_guides_and_the_recipe_samples_the_same_again(runs, tmp_path):
    guide = f"--guide_model={runs}/weak"
    guided, plain = sampled(runs / "strong", tmp_path / "a", guide, "--guidance=2.5"), []
    for flags in (["--guidance=1"], [guide, "--guidance=1"]):  # at scale 1 the weaker model has no effect
        plain.append(sampled(runs / "strong", tmp_path / "b", *flags))
    assert np.abs(plain[0] - plain[1]).max() <= 1 < np.abs(plain[0] - guided).max()
    recipe = read_recipe(tmp_path / "a" / "samples.png")
    assert recipe["guidance"]["guide_model"] == f"{runs}/weak" and f"{runs}/weak" in recipe["inputs"]
    again = ["sample", f"--model={runs}/strong", f"--out={tmp_path}/c", f"--from_recipe={tmp_path}/a/samples.png"]
    assert command_line.run(sample.main, again) == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "c")["images"], guided)


def test_a_recipe_with_another_weaker_model_is_refused(runs, tmp_path, capsys):
    weak = shutil.copytree(runs / "weak", tmp_path / "weak")
    sampled(runs / "strong", tmp_path / "a", f"--guide_model={weak}", "--guidance=2")
    shutil.rmtree(weak)
    random_runs.random_run(weak, SMALL | {"unet.layers_per_block": 2})
    again = ["sample", f"--model={runs}/strong", f"--out={tmp_path}/c", f"--from_recipe={tmp_path}/a/samples.png"]
    assert command_line.run(sample.main, again) == 2
    assert "was sampled from another" in capsys.readouterr().err


def test_a_checkpoint_of_the_run_itself_by_its_step(runs, tmp_path):
    """The same checkpoint guides to the same images; there is none of another step."""
    plain = sampled(runs / "strong", tmp_path / "a", "--guidance=1")
    same = sampled(runs / "strong", tmp_path / "b", f"--guide_model={runs}/strong@8", "--guidance=3")
    assert np.abs(plain - same).max() <= 1


def test_an_unconditional_model_is_guided_too(runs, tmp_path):
    guide = f"--guide_model={runs}/unconditional"
    plain = sampled(runs / "unconditional", tmp_path / "a")
    same = sampled(runs / "unconditional", tmp_path / "b", guide, "--guidance=2")
    assert np.abs(plain - same).max() <= 1
    # A projection of no difference changes nothing either.
    projected = sampled(runs / "unconditional", tmp_path / "c", guide, "--guidance=2", "--guidance_parallel=0")
    assert np.abs(plain - projected).max() <= 1


def test_a_run_is_guided_by_its_own_earlier_checkpoint_as_its_config_says(guided, tmp_path):
    default = sampled(guided, tmp_path / "default")
    guidance = read_recipe(tmp_path / "default" / "samples.png")["guidance"]
    assert (guidance["guide_model"], guidance["guide_null"], guidance["scale"]) == ("@4", True, 2.0)
    by_flags = [f"--guide_model={guided}@4", "--guide_null", "--guidance=2"]
    np.testing.assert_array_equal(sampled(guided, tmp_path / "flags", *by_flags), default)
    for name, *flags in (("null", "--guide_model="), ("same condition", by_flags[0]), ("scale", "--guidance=4")):
        assert np.abs(sampled(guided, tmp_path / name, *flags) - default).max() > 1
    moved = shutil.copytree(guided, tmp_path / "moved")
    again = ["sample", f"--model={moved}", f"--out={tmp_path}/c", f"--from_recipe={tmp_path}/default/samples.png"]
    assert command_line.run(sample.main, again) == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "c")["images"], default)


@pytest.mark.parametrize("flags", [["--negative_label=1"], ["--guidance=0"], ["--cfgpp", "--sampler=ddim"]])
def test_other_rules_of_guidance_take_the_place_of_the_config_s(flags, guided, tmp_path):
    sampled(guided, tmp_path / "out", *flags)
    guidance = read_recipe(tmp_path / "out" / "samples.png")["guidance"]
    assert (guidance["guide_model"], guidance["guide_null"]) == (None, False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], "@4"), (["--guidance=3"], "@4"), (["--guide_model="], None), (["--classifier=runs/classifier"], None),
     (["--clip=runs/clip", "--prompt=red"], None), (["--guidance=0.5"], None)],
)  # fmt: skip
def test_recipes_of_flags_have_the_config_s_guidance_or_another(given, expected, guided):
    """Without the editing flags, as `evaluate` has them."""
    model, _ = load(guided)
    values = FlagValues()
    command_line.define_sampling_flags(values, num=4)
    command_line.parse(values, ["evaluate", *given])
    guidance = recipe_from_flags(model, values, [0, 1]).guidance
    assert (guidance.guide_model, guidance.guide_null) == (expected, expected is not None)


def test_arguments_that_take_the_place_of_the_config_s_guidance(guided):
    model, _ = load(guided)
    for arguments, expected in (({}, "@4"), ({"guidance": 3.0}, "@4"), ({"guidance": 0.5}, None)):
        assert recipe_from_arguments(model, **arguments).guidance.guide_model == expected


def test_an_earlier_checkpoint_that_is_missing_is_said(guided, tmp_path, capsys):
    moved = shutil.copytree(guided, tmp_path / "moved")
    shutil.rmtree(moved / "diffusion" / "4")
    assert run(moved, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--guide_model" in error and "--config.sampling.guide_step=0" in error
    assert run(moved, tmp_path / "out", "--guide_model=") == 0


def test_a_short_training_has_no_earlier_checkpoint(tmp_path):
    short = random_runs.random_run(tmp_path / "short", GUIDED | {"sampling.guide_step": 500})
    sampled(short, tmp_path / "out")
    assert read_recipe(tmp_path / "out" / "samples.png")["guidance"]["guide_model"] is None


@pytest.mark.slow
def test_a_job_keeps_the_checkpoint_that_guides(tiny_data, tmp_path):
    fields = ("checkpoint_every=2", "keep_checkpoints=1", "sampling.guide_step=2", "sampling.num=4",
              "autoencoder.type=none", "stages=('diffusion',)", "evaluation.vlb_examples=0")  # fmt: skip
    flags = (*(f"--config.{field}" for field in fields), jobs.NO_ATTENTION)
    assert jobs.train_here(tiny_data, tmp_path / "run", *flags) == 0
    assert {int(path.name) for path in (tmp_path / "run" / "diffusion").glob("[0-9]*")} == {2, 8}
    kept = (tmp_path / "run" / "diffusion" / "2").rename(tmp_path / "kept")
    assert jobs.train_here(tiny_data, tmp_path / "run", *flags) == 0  # all is done without it
    kept.rename(tmp_path / "run" / "diffusion" / "2")
    assert read_recipe(tmp_path / "run" / "samples.png")["guidance"]["guide_model"] == "@2"


def test_a_job_past_its_guide_refuses_it(tiny_data, trained_run, tmp_path, capsys):
    """Before it trains on: only the first checkpoints of a run are deleted."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    flags = ("--config.diffusion.steps=16", "--config.checkpoint_every=4", "--config.sampling.guide_step=")
    steps = sorted(int(path.name) for path in (run / "diffusion").glob("[0-9]*"))
    shutil.rmtree(run / "diffusion" / "4", ignore_errors=True)
    assert jobs.train_here(tiny_data, run, *flags[:-1], f"{flags[-1]}4", "--dry_run=True") == 2
    kept = ", ".join(str(step) for step in steps if step != 4)
    assert (
        f"is 4; the run has no checkpoint of it, but of {kept}: it must be one of these, or 0"
        in capsys.readouterr().err
    )
    assert jobs.train_here(tiny_data, run, *flags[:-1], f"{flags[-1]}12", "--dry_run=True") == 0


def test_projected_guidance_from_the_command_line(runs, tmp_path):
    flags = ["--guidance=4", "--label=1"]
    plain, eta, limited, both = (
        sampled(runs / "strong", tmp_path / name, *flags, *more)
        for name, more in {"plain": (), "eta": ("--guidance_parallel=0",), "r": ("--guidance_max_norm=0.1",),
                           "both": ("--guidance_parallel=0", "--guidance_max_norm=0.1")}.items()
    )  # fmt: skip
    for one, other in ((plain, eta), (plain, limited), (eta, both)):
        assert (one != other).any()
    unguided = sampled(runs / "strong", tmp_path / "unguided", "--guidance=1", "--label=1")
    assert np.abs(limited - unguided).mean() < np.abs(plain - unguided).mean()
    guidance = json.loads(json.dumps(read_recipe(tmp_path / "both" / "samples.png")))["guidance"]
    assert (guidance["parallel"], guidance["max_norm"]) == (0.0, 0.1)
    off = sampled(runs / "strong", tmp_path / "off", *flags, "--guidance_parallel=1", "--guidance_max_norm=0")
    np.testing.assert_array_equal(off, plain)


REFUSED = {  # flags, RUNS for the folder of runs -> what the line must say
    "no such model": (["--guide_model=RUNS/nowhere"], "--guide_model: --model=RUNS/nowhere does not exist"),
    "no checkpoint of the step": (["--guide_model=RUNS/strong@9"], "no checkpoint of that step, but of 8"),
    "no checkpoint so early": (["--guide_model=RUNS/strong@3"], "there is no readable checkpoint in"),
    "other classes": (["--guide_model=RUNS/others"], "is conditioned on other classes or texts than --model"),
    "another schedule": (["--guide_model=RUNS/flow"], "have other noise schedules: T 20 with sigma"),
    "other concat conditioning": (["--guide_model=RUNS/concat"], "has other concat conditioning than --model"),
    "other latents": (["--guide_model=RUNS/pixels"], "has other latents than --model"),
    "the null condition without a weaker model": (["--guide_null"], "--guide_null needs --guide_model"),
    "a negative class": (["--guide_model=RUNS/weak", "--negative_label=1"], "takes the place of a null or negative"),
    "a refiner": (["--guide_model=RUNS/weak", "--refiner=RUNS/strong"], "must be text-to-image models"),
    "a spacing of rectified flow": (["--spacing=flow"], "sampling: the spacing flow is for rectified flow"),
    "a parallel part beyond 1": (["--guidance_parallel=1.5"], "guidance_parallel"),
    "a negative limit": (["--guidance_max_norm=-1"], "guidance_max_norm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, runs, tmp_path, capsys):
    flags, expected = REFUSED[case]
    assert run(runs / "strong", tmp_path / "out", *(flag.replace("RUNS", str(runs)) for flag in flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert expected.replace("RUNS", str(runs)) in error and "guide_step" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flag",
    [
        "--guidance=2",
        "--guidance_rescale=0.5",
        "--guidance_parallel=0",
        "--guidance_max_norm=1",
        "--guidance_interval=0,0.5",
        "--guidance=0.5",
    ],
)
def test_guidance_of_a_model_without_classes_needs_a_weaker_model(flag, runs, tmp_path, capsys):
    assert run(runs / "unconditional", tmp_path / "out", flag) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        f"{flag.split('=')[0]}=" in line and "needs a model with classes, or --guide_model; this one has none" in line
    )


def test_guidance_of_a_model_without_classes_by_its_own_earlier_checkpoint():
    """As its config says, at another scale; without that checkpoint it is refused."""
    model, _ = random_runs.random_model(GUIDED, class_names=())
    model = replace(model, origin=model.origin._replace(step=8))

    def recipe(*flags):
        values = FlagValues()
        command_line.define_sampling_flags(values, num=4)
        command_line.parse(values, ["evaluate", *flags])
        return recipe_from_flags(model, values, [])

    flags = ["--guidance=3", "--guidance_rescale=0.5", "--guidance_interval=0,0.5"]
    guidance = recipe(*flags).guidance
    assert (guidance.guide_model, guidance.scale, guidance.rescale, guidance.interval) == ("@4", 3.0, 0.5, [0, 0.5])
    assert recipe_from_arguments(model, guidance=3).guidance.scale == 3.0
    for wrong in (["--guidance=3", "--guide_model="], ["--guidance=0.5"]):
        with pytest.raises(InputError, match="needs a model with classes, or --guide_model"):
            recipe(*wrong)
    with pytest.raises(InputError, match=r"guidance=0.5 needs a model with classes or texts"):
        recipe_from_arguments(model, guidance=0.5)


def test_an_exported_run_is_guided_by_that_checkpoint_too(guided, tmp_path):
    """So is the run folder that is restored from it; another export of the restored one has the same files."""
    default = sampled(guided, tmp_path / "default")
    assert converted(guided, tmp_path / "exported") == 0
    assert "step 4 (autoguidance)" in (tmp_path / "exported" / "README.md").read_text()
    np.testing.assert_array_equal(sampled(tmp_path / "exported", tmp_path / "a"), default)
    assert np.abs(sampled(tmp_path / "exported", tmp_path / "b", "--guide_model=") - default).max() > 1
    assert converted(tmp_path / "exported", tmp_path / "restored") == 0
    np.testing.assert_array_equal(sampled(tmp_path / "restored", tmp_path / "c"), default)
    assert converted(tmp_path / "restored", tmp_path / "again") == 0
    assert files(tmp_path / "again") == files(tmp_path / "exported")


def test_a_run_without_that_checkpoint_is_exported_with_classifier_free_guidance(guided, tmp_path):
    run_folder = shutil.copytree(guided, tmp_path / "run")
    shutil.rmtree(run_folder / "diffusion" / "4")
    assert converted(run_folder, tmp_path / "exported") == 0
    note = "By classifier-free guidance instead of autoguidance by the checkpoint of step 4."
    assert note in (tmp_path / "exported" / "README.md").read_text()
    plain = sampled(run_folder, tmp_path / "a", "--guide_model=")
    np.testing.assert_array_equal(sampled(tmp_path / "exported", tmp_path / "b"), plain)
