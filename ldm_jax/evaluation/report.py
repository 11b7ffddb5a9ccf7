"""report.html: a run's samples, scores, training curves and times, from the run folder alone.

Whatever the folder does not hold (yet) is left out, so a report can be made at any time.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldm_jax.config.renamed import rename_saved
from ldm_jax.errors import InputError
from ldm_jax.evaluation import page
from ldm_jax.evaluation.charts import Series, bar_chart, line_chart, number
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.runtime.files import atomic, read_json
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.sampling.recipe import from_json

MOMENTS = 12  # at most so many images behind a slider
STAGES = {
    "autoencoder": "Stage 1: autoencoder",
    "latents": "Latents: cache and scale",
    "clip": "CLIP: images and captions",
    "diffusion": "Stage 2: diffusion model",
    "classifier": "Classifier of noisy latents",
    "sampling": "Sampling",
    "prompts": "Sampling by prompts",
    "scoring": "Scores",
}
# Groups of cards in evaluation.json.
GROUPS = {
    "samples": "The samples",
    "prompts": "How the samples fit their prompts",
    "clip": "CLIP on held-out images",
    "restored": "Restored test images",
    "baseline": "The same by interpolation",
    "autoencoder": "The autoencoder alone",
    "model": "The model's likelihood",
    "classifier": "The classifier",
}
# The terms of the autoencoder's loss worth a chart of their own, as they are named in metrics.jsonl.
AUTOENCODER_TERMS = {
    "l1": "Reconstruction: mean |x - x_hat|",
    "perceptual": "Perceptual: LPIPS",
    "kl": "KL, nats per pixel",
    "codes_used": "Fraction of the codebook in use",
    "discriminator": "Discriminator: hinge loss",
}


def write_report(workdir: Path) -> Path:
    """Writes `workdir`/report.html, whole or not at all, and returns its path.

    Raises:
        InputError: `workdir` is no folder, or a file in it is damaged.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"there is no run folder {workdir} to report on")
    config, about, evaluation = (_optional(workdir / f"{name}.json") for name in ("config", "data", "evaluation"))
    config = rename_saved(config)
    metrics = read_metrics(workdir / "metrics.jsonl")
    html = page.page(
        _title(config, workdir),
        _subtitle(about, metrics),
        [
            _samples(workdir),
            _scores(evaluation),
            _prompts(workdir),
            _progress(workdir),
            _reconstructions(workdir),
            _curves(metrics),
            _timings(metrics),
            _recipe(config, about),
        ],
    )
    with atomic(workdir / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return workdir / "report.html"


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _title(config: Mapping[str, Any], workdir: Path) -> str:
    name = config.get("data", {}).get("name", workdir.name).replace("_", " ")
    stages, pixels = config.get("stages", ["diffusion"]), config.get("autoencoder", {}).get("type") == "none"
    if "diffusion" not in stages:
        return f"{' and '.join(stages).capitalize()} of {name}"
    return f"{'Pixel' if pixels else 'Latent'} diffusion on {name}"


def _subtitle(about: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    facts = []
    if "train" in about:
        facts.append(f"Trained on {about['train']:,} images")
    if "device" in about:
        facts.append(f"on {about['device']}")
    if metrics:
        facts.append(f"in {duration(metrics[-1]['time'])}")
    return " ".join(facts)


def duration(seconds: float) -> str:
    """34 s, 5 min 20 s, 3 h 04 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _samples(workdir: Path) -> str:
    try:
        recipe = from_json(read_recipe(workdir / "samples.png"), "samples.png")
        solving, guidance = recipe.solving, recipe.guidance
        caption = f"{solving.sampler}, {solving.steps} steps, guidance {guidance.scale}, seed {recipe.seed}"
        if recipe.prompts:
            caption += f". Prompts: {', '.join(f'“{prompt}”' for prompt in recipe.prompts)}"
    except InputError:  # without a recipe
        caption = ""
    grid = page.image(workdir / "samples.png", "A grid of samples, one row for each class", caption)
    trajectory = page.image(workdir / "denoising.gif", "The denoised samples at each step", "From noise to image")
    return page.section("Samples", grid, trajectory, note=NOT_PICKED)


NOT_PICKED = "The first samples of the seed, none of them picked."
SHEETS = {
    "training": "Captions of the training split, each with a training image first",
    "held_out": "Captions of the test split, each with a test image first",
    "made_up": "Captions of no image",
    "guidance": "Guidance scales from 0 (unconditional) to 8",
}


def _prompts(workdir: Path) -> str:
    sheets = (page.image(workdir / "prompts" / f"{name}.png", text, text) for name, text in SHEETS.items())
    return page.section("By prompts", *sheets, note=NOT_PICKED)


def cards(evaluation: Any) -> Iterator[Mapping[str, Any]]:
    """All score cards in evaluation.json, however they are grouped there."""
    if isinstance(evaluation, Mapping):
        if {"score", "value", "n"} <= evaluation.keys():
            yield evaluation
        else:
            for value in evaluation.values():
                yield from cards(value)
    elif isinstance(evaluation, list):
        for value in evaluation:
            yield from cards(value)


def _scores(evaluation: Mapping[str, Any]) -> str:
    groups = evaluation if isinstance(evaluation, Mapping) else {"": evaluation}
    boxes = {name: "".join(map(_card, cards(group))) for name, group in groups.items()}
    return page.section(
        "Scores",
        *(page.group(GROUPS.get(name, ""), f'<div class="cards">{box}</div>') for name, box in boxes.items() if box),
        note="Compare only scores with the same images, reference, resize and weights. The floor is what real training "
        "images score.",
    )


def _card(card: Mapping[str, Any]) -> str:
    """One score: its value, the floor and the autoencoder's own to compare with, and how it was measured."""
    arrow = {"lower": "↓ better", "higher": "↑ better"}.get(card.get("better", ""), "")
    bars = [
        ("this run", card["value"], "s0"),
        ("autoencoder", card.get("autoencoder"), "s1"),
        ("floor", card.get("floor"), ""),
    ]
    bars = [bar for bar in bars if bar[1] is not None]
    most = max(max(value for _, value, _ in bars), 1e-12)
    meter = "".join(
        f'<span>{name}</span><i class="{color}" style="width:{100 * max(0.0, value) / most:.1f}%"></i>'
        f"<span>{number(value)}</span>"
        for name, value, color in bars
    )
    print_ = [f"{card['n']:,} images against {card['reference_n']:,} of “{card['reference']}”", card.get("method")]
    if card.get("resize"):
        print_.append(f"at {card['resize']} pixels")
    if card.get("weights_sha256"):
        print_.append(f"weights {card['weights_sha256'][:12]}")
    spread = f" <small>± {number(card['std'])}</small>" if card.get("std") is not None else ""
    return (
        f'<div class="card"><h3>{escape(card["score"])}<span>{arrow}</span></h3>'
        f'<div class="value">{number(card["value"])}{spread}</div>'
        + (f'<div class="meter">{meter}</div>' if len(bars) > 1 else "")
        + f'<p class="small">{escape("; ".join(text for text in print_ if text))}</p></div>'
    )


def _moments(workdir: Path, stage: str) -> list[tuple[str, Path]]:
    """("step 500", file) for the images made while training, evenly thinned to `MOMENTS`, first and last kept."""
    found = []
    for path in workdir.glob(f"progress/{stage}_*.png"):
        if step := re.fullmatch(rf"{stage}_(\d+)", path.stem):
            found.append((int(step[1]), path))
    found.sort()
    if len(found) > MOMENTS:
        found = [found[round(k * (len(found) - 1) / (MOMENTS - 1))] for k in range(MOMENTS)]
    return [(f"step {step:,}", path) for step, path in found]


def _progress(workdir: Path) -> str:
    return page.section(
        "Samples during training",
        page.slider(_moments(workdir, "diffusion"), "Samples while training"),
        note="The same noise each time, as training goes on.",
    )


def _reconstructions(workdir: Path) -> str:
    return page.section(
        "Reconstructions of the autoencoder",
        page.slider(_moments(workdir, "autoencoder"), "Test images and their reconstructions"),
        note="Test images, encoded and decoded.",
    )


def _series(metrics: Sequence[Mapping[str, Any]], stage: str, name: str) -> tuple[list[float], list[float]]:
    lines = [line for line in metrics if line["stage"] == stage and name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    panels = [
        ("Diffusion loss", _training_and_validation(metrics, "diffusion", "loss")),
        ("Validation loss by timestep", _buckets(metrics, "diffusion", "loss")),
        ("CLIP: contrastive loss", _training_and_validation(metrics, "clip", "loss")),
        ("Classifier: cross-entropy", _training_and_validation(metrics, "classifier", "loss")),
        ("Classifier: accuracy", _training_and_validation(metrics, "classifier", "accuracy")),
        ("Classifier: validation accuracy by timestep", _buckets(metrics, "classifier", "accuracy")),
    ]
    for name, caption in AUTOENCODER_TERMS.items():
        term = Series(name, *_series(metrics, "autoencoder", name))
        panels.append((caption, line_chart([term], x_label="step", y_label=name)))
    for stage in ("autoencoder", "clip", "diffusion", "classifier"):
        speed = Series(stage, *_series(metrics, stage, "examples_per_second"))
        chart = line_chart([speed], x_label="step", y_label="images / s", from_zero=True)
        panels.append((f"Training speed, {stage}", chart))
    return page.section("Curves", page.columns(*(page.panel(caption, chart) for caption, chart in panels)))


def _training_and_validation(metrics: Sequence[Mapping[str, Any]], stage: str, name: str) -> str:
    validation = Series("validation", *_series(metrics, stage, f"validation_{name}"), trend=False)
    training = Series("training", *_series(metrics, stage, name))
    return line_chart([training, validation], x_label="step", y_label=name)


def _buckets(metrics: Sequence[Mapping[str, Any]], stage: str, name: str) -> str:
    """What validation measured in each range of timesteps, first and last."""
    measured = [line for line in metrics if line["stage"] == stage and f"validation_{name}_0" in line]
    if not measured:
        return ""
    names = sorted(
        (n for n in measured[-1] if re.fullmatch(rf"validation_{name}_\d+", n)), key=lambda n: int(n.split("_")[-1])
    )
    groups = [f"{k / len(names):g}–{(k + 1) / len(names):g}" for k in range(len(names))]
    shown = [measured[-1]] if len(measured) == 1 else [measured[-1], measured[0]]
    series = [(f"step {line['step']:,}", [line.get(name, float("nan")) for name in names]) for line in shown]
    return bar_chart(groups, series, x_label="t / T, from clean to noise", y_label=name)


def _timings(metrics: Sequence[Mapping[str, Any]]) -> str:
    rows, total = [], metrics[-1]["time"] if metrics else 0.0
    for stage, name in STAGES.items():
        seconds, compiling = (
            sum(_series(metrics, "timing", f"{stage}_{what}")[1]) for what in ("seconds", "compile_seconds")
        )
        speeds = _series(metrics, stage, "examples_per_second")[1]
        if seconds:
            speed = f"{number(sorted(speeds)[len(speeds) // 2])} / s" if speeds else ""
            rows.append(
                (name, duration(seconds), f"{seconds / total:.0%}" if total else "", duration(compiling), speed)
            )
    if rows:
        rows.append(("The whole run", duration(total), "100%", "", ""))
    content = page.table(("", "time", "share", "of it compiling", "images"), rows)
    return page.section("Where the time went", page.panel("By stage", content))


def _recipe(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    command = about.get("command", "")
    return page.section(
        "Reproduce",
        page.panel("Command", f"<pre>{escape(command)}</pre>") if command else "",
        page.details("Configuration", json.dumps(config, indent=2)) if config else "",
    )
