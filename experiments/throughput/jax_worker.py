"""ldm_jax's worker: training or sampling of one UNet, compiled as the product compiles them; see `worker.serve`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ldm_jax.runtime.xla import configure

configure()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from configs.fashion_mnist import get_config  # noqa: E402
from experiments.budgets import BY_ADAMW  # noqa: E402
from experiments.recipes import balanced_recipe, make_guidance  # noqa: E402
from experiments.throughput.networks import NETWORKS, POOLED, TIME_IDS, Network  # noqa: E402
from experiments.throughput.worker import serve  # noqa: E402
from ldm_jax.interop.modules import unet_from_config  # noqa: E402
from ldm_jax.models.conditioning import EncodedConditioning  # noqa: E402
from ldm_jax.models.unet import Added  # noqa: E402
from ldm_jax.pipeline.from_config import from_config, identity_scale  # noqa: E402
from ldm_jax.pipeline.model import LatentDiffusion, Params, apply_denoiser  # noqa: E402
from ldm_jax.pipeline.trainable import Parts  # noqa: E402
from ldm_jax.runtime.operations import count_flops  # noqa: E402
from ldm_jax.runtime.parallel import parallel_step, replicate, shard  # noqa: E402
from ldm_jax.sampling.inputs import sample_inputs  # noqa: E402
from ldm_jax.sampling.recipe import solving_defaults  # noqa: E402
from ldm_jax.sampling.sampler import make_sampler  # noqa: E402
from ldm_jax.sampling.tables import make_table  # noqa: E402
from ldm_jax.training.from_config import make_diffusion_stage  # noqa: E402


@dataclass(frozen=True)
class RandomEmbeddings(EncodedConditioning):
    """Conditioning on random text embeddings: of one text, and of the null condition."""

    tokens: int
    dim: int
    added: bool

    def table(self) -> dict[str, Any]:
        """The denoiser's arguments, [2, ...]."""
        normal = partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
        pooled = {"added": Added(normal((2, POOLED)), np.ones((2, TIME_IDS), np.float32))} if self.added else {}
        return {"context": normal((2, self.tokens, self.dim)), **pooled}


def make_model(network: Network, dtype: str) -> tuple[LatentDiffusion, Params]:
    """The latent diffusion model of a UNet with random parameters, and these; the first stage is not used."""
    model = from_config(get_config(), ())
    unet = unet_from_config({"_class_name": "UNet2DConditionModel", **network.config}, dtype=jnp.dtype(dtype))
    conditioning = RandomEmbeddings(network.tokens, network.config["cross_attention_dim"], network.added)
    side = model.first_stage.downsampling * network.config["sample_size"]
    model = replace(model, denoiser=unet, conditioning=conditioning, image_shape=(side, side, 1))
    one = jax.tree.map(lambda rows: rows[:1], conditioning.table())
    z, t = jnp.zeros((1, *model.latent_shape)), jnp.zeros(1)
    init = jax.jit(lambda rng: unet.init(rng, z, t, **one)["params"])
    scale = identity_scale(model.latent_shape[-1])
    return model, {"denoiser": init(jax.random.key(0)), "conditioning": {}, "first_stage": {}, **scale}


def make_train(model: LatentDiffusion, params: Params, batch: int) -> tuple[Callable[[], Any], int]:
    """A function that takes one training step, and its operations."""
    config = get_config().unlock()
    config.update_from_flattened_dict(BY_ADAMW | {"diffusion.batch_size": batch})
    trainable, (height, width, channels) = Parts(("denoiser",)), model.latent_shape
    stage = make_diffusion_stage(model, trainable, config)
    state = replicate(jax.jit(stage.init)(jax.random.key(0), params))
    frozen = replicate(trainable.frozen(params) | {"table": model.conditioning.table()})
    moments = np.random.default_rng(0).standard_normal((batch, 1, height, width, 2 * channels), np.float32)
    rows = shard({"moments": moments, "label": np.zeros(batch, np.int32), "id": np.arange(batch, dtype=np.int32)})
    step, number = parallel_step(stage), 0
    flops = count_flops(jax.make_jaxpr(step)(state, frozen, {}, rows, np.int32(0), np.uint32(0)).jaxpr)

    def train() -> Any:
        nonlocal state, number
        state, metrics = step(state, frozen, {}, rows, np.int32(number), np.uint32(0))
        number += 1
        return metrics

    return train, flops


def make_sample(model: LatentDiffusion, params: Params, batch: int, network: Network) -> tuple[Callable[[], Any], int]:
    """A function that samples one batch of latents, and its operations."""
    solving = solving_defaults(model, "ddim", network.steps)
    recipe = balanced_recipe(model, batch, labels=[0], guidance=make_guidance(network.scale), solving=solving)
    sampler, table, params = make_sampler(model, batch), make_table(model, recipe.solving), replicate(params)
    _, inputs = sample_inputs(model, params, recipe, sampler)
    two = jax.tree.map(lambda rows: np.repeat(rows, batch, axis=0), model.conditioning.table())
    shapes = jnp.zeros((2 * batch, *model.latent_shape)), jnp.zeros(2 * batch), two
    one_call = count_flops(jax.make_jaxpr(partial(apply_denoiser, model, params))(*shapes).jaxpr)
    return lambda: list(sampler.latents(params, inputs, table)), network.steps * one_call


def main(what: str, name: str, batch: str, dtype: str) -> None:
    network = NETWORKS[name]
    model, params = make_model(network, dtype)
    size = sum(leaf.size for leaf in jax.tree.leaves(params["denoiser"]))
    make = make_train if what == "train" else partial(make_sample, network=network)
    call, flops = make(model, params, int(batch))
    del params  # the state of a training has its own
    results: list[Any] = []

    def once() -> None:
        results[:] = [call()]

    def memory() -> int:
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    about = {
        "parameters": size,
        "flops": flops,
        "device": jax.devices()[0].device_kind,
        "version": f"jax {jax.__version__}",
    }
    serve(once, lambda: jax.block_until_ready(results), memory, about)


if __name__ == "__main__":
    main(*sys.argv[1:])
