"""XLA's settings for CPUs, its persistent compilation cache, and a count of compilations."""

import gc
import logging
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

# XLA's YNN fusions on CPUs, which an empty list turns off. In jaxlib 0.10.2 they are on by default, compute wrong
# numbers (jax#39103: 32,769 rows times a matrix) and crash (jax#40412); in later versions they slow convolutions down
# (experiments/throughput).
YNN = "--xla_cpu_experimental_ynn_fusion_type="
WRONG_WITH_YNN = ("0.10.2",)

# Tracing creates millions of objects with few reference cycles: Python's default of a collection per 700 new objects
# took a fifth of its time.
OBJECTS_PER_COLLECTION = 50_000


def cache_folder() -> Path:
    """The cache of compiled programs and reference features: ldm_jax in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm_jax"


def knows_cpu_flags() -> bool:
    """Whether this version of XLA has the CPU flags used here; an unknown flag ends the process."""
    return version("jaxlib").startswith(("0.10.", "0.11.", "0.12."))


def turn_off_ynn() -> None:
    """Turns the YNN fusions off for this process; called by `import ldm_jax`.

    Warns, with a version that computes wrong numbers, if JAX was started before or XLA_FLAGS turns them on.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if YNN not in flags and knows_cpu_flags():
        os.environ["XLA_FLAGS"] = f"{flags} {YNN}".strip()
        problem = "JAX was started before ldm_jax was imported" if _cpu_is_started() else ""
    else:
        ynn = [flag for flag in flags.split() if flag.startswith(YNN) and flag != YNN]
        problem = f"XLA_FLAGS has {ynn[-1]}" if ynn else ""
    if problem and version("jaxlib") in WRONG_WITH_YNN:
        warnings.warn(
            f"{problem}, and jaxlib {version('jaxlib')} computes wrong numbers on CPUs with YNN fusions (jax#39103): "
            f"import ldm_jax first, or set XLA_FLAGS={YNN} before Python starts",
            RuntimeWarning,
            stacklevel=3,
        )


def _cpu_is_started() -> bool:
    """Whether JAX has started its CPU backend, and so has read XLA_FLAGS."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized() and bridge.get_backend().platform == "cpu"


def fast_compile_flags() -> str:
    """XLA's flags that make compilations fast and programs slow."""
    if not knows_cpu_flags():
        return ""
    older = " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
    return f"--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE --xla_cpu_parallel_codegen_split_count=1{older}"


def configure(*, fast_compile: bool = False) -> None:
    """Sets up the compilation cache and the garbage collector; call it before JAX computes anything.

    With `fast_compile` this process and its children compile fast, slow programs.
    """
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    if fast_compile:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast_compile_flags()}".strip()
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

    import jax

    if fast_compile:
        jax.config.update("jax_disable_most_optimizations", True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # it warns of absent TPUs and GPUs


class CompileClock:
    """A counter of compilations and their seconds, from its creation on."""

    def __init__(self) -> None:
        import jax

        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += duration
