"""Work in a thread, with its reports as an iterator."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Stopped(Exception):
    """The work was stopped from outside."""


def reports(work: Callable[[Callable[[Any], None]], Any], stop: threading.Event) -> Iterator[tuple[str, Any]]:
    """Runs `work(report)` in a thread: yields ("report", value) for each report, then ("done", result).

    A report that the reader has not taken yet is replaced by the next one. When `stop` is set, or the iterator closed,
    the work ends at its next report, with `Stopped`. Raises what the work raises.
    """
    news: queue.Queue[tuple[str, Any]] = queue.Queue()

    def report(value: Any) -> None:
        if stop.is_set():
            raise Stopped
        news.put(("report", value))

    def run() -> None:
        try:
            news.put(("done", work(report)))
        except BaseException as error:  # raised again by the reader
            news.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            event, value = news.get()
            while event == "report" and not news.empty():
                event, value = news.get()
            if event == "error":
                raise value
            yield event, value
            if event == "done":
                return
    finally:
        stop.set()
