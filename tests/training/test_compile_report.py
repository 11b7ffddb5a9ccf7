"""Compiling the training steps of a config: what is printed, what is refused, what is advised."""

import importlib.util
import json

import diffusers_folder
import finetuning
import jax
import jobs
import pytest
import tiny

from ldm_jax import command_line, train
from ldm_jax.errors import InputError
from ldm_jax.runtime.hlo import Collective
from ldm_jax.runtime.topology import CHIPS, Chip
from ldm_jax.training import compile_report
from ldm_jax.training.compile_report import Target, changes, predict, table, to_json
from ldm_jax.training.compiled_step import GB, CompiledStep, _too_large

KINDS = ("parameters", "EMA", "optimizer", "frozen", "data", "activations", "temporaries", "program, padding")


def config_with(**parallel):
    config = tiny.get_config().unlock()
    config.parallel.update(parallel)
    return config


def compiled(name="diffusion", batch_size=64, **gigabytes):
    memory = {kind: round(gigabytes.get(kind, 0) * GB) for kind in KINDS}
    return CompiledStep(name, batch_size, memory, 8 * 10**12, 10**9, {"all-reduce": Collective(1, 10**8, 1.5e8)})


def report(tiny_data, tmp_path, capsys, *changed):
    """(exit status, the lines of the report, its JSON, the error message) of a small job."""
    status = jobs.train_here(tiny_data, tmp_path / "run", *changed)
    assert not (tmp_path / "run").exists()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    return status, lines, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None, printed.err


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pmap", "fsdp"])
def test_what_this_machine_needs_is_printed_as_a_table_and_json(engine, tiny_data, tmp_path, capsys, four_devices):
    changed = ("--compile_for=local", f"--config.parallel.engine={engine}", "--config.diffusion.steps=2")
    status, lines, about, _ = report(tiny_data, tmp_path, capsys, *changed)
    assert status == 0
    assert about["devices"] == 4 and about["chip"] is None
    assert list(about["stages"]) == ["autoencoder", "diffusion"]
    for name in ("parameters", "activations", "total", "all-reduce", "fits"):
        assert any(line.strip().startswith(name) for line in lines), name
    for stage in about["stages"].values():
        assert stage["fits"] and not stage["change"] and "prediction" not in stage
        assert stage["flops"] > 0 and stage["bytes"] > 0 and stage["memory"]["activations"] > 0
        assert stage["memory_total"] == sum(stage["memory"].values())
    diffusion = about["stages"]["diffusion"]
    assert diffusion["collectives"]["all-reduce"]["sent"] > 0
    if engine == "fsdp":
        assert diffusion["collectives"]["all-gather"]["count"] > 0
    parameters = sum(int(line.split()[-2].replace(",", "")) for line in lines if line.startswith("   diffusion "))
    shards = 4 if engine == "fsdp" else 1
    assert 4 * parameters / shards <= diffusion["memory"]["parameters"] < 1.2 * 4 * parameters / shards


