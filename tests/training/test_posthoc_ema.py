"""Post-hoc EMA of a run: what it keeps, resuming, an average of any length by each command, and what is refused."""

import json
import shutil

import finetuning
import jax
import jobs
import numpy as np
import pytest
import random_runs
from damage import array_files, flip_a_bit

from ldm_jax import command_line, convert, evaluate, sample, train
from ldm_jax.diffusion.posthoc_ema import Average, gamma_of, reconstruction
from ldm_jax.errors import InputError
from ldm_jax.pipeline import posthoc_ema
from ldm_jax.pipeline.load import load
from ldm_jax.run_folder.checkpoint import load_at, load_latest
from ldm_jax.run_folder.store import SNAPSHOTS
from ldm_jax.sampling.image_grids import read_recipe

PLAIN = (
    "--config.autoencoder.type=none",
    "--config.stages=('diffusion',)",
    jobs.NO_ATTENTION,
    "--config.checkpoint_every=1",
    "--config.keep_checkpoints=9",
    "--config.sampling.num=0",
    "--config.diffusion.learning_rate=1e-2",
)
FLAGS = (*PLAIN, "--config.diffusion.ema_sigma_rels=(0.05,0.1)", "--config.diffusion.ema_snapshot_every=2")


@pytest.fixture(scope="module")
def averaged(tiny_data, tmp_path_factory):
    """A run with two averages and the parameters of each step."""
    run = tmp_path_factory.mktemp("runs") / "averaged"
    assert jobs.train_here(tiny_data, run, *FLAGS) == 0
    return run


@pytest.fixture
def run(averaged, tmp_path):
    return shutil.copytree(averaged, tmp_path / "run")


def snapshots(run):
    return {int(path.name): load_at(run / SNAPSHOTS, int(path.name)) for path in (run / SNAPSHOTS).glob("[0-9]*")}


def parameters(run, step):
    """name -> the parameters after `step` updates, float64."""
    flat = load_at(run / "diffusion", step)
    return {name.removeprefix("params/"): a.astype(float) for name, a in flat.items() if name.startswith("params/")}


def average(rows, sigma_rel, steps):
    """name -> the power function average after `steps` updates of the parameters of each."""
    weights = np.diff((np.arange(steps + 1) / steps) ** (gamma_of(sigma_rel) + 1))
    return {name: sum(w * row[name] for w, row in zip(weights, rows)) for name in rows[0]}


def trained_part(run, **options):
    """The denoiser's and the conditioning's parameters as `parameters` names them."""
    _, params = load(run, **options)
    stored = {"unet": params["denoiser"], "conditioner": params["conditioning"]}
    leaves = jax.tree_util.tree_leaves_with_path(stored)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_training_is_the_same_with_and_without(averaged, tiny_data, tmp_path):
    """To the last bit; without, checkpoints have what they always had, and there are no snapshots."""
    plain = tmp_path / "plain"
    assert jobs.train_here(tiny_data, plain, *PLAIN) == 0
    without, kept = load_latest(plain / "diffusion"), load_latest(averaged / "diffusion")
    assert {name.split("/")[0] for name in without} == {"step", "params", "ema_params", "opt_state"}
    assert not (plain / SNAPSHOTS).exists()
    assert {"/".join(n.split("/")[:2]) for n in kept.keys() - without} == {"power_emas/0.05", "power_emas/0.1"}
    for name, array in without.items():
        np.testing.assert_array_equal(kept[name], array, err_msg=name)
    assert jobs.losses(plain) == jobs.losses(averaged)


def test_snapshots_are_the_averages_in_float16(averaged):
    found = snapshots(averaged)
    assert sorted(found) == [2, 4, 6, 8]
    for step, flat in found.items():
        assert flat.pop("step") == step
        state = load_at(averaged / "diffusion", step)
        assert flat.keys() == {name for name in state if name.startswith("power_emas/")}
        for name, array in flat.items():
            assert array.dtype == np.float16
            np.testing.assert_array_equal(array, state[name].astype(np.float16))


