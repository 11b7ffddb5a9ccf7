"""Markdown tables of results: mean and range over seeds."""

from collections.abc import Callable, Sequence

import numpy as np

from experiments.runner import Row, Rows


def arms(rows: Rows) -> list[str]:
    """The arms, in the order of the rows."""
    return list(dict.fromkeys(row["arm"] for row in rows.values()))


def values(rows: Rows, arm: str, score: Callable[[Row], float]) -> list[float]:
    """The score of each seed of an arm."""
    return [score(row) for row in rows.values() if row["arm"] == arm]


def mean(rows: Rows, arm: str, score: Callable[[Row], float]) -> float:
    """The mean score over the seeds of an arm."""
    return float(np.mean(values(rows, arm, score)))


def mean_and_range(scores: Sequence[float], digits: int) -> str:
    """ "16.4 (15.9 to 17.0)": mean, minimum and maximum; "16.4" of a single score."""
    if len(scores) == 1:
        return f"{scores[0]:.{digits}f}"
    return f"{np.mean(scores):.{digits}f} ({min(scores):.{digits}f} to {max(scores):.{digits}f})"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_arm(rows: Rows, columns: dict[str, tuple[Callable[[Row], float], int]]) -> str:
    """A Markdown table with a row for each arm; columns: name -> (score of a row, digits)."""
    body = [
        [arm, *(mean_and_range(values(rows, arm, score), digits) for score, digits in columns.values())]
        for arm in arms(rows)
    ]
    return table(["arm", *columns], body)
