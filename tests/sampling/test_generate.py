"""What a picture depends on, and every kind of model through the whole job."""

import jax
import jobs
import numpy as np
import pytest

from ldm_jax import command_line, sample
from ldm_jax.data.datasets import load_dataset
from ldm_jax.diffusion.random import initial_latents, sample_keys
from ldm_jax.evaluation import scoring
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.runtime.files import read_json
from ldm_jax.runtime.parallel import replicate
from ldm_jax.runtime.xla import CompileClock
from ldm_jax.sampling import from_flags, generate, tables
from ldm_jax.sampling.generate import Request, request, smallest_batch
from ldm_jax.sampling.image_grids import read_recipe


class Model:
    """A trained model with its generators, which are kept, as each compiles.

    Eight steps taught its network next to nothing; random changes of all parameters make it answer to its inputs.
    """

    def __init__(self, workdir):
        self.trained = pipeline_load.load(workdir)
        rng, params = np.random.default_rng(0), dict(self.trained.params)
        for part in ("unet", "conditioner"):
            params[part] = jax.tree.map(lambda p: p + rng.normal(0, 0.2, p.shape).astype(p.dtype), params[part])
        self.params = replicate(params)
        self.generators = {}

    def generator(self, batch_size):
        if batch_size not in self.generators:
            self.generators[batch_size] = generate.build_generator(self.trained.config, 4, batch_size)
        return self.generators[batch_size]

    def latents(self, wanted, *, batch_size=8, **changes):
        table = tables.build_table(self.trained.config, **{"sampler": "ddpm", "steps": 5, **changes})
        return np.concatenate([z for z, _ in self.generator(batch_size).latents(self.params, wanted, table)])


@pytest.fixture(scope="module")
def model(trained_run):
    return Model(trained_run)


CLOSE = {"rtol": 1e-3, "atol": 1e-4}
WANTED = request(11, [0, 1, 2, 3], guidance=1.5, seed=5)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_the_batch_does_not_matter(model, batch_size):
    """ddpm: the noise on the way is the sample's own as well."""
    np.testing.assert_allclose(model.latents(WANTED, batch_size=batch_size), model.latents(WANTED), **CLOSE)


def test_the_order_does_not_matter(model):
    order = np.random.default_rng(0).permutation(11)
    shuffled = Request(WANTED.ids[order], WANTED.labels[order], WANTED.guidance[order], 5)
    np.testing.assert_allclose(model.latents(shuffled), model.latents(WANTED)[order], **CLOSE)


def test_seed_number_label_and_guidance_do_matter(model):
    def one(number=3, label=2, guidance=1.5, seed=5):
        wanted = Request(np.int32([number]), np.int32([label]), np.float32([guidance]), seed)
        return model.latents(wanted)

    plain = one()
    np.testing.assert_array_equal(plain, one())
    for changed in (one(number=4), one(seed=6), one(label=1), one(guidance=4.0)):
        assert np.abs(changed - plain).max() > 0.01


def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_unconditional(model):
    def draw(guidance, labels):
        return model.latents(request(8, labels, guidance=guidance, seed=1))

    np.testing.assert_allclose(draw(1.0, [2]), draw(1.0 + 1e-6, [2]), **CLOSE)  # 1 takes the path without guidance
    np.testing.assert_allclose(draw(0.0, [2]), draw(1.0, []), **CLOSE)
    assert np.abs(draw(1.0, [2]) - draw(1.0, [])).max() > 0.01


def test_guidance_in_an_interval(model):
    def draw(**rest):
        return model.latents(request(8, [2], seed=1, **rest))

    everywhere, nowhere = draw(guidance=3.0), draw(guidance=1.0)
    np.testing.assert_allclose(draw(guidance=3.0, interval=(0.0, 1.0)), everywhere, **CLOSE)
    np.testing.assert_allclose(draw(guidance=3.0, interval=(0.96, 1.0)), nowhere, **CLOSE)  # t / T is at most 0.95
    some = draw(guidance=3.0, interval=(0.3, 0.7))
    assert min(np.abs(some - other).max() for other in (everywhere, nowhere)) > 0.01


