"""report.html: the samples, scores, training curves and times of a run, from its folder alone.

Files that the folder does not have (yet) are left out, so a report can be made at any time.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldm_jax.config.renamed import rename_saved
from ldm_jax.errors import InputError
from ldm_jax.evaluation import goodput, page
from ldm_jax.evaluation.charts import Series, bar_chart, line_chart, number
from ldm_jax.evaluation.mixed_sheet import ANSWER, MIXED
from ldm_jax.run_folder.log import START, read_metrics
from ldm_jax.runtime.files import atomic, read_json
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.sampling.recipe import from_json

Metrics = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl

MAX_FRAMES = 12  # of a slider
STAGES = {
    "setup": "Starting",
    "autoencoder": "Stage 1: autoencoder",
    "latents": "Latents: cache and scale",
    "clip": "CLIP: images and captions",
    "diffusion": "Stage 2: diffusion model",
    "classifier": "Classifier of noisy latents",
    "sampling": "Sampling",
    "prompts": "Sampling by prompts",
    "scoring": "Scores",
}
# What time is spent on, by its name in `goodput.seconds`.
SPENT = {
    "steps": "Steps of training that count",
    "compiling": "Compiling",
    "data": "Waiting for data",
    "checkpoints": "Saving checkpoints",
    "validation": "Validation and progress images",
    "latents": "Encoding latents",
    "sampling": "Sampling",
    "scoring": "Scores",
    "starting": "Starting",
    "lost": "Steps lost by a kill, made again",
    "other": "Everything else",
}
# The columns of the record of starts: heading -> names in its lines, joined.
RECORDED = {
    "commit": ("commit",),
    "Python": ("python",),
    "jax, jaxlib": ("jax", "jaxlib"),
    "flax, optax, orbax": ("flax", "optax", "orbax-checkpoint"),
    "ldm_jax": ("ldm_jax",),
    "devices": ("devices",),
    "hosts": ("hosts",),
    "XLA_FLAGS": ("xla_flags",),
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
# The terms of the autoencoder's loss that have a chart, by their names in metrics.jsonl.
AUTOENCODER_TERMS = {
    "l1": "Reconstruction: mean |x - x_hat|",
    "perceptual": "Perceptual: LPIPS",
    "kl": "KL, nats per pixel",
    "codes_used": "Fraction of the codebook in use",
    "discriminator": "Discriminator: hinge loss",
}
NOT_SELECTED = "The first samples of the seed, without selection."
PROMPT_SHEETS = {
    "training": "Captions of the training split, each with a training image first",
    "held_out": "Captions of the test split, each with a test image first",
    "made_up": "Captions of no image",
    "guidance": "Guidance scales from 0 (unconditional) to 8",
}


def write_report(workdir: Path) -> Path:
    """Writes the report `workdir`/report.html of a run; InputError without that folder or for damaged files in it."""
    if not workdir.is_dir():
        raise InputError(f"there is no run folder {workdir} to report on")
    files = [workdir / f"{name}.json" for name in ("config", "data", "evaluation")]
    config, data, evaluation = (read_json(path) if path.exists() else {} for path in files)
    config = rename_saved(config)
    metrics = read_metrics(workdir / "metrics.jsonl")
    sections = [_samples(workdir), _mixed(workdir), _scores(evaluation), _prompts(workdir), *_progress(workdir)]
    sections += [_curves(metrics), _timings(metrics), _reproduce(config, data, metrics)]
    html = page.page(_title(config, workdir), _subtitle(data, metrics), sections)
    with atomic(workdir / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return workdir / "report.html"


def _title(config: Mapping[str, Any], workdir: Path) -> str:
    name = config.get("data", {}).get("name", workdir.name).replace("_", " ")
    stages, pixels = config.get("stages", ["diffusion"]), config.get("autoencoder", {}).get("type") == "none"
    if "diffusion" not in stages:
        return f"{' and '.join(stages).capitalize()} of {name}"
    return f"{'Pixel' if pixels else 'Latent'} diffusion on {name}"


def _subtitle(data: Mapping[str, Any], metrics: Metrics) -> str:
    train = f"Trained on {data['train']:,} images" if "train" in data else ""
    device = f"on {data['device']}" if "device" in data else ""
    time = f"in {duration(metrics[-1]['time'])}" if metrics else ""
    return " ".join(filter(None, (train, device, time)))


def duration(seconds: float) -> str:
    """Seconds as text: 34 s, 5 min 20 s, 3 h 04 min."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"


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
    return page.section("Samples", grid, trajectory, note=NOT_SELECTED)


