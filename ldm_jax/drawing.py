"""A drawing: what was asked of a trained model, the pictures that came of it, and the files they go to."""

import hashlib
import zlib
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np
from absl.flags import FlagValues
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from ldm_jax import builders, editing, run_folder, trained
from ldm_jax.diffusion.sampling import initial_latents, sample_keys
from ldm_jax.diffusion.schedules import EVEN
from ldm_jax.errors import InputError
from ldm_jax.evaluation import pictures
from ldm_jax.generate import Generator, Request, request, smallest_batch
from ldm_jax.given import Given, from_map, from_masked, from_split, keep_known, shown
from ldm_jax.trained import Guide, Trained
from ldm_jax.training.parallel import replicate


class Drawing(NamedTuple):
    """What is asked for: `num` pictures, whose classes go round `labels` ([] = no class). It goes into the recipe."""

    num: int
    labels: list[int]
    seed: int
    guidance: float
    guidance_interval: list[float]
    guidance_rescale: float
    sampler: str
    steps: int
    spacing: str | list[int]
    eta: float
    churn: float
    variance: str
    classifier: str = ""  # a run folder with a classifier that guides as well
    classifier_scale: float = 0.0
    negative_label: int = -1
    init_image: str = ""  # begin from this picture, not from noise alone
    strength: float = 1.0  # the share of the steps that is done from there
    mask: str = ""  # the white part of init_image is drawn, the rest kept
    resample: int = 1  # RePaint: how often each part of the way is gone
    resample_jump: int = 1  # and of how many steps a part is
    to_seed: int = -1  # from the noise of `seed` to that of this one
    to_image: str = ""  # from the noise of init_image to that of this one
    invert: bool = False  # begin from init_image's own noise
    init_latents: str = ""  # the noise itself
    map: str = ""  # of a model with a map condition: the small picture, or the map of segments
    map_split: str = ""  # or the split that sample i's map is taken from, of its picture number i


