"""Index of the experiments: writes the tables and answers in the READMEs from the results.json files.

    python -m experiments.index

Writes the text between the markers in experiments/README.md and in each experiment's README.md, and prints the
answers. The answer is that of the largest complete budget.
"""

import importlib
from pathlib import Path

from experiments import tables
from experiments.budgets import BUDGETS
from experiments.runner import ROOT, Experiment, Rows, largest_complete_budget
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
    "objectives",
    "few_steps",
    "averaging",
    "backbones",
)
BEGIN, END = "<!-- made by python -m experiments.index -->", "<!-- end -->"


def load(name: str) -> Experiment:
    """The experiment in the folder of this name."""
    return importlib.import_module(f"experiments.{name}.run").EXPERIMENT


def results_of(experiment: Experiment) -> dict[str, Rows]:
    """Budget -> rows of results.json, the largest budget first."""
    path = experiment.folder / "results.json"
    results = read_json(path) if path.exists() else {}
    return {budget: results[budget] for budget in reversed(BUDGETS) if results.get(budget)}


def complete_rows(experiment: Experiment) -> tuple[str, Rows]:
    """The largest complete budget and its rows; ("", {}) if there is none."""
    results = results_of(experiment)
    budget = largest_complete_budget(experiment, results)
    return budget, results.get(budget, {})


def status(experiment: Experiment) -> str:
    """ "cpu, 18 of 18 rows"; "-" if no budget is complete."""
    budget, rows = complete_rows(experiment)
    return row_count(experiment, budget, rows) if rows else "-"


def row_count(experiment: Experiment, budget: str, rows: Rows) -> str:
    """ "cpu, 6 of 18 rows": the measured and planned rows of a budget."""
    return f"{budget}, {len(rows)} of {len(experiment.plan(budget))} rows"


def page_text(experiment: Experiment) -> str:
    """The generated part of an experiment's README: results and answer of the largest complete budget, other tables."""
    budget, rows = complete_rows(experiment)
    sections = []
    if rows:
        source = f"{provenance(experiment, budget, rows)}; mean (minimum to maximum) over seeds"
        sections += [f"**Result** ({source})", experiment.table(rows), "![The figure](figure.png)"]
        sections += [f"**Answer.** {experiment.answer(rows)}"]
    for other, other_rows in results_of(experiment).items():
        if other != budget:
            source = provenance(experiment, other, other_rows)
            sections += [f"**Also measured** ({source})", experiment.table(other_rows)]
    return "\n\n".join(sections) or "Not measured yet."


def provenance(experiment: Experiment, budget: str, rows: Rows) -> str:
    """File, budget, duration, device and commit of rows."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows.values()))
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows.values()))
    setup = next(iter(rows.values()))["first_seconds"] / 60
    minutes = setup + sum(row["seconds"] / row["workers"] for row in rows.values()) / 60
    shared = f", {setup:.0f} of them for shared training" if setup >= 1 else ""
    counts = row_count(experiment, budget, rows)
    return f"`results.json`, budget {counts}: {minutes:.0f} minutes{shared}; each row on {devices}; commit {commits}"


def index(experiments: list[Experiment]) -> str:
    """The table of all experiments in experiments/README.md: question, answer and what has been measured."""
    body = []
    for experiment in experiments:
        _, rows = complete_rows(experiment)
        answer, page = experiment.answer(rows) if rows else "Not measured yet.", f"{experiment.name}/README.md"
        body.append([f"[{experiment.name}]({page})", experiment.question, answer, status(experiment)])
    return tables.table(["experiment", "question", "answer", "measured"], body)


def pages() -> dict[Path, str]:
    """README path -> its text with the generated part updated."""
    experiments = [load(name) for name in NAMES]
    texts = {ROOT / "experiments" / "README.md": index(experiments)}
    texts |= {experiment.folder / "README.md": page_text(experiment) for experiment in experiments}
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
        _, rows = complete_rows(experiment)
        print(f"{name} ({status(experiment)}): {experiment.question} {experiment.answer(rows) if rows else ''}")


if __name__ == "__main__":
    main()
