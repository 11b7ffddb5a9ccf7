"""The frame of experiments/: what is measured is kept, and what is told is what was measured."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments import frame, index, scales, strips, tables
from experiments.frame import Experiment, Lab
from experiments.latent_vs_pixel import run as latent_vs_pixel
from ldm_jax.errors import InputError

NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\w)")


def row(arm, seed, value):
    return {"arm": arm, "seed": seed, "value": value}


ROWS = {"a 0": row("a", 0, 1.0), "b 0": row("b", 0, 5.0), "a 1": row("a", 1, 2.0)}


def value(row):
    return row["value"]


def test_means_and_spreads_by_hand():
    assert tables.arms(ROWS) == ["a", "b"]
    assert tables.values(ROWS, "a", value) == [1.0, 2.0] and tables.mean(ROWS, "a", value) == 1.5
    assert tables.by_arm(ROWS, {"score": (value, 1)}) == (
        "| arm | score |\n| --- | --- |\n| a | 1.5 (1.0 to 2.0) |\n| b | 5.0 |"
    )


def count(calls, stop_at=None):
    """An experiment that notes what it measures, and fails at one of them."""

    def measure(lab, arm, seed):
        if (arm, seed) == stop_at:
            raise SystemExit(130)
        calls.append((arm, seed))
        return {"value": 10 * seed}

    plan = [("a", 0), ("b", 0), ("a", 1)]
    return Experiment(Path("some"), "?", lambda budget: plan, measure, str, str, print)


def test_what_was_interrupted_goes_on(tmp_path):
    lab, path, calls = Lab("cpu", "data", tmp_path), tmp_path / "results.json", []
    with pytest.raises(SystemExit):
        frame.measure_all(count(calls, ("b", 0)), lab, path)
    assert list(json.loads(path.read_text())["cpu"]) == ["a, seed 0"]
    rows = frame.measure_all(count(calls), lab, path)
    assert calls == [("a", 0), ("b", 0), ("a", 1)]  # each once
    assert json.loads(path.read_text()) == {"cpu": rows}
    assert rows["a, seed 1"].keys() == {
        "arm", "seed", "value", "seconds", "first_seconds", "workers", "commit", "device"
    }  # fmt: skip
    frame.measure_all(count(calls), lab._replace(budget="gpu"), path)
    assert len(calls) == 6 and json.loads(path.read_text()).keys() == {"cpu", "gpu"}


def test_the_budget_with_all_arms_tells(tmp_path, capsys):
    experiment = count([])._replace(draw=lambda rows: Figure(figsize=(len(rows), 1)), table=lambda rows: "a table",
                                    answer=lambda rows: "an answer")  # fmt: skip
    a_seed = {name: row for name, row in ROWS.items() if row["seed"] == 0}
    assert frame.telling(experiment, {}) == ""
    assert frame.telling(experiment, {"cpu": a_seed, "gpu": {"a 0": ROWS["a 0"]}}) == "cpu"
    assert frame.telling(experiment, {"cpu": ROWS, "gpu": a_seed}) == "gpu"
    figure = tmp_path / "figure.png"
    results = {"cpu": ROWS, "gpu": {"a 0": ROWS["a 0"]}}
    frame.report(experiment, {"gpu": results["gpu"]}, "gpu", figure)
    assert capsys.readouterr().out == "\na table\n" and not figure.exists()
    frame.report(experiment, results, "gpu", figure)
    assert Image.open(figure).width == 3 * 110  # of budget cpu
    capsys.readouterr()
    frame.report(experiment, results, "cpu", figure)
    assert capsys.readouterr().out == "\na table\n\nan answer\n"


def test_a_page_has_every_budget(tmp_path):
    def named(name):
        return lambda rows: f"{name} of {len(rows)}"

    folder = tmp_path / "some"
    folder.mkdir()
    experiment = count([])._replace(folder=folder, table=named("table"), answer=named("answer"))
    assert index.page_of(experiment) == "Not measured yet." and index.state_of(experiment) == "-"
    took = {"seconds": 240.0, "workers": 2, "first_seconds": 60.0, "commit": "abc", "device": "a machine"}
    rows = {name: row | took for name, row in ROWS.items()}
    (folder / "results.json").write_text(json.dumps({"cpu": rows, "gpu": {"a 0": rows["a 0"]}}))
    assert index.state_of(experiment) == "cpu, 3 of 3 rows"
    assert index.page_of(experiment).split("\n\n") == [
        "**Result** (`results.json`, budget cpu, 3 of 3 rows: 7 minutes, 1 of them for what the rows share; a row on a "
        "machine; commit abc; of several seeds the mean, the lowest and the highest)",
        "table of 3", "![The figure](figure.png)", "**Answer.** answer of 3",
        "**Besides** (`results.json`, budget gpu, 1 of 3 rows: 3 minutes, 1 of them for what the rows share; a row on "
        "a machine; commit abc)",
        "table of 1",
    ]  # fmt: skip


def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys):
    def measure(lab, arm, seed):
        raise InputError("there is no such data set")

    monkeypatch.setattr(sys, "argv", ["run.py", "--workers=1", f"--runs={tmp_path}", f"--out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as ended:
        frame.run(count([])._replace(measure=measure), "what it does")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: there is no such data set\n"
    assert not (tmp_path / "out").exists()


def test_steps_fit_into_a_time():
    assert [Lab(budget, "", Path()).steps_in(3, 64, 8) for budget in ("smoke", "cpu")] == [2, 24]


def test_about_equal_operations():
    """Of trainings in 16 parts: the part after which a model is nearest to what the least of all took in the end."""
    nearest, part = latent_vs_pixel.nearest_part, latent_vs_pixel.Effort(steps=5, seconds=7.5, tflops=0.5)
    assert [nearest(tflops, part) for tflops in (1.6, 1.8, 8.0, 0.1, 99.0)] == [3, 4, 16, 1, 16]


def test_what_is_measured_once_stays(tmp_path):
    lab, answers = Lab("cpu", "", tmp_path), iter([3.0, 4.0])
    assert [lab.once("a", lambda: next(answers)) for _ in range(2)] == [3.0, 3.0]
    assert not lab.knows("b") and lab.once("b", lambda: next(answers)) == 4.0 and lab.knows("b")


def test_pictures_come_back_from_the_results():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 1), dtype=np.uint8)
    strip = strips.packed(images)
    assert (strips.unpacked(strip) == np.concatenate(list(images[..., 0]), axis=1)).all()
    lines = [{"drawn": strip, "real": strip}] * 2
    figure = strips.grid(lines, ["a", "b"], width=4)
    assert [axis.get_title() for axis in figure.axes] == ["drawn", "real", "", ""]
    assert [axis.get_ylabel() for axis in figure.axes] == ["a", "", "b", ""]
    assert (figure.axes[3].images[0].get_array() == strips.unpacked(strip)).all()


def test_logarithmic_scales_have_plain_numbers():
    axes = Figure().subplots()
    axes.plot([4, 60], [1, 2])
    scales.logarithmic(axes, "x")
    axes.figure.draw_without_rendering()
    shown = [label.get_text() for label in axes.get_xticklabels(which="both") if label.get_text()]
    assert {"5", "10", "20", "50"} <= set(shown) and all(number.isdigit() for number in shown)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells of its maps of memory")
def test_programs_are_let_go():
    """Of a process with many runs, each with its programs, Linux would not map more memory in the end."""

    def maps():
        return len(Path("/proc/self/maps").read_text().splitlines())

    functions = [jax.jit(lambda x, k=k: jnp.sin(x @ x) * k) for k in range(60)]
    for function in functions:
        function(jnp.ones((3, 3)))
    before = maps()
    frame.forget_programs(limit=before + 100)
    assert maps() > before - 60
    frame.forget_programs(limit=before - 60)
    assert maps() < before - 60


def test_the_commit_is_named():
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", frame.commit())


@pytest.mark.parametrize("name", index.NAMES)
def test_an_experiment_is_whole(name):
    experiment = index.load(name)
    assert experiment.name == name
    for budget in frame.BUDGETS:
        plan = experiment.plan(budget)
        assert plan and len(set(plan)) == len(plan)
    for budget, rows in index.results_of(experiment).items():
        assert {(row["arm"], row["seed"]) for row in rows.values()} <= set(experiment.plan(budget))
    assert (experiment.folder / "figure.png").exists() == bool(index.measured(experiment)[1])


def test_the_pages_are_what_the_results_say():
    for path, text in index.pages().items():
        assert path.read_text() == text, f"{path} is out of date: run python -m experiments.index"


@pytest.mark.parametrize("name", index.NAMES)
def test_no_number_is_told_that_was_not_measured(name):
    experiment = index.load(name)
    _, rows = index.measured(experiment)
    if rows:
        told = NUMBER.findall(experiment.answer(rows))
        known = numbers(list(rows.values())) + [
            float(np.mean(found)) for arm in tables.arms(rows) for found in by_place(rows, arm).values()
        ]
        for text in told:
            digits = len(text.partition(".")[2])
            assert any(f"{number:.{digits}f}" == text for number in known), f"{text} is nowhere in results.json"


def by_place(rows, arm):
    """Where a number stands in the rows of an arm -> what stands there for each seed."""
    found = {}
    for some in rows.values():
        if some["arm"] == arm:
            for place, number in leaves(some):
                found.setdefault(place, []).append(number)
    return found


def leaves(value, place=()):
    if isinstance(value, dict):
        for name, inner in value.items():
            if re.fullmatch(r"\d+", name):
                yield (*place, name), float(name)
            yield from leaves(inner, (*place, name, "of"))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield place, float(value)


def numbers(value):
    return [number for some in value for _, number in leaves(some)]