def test_what_a_solver_is_told_matters(model):
    options = [{}, {"churn": 3.0}, {"spacing": "karras"}, {"spacing": (19, 16, 13, 10, 5)}, {"sampler": "plms"}]
    drawn = [model.latents(WANTED, **{"sampler": "edm", **changes}) for changes in options]
    for i, one in enumerate(drawn):
        for other in drawn[i + 1 :]:
            assert np.abs(one - other).max() > 0.01


def test_rescaling_and_a_negative_label_matter(model):
    def draw(**rest):
        return model.latents(request(8, [2], guidance=4.0, seed=1, **rest))

    plain, away_from_itself = draw(), draw(negative=2)
    for changed in (draw(rescale=1.0), draw(negative=3)):
        assert np.abs(changed - plain).max() > 0.01
    np.testing.assert_allclose(away_from_itself, model.latents(request(8, [2], guidance=1.0, seed=1)), **CLOSE)


def test_the_command_takes_an_interval(trained_run, tmp_path):
    drawn = draw_by_command(trained_run, tmp_path / "out", "--num=8", "--guidance=9", "--guidance_interval=0.2,0.6")
    assert read_recipe(tmp_path / "out" / "samples.png")["guidance_interval"] == [0.2, 0.6]
    assert len(drawn["images"]) == 8


def test_frames_lead_from_noise_to_the_picture(model):
    table = tables.build_table(model.trained.config, sampler="ddim", steps=20)
    wanted = WANTED.first(9)
    frames = model.generator(8).denoising(model.params, wanted, table)
    assert frames.shape == (generate.SNAPSHOTS, 9, 8, 8, 1)
    assert frames.dtype == np.uint8
    images = np.concatenate(list(model.generator(8).images(model.params, wanted, table)))
    np.testing.assert_array_equal(frames[-1], images)
    for z, on_the_way in model.generator(8).latents(model.params, wanted, table):
        np.testing.assert_allclose(on_the_way[:, -1], z, **CLOSE)
        assert (on_the_way[:, 0] != z).any()


@pytest.mark.parametrize(("num", "batch_size", "devices", "expected"), [(8, 64, 1, 8), (9, 64, 4, 12), (99, 64, 4, 64)])
def test_smallest_batch(num, batch_size, devices, expected):
    assert smallest_batch(num, batch_size, devices) == expected


@pytest.mark.parametrize(("flag", "written"), [("--save_trajectory", True), ("--nosave_trajectory", False)])
def test_the_film_is_left_out_on_request(trained_run, tmp_path, flag, written):
    draw_by_command(trained_run, tmp_path / "out", "--num=2", flag)
    assert (tmp_path / "out" / "denoising.gif").exists() == written


def draw_by_command(model, out, *flags):
    assert command_line.run(sample.main, ["sample", f"--model={model}", f"--out={out}", *flags]) == 0
    return jobs.samples(out)


def test_the_command_draws_the_run_s_own_samples(trained_run, tmp_path):
    drawn = draw_by_command(trained_run, tmp_path / "out", "--num=8")
    for name, array in jobs.samples(trained_run).items():
        np.testing.assert_array_equal(drawn[name], array)
    assert (tmp_path / "out" / "denoising.gif").stat().st_size
    recipe = read_recipe(tmp_path / "out" / "samples.png")
    assert recipe["seed"] == 0
    assert recipe["sampler"] == "ddim"


def test_the_command_takes_classes_by_name_and_number(trained_run, tmp_path):
    drawn = draw_by_command(trained_run, tmp_path / "out", "--num=8", "--label=dark,1,Bright")
    assert drawn["labels"].tolist() == [3, 1, 2, 3, 1, 2, 3, 1]


