"""experiments/: rows are measured once and stored; every number in an answer comes from results.json."""

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

from configs import fashion_mnist
from experiments import index, runner, scales, strips, tables
from experiments.budgets import BUDGETS
from experiments.latent_vs_pixel import run as latent_vs_pixel
from experiments.runner import Experiment, Workspace
from ldm_jax.errors import InputError

NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\w)")


def row(arm, seed, value):
    return {"arm": arm, "seed": seed, "value": value}


ROWS = {"a 0": row("a", 0, 1.0), "b 0": row("b", 0, 5.0), "a 1": row("a", 1, 2.0)}


def value(row):
    return row["value"]


def test_means_and_ranges_by_hand():
    assert tables.arms(ROWS) == ["a", "b"]
    assert tables.values(ROWS, "a", value) == [1.0, 2.0] and tables.mean(ROWS, "a", value) == 1.5
    assert tables.by_arm(ROWS, {"score": (value, 1)}) == (
        "| arm | score |\n| --- | --- |\n| a | 1.5 (1.0 to 2.0) |\n| b | 5.0 |"
    )


def recording_experiment(calls, stop_at=None):
    """An experiment that records the rows it measures, and stops at one of them."""

    def measure(workspace, arm, seed):
        if (arm, seed) == stop_at:
            raise SystemExit(130)
        calls.append((arm, seed))
        return {"value": 10 * seed}

    plan = [("a", 0), ("b", 0), ("a", 1)]
    return Experiment(Path("some"), "?", lambda budget: plan, measure, str, str, print)


def test_an_interrupted_experiment_resumes(tmp_path):
    workspace, path, calls = Workspace("minutes", "data", tmp_path), tmp_path / "results.json", []
    with pytest.raises(SystemExit):
        runner.measure_all(recording_experiment(calls, ("b", 0)), workspace, path)
    assert list(json.loads(path.read_text())["minutes"]) == ["a, seed 0"]
    rows = runner.measure_all(recording_experiment(calls), workspace, path)
    assert calls == [("a", 0), ("b", 0), ("a", 1)]  # each once
    assert json.loads(path.read_text()) == {"minutes": rows}
    assert rows["a, seed 1"].keys() == {
        "arm", "seed", "value", "seconds", "first_seconds", "workers", "commit", "device"
    }  # fmt: skip
    runner.measure_all(recording_experiment(calls), workspace._replace(budget="gpu"), path)
    assert len(calls) == 6 and json.loads(path.read_text()).keys() == {"minutes", "gpu"}


def test_the_largest_budget_with_all_arms_answers(tmp_path, capsys):
    experiment = recording_experiment([])._replace(
        plot=lambda rows: Figure(figsize=(len(rows), 1)),
        table=lambda rows: "a table",
        answer=lambda rows: "an answer",
    )
    first_seed = {name: row for name, row in ROWS.items() if row["seed"] == 0}
    assert runner.largest_complete_budget(experiment, {}) == ""
    assert runner.largest_complete_budget(experiment, {"minutes": first_seed, "gpu": {"a 0": ROWS["a 0"]}}) == "minutes"
    assert runner.largest_complete_budget(experiment, {"minutes": ROWS, "gpu": first_seed}) == "gpu"
    figure = tmp_path / "figure.png"
    results = {"minutes": ROWS, "gpu": {"a 0": ROWS["a 0"]}}
    runner.report(experiment, {"gpu": results["gpu"]}, "gpu", figure)
    assert capsys.readouterr().out == "\na table\n" and not figure.exists()
    runner.report(experiment, results, "gpu", figure)
    assert Image.open(figure).width == 3 * 110  # of budget minutes
    capsys.readouterr()
    runner.report(experiment, results, "minutes", figure)
    assert capsys.readouterr().out == "\na table\n\nan answer\n"