@pytest.mark.slow
def test_fine_tuning_and_lora_are_compiled_too(tmp_path, capsys):
    diffusers_folder.write_stable_diffusion(tmp_path / "model")
    finetuning.write_pictures(tmp_path / "pictures")
    parameters = []
    for rank in (0, 2):
        changes = ("--compile_for=local", f"--config.lora.rank={rank}", "--config.diffusion.batch_size=4")
        assert finetuning.fine_tune(tmp_path, "run", *changes) == 0
        stages = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]
        assert list(stages) == ["diffusion"] and stages["diffusion"]["fits"] and stages["diffusion"]["flops"] > 0
        parameters.append(stages["diffusion"]["memory"]["parameters"])
    assert 0 < parameters[1] < parameters[0] / 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--compile_for=v9:4x4"], "there is no chip 'v9'"),
        (["--compile_for=v5e:4x4x4"], "a slice of v5e has 2 axes"),
        (["--compile_for="], "there is no chip ''"),
        (["--compile_for=here"], "there is no chip 'here'"),
    ],
)
def test_wrong_targets_are_refused(changed, message, tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    status, _, about, error = report(tiny_data, tmp_path, capsys, *changed)
    assert status == 2 and message in error and error.count("\n") == 1 and about is None


def test_without_libtpu_a_topology_is_refused(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, _, error = report(tiny_data, tmp_path, capsys, "--compile_for=v5e:4x4")
    assert status == 2 and 'pip install "jax[tpu]"' in error


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tiny_data, tmp_path, capsys, four_devices):
    changed = ("--compile_for=local", "--config.diffusion.batch_size=6")
    status, _, _, error = report(tiny_data, tmp_path, capsys, *changed)
    assert status == 2 and "it must be a multiple of the 4 devices" in error


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_refused_after_the_report(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compile_report, "device_memory", lambda: 1e5)
    changed = ("--compile_for=local", "--config.stages=('diffusion',)", "--config.autoencoder.type=none")
    status, lines, about, error = report(tiny_data, tmp_path, capsys, *changed)
    assert status == 2 and "stage 'diffusion' needs 0.0 GB of 0.0 GB" in error and "try --config." in error
    assert not about["stages"]["diffusion"]["fits"] and about["stages"]["diffusion"]["change"]
    assert any(line.split()[:2] == ["fits", "no"] for line in lines)


def test_a_run_that_trains_nothing_has_nothing_to_compile(tiny_data, tmp_path, capsys, monkeypatch):
    """As one whose only stage is reused."""
    monkeypatch.setattr(compile_report, "stage_inputs", lambda run: iter(()))
    status, _, _, error = report(tiny_data, tmp_path, capsys, "--compile_for=local")
    assert status == 2 and "there is nothing to compile" in error


def test_a_prediction_is_the_roofline_and_the_interconnect():
    chip = Chip(memory=16 * GB, flops=1e12, bandwidth=1e9, interconnect=1e8, axes=2)
    prediction = predict(compiled(batch_size=32), chip, devices=4)
    assert (prediction.arithmetic, prediction.memory, prediction.communication) == (2.0, 1.0, 1.5)
    assert prediction.seconds == 3.5
    assert prediction.images_per_second == pytest.approx(32 / 3.5)
    assert prediction.utilization == pytest.approx(2 / 3.5)
    assert predict(compiled(), chip._replace(bandwidth=1e8), 4).seconds == 11.5  # bound by the memory


STATE, WORK = {"parameters": 8, "EMA": 8, "optimizer": 16}, {"activations": 30, "temporaries": 4}
ENGINE, REMAT = "--config.parallel.engine=fsdp", "--config.parallel.remat=True"
ACCUMULATE, NOTHING = "--config.parallel.accumulate=2", "a smaller model, or more devices"


@pytest.mark.parametrize(
    ("step", "parallel", "expected"),
    [
        (compiled(activations=15), {}, []),
        (compiled(**STATE), {}, [ENGINE, REMAT, ACCUMULATE]),
        (compiled(**WORK), {}, [REMAT, ACCUMULATE, ENGINE]),
        (compiled(**STATE), {"engine": "fsdp", "fsdp": 2}, ["--config.parallel.fsdp=0", REMAT, ACCUMULATE]),
        (compiled(**WORK), {"engine": "fsdp", "remat": True}, [ACCUMULATE]),
        (compiled(**WORK), {"engine": "fsdp", "accumulate": 16}, [REMAT]),
        (compiled(**WORK), {"engine": "fsdp", "remat": True, "accumulate": 16}, [NOTHING]),
        (compiled(batch_size=12, **WORK), {"engine": "fsdp", "remat": True}, ["--config.diffusion.batch_size=4"]),
        (compiled("clip", **WORK), {"engine": "fsdp"}, ["--config.clip.batch_size=32"]),
        (compiled(data=17), {"engine": "fsdp", "remat": True, "accumulate": 16}, ["--config.data.memory_limit_gb=0"]),
    ],
)  # fmt: skip
def test_what_to_change_comes_in_the_order_of_what_it_saves(step, parallel, expected):
    assert changes(step, config_with(**parallel), Target("v5e:2x2", 4, 16 * GB, CHIPS["v5e"])) == expected


def test_the_table_and_the_json_have_the_same_figures():
    steps, target = [compiled("autoencoder"), compiled(**STATE)], Target("v5e:2x2", 4, 16 * GB, CHIPS["v5e"])
    about = json.loads(to_json(steps, config_with(), target))
    rows = {line[:32].strip(): line[32:].split() for line in table(steps, config_with(), target).splitlines()}
    assert rows[""] == ["autoencoder", "diffusion"]
    assert rows["total"] == ["0.000", "32.000"] and about["stages"]["diffusion"]["memory_total"] == 32 * GB
    assert rows["fits"] == ["yes", "no"]
    assert rows["prediction, images/s"][1].replace(",", "") == f"{64 / predict(steps[1], CHIPS['v5e'], 4).seconds:.0f}"
    assert about["stages"]["diffusion"]["prediction"]["seconds"] == predict(steps[1], CHIPS["v5e"], 4).seconds


def test_what_the_compiler_finds_too_large_does_not_fit():
    target, step = Target("v5e:2x2", 4, 16 * GB, CHIPS["v5e"]), compiled(**STATE)._replace(traffic=0, memory={
        **compiled().memory, "activations": 10})  # fmt: skip
    about = json.loads(to_json([step], config_with(), target))["stages"]["diffusion"]
    assert not about["fits"] and about["change"] and "prediction" not in about
    assert "prediction" not in table([step], config_with(), target)


def test_the_bytes_in_a_compilers_message_are_read():
    program = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    assert _too_large(program, 4 * GB) == 16.5 * GB
    work = "the total memory required for HLO temporaries (18.50G) exceeds available HBM (15.75G)."
    assert _too_large(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {work}", 4 * GB) == 18.5 * GB
    with pytest.raises(InputError, match=r"^the step does not fit the devices' memory: RESOURCE_EXHAUSTED: of what.$"):
        _too_large("RESOURCE_EXHAUSTED: of what?\nand more", 0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, an optional extra")
@pytest.mark.parametrize(
    ("engine", "topology"),
    [("pmap", "v5e:2x2"), ("fsdp", "v5e:2x2"), ("pmap", "v4:2x2x1"), ("fsdp", "v5p:2x2x1"), ("pmap", "v6e:2x2")],
)
def test_a_small_config_compiles_for_a_slice(engine, topology, tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    changed = (f"--compile_for={topology}", f"--config.parallel.engine={engine}", "--config.stages=('diffusion',)",
               "--config.autoencoder.type=none", "--config.unet.attention=(False,)")  # fmt: skip
    status, _, about, _ = report(tiny_data, tmp_path, capsys, *changed)
    assert status == 0
    stage = about["stages"]["diffusion"]
    assert about["devices"] == 4 and stage["fits"] and stage["prediction"]["seconds"] > 0
    assert stage["collectives"]["all-reduce"]["sent"] > 0


def test_the_devices_of_a_slice_are_not_those_of_this_machine(monkeypatch):
    """JAX starts on the CPU, whatever the machine has; for `local` it does not."""
    started = []
    monkeypatch.setattr(command_line, "start_devices", lambda values: started.append(train.os.environ["JAX_PLATFORMS"]))
    monkeypatch.setattr("ldm_jax.job.compile_for", lambda *arguments: None)
    monkeypatch.setattr(train, "_checked", lambda config, workdir: config)
    for target, expected in (("v5e:2x2", "cpu"), ("local", "gpu")):
        monkeypatch.setenv("JAX_PLATFORMS", "gpu")
        train.main(["train", "--config=tests/tiny.py", f"--compile_for={target}"])
        assert started.pop() == expected
    assert jax.default_backend() == "cpu"
