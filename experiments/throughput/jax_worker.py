"""ldm_jax's worker: on a line "train N" or "sample N" makes N train steps or samples N batches; prints the seconds."""

import sys
import time
from collections.abc import Callable

from ldm_jax.runtime.xla import configure

configure()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from configs.fashion_mnist import get_config  # noqa: E402
from experiments.budgets import BY_ADAMW  # noqa: E402
from experiments.recipes import balanced_recipe, make_guidance  # noqa: E402
from experiments.untrained import DiffusionStart, diffusion_start  # noqa: E402
from ldm_jax.runtime.parallel import parallel_step, replicate, shard  # noqa: E402
from ldm_jax.sampling.inputs import sample_inputs  # noqa: E402
from ldm_jax.sampling.recipe import solving_defaults  # noqa: E402
from ldm_jax.sampling.sampler import make_sampler  # noqa: E402
from ldm_jax.sampling.tables import make_table  # noqa: E402

BATCH, STEPS, GUIDANCE = 128, 10, 1.5


def main() -> None:
    config = get_config().unlock()
    config.update_from_flattened_dict(BY_ADAMW | {"diffusion.batch_size": BATCH})
    start = diffusion_start(config, jax.random.key(0))
    work = {"train": make_train(start), "sample": make_sample(start)}
    print(f"ready {sum(leaf.size for leaf in jax.tree.leaves(start.state.params['denoiser']))}", flush=True)
    for line in sys.stdin:
        what, n = line.split()
        begin = time.perf_counter()
        work[what](int(n))
        print(time.perf_counter() - begin, flush=True)


def make_train(start: DiffusionStart) -> Callable[[int], None]:
    """Makes train(n): n training steps."""
    (height, width, channels), rng = start.stage.model.latent_shape, np.random.default_rng(0)
    batch = shard(
        {
            "moments": rng.normal(size=(BATCH, 1, height, width, 2 * channels)).astype(np.float32),
            "label": rng.integers(0, 10, BATCH).astype(np.int32),
            "id": np.arange(BATCH, dtype=np.int32),
        }
    )
    step, state, frozen, number = parallel_step(start.stage), replicate(start.state), replicate(start.frozen), 0

    def train(n: int) -> None:
        nonlocal state, number
        for _ in range(n):
            state, metrics = step(state, frozen, {}, batch, np.int32(number), np.uint32(0))
            number += 1
        jax.block_until_ready(metrics)

    return train


def make_sample(start: DiffusionStart) -> Callable[[int], None]:
    """Makes sample(n): n batches of sampled latents."""
    model = start.stage.model
    recipe = balanced_recipe(
        model, BATCH, guidance=make_guidance(GUIDANCE), solving=solving_defaults(model, "ddim", STEPS)
    )
    sampler, table = make_sampler(model, BATCH), make_table(model, recipe.solving)
    params = replicate(jax.device_get(start.state.ema_params) | start.frozen)
    _, inputs = sample_inputs(model, params, recipe, sampler)

    def sample(n: int) -> None:
        for _ in range(n):
            list(sampler.latents(params, inputs, table))

    return sample


if __name__ == "__main__":
    main()
