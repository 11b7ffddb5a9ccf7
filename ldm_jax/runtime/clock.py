"""A clock of what the seconds of a run are spent on; it never waits for the device by itself."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ldm_jax.runtime.xla import CompileClock


class Clock:
    """The wall time since the last reading, with that of compiling and of other named activities within it."""

    def __init__(self) -> None:
        self.began = self._last = time.monotonic()
        self.compiler = CompileClock()
        self._compiled, self._seconds = (0.0, 0), defaultdict(float)

    @contextmanager
    def spend(self, activity: str, *, hidden: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Counts the seconds of the block for `activity`, without those of compiling, unless hidden() after it."""
        start, compiling = time.monotonic(), self.compiler.seconds
        try:
            yield
        finally:
            if not hidden():
                self._seconds[activity] += time.monotonic() - start - (self.compiler.seconds - compiling)

    def read(self) -> dict[str, float]:
        """seconds, compile_seconds, compilations and ACTIVITY_seconds since the last call."""
        now, compiled = time.monotonic(), (self.compiler.seconds, self.compiler.count)
        values = {"seconds": now - self._last, "compile_seconds": compiled[0] - self._compiled[0]}
        values |= {"compilations": compiled[1] - self._compiled[1]}
        values |= {f"{activity}_seconds": seconds for activity, seconds in self._seconds.items()}
        values = {name: round(value, 3) for name, value in values.items()}
        self._last, self._compiled, self._seconds = now, compiled, defaultdict(float)
        return values
