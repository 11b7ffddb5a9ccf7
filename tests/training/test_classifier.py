"""A classifier of noisy latents: trained by the job, and guiding what another run draws."""

import shutil

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest

from ldm_jax import command_line, sample
from ldm_jax.diffusion.denoiser import from_network
from ldm_jax.diffusion.guidance import classifier_free, classifier_guided
from ldm_jax.diffusion.random import sample_keys
from ldm_jax.diffusion.solve import solve
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.runtime.files import read_json, write_json
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling import generate, guidance_models, tables
from ldm_jax.sampling.generate import request
from ldm_jax.sampling.image_grids import read_recipe

CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def command_of(run):
    """The flags that made it: the autoencoder that it names may be another test process's."""
    checkpoint = read_json(run / "config.json")["autoencoder"]["checkpoint"]
    return *jobs.CLASSIFIER, f"--config.autoencoder.checkpoint={checkpoint}"


def test_the_job_leaves_a_classifier_and_its_scores(classifier_run, trained_run, tiny_data, capsys):
    assert not (classifier_run / "diffusion").exists()
    assert not (classifier_run / "samples.npz").exists()
    scale = "autoencoder/scale.json"
    assert (classifier_run / scale).read_text() == (trained_run / scale).read_text()
    state = load_latest(classifier_run / "classifier")
    assert state["step"] == 8
    scores = read_json(classifier_run / "evaluation.json")["classifier"]
    assert scores["accuracy"]["n"] == 16
    assert scores["accuracy"]["reference"] == "test"
    assert len(scores["accuracy_by_t"]) == 10
    assert np.mean(scores["accuracy_by_t"]) == pytest.approx(scores["accuracy"]["value"], abs=0.1)  # 16 in 10 ranges
    lines = [line for line in read_metrics(classifier_run / "metrics.jsonl") if line["stage"] == "classifier"]
    assert [line["step"] for line in lines if "accuracy" in line] == [2, 4, 6, 8]
    (last,) = [line for line in lines if "validation_accuracy" in line and line["step"] == 8]
    assert last["validation_accuracy"] == scores["accuracy"]["value"]
    report = (classifier_run / "report.html").read_text()
    assert "<h1>Autoencoder and classifier of tiny</h1>" in report
    assert "Classifier: accuracy" in report
    assert "Classifier of noisy latents" in report
    capsys.readouterr()
    assert jobs.train_here(tiny_data, classifier_run, *command_of(classifier_run)) == 0
    assert "All is done: " in capsys.readouterr().out


def test_a_classifier_resumes_exactly_and_knows_its_own(classifier_run, tiny_data, tmp_path, capsys):
    run = shutil.copytree(classifier_run, tmp_path / "run")
    shutil.rmtree(run / "classifier" / "8")
    (run / "report.html").unlink()
    flags = command_of(classifier_run)
    assert jobs.train_here(tiny_data, run, *flags) == 0
    again, whole = load_latest(run / "classifier"), load_latest(classifier_run / "classifier")
    assert again.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(again[name], whole[name], err_msg=name)
    assert jobs.losses(run) == jobs.losses(classifier_run)
    config = read_json(run / "config.json")
    config["classifier"]["ema_decay"] = 0.5
    write_json(run / "config.json", config)
    (run / "report.html").unlink()
    capsys.readouterr()
    assert jobs.train_here(tiny_data, run, *flags, "--config.classifier.ema_decay=0.5") == 2
    assert "belongs to another run" in capsys.readouterr().err


class Model:
    """The trained model and the classifier with random changes, so that they answer to their inputs."""

    def __init__(self, model_run, classifier_run):
        rng = np.random.default_rng(0)
        shaken = lambda tree: jax.tree.map(lambda p: p + rng.normal(0, 0.2, p.shape).astype(p.dtype), tree)  # noqa: E731
        self.trained = pipeline_load.load(model_run)
        self.guide = guidance_models.classifier_for(classifier_run, self.trained)
        changed = {part: shaken(self.trained.params[part]) for part in ("unet", "conditioner")}
        self.params = self.trained.params | changed | {"classifier": shaken(self.guide.params)}
        self.generator = generate.build_generator(self.trained.config, 4, 8, guidance_models.Guides(self.guide))

    def latents(self, wanted, generator=None):
        table = tables.build_table(self.trained.config, sampler="ddpm", steps=5)
        drawn = (generator or self.generator).latents(replicate(self.params), wanted, table)
        return np.concatenate([z for z, _ in drawn])

    def by_hand(self, wanted, scales):
        """The same without the generator, for a batch of 8 with labels."""
        config, params = self.trained.config, self.params
        unet, conditioner = pipeline_from_config.build_unet(config), pipeline_from_config.build_conditioner(config, 4)
        classifier, process = (
            pipeline_from_config.build_classifier(self.guide.config, 4),
            pipeline_from_config.build_process(config),
        )
        network = lambda z_t, t, context: unet.apply({"params": params["unet"]}, z_t, t, context)  # noqa: E731
        tau = lambda label: conditioner.apply({"params": params["conditioner"]}, label)  # noqa: E731

        def log_probability(z_t, t):
            alpha = jnp.asarray(process.alpha, jnp.float32)[t.astype(int)]
            logits = classifier.apply({"params": params["classifier"]}, z_t, t, alpha)
            return jax.nn.log_softmax(logits)[jnp.arange(8), wanted.labels]

        guided = classifier_free(
            from_network(network, "eps", process), tau(wanted.labels), tau(np.full(8, 4)), wanted.guidance
        )
        guided = classifier_guided(guided, log_probability, scales)
        table = tables.build_table(config, sampler="ddpm", steps=5)
        keys = sample_keys(wanted.seed, wanted.ids)
        return jax.jit(lambda z_T: solve(guided, z_T, table, keys)[0])(wanted.z_T)


