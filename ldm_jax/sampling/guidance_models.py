"""What guides a trained model beside its own conditions: a classifier of noisy latents, a CLIP that sees pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import fields as config_fields
from ldm_jax.config import io as config_io
from ldm_jax.config import rules as config_rules
from ldm_jax.errors import InputError
from ldm_jax.pipeline import clip as pipeline_clip
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline import from_run
from ldm_jax.pipeline.clip import TrainedCLIP
from ldm_jax.pipeline.model import Trained
from ldm_jax.run_folder import checkpoint
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.runtime import files as runtime_files
from ldm_jax.runtime.files import content_hash


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
    config = config_io.of_run(path / "config.json")
    config_rules.validate(config)
    if "classifier" not in config.stages:
        raise InputError(f"--classifier={path} has no classifier: its config.stages are {', '.join(config.stages)}")
    num_classes = len(runtime_files.read_json(path / "data.json", "class_names")["class_names"])
    flat = load_latest(path / "classifier")
    z_t, one = np.zeros((1, *pipeline_from_config.latent_shape(config))), np.ones(1)
    classifier = pipeline_from_config.build_classifier(config, num_classes)
    like = {"classifier": jax.eval_shape(classifier.init, jax.random.key(0), z_t, one, one)["params"]}
    return Classifier(config, checkpoint.averaged(flat, like, path / "classifier")["classifier"])


def classifier_for(path: Path, model: Trained) -> Classifier:
    """The classifier of a run folder, if it can guide `model`.

    Raises:
      InputError: as `load_classifier`, or it knows other classes, another noise schedule or other latents.
    """
    guide = load_classifier(path)
    class_names = tuple(runtime_files.read_json(path / "data.json", "class_names")["class_names"])
    if class_names != model.class_names:
        raise InputError(
            f"--classifier={path} tells {len(class_names)} classes apart ({', '.join(class_names)}); those of --model "
            f"are {len(model.class_names)} ({', '.join(model.class_names)})"
        )
    processes = [pipeline_from_config.build_process(config) for config in (guide.config, model.config)]
    if processes[0] != processes[1]:
        theirs, ours = guide.config.diffusion, model.config.diffusion
        unlike = [f"{n} {theirs[n]} and {ours[n]}" for n in config_fields.SCHEDULE if theirs[n] != ours[n]]
        raise InputError(f"--classifier={path} and --model have other noise schedules: {'; '.join(unlike)}")
    if _latents_of(from_run.load_first_stage(path, guide.config), guide.config) != _latents_of(
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
    return content_hash(parts, str(pipeline_from_config.latent_shape(config)))


def clip_for(path: Path, model: Trained) -> TrainedCLIP:
    """The CLIP of a run folder, if it can see what `model` draws.

    Raises:
      InputError: there is none, or it sees pictures of other colours.
    """
    try:
        found = pipeline_clip.load(path)
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
    return pipeline_clip.embed_texts(found, list(prompts), len(prompts) * jax.local_device_count())[rows]


def fingerprint(guide: Classifier | TrainedCLIP) -> str:
    """A hash of all parameters: equal means the same guide."""
    return content_hash(guide.params)
