"""What a data set of ours leaves out of its source, and how that is told on the screen: counted, with the reason."""

from collections import Counter
from functools import cache

Skipped = list[tuple[str, str]]  # why, and an example


def report(skipped: Skipped) -> list[str]:
    """One line for each reason: how many, why, and the first of them."""
    first: dict[str, str] = {}
    for why, example in skipped:
        first.setdefault(why, example)
    return [f"{count} {why}, e.g. {first[why]}" for why, count in Counter(why for why, _ in skipped).items()]


@cache
def tell(line: str) -> None:
    """Once, though the source is looked through for each split."""
    print(f"Skipped: {line}", flush=True)