@pytest.mark.parametrize("steps", [8, 5])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.08, 0.12])
def test_an_average_is_made_of_those_of_the_parameters_of_each_step(sigma_rel, steps, averaged, capsys):
    """Up to what float16 rounds away, or float32 if it is one of those kept. How near it is: test_posthoc_ema."""
    rows = [parameters(averaged, step) for step in range(1, steps + 1)]
    expected, rounding, kept = average(rows, sigma_rel, steps), 1e-6, sigma_rel in (0.05, 0.1)
    got = trained_part(averaged, step=steps, ema_sigma_rel=sigma_rel)
    printed = "".join(capsys.readouterr())
    if not kept:
        times = np.repeat([*range(2, steps, 2), steps], 2)
        lengths = np.tile([0.05, 0.1], len(times) // 2)
        x, _ = reconstruction(Average(times, lengths), Average(steps, sigma_rel))
        parts = [average(rows, length, time) for time, length in zip(times, lengths)]
        expected = {name: sum(each * part[name] for each, part in zip(x, parts)) for name in expected}
        rounding = 2**-11 * np.abs(x).sum()
    assert (
        f"EMA of sigma_rel {sigma_rel:g} from {2 * (steps // 2 + steps % 2)} averages; the error" in printed
    ) != kept
    assert got.keys() == expected.keys()
    others, apart = [average(rows, sigma_rel * factor, steps) for factor in (0.5, 2)], []
    for name, array in expected.items():
        bound = rounding * np.max([np.abs(row[name]) for row in rows], axis=0) + 1e-7
        assert (np.abs(got[name] - array) <= bound).all(), name
        apart.append([np.max(np.abs(other[name] - array) / bound) for other in others])
    assert (np.max(apart, axis=0) > 5).all(), "half or twice the length would do as well"


REMOVED = {  # what a crash left: checkpoints and snapshots that are not there
    "between two checkpoints": ((6, 7, 8), ()),
    "before the snapshot of the last checkpoint": ((7, 8), (6, 8)),
    "of the whole end": ((5, 6, 7, 8), (6, 8)),
}


@pytest.mark.parametrize("case", REMOVED)
def test_resuming_is_exact(case, run, averaged, tiny_data):
    """Snapshots of later steps than the checkpoint are of another training perhaps: they are made again."""
    checkpoints, missing = REMOVED[case]
    for step in checkpoints:
        shutil.rmtree(run / "diffusion" / str(step))
    for step in missing:
        shutil.rmtree(run / SNAPSHOTS / str(step))
    for step in {6, 8} - {*missing}:
        shutil.rmtree(run / SNAPSHOTS / str(step))
        shutil.copytree(run / SNAPSHOTS / "2", run / SNAPSHOTS / str(step))
    (run / "report.html").unlink()
    assert jobs.train_here(tiny_data, run, *FLAGS) == 0
    before, after = (load_latest(folder / "diffusion") for folder in (averaged, run))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    before, after = snapshots(averaged), snapshots(run)
    assert before.keys() == after.keys()
    for step, flat in before.items():
        for name in flat:
            np.testing.assert_array_equal(after[step][name], flat[name], err_msg=f"{step} {name}")


def command(module, name, run, *flags):
    return command_line.run(module.main, [name, f"--model={run}", *flags])


def test_sample_and_its_recipe(averaged, tmp_path, capsys):
    flags = ["--num=4", "--steps=3", "--nosave_trajectory"]
    for out, more in {"ema": [], "of_0.08": ["--ema_sigma_rel=0.08"], "of_0.1": ["--ema_sigma_rel=0.1"]}.items():
        assert command(sample, "sample", averaged, f"--out={tmp_path / out}", *flags, *more) == 0
    images = {out: jobs.samples(tmp_path / out)["images"] for out in ("ema", "of_0.08", "of_0.1")}
    recipes = {out: read_recipe(tmp_path / out / "samples.png") for out in images}
    assert [recipe["ema_sigma_rel"] for recipe in recipes.values()] == [None, 0.08, 0.1]
    assert len({recipe["model"] for recipe in recipes.values()}) == 3
    assert (images["ema"] != images["of_0.08"]).any()
    again = [f"--out={tmp_path / 'again'}", f"--from_recipe={tmp_path / 'of_0.08' / 'samples.png'}"]
    for more, says in (
        ([], "was sampled with another EMA; add --ema_sigma_rel=0.08"),
        (["--ema_sigma_rel=0.1"], "was sampled with another EMA; add --ema_sigma_rel=0.08"),
    ):
        assert command(sample, "sample", averaged, *again, *more) == 2
        assert says in capsys.readouterr().err
    assert command(sample, "sample", averaged, *again, "--ema_sigma_rel=0.08") == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "again")["images"], images["of_0.08"])
    own = [f"--out={tmp_path / 'own'}", f"--from_recipe={tmp_path / 'ema' / 'samples.png'}", "--ema_sigma_rel=0.08"]
    assert command(sample, "sample", averaged, *own) == 2
    assert "was sampled with the model's own EMA; leave out --ema_sigma_rel" in capsys.readouterr().err


