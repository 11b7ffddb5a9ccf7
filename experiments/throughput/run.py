"""Throughput of training and sampling in ldm_jax and PyTorch, with the same network on the same machine, in turns.

    make parity   # once: makes .venv-parity with PyTorch and diffusers
    .venv/bin/python -m experiments.throughput.run [--rounds=7] [--torch_python=.venv-parity/bin/python]

Writes results.json and prints the table of README.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
REPEATS = {"train": 8, "sample": 1}  # train steps or sampled batches per turn


class Worker:
    """A worker process that trains or samples on command and prints the seconds."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.parameters = int(self._answer().split()[1])

    def _answer(self) -> str:
        while line := self.process.stdout.readline():
            if line.startswith("ready") or line.strip().replace(".", "").replace("e-", "").isdigit():
                return line
        raise SystemExit(f"{self.process.args} ended with status {self.process.wait()}")

    def __call__(self, what: str) -> float:
        """Runs one turn of `what` ("train" or "sample"); seconds per train step or batch."""
        self.process.stdin.write(f"{what} {REPEATS[what]}\n")
        self.process.stdin.flush()
        return float(self._answer()) / REPEATS[what]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch_python", default=".venv-parity/bin/python")
    args = parser.parse_args()
    workers = {
        "ldm_jax": Worker(sys.executable, "-m", "experiments.throughput.jax_worker"),
        "torch eager": Worker(args.torch_python, str(HERE / "torch_worker.py"), "eager"),
        "torch.compile": Worker(args.torch_python, str(HERE / "torch_worker.py"), "compile"),
    }
    assert len({worker.parameters for worker in workers.values()}) == 1, (
        "the networks differ in their number of parameters"
    )
    results = {"parameters": workers["ldm_jax"].parameters, "batch": 128, "rounds": args.rounds}
    for what in REPEATS:
        seconds = {name: [] for name in workers}
        for turn in range(args.rounds + 1):
            for name, worker in workers.items():
                taken = worker(what)
                if turn:  # the first turn compiles
                    seconds[name].append(taken)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        results[what] = {
            name: {
                "images_per_second": 128 / medians[name],
                # The median over rounds of the ratio within a round: other load on the machine affects both.
                "speedup_of_ldm_jax": statistics.median(a / b for a, b in zip(seconds[name], seconds["ldm_jax"])),
            }
            for name in workers
        }
        for name, values in results[what].items():
            speed, ratio = values.values()
            print(f"{what:>7} {name:>14} {speed:8.0f} img/s   {ratio:.2f}x")
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
