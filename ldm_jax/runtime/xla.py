"""XLA's settings: the persistent compilation cache, and what makes it fast on CPUs."""

import gc
import logging
import os
from importlib.metadata import version
from pathlib import Path


def cache_folder() -> Path:
    """Where compiled programs and reference features are kept between runs: $XDG_CACHE_HOME or ~/.cache, ldm_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm_jax"


# XLA's YNN library makes convolutions on CPUs slower, not faster (experiments/throughput); an empty list of fusions
# turns it off.
CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type="


# Tracing makes objects by the million and hardly a cycle among them: looking for cycles after every 700 new ones, as
# Python does, took a fifth of its time.
OBJECTS_PER_COLLECTION = 50_000


def knows_cpu_flags() -> bool:
    """Whether this version of XLA is known to have its flags for CPUs: an unknown flag ends the process."""
    return version("jaxlib").startswith(("0.10.", "0.11."))


def fast_compile_flags() -> str:
    """XLA's flags for what compiles for longer than it computes: what can be left out of a compilation is left out."""
    if not knows_cpu_flags():
        return ""
    older = " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
    return f"--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE --xla_cpu_parallel_codegen_split_count=1{older}"


def configure(*, fast_compile: bool = False) -> None:
    """Sets up XLA, and Python for tracing; call it before JAX computes anything.

    With `fast_compile`, in this process and those that it starts, programs are compiled soon and run slowly.
    """
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    given = os.environ.get("XLA_FLAGS", "")
    if knows_cpu_flags() and "ynn_fusion_type" not in given:
        given = f"{given} {CPU_FLAG}".strip()
    if fast_compile:
        given = f"{given} {fast_compile_flags()}".strip()
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if given:
        os.environ["XLA_FLAGS"] = given

    import jax

    if fast_compile:
        jax.config.update("jax_disable_most_optimizations", True)

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # it warns of absent TPUs and GPUs


class CompileClock:
    """Counts compilations and the seconds they take, from its creation on."""

    def __init__(self) -> None:
        import jax

        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += duration