def test_evaluate(averaged, tmp_path):
    flags = [f"--out={tmp_path / 'scores'}", "--num=8", "--steps=2", "--ema_sigma_rel=0.08"]
    assert command(evaluate, "evaluate", averaged, *flags) == 0
    assert json.loads((tmp_path / "scores" / "evaluation.json").read_text())["recipe"]["ema_sigma_rel"] == 0.08


def test_convert(averaged, tmp_path, capsys):
    """The exported parameters are that average, and the card says so, without the scores of the EMA."""
    folder, card = tmp_path / "folder", tmp_path / "folder" / "README.md"
    assert command(convert, "convert", averaged, f"--to={folder}", "--ema_sigma_rel=0.08") == 0
    (_, exported), (_, expected) = load(folder), load(averaged, ema_sigma_rel=0.08)
    jax.tree.map(np.testing.assert_array_equal, exported["denoiser"], expected["denoiser"])
    assert "are power function averages of length sigma_rel 0.08" in card.read_text()
    assert "(EMA)" not in card.read_text()
    for name, module in (("sample", sample), ("convert", convert)):
        target = f"--out={tmp_path / 'out'}" if name == "sample" else f"--to={tmp_path / 'back'}"
        assert command(module, name, folder, target, "--ema_sigma_rel=0.08") == 2
        assert "--ema_sigma_rel" in (error := capsys.readouterr().err) and "run folder" in error


def test_a_damaged_snapshot_is_one_line(run, tmp_path, capsys):
    for path in array_files(run / SNAPSHOTS / "4"):
        flip_a_bit(path)
    assert command(sample, "sample", run, f"--out={tmp_path / 'out'}", "--ema_sigma_rel=0.08") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{run / SNAPSHOTS / '4'} is damaged" in line and "without that folder the EMA is made of the others" in line
    assert not (tmp_path / "out").exists()
    load(run, ema_sigma_rel=0.1)  # is in the checkpoint


def test_missing_snapshots_are_one_line(run, averaged, capsys):
    shutil.rmtree(run / SNAPSHOTS / "4")
    without = trained_part(run, ema_sigma_rel=0.08)
    (line, *_) = capsys.readouterr().err.strip().splitlines()
    assert "1 of 3 snapshots are missing, the first is 4; the EMA is of the others" in line
    whole = trained_part(averaged, ema_sigma_rel=0.08)
    assert 0 < max(np.abs(without[name] - whole[name]).max() for name in whole) < 1e-2
    shutil.rmtree(run / SNAPSHOTS)
    trained_part(run, ema_sigma_rel=0.08)
    assert "3 of 3 snapshots are missing, the first is 2" in capsys.readouterr().err


