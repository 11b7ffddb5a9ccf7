"""Score cards of a trained model: of its samples, restorations, autoencoder, CLIP, classifier and likelihood."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.config.rules import text_conditioned
from ldm_jax.data.datasets import Dataset
from ldm_jax.data.from_config import load_split
from ldm_jax.errors import InputError
from ldm_jax.evaluation import clip_scores
from ldm_jax.evaluation.cards import (
    NEIGHBOURS,
    Card,
    Cards,
    evaluate_images,
    evaluate_reconstructions,
    reference_fields,
)
from ldm_jax.evaluation.features import (
    FeatureExtractor,
    PerceptualDistance,
    inception_features,
    lpips_distance,
    vgg16_features,
)
from ldm_jax.evaluation.likelihood import make_vlb, vlb_card
from ldm_jax.evaluation.mixed_sheet import NUM, write_mixed_sheet
from ldm_jax.interop.inception_weights import load_inception
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.pipeline.clip import load_clip
from ldm_jax.pipeline.from_config import build_first_stage
from ldm_jax.pipeline.from_run import load_autoencoder_params, load_first_stage
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.runtime.files import read_json, write_json
from ldm_jax.runtime.parallel import map_in_batches, parallel_map, replicate
from ldm_jax.runtime.xla import cache_folder
from ldm_jax.sampling import prompt_sheets
from ldm_jax.sampling.concat_inputs import ConcatImages, baseline, from_split
from ldm_jax.sampling.guidance_models import load_classifier
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.training.from_config import make_classifier_stage
from ldm_jax.training.validation import BUCKETS, examples_used, make_validation


def check_weights(path: str | None, name: str) -> None:
    """Raises InputError if the file of Inception weights of a flag or field `name` is missing or damaged."""
    if path and not Path(path).is_file():
        raise InputError(f"{name}={path} does not exist; it must be a file with the FID Inception's weights")
    if path:
        load_inception(Path(path))


def scores_left_out(num_samples: int, config: ConfigDict, train_set: Dataset, test_set: Dataset) -> str:
    """Which scores are left out as there are too few images, in one line; "" if none are."""
    num_reference = min(config.evaluation.num_reference, len(test_set))
    counts = {"samples": num_samples, "training images": len(train_set), "test images": num_reference}
    few = " and ".join(f"{count} {name}" for name, count in counts.items() if count <= NEIGHBOURS)
    scores = "Fréchet and kernel distance, precision and recall" + (
        " and those of decoding" if num_reference < 2 else ""
    )
    return (
        f"{few}: too few for scores ({scores}), which need {NEIGHBOURS + 1} of each; they are left out" if few else ""
    )


def at_size_of(config: ConfigDict, model: LatentDiffusion) -> ConfigDict:
    """A config with the size and channels of a model's images; InputError if these are not square, or for a model that
    needs an image to sample from."""
    height, width, channels = model.image_shape
    if model.concat:
        raise InputError(f"a {model.origin.pipeline} needs an image to sample from; it cannot be scored")
    if height != width:
        raise InputError(f"the model's images are {height}x{width}; data sets are of square ones")
    config = config.copy_and_resolve_references().unlock()
    config.data.update(image_size=height, channels=channels)
    return config.lock()


def score_run(workdir: Path, train_set: Dataset, test_set: Dataset) -> None:
    """Scores the models of a run and its final samples, and writes evaluation.json in the run folder."""
    config, cards = config_io.from_json(workdir / "config.json"), {}
    num, examples, batch_size = config.sampling.num, config.evaluation.vlb_examples, config.evaluation.batch_size
    if "diffusion" in config.stages and not config.init_from and (num or examples):  # that may train on all its images
        model, params = load(workdir)
        if num:
            with np.load(workdir / "samples.npz") as samples:
                images = samples["images"]
            degraded = from_split(model, test_set, len(images), config.seed, batch_size) if model.concat else None
            cards = score(model, params, config, images, train_set, test_set, degraded)
            if not model.concat:
                write_mixed_sheet(workdir, images, test_set[np.arange(min(NUM, len(test_set)))]["x"], config.seed)
            if text_conditioned(config):
                cards["prompts"] = score_prompts(workdir, config, train_set, test_set)
        cards["model"] = score_likelihood(model, params, config, test_set, workdir)
    elif _trains_autoencoder_alone(config):
        cards["autoencoder"] = score_autoencoder(workdir, config, test_set)
    if "clip" in config.stages:
        clip, classes = load_clip(workdir, config), zero_shot_classes(config)
        cards["clip"] = clip_scores.clip_cards(clip, test_set, classes, batch_size)
    if "classifier" in config.stages:
        cards["classifier"] = score_classifier(workdir, test_set)
    cards["config"] = _identity(config)
    if cards.get("samples"):
        cards["recipe"] = read_recipe(workdir / "samples.png")
    write_json(workdir / "evaluation.json", cards)


def _trains_autoencoder_alone(config: ConfigDict) -> bool:
    """Whether a run trains an autoencoder, and no diffusion model with whose samples it is scored."""
    trained = config.autoencoder.type != "none" and not config.autoencoder.checkpoint
    return trained and "autoencoder" in config.stages and "diffusion" not in config.stages


def score_autoencoder(workdir: Path, config: ConfigDict, test_set: Dataset) -> Cards:
    """The cards of a run's autoencoder on test images, see `cards.evaluate_reconstructions`; {} for fewer than two."""
    reference = _reference(config, test_set)
    if len(reference) < 2:
        return {}
    params, batch_size = load_autoencoder_params(workdir), config.evaluation.batch_size
    decoded = _decoded(build_first_stage(config), params, reference, batch_size)
    options = {"lpips": _lpips(config, reference), "cache": cache_folder() / "features", "split": test_set.split}
    cards: Cards = {}
    for extractor in _extractors(config):
        cards |= evaluate_reconstructions(reference, decoded, extractor=extractor, **options)
    return cards


