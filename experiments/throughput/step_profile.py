"""Where a training step's time goes: XLA's operations by kind, and the arithmetic against the peak of matrix products.

    .venv/bin/python -m experiments.throughput.step_profile [--batch=64]

The network and the step are those of `run.py`. Writes step_profile.json and prints the table of README.md. On CPUs the
trace has the start of a convolution, not its duration: convolutions are what the other operations leave of the step.
"""

import argparse
import gzip
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ldm_jax.runtime.xla import configure

configure()
import jax  # noqa: E402
import numpy as np  # noqa: E402

from configs.fashion_mnist import get_config  # noqa: E402
from experiments.budgets import BY_ADAMW  # noqa: E402
from experiments.untrained import diffusion_start  # noqa: E402

HERE = Path(__file__).parent
STEPS = 12
CONVOLUTIONS, ELEMENTWISE = "convolutions", "elementwise"
# The kind of an operation, by the first pattern that its name has; all others are elementwise.
KINDS = {
    CONVOLUTIONS: r"^conv",
    "matrix products": r"^dot|gemm",
    "transposes, copies, concatenation": r"transpose|copy|concatenate|^slice",
    "sums": r"reduce",
}


def kind_of(operation: str) -> str:
    """The kind of an XLA operation, by its name: a fusion has the names of its last operations."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, operation)), ELEMENTWISE)


def seconds_by_kind(operations: Mapping[str, Sequence[float]], step: float) -> dict[str, float]:
    """Seconds of a step by kind, from the durations of each operation in STEPS steps; the sum is `step`."""
    kinds: dict[str, float] = defaultdict(float)
    for operation, durations in operations.items():
        kinds[kind_of(operation)] += min(durations) * len(durations) / STEPS
    kinds[CONVOLUTIONS] += step - sum(kinds.values())
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def traced(folder: Path) -> dict[str, list[float]]:
    """The durations in seconds of each operation in a trace of `jax.profiler`."""
    operations = defaultdict(list)
    for path in folder.rglob("*.trace.json.gz"):
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
            if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
                operations[event["args"]["hlo_op"]].append(event["dur"] * 1e-6)
    return operations


def peak(n: int = 2048) -> float:
    """Operations per second of the product of two n x n matrices in float32."""
    x, product = jax.random.normal(jax.random.key(0), (n, n)), jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    seconds = []
    for _ in range(8):
        begin = time.perf_counter()
        jax.block_until_ready(product(x))
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    size = parser.parse_args().batch
    config = get_config().unlock()
    config.update_from_flattened_dict(BY_ADAMW | {"diffusion.batch_size": size})
    stage, state, frozen = diffusion_start(config, jax.random.key(0))
    (height, width, channels), rng = stage.model.latent_shape, np.random.default_rng(0)
    batch = {
        "moments": rng.normal(size=(size, 1, height, width, 2 * channels)).astype(np.float32),
        "label": rng.integers(0, 10, size).astype(np.int32),
        "id": np.arange(size, dtype=np.int32),
    }
    step = jax.jit(stage.step, donate_argnums=0)
    compiled = step.lower(state, frozen, batch | {"step": np.int32(0)}, np.uint32(0)).compile()
    seconds = []
    with TemporaryDirectory() as folder:
        for number in range(3 * STEPS):
            if number == 2 * STEPS:
                jax.profiler.start_trace(folder)
            begin = time.perf_counter()
            state, _ = compiled(state, frozen, batch | {"step": np.int32(number)}, np.uint32(0))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - begin)
        jax.profiler.stop_trace()
        operations = traced(Path(folder))
    median = statistics.median(seconds[STEPS : 2 * STEPS])
    flops, highest = compiled.cost_analysis()["flops"], peak()
    kinds = seconds_by_kind(operations, median)
    result = {"batch": size, "seconds": median, "flops": flops, "peak": highest, "seconds_by_kind": kinds}
    (HERE / "step_profile.json").write_text(json.dumps(result, indent=2) + "\n")
    share = f"{flops / median / highest:.0%} of {highest / 1e9:.0f} Gflop/s"
    print(f"{1e3 * median:.1f} ms a step, {flops / 1e9:.1f} Gflop, {share}")
    for kind, value in kinds.items():
        print(f"{kind:>34} {1e3 * value:6.1f} ms {value / median:5.0%}")


if __name__ == "__main__":
    main()
