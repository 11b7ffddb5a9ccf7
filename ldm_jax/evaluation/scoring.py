"""The scores of a trained model, as cards: of its samples, of what it restores, of its parts, of its likelihood."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.config import rules as config_rules
from ldm_jax.data import from_config as data_from_config
from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError
from ldm_jax.evaluation import clip_scores
from ldm_jax.evaluation.bound import Bound, bound_card, make_bound
from ldm_jax.evaluation.cards import Card, evaluate_images, evaluate_reconstructions
from ldm_jax.evaluation.features import fingerprint, inception_features, lpips_distance, vgg16_features
from ldm_jax.interop.inception_weights import load_inception
from ldm_jax.pipeline import clip as pipeline_clip
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline import from_run
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.pipeline import model as pipeline_model
from ldm_jax.pipeline.from_config import (
    build_conditioner,
    build_first_stage,
    build_map_condition,
    build_process,
    build_unet,
    pixel_levels,
)
from ldm_jax.pipeline.model import Trained
from ldm_jax.runtime import files as runtime_files
from ldm_jax.runtime.parallel import replicate
from ldm_jax.runtime.xla import cache_folder
from ldm_jax.sampling import guidance_models, prompt_sheets
from ldm_jax.sampling.concat_inputs import Given, baseline, from_split
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.sampling.sample_images import Drawn
from ldm_jax.training import from_config as training_from_config
from ldm_jax.training.validation import BUCKETS, examples_used, make_validation


def check_weights(path: str | None, name: str) -> None:
    """Raises InputError, before hours of work, if the file of weights that `name` asks for is missing or damaged."""
    if not path:
        return
    if not Path(path).is_file():
        raise InputError(f"{name}={path} does not exist; it must be a file with the FID Inception's weights")
    load_inception(Path(path))


def with_data_of(model: Trained, given: ConfigDict) -> ConfigDict:
    """A diffusers model's config with the data set and the evaluation of `given`, in the model's own size and colours.

    Raises:
      InputError: the model is a run, must be given a picture to draw from, or draws no square ones.
    """
    if not model.pretrained:
        raise InputError("--config is for diffusers models; a run is scored on the data set of its own config")
    if model.config.concat.kind != "none":
        raise InputError(f"a {model.pretrained.pipeline} draws from a picture that it is given; it cannot be scored")
    height, width = pipeline_from_config.picture_size(model.config)
    if height != width:
        raise InputError(f"the model draws pictures of {height}x{width}; data sets are of square ones")
    config = model.config.copy_and_resolve_references().unlock()
    given = given.copy_and_resolve_references().unlock()
    given.data.update(image_size=height, channels=config.data.channels)
    config.data, config.evaluation = given.data, given.evaluation
    return config.lock()


def score_run(workdir: Path, train_set: Dataset, test_set: Dataset) -> None:
    """Scores the samples that ended a run, and its classifier: leaves evaluation.json in the run folder."""
    config, cards = config_io.from_json(workdir / "config.json"), {}
    wanted = config.sampling.num or config.evaluation.bound_examples
    if "diffusion" in config.stages and not config.init_from and wanted:  # which is drawn by texts, not by test images
        model = pipeline_load.load(workdir)
        if config.sampling.num:
            with np.load(workdir / "samples.npz") as samples:
                images = samples["images"]
            given = from_split(config, test_set, len(images), config.seed) if config.concat.kind != "none" else None
            cards = score(model, images, train_set, test_set, given)
        if config_rules.tells_texts(config):
            cards["prompts"] = score_prompts(workdir, config, train_set, test_set) if config.sampling.num else {}
        else:
            cards["model"] = score_model(model, test_set, workdir)
    if "clip" in config.stages:
        cards["clip"] = score_clip(workdir, config, test_set)
    if "classifier" in config.stages:
        cards["classifier"] = score_classifier(workdir, test_set)
    cards["asked"] = _asked(config)
    if cards.get("samples"):
        cards["recipe"] = read_recipe(workdir / "samples.png")
    runtime_files.write_json(workdir / "evaluation.json", cards)


def score_clip(workdir: Path, config: ConfigDict, test_set: Dataset) -> dict[str, dict[str, Any]]:
    """The cards of a run's CLIP: see `clip_run.score`."""
    return clip_scores.score(
        pipeline_clip.load(workdir, config), test_set, zero_shot_classes(config), config.evaluation.batch_size
    )


