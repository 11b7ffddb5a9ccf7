"""A stage's training step, compiled: its memory on each device by kind, its operations, bytes and collectives."""

import math
import re
from typing import Any, NamedTuple

import jax

from ldm_jax.errors import InputError
from ldm_jax.models.backend import compiling_for
from ldm_jax.runtime.engine import Engine
from ldm_jax.runtime.hlo import Collective, count_collectives, memory_traffic
from ldm_jax.runtime.operations import count_flops, saved_bytes
from ldm_jax.training.run import Run
from ldm_jax.training.stage_inputs import StageInputs

GB = 2**30


class CompiledStep(NamedTuple):
    """What a stage's step needs; memory and traffic are of each device."""

    name: str
    batch_size: int  # over all devices
    memory: dict[str, int]  # bytes by kind
    flops: int  # of one step, over all devices
    traffic: int  # bytes from and to memory; 0 of a program that the compiler found too large
    collectives: dict[str, Collective]

    def fits(self, memory: float) -> bool:
        """Whether the step compiled and needs at most these bytes of memory."""
        return self.total <= memory and self.traffic > 0

    @property
    def total(self) -> int:
        """The bytes of memory."""
        return sum(self.memory.values())


def compile_step(
    run: Run, inputs: StageInputs, engine: Engine, devices: int, hosts: int, platform: str | None = None
) -> CompiledStep:
    """Compiles the last step of a stage, which has all terms of the loss, for the devices of `engine`."""
    shapes, step = inputs.step_shapes(run, engine, hosts), engine.step(inputs.stage, **inputs.variant(run))
    with compiling_for(platform):
        lowered, jaxpr = step.lower(*shapes), jax.make_jaxpr(step)(*shapes).jaxpr
    saved, memory, text = saved_bytes(jaxpr) // devices, _of_arguments(*shapes[:4]), ""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        work = _too_large(str(error), sum(memory.values()))
        memory["activations"] = min(saved, work)
        memory["temporaries"] = max(0, work - saved)
    else:
        stats, text = compiled.memory_analysis(), compiled.as_text()
        others = _total(stats) - stats.temp_size_in_bytes - sum(memory.values())  # TPUs keep arrays in padded tiles
        memory["activations"] = min(saved, stats.temp_size_in_bytes)
        memory["temporaries"] = stats.temp_size_in_bytes - memory["activations"]
        memory["program, padding"] = max(0, others)
    counts = count_flops(jaxpr), memory_traffic(text), count_collectives(text)
    return CompiledStep(inputs.name, run.config[inputs.name].batch_size, memory, *counts)


def step_memory(run: Run, inputs: StageInputs) -> int:
    """The bytes of memory on each device of the last step of a stage, on the devices of this run.

    The step is compiled as training calls it, and not again then.
    """
    engine = run.engine
    shapes = inputs.step_shapes(run, engine, jax.process_count())
    return _total(engine.step(inputs.stage, **inputs.variant(run)).lower(*shapes).compile().memory_analysis())


def _total(stats: Any) -> int:
    """The bytes that a compiled program needs: the new state is in the place of the old one."""
    written = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + written + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def _of_arguments(state: Any, frozen: Any, resident: Any, batch: Any) -> dict[str, int]:
    kinds = {"parameters": state.params, "EMA": (state.ema_params, state.power_emas), "optimizer": state.opt_state}
    kinds |= {"frozen": frozen, "data": (resident, batch)}
    return {kind: sum(map(_bytes_per_device, jax.tree.leaves(tree))) for kind, tree in kinds.items()}


def _bytes_per_device(shape: jax.ShapeDtypeStruct) -> int:
    """Without a sharding the first axis is that of the devices (see `parallel.shard`)."""
    part = shape.sharding.shard_shape(shape.shape) if shape.sharding else shape.shape[1:]
    return math.prod(part) * shape.dtype.itemsize


def _too_large(message: str, arguments: int) -> int:
    """The bytes of activations and temporaries in a compiler's message about a program that is too large.

    The message is about the whole program, with its `arguments`, or about temporaries alone. Raises InputError for any
    other.
    """
    if found := re.search(r"Used ([\d.]+)([KMGT]) of", message):
        return max(0, _bytes(*found.groups()) - arguments)
    if found := re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message):
        return _bytes(*found.groups())
    raise InputError(f"the step does not fit the devices' memory: {message.splitlines()[0]}")


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit])
