"""Rows of results to tables and numbers in text: means over seeds, with the spread beside them."""

from collections.abc import Callable, Sequence

import numpy as np

from experiments.frame import Row, Rows


def arms(rows: Rows) -> list[str]:
    """The arms in the order in which they were measured."""
    return list(dict.fromkeys(row["arm"] for row in rows.values()))


def values(rows: Rows, arm: str, of: Callable[[Row], float]) -> list[float]:
    """What `of` has of each seed of an arm."""
    return [of(row) for row in rows.values() if row["arm"] == arm]


def mean(rows: Rows, arm: str, of: Callable[[Row], float]) -> float:
    """Over the seeds of an arm."""
    return float(np.mean(values(rows, arm, of)))


def spread(found: Sequence[float], digits: int) -> str:
    """ "16.4 (15.9 to 17.0)": the mean, and the lowest and the highest if there are several."""
    if len(found) == 1:
        return f"{found[0]:.{digits}f}"
    return f"{np.mean(found):.{digits}f} ({min(found):.{digits}f} to {max(found):.{digits}f})"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_arm(rows: Rows, columns: dict[str, tuple[Callable[[Row], float], int]]) -> str:
    """A line for each arm; column -> (what of a row, digits)."""
    body = [[arm, *(spread(values(rows, arm, of), digits) for of, digits in columns.values())] for arm in arms(rows)]
    return table(["arm", *columns], body)