class Drawn(NamedTuple):
    """What came of it."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]; -1 = no class
    denoising: np.ndarray | None  # uint8 [S, M, H, W, C]: the first few pictures on the way
    class_names: tuple[str, ...]
    recipe: dict[str, Any]  # everything that makes the same pictures again
    given: Given | None  # what a map told of them
    picture: Image.Image  # the first of them, for people


def from_flags(model: Trained, values: FlagValues, labels: list[int]) -> Drawing:
    """What a command line asks for (see `command_line.define_drawing_flags`); what it leaves out is as in the config.

    Raises:
      InputError: guidance for a model without classes, a batch that does not divide over the devices, or timesteps
        that are no numbers.
    """
    sampling, devices = model.config.sampling, jax.local_device_count()
    if values.guidance not in (None, 1.0) and not model.class_names:
        raise InputError(f"--guidance={values.guidance} needs a model with classes; this one has none")
    if values.batch_size and values.batch_size % devices:
        raise InputError(f"--batch_size={values.batch_size} does not divide over {devices} devices")
    if values.classifier_scale is not None and not values.classifier:
        raise InputError("--classifier_scale needs --classifier, a run folder with a classifier")
    sampler, spacing = _or(values.sampler, sampling.sampler), _or(values.spacing, sampling.spacing)
    if values.timesteps is not None:
        if values.steps or values.spacing:
            raise InputError("--timesteps says it all; leave out --steps and --spacing")
        spacing = _whole_numbers("--timesteps", values.timesteps)
    own = sampler == sampling.sampler  # the config's eta, churn and variance are its own sampler's
    return Drawing(
        num=values.num,
        labels=labels,
        seed=values.seed,
        guidance=_or(values.guidance, sampling.guidance),
        guidance_interval=_or(values.guidance_interval, list(sampling.guidance_interval)),
        guidance_rescale=_or(values.guidance_rescale, sampling.guidance_rescale),
        sampler=sampler,
        steps=len(spacing) if isinstance(spacing, list) else _or(values.steps, sampling.steps),
        spacing=spacing,
        eta=_or(values.eta, sampling.eta if own else 0.0),
        churn=_or(values.churn, sampling.churn if own else 0.0),
        classifier=values.classifier or "",
        classifier_scale=_or(values.classifier_scale, 1.0 if values.classifier else 0.0),
        variance=_or(values.variance, sampling.variance if own else "fixed_small"),
        map_split=_map_split(model.config),
    )


def _map_split(config: ConfigDict) -> str:
    """Where maps come from unless a user gives one."""
    return "" if config.concat.kind == "none" else config.data.test_split


def with_edits(drawing: Drawing, values: FlagValues, kind: str) -> Drawing:
    """The drawing with what the flags of `command_line.define_editing_flags` ask for; `kind` is of the model's map.

    Raises:
      InputError: flags that do not go together, or not with the model.
    """
    needs = {"strength": "init_image", "mask": "init_image", "invert": "init_image", "to_image": "init_image",
             "resample": "mask", "resample_jump": "resample"}  # fmt: skip
    for flag, other in needs.items():
        if values[flag].value and not values[other].value:
            raise InputError(f"--{flag} needs --{other}")
    noises = [n for n in ("init_latents", "to_seed", "to_image", "invert") if values[n].value not in (None, False)]
    if len(noises) > 1:
        raise InputError(f"--{noises[0]} and --{noises[1]} both say what noise to begin from; choose one")
    own_noise = values.invert or values.to_image
    for flag in ("strength", "mask"):
        if own_noise and values[flag].value:
            raise InputError(f"--{flag} and --{'invert' if values.invert else 'to_image'} do not go together")
    strength = 1.0
    if values.init_image and not own_noise:
        strength = _or(values.strength, 1.0 if values.mask else 0.6)
    return drawing._replace(
        init_image=values.init_image or "",
        strength=strength,
        mask=values.mask or "",
        resample=_or(values.resample, 1),
        resample_jump=_or(values.resample_jump, 1),
        to_seed=_or(values.to_seed, -1),
        to_image=values.to_image or "",
        invert=bool(values.invert),
        init_latents=values.init_latents or "",
        map=values.map or "",
        map_split="" if _is_given_a_map(values, kind) else drawing.map_split,
    )


def _is_given_a_map(values: FlagValues, kind: str) -> bool:
    """Whether the flags say what the model's map is; raises InputError for a map that it does not take, or lacks."""
    if values.map and kind in ("none", "inpainting"):
        takes = "no map" if kind == "none" else "--init_image and --mask"
        raise InputError(f"--map={values.map} is for models of super-resolution or segments; this one takes {takes}")
    given = values.mask if kind == "inpainting" else values.map
    if kind != "none" and values.init_image and not given:
        raise InputError(f"--init_image needs {'--mask' if kind == 'inpainting' else '--map'} with this model")
    return bool(given)


def from_recipe(model: Trained, path: Path) -> Drawing:
    """The drawing that made a picture.

    Raises:
      InputError: the picture has no recipe, or another model drew it, or one of its inputs has changed since.
    """
    recipe = pictures.read_recipe(path)
    missing = [name for name in Drawing._fields if name not in recipe]
    if missing:
        raise InputError(f"--from_recipe={path} is of another version: it says nothing of {', '.join(missing)}")
    if recipe.get("model") != trained.fingerprint(model):
        raise InputError(f"--from_recipe={path} was drawn by another model ({recipe.get('model')}) than --model")
    drawing = Drawing(**{name: recipe[name] for name in Drawing._fields})
    for file, digest in _digests(drawing, _guide(model, drawing)).items():
        if recipe["inputs"].get(file) != digest:
            raise InputError(f"--from_recipe={path} was drawn from another {file} than the one that is there now")
    return drawing