def test_the_command_takes_initial_latents(trained_run, tmp_path):
    """Those of the seed give the pictures of the seed; others give others."""
    z_T = np.asarray(initial_latents(sample_keys(np.uint32(3), np.arange(8)), (4, 4, 2)), np.float32)
    np.save(tmp_path / "own.npy", z_T)
    np.save(tmp_path / "other.npy", -z_T)
    plain = draw_by_command(trained_run, tmp_path / "plain", "--num=8", "--seed=3")["images"]
    own, other = (
        draw_by_command(trained_run, tmp_path / name, "--num=8", "--seed=3", f"--init_latents={tmp_path / name}.npy")
        for name in ("own", "other")
    )
    np.testing.assert_array_equal(own["images"], plain)
    assert (other["images"] != plain).any()


def finite(flat):
    return all(np.isfinite(array).all() for array in flat.values())


@pytest.fixture(scope="module")
def pixel_run(tiny_data, tmp_path_factory):
    """Diffusion on pixels, with a learned variance."""
    run = tmp_path_factory.mktemp("pixels") / "run"
    changes = ["autoencoder.kind=none", "diffusion.prediction=v", "diffusion.variance=learned", "diffusion.steps=4"]
    changes += ["sampling.sampler=ddpm", "sampling.variance=learned", "sampling.progress_every=4"]
    changes += ["evaluation.bound_examples=12"]
    assert jobs.train_here(tiny_data, run, *(f"--config.{change}" for change in changes)) == 0
    return run


def test_pixel_space(pixel_run):
    assert not (pixel_run / "autoencoder").exists()
    assert jobs.samples(pixel_run)["images"].shape == (8, 8, 8, 1)
    assert finite(load_latest(pixel_run / "diffusion"))
    assert (pixel_run / "report.html").stat().st_size


def test_pixels_are_bounded_by_clipping_or_by_a_quantile(pixel_run, tmp_path):
    """Strong guidance drives z0_hat beyond the pixels' range, where the two differ."""
    images = []
    for name, more in (("clipped", []), ("thresholded", ["--threshold=0.8"])):
        command = ["sample", f"--model={pixel_run}", f"--out={tmp_path / name}", "--num=4", "--guidance=30", *more]
        assert command_line.run(sample.main, [*command, "--nosave_trajectory"]) == 0
        images.append(jobs.samples(tmp_path / name)["images"])
        assert read_recipe(tmp_path / name / "samples.png")["threshold"] == (0.8 if more else 0.0)
    assert (images[0] != images[1]).any()


def test_the_job_logs_both_losses_and_reports_the_bound(pixel_run):
    lines = read_metrics(pixel_run / "metrics.jsonl")
    training = [line for line in lines if "simple" in line]
    assert training
    for line in training:
        assert line["loss"] == pytest.approx(line["simple"] + 0.001 * line["bound"], rel=1e-4)
    assert any("validation_loss" in line for line in lines)
    card = read_json(pixel_run / "evaluation.json")["model"]["bits/dim"]
    assert card["n"] == 12
    assert "8-bit pixels, given the class; learned variance; 20 timesteps in 6 ranges" in card["method"]
    bound = read_json(pixel_run / "bound.json")
    assert bound["total"] == card["value"] == pytest.approx(bound["prior"] + sum(bound["ranges"]))
    assert len(bound["terms"]) == 20
    assert 0 < card["value"] < 50
    assert "bits/dim" in (pixel_run / "report.html").read_text()
    assert read_recipe(pixel_run / "samples.png")["variance"] == "learned"


def test_the_variance_matters_to_ddpm_alone_and_compiles_nothing(pixel_run):
    model = pipeline_load.load(pixel_run)
    generator, params = generate.build_generator(model.config, 4, 8), replicate(model.params)
    wanted = request(8, [0, 1], guidance=2.0, seed=0)

    def draw(**changes):
        ((z, _),) = generator.latents(params, wanted, tables.build_table(model.config, **changes))
        return z

    clock = CompileClock()
    first = draw(variance="fixed_small")
    start = clock.count
    learned, large, again = (draw(variance=variance) for variance in ("learned", "fixed_large", "fixed_small"))
    np.testing.assert_array_equal(again, first)
    for one, other in ((learned, first), (large, first), (learned, large)):
        assert np.abs(one - other).max() > 0.01
    for sampler in ("ddim", "dpmpp_2m", "unipc"):
        assert np.isfinite(draw(sampler=sampler, variance="fixed_small")).all()
    assert clock.count == start