def zero_shot_classes(config: ConfigDict) -> Dataset | None:
    """The test split with the labels of CLIP's zero-shot accuracy; None without `evaluation.zero_shot_key`."""
    key = config.evaluation.zero_shot_key
    if key == "none":
        return None
    labelled = config.copy_and_resolve_references().unlock()
    labelled.data.update(caption_key="none", label_key=key)
    return load_split(labelled, config.data.test_split)


def score_prompts(workdir: Path, config: ConfigDict, train_set: Dataset, test_set: Dataset) -> Cards:
    """The cards of a run's samples with the captions of both splits, by its CLIP: see `clip_scores.prompt_cards`."""
    with np.load(workdir / "samples.npz") as samples:
        images, labels = samples["images"], samples["labels"]
    prompts = [read_recipe(workdir / "samples.png")["prompts"][label] for label in labels]
    cards = score_captions(workdir, config, images, prompts, train_set)
    with np.load(workdir / prompt_sheets.FOLDER / "held_out.npz") as samples:
        images, labels = samples["images"], samples["labels"]
    prompts, real = [test_set.class_names[label] for label in labels], prompt_sheets.of_classes(test_set, labels)
    clip, batch_size = load_clip(workdir, config), config.evaluation.batch_size
    return cards | clip_scores.prompt_cards(clip, images, prompts, real, test_set.split, batch_size)


def score_captions(workdir: Path, config: ConfigDict, images: np.ndarray, prompts: list[str], split: Dataset) -> Cards:
    """The same cards of samples uint8 [N, H, W, C] whose prompts are the captions of a split's first images."""
    real = split[np.arange(len(images)) % len(split)]["x"]
    clip, batch_size = load_clip(workdir, config), config.evaluation.batch_size
    return clip_scores.prompt_cards(clip, images, prompts, real, split.split, batch_size)