def draw(model: Trained, drawing: Drawing, *, batch_size: int, film: bool = True) -> Drawn:
    """Draws, with a progress bar; `film`: the first few pictures on the way as well.

    Raises:
      InputError: a solver or step count that the model does not take, or an input that is missing or does not fit.
    """
    table = trained.build_table(
        model.config,
        sampler=drawing.sampler,
        steps=drawing.steps,
        spacing=drawing.spacing if isinstance(drawing.spacing, str) else tuple(drawing.spacing),
        eta=drawing.eta,
        churn=drawing.churn,
        variance=drawing.variance,
        strength=drawing.strength,
        resample=drawing.resample,
        jump=drawing.resample_jump,
    )
    (image, mask), guide = _read_inputs(model, drawing), _guide(model, drawing)
    given = _given(model.config, drawing, image, mask)
    batch_size = smallest_batch(drawing.num, batch_size, jax.local_device_count())
    generator = trained.build_generator(model.config, len(model.class_names), batch_size, guide)
    params = replicate(model.params | ({"classifier": guide.params} if guide else {}))
    wanted = request(
        drawing.num,
        drawing.labels,
        guidance=drawing.guidance,
        seed=drawing.seed,
        negative=drawing.negative_label,
        interval=tuple(drawing.guidance_interval),
        rescale=drawing.guidance_rescale,
        classifier_scale=np.full(drawing.num, drawing.classifier_scale, np.float32),
    )
    if given is not None:
        maps = generator.maps(params, given.known)
        wanted = wanted._replace(maps=np.broadcast_to(maps, (drawing.num, *maps.shape[1:])))
    wanted = wanted._replace(**_beginning(model, drawing, generator, params, wanted, image, mask))
    images = []
    with tqdm(total=drawing.num, unit="image", desc="    sampling", unit_scale=False) as bar:
        for some in generator.images(params, wanted, table):
            images.append(some if mask is None else np.where(mask[..., None], some, image))
            bar.update(len(some))
    images = keep_known(given, np.concatenate(images))
    few = min(drawing.num, 2 * max(len(drawing.labels), 8))
    recipe = {"model": trained.fingerprint(model), "step": model.step, "inputs": _digests(drawing, guide)}
    return Drawn(
        images,
        wanted.labels,
        generator.denoising(params, wanted.first(few), table) if film else None,
        model.class_names,
        recipe | drawing._asdict(),
        given,
        picture(model.config, images, wanted.labels, model.class_names, given),
    )


