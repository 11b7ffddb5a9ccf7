"""Speed of training and sampling in ldm_jax and PyTorch, with the same networks on the same machine, in turns.

    make parity   # once: makes .venv-parity with PyTorch and diffusers
    .venv/bin/python -m experiments.throughput.run [--budget=cpu|gpu] [--rounds=7] [--torch_python=PYTHON]

Each measurement is a row of results.json, or with budget gpu of ../gpu/results.json; rows that are there are skipped.
`--only=` prints the table alone.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import tables
from experiments.runner import commit
from experiments.throughput.worker import Worker
from ldm_jax.runtime.files import read_json, write_json

HERE = Path(__file__).parent
GB = 2**30


class Measurement(NamedTuple):
    """What is measured."""

    what: str  # train | sample
    network: str  # a key of NETWORKS
    batch: int
    dtype: str
    times: int  # training steps or sampled batches a turn

    @property
    def name(self) -> str:
        return f"{self.what}, {self.network}, {self.dtype}, batch {self.batch}"


BUDGETS = {
    "cpu": (Measurement("train", "main job", 128, "float32", 8), Measurement("sample", "main job", 128, "float32", 1)),
    "gpu": (
        *(Measurement("train", "main job", batch, "bfloat16", 50) for batch in (64, 1024)),
        *(Measurement("train", "SD 1.5", batch, "bfloat16", 5) for batch in (8, 32, 64)),
        *(Measurement("train", "SDXL", batch, "bfloat16", 3) for batch in (1, 4, 8)),
        Measurement("sample", "main job", 1000, "bfloat16", 1),
        *(Measurement("sample", "SD 1.5", batch, "bfloat16", 1) for batch in (1, 16)),
        *(Measurement("sample", "SDXL", batch, "bfloat16", 1) for batch in (1, 4)),
    ),
}
RESULTS = {"cpu": HERE / "results.json", "gpu": HERE.parent / "gpu" / "results.json"}
# PyTorch's modes; reduce-overhead has CUDA graphs, which small batches gain from.
TORCH = {"eager": "torch eager", "compile": "torch.compile", "reduce-overhead": "torch.compile, reduce-overhead"}
MODES = {
    "cpu": dict.fromkeys(("train", "sample"), ("eager", "compile")),
    "gpu": {"train": ("compile",), "sample": ("reduce-overhead",)},
}


def measure(each: Measurement, modes: tuple[str, ...], torch_python: str, rounds: int) -> dict[str, Any]:
    """The row of a measurement: of each worker its device and version, the seconds of each turn, and its peak memory.

    A worker that ends, for example for want of memory, has "error" instead.
    """
    arguments = [each.what, each.network, str(each.batch), each.dtype]
    commands = {"ldm_jax": (sys.executable, "experiments.throughput.jax_worker", arguments)}
    for mode in modes:
        commands[TORCH[mode]] = torch_python, "experiments.throughput.torch_worker", [*arguments, mode]
    workers, row = {}, {"measurement": each._asdict(), "commit": commit(), "workers": {}}
    for name, command in commands.items():
        row["workers"][name] = {"seconds": []}
        with _errors(row, name, workers):
            workers[name] = Worker(*command)
            row["workers"][name] |= workers[name].about
            row["workers"][name]["first_turn"] = workers[name](each.times)["seconds"]  # compiles
    for _ in range(rounds):
        for name in list(workers):
            with _errors(row, name, workers):
                answer = workers[name](each.times)
                row["workers"][name]["seconds"].append(answer["seconds"] / each.times)
                row["workers"][name]["memory"] = answer["memory"]
    for worker in workers.values():
        worker.stop()
    if len({about["parameters"] for about in row["workers"].values() if "parameters" in about}) > 1:
        raise SystemExit(f"{each.name}: the networks differ in their number of parameters")
    return row


@contextlib.contextmanager
def _errors(row: dict[str, Any], name: str, workers: dict[str, Worker]):
    """Notes that a worker has ended, and leaves it out from then on."""
    try:
        yield
    except RuntimeError as error:
        row["workers"][name]["error"] = str(error)
        workers.pop(name, None)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Images/s of each worker, and how much faster ldm_jax is: the median over rounds of the ratio within a round."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row["workers"]))
    head = ["", *names, *(f"against {name}" for name in names[1:]), "Tflop/s of ldm_jax", "GB", "first turn, s"]
    body = []
    for name, row in rows.items():
        workers = row["workers"]
        own, batch = workers["ldm_jax"], row["measurement"]["batch"]
        seconds = {each: workers[each]["seconds"] if each in workers else None for each in names}
        speeds = ["" if each is None else _median("{:.3g}", (batch / value for value in each)) or "failed"
                  for each in seconds.values()]  # fmt: skip
        ratios = [
            _median("{:.2f}x", (a / b for a, b in zip(seconds[each] or [], own["seconds"]))) for each in names[1:]
        ]
        flops = _median("{:.3g}", (own["flops"] / value / 1e12 for value in own["seconds"]))
        memory, first = own.get("memory"), own.get("first_turn")
        more = [f"{memory / GB:.1f}" if memory else "", f"{first:.0f}" if first else ""]
        body.append([name, *speeds, *ratios, flops, *more])
    return tables.table(head, body)


def _median(form: str, values: Iterable[float]) -> str:
    """The median in this format, "" of no values."""
    values = list(values)
    return form.format(statistics.median(values)) if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="rows to measure, by the beginning of their names")
    parser.add_argument("--torch_python", default=".venv-parity/bin/python")
    parser.add_argument("--out", type=Path, help="file of the results")
    args = parser.parse_args()
    for name in filter(None, args.only or []):
        if not any(each.name.startswith(name) for each in BUDGETS[args.budget]):
            parser.error(
                f"there is no row {name!r}; the rows are: {'; '.join(each.name for each in BUDGETS[args.budget])}"
            )
    out = args.out or RESULTS[args.budget]
    rows = read_json(out) if out.exists() else {}
    for each in BUDGETS[args.budget]:
        chosen = args.only is None or any(name and each.name.startswith(name) for name in args.only)
        if chosen and each.name not in rows:
            rows[each.name] = measure(each, MODES[args.budget][each.what], args.torch_python, args.rounds)
            write_json(out, rows)
            print(f"{each.name}: done", flush=True)
    if rows:
        print(table(rows))


if __name__ == "__main__":
    main()
