"""The examples of a source that a prepared data set leaves out: counted, with the reason, printed and listed."""

from collections import Counter
from functools import cache
from pathlib import Path

from ldm_jax.runtime.files import atomic

Skipped = list[tuple[str, str]]  # reason, example
LEFT_OUT = "left_out.txt"  # in the folder of a data set: a line for each example


def summarize(skipped: Skipped) -> list[str]:
    """One line for each reason: the number of examples, the reason, and the first example."""
    first = dict(reversed(skipped))
    return [f"{count} {why}, e.g. {first[why]}" for why, count in Counter(why for why, _ in skipped).items()]


@cache
def print_once(line: str) -> None:
    """Prints a line of the summary, once in a process, though several splits are read from one source."""
    print(f"Skipped: {line}", flush=True)


def report(skipped: Skipped, path: Path) -> None:
    """Prints the summary, once in a process, and writes the whole list to a file; without examples there is none."""
    for line in summarize(skipped):
        print_once(line)
    if len(skipped) > len(summarize(skipped)):
        print_once(f"all are listed in {path}")
    text = "".join(f"{why}: {example}\n" for why, example in skipped)
    if not text:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