def test_a_readme_has_every_budget(tmp_path):
    def named(name):
        return lambda rows: f"{name} of {len(rows)}"

    folder = tmp_path / "some"
    folder.mkdir()
    experiment = recording_experiment([])._replace(folder=folder, table=named("table"), answer=named("answer"))
    assert index.page_text(experiment) == "Not measured yet." and index.status(experiment) == "-"
    provenance = {"seconds": 240.0, "workers": 2, "first_seconds": 60.0, "commit": "abc", "device": "a machine"}
    rows = {name: row | provenance for name, row in ROWS.items()}
    (folder / "results.json").write_text(json.dumps({"minutes": rows, "gpu": {"a 0": rows["a 0"]}}))
    assert index.status(experiment) == "minutes, 3 of 3 rows"
    assert index.page_text(experiment).split("\n\n") == [
        "**Result** (`results.json`, budget minutes, 3 of 3 rows: 7 minutes, 1 of them for shared training; each row "
        "on a machine; commit abc; mean (minimum to maximum) over seeds)",
        "table of 3", "![The figure](figure.png)", "**Answer.** answer of 3",
        "**Also measured** (`results.json`, budget gpu, 1 of 3 rows: 3 minutes, 1 of them for shared training; each "
        "row on a machine; commit abc)",
        "table of 1",
    ]  # fmt: skip


def test_a_budget_that_an_experiment_lacks_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--budget=cpu"])
    with pytest.raises(SystemExit) as exit_info:
        runner.run(recording_experiment([]), "what it does")
    assert exit_info.value.code == 2 and "choose from 'smoke', 'minutes', 'gpu'" in capsys.readouterr().err
    assert not runner.is_complete(recording_experiment([]), "cpu", ROWS)


def test_the_main_job_is_the_shared_model_of_budget_cpu(tmp_path):
    workspace = Workspace("cpu", "data", tmp_path)
    config, main_job = workspace.config({}), fashion_mnist.get_config()
    for section in ("autoencoder", "unet", "diffusion", "data"):
        assert config[section].to_dict() == main_job[section].to_dict()
    assert Workspace("minutes", "data", tmp_path).config({}).diffusion.optimizer == "adamw"


def test_an_input_error_is_one_line(tmp_path, monkeypatch, capsys):
    def measure(workspace, arm, seed):
        raise InputError("there is no such data set")

    monkeypatch.setattr(sys, "argv", ["run.py", "--workers=1", f"--runs={tmp_path}", f"--out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as exit_info:
        runner.run(recording_experiment([])._replace(measure=measure), "what it does")
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: there is no such data set\n"
    assert not (tmp_path / "out").exists()


def test_steps_in_a_time():
    assert [Workspace(budget, "", Path()).steps_in(3, 64, 8) for budget in ("smoke", "minutes")] == [2, 24]


def test_the_checkpoint_of_equal_compute():
    """Of 16 checkpoints the nearest to a number of operations."""
    nearest, segment = latent_vs_pixel.nearest_checkpoint, latent_vs_pixel.Segment(steps=5, seconds=7.5, tflops=0.5)
    assert [nearest(tflops, segment) for tflops in (1.6, 1.8, 8.0, 0.1, 99.0)] == [3, 4, 16, 1, 16]


def test_measurements_are_cached(tmp_path):
    workspace, answers = Workspace("minutes", "", tmp_path), iter([3.0, 4.0])
    assert [workspace.cached("a", lambda: next(answers)) for _ in range(2)] == [3.0, 3.0]
    assert (
        not workspace.is_cached("b")
        and workspace.cached("b", lambda: next(answers)) == 4.0
        and workspace.is_cached("b")
    )


def test_image_strips_round_trip():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 1), dtype=np.uint8)
    strip = strips.encode(images)
    assert (strips.decode(strip) == np.concatenate(list(images[..., 0]), axis=1)).all()
    rows = [{"sampled": strip, "real": strip}] * 2
    figure = strips.plot_grid(rows, ["a", "b"], width=4)
    assert [axis.get_title() for axis in figure.axes] == ["sampled", "real", "", ""]
    assert [axis.get_ylabel() for axis in figure.axes] == ["a", "", "b", ""]
    assert (figure.axes[3].images[0].get_array() == strips.decode(strip)).all()


def test_logarithmic_axes_have_plain_labels():
    axes = Figure().subplots()
    axes.plot([4, 60], [1, 2])
    scales.set_log_scale(axes, "x")
    axes.figure.draw_without_rendering()
    labels = [label.get_text() for label in axes.get_xticklabels(which="both") if label.get_text()]
    assert {"5", "10", "20", "50"} <= set(labels) and all(label.isdigit() for label in labels)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps (Linux)")
