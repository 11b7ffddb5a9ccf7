"""One process of an arm of experiments/data_parallel, with as many devices as its environment says: see run.py.

    python -m experiments.data_parallel.worker --budget=cpu --out=FILE [--coordinator=HOST:PORT --process_id=0]

Trains from the same start in each way, a step of the one after a step of the other, so that whatever else the machine
does falls on all of them. The first process leaves in FILE, of each way, the losses and how long each step took.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.data_parallel import fsdp
from experiments.frame import Lab
from experiments.untrained import diffusion_start
from ldm_jax.data.feeds import DeviceFeed
from ldm_jax.data.from_config import load_split
from ldm_jax.runtime.files import write_json
from ldm_jax.runtime.parallel import parallel_step, replicate, shard, take, wait_for_hosts
from ldm_jax.runtime.xla import configure

STEPS = {"smoke": 3, "cpu": 40, "gpu": 400}
BATCH_SIZE = 16
PIXELS = {"autoencoder.type": "none", "diffusion.batch_size": BATCH_SIZE}

Step = Callable[[Any, dict, int], tuple[Any, dict]]  # (state, batch of this host, number) -> (state, metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=STEPS, required=True)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--coordinator")
    parser.add_argument("--process_id", type=int, default=0)
    args = parser.parse_args()
    configure(fast_compile=args.budget == "smoke")
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, 2, args.process_id)
    found = measure(Lab(args.budget, args.data_dir, Path()), STEPS[args.budget])
    if jax.process_index() == 0:
        write_json(args.out, found)


def measure(lab: Lab, steps: int) -> dict[str, Any]:
    """{way: {"losses": [steps], "step_seconds": [steps], "state_bytes": on a device}}"""
    config = lab.config(PIXELS | ({"data.image_size": 8} if lab.budget == "smoke" else {}))
    data = load_split(config, config.data.train_split)
    feed = DeviceFeed(data.arrays, BATCH_SIZE, 0, jax.process_index(), jax.process_count())
    stage, state, frozen = diffusion_start(config, jax.random.fold_in(jax.random.key(0), 0))
    ways = ways_of(stage, frozen, feed, jax.device_get(state))
    found: dict[str, Any] = {way: {"losses": [], "step_seconds": []} for way in ways}
    states = {way: start for way, (_, start) in ways.items()}
    for way, state in states.items():
        found[way]["state_bytes"] = fsdp.bytes_on_a_device(state)
    for number in range(steps):
        batch = feed(number)
        for way, (step, _) in ways.items():
            wait_for_hosts(f"{way} {number}")
            begin = time.monotonic()
            states[way], metrics = step(states[way], batch, number)
            found[way]["losses"].append(float(metrics["loss"]))  # waits
            found[way]["step_seconds"].append(time.monotonic() - begin)
    return found


def ways_of(stage: Any, frozen: dict, feed: DeviceFeed, state: Any) -> dict[str, tuple[Step, Any]]:
    """Way -> how it makes a step, and the state that it begins with. Several hosts cannot do with one device."""
    mesh, seed = Mesh(np.array(jax.devices()), ("data",)), np.uint32(0)
    mapped, here = parallel_step(stage), (replicate(frozen), replicate(feed.resident))
    cut = fsdp.sharded_step(stage, mesh, state)
    everywhere = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), fsdp.whole(mesh)), (frozen, feed.resident))

    def pmap(state, batch, number):
        return mapped(state, *here, shard(batch), np.int32(number), seed)

    def sharded(state, batch, number):
        return cut(state, *everywhere, fsdp.shard_batch(mesh, batch), np.int32(number), seed)

    ways = {"pmap": (pmap, replicate(state)), "FSDP": (sharded, fsdp.shard_state(mesh, state))}
    if jax.process_count() > 1:
        return ways
    alone = jax.jit(
        lambda state, frozen, resident, batch, number: stage.step(
            state, frozen, take(resident, batch) | {"step": number}, seed
        ),
        donate_argnums=0,
    )
    first = jax.local_devices()[0]
    on_first = jax.device_put((frozen, feed.resident), first)

    def jit(state, batch, number):
        return alone(state, *on_first, batch, np.int32(number))

    return {"jit": (jit, jax.device_put(state, first))} | ways


if __name__ == "__main__":
    main()
