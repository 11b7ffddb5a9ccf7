"""The model card of what is handed on: what it is, how it was trained, how good it is and how to draw with it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.evaluation.report import GROUPS, cards

KINDS = {"kl": "a KL-regularised autoencoder", "vq": "a VQ autoencoder"}

TOLD_BY = {  # kind of the map beside the latents -> what it is given, argument of the pipeline, flags of `sample`
    "low_resolution": (
        "a picture of {height}x{width} pixels, which it enlarges",
        'Image.open("small.png")',
        "--concat_image=small.png",
    ),
    "inpainting": (
        "a picture of {height}x{width} pixels and a mask, white where it is drawn; the rest stays as it is",
        '(Image.open("picture.png"), Image.open("mask.png"))',
        "--init_image=picture.png --mask=mask.png",
    ),
    "segments": (
        "a map of {height}x{width} pixels, grey or with a palette, whose values are the numbers of {channels} classes",
        'Image.open("map.png")',
        "--concat_image=map.png",
    ),
}


def of_run(
    config: ConfigDict,
    data: Mapping[str, Any],
    step: int,
    counts: Mapping[str, int],
    evaluation: Any,
    notes: Sequence[str],
    known: Mapping[str, Any],
) -> str:
    """The text of README.md.

    Args:
      config: of the run.
      data: what its data.json holds.
      step: updates behind the diffusion model.
      counts: "autoencoder" and "unet" -> the number of its parameters.
      evaluation: what its evaluation.json holds, {} if there is none.
      notes: what diffusers does otherwise than ldm_jax, in sentences.
      known: the pipeline's arguments for the map beside the latents, {} without one.
    """
    names, fields = data["class_names"], config.data
    told = f"{config.unet.context_tokens} x {config.unet.context_dim} learned numbers"
    size, kind = fields.image_size, "grey" if fields.channels == 1 else "colour"
    parts = [
        "---",
        "library_name: diffusers",
        "tags: [latent-diffusion, ldm_jax]",
        "# license: say here under which licence you publish this",
        "---",
        "",
        f"# Latent diffusion on {fields.name}",
        "",
        f"Draws {kind} pictures of {size}x{size} pixels"
        + (f" of {len(names)} classes: {', '.join(names)}." if names else "; it knows no classes."),
        "",
        f"A latent diffusion model (Rombach et al. 2022) trained with ldm_jax: a UNet of {counts['unet']:,} parameters"
        f" on {_first_stage(config, counts)}{f', told of a class by {told}' if names else ''}. The parameters are"
        " exponential moving averages.",
        "",
        "## Training",
        "",
        *_training(config, data, step),
        "",
        *_scores(evaluation),
        *_drawing(config, names, notes, known),
    ]
    return "\n".join(parts) + "\n"


def of_classes(names: Sequence[str], size: tuple[int, int]) -> str:
    """The text of README.md of a class-conditional model of other people, of pictures of this (height, width)."""
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [latent-diffusion, ldm_jax]",
        "# license: say here under which licence you publish this",
        "---",
        "",
        "# Class-conditional latent diffusion",
        "",
        f"Draws pictures of {size[0]}x{size[1]} pixels of {len(names)} classes: a latent diffusion model (Rombach et"
        " al. 2022), written by ldm_jax.",
        "",
        "In diffusers; `pipeline.py` is code of this folder, so read it before you trust it:",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        'pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)',
        f"images = pipe([0, {len(names) - 1}]).images",
        "```",
        "",
        "In ldm_jax:",
        "",
        "```",
        f"python -m ldm_jax.sample --model=FOLDER --out=samples --label=0,{len(names) - 1}",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _first_stage(config: ConfigDict, counts: Mapping[str, int]) -> str:
    kind, levels = config.autoencoder.type, len(config.autoencoder.block_out_channels)
    if kind == "none":
        return "pixels"
    return (
        f"the {config.autoencoder.latent_channels} channels of {KINDS[kind]} of {counts['autoencoder']:,} parameters"
        f" that divides the size by {2 ** (levels - 1)}"
    )


def _training(config: ConfigDict, data: Mapping[str, Any], step: int) -> Iterator[str]:
    diffusion, autoencoder = config.diffusion, config.autoencoder
    number = f"{data['train']:,} " if "train" in data else ""
    yield f"- Data: {number}pictures of {config.data.name}, split `{config.data.train_split}`."
    if autoencoder.type != "none":
        yield f"- Autoencoder: {autoencoder.steps:,} steps of {autoencoder.batch_size}."
    yield (
        f"- Diffusion: {step:,} steps of {diffusion.batch_size}, learning rate {diffusion.learning_rate:g}; it "
        f"predicts {diffusion.prediction} on the {diffusion.schedule} schedule of {diffusion.timesteps:,} timesteps, "
        f"weighting {diffusion.weighting}, {diffusion.label_dropout:.0%} of the labels left out."
    )
    if data.get("device"):
        yield f"- Device: {data['device']}."
    yield "- All settings: `recipe.json`."


def _scores(evaluation: Any) -> list[str]:
    groups = evaluation.items() if isinstance(evaluation, Mapping) else ()
    found = [(GROUPS.get(name, name), card) for name, group in groups for card in cards(group)]
    if not found:
        return []
    rows = [
        f"| {group} | {card['score']} | {card['value']:.4g} | {card.get('better', '')} | {card['n']:,} | "
        f"{card.get('method', '')}{f', at {resize} pixels' if (resize := card.get('resize')) else ''} |"
        for group, card in found
    ]
    return ["## Scores", "", "| of | score | value | better | images | how |", "|---|---|---|---|---|---|", *rows, ""]


def _drawing(config: ConfigDict, names: Sequence[str], notes: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    sampling = config.sampling
    said = f"{[0, len(names) - 1]}" if names else "num_images=4"
    label = f" --label={','.join(str(k) for k in (0, len(names) - 1))}" if names else ""
    sampler = f"{sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}"
    given = []
    if known:
        (height, width), channels = known["map_size"], known["map_channels"]
        words, argument, flags = TOLD_BY[known["map_kind"]]
        given = [f"It is given {words.format(height=height, width=width, channels=channels)}.", ""]
        said, label = f"{said}, known={argument}", f"{label} {flags}"
    return [
        "## Drawing",
        "",
        *given,
        "In diffusers; `pipeline.py` is code of this folder, so read it before you trust it. What is left out is as in "
        f"the run's config: {sampler}.",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        *(["from PIL import Image"] if known else []),
        "",
        'pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)',
        f"images = pipe({said}).images",
        "```",
        "",
        *(f"- {note}" for note in notes),
        *([""] if notes else []),
        "In ldm_jax, as it is, or as a run folder again:",
        "",
        "```",
        f"python -m ldm_jax.sample --model=FOLDER --out=samples{label}",
        "python -m ldm_jax.convert --model=FOLDER --to=RUN",
        "```",
    ]
