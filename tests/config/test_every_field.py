"""Every field of a config changes what is built of it, or is named with the test of what it does."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import tiny

from ldm_jax.config import defaults, io
from ldm_jax.data import from_config as data
from ldm_jax.evaluation import scoring
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.clip import clip_of
from ldm_jax.pipeline.from_config import from_config
from ldm_jax.pipeline.trainable import trainable_of
from ldm_jax.sampling.recipe_of_run import recipe_of_run
from ldm_jax.training import stages
from ldm_jax.training.from_config import (
    autoencoder_terms,
    make_autoencoder_stage,
    make_classifier_stage,
    make_clip_stage,
    make_diffusion_stage,
)
from ldm_jax.training.run import Run

ROOT = Path(__file__).parents[2]
NETWORKS = ("autoencoder", "clip", "diffusion", "classifier")  # with a section of training fields each
OF_THE_JOB = ("seed", "stages", "init_from", "wandb", "log_every", "checkpoint_every", "keep_checkpoints")
TRAINING = {"steps": 3, "learning_rate": 0.5, "optimizer": "muon", "warmup_steps": 7, "decay": "constant",
            "adam_b2": 0.5, "weight_decay": 0.25, "clip_norm": 0.125, "ema_decay": 0.75}  # fmt: skip

# The parts of a run that change, and the fields that change them, each with another value than its default.
DENOISER = ("model", "diffusion", "classifier")  # the stages of latents have the model
FLOW = {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "flow"}
FIELDS = [
    *(((name,), {f"{name}.{field}": value for field, value in TRAINING.items()}) for name in NETWORKS),
    (("feeds",), {f"{name}.batch_size": 3 for name in NETWORKS}),
    (("feeds",), {"clip.validation_examples": 3, "diffusion.validation_examples": 3}),
    (("autoencoder", *DENOISER), {
        "autoencoder.type": "vq", "autoencoder.latent_channels": 3, "autoencoder.block_out_channels": (32, 64),
        "autoencoder.layers_per_block": 2, "autoencoder.norm_num_groups": 8, "autoencoder.mid_block_attention": False,
        "autoencoder.codebook_size": 7,
    }),
    (("autoencoder",), {
        "autoencoder.loss.reconstruction": 0.5, "autoencoder.loss.perceptual": 0.5, "autoencoder.loss.kl": 0.5,
        "autoencoder.loss.codebook": 0.5, "autoencoder.loss.commitment": 0.5, "autoencoder.loss.adversarial": 0.25,
        "autoencoder.loss.perceptual_size": 64, "autoencoder.loss.perceptual_every": 2,
        "autoencoder.discriminator.channels": 8, "autoencoder.discriminator.layers": 2,
        "autoencoder.discriminator.learning_rate": 0.5,
    }),
    (("autoencoder", "feeds"), {"autoencoder.loss.perceptual_net": "alexnet"}),
    (("terms",), {"autoencoder.loss.perceptual_start": 2, "autoencoder.loss.adversarial_start": 2}),
    (("clip",), {
        "clip.vocab_size": 64, "clip.max_length": 64, "clip.projection_dim": 32, "clip.patch_size": 7,
        "clip.text_width": 64, "clip.text_layers": 1, "clip.text_heads": 2,
        "clip.image_width": 64, "clip.image_layers": 1, "clip.image_heads": 2,
        "clip.max_shift": 2, "clip.max_zoom": 0.5,
    }),
    (DENOISER, {
        "diffusion.timesteps": 200, "diffusion.schedule": "cosine", "diffusion.beta_start": 0.01,
        "diffusion.beta_end": 0.5, "diffusion.zero_terminal_snr": True, "diffusion.prediction": "v",
        "diffusion.variance": "learned", "concat.num_segments": 5, "concat.factor": 2,
        "unet.block_out_channels": (32, 128), "unet.attention": (False, True), "unet.layers_per_block": 1,
        "unet.attention_heads": 2, "unet.transformer_layers": 2, "unet.norm_num_groups": 8,
        "unet.context_dim": 64, "unet.context_tokens": 2,
        "dit.patch_size": 7, "dit.hidden_size": 64, "dit.depth": 2, "dit.heads": 2, "dit.mlp_ratio": 2.0,
        "dit.norm": "rms", "dit.qk_norm": "rms", "denoiser": "dit",
    }),
    (("recipe", *DENOISER), {"diffusion.objective": "mean_flow", "concat.type": "segments"}),
    (("diffusion",), {
        "diffusion.weighting": "min_snr", "diffusion.snr_gamma": 3.0, "diffusion.timestep_sampling": "logit_normal",
        "diffusion.timestep_mean": 0.5, "diffusion.timestep_std": 0.5, "diffusion.timestep_shift": 3.0,
        "diffusion.vlb_weight": 0.5, "diffusion.label_dropout": 0.5, "diffusion.ema_sigma_rels": (0.05,),
        "diffusion.train_text_encoder": True, "parallel.remat": True,
        "mean_flow.interval_ratio": 0.5, "mean_flow.guidance": 2.0, "mean_flow.kappa": 0.5,
        "mean_flow.tangent": "network", "mean_flow.adaptive_power": 0.5,
        "consistency.guidance_min": 2.0, "consistency.guidance_max": 20.0, "consistency.huber_c": 0.5,
        "lora.rank": 2, "lora.alpha": 2.0, "textual_inversion.token": "<a>", "textual_inversion.vectors": 2,
    }),
    (("classifier",), {
        "classifier.block_out_channels": (32, 128), "classifier.attention": (True, True),
        "classifier.layers_per_block": 2, "classifier.attention_heads": 2, "classifier.norm_num_groups": 8,
    }),
    (NETWORKS, {"data.flip": True, "parallel.accumulate": 2}),
    (("model", "recipe", *NETWORKS), {"dtype": "bfloat16"}),
    (("engine",), {"parallel.engine": "fsdp"}),
    (("recipe",), {
        "sampling.num": 3, "sampling.sampler": "euler", "sampling.steps": 7, "sampling.spacing": "leading",
        "sampling.eta": 0.5, "sampling.variance": "fixed_large", "sampling.churn": 3.0, "sampling.guidance": 4.0,
        "sampling.guidance_interval": (0.25, 0.5), "sampling.guidance_rescale": 0.5, "sampling.guide_step": 4,
        "sampling.threshold": 0.5, "sampling.prompts": ("a", "b"), "sampling.batch_size": 16,
    }),
    (("data",), {
        "data.name": "x", "data.path": "x", "data.dir": "x", "data.train_split": "x", "data.image_key": "x",
        "data.label_key": "x", "data.caption_key": "x", "data.segments_key": "x", "data.group_key": "x",
        "data.bucket_step": 8, "data.memory_limit_gb": 1.0, "textual_inversion.learnable_property": "style",
    }),
    (("data", "recipe"), {"data.test_split": "x", "data.crop": "none"}),
    (("data", "model", "recipe", *NETWORKS), {"data.image_size": 56}),
    (("data", "model", *NETWORKS), {"data.channels": 3}),
    (("scores",), {"evaluation.num_reference": 3, "evaluation.resize": 16, "evaluation.inception_weights": "x.pth"}),
    (("scores", "feeds"), {"evaluation.batch_size": 8}),
]  # fmt: skip
VALUES = {name: (value, set(parts)) for parts, fields in FIELDS for name, value in fields.items()}

# The fields without which another has no effect: by its name, or that of its section.
NEEDS = {
    "autoencoder.codebook_size": {"autoencoder.type": "vq"},
    "diffusion.zero_terminal_snr": {"diffusion.prediction": "v"},
    "diffusion.train_text_encoder": {"stages": ("autoencoder", "clip", "diffusion")},
    "concat.factor": {"concat.type": "low_resolution"},
    "concat.num_segments": {"concat.type": "segments"},
    "dit": {"denoiser": "dit"},
    "diffusion.objective": FLOW,
    "mean_flow": FLOW | {"diffusion.objective": "mean_flow"},
    "consistency": {"diffusion.objective": "consistency"},
    "lora.alpha": {"lora.rank": 4},
    "textual_inversion.vectors": {"textual_inversion.token": "<a>"},
    "textual_inversion.learnable_property": {"textual_inversion.token": "<a>", "data.caption_key": "auto"},
    "sampling.variance": {"sampling.sampler": "ddpm"},
    "sampling.churn": {"sampling.sampler": "edm"},
    "data.test_split": {"concat.type": "inpainting"},
}

INVERSION = "tests/training/test_textual_inversion.py"
ELSEWHERE = {  # fields of files, and of what a run writes -> a test of their effect
    "autoencoder.checkpoint": "tests/test_job.py::test_a_reused_autoencoder",
    "clip.checkpoint": "tests/pipeline/test_from_run.py::test_the_text_encoder_may_be_trained",
    "clip.tokenizer": "tests/pipeline/test_from_run.py::test_a_vocabulary_is_copied_to_the_run",
    "diffusion.ema_snapshot_every": "tests/training/test_posthoc_ema.py::test_snapshots_are_the_averages_in_float16",
    "textual_inversion.init_word": f"{INVERSION}::test_the_vectors_begin_as_that_of_the_word",
    "parallel.fsdp": "tests/runtime/test_parallel.py::test_a_run_goes_on_in_another_way",
    "sampling.progress_every": "tests/test_job.py::test_colour_images_without_labels_through_a_codebook",
    "evaluation.vlb_examples": "tests/evaluation/test_scoring.py::test_the_likelihood_of_latents",
    "evaluation.zero_shot_key": "tests/pipeline/test_from_run.py::test_a_run_scores_its_clip_and_its_samples",
}


class Images:
    """A data set of ten black images."""

    captions, split, class_names = (), "test", tiny.CLASS_NAMES

    def __len__(self):
        return 10

    def __getitem__(self, rows):
        return {"x": np.zeros((len(rows), 8, 8, 1), np.uint8)}


@pytest.fixture
def built(monkeypatch):
    """built(changes) -> by name, the parts of a run that are built of the default config with these fields."""

    def build(changes):
        config = defaults.get_config().unlock()
        config.update_from_flattened_dict(changes)
        run = Run(config.lock(), Path("run"), Images(), Images(), log=None, watch=None, base=None)
        texts = TextConditioning((), (), False) if "clip" in config.stages else None
        model = from_config(config, () if texts else tiny.CLASS_NAMES, texts)
        model = replace(model, origin=model.origin._replace(step=1_000))
        recipe = None if texts else recipe_of_run(model, Images())
        return {
            "model": model,
            "recipe": (recipe, model.defaults.batch_size, model.defaults.crop, available(model)),
            "autoencoder": make_autoencoder_stage(config),
            "terms": [autoencoder_terms(config, step) for step in (0, 1, 2, 50_001)],
            "clip": make_clip_stage(clip_of(config), config),
            "diffusion": make_diffusion_stage(model, trainable_of(config, model), config),
            "classifier": make_classifier_stage(model, 4, config),
            "engine": [getattr(each, "func", each).__name__ for each in run.engine],
            "data": read_data(config, monkeypatch),
            "feeds": feeds(run, model, monkeypatch),
            "scores": scores(config, monkeypatch),
        }

    return build


def available(model):
    return [name for name, solver in model.defaults.solvers.items() if not isinstance(solver, str)]


def read_data(config, monkeypatch):
    """What the data sets are read with."""
    for name in ("load_dataset", "load_buckets", "with_prompts"):
        monkeypatch.setattr(data, name, lambda *args, **options: (args, options))
    return data.load_split(config, config.data.test_split), data.load_train_buckets(config)


def feeds(run, model, monkeypatch):
    """Of each stage's training: the batch size, the size of its validation, and the arguments of LPIPS."""
    made, lpips = {}, MagicMock()

    def train(run, name, *_, feed, validate=None, **__):
        made[name] = feed, validate
        return MagicMock()

    params = {"denoiser": {}, "conditioning": {}}
    replaced = {
        **dict.fromkeys(("_preview_reconstructions", "make_preview", "load_first_stage", "share"), MagicMock()),
        **dict.fromkeys(("clip_data", "lora", "textual_inversion"), MagicMock()),
        **dict.fromkeys(("make_feed", "latents_feed"), lambda *args: args[-1]),
        "make_validation": lambda *_, num, batch_size, T=None: (num, batch_size),
        "initial_model": lambda run: (model, params),
        "text_embeddings": SimpleNamespace(freeze=lambda model, *_: (model, {})),
        "clip_of": lambda config, tokenizer: clip_of(config),
        "load_lpips": lpips,
        "_train": train,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(stages, name, value)
    for train_stage in (stages.train_autoencoder, stages.train_clip, stages.train_diffusion, stages.train_classifier):
        train_stage(run)
    return made, lpips.call_args_list


def scores(config, monkeypatch):
    """What images are scored with."""
    calls = []

    def evaluate(images, real, *, extractor, **_):
        calls.append((len(real), extractor))
        return {}

    for name in ("vgg16_features", "inception_features"):
        monkeypatch.setattr(scoring, name, lambda *args, name=name, **options: (name, args, options))
    monkeypatch.setattr(scoring, "evaluate_images", evaluate)
    scoring.score_images(config, np.zeros((2, 8, 8, 1), np.uint8), Images(), Images())
    return calls


def test_every_field_is_here():
    """A new field needs an entry: the parts that it changes, or the test of its effect."""
    fields = io.flatten(defaults.get_config()).keys() - set(OF_THE_JOB)
    assert fields == VALUES.keys() | ELSEWHERE.keys() and not VALUES.keys() & ELSEWHERE.keys()
    for test in ELSEWHERE.values():
        path, name = test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test


@pytest.mark.parametrize("name", VALUES)
def test_each_field_changes_what_is_built(name, built):
    value, parts = VALUES[name]
    needs = NEEDS.get(name, NEEDS.get(name.partition(".")[0], {}))
    before, after = built(needs), built(needs | {name: value})
    assert {part for part in before if before[part] != after[part]} == parts
