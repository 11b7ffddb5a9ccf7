"""Cached latents: in memory-mapped files, or in shards where they are larger than config.data.memory_limit_gb."""

import shutil
import signal
from pathlib import Path

import damage
import jax
import jobs
import numpy as np
import pytest
import tiny
from test_bad_input import fails

from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.feeds import HostFeed
from ldm_jax.data.shards import INDEX, Shards
from ldm_jax.pipeline.from_config import build_first_stage
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.runtime.files import read_json
from ldm_jax.training import latents
from ldm_jax.training.from_config import make_autoencoder_stage
from ldm_jax.training.latents import Latents, cached_latents, measure_scale

LIMIT = 1e-5  # GB: less than the images and the latents take
STREAMED = f"--config.data.memory_limit_gb={LIMIT}"


@pytest.fixture(scope="module", params=["kl", "vq"])
def encode(request, tiny_data):
    """encode(workdir, limit, checkpoint): the cached latents of 50 images; with flips, for a KL autoencoder."""
    config = tiny.get_config().unlock()
    config.autoencoder.type, config.autoencoder.mid_block_attention = request.param, False
    config.data.flip = request.param == "kl"
    first_stage, stage = build_first_stage(config), make_autoencoder_stage(config)
    params = {"first_stage": jax.jit(stage.init)(jax.random.key(0)).params["autoencoder"]}
    dataset = load_dataset("tiny", "train[:50]", data_dir=tiny_data)

    def encode(workdir, limit=1e-6, checkpoint="", parts=1):
        config.data.memory_limit_gb, config.autoencoder.checkpoint = limit, str(checkpoint)
        return cached_latents(config, workdir, first_stage, params, dataset, parts)

    encode.stochastic = first_stage.stochastic
    return encode


@pytest.fixture(autouse=True)
def small_shards(request, monkeypatch):
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(latents, "EXAMPLES_PER_SHARD", 12)  # with batches of 8: 16


def written(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("latents/*/0*.array_record")}