def zero_shot_classes(config: ConfigDict) -> Dataset | None:
    """The test split with the classes that CLIP is to tell by their names alone, if the config asks for such."""
    key = config.evaluation.zero_shot_key
    if key == "none":
        return None
    told = config.copy_and_resolve_references().unlock()
    told.data.update(caption_key="none", label_key=key)
    return data_from_config.load_split(told, config.data.test_split)


def score_prompts(
    workdir: Path, config: ConfigDict, train_set: Dataset, test_set: Dataset
) -> dict[str, dict[str, Any]]:
    """How well the run's own CLIP says that its pictures fit their captions, of both splits: see `clip_run.fit`."""
    found, cards = pipeline_clip.load(workdir, config), {}
    with np.load(workdir / "samples.npz") as samples:
        images, labels = samples["images"], samples["labels"]
    prompts = [read_recipe(workdir / "samples.png")["prompts"][label] for label in labels]
    cards |= _fit(found, images, prompts, train_set, config)
    with np.load(workdir / prompt_sheets.FOLDER / "held_out.npz") as samples:
        images, labels = samples["images"], samples["labels"]
    prompts, real = [test_set.class_names[label] for label in labels], prompt_sheets.of_classes(test_set, labels)
    return cards | clip_scores.fit(found, images, prompts, real, test_set.split, config.evaluation.batch_size)


def score_captions(workdir: Path, config: ConfigDict, drawn: Drawn, test_set: Dataset) -> dict[str, dict[str, Any]]:
    """The same of pictures drawn by the captions of the test split's first ones, in their order."""
    prompts = [drawn.recipe["prompts"][label] for label in drawn.labels]
    return _fit(pipeline_clip.load(workdir, config), drawn.images, prompts, test_set, config)


def _fit(
    found: pipeline_clip.TrainedCLIP, images: np.ndarray, prompts: list[str], split: Dataset, config: ConfigDict
) -> dict[str, dict[str, Any]]:
    """`clip_run.fit` beside the split's own first pictures, whose captions the prompts are."""
    real = split[np.arange(len(images)) % len(split)]["x"]
    return clip_scores.fit(found, images, prompts, real, split.split, config.evaluation.batch_size)


def score_classifier(workdir: Path, test_set: Dataset) -> dict[str, Any]:
    """{"accuracy": card, "accuracy_by_t": [10], from clean to noise} of a run's classifier on noised test images."""
    guide = guidance_models.load_classifier(workdir)
    config, num_classes = guide.config, test_set.num_classes
    how_many = {"num": config.evaluation.num_reference, "batch_size": config.evaluation.batch_size}
    validate = make_validation(
        training_from_config.build_classifier_stage(config, num_classes),
        test_set,
        T=config.diffusion.timesteps,
        null_label=num_classes,
        **how_many,
    )
    measured = validate({"classifier": guide.params}, from_run.load_first_stage(workdir, config), config.seed)
    n = examples_used(test_set, **how_many)
    card = Card(
        score="accuracy",
        value=float(measured["validation_accuracy"]),
        better="higher",
        n=n,
        reference=test_set.split,
        reference_n=n,
        reference_sha256=fingerprint(test_set[np.arange(n) % len(test_set)]["x"]),
        method="share of noised latents, t evenly over [0, T), whose own label is the most probable",
    )
    names = (f"validation_accuracy_{k}" for k in range(BUCKETS))
    return {"accuracy": asdict(card), "accuracy_by_t": [float(measured[n]) for n in names if n in measured]}


