"""The examples of a source that a prepared data set leaves out: counted, with the reason, and printed."""

from collections import Counter
from functools import cache

Skipped = list[tuple[str, str]]  # reason, example


def summarize(skipped: Skipped) -> list[str]:
    """One line for each reason: the number of examples, the reason, and the first example."""
    first = dict(reversed(skipped))
    return [f"{count} {why}, e.g. {first[why]}" for why, count in Counter(why for why, _ in skipped).items()]


@cache
def print_once(line: str) -> None:
    """Prints a line of the summary, once in a process, though several splits are read from one source."""
    print(f"Skipped: {line}", flush=True)
