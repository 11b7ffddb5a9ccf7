"""The model card of an exported model: its data, training, scores and use."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.evaluation.report import GROUPS, cards

AUTOENCODERS = {"kl": "a KL-regularised autoencoder", "vq": "a VQ autoencoder"}

# map_kind, the type of concat conditioning -> its description, arguments of the pipeline, flags of `sample`.
CONCAT = {
    "low_resolution": (
        "the low-resolution image of {height}x{width} pixels",
        'image=Image.open("small.png")',
        "--concat_image=small.png",
    ),
    "inpainting": (
        "an image of {height}x{width} pixels and a mask, white where it is sampled; the other pixels are kept",
        'image=Image.open("image.png"), mask_image=Image.open("mask.png")',
        "--init_image=image.png --mask=mask.png",
    ),
    "segments": (
        "a segmentation map of {height}x{width} pixels, grey or with a palette, of the numbers of {channels} classes",
        'image=Image.open("segmentation.png")',
        "--concat_image=segmentation.png",
    ),
}
HEADER = """---
library_name: diffusers
tags: [latent-diffusion, ldm_jax]
# license: say here under which licence you publish this
---"""
TRUST = "In diffusers (`pipeline.py` is code of this folder, so read it before you trust it"


def of_run(
    config: ConfigDict,
    data: Mapping[str, Any],
    step: int,
    counts: Mapping[str, int],
    evaluation: Any,
    notes: Sequence[str],
    concat: Mapping[str, Any],
    ema_sigma_rel: float | None = None,
    guided: bool = False,
) -> str:
    """The README.md of a run's model.

    Args:
      config: of the run.
      data: its data.json.
      step: updates of the denoiser.
      counts: "autoencoder" and "unet" -> number of parameters.
      evaluation: its evaluation.json, {} if there is none.
      notes: sentences on how sampling in diffusers differs from ldm_jax.
      concat: the pipeline's arguments for concat conditioning, {} without it.
      ema_sigma_rel: the length of the power function average that the parameters are; None: the EMA.
      guided: whether the earlier checkpoint of autoguidance is there, as `guide_unet`.
    """
    names, fields, sampling = data["class_names"], config.data, config.sampling
    embedding = f"{config.unet.context_tokens} x {config.unet.context_dim}"
    colour, size = "grey" if fields.channels == 1 else "colour", f"{fields.image_size}x{fields.image_size}"
    classes = f" of {len(names)} classes: {', '.join(names)}." if names else "; it is unconditional."
    conditional = f", with a class embedding of {embedding} numbers" if names else ""
    inputs, arguments = [], f"{[0, len(names) - 1]}" if names else "num_images=4"
    flags = f" --label=0,{len(names) - 1}" if names else ""
    if concat:
        (height, width), channels = concat["map_size"], concat["map_channels"]
        words, images, image_flags = CONCAT[concat["map_kind"]]
        inputs = [f"It is conditioned on {words.format(height=height, width=width, channels=channels)}."]
        arguments, flags = f"{arguments}, {images}", f"{flags} {image_flags}"
    sampler = f"{sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}"
    if 0 < sampling.guide_step < step and sampling.guidance > 1 and guided:
        sampler += f" away from the null condition of the checkpoint of step {sampling.guide_step:,} (autoguidance)"
    return _card(
        f"# Latent diffusion on {fields.name}",
        f"Samples {colour} images of {size} pixels{classes}",
        f"A latent diffusion model (Rombach et al. 2022) trained with ldm_jax: a UNet of {counts['unet']:,} parameters"
        f" on {_first_stage(config, counts)}{conditional}. {_averaged(ema_sigma_rel)}",
        "## Training",
        "\n".join(_training(config, data, step)),
        *_scores(evaluation),
        "## Sampling",
        *inputs,
        f"{TRUST}), by default as in the run's config: {sampler}.",
        _python(arguments, "\nfrom PIL import Image" if concat else ""),
        *(["\n".join(f"- {note}" for note in notes)] if notes else []),
        "In ldm_jax, or restored as a run folder:",
        f"```\npython -m ldm_jax.sample --model=FOLDER --out=samples{flags}\n"
        "python -m ldm_jax.convert --model=FOLDER --to=RUN\n```",
    )


def of_classes(names: Sequence[str], size: tuple[int, int]) -> str:
    """The README.md of a class-conditional model that ldm_jax did not train, of images of this (height, width)."""
    labels = [0, len(names) - 1]
    return _card(
        "# Class-conditional latent diffusion",
        f"Samples images of {size[0]}x{size[1]} pixels of {len(names)} classes: a latent diffusion model (Rombach et"
        " al. 2022), written by ldm_jax.",
        f"{TRUST}):",
        _python(f"{labels}"),
        "In ldm_jax:",
        f"```\npython -m ldm_jax.sample --model=FOLDER --out=samples --label={labels[0]},{labels[1]}\n```",
    )


def _card(*paragraphs: str) -> str:
    return "\n\n".join((HEADER, *paragraphs)) + "\n"


def _python(arguments: str, imports: str = "") -> str:
    """A call of the pipeline, in Markdown."""
    return f"""```python
from diffusers import DiffusionPipeline{imports}

pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
images = pipe({arguments}).images
```"""


def _first_stage(config: ConfigDict, counts: Mapping[str, int]) -> str:
    autoencoder = config.autoencoder
    if autoencoder.type == "none":
        return "pixels"
    return (
        f"latents of {autoencoder.latent_channels} channels of {AUTOENCODERS[autoencoder.type]} of "
        f"{counts['autoencoder']:,} parameters, downsampled by {2 ** (len(autoencoder.block_out_channels) - 1)}"
    )


def _averaged(sigma_rel: float | None) -> str:
    if sigma_rel is None:
        return "The parameters are exponential moving averages (EMA)."
    return f"The parameters are power function averages of length sigma_rel {sigma_rel:g} (Karras et al. 2024)."


def _training(config: ConfigDict, data: Mapping[str, Any], step: int) -> list[str]:
    diffusion, autoencoder = config.diffusion, config.autoencoder
    number = f"{data['train']:,} " if "train" in data else ""
    lines = [f"- Data: {number}images of {config.data.name}, split `{config.data.train_split}`."]
    if autoencoder.type != "none":
        lines.append(f"- Autoencoder: {autoencoder.steps:,} steps, batch size {autoencoder.batch_size}.")
    lines.append(
        f"- Diffusion: {step:,} steps, batch size {diffusion.batch_size}, learning rate {diffusion.learning_rate:g}, "
        f"{diffusion.prediction} prediction, {diffusion.schedule} schedule of {diffusion.timesteps:,} timesteps, "
        f"weighting {diffusion.weighting}, label dropout {diffusion.label_dropout:.0%}."
    )
    if data.get("device"):
        lines.append(f"- Device: {data['device']}.")
    return [*lines, "- All settings: `recipe.json`."]


def _scores(evaluation: Any) -> list[str]:
    groups = evaluation.items() if isinstance(evaluation, Mapping) else ()
    rows = [
        f"| {GROUPS.get(name, name)} | {card['score']} | {card['value']:.4g} | {card.get('better', '')} | "
        f"{card['n']:,} | {card.get('method', '')}{f', at {resize} pixels' if (resize := card.get('resize')) else ''} |"
        for name, group in groups
        for card in cards(group)
    ]
    header = ["| of | score | value | better | images | how |", "|---|---|---|---|---|---|"]
    return ["## Scores", "\n".join(header + rows)] if rows else []
