"""The report of compiling all training steps of a config: memory, operations, collectives, and a predicted speed.

Memory, bytes and collectives are of the compiled programs; operations are counted. Times are predictions: no run has
measured them. They are those of the peaks of arithmetic, memory and interconnect, which no run reaches.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from ldm_jax.errors import InputError
from ldm_jax.runtime.engine import make_engine
from ldm_jax.runtime.memory import device_memory
from ldm_jax.runtime.topology import Chip, Topology
from ldm_jax.training.compiled_step import GB, CompiledStep, compile_step
from ldm_jax.training.run import Run
from ldm_jax.training.stage_inputs import stage_inputs


class Target(NamedTuple):
    """What the steps are compiled for."""

    name: str  # a topology, or the devices of this machine
    devices: int
    memory: float  # bytes of each device
    chip: Chip | None  # None: of unknown speed


class Prediction(NamedTuple):
    """The predicted duration of a step."""

    arithmetic: float  # seconds at the chip's peak
    memory: float  # seconds at the memory's peak bandwidth
    communication: float  # seconds at the interconnect's peak bandwidth
    batch_size: int  # images over all devices

    @property
    def seconds(self) -> float:
        """Arithmetic and memory overlap, communication does not."""
        return max(self.arithmetic, self.memory) + self.communication

    @property
    def images_per_second(self) -> float:
        """Training images, over all devices."""
        return self.batch_size / self.seconds

    @property
    def utilization(self) -> float:
        """The fraction of the arithmetic peak, from 0 to 1."""
        return self.arithmetic / self.seconds

    def to_dict(self) -> dict[str, float]:
        """By name: the seconds, their parts, and what follows from them."""
        names = ("arithmetic", "memory", "communication", "seconds", "images_per_second", "utilization")
        return {name: getattr(self, name) for name in names}


def print_report(run: Run, topology: Topology | None) -> None:
    """Compiles the step of each stage, for a topology or for the devices of this machine; prints a table and JSON.

    Raises InputError if a step needs more memory than a device has, or if there is none.
    """
    config, devices = run.config, topology and topology.devices
    if topology:
        target = Target(topology.name, len(topology.devices), topology.chip.memory, topology.chip)
    else:
        target = Target(f"this machine's {jax.devices()[0].device_kind}", jax.device_count(), device_memory(), None)
    engine = make_engine(config.parallel.engine, config.parallel.fsdp, devices)
    hosts, platform = (1, "tpu") if topology else (jax.process_count(), None)
    steps = [compile_step(run, inputs, engine, target.devices, hosts, platform) for inputs in stage_inputs(run)]
    if not steps:
        raise InputError(f"config.stages={config.stages} has no stage that is trained: there is nothing to compile")
    if jax.process_index() == 0:
        parallel = ", ".join(f"{name} {value}" for name, value in config.parallel.items())
        print(f"Compiled for {target.name}, devices: {target.devices} ({parallel}):\n{table(steps, config, target)}")
        print(to_json(steps, config, target), flush=True)
    if wrong := [step for step in steps if changes(step, config, target)]:
        most = max(wrong, key=lambda step: step.total)
        raise InputError(
            f"stage {most.name!r} needs {most.total / GB:.1f} GB of {target.memory / GB:.1f} GB on each device of "
            f"{target.name}; try {' or '.join(changes(most, config, target))}"
        )


def predict(step: CompiledStep, chip: Chip, devices: int) -> Prediction:
    """The duration of a step by the roofline of a chip (Williams 2009) and its interconnect."""
    arithmetic = step.flops / devices / chip.flops
    memory = step.traffic / chip.bandwidth
    communication = sum(each.sent for each in step.collectives.values()) / chip.interconnect
    return Prediction(arithmetic, memory, communication, step.batch_size)


def changes(step: CompiledStep, config: ConfigDict, target: Target) -> list[str]:
    """The flags that lower the memory of a step that does not fit, those that lower it most first; [] if it fits."""
    if step.fits(target.memory):
        return []
    parallel, memory = config.parallel, step.memory
    state = sum(memory[kind] for kind in ("parameters", "EMA", "optimizer", "frozen"))
    gains: list[tuple[float, str]] = []
    if parallel.engine == "pmap" and target.devices > 1:
        gains.append((state * (1 - 1 / target.devices), "--config.parallel.engine=fsdp"))
    elif 0 < parallel.fsdp < target.devices:
        gains.append((state * (1 - parallel.fsdp / target.devices), "--config.parallel.fsdp=0"))
    if step.name == "diffusion" and not parallel.remat:
        gains.append((0.7 * memory["activations"], "--config.parallel.remat=True"))
    rows = step.batch_size // target.devices // parallel.accumulate
    if rows > 1:
        half = (memory["activations"] + memory["temporaries"]) / 2
        can = step.name in ("diffusion", "classifier")
        flag = f"--config.parallel.accumulate={2 * parallel.accumulate}" if can and not rows % 2 else None
        smaller = step.batch_size // rows * (rows // 2)
        gains.append((half, flag or f"--config.{step.name}.batch_size={smaller}"))
    if memory["data"] > GB / 2:
        gains.append((memory["data"], "--config.data.memory_limit_gb=0"))
    return [flag for _, flag in sorted(gains, reverse=True)] or ["a smaller model, or more devices"]


def to_json(steps: Sequence[CompiledStep], config: ConfigDict, target: Target) -> str:
    """The report as one line of JSON: bytes, operations and seconds."""
    stages = {}
    for step in steps:
        about: dict[str, Any] = {"batch_size": step.batch_size, "memory": step.memory, "memory_total": step.total}
        about |= {"flops": step.flops, "bytes": step.traffic}
        about["collectives"] = {kind: each._asdict() for kind, each in step.collectives.items()}
        if target.chip and step.traffic:
            about["prediction"] = predict(step, target.chip, target.devices).to_dict()
        about |= {"fits": step.fits(target.memory), "change": changes(step, config, target)}
        stages[step.name] = about
    head = {"compiled_for": target.name, "devices": target.devices, "memory": target.memory}
    head |= {"chip": target.chip and target.chip._asdict(), "parallel": config.parallel.to_dict()}
    return json.dumps(head | {"stages": stages})


def table(steps: Sequence[CompiledStep], config: ConfigDict, target: Target) -> str:
    """The report as a table, one column for each stage."""
    kinds = list(dict.fromkeys(kind for step in steps for kind in step.memory))
    rows = [("memory of a device, GB", [""] * len(steps))]
    rows += [(f"  {kind}", [f"{step.memory.get(kind, 0) / GB:.3f}" for step in steps]) for kind in kinds]
    rows += [("  total", [f"{step.total / GB:.3f}" for step in steps])]
    rows += [("  it has", [f"{target.memory / GB:.3f}"] * len(steps))]
    rows += [("batch, over all devices", [f"{step.batch_size:,}" for step in steps])]
    rows += [("Tflop a step, all devices", [f"{step.flops / 1e12:.4g}" for step in steps])]
    rows += [("GB from and to memory, a device", [f"{step.traffic / GB:.3f}" for step in steps])]
    for kind in sorted({kind for step in steps for kind in step.collectives}):
        found = [step.collectives.get(kind) for step in steps]
        rows.append(
            (f"{kind}: number, GB", [f"{each.count}, {each.bytes / GB:.3f}" if each else "0" for each in found])
        )
    if target.chip and all(step.traffic for step in steps):
        rows += _prediction_rows([predict(step, target.chip, target.devices) for step in steps])
    rows += [("fits", ["yes" if step.fits(target.memory) else "no" for step in steps])]
    width = max(len(label) for label, _ in rows)
    columns = [max(len(cells[i]) for cells in (*(cells for _, cells in rows), names(steps))) for i in range(len(steps))]
    lines = [("", names(steps)), *rows]
    return "\n".join(
        f"{label:<{width}}" + "".join(f"  {cell:>{columns[i]}}" for i, cell in enumerate(cells))
        for label, cells in lines
    )


def names(steps: Sequence[CompiledStep]) -> list[str]:
    """The names of the stages."""
    return [step.name for step in steps]


def _prediction_rows(predictions: Sequence[Prediction]) -> list[tuple[str, list[str]]]:
    rows = [("prediction, ms a step", [f"{1e3 * each.seconds:.3g}" for each in predictions])]
    for part in ("arithmetic", "memory", "communication"):
        rows.append((f"  {part} alone", [f"{1e3 * getattr(each, part):.3g}" for each in predictions]))
    rows.append(("prediction, images/s", [f"{each.images_per_second:,.0f}" for each in predictions]))
    return [*rows, ("prediction, utilization", [f"{each.utilization:.0%}" for each in predictions])]