def test_shards_are_the_arrays_of_memory(encode, tmp_path):
    """To the last bit, with their batches and their scale."""
    memory, shards = encode(tmp_path / "memory", 1.0), encode(tmp_path / "shards")
    assert isinstance(memory, Latents) and isinstance(shards, Shards)
    (folder,) = (tmp_path / "shards" / "latents").iterdir()
    (name,) = {path.name.split(".")[0] for path in (tmp_path / "memory" / "latents").iterdir()}
    assert folder.name == read_json(folder / INDEX)["content_hash"] == name
    assert [len(rows) for rows in shards.rows] == [16, 16, 16, 2]
    for step in (0, 1, 9, 3):
        one, other = (HostFeed(source, 8, 5)(step) for source in (memory, shards))
        assert one.keys() == other.keys() == {"moments", "label", "id"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    for one, other in zip(*(measure_scale(source, gaussian=encode.stochastic) for source in (memory, shards))):
        np.testing.assert_array_equal(one, other)


def test_shards_that_are_there_are_kept(encode, tmp_path, capsys):
    """Of a killed process the missing ones are encoded, of a damaged disk the damaged ones."""
    shards, before = encode(tmp_path), written(tmp_path)
    arrays = shards[range(50)]
    capsys.readouterr()
    encode(tmp_path)
    assert written(tmp_path) == before and not capsys.readouterr().out
    shards.paths[3].unlink()
    damage.cut(shards.paths[1])
    again = encode(tmp_path)
    assert "in 4 shards, 2 to be encoded here" in capsys.readouterr().out
    after = written(tmp_path)
    assert [after[path.name] == before[path.name] for path in shards.paths] == [True, False, True, False]
    for name, values in again[range(50)].items():
        np.testing.assert_array_equal(values, arrays[name])


@pytest.mark.parametrize("index", [0, 1])
def test_the_files_of_a_killed_process_are_removed(index, encode, tmp_path, monkeypatch):
    """A process that ends while it encodes leaves hidden files of the whole size: its own alone, not of other hosts."""
    monkeypatch.setattr(jax, "process_index", lambda: index)

    def end(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(latents, "_allocate", end)
        patch.setattr(Path, "unlink", end)  # as by os._exit
        with pytest.raises(SystemExit):
            encode(tmp_path, 1.0)
    (folder,) = tmp_path.iterdir()
    (left,) = folder.iterdir()
    other = left.with_name(left.name.replace(f".{index}.", f".{1 - index}."))
    assert left.name.startswith(".") and other != left
    other.write_bytes(left.read_bytes())
    memory = encode(tmp_path, 1.0)
    assert len(memory) == 50
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == {other.name}


def test_a_damaged_index_is_written_anew(encode, tmp_path, capsys):
    shards, before = encode(tmp_path), written(tmp_path)
    damage.cut(shards.paths[0].parent / INDEX)
    assert len(encode(tmp_path)) == 50 and written(tmp_path) == before
    assert "cached latents have a damaged index" in capsys.readouterr().out


def test_the_limit_is_of_all_parts(encode, tmp_path):
    """As of aspect ratio buckets; .npy files that are there are read whatever the limit is."""
    memory = encode(tmp_path / "memory", 1.0)
    size = sum(values.nbytes for values in memory.arrays.values()) / 2**30
    assert isinstance(encode(tmp_path / "exactly", size), Latents)
    assert isinstance(encode(tmp_path / "half", size, parts=2), Shards)
    assert isinstance(encode(tmp_path / "memory", 0.5 * size), Latents)


def test_the_shards_of_a_reused_autoencoder(encode, tmp_path):
    """They are read where they are; of an incomplete set nothing is written there."""
    shards, before = encode(tmp_path / "other"), written(tmp_path / "other")
    encode(tmp_path / "run", checkpoint=tmp_path / "other")
    assert not (tmp_path / "run").exists()
    shards.paths[2].unlink()
    del before[shards.paths[2].name]
    encode(tmp_path / "run", checkpoint=tmp_path / "other")
    assert written(tmp_path / "other") == before and len(written(tmp_path / "run")) == 4


def test_each_host_encodes_its_own_shards(encode, tmp_path, monkeypatch):
    """The second of two, which waits for the index and for the others' shards."""
    encode(tmp_path / "one")
    waits = []

    def wait(name):
        waits.append(name)
        if name == "latents":  # each host has written its own shards
            assert sorted(written(tmp_path / "two")) == ["00001-of-00004.array_record", "00003-of-00004.array_record"]
            shutil.copytree(tmp_path / "one", tmp_path / "two", dirs_exist_ok=True)
        else:
            (folder,) = (tmp_path / "one" / "latents").iterdir()
            (tmp_path / "two" / "latents" / folder.name).mkdir(parents=True)
            shutil.copy(folder / INDEX, tmp_path / "two" / "latents" / folder.name)

    monkeypatch.setattr(latents, "wait_for_hosts", wait)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert len(encode(tmp_path / "two")) == 50 and waits == ["index of the latents", "latents"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """2,600 images with captions, whose latents are three shards."""
    folder = tmp_path_factory.mktemp("captioned")
    tiny.prepare(folder, train=2600)
    return folder


@pytest.fixture(scope="module")
def streamed(captioned, tmp_path_factory):
    """A text-to-image run whose images and latents are streamed."""
    run = tmp_path_factory.mktemp("streamed") / "run"
    assert "Done: " in jobs.finish(jobs.start(captioned, run, *jobs.TEXTS, STREAMED))
    return run


STAGES = ("autoencoder", "clip", "diffusion")


@pytest.mark.slow
def test_a_streamed_text_run_is_that_of_memory(captioned, streamed, tmp_path):
    """Up to the rounding of a step that is compiled for whole batches."""
    assert sorted(written(streamed)) == [f"0000{k}-of-00003.array_record" for k in range(3)]
    assert not list(streamed.glob("latents/*.npy"))
    assert "Done: " in jobs.finish(jobs.start(captioned, tmp_path / "run", *jobs.TEXTS))
    assert list(tmp_path.glob("run/latents/*.moments.npy")) and not written(tmp_path / "run")
    assert jobs.losses(tmp_path / "run") == pytest.approx(jobs.losses(streamed), rel=1e-3)


@pytest.mark.slow
def test_a_run_killed_while_it_encodes_and_while_it_trains(captioned, streamed, tmp_path):
    """It keeps the finished shards, and ends with the same bits."""
    run, changes = tmp_path / "run", (*jobs.TEXTS, STREAMED)
    jobs.stop_when(jobs.start(captioned, run, *changes), lambda: written(run), signal.SIGKILL)
    before = written(run)
    assert 1 <= len(before) < 3
    process = jobs.start(captioned, run, *changes)
    jobs.stop_when(process, lambda: (run / "diffusion" / "4").exists(), signal.SIGKILL)
    assert before.items() <= written(run).items() and len(written(run)) == 3
    assert "Done: " in jobs.finish(jobs.start(captioned, run, *changes))
    jobs.assert_same_training(run, streamed, stages=STAGES)
    for name, array in jobs.samples(streamed).items():
        np.testing.assert_array_equal(jobs.samples(run)[name], array)


@pytest.mark.slow
def test_a_damaged_record_stops_the_run_with_one_line(captioned, streamed, tmp_path, capsys):
    """Without the file, the same command goes on."""
    run, changes = shutil.copytree(streamed, tmp_path / "run"), (*jobs.TEXTS, STREAMED)
    shutil.rmtree(run / "diffusion")
    (run / "report.html").unlink()
    (path, *_) = sorted(run.glob("latents/*/*.array_record"))
    damage.flip_a_bit(path)
    line = fails(jobs.train.main, jobs.flags(captioned, run, *changes), capsys, status=1)
    assert f"{path} is damaged (" in line and "delete this file, and the same command writes it anew" in line
    path.unlink()
    assert jobs.train_here(captioned, run, *changes) == 0
    assert load_latest(run / "diffusion")["step"] == 8


@pytest.mark.slow
def test_two_hosts_encode_their_own_shards(captioned, tmp_path):
    changes = (STREAMED, "--config.autoencoder.steps=2", "--config.diffusion.steps=2", "--config.sampling.num=0")
    processes = jobs.start_hosts(captioned, tmp_path / "run", 2, *changes, jobs.NO_ATTENTION)
    outputs = jobs.finish_all(processes)
    assert "in 3 shards, 2 to be encoded here" in outputs[0] and "in 3 shards, 1 to be encoded here" in outputs[1]
    assert len(written(tmp_path / "run")) == 3