def test_an_average_far_from_those_kept_is_warned_of(averaged, capsys):
    load(averaged, ema_sigma_rel=0.01)
    error = capsys.readouterr().err
    assert "warning: EMA of sigma_rel 0.01 from 8 averages; the error of its weights is 0." in error
    assert "far from those of the run, 0.05, 0.1, or snapshots are few" in error


def test_values_beyond_float16_are_one_line(averaged, monkeypatch):
    flat = load_at(averaged / SNAPSHOTS, 2)
    name = next(name for name in flat if name.startswith("power_emas"))
    monkeypatch.setattr(posthoc_ema, "load_at", lambda folder, step: flat | {name: np.full_like(flat[name], np.inf)})
    with pytest.raises(
        InputError, match=f"{averaged / SNAPSHOTS / '2'}: {name} is beyond float16; without that folder"
    ):
        load(averaged, ema_sigma_rel=0.08)


def test_a_run_without_averages(tmp_path, capsys):
    run = random_runs.random_run(tmp_path / "run")
    assert command(sample, "sample", run, f"--out={tmp_path / 'out'}", "--ema_sigma_rel=0.08") == 2
    assert "has no power function averages; train with --config.diffusion.ema_sigma_rels" in capsys.readouterr().err


BAD = {  # flags of sample or fields of training -> what the line must say
    "a length of 0": ("--ema_sigma_rel=0", "ema_sigma_rel"),
    "a length beyond a uniform average": ("--ema_sigma_rel=0.3", "ema_sigma_rel"),
    "no number": ("--ema_sigma_rel=long", "ema_sigma_rel"),
    "a kept length of 0": ("ema_sigma_rels=(0.0,)", "it must be rising numbers from 0.001 to 0.288"),
    "a kept length too long": ("ema_sigma_rels=(0.05,0.5)", "it must be rising numbers from 0.001 to 0.288"),
    "a length twice": ("ema_sigma_rels=(0.1,0.1)", "config.diffusion.ema_sigma_rels is (0.1, 0.1)"),
    "falling lengths": ("ema_sigma_rels=(0.1,0.05)", "it must be rising numbers"),
    "words": ("ema_sigma_rels=('a','b')", "it must be rising numbers"),
    "an interval of 0": ("ema_snapshot_every=0", "config.diffusion.ema_snapshot_every is 0; it must be 1 or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(case, tmp_path, capsys):
    value, says = BAD[case]
    out = tmp_path / "out"
    if value.startswith("--"):
        assert command(sample, "sample", tmp_path, f"--out={out}", value) == 2
    else:
        flags = ["train", "--config=tests/tiny.py", f"--workdir={out}", f"--config.diffusion.{value}"]
        assert command_line.run(train.main, flags) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("fields", [(), ("lora.rank=2",)], ids=["whole", "lora"])
def test_fine_tuning(fields, tiny_data, tmp_path):
    """The averages are of what is trained, from the first update on."""
    base = random_runs.random_run(tmp_path / "base")
    more = [*fields, "diffusion.ema_sigma_rels=(0.05,0.1)", "diffusion.ema_snapshot_every=1", "sampling.num=0"]
    more += ["sampling.steps=2", "sampling.progress_every=0"]
    run = tmp_path / "run"
    assert command_line.run(train.main, finetuning.flags_from_run(base, tiny_data, run, *more)) == 0
    (model, plain), (_, other) = load(run), load(run, ema_sigma_rel=0.08)
    assert model.origin.step == 4 and sorted(snapshots(run)) == [1, 2, 3, 4]
    (_, start), apart = (
        load(base),
        lambda one, two: max(
            np.abs(a - b).max() for a, b in zip(jax.tree.leaves(one["denoiser"]), jax.tree.leaves(two["denoiser"]))
        ),
    )
    assert 0 < apart(other, plain) < apart(other, start)
