"""A classifier of noisy latents: trained by the job, and guiding the samples of another run."""

import shutil

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest

from ldm_jax import command_line, sample
from ldm_jax.diffusion.denoiser import from_network
from ldm_jax.diffusion.guidance import class_log_probabilities, classifier_free, classifier_guided
from ldm_jax.diffusion.random import sample_keys
from ldm_jax.diffusion.solve import solve
from ldm_jax.pipeline.load import load
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.runtime.files import content_hash, read_json, write_json
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling.guidance_models import GuidanceModels, classifier_for, load_classifier
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.sampling.inputs import sample_inputs
from ldm_jax.sampling.recipe import Guidance, Recipe, solving_defaults
from ldm_jax.sampling.sampler import make_sampler
from ldm_jax.sampling.tables import make_table

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


@pytest.mark.slow
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


Z_T = np.random.default_rng(1).normal(size=(8, 4, 4, 2)).astype(np.float32)
SCALES = np.array([0, 1, 2, 4, 8, 0, 1, 30], np.float32)
LABELS = np.arange(8, dtype=np.int32) % 4


class Guided:
    """The trained model and the classifier with random changes, so that they answer to their inputs."""

    def __init__(self, model_run, classifier_run):
        rng = np.random.default_rng(0)
        shaken = lambda tree: jax.tree.map(lambda p: p + rng.normal(0, 0.2, p.shape).astype(p.dtype), tree)  # noqa: E731
        self.model, params = load(model_run)
        self.classifier = classifier_for(classifier_run, self.model, params)
        changed = {name: shaken(params[name]) for name in ("denoiser", "conditioning")}
        self.params = params | changed | {"classifier": shaken(self.classifier.params)}
        self.plain = make_sampler(self.model, 8)
        self.sampler = GuidanceModels(self.classifier).sampler(self.model, 8)
        self.table = make_table(self.model, solving_defaults(self.model, "ddpm", 5))

    def inputs(self, scale, labels=(0, 1, 2, 3), guidance=1.5, interval=(0.0, 1.0)):
        """Eight samples, guided by the classifier with this scale [] or [8]; None: without classifier."""
        settings = Guidance(guidance, list(interval), classifier=None if scale is None else "run")
        solving = solving_defaults(self.model, "ddpm", 5)
        recipe = Recipe(8, 5, list(labels), [], [8, 8], "float32", solving, settings)
        _, inputs = sample_inputs(self.model, self.params, recipe, self.sampler)
        samples = inputs.samples._replace(z_T=Z_T)
        if scale is not None:
            samples = samples._replace(classifier_scale=np.broadcast_to(np.float32(scale), 8))
        return inputs._replace(samples=samples)

    def latents(self, inputs, sampler=None):
        batches = (sampler or self.sampler).latents(replicate(self.params), inputs, self.table)
        return np.concatenate([z for z, _ in batches])

    def by_hand(self, guidance, scales):
        """The same without the sampler."""
        model, params, process = self.model, self.params, self.model.process

        def network(z_t, t, cond):
            return model.denoiser.apply({"params": params["denoiser"]}, z_t, t, **cond)

        def log_probability(z_t, t):
            alpha = jnp.asarray(process.alpha, jnp.float32)[t.astype(int)]
            logits = self.classifier.module.apply({"params": params["classifier"]}, z_t, t, alpha)
            return jax.nn.log_softmax(logits)[jnp.arange(8), LABELS]

        cond, null = (
            model.conditioning.encode(params["conditioning"], rows) for rows in (LABELS, np.full(8, 4, np.int32))
        )
        guided = classifier_free(from_network(network, "eps", process), cond, null, np.full(8, guidance, np.float32))
        guided = classifier_guided(guided, log_probability, scales)
        keys = sample_keys(np.uint32(5), np.arange(8))
        return jax.jit(lambda z_T: solve(guided, z_T, self.table, keys)[0])(Z_T)


@pytest.fixture(scope="module")
def guided(trained_run, classifier_run):
    return Guided(trained_run, classifier_run)