def score_classifier(workdir: Path, test_set: Dataset) -> dict[str, Any]:
    """{"accuracy": card, "accuracy_by_t": [10] from clean to noise} of a run's classifier on noised test images."""
    classifier = load_classifier(workdir)
    model = classifier.model
    config = model.origin.config
    batch = {"num": config.evaluation.num_reference, "batch_size": config.evaluation.batch_size}
    stage = make_classifier_stage(model, test_set.num_classes, config)
    validate = make_validation(stage, test_set, T=len(model.process), **batch)
    params = {"classifier": classifier.params}
    measured = validate(params, load_first_stage(workdir, config), config.seed)
    n = examples_used(test_set, **batch)
    reference = reference_fields(test_set.split, test_set[np.arange(n) % len(test_set)]["x"])
    method = "fraction of noised latents, t uniform over [0, T), whose label is the most probable"
    accuracy = float(measured["validation_accuracy"])
    card = Card(score="accuracy", value=accuracy, better="higher", n=n, method=method, **reference)
    names = (f"validation_accuracy_{k}" for k in range(BUCKETS))
    return {"accuracy": asdict(card), "accuracy_by_t": [float(measured[n]) for n in names if n in measured]}


def is_done(workdir: Path, config: ConfigDict) -> bool:
    """Whether a run folder has the scores and the report of this config."""
    path = workdir / "evaluation.json"
    if not path.exists() or not (workdir / "report.html").exists():
        return False
    cards = read_json(path)
    return cards.get("config", cards.get("asked")) == _identity(config)  # "asked" in versions before 0.2


def _identity(config: ConfigDict) -> str:
    """A hash of the fields that the scores of a run depend on and that may change in it."""
    return config_io.identity(config, ("sampling", "evaluation", *config_io.training_fields(config)))


def score(
    model: LatentDiffusion,
    params: Params,
    config: ConfigDict,
    images: np.ndarray,
    train_set: Dataset,
    test_set: Dataset,
    concat_images: ConcatImages | None,
) -> dict[str, Cards]:
    """The cards {"samples": ..., "autoencoder": ...} of samples uint8 [N, H, W, C]; see `evaluation.cards`.

    With Inception weights in the config, FID, KID, precision and recall on its features are among them. Of samples that
    restore degraded images (`concat_images`), "restored" has their distances from the originals, "baseline" those of
    interpolation. Without enough images for a score it is left out, see `scores_left_out`.
    """
    fields, cache = config.evaluation, cache_folder() / "features"
    reference, train = _real_images(config, len(images), train_set, test_set)
    reconstructions = reconstruct(model, params, reference, fields.batch_size)
    enough = min(map(len, (images, reference, train))) > NEIGHBOURS
    lpips = _lpips(config, reference)
    plain = None if concat_images is None else baseline(model, concat_images)
    cards: dict[str, Cards] = {"samples": {}, "autoencoder": {}}
    for extractor in _extractors(config):
        options = {"extractor": extractor, "cache": cache}
        real = {"reference_split": test_set.split, "train": train, "reconstructions": reconstructions}
        if enough:
            cards["samples"] |= evaluate_images(images, reference, **real, seed=config.seed, **options)
        options |= {"lpips": lpips, "split": test_set.split}
        if reconstructions is not None and len(reference) > 1:
            cards["autoencoder"] |= evaluate_reconstructions(reference, reconstructions, **options)
        if plain is not None and concat_images.originals is not None and len(images) > 1:
            for group, restored in (("restored", images), ("baseline", plain)):
                restored_cards = evaluate_reconstructions(concat_images.originals, restored, **options)
                cards[group] = cards.get(group, {}) | restored_cards
    return cards


def score_images(config: ConfigDict, images: np.ndarray, train_set: Dataset, test_set: Dataset) -> Cards:
    """The cards of generated images uint8 [N, H, W, C] alone, made by any program; see `evaluation.cards`."""
    reference, train = _real_images(config, len(images), train_set, test_set)
    cards: Cards = {}
    for extractor in _extractors(config):
        options = {"extractor": extractor, "cache": cache_folder() / "features", "seed": config.seed}
        cards |= evaluate_images(images, reference, reference_split=test_set.split, train=train, **options)
    return cards


