"""Our side: on "train N" or "sample N", does N train steps or draws N batches, and tells the seconds."""

import sys
import time

from ldm_jax.runtime.xla import configure

configure()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from configs.fashion_mnist import get_config  # noqa: E402
from ldm_jax.pipeline import from_config as pipeline_from_config  # noqa: E402
from ldm_jax.runtime.parallel import parallel_step, replicate, shard  # noqa: E402
from ldm_jax.sampling import generate, tables  # noqa: E402
from ldm_jax.sampling.generate import request  # noqa: E402
from ldm_jax.training import from_config as training_from_config  # noqa: E402

BATCH, STEPS, GUIDANCE = 128, 10, 1.5


def main() -> None:
    config = get_config().unlock()
    config.diffusion.batch_size = BATCH
    shape, rng = pipeline_from_config.latent_shape(config), np.random.default_rng(0)
    stage = training_from_config.build_diffusion_stage(config, 10)
    state = replicate(jax.jit(stage.init)(jax.random.key(0)))
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params["unet"]))
    frozen = replicate({"autoencoder": {}, "shift": np.zeros(shape[-1]), "scale": np.ones(shape[-1])})
    batch = shard(
        {
            "moments": rng.normal(size=(BATCH, 1, *shape[:2], 2 * shape[2])).astype(np.float32),
            "label": rng.integers(0, 10, BATCH).astype(np.int32),
            "id": np.arange(BATCH, dtype=np.int32),
        }
    )
    step = parallel_step(stage.step)
    generator = generate.build_generator(config, 10, BATCH)
    table = tables.build_table(config, sampler="ddim", steps=STEPS)
    drawn = replicate(jax.tree.map(np.asarray, state.ema_params)) | frozen
    wanted, number = request(BATCH, list(range(10)), guidance=GUIDANCE, seed=0), 0
    print(f"ready {params}", flush=True)
    for line in sys.stdin:
        what, n = line.split()
        start = time.perf_counter()
        for _ in range(int(n)):
            if what == "train":
                state, metrics = step(state, frozen, {}, batch, np.int32(number), np.uint32(0))
                number += 1
            else:
                list(generator.latents(drawn, wanted, table))
        if what == "train":
            jax.block_until_ready(metrics)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