def test_the_compiled_call_is_the_composition_by_hand(guided):
    got = guided.latents(guided.inputs(SCALES))
    np.testing.assert_allclose(got, guided.by_hand(1.5, SCALES), **CLOSE)
    moved = np.abs(got - guided.latents(guided.inputs(0.0))).max((1, 2, 3))
    assert (moved[SCALES > 0] > 1e-3).all(), moved
    np.testing.assert_allclose(moved[SCALES == 0], 0, atol=1e-5)


def test_a_scale_of_zero_and_a_sample_without_label_are_not_guided(guided):
    """To the last bit, and as a sampler without a classifier samples them."""
    plain = guided.latents(guided.inputs(None), guided.plain)
    np.testing.assert_array_equal(guided.latents(guided.inputs(0.0)), plain)
    unlabelled, unguided = (guided.latents(guided.inputs(scale, labels=())) for scale in (SCALES, 0.0))
    np.testing.assert_array_equal(unlabelled, unguided)


def test_the_classifier_leads_to_its_label(guided):
    """With every label in turn, its own probability rises with the scale, and the interval takes that back."""
    classify = jax.jit(class_log_probabilities(guided.classifier.module.apply, guided.model.process))

    def log_p(scale, **rest):
        z = guided.latents(guided.inputs(scale, guidance=0.0, **rest))
        values = classify(guided.params["classifier"], z, np.zeros(8, np.float32))
        return np.mean(np.asarray(values)[np.arange(8), LABELS])

    assert log_p(0.0) < log_p(1.0) < log_p(4.0)
    assert log_p(4.0, interval=(0.96, 1.0)) == log_p(0.0, interval=(0.96, 1.0))  # t / T is at most 0.95


def test_the_first_few_keep_their_scales(guided):
    np.testing.assert_array_equal(guided.inputs(SCALES).first(3).samples.classifier_scale, SCALES[:3])
    assert guided.inputs(None).first(3).samples.classifier_scale is None


def test_equal_classifiers_share_a_sampler(guided, classifier_run):
    again = GuidanceModels(load_classifier(classifier_run))
    assert again.sampler(guided.model, 8) is guided.sampler is not guided.plain


def test_a_scale_needs_a_sampler_with_a_classifier_and_the_other_way_round(guided):
    for scale, sampler in ((0.0, guided.plain), (None, guided.sampler)):
        with pytest.raises(ValueError, match="classifier_scale and the model that guides by it go together"):
            guided.latents(guided.inputs(scale), sampler)


@pytest.mark.slow
def test_the_command_takes_a_classifier(trained_run, classifier_run, tmp_path, capsys):
    def sampled(out, *flags):
        command = ["sample", f"--model={trained_run}", f"--out={tmp_path / out}", *flags]
        assert command_line.run(sample.main, command) == 0, capsys.readouterr().err
        return jobs.samples(tmp_path / out)["images"]

    other = shutil.copytree(classifier_run, tmp_path / "classifier")
    images = sampled("guided", "--num=8", f"--classifier={other}", "--classifier_scale=300", "--guidance=0")
    assert (images != sampled("plain", "--num=8", "--guidance=0")).any()
    recipe = read_recipe(tmp_path / "guided" / "samples.png")
    assert recipe["guidance"]["classifier_scale"] == 300
    assert recipe["inputs"] == {str(other): content_hash(load_classifier(classifier_run).params)}
    np.testing.assert_array_equal(sampled("again", f"--from_recipe={tmp_path / 'guided' / 'samples.png'}"), images)
    shutil.rmtree(other / "classifier" / "8")  # what is left is another classifier: that of step 4
    capsys.readouterr()
    command = ["sample", f"--model={trained_run}", f"--out={tmp_path / 'no'}"]
    assert command_line.run(sample.main, [*command, f"--from_recipe={tmp_path / 'guided' / 'samples.png'}"]) == 2
    assert "was sampled from another" in capsys.readouterr().err