@pytest.fixture(scope="module")
def model(trained_run, classifier_run):
    return Model(trained_run, classifier_run)


Z_T = np.random.default_rng(1).normal(size=(8, 4, 4, 2)).astype(np.float32)
SCALES = np.array([0, 1, 2, 4, 8, 0, 1, 30], np.float32)
WANTED = request(8, [0, 1, 2, 3], guidance=1.5, seed=5, z_T=Z_T, classifier_scale=SCALES)
UNGUIDED = WANTED._replace(classifier_scale=None)


def test_the_compiled_call_is_the_composition_by_hand(model):
    got = model.latents(WANTED)
    np.testing.assert_allclose(got, model.by_hand(WANTED, SCALES), **CLOSE)
    moved = np.abs(got - model.latents(UNGUIDED)).max((1, 2, 3))
    assert (moved[SCALES > 0] > 1e-3).all(), moved
    np.testing.assert_allclose(moved[SCALES == 0], 0, atol=1e-5)


def test_a_scale_of_zero_and_a_sample_without_label_are_not_guided(model):
    """To the last bit, and as a generator without a classifier draws them."""
    plain = model.latents(UNGUIDED, generate.build_generator(model.trained.config, 4, 8))
    np.testing.assert_array_equal(model.latents(UNGUIDED), plain)
    np.testing.assert_array_equal(model.latents(WANTED._replace(classifier_scale=0 * SCALES)), plain)
    nobody = np.full(8, -1, np.int32)
    unlabelled = WANTED._replace(labels=nobody)
    np.testing.assert_array_equal(model.latents(unlabelled), model.latents(UNGUIDED._replace(labels=nobody)))


def test_the_classifier_leads_to_its_label(model):
    """With every label in turn, its own probability rises with the scale, and the interval takes that back."""
    classify = jax.jit(pipeline_from_config.build_classify(model.guide.config, 4))

    def log_p(scale, **rest):
        wanted = WANTED._replace(
            guidance=np.zeros(8, np.float32), classifier_scale=np.full(8, scale, np.float32), **rest
        )
        values = classify(model.params["classifier"], model.latents(wanted), np.zeros(8, np.float32))
        return np.mean(np.asarray(values)[np.arange(8), wanted.labels])

    assert log_p(0.0) < log_p(1.0) < log_p(4.0)
    assert log_p(4.0, interval=(0.96, 1.0)) == log_p(0.0, interval=(0.96, 1.0))  # t / T is at most 0.95


def test_the_first_few_keep_their_scales():
    np.testing.assert_array_equal(WANTED.first(3).classifier_scale, SCALES[:3])
    assert UNGUIDED.first(3).classifier_scale is None


def test_a_generator_without_a_classifier_refuses_a_scale(trained_run):
    model = pipeline_load.load(trained_run)
    generator = generate.build_generator(model.config, 4, 8)
    with pytest.raises(ValueError, match="needs a generator with a classifier"):
        next(generator.latents(model.params, WANTED, tables.build_table(model.config)))


def test_the_command_takes_a_classifier(trained_run, classifier_run, tmp_path, capsys):
    def draw(out, *flags):
        command = ["sample", f"--model={trained_run}", f"--out={tmp_path / out}", *flags]
        assert command_line.run(sample.main, command) == 0, capsys.readouterr().err
        return jobs.samples(tmp_path / out)["images"]

    other = shutil.copytree(classifier_run, tmp_path / "classifier")
    guided = draw("guided", "--num=8", f"--classifier={other}", "--classifier_scale=300", "--guidance=0")
    assert (guided != draw("plain", "--num=8", "--guidance=0")).any()
    recipe = read_recipe(tmp_path / "guided" / "samples.png")
    assert recipe["classifier_scale"] == 300
    assert recipe["inputs"] == {
        str(other): guidance_models.fingerprint(guidance_models.load_classifier(classifier_run))
    }
    np.testing.assert_array_equal(draw("again", f"--from_recipe={tmp_path / 'guided' / 'samples.png'}"), guided)
    shutil.rmtree(other / "classifier" / "8")  # what is left is another classifier: that of step 4
    capsys.readouterr()
    command = ["sample", f"--model={trained_run}", f"--out={tmp_path / 'no'}"]
    assert command_line.run(sample.main, [*command, f"--from_recipe={tmp_path / 'guided' / 'samples.png'}"]) == 2
    assert "drawn from another" in capsys.readouterr().err