def test_compiled_programs_are_cleared():
    """A process with the compiled programs of many runs would exceed Linux's number of memory maps."""

    def maps():
        return len(Path("/proc/self/maps").read_text().splitlines())

    functions = [jax.jit(lambda x, k=k: jnp.sin(x @ x) * k) for k in range(60)]
    for function in functions:
        function(jnp.ones((3, 3)))
    before = maps()
    runner.clear_compiled_programs(limit=before + 100)
    assert maps() > before - 60
    runner.clear_compiled_programs(limit=before - 60)
    assert maps() < before - 60


def test_the_commit():
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", runner.commit())


@pytest.mark.parametrize("name", index.NAMES)
def test_an_experiment_is_complete(name):
    experiment = index.load(name)
    assert experiment.name == name and set(experiment.budgets) <= set(BUDGETS)
    for budget in experiment.budgets:
        plan = experiment.plan(budget)
        assert plan and len(set(plan)) == len(plan)
    for budget, rows in index.results_of(experiment).items():
        assert budget in experiment.budgets
        assert {(row["arm"], row["seed"]) for row in rows.values()} <= set(experiment.plan(budget))
    assert (experiment.folder / "figure.png").exists() == bool(index.complete_rows(experiment)[1])


def test_the_readmes_are_up_to_date():
    for path, text in index.pages().items():
        assert path.read_text() == text, f"{path} is out of date: run python -m experiments.index"


# Words of an answer -> the names of these scores in results.json.
SCORES = {
    "FD": ("FD-VGG16", "rFD-VGG16"), "LPIPS": ("LPIPS-vgg16",), "PSNR": ("PSNR",), "recall": ("recall-VGG16",),
    "accuracy": ("classifier_accuracy",), "bits/dim": ("bits_per_dim", "bits_from"), "Tflop": ("training_tflops",),
    "variance": ("diversity",), "per image": ("seconds_per_image",), "MB of state": ("state_megabytes",),
    "step of": ("relative_step_time",), "millionths": ("max_relative_difference_ppm",),
}  # fmt: skip


@pytest.mark.parametrize("name", index.NAMES)
def test_every_number_of_an_answer_was_measured(name):
    """It is the mean over seeds of a score that the answer names, or, of whole numbers, of anything in the rows."""
    experiment = index.load(name)
    _, rows = index.complete_rows(experiment)
    if not rows:
        page = index.page_text(experiment)
        assert "**Answer.**" not in page and (page == "Not measured yet.") is not bool(index.results_of(experiment))
        return
    answer, arms = experiment.answer(rows), tables.arms(rows)
    means = [(path, float(np.mean(values))) for arm in arms for path, values in by_path(rows, arm).items()]
    names = {name for word, names in SCORES.items() if word in answer for name in names}
    scores = [mean for path, mean in means if names & set(path) and "of" not in path
              and (path[-1] in names | {"value"} or path[-1].isdigit())]  # fmt: skip
    for text in NUMBER.findall(without(answer, arms)):
        digits = len(text.partition(".")[2])
        measured = scores if digits else [mean for _, mean in means]
        assert any(f"{number:.{digits}f}" == text for number in measured), f"{text} is not in results.json"


def without(answer, arms):
    """The answer without the names of arms, which may end in a number."""
    names = "|".join(map(re.escape, sorted(arms, key=len, reverse=True)))
    return re.sub(rf"({names})(?![\d.]*\d)", "", answer)


def by_path(rows, arm):
    """Path of a number in the rows of an arm -> its values over seeds."""
    values = {}
    for row in rows.values():
        if row["arm"] == arm:
            for path, number in leaves(row):
                values.setdefault(path, []).append(number)
    return values


def leaves(value, path=()):
    """(path, number) of the numbers in a row, and of the names that are whole numbers, with "of" before them."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if re.fullmatch(r"\d+", name):
                yield (*path, "of", name), float(name)
            yield from leaves(inner, (*path, name))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, float(value)


def test_the_pages_have_the_results_of_the_evaluation_classifier():
    """The figures of the main job on the classifier's own page, and in the table of the project's page."""
    root = Path(index.__file__).parents[1]
    result = json.loads((root / "experiments" / "judge" / "results.json").read_text())
    figures = [f"{result[name]:.2f}" for name in ("frechet_distance", "autoencoder", "floor")]
    figures += [f"{100 * result[name]:.1f} %" for name in ("classifier_accuracy", "accuracy_on_test_images")]
    for page in ("experiments/judge/README.md", "README.md"):
        text = (root / page).read_text()
        missing = [figure for figure in figures if figure not in text]
        assert not missing, f"{page} does not have {missing}"
