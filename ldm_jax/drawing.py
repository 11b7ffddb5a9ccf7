"""A drawing: what was asked of a trained model, the pictures that came of it, and the files they go to."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np
from absl.flags import FlagValues
from tqdm import tqdm

from ldm_jax import run_folder, trained
from ldm_jax.errors import InputError
from ldm_jax.evaluation import pictures
from ldm_jax.generate import request, smallest_batch
from ldm_jax.trained import Trained
from ldm_jax.training.parallel import replicate


class Drawing(NamedTuple):
    """What is asked for: `num` pictures, whose classes go round `labels` ([] = no class)."""

    num: int
    labels: list[int]
    seed: int
    guidance: float
    guidance_interval: list[float]
    sampler: str
    steps: int
    eta: float


class Drawn(NamedTuple):
    """What came of it."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]; -1 = no class
    denoising: np.ndarray  # uint8 [S, M, H, W, C]: the first few pictures on the way
    class_names: tuple[str, ...]
    recipe: dict[str, Any]  # everything that makes the same pictures again


def from_flags(model: Trained, values: FlagValues, labels: list[int]) -> Drawing:
    """What a command line asks for (see `commands.define_drawing_flags`); what it leaves out is as in the config.

    Raises:
      InputError: guidance for a model without classes, or a batch that does not divide over the devices.
    """
    sampling, devices = model.config.sampling, jax.local_device_count()
    if values.guidance not in (None, 1.0) and not model.class_names:
        raise InputError(f"--guidance={values.guidance} needs a model with classes; this one has none")
    if values.batch_size and values.batch_size % devices:
        raise InputError(f"--batch_size={values.batch_size} does not divide over {devices} devices")
    sampler = values.sampler or sampling.sampler
    default_eta = sampling.eta if sampler == sampling.sampler else 0.0  # the config's eta is its own sampler's
    return Drawing(
        num=values.num,
        labels=labels,
        seed=values.seed,
        guidance=sampling.guidance if values.guidance is None else values.guidance,
        guidance_interval=values.guidance_interval or list(sampling.guidance_interval),
        sampler=sampler,
        steps=values.steps or sampling.steps,
        eta=default_eta if values.eta is None else values.eta,
    )


def draw(model: Trained, drawing: Drawing, *, batch_size: int, z_T: np.ndarray | None = None) -> Drawn:
    """Draws, with a progress bar; raises InputError for a solver or step count that the model does not take."""
    table = trained.build_table(model.config, sampler=drawing.sampler, steps=drawing.steps, eta=drawing.eta)
    batch_size = smallest_batch(drawing.num, batch_size, jax.local_device_count())
    generator = trained.build_generator(model.config, len(model.class_names), batch_size)
    params = replicate(model.params)
    wanted = request(
        drawing.num,
        drawing.labels,
        guidance=drawing.guidance,
        seed=drawing.seed,
        z_T=z_T,
        interval=tuple(drawing.guidance_interval),
    )
    images = []
    with tqdm(total=drawing.num, unit="image", desc="    sampling", unit_scale=False) as bar:
        for some in generator.images(params, wanted, table):
            images.append(some)
            bar.update(len(some))
    few = min(drawing.num, 2 * max(len(drawing.labels), 8))
    recipe = {"model": trained.fingerprint(model), "step": model.step, "spacing": model.config.sampling.spacing}
    return Drawn(
        np.concatenate(images),
        wanted.labels,
        generator.denoising(params, wanted.first(few), table),
        model.class_names,
        recipe | drawing._asdict(),
    )


def save(folder: Path, drawn: Drawn) -> None:
    """Writes samples.npz, samples.png (with the recipe in it) and denoising.gif to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with run_folder.atomic(folder / "samples.npz") as temporary:
        np.savez_compressed(temporary, images=drawn.images, labels=drawn.labels)
    grid = pictures.sample_grid(drawn.images, drawn.labels, drawn.class_names or None)
    pictures.save_png(grid, folder / "samples.png", drawn.recipe)
    pictures.save_denoising_gif(drawn.denoising, folder / "denoising.gif")


def final_drawing(model: Trained) -> Drawing:
    """The drawing that ends a run: as its config has it."""
    sampling = model.config.sampling
    return Drawing(
        num=sampling.num,
        labels=list(range(len(model.class_names))),
        seed=model.config.seed,
        guidance=sampling.guidance,
        guidance_interval=list(sampling.guidance_interval),
        sampler=sampling.sampler,
        steps=sampling.steps,
        eta=sampling.eta,
    )


def draw_final(workdir: Path) -> None:
    """Draws the samples that end a run, unless the run folder has just these already."""
    model = trained.load(workdir)
    drawing = final_drawing(model)
    asked = drawing._asdict() | {"model": trained.fingerprint(model), "spacing": model.config.sampling.spacing}
    if not drawing.num or _is_drawn(workdir, asked):
        return
    save(workdir, draw(model, drawing, batch_size=model.config.sampling.batch_size))


def _is_drawn(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether the folder has sound files of a drawing whose recipe is as `asked`."""
    try:
        found = pictures.read_recipe(folder / "samples.png")
        with (folder / "samples.npz").open("rb") as file, np.load(file) as samples:  # np.load leaves a bad one open
            complete = {"images", "labels"} <= {*samples} and len(samples["images"]) == asked["num"]
    except (InputError, OSError, ValueError, BadZipFile, zlib.error):  # missing or damaged: drawn again
        return False
    same = all(found.get(name) == value for name, value in asked.items())
    return complete and same and (folder / "denoising.gif").exists()
