"""The index of the experiments, and the results in their READMEs: all of it made of the results.json files.

    python -m experiments.index

Writes the text between the markers in experiments/README.md and in each experiment's README.md, and prints what has been
measured. The answer is that of the largest budget that has one.
"""

import importlib
from pathlib import Path

from experiments import tables
from experiments.frame import BUDGETS, ROOT, Experiment, Rows, telling
from ldm_jax.runtime.files import atomic, read_json

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


def results_of(experiment: Experiment) -> dict[str, Rows]:
    """What results.json has, the largest budget first."""
    path = experiment.folder / "results.json"
    results = read_json(path) if path.exists() else {}
    return {budget: results[budget] for budget in reversed(BUDGETS) if results.get(budget)}


def measured(experiment: Experiment) -> tuple[str, Rows]:
    """The budget that answers, and its rows; ("", {}) if there is none."""
    results = results_of(experiment)
    budget = telling(experiment, results)
    return budget, results.get(budget, {})


def state_of(experiment: Experiment) -> str:
    """ "cpu, 18 of 18 rows"; "-" of nothing."""
    budget, rows = measured(experiment)
    return counted(experiment, budget, rows) if rows else "-"


def counted(experiment: Experiment, budget: str, rows: Rows) -> str:
    """ "cpu, 6 of 18 rows"."""
    return f"{budget}, {len(rows)} of {len(experiment.plan(budget))} rows"


def page_of(experiment: Experiment) -> str:
    """What stands in an experiment's README: of the budget that answers all of it, of others a table."""
    budget, rows = measured(experiment)
    told = []
    if rows:
        source = f"{how(experiment, budget, rows)}; of several seeds the mean, the lowest and the highest"
        told += [f"**Result** ({source})", experiment.table(rows), "![The figure](figure.png)"]
        told += [f"**Answer.** {experiment.answer(rows)}"]
    for other, some in results_of(experiment).items():
        if other != budget:
            told += [f"**Besides** ({how(experiment, other, some)})", experiment.table(some)]
    return "\n\n".join(told) or "Not measured yet."


def how(experiment: Experiment, budget: str, rows: Rows) -> str:
    """Where rows stand, what they took, on what, and which version measured them."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows.values()))
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows.values()))
    first = next(iter(rows.values()))["first_seconds"] / 60
    minutes = first + sum(row["seconds"] / row["workers"] for row in rows.values()) / 60
    before = f", {first:.0f} of them for what the rows share" if first >= 1 else ""
    counts = counted(experiment, budget, rows)
    return f"`results.json`, budget {counts}: {minutes:.0f} minutes{before}; a row on {devices}; commit {commits}"


def index(experiments: list[Experiment]) -> str:
    """The table of all experiments in experiments/README.md: question, answer and what has been measured."""
    lines = []
    for experiment in experiments:
        _, rows = measured(experiment)
        answer, page = experiment.answer(rows) if rows else "Not measured yet.", f"{experiment.name}/README.md"
        lines.append([f"[{experiment.name}]({page})", experiment.question, answer, state_of(experiment)])
    return tables.table(["experiment", "question", "answer", "measured"], lines)


def pages() -> dict[Path, str]:
    """Each page with results in it -> what it is to be."""
    experiments = [load(name) for name in NAMES]
    texts = {ROOT / "experiments" / "README.md": index(experiments)}
    texts |= {experiment.folder / "README.md": page_of(experiment) for experiment in experiments}
    return {path: _filled(path.read_text(), text) for path, text in texts.items()}


def _filled(page: str, text: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    for path, text in pages().items():
        if path.read_text() != text:
            with atomic(path) as temporary:
                temporary.write_text(text)
    for name in NAMES:
        experiment = load(name)
        _, rows = measured(experiment)
        print(f"{name} ({state_of(experiment)}): {experiment.question} {experiment.answer(rows) if rows else ''}")


if __name__ == "__main__":
    main()
