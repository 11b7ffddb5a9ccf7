"""The memory and the duration of a training, which are printed before it starts."""

import re
from collections import Counter
from types import SimpleNamespace

import jax
import jobs
import pytest
import tiny

from ldm_jax import command_line, job, train
from ldm_jax.data.from_config import load_split
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.runtime.fsdp import sharded_step
from ldm_jax.runtime.parallel import parallel_step
from ldm_jax.training import estimate
from ldm_jax.training.compiled_step import GB
from ldm_jax.training.run import Run

KINDS = {  # changes -> stages whose steps are measured
    "latents": ((), ("autoencoder", "diffusion")),
    "flipped, adversarial": (("--config.data.flip=True", "--config.autoencoder.loss.adversarial=0.5",
                              "--config.autoencoder.loss.adversarial_start=4"), ("autoencoder", "diffusion")),
    "late LPIPS": (("--config.autoencoder.loss.perceptual=0.5", "--config.autoencoder.loss.perceptual_size=16",
                    "--config.autoencoder.loss.perceptual_start=2"), ("autoencoder", "diffusion")),
    "VQ": (("--config.autoencoder.type=vq",), ("autoencoder", "diffusion")),
    "pixels": (("--config.autoencoder.type=none",), ("diffusion",)),
    "inpainting": (("--config.concat.type=inpainting",), ("autoencoder", "diffusion")),
    "texts": (jobs.TEXTS, ("autoencoder", "clip", "diffusion")),
    "texts, trained": ((*jobs.TEXTS, "--config.diffusion.train_text_encoder=True"),
                       ("autoencoder", "clip", "diffusion")),
    "no latents": (("--config.data.memory_limit_gb=0",), ("autoencoder", "diffusion")),
}  # fmt: skip


def compilations(workdir):
    """Of all stages: the number of compilations."""
    counts = Counter()
    for line in read_metrics(workdir / "metrics.jsonl"):
        counts.update({name: value for name, value in line.items() if name.endswith("_compilations")})
    return counts


def new_run(data, workdir, *changes):
    values = train.define_flags()
    command_line.parse(values, ["train", *jobs.flags(data, workdir, *changes)], config=True)
    splits = (load_split(values.config, split) for split in ("train", "test"))
    return Run(values.config, workdir, *splits, log=None, watch=None, base=None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_stages_are_measured(kind, tiny_data, tmp_path, capsys, monkeypatch):
    changes, measured = KINDS[kind]
    monkeypatch.setattr(estimate, "FEW", 1)
    run = new_run(tiny_data, tmp_path / "run", *changes)
    estimate.print_estimate(run)
    memory, line = capsys.readouterr().out.splitlines()
    assert re.findall(r"(\w+) \d+\.\d+ GB[,)]", memory) == list(measured)
    assert line.startswith("Training takes about ")
    assert re.findall(r"(\w+) \d+ s[,)]", line) == list(measured)
    for stage in measured:
        (tmp_path / "run" / stage / "8").mkdir(parents=True)
    estimate.print_estimate(run)  # of a trained run
    assert "(" not in capsys.readouterr().out


def test_the_duration_is_that_of_the_steps_that_are_left(tiny_data, tmp_path, capsys, monkeypatch):
    """Of 8 of each stage; those of the autoencoder with the adversarial loss, from the fifth on, take longer."""
    bytes_of, seconds = {"autoencoder": GB // 2, "diffusion": GB}, {False: 2.0, True: 5.0}
    monkeypatch.setattr(estimate, "FEW", 1)
    monkeypatch.setattr(estimate, "device_memory", lambda: 2 * GB)
    monkeypatch.setattr(estimate, "step_memory", lambda run, inputs: bytes_of[inputs.name])
    per_step = lambda run, inputs, perceptual=False, adversarial=False: seconds[adversarial]  # noqa: E731
    monkeypatch.setattr(estimate, "_seconds_per_step", per_step)
    run = new_run(tiny_data, tmp_path / "run", *KINDS["flipped, adversarial"][0])
    memory = "Memory: training needs 1.00 GB of 2.0 GB on each device (autoencoder 0.50 GB, diffusion 1.00 GB)\n"
    line = "Training takes about {} s (autoencoder {} s, diffusion {} s), by 4 steps of each stage; "
    estimate.print_estimate(run)
    assert capsys.readouterr().out == memory + line.format(44, 28, 16) + "then come samples and scores\n"
    for stage, steps in (("autoencoder", 3), ("diffusion", 4)):
        (tmp_path / "run" / stage / str(steps)).mkdir(parents=True)
    estimate.print_estimate(run)
    assert capsys.readouterr().out == memory + line.format(30, 22, 8) + "then come samples and scores\n"


def test_a_step_is_measured_without_its_compilation(monkeypatch):
    seconds, now = iter([100.0, 2.0, 3.0, 4.0, 7.0]), [0.0]

    def step(state, *arguments):
        now[0] += next(seconds)
        return state, {}

    def feed(index):
        return {}

    feed.resident = {}
    engine = SimpleNamespace(step=lambda stage: step, place_params=dict, place=dict, shard_batch=dict)
    inputs = SimpleNamespace(name="diffusion", stage=None, frozen={}, source=None, state=dict)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(estimate, "make_feed", lambda *arguments: feed)
    assert estimate._seconds_per_step(SimpleNamespace(engine=engine, config=tiny.get_config()), inputs) == 4.0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pmap", "fsdp"])
def test_what_is_measured_is_not_compiled_again(engine, tiny_data, tmp_path, monkeypatch):
    """Neither by the memory alone, of short trainings, nor by the steps that are measured of long ones."""
    counts = {}
    for few in (1, 1000, None):
        jax.clear_caches()
        parallel_step.cache_clear()
        sharded_step.cache_clear()
        monkeypatch.setattr(estimate, "FEW", few)
        if few is None:
            monkeypatch.setattr(job, "print_estimate", lambda run: None)
        changes = (f"--config.parallel.engine={engine}", "--config.sampling.num=0")
        assert jobs.train_here(tiny_data, tmp_path / str(few), *changes) == 0
        counts[few] = compilations(tmp_path / str(few))
    for name in ("autoencoder_compilations", "diffusion_compilations"):
        assert counts[1][name] < counts[None][name]
        assert counts[1000][name] < counts[None][name]
    jobs.assert_same_training(tmp_path / "1", tmp_path / "None")


def test_too_much_memory_is_said(capsys, monkeypatch):
    monkeypatch.setattr(estimate, "device_memory", lambda: 2 * 2**30)
    estimate._print_memory({"autoencoder": 2**29, "diffusion": 2**30})
    line = "Memory: training needs 1.00 GB of 2.0 GB on each device (autoencoder 0.50 GB, diffusion 1.00 GB)\n"
    assert capsys.readouterr().out == line
    estimate._print_memory({"diffusion": 3 * 2**30})
    assert "that is too much: --compile_for=local" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (130, "2 min"), (3599, "1 h 0 min"), (7_000, "1 h 57 min")]
)
def test_durations(seconds, text):
    assert estimate._duration(seconds) == text
