"""Worker process of experiments/data_parallel, with the number of devices set in its environment: see run.py.

    python -m experiments.data_parallel.worker --budget=cpu --out=FILE [--coordinator=HOST:PORT --process_id=0]

Trains by each strategy from the same state, alternating their steps, so that other load affects all alike. The first
process writes the losses and step times of each strategy to FILE.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.runner import Workspace
from experiments.untrained import diffusion_start
from ldm_jax.data.feeds import DeviceFeed
from ldm_jax.data.from_config import load_split
from ldm_jax.runtime.engine import Engine, make_engine
from ldm_jax.runtime.files import write_json
from ldm_jax.runtime.parallel import take, wait_for_hosts
from ldm_jax.runtime.xla import configure

STEPS = {"smoke": 3, "minutes": 40, "gpu": 400}
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
    results = measure(Workspace(args.budget, args.data_dir, Path()), STEPS[args.budget])
    if jax.process_index() == 0:
        write_json(args.out, results)


def measure(workspace: Workspace, steps: int) -> dict[str, Any]:
    """Trains by each strategy: {strategy: {"losses": [steps], "step_seconds": [steps], "state_bytes": per device}}."""
    config = workspace.config(PIXELS | ({"data.image_size": 8} if workspace.budget == "smoke" else {}))
    data = load_split(config, config.data.train_split)
    feed = DeviceFeed(data.arrays, BATCH_SIZE, 0, jax.process_index(), jax.process_count())
    stage, state, frozen = diffusion_start(config, jax.random.fold_in(jax.random.key(0), 0))
    strategies = make_strategies(stage, frozen, feed, jax.device_get(state))
    results: dict[str, Any] = {name: {"losses": [], "step_seconds": []} for name in strategies}
    states = {name: start for name, (_, start) in strategies.items()}
    for name, state in states.items():
        results[name]["state_bytes"] = bytes_per_device(state)
    for number in range(steps):
        batch = feed(number)
        for name, (step, _) in strategies.items():
            wait_for_hosts(f"{name} {number}")
            begin = time.monotonic()
            states[name], metrics = step(states[name], batch, number)
            results[name]["losses"].append(float(metrics["loss"]))  # blocks until done
            results[name]["step_seconds"].append(time.monotonic() - begin)
    return results


def make_strategies(stage: Any, frozen: dict, feed: DeviceFeed, state: Any) -> dict[str, tuple[Step, Any]]:
    """Strategy -> (step, initial state); `jit` only with a single host."""
    seed, strategies = np.uint32(0), {}
    for name in ("pmap", "FSDP"):
        strategies[name] = _strategy(make_engine(name.lower()), stage, frozen, feed, state)
    if jax.process_count() > 1:
        return strategies
    jitted = jax.jit(
        lambda state, frozen, resident, batch, number: stage.step(
            state, frozen, take(resident, batch) | {"step": number}, seed
        ),
        donate_argnums=0,
    )
    first = jax.local_devices()[0]
    on_first = jax.device_put((frozen, feed.resident), first)

    def jit(state, batch, number):
        return jitted(state, *on_first, batch, np.int32(number))

    return {"jit": (jit, jax.device_put(state, first))} | strategies


def _strategy(engine: Engine, stage: Any, frozen: dict, feed: DeviceFeed, state: Any) -> tuple[Step, Any]:
    """The step of an engine, and its initial state."""
    run, on_devices = engine.step(stage), (engine.place_params(frozen), engine.place(feed.resident))

    def step(state, batch, number):
        return run(state, *on_devices, engine.shard_batch(batch), np.int32(number), np.uint32(0))

    return step, engine.place_params(state)


def bytes_per_device(state: Any) -> int:
    """The bytes of a state's arrays on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


if __name__ == "__main__":
    main()
