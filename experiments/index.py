"""The index of the experiments, and the results in their READMEs: all of it made of the results.json files.

    python -m experiments.index

Prints what has been measured, and writes what stands between the marks in experiments/README.md, in each experiment's
README.md and in the main one. A budget for GPUs counts for more than one for CPUs; smoke runs do not count.
"""

import importlib
from pathlib import Path

from experiments import tables
from experiments.frame import BUDGETS, ROOT, Experiment, Rows
from ldm_jax.files import atomic, read_json

NAMES = (
    "latent_vs_pixel",
    "prediction_target",
    "schedules",
    "solvers",
    "guidance",
    "autoencoders",
    "baselines",
    "super_resolution",
    "inpainting",
    "data_parallel",
    "likelihood",
)
BEGIN, END = "<!-- made by python -m experiments.index -->", "<!-- end -->"


def load(name: str) -> Experiment:
    """The experiment in a folder."""
    return importlib.import_module(f"experiments.{name}.run").EXPERIMENT


def measured(experiment: Experiment) -> tuple[str, Rows]:
    """The largest budget of which there is a result, and its rows; ("", {}) of none."""
    path = experiment.folder / "results.json"
    results = read_json(path) if path.exists() else {}
    budget = next((name for name in reversed(BUDGETS[1:]) if results.get(name)), "")
    return budget, results.get(budget, {})


def state_of(experiment: Experiment) -> str:
    """ "cpu, 6 of 18 rows"; "-" of nothing."""
    budget, rows = measured(experiment)
    return f"{budget}, {len(rows)} of {len(experiment.plan(budget))} rows" if rows else "-"


def results_of(experiment: Experiment) -> str:
    """What stands in an experiment's README: table, figure, answer, and what it took."""
    _, rows = measured(experiment)
    if not rows:
        return "Not measured yet."
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows.values()))
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows.values()))
    first = next(iter(rows.values()))["first_seconds"] / 60
    minutes = first + sum(row["seconds"] / row["workers"] for row in rows.values()) / 60
    before = f", {first:.0f} of them for what the rows share" if first >= 1 else ""
    return "\n\n".join([
        f"**Result** (`results.json`, budget {state_of(experiment)}: {minutes:.0f} minutes{before}; a row on "
        f"{devices}; commit {commits}; of several seeds the mean, the lowest and the highest)",
        experiment.table(rows),
        "![The figure](figure.png)",
        f"**Answer.** {experiment.answer(rows)}",
    ])  # fmt: skip


def index(experiments: list[Experiment], folder: str) -> str:
    """A line for each; `folder` is where they lie as seen from the file that the table goes to."""
    lines = []
    for experiment in experiments:
        _, rows = measured(experiment)
        answer, page = experiment.answer(rows) if rows else "Not measured yet.", f"{folder}{experiment.name}/README.md"
        lines.append([f"[{experiment.name}]({page})", experiment.question, answer, state_of(experiment)])
    return tables.table(["experiment", "question", "answer", "measured"], lines)


def pages() -> dict[Path, str]:
    """Each page with results in it -> what it is to be."""
    experiments = [load(name) for name in NAMES]
    told = {ROOT / "experiments" / "README.md": index(experiments, "")}
    told[ROOT / "README.md"] = index([found for found in experiments if measured(found)[1]], "experiments/")
    told |= {experiment.folder / "README.md": results_of(experiment) for experiment in experiments}
    return {path: _filled(path.read_text(), text) for path, text in told.items()}


def _filled(page: str, text: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    for name in NAMES:
        experiment = load(name)
        _, rows = measured(experiment)
        print(f"{name} ({state_of(experiment)}): {experiment.question} {experiment.answer(rows) if rows else ''}")
    for path, text in pages().items():
        if path.read_text() != text:
            with atomic(path) as temporary:
                temporary.write_text(text)


if __name__ == "__main__":
    main()