def _mixed(workdir: Path) -> str:
    sheet = page.image(workdir / MIXED, "Samples and test images in random order")
    answer = page.image(workdir / ANSWER, "The same, with the test images faded")
    note = "Samples and as many test images in random order, none selected."
    return page.section("Samples among test images", sheet, page.reveal("Which are samples?", answer), note=note)


def _prompts(workdir: Path) -> str:
    sheets = (page.image(workdir / "prompts" / f"{name}.png", text, text) for name, text in PROMPT_SHEETS.items())
    return page.section("By prompts", *sheets, note=NOT_SELECTED)


def cards(evaluation: Any) -> Iterator[Mapping[str, Any]]:
    """All score cards in the content of evaluation.json, of any nesting."""
    if isinstance(evaluation, Mapping) and {"score", "value", "n"} <= evaluation.keys():
        yield evaluation
    elif isinstance(evaluation, Mapping | list):
        for value in evaluation.values() if isinstance(evaluation, Mapping) else evaluation:
            yield from cards(value)


def _scores(evaluation: Any) -> str:
    groups = evaluation if isinstance(evaluation, Mapping) else {"": evaluation}
    boxes = {name: "".join(map(_card, cards(group))) for name, group in groups.items()}
    return page.section(
        "Scores",
        *(page.group(GROUPS.get(name, ""), f'<div class="cards">{box}</div>') for name, box in boxes.items() if box),
        note="Compare only scores with the same images, reference, resize and weights. The floor is the score of real "
        "training images.",
    )


def _card(card: Mapping[str, Any]) -> str:
    """A box with one score, the autoencoder's score and the floor as bars, and the method."""
    arrow = {"lower": "↓ better", "higher": "↑ better"}.get(card.get("better", ""), "")
    bars = [("this run", card["value"], "s0"), ("autoencoder", card.get("autoencoder"), "s1")]
    bars = [bar for bar in [*bars, ("floor", card.get("floor"), "")] if bar[1] is not None]
    largest = max(max(value for _, value, _ in bars), 1e-12)
    meter = "".join(
        f'<span>{name}</span><i class="{color}" style="width:{100 * max(0.0, value) / largest:.1f}%"></i>'
        f"<span>{number(value)}</span>"
        for name, value, color in bars
    )
    facts = [f"{card['n']:,} images against {card['reference_n']:,} of “{card['reference']}”", card.get("method")]
    facts.append(card.get("resize") and f"at {card['resize']} pixels")
    facts.append(card.get("weights_sha256") and f"weights {card['weights_sha256'][:12]}")
    std = f" <small>± {number(card['std'])}</small>" if card.get("std") is not None else ""
    return (
        f'<div class="card"><h3>{escape(card["score"])}<span>{arrow}</span></h3>'
        f'<div class="value">{number(card["value"])}{std}</div>'
        + (f'<div class="meter">{meter}</div>' if len(bars) > 1 else "")
        + f'<p class="small">{escape("; ".join(filter(None, facts)))}</p></div>'
    )


def _progress(workdir: Path) -> tuple[str, str]:
    samples = page.slider(_frames(workdir, "diffusion"), "Samples while training")
    pairs = page.slider(_frames(workdir, "autoencoder"), "Test images and their reconstructions")
    return (
        page.section("Samples during training", samples, note="The same noise at each step of training."),
        page.section("Reconstructions of the autoencoder", pairs, note="Test images, encoded and decoded."),
    )


def _frames(workdir: Path, stage: str) -> list[tuple[str, Path]]:
    """("step 500", file) of the images made during training, evenly thinned to `MAX_FRAMES` with the first and last."""
    paths = list(workdir.glob(f"progress/{stage}_*.png"))
    frames = sorted((int(step[1]), path) for path in paths if (step := re.fullmatch(rf"{stage}_(\d+)", path.stem)))
    if len(frames) > MAX_FRAMES:
        frames = [frames[round(k * (len(frames) - 1) / (MAX_FRAMES - 1))] for k in range(MAX_FRAMES)]
    return [(f"step {step:,}", path) for step, path in frames]