def is_done(workdir: Path, config: ConfigDict) -> bool:
    """Whether the run folder has the scores and the report of this config."""
    path = workdir / "evaluation.json"
    if not path.exists() or not (workdir / "report.html").exists():
        return False
    return runtime_files.read_json(path).get("asked") == _asked(config)


def _asked(config: ConfigDict) -> str:
    """A hash of all that the end of a run depends on."""
    return config_io.identity(config, ("sampling", "evaluation"))


def score(
    model: Trained, images: np.ndarray, train_set: Dataset, test_set: Dataset, given: Given | None
) -> dict[str, dict[str, Any]]:
    """{"samples": cards, "autoencoder": cards} of generated images uint8 [N, H, W, C]; see `evaluation.cards`.

    With Inception weights in the config, FID and its kin are among the cards. If the images were made of what is known
    of others, "restored" has how near they come to these, and "baseline" how near the same comes without a model.
    """
    fields, cache = model.config.evaluation, cache_folder() / "features"
    reference = test_set[np.arange(min(fields.num_reference, len(test_set)))]["x"]
    train = train_set[np.arange(min(len(train_set), 6 * len(images)))]["x"]
    extractors = [vgg16_features(resize=fields.resize, batch_size=fields.batch_size)]
    if fields.inception_weights:
        extractors.append(inception_features(Path(fields.inception_weights), batch_size=fields.batch_size))
    reconstructions = pipeline_model.reconstructions(model, reference, fields.batch_size)
    resize = 16 if model.config.data.image_size < 16 else None  # VGG16 sees no smaller ones
    lpips = lpips_distance(resize=resize, batch_size=fields.batch_size)
    cards: dict[str, dict[str, Any]] = {"samples": {}, "autoencoder": {}}
    for extractor in extractors:
        cards["samples"] |= evaluate_images(
            images, reference, extractor=extractor, reference_split=test_set.split, train=train,
            reconstructions=reconstructions, seed=model.config.seed, cache=cache
        )  # fmt: skip
        if reconstructions is not None:
            cards["autoencoder"] |= evaluate_reconstructions(
                reference, reconstructions, extractor=extractor, lpips=lpips, split=test_set.split, cache=cache
            )
        plain = None if given is None else baseline(model.config, given)
        if plain is not None and given.originals is not None:
            pair = {"extractor": extractor, "lpips": lpips, "split": test_set.split, "cache": cache}
            for group, restored in (("restored", images), ("baseline", plain)):
                found = evaluate_reconstructions(given.originals, restored, **pair)
                cards[group] = cards.get(group, {}) | found
    return cards


def score_model(model: Trained, test_set: Dataset, folder: Path) -> dict[str, dict[str, Any]]:
    """The card of the model's variational bound on test images, whose terms go to bound.json in `folder`."""
    config, num = model.config, min(model.config.evaluation.bound_examples, len(test_set))
    if not num:
        return {}
    examples = test_set[np.arange(num)]
    bound = build_bound(config, len(model.class_names))(replicate(model.params), examples, config.seed)
    runtime_files.write_json(folder / "bound.json", bound._asdict())
    return bound_card(
        bound,
        examples["x"],
        split=test_set.split,
        latents=config.autoencoder.kind != "none",
        labelled=bool(model.class_names),
        learned=config.diffusion.variance == "learned",
    )


def build_bound(config: ConfigDict, num_classes: int) -> Callable[[Any, dict[str, np.ndarray], int], Bound]:
    """The variational bound of a config's model (see `evaluation.bound.make_bound`)."""
    levels = pixel_levels(config)
    return make_bound(
        unet=build_unet(config),
        conditioner=build_conditioner(config, num_classes),
        first_stage=build_first_stage(config),
        process=build_process(config),
        prediction=config.diffusion.prediction,
        clip=1.0 if levels else float("inf"),
        levels=levels,
        batch_size=config.evaluation.batch_size,
        map_condition=build_map_condition(config),
    )
