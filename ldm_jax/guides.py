"""What guides a trained model beside its own conditions: a classifier of noisy latents, a CLIP that sees pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import builders, clip_run, config_rules, configuration, run_folder, run_parts
from ldm_jax.clip_run import TrainedCLIP
from ldm_jax.errors import InputError
from ldm_jax.run_folder import content_hash
from ldm_jax.trained import Trained
from ldm_jax.training.checkpoint import load_latest


class Classifier(NamedTuple):
    """A classifier of noisy latents."""

    config: ConfigDict
    params: Any  # the averaged ones


class Guides(NamedTuple):
    """What guides, if it does."""

    classifier: Classifier | None = None
    clip: TrainedCLIP | None = None

    @property
    def params(self) -> dict[str, Any]:
        """Those that a generator takes beside the model's."""
        return {name: guide.params for name, guide in self._asdict().items() if guide}


NO_GUIDES = Guides()


def load_classifier(path: Path) -> Classifier:
    """Reads the classifier of a run folder; raises InputError if there is none, or it does not fit its own config."""
    if not path.is_dir():
        raise InputError(f"--classifier={path} does not exist; it must be a run folder with a classifier")
    config = configuration.of_run(path / "config.json")
    config_rules.validate(config)
    if "classifier" not in config.stages:
        raise InputError(f"--classifier={path} has no classifier: its config.stages are {', '.join(config.stages)}")
    num_classes = len(run_folder.read_json(path / "data.json", "class_names")["class_names"])
    flat = load_latest(path / "classifier")
    like = jax.eval_shape(builders.build_classifier_stage(config, num_classes).init, jax.random.key(0)).ema_params
    return Classifier(config, run_parts.averaged(flat, like, path / "classifier")["classifier"])


def classifier_for(path: Path, model: Trained) -> Classifier:
    """The classifier of a run folder, if it can guide `model`.

    Raises:
      InputError: as `load_classifier`, or it knows other classes, another noise schedule or other latents.
    """
    guide = load_classifier(path)
    class_names = tuple(run_folder.read_json(path / "data.json", "class_names")["class_names"])
    if class_names != model.class_names:
        raise InputError(
            f"--classifier={path} tells {len(class_names)} classes apart ({', '.join(class_names)}); those of --model "
            f"are {len(model.class_names)} ({', '.join(model.class_names)})"
        )
    schedules = [builders.build_schedule(config).alpha_bar for config in (guide.config, model.config)]
    if not np.array_equal(*schedules):
        theirs, ours = guide.config.diffusion, model.config.diffusion
        unlike = [f"{n} {theirs[n]} and {ours[n]}" for n in builders.SCHEDULE if theirs[n] != ours[n]]
        raise InputError(f"--classifier={path} and --model have other noise schedules: {'; '.join(unlike)}")
    if _latents_of(run_parts.load_first_stage(path, guide.config), guide.config) != _latents_of(
        model.params, model.config
    ):
        raise InputError(
            f"--classifier={path} knows other latents than those of --model, of another autoencoder or scale; it "
            "must be trained with --config.autoencoder.checkpoint set to the run that it is to guide"
        )
    return guide


def _latents_of(params: dict[str, Any], config: ConfigDict) -> str:
    """A hash of all that latents depend on: equal means the same z of the same picture."""
    parts = {name: params[name] for name in ("autoencoder", "shift", "scale")}
    return content_hash(parts, str(builders.latent_shape(config)))


def clip_for(path: Path, model: Trained) -> TrainedCLIP:
    """The CLIP of a run folder, if it can see what `model` draws.

    Raises:
      InputError: there is none, or it sees pictures of other colours.
    """
    try:
        found = clip_run.load(path)
    except InputError as error:
        raise InputError(f"--clip: {error}") from error
    theirs, ours = found.clip.image.num_channels, model.config.data.channels
    if theirs != ours:
        raise InputError(f"--clip={path} sees pictures of {theirs} channels; those of --model have {ours}")
    return found


def make_similarity(found: TrainedCLIP) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """(params, x [B, H, W, C] in [-1, 1], embeddings [B, D] of texts) -> [B], the logits of CLIP (Radford 2021, section
    2.3) for picture and text, of whatever size the pictures are."""

    def similarity(params: Any, x: jax.Array, texts: jax.Array) -> jax.Array:
        seen = jax.image.resize(x, (len(x), *(found.clip.image.image_size,) * 2, x.shape[-1]), "linear")
        image = found.clip.apply({"params": params}, seen, method="embed_image")
        return jnp.exp(params["logit_scale"]) * jnp.sum(image * texts, axis=-1)

    return similarity


def sought(found: TrainedCLIP, prompts: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Embeddings float32 [N, D] of the prompts with these numbers [N]."""
    return clip_run.embed_texts(found, list(prompts), len(prompts) * jax.local_device_count())[rows]


def fingerprint(guide: Classifier | TrainedCLIP) -> str:
    """A hash of all parameters: equal means the same guide."""
    return content_hash(guide.params)