def _series(metrics: Metrics, stage: str, name: str) -> tuple[list[float], list[float]]:
    lines = [line for line in metrics if line["stage"] == stage and name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def _curves(metrics: Metrics) -> str:
    charts = {
        "Diffusion loss": _training_and_validation(metrics, "diffusion", "loss"),
        "Validation loss by timestep": _by_timestep(metrics, "diffusion", "loss"),
        "CLIP: contrastive loss": _training_and_validation(metrics, "clip", "loss"),
        "Classifier: cross-entropy": _training_and_validation(metrics, "classifier", "loss"),
        "Classifier: accuracy": _training_and_validation(metrics, "classifier", "accuracy"),
        "Classifier: validation accuracy by timestep": _by_timestep(metrics, "classifier", "accuracy"),
    }
    for name, caption in AUTOENCODER_TERMS.items():
        term = Series(name, *_series(metrics, "autoencoder", name))
        charts[caption] = line_chart([term], x_label="step", y_label=name)
    for stage in ("autoencoder", "clip", "diffusion", "classifier"):
        speed = Series(stage, *_series(metrics, stage, "examples_per_second"))
        charts[f"Training speed, {stage}"] = line_chart([speed], x_label="step", y_label="images / s", from_zero=True)
    return page.section("Curves", page.columns(*map(page.panel, charts.keys(), charts.values())))


def _training_and_validation(metrics: Metrics, stage: str, name: str) -> str:
    validation = Series("validation", *_series(metrics, stage, f"validation_{name}"), trend=False)
    training = Series("training", *_series(metrics, stage, name))
    return line_chart([training, validation], x_label="step", y_label=name)


def _by_timestep(metrics: Metrics, stage: str, name: str) -> str:
    """A bar chart of the last and the first validation in each range of timesteps."""
    lines = [line for line in metrics if line["stage"] == stage and f"validation_{name}_0" in line]
    if not lines:
        return ""
    names = [key for key in lines[-1] if re.fullmatch(rf"validation_{name}_\d+", key)]
    names.sort(key=lambda key: int(key.split("_")[-1]))
    groups = [f"{k / len(names):g}–{(k + 1) / len(names):g}" for k in range(len(names))]
    last_and_first = [lines[-1], lines[0]][: len(lines)]
    series = [(f"step {line['step']:,}", [line.get(key, float("nan")) for key in names]) for line in last_and_first]
    return bar_chart(groups, series, x_label="t / T, from clean to noise", y_label=name)


def _timings(metrics: Metrics) -> str:
    rows, total = [], metrics[-1]["time"] if metrics else 0.0
    for stage, name in STAGES.items():
        totals = (_series(metrics, "timing", f"{stage}_{what}")[1] for what in ("seconds", "compile_seconds"))
        seconds, compiling = map(sum, totals)
        speeds = sorted(_series(metrics, stage, "examples_per_second")[1])
        if seconds:
            speed = f"{number(speeds[len(speeds) // 2])} / s" if speeds else ""
            share = f"{seconds / total:.0%}" if total else ""
            rows.append((name, duration(seconds), share, duration(compiling), speed))
    if rows:
        rows.append(("The whole run", duration(total), "100%", "", ""))
    table = page.table(("", "time", "share", "of it compiling", "images"), rows)
    return page.section("Where the time went", page.columns(page.panel("By stage", table), _goodput(metrics)))


def _goodput(metrics: Metrics) -> str:
    """The table of goodput and of what the rest of the time was spent on; "" for a run of a version without."""
    spent = goodput.seconds(metrics)
    time = sum(spent.values())
    if not any(line["stage"] == START for line in metrics) or not time:
        return ""
    rows = [(SPENT[name], duration(value), f"{value / time:.1%}") for name, value in spent.items() if round(value)]
    return page.panel(f"Goodput: {spent['steps'] / time:.1%}", page.table(("", "time", "share"), rows))


def _starts(metrics: Metrics) -> str:
    """The table of what each start of the run recorded; equal ones in a row share a line."""
    records: list[tuple[int, int, list[str]]] = []  # first and last start, cells
    for start, line in enumerate((line for line in metrics if line["stage"] == START), start=1):
        cells = [", ".join(str(line.get(name, "")) for name in names) for names in RECORDED.values()]
        first = records.pop()[0] if records and records[-1][2] == cells else start
        records.append((first, start, cells))
    rows = [(f"{first}" if first == last else f"{first}–{last}", *cells) for first, last, cells in records]
    return page.panel("Starts of the run", page.table(("start", *RECORDED), rows))


def _reproduce(config: Mapping[str, Any], data: Mapping[str, Any], metrics: Metrics) -> str:
    command = data.get("command", "")
    return page.section(
        "Reproduce",
        page.panel("Command", f"<pre>{escape(command)}</pre>") if command else "",
        _starts(metrics),
        page.details("Configuration", json.dumps(config, indent=2)) if config else "",
    )
