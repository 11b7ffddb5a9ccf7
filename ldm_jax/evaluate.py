"""Evaluates a model on the test images of its data set: FD, KID, precision, recall, reconstruction and likelihood.

    python -m ldm_jax.evaluate --model=runs/fashion_mnist [--num=10000] [--sampler=ddim] [--steps=50] [--guidance=2.0]
                               [--eta=0.0] [--seed=0] [--batch_size=100] [--inception_weights=FILE] [--out=FOLDER]

    ... --model=FOLDER|FILE|org/name --config=FILE --out=FOLDER [--prompt=TEXT ...]   evaluates a diffusers model
                               by data.* and evaluation.* of the config (--config.FIELD=VALUE)

    ... --images=FOLDER|FILE.npz --config=FILE --out=FOLDER   scores images made elsewhere on the data set of the config

Samples --num images and writes evaluation.json, with a card for each score, and bits_per_dim.json, the terms of the
variational bound in bits per dimension. Default --out: evaluation/ in the run folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from ldm_jax import command_line
from ldm_jax.config.rules import text_conditioned, validate
from ldm_jax.errors import InputError
from ldm_jax.run_folder import layout as run_folder_layout
from ldm_jax.runtime.object_store import is_url

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from ldm_jax.pipeline.model import LatentDiffusion


def define_flags() -> flags.FlagValues:
    """The flags of this command, not yet parsed. None = as in the model's config."""
    values = flags.FlagValues()
    images = "in place of --model: a folder of images, or an .npz with `images` uint8 [N, H, W, C]"
    flags.DEFINE_string("images", None, images, flag_values=values)
    flags.DEFINE_string("inception_weights", None, "the FID Inception's weights, for FID", flag_values=values)
    command_line.define_sampling_flags(values, num=10_000)
    command_line.define_file_flags(values)
    command_line.define_ema_flag(values)
    command_line.define_device_flags(values)
    return values


def main(argv: list[str]) -> None:
    """The command."""
    values = define_flags()
    if command_line.wants_help(argv, __doc__, values):
        return
    with_config = any(argument.split("=")[0].split(".")[0] == "--config" for argument in argv[1:])
    command_line.parse(values, argv, config=with_config)
    command_line.require(values, *(["images"] if values.images else ["model"]), *(["out"] if with_config else []))
    if values.images and (values.model or not with_config):
        raise InputError("--images needs --config=FILE, whose data set it is scored on, and no --model")
    if values.images:
        _refuse_sampling(values)
    if with_config:
        validate(values.config)
    if values.num < 4:
        raise InputError(f"--num={values.num} images are too few to score; it must be 4 or more")
    if not values.out and is_url(values.model):
        raise InputError(f"--out is missing; of --model={values.model} it must be a local folder")
    out = Path(values.out or Path(values.model) / "evaluation")
    run_folder_layout.check_output(out)
    command_line.start_devices(values)
    if values.images:
        _score_generated(values, out)
        return

    from ldm_jax.data.from_config import load_split
    from ldm_jax.evaluation import scoring
    from ldm_jax.pipeline.data_record import check_unchanged, data_record
    from ldm_jax.pipeline.load import Overrides, has_data, load
    from ldm_jax.runtime.files import write_json
    from ldm_jax.sampling.from_flags import recipe_from_flags
    from ldm_jax.sampling.recipe_of_run import captions_of
    from ldm_jax.sampling.sample_images import sample_images, save

    scoring.check_weights(values.inception_weights, "--inception_weights")
    no_data = f"--model={values.model} has no data set to be compared with; set one by --config=FILE"
    if not with_config and not has_data(values.model):
        raise InputError(no_data)
    overrides = Overrides(values.tokenizer, values.prediction, values.vae)
    model, params = load(values.model, values.dtype, overrides, ema_sigma_rel=values.ema_sigma_rel)
    config = _config(values, model, with_config, no_data)
    train_set, test_set = (load_split(config, split) for split in (config.data.train_split, config.data.test_split))
    if not with_config:
        check_unchanged(model.origin.data, data_record(train_set, test_set), f"--model={values.model}")
    if few := scoring.scores_left_out(values.num, config, train_set, test_set):
        raise InputError(few.removesuffix("; they are left out"))
    by_caption = text_conditioned(config) and not with_config
    captions = captions_of(test_set, values.num) if by_caption else None
    recipe = recipe_from_flags(model, values, list(range(len(model.class_names))), captions)
    recipe = recipe._replace(num=values.num)  # of --prompt too, whose prompts take turns
    samples = sample_images(model, params, recipe, batch_size=values.batch_size or config.sampling.batch_size)
    save(out, samples)
    cards = scoring.score(model, params, config, samples.images, train_set, test_set, samples.concat_images)
    if by_caption and recipe.prompts == captions[0]:
        prompts = [recipe.prompts[label] for label in samples.labels]
        cards["prompts"] = scoring.score_captions(model.origin.path, config, samples.images, prompts, test_set)
    cards["model"] = scoring.score_likelihood(model, params, config, test_set, out)
    write_json(out / "evaluation.json", {"recipe": samples.recipe} | cards)
    _print(cards, out)


