"""Goodput: the share of a run's time that went into training steps that count, and where the rest went.

Computed from metrics.jsonl alone, over all starts of a run. The time between the last line of a killed start and the
next start is not in it: nothing ran.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.config.fields import STAGES
from ldm_jax.run_folder.log import TIMING

# What time is spent on, in the order of the report, and the keys of its seconds in metrics.jsonl.
WITHIN = {"data": "data_seconds", "checkpoints": "checkpoint_seconds", "validation": "validation_seconds"}
OUTSIDE = {
    "latents": ("latents",),
    "sampling": ("sampling", "prompts"),
    "scoring": ("scoring",),
    "starting": ("setup",),
}


def seconds(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The seconds of a run by what they were spent on, "steps" first; the lines are those of metrics.jsonl.

    The sum is the time of the run. "lost" are steps that were made again after a kill, "other" is what no line names.
    """
    total: dict[str, float] = defaultdict(float)
    for line in metrics:
        if line["stage"] == TIMING:
            for name, value in line.items():
                total[name] += value if name.endswith("_seconds") else 0.0
    compiling = sum(value for name, value in total.items() if name.endswith("_compile_seconds"))
    spent = {"compiling": compiling}
    for activity, key in WITHIN.items():
        spent[activity] = sum(total[f"{stage}_{key}"] for stage in STAGES)
    trained = sum(total[f"{stage}_seconds"] - total[f"{stage}_compile_seconds"] for stage in STAGES)
    steps = trained - sum(spent[activity] for activity in WITHIN)
    for activity, stages in OUTSIDE.items():
        spent[activity] = sum(total[f"{stage}_seconds"] - total[f"{stage}_compile_seconds"] for stage in stages)
    spent["lost"] = sum(total[f"{stage}_lost_seconds"] for stage in STAGES)
    time = metrics[-1]["time"] if metrics else 0.0
    return {"steps": steps} | spent | {"other": max(0.0, time - steps - sum(spent.values()))}


def shares(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`seconds` as shares of the time, that of "steps" by the name "goodput"."""
    spent = seconds(metrics)
    time = sum(spent.values())
    return {"goodput" if name == "steps" else name: value / time for name, value in spent.items()} if time else {}