def _real_images(config: ConfigDict, num: int, train_set: Dataset, test_set: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The test images to compare with, and training images for the floor of `num` samples."""
    return _reference(config, test_set), train_set[np.arange(min(len(train_set), 6 * num))]["x"]


def _reference(config: ConfigDict, test_set: Dataset) -> np.ndarray:
    return test_set[np.arange(min(config.evaluation.num_reference, len(test_set)))]["x"]


def _lpips(config: ConfigDict, images: np.ndarray) -> PerceptualDistance:
    """LPIPS of images of this size; VGG16's smallest input has 16 pixels."""
    return lpips_distance(resize=16 if images.shape[1] < 16 else None, batch_size=config.evaluation.batch_size)


def _extractors(config: ConfigDict) -> list[FeatureExtractor]:
    """The feature spaces of the scores: VGG16's and, with its weights, Inception's."""
    fields = config.evaluation
    extractors = [vgg16_features(resize=fields.resize, batch_size=fields.batch_size)]
    if fields.inception_weights:
        extractors.append(inception_features(Path(fields.inception_weights), batch_size=fields.batch_size))
    return extractors


def reconstruct(model: LatentDiffusion, params: Params, images: np.ndarray, batch_size: int) -> np.ndarray | None:
    """Images uint8 [N, H, W, C] encoded and decoded; None in pixel space, which has no autoencoder."""
    if model.first_stage.module is None:
        return None
    return _decoded(model.first_stage, params["first_stage"], images, batch_size)


def _decoded(first_stage: FirstStage, params: Params, images: np.ndarray, batch_size: int) -> np.ndarray:
    reconstruct = parallel_map(lambda params, batch: first_stage.reconstruct(params, batch["x"]))
    return map_in_batches(reconstruct, replicate(params), {"x": images}, batch_size)


def score_likelihood(
    model: LatentDiffusion, params: Params, config: ConfigDict, test_set: Dataset, folder: Path
) -> Cards:
    """The card of the VLB of the first `evaluation.vlb_examples` test images, in bits per dimension.

    Writes the VLB's terms to `folder`/bits_per_dim.json. `test_set` has images of the model's size.
    """
    num = min(config.evaluation.vlb_examples, len(test_set))
    if not num:
        return {}
    examples = test_set[np.arange(num)]
    cond, condition = condition_rows(model, test_set, examples)
    examples = {name: examples[name] for name in ("x", "segments") if name in examples} | {"cond": cond}
    vlb = make_vlb(model, config.evaluation.batch_size)(replicate(params), examples, config.seed)
    write_json(folder / "bits_per_dim.json", vlb._asdict())
    return vlb_card(model, vlb, examples["x"], split=test_set.split, condition=condition)


def condition_rows(model: LatentDiffusion, dataset: Dataset, examples: dict[str, np.ndarray]) -> tuple[Any, str]:
    """The conditioning table's rows [N, ...] of examples, and their condition: "class", "caption" or "" (null)."""
    labels, condition = examples.get("label", np.full(len(examples["x"]), -1, np.int32)), ""
    if isinstance(model.conditioning, TextConditioning):
        present, condition = np.unique(labels[labels >= 0]), "caption"
        captions = [dataset.class_names[label] for label in present]
        table, _ = model.conditioning.table(captions, None, model.image_shape[:2])
        labels = np.where(labels < 0, -1, np.searchsorted(present, labels))
    else:
        table = model.conditioning.table()
        if model.class_names and dataset.class_names == model.class_names:
            condition = "class"
        else:
            labels = np.full(len(labels), -1, np.int32)
    return jax.tree.map(lambda rows: np.asarray(rows)[labels], table), condition
