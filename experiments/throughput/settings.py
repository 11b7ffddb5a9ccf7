"""Speed of a training step of the main job's UNet under settings of XLA and of glibc, on the same machine, in turns.

    .venv/bin/python -m experiments.throughput.settings [--rounds=9] [--batch=64]

Writes settings.json and prints the table of README.md. The step is that of `run.py`; the others are compared to the
first setting.
"""

import argparse
import statistics
import sys
from pathlib import Path

from experiments import tables
from experiments.throughput.worker import Worker
from experiments.workers import KEPT_MEMORY
from ldm_jax.runtime.files import write_json

HERE = Path(__file__).parent
STEPS = 8  # a turn
HUGE_PAGES = "glibc.malloc.hugetlb=1"
USED = {"GLIBC_TUNABLES": KEPT_MEMORY}
FLAGS = (  # of XLA, each with the used settings of glibc
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_cpu_enable_concurrency_optimized_scheduler=true",
    "--xla_cpu_experimental_onednn_custom_call=true",
    "--xla_cpu_prefer_vector_width=512",
)
SETTINGS = {
    "as `make train`: freed memory kept, huge pages": USED,
    "freed memory not kept": {"GLIBC_TUNABLES": HUGE_PAGES},
    "no huge pages": {"GLIBC_TUNABLES": KEPT_MEMORY.replace(f"{HUGE_PAGES}:", "")},
    "neither": {"GLIBC_TUNABLES": ""},
    "two devices, data parallel": USED | {"JAX_NUM_CPU_DEVICES": "2"},
} | {f"`{flag}`": USED | {"XLA_FLAGS": flag} for flag in FLAGS}


def measure(arguments: list[str], rounds: int, times: int) -> dict[str, list[float]]:
    """Seconds of a step under each setting, by rounds, in each of which all settings have a turn of `times` steps."""
    workers = {name: Worker(sys.executable, "experiments.throughput.jax_worker", arguments, environment)
               for name, environment in SETTINGS.items()}  # fmt: skip
    for worker in workers.values():
        worker(1)  # compiles
    seconds = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name].append(worker(times)["seconds"] / times)
    for worker in workers.values():
        worker.stop()
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Milliseconds of a step, and the speed relative to the first setting: medians over the rounds."""
    used = next(iter(seconds.values()))
    body = []
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(used, values, strict=True))
        body.append([name, f"{1e3 * statistics.median(values):.0f}", f"{ratio:.2f}x"])
    return tables.table(["setting", "ms a step", "speed"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    seconds = measure(["train", "main job", str(args.batch), "float32"], args.rounds, STEPS)
    write_json(HERE / "settings.json", {"batch": args.batch, "seconds": seconds})
    print(table(seconds))


if __name__ == "__main__":
    main()