def _print(cards: dict[str, Any], out: Path) -> None:
    """Prints the value of each card, and where they are."""
    for group in ("samples", "prompts", "restored", "baseline", "autoencoder", "model"):
        for name, card in cards.get(group, {}).items():
            print(f"{group:>12} {name:>18} {card['value']:.4g}")
    print(f"Cards: {out / 'evaluation.json'}")


def _refuse_sampling(values: flags.FlagValues) -> None:
    """Raises InputError for a flag that is of samples: those of --images are made."""
    hosts = flags.FlagValues()
    command_line.define_device_flags(hosts)
    for name in values:
        scoring = name in ("images", "out", "inception_weights", *hosts) or name.split(".")[0] == "config"
        if values[name].present and not scoring:
            raise InputError(f"--{name} is for sampling from --model; --images are all scored, as they are")


def _score_generated(values: flags.FlagValues, out: Path) -> None:
    """Scores the images of --images on the data set of --config."""
    from ldm_jax.data.from_config import load_split
    from ldm_jax.evaluation import scoring
    from ldm_jax.evaluation.generated import read_generated
    from ldm_jax.runtime.files import write_json

    config = values.config.copy_and_resolve_references().unlock()
    if values.inception_weights:
        config.evaluation.inception_weights = values.inception_weights
    scoring.check_weights(config.evaluation.inception_weights, "--inception_weights")
    images = read_generated(Path(values.images), size=config.data.image_size, channels=config.data.channels)
    train_set, test_set = (load_split(config, split) for split in (config.data.train_split, config.data.test_split))
    if few := scoring.scores_left_out(len(images), config, train_set, test_set):
        raise InputError(few.removesuffix("; they are left out"))
    cards = {"samples": scoring.score_images(config.lock(), images, train_set, test_set)}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", {"images": str(values.images), "num": len(images)} | cards)
    _print(cards, out)


def _config(values: flags.FlagValues, model: LatentDiffusion, with_config: bool, no_data: str) -> ConfigDict:
    """The config with the model's data and evaluation: --config, or that of the run that trained the model."""
    from ldm_jax.evaluation.scoring import at_size_of

    trained_by = model.origin.config
    if with_config:
        if trained_by is not None and not trained_by.init_from:
            raise InputError("--config is for diffusers models; a run is scored on the data set of its own config")
        config = at_size_of(values.config, model).unlock()
    elif trained_by is None or trained_by.init_from:  # fine-tuning may train on all its images
        raise InputError(no_data)
    else:
        config = trained_by.copy_and_resolve_references().unlock()
    if values.inception_weights:
        config.evaluation.inception_weights = values.inception_weights
    return config.lock()


if __name__ == "__main__":
    sys.exit(command_line.run(main))
