"""Results of the page on the server's disk: a folder each, the oldest removed; a reloaded page finds its own again."""

import json
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.runtime.files import read_json, write_json
from ldm_jax.sampling.image_grids import save_png
from ldm_jax.sampling.sample_images import Samples

KEPT = 200  # results
DISPLAY_SIZE = 256  # pixels: images with smaller sides are enlarged by whole factors to about this


class Result(NamedTuple):
    """The files of a run on the page."""

    images: list[tuple[str, str]]  # file of each sample, enlarged if small, and its caption
    grid: str  # samples.png, with the recipe in it
    edit_files: list[str]  # the image and the mask of an edit
    recipe: dict[str, Any]
    summary: str


class Results:
    """The results below a folder; each has a name that cannot be guessed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new(self) -> Path:
        """An empty folder for a result; removes the oldest ones beyond KEPT."""
        folders = sorted(self.folder.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for old in folders[: -KEPT + 1]:
            shutil.rmtree(old, ignore_errors=True)
        folder = self.folder / secrets.token_hex(16)
        folder.mkdir()
        return folder

    def save(self, folder: Path, samples: Samples, captions: Sequence[str], summary: str) -> Result:
        """Writes samples, with a caption each, to a folder of `new`."""
        save_png(samples.grid, folder / "samples.png", samples.recipe)
        for i, image in enumerate(samples.images):
            enlarged(image).save(folder / f"sample_{i}.png")
        write_json(folder / "result.json", {"captions": [*captions], "recipe": samples.recipe, "summary": summary})
        return self.read(folder.name)

    def read(self, name: Any) -> Result | None:
        """The result of this name, None if there is none any more."""
        folder = self.folder / (name if isinstance(name, str) and re.fullmatch(r"[0-9a-f]{32}", name) else "none")
        if not (folder / "result.json").is_file():
            return None
        about = read_json(folder / "result.json", "captions", "recipe", "summary")
        images = [(str(folder / f"sample_{i}.png"), caption) for i, caption in enumerate(about["captions"])]
        edit_files = [str(folder / name) for name in ("init_image.png", "mask.png") if (folder / name).is_file()]
        return Result(images, str(folder / "samples.png"), edit_files, about["recipe"], about["summary"])


def enlarged(image: np.ndarray) -> Image.Image:
    """An image uint8 [H, W, 1 or 3] for the page, with whole pixels."""
    scale = max(1, round(DISPLAY_SIZE / max(image.shape[:2])))
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).resize(
        (scale * image.shape[1], scale * image.shape[0]), Image.Resampling.NEAREST
    )


def captions_of(model: LatentDiffusion, samples: Samples) -> list[str]:
    """What each sample is of: its class or prompt; its number if there is neither."""
    texts = isinstance(model.conditioning, TextConditioning)
    names = samples.recipe["prompts"] if texts else model.class_names
    return [names[k] if 0 <= k < len(names) else f"sample {i}" for i, k in enumerate(samples.labels)]


def as_markdown(warning: str) -> str:
    """A warning as Markdown that shows its characters as they are: prompts may be part of it."""
    text = warning[:1].upper() + warning[1:]
    return re.sub(r"([^\w\s.,:;'-])", r"\\\1", text)


def recipe_text(fields: Mapping[str, Any], indent: str = "") -> str:
    """A recipe as JSON with a line for each field, lists in one line."""
    inner, lines = f"{indent}  ", []
    for name, value in fields.items():
        text = (
            recipe_text(value, inner) if isinstance(value, Mapping) and value else json.dumps(value, ensure_ascii=False)
        )
        lines.append(f"{inner}{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