def _read_inputs(model: Trained, drawing: Drawing) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The picture and the mask that are begun from, uint8 [H, W, C] and bool [H, W], or None."""
    data, image, mask = model.config.data, None, None
    if drawing.init_image:
        path, like = Path(drawing.init_image), {"size": data.image_size, "crop": data.crop}
        image = editing.read_image(path, "--init_image", channels=data.channels, **like)
        if drawing.mask:
            mask = editing.read_mask(Path(drawing.mask), path, **like)
    return image, mask


def _given(config: ConfigDict, drawing: Drawing, image: np.ndarray | None, mask: np.ndarray | None) -> Given | None:
    """What a model with a map condition is given; None for others."""
    if config.concat.kind == "none":
        return None
    if drawing.map:
        return from_map(config, Path(drawing.map))
    if drawing.map_split:
        return from_split(config, builders.load_split(config, drawing.map_split), drawing.num, drawing.seed)
    return from_masked(image, mask)


def _beginning(
    model: Trained,
    drawing: Drawing,
    generator: Generator,
    params: Any,
    wanted: Request,
    image: np.ndarray | None,
    mask: np.ndarray | None,
) -> dict[str, Any]:
    """The fields of a Request that say what it begins from: noise, latents and where they are kept."""
    shape, shares = builders.latent_shape(model.config), np.linspace(0, 1, drawing.num)
    if drawing.init_latents:
        return {"z_T": editing.read_latents(Path(drawing.init_latents), (drawing.num, *shape))}
    if drawing.to_seed >= 0:
        ends = [initial_latents(sample_keys(np.uint32(s), np.zeros(1, int)), shape)[0]
                for s in (drawing.seed, drawing.to_seed)]  # fmt: skip
        return {"z_T": editing.slerp(*ends, shares)}
    if image is None:
        return {}
    if drawing.invert or drawing.to_image:
        end, data = image, model.config.data
        if drawing.to_image:
            end = editing.read_image(
                Path(drawing.to_image), "--to_image", size=data.image_size, channels=data.channels, crop=data.crop
            )
        z0 = generator.encode(params, np.stack([image, end]))
        spacing = drawing.spacing if drawing.spacing in EVEN else "trailing"
        table = trained.build_inversion_table(model.config, drawing.steps, spacing)
        plain = wanted.first(2)._replace(ids=np.arange(2, dtype=np.int32), z_T=z0)
        plain = plain._replace(labels=wanted.labels[[0, -1]], guidance=np.ones(2, np.float32), classifier_scale=None)
        noise = np.concatenate([z for z, _ in generator.latents(params, plain, table)])
        return {"z_T": editing.slerp(*noise, shares)}
    if model.config.concat.kind == "inpainting" and drawing.strength == 1:  # its map says all that is known
        return {}
    z0 = generator.encode(params, image[None])[0]
    if mask is None or model.config.concat.kind == "inpainting":
        return {"z0": z0}
    return {"z0": z0, "mask": editing.mask_of_latents(mask, len(mask) // shape[0])}


def _guide(model: Trained, drawing: Drawing) -> Guide | None:
    """The classifier that guides a drawing, if one does."""
    return trained.load_guide(Path(drawing.classifier), model) if drawing.classifier else None


def _digests(drawing: Drawing, guide: Guide | None) -> dict[str, str]:
    """File -> hash, of all that a drawing reads; a file that is not there has none."""
    names = ("init_image", "mask", "to_image", "init_latents", "map")
    files = [getattr(drawing, name) for name in names if getattr(drawing, name)]
    digests = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in files if Path(file).is_file()}
    return digests | ({drawing.classifier: trained.fingerprint(guide)} if guide else {})


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _whole_numbers(flag: str, words: list[str]) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError:
        raise InputError(f"{flag}={','.join(words)} must be whole numbers, e.g. 999,700,400") from None


def save(folder: Path, drawn: Drawn) -> None:
    """Writes samples.npz, samples.png (with the recipe in it) and denoising.gif, if there is one, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with run_folder.atomic(folder / "samples.npz") as temporary:
        np.savez_compressed(temporary, images=drawn.images, labels=drawn.labels)
    pictures.save_png(drawn.picture, folder / "samples.png", drawn.recipe)
    if drawn.denoising is not None:
        pictures.save_denoising_gif(drawn.denoising, folder / "denoising.gif")


def picture(
    config: ConfigDict, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], given: Given | None
) -> Image.Image:
    """For people: a row for each class, or, of a model with a map condition, each drawing below what it was made of."""
    if given is None:
        return pictures.sample_grid(images, labels, class_names or None)
    rows = {"given": np.broadcast_to(shown(config, given), images.shape), "drawn": images}
    if given.originals is not None:
        rows["original"] = given.originals
    return pictures.comparison({name: some[:40] for name, some in rows.items()})


def final_drawing(model: Trained) -> Drawing:
    """The drawing that ends a run: as its config has it."""
    sampling = model.config.sampling
    return Drawing(
        num=sampling.num,
        labels=list(range(len(model.class_names))),
        seed=model.config.seed,
        guidance=sampling.guidance,
        guidance_interval=list(sampling.guidance_interval),
        guidance_rescale=sampling.guidance_rescale,
        sampler=sampling.sampler,
        steps=sampling.steps,
        spacing=sampling.spacing,
        eta=sampling.eta,
        churn=sampling.churn,
        variance=sampling.variance,
        map_split=_map_split(model.config),
    )


def draw_final(workdir: Path) -> None:
    """Draws the samples that end a run, unless the run folder has just these already."""
    model = trained.load(workdir)
    drawing = final_drawing(model)
    asked = drawing._asdict() | {"model": trained.fingerprint(model)}
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