@pytest.mark.parametrize(
    "flags, variance",
    [([], "learned"), (["--sampler=ddim"], "fixed_small"), (["--variance=fixed_large"], "fixed_large")],
)
def test_the_variance_is_that_of_the_config_or_of_the_flag(pixel_run, flags, variance):
    values = sample.define_flags()
    command_line.parse(values, ["sample", *flags])
    assert from_flags.from_flags(pipeline_load.load(pixel_run), values, []).variance == variance


def test_the_bound_of_latents(trained_run, tiny_data, tmp_path):
    model = pipeline_load.load(trained_run)
    config = model.config.copy_and_resolve_references().unlock()
    test_set = load_dataset("tiny", "test", data_dir=tiny_data, image_size=8, channels=1)
    assert scoring.score_model(model, test_set, tmp_path) == {}
    config.evaluation.bound_examples = 99  # more than there are
    ((name, card),) = scoring.score_model(model._replace(config=config), test_set, tmp_path).items()
    assert name == "bits/dim (latents)"
    assert (card["n"], card["reference"]) == (16, "test")
    assert np.isfinite(card["value"]) and card["std"] > 0
    assert (tmp_path / "bound.json").exists()


def test_colour_pictures_without_labels_through_a_codebook(tiny_data, tmp_path):
    run = tmp_path / "run"
    changes = ["autoencoder.kind=vq", "data.channels=3", "data.label_key=none", "data.flip=True", "diffusion.steps=2"]
    changes += ["sampling.progress_every=2", "autoencoder.steps=2"]
    assert jobs.train_here(tiny_data, run, jobs.NO_ATTENTION, *(f"--config.{change}" for change in changes)) == 0
    drawn = jobs.samples(run)
    assert drawn["images"].shape == (8, 8, 8, 3)
    assert (drawn["labels"] == -1).all()
    assert read_json(run / "data.json")["class_names"] == []
    metrics = read_metrics(run / "metrics.jsonl")
    assert any("perplexity" in line for line in metrics)
    assert any("validation_loss" in line for line in metrics)
    assert sorted(path.name for path in (run / "progress").iterdir()) == [
        "autoencoder_000002.png",
        "diffusion_000002.png",
    ]
    command = ["sample", f"--model={run}", f"--out={tmp_path / 'out'}"]
    assert command_line.run(sample.main, [*command, "--guidance=2"]) == 2  # there is nothing to guide by
    assert command_line.run(sample.main, [*command, "--label=0"]) == 2


def test_data_on_disk_train_the_same_model(tiny_data, trained_run, tmp_path):
    """Nothing may stay in memory or on the device: the same batches come from the disk, read ahead."""
    run = tmp_path / "run"
    assert jobs.train_here(tiny_data, run, "--config.data.memory_limit_gb=0.0", "--config.sampling.num=0") == 0
    jobs.assert_same_training(run, trained_run, rtol=1e-2, atol=2e-3)
    assert jobs.losses(run) == pytest.approx(jobs.losses(trained_run), rel=1e-3)


def test_an_adopted_autoencoder(tiny_data, trained_run, tmp_path):
    """Another run's autoencoder serves as it is, with the scale that this run measures, on the latents made there."""
    run = tmp_path / "run"
    changes = f"--config.autoencoder.checkpoint={trained_run}", "--config.sampling.num=0"
    assert jobs.train_here(tiny_data, run, *changes) == 0
    assert list((trained_run / "latents").iterdir()) and not (run / "latents").exists()
    theirs, ours = load_latest(trained_run / "autoencoder"), load_latest(run / "autoencoder")
    averaged = [name for name in theirs if name.startswith("ema_params/")]
    assert averaged
    for name in averaged:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert read_json(run / "autoencoder" / "scale.json") == read_json(trained_run / "autoencoder" / "scale.json")
