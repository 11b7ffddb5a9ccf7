"""Scores a trained model against the test images of its data set.

    python -m ldm_jax.evaluate --model=runs/fashion_mnist [--num=10000] [--sampler=ddim] [--steps=50] [--guidance=2.0]
                               [--eta=0.0] [--seed=0] [--batch_size=100] [--inception_weights=FILE] [--out=FOLDER]

    ... --model=FOLDER|FILE|org/name --config=FILE --out=FOLDER [--prompt=TEXT ...]   a diffusers model names no data:
                               it is scored on those of the config, its data.* and evaluation.* (--config.FIELD=VALUE)

Draws --num pictures and writes evaluation.json, in which every score stands on a card with all that one must know to
compare it, and bound.json, the variational bound in bits per dimension term by term. Default --out: evaluation/ in the
run folder. Of diffusers models there is no bound.
"""

import sys
from pathlib import Path

from absl import flags

from ldm_jax import command_line
from ldm_jax.config import rules as config_rules
from ldm_jax.errors import InputError
from ldm_jax.run_folder import layout as run_folder_layout
from ldm_jax.runtime import files as runtime_files


def define_flags() -> flags.FlagValues:
    """The flags of this command, not yet parsed. None = as in the model's config."""
    values = flags.FlagValues()
    flags.DEFINE_string("inception_weights", None, "the FID Inception's weights, for FID", flag_values=values)
    command_line.define_drawing_flags(values, num=10_000)
    command_line.define_file_flags(values)
    command_line.define_device_flags(values)
    return values


def main(argv: list[str]) -> None:
    """The command."""
    values = define_flags()
    if command_line.wants_help(argv, __doc__, values):
        return
    with_config = any(argument.split("=")[0].split(".")[0] == "--config" for argument in argv[1:])
    command_line.parse(values, argv, config=with_config)
    command_line.require(values, "model", *(["out"] if with_config else []))
    if with_config:
        config_rules.validate(values.config)
    if values.num < 4:
        raise InputError(f"--num={values.num} pictures are too few to score; it must be 4 or more")
    out = Path(values.out or Path(values.model) / "evaluation")
    run_folder_layout.check_folder("out", out)
    command_line.start_devices(values)

    from ldm_jax.data import from_config as data_from_config
    from ldm_jax.evaluation import scoring
    from ldm_jax.interop import hub
    from ldm_jax.pipeline import load as pipeline_load
    from ldm_jax.pipeline.overrides import Extras
    from ldm_jax.sampling import from_flags, recipe, sample_images

    scoring.check_weights(values.inception_weights, "--inception_weights")
    extras = Extras(values.tokenizer, values.prediction, values.vae)
    told = f"--model={values.model} knows no data set; say by --config=FILE what its pictures are to be compared with"
    if not with_config and (hub.is_name(values.model) or pipeline_load.is_pretrained(Path(values.model))):
        raise InputError(told)
    model = pipeline_load.load(hub.find(values.model), values.dtype, extras)
    if with_config:
        config = scoring.with_data_of(model, values.config).unlock()
    elif model.pretrained and not config_rules.tells_texts(model.config):  # fine-tuned: it has seen all its data
        raise InputError(told)
    else:
        config = model.config.copy_and_resolve_references().unlock()
    if values.inception_weights:
        config.evaluation.inception_weights = values.inception_weights
    train_set, test_set = (
        data_from_config.load_split(config, s) for s in (config.data.train_split, config.data.test_split)
    )
    own_texts = model.pretrained and not with_config  # told of texts by a CLIP of its own
    captions = recipe.captions_of(test_set, values.num) if own_texts else None
    wanted = from_flags.from_flags(model, values, list(range(len(model.class_names))), captions)
    drawn = sample_images.draw(model, wanted, batch_size=values.batch_size or config.sampling.batch_size)
    sample_images.save(out, drawn)
    cards = scoring.score(model._replace(config=config.lock()), drawn.images, train_set, test_set, drawn.given)
    if own_texts and wanted.prompts == captions[0]:
        cards["prompts"] = scoring.score_captions(Path(values.model), config, drawn, test_set)
    if not model.pretrained:
        cards["model"] = scoring.score_model(model, test_set, out)
    runtime_files.write_json(out / "evaluation.json", {"recipe": drawn.recipe} | cards)
    for group in ("samples", "prompts", "restored", "baseline", "autoencoder", "model"):
        for name, card in cards.get(group, {}).items():
            print(f"{group:>12} {name:>18} {card['value']:.4g}")
    print(f"Cards: {out / 'evaluation.json'}")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
