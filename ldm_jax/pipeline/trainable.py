"""Which parameters of a model learn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from ldm_jax.interop import lora
from ldm_jax.models.conditioning import make_class_tau, make_tau
from ldm_jax.pipeline.base_model import Base
from ldm_jax.pipeline.model import Pretrained


class Network(NamedTuple):
    """What is trained: a UNet that is told of labels, all of it or a part.

    init: rng -> the parameters that learn.
    unet: (params, frozen) -> those of the UNet.
    tell: (params, frozen, label [B]) -> the arguments by which the UNet is told of it (Rombach 2022, section 3.3).
    null: the label that stands for nothing.
    choose: (frozen, label [B], keys [B]) -> what each is told by in this step, where a label leaves a choice: from then
        on that is the label.
    """

    module: nn.Module
    init: Callable[[jax.Array], Any]
    unet: Callable[[Any, dict], Any]
    tell: Callable[[Any, dict, jax.Array], dict[str, Any]]
    null: int
    choose: Callable[[dict, jax.Array, jax.Array], jax.Array] | None = None


def labelled(unet: nn.Module, conditioner: nn.Module, seen_shape: tuple[int, int, int]) -> Network:
    """A UNet and the conditioner that tells it of classes, {"unet", "conditioner"}; `seen_shape` is of its input."""

    def init(rng: jax.Array) -> dict[str, Any]:
        rng_unet, rng_conditioner = jax.random.split(rng)
        label = jnp.zeros((1,), jnp.int32)
        conditioner_params = conditioner.init(rng_conditioner, label)["params"]
        context = conditioner.apply({"params": conditioner_params}, label)
        unet_params = unet.init(rng_unet, jnp.zeros((1, *seen_shape)), label, context)["params"]
        return {"unet": unet_params, "conditioner": conditioner_params}

    def tell(params: Any, frozen: dict, label: jax.Array) -> dict[str, Any]:
        return {"context": conditioner.apply({"params": params["conditioner"]}, label)}

    return Network(unet, init, lambda params, frozen: params["unet"], tell, conditioner.null)


class Captions(NamedTuple):
    """The texts of a data set, each once, and which of them belong to each class."""

    texts: tuple[str, ...]
    rows: np.ndarray  # [P, K] int32, of `texts`; a class with fewer than K has them again and again


NO_CAPTIONS = Captions((), np.zeros((0, 1), np.int32))


def reads_along(config: ConfigDict, model: Pretrained) -> bool:
    """Whether the text encoders learn with the UNet."""
    return bool(model.encoders) and config.diffusion.train_text


def build_network(config: ConfigDict, base: Base, captions: Captions) -> Network:
    """What is trained, and what that is told; the rest of it is from `frozen_arrays`."""
    rank, classes, learning = config.lora.rank, base.model.classes, _learning(config, base)

    def init(rng: jax.Array) -> dict[str, Any]:
        if rank:
            return {"lora": lora.init_lora(rng, base.params["unet"], rank)}
        return {name: base.params[name] for name in learning}

    def unet(params: Any, frozen: dict) -> Any:
        return lora.merge(frozen["unet"], params["lora"], lora_scale(config)) if rank else params["unet"]

    def tell(params: Any, frozen: dict, label: jax.Array) -> dict[str, Any]:
        if classes:
            return make_class_tau(classes)((frozen if rank else params)["conditioner"], label)
        if not base.model.encoders:
            return {}
        told = jax.tree.map(lambda rows: rows[label], frozen["told"])
        return make_tau(base.model.encoders)(params["conditioner"], told) if reads_along(config, base.model) else told

    def choose(frozen: dict, label: jax.Array, keys: jax.Array) -> jax.Array:
        k = jax.vmap(lambda key: jax.random.randint(key, (), 0, captions.rows.shape[1]))(keys)
        return frozen["rows"][label, k]

    null = classes.null if classes else len(captions.texts)
    return Network(base.model.unet, init, unet, tell, null, choose if captions.rows.shape[1] > 1 else None)


def _learning(config: ConfigDict, base: Base) -> tuple[str, ...]:
    """The parts of the model that learn, unless LoRA does; CompVis trained the classes' embeddings with the UNet."""
    return ("unet", "conditioner") if base.model.classes or reads_along(config, base.model) else ("unet",)


def lora_scale(config: ConfigDict) -> float:
    """What B A is multiplied by (Hu 2021, section 4.1)."""
    return config.lora.alpha / config.lora.rank


def trained_shapes(config: ConfigDict, base: Base) -> Any:
    """Shapes and types of what is trained, as checkpoints have it."""
    shapes = jax.eval_shape(build_network(config, base, NO_CAPTIONS).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), shapes)


def with_trained(config: ConfigDict, base: Base, trained: dict[str, Any]) -> dict[str, Any]:
    """The model's parameters with what was trained in the place of its own, or added to them, in the type of these."""
    trained = jax.device_get(trained)
    if config.lora.rank:
        trained = {"unet": lora.merge(base.params["unet"], trained["lora"], lora_scale(config))}
    before = {name: base.params[name] for name in trained.keys() & set(_learning(config, base))}
    after = {name: trained[name] for name in before}
    return base.params | jax.tree.map(lambda new, old: np.asarray(new, old.dtype), after, before)
