"""Run folders in object stores: runs on a server of the protocol on the loopback, killed, resumed, sampled from."""

import re
import signal
import time

import jobs
import numpy as np
import object_stores
import pytest
from object_stores import BUCKET

from ldm_jax import command_line, convert, evaluate, sample, train
from ldm_jax.errors import InputError, RunError
from ldm_jax.pipeline.load import load
from ldm_jax.run_folder import store
from ldm_jax.run_folder.checkpoint import Checkpoints, load_latest
from ldm_jax.run_folder.lock import locked
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.runtime.object_store import PACKAGES, TIMEOUT, file_system, objects


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request):
    """A server of each protocol; its settings are in the environment, of this process and of those that it starts."""
    if lacking := object_stores.missing(request.param):
        pytest.skip(f"{', '.join(lacking)}: not installed (requirements-dev.txt)")
    with pytest.MonkeyPatch.context() as patch:
        started = object_stores.SERVERS[request.param]()
        started.scheme = request.param
        for name, value in started.environment.items():
            patch.setenv(name, value)
        started.make_bucket()
        yield started
        started.close()


@pytest.fixture
def url(server, request):
    """A run folder in the store, another one for each test."""
    return f"{server.scheme}://{BUCKET}/{request.node.name.translate(str.maketrans('[]', '--'))}/run"


def names(url):
    """Those of the objects that are no parts of checkpoints."""
    return [name for name in objects(url) if not any(part.isdecimal() for part in name.split("/"))]


def mirror(url):
    """A mirror of a run, on which the functions for local run folders work."""
    with store.local_folder(url, flag="--model") as folder:
        return folder


def train_tree(step):
    return {"step": np.int32(step), "params": {"w": np.arange(3, dtype=np.float32) * step}}


# The mirror and checkpoints, without training.


@pytest.fixture
def open_run(url):
    """A mirror for training."""
    with store.local_folder(url, flag="--workdir", train=True) as folder:
        yield folder


def test_files_are_uploaded_when_they_have_changed_and_deleted_where_they_were(open_run, url):
    (open_run / "latents").mkdir()
    for name in ("config.json", "latents/x.npy", ".temporary"):
        (open_run / name).write_text(name)
    store.push(open_run)
    assert set(objects(url)) == {"config.json", "latents/x.npy"}

    other = mirror(url)
    assert other != open_run and other.name == "run"
    assert (other / "config.json").read_text() == "config.json"
    assert not (other / "latents").exists()  # which only training needs
    with store.local_folder(url, flag="--workdir", train=True) as again:
        assert (again / "latents" / "x.npy").read_text() == "latents/x.npy"
        (again / "config.json").write_text("another")
        (again / "latents" / "x.npy").unlink()
        store.push(again)
    assert (mirror(url) / "config.json").read_text() == "another"
    assert objects(url) == ["config.json"]


def test_a_file_that_has_not_changed_is_not_uploaded_again(open_run, monkeypatch):
    (open_run / "config.json").write_text("{}")
    store.push(open_run)
    uploads = []
    files = file_system(store.address(open_run))
    monkeypatch.setattr(files, "put_file", lambda *arguments: uploads.append(arguments))
    store.push(open_run)
    assert not uploads
    (open_run / "metrics.jsonl").write_text("{}")
    store.push(open_run)
    assert len(uploads) == 1


def test_checkpoints_are_in_the_store_and_not_in_the_mirror(open_run, url):
    with Checkpoints(open_run / "diffusion", keep=2, identity={"config": "x"}) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(train_tree(step))
    assert not (open_run / "diffusion").exists()
    assert sorted(store.checkpoint_steps(open_run / "diffusion")) == [2, 3]
    assert not any(name.startswith("diffusion/1/") for name in objects(url))
    again = mirror(url)
    assert not (again / "diffusion").exists()
    assert load_latest(again / "diffusion")["step"] == 3
    assert load_latest(again / "diffusion", up_to=2)["step"] == 2
    with Checkpoints(again / "diffusion", keep=2, identity={"config": "x"}) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(train_tree(0))["params"]["w"], train_tree(3)["params"]["w"])


def test_an_unfinished_checkpoint_is_none_and_is_saved_again(open_run, url):
    folder = open_run / "diffusion"
    with Checkpoints(folder, keep=2, identity={}) as checkpoints:
        checkpoints.save(train_tree(1))
        checkpoints.save(train_tree(2))
    file_system(url).rm_file(f"{url}/diffusion/2/{store.COMMITTED}")  # as a kill before the end leaves it
    assert store.checkpoint_steps(folder) == [1]
    assert load_latest(folder)["step"] == 1
    with Checkpoints(folder, keep=2, identity={}) as checkpoints:
        assert checkpoints.restore(train_tree(0))["step"] == 1
        checkpoints.save(train_tree(2))
    assert load_latest(folder)["step"] == 2


def test_a_damaged_checkpoint_is_put_aside_and_saved_again(open_run, url, capsys):
    folder, files = open_run / "diffusion", file_system(url)
    with Checkpoints(folder, keep=3, identity={}) as checkpoints:
        checkpoints.save(train_tree(1))
        checkpoints.save(train_tree(2))
    arrays = [name for name in objects(url) if name.startswith("diffusion/2/state/") and "/d/" in name]
    assert arrays
    for name in arrays:
        files.pipe_file(f"{url}/{name}", b"damaged")
    with Checkpoints(folder, keep=3, identity={}) as checkpoints:
        assert checkpoints.restore(train_tree(0))["step"] == 1
        assert f"Checkpoint {url}/diffusion/2 is damaged" in capsys.readouterr().out
        assert any(name.startswith("diffusion/damaged.2/state/") for name in objects(url))
        assert store.checkpoint_steps(folder) == [1]
        checkpoints.save(train_tree(2))
    assert load_latest(folder)["step"] == 2
    assert not (mirror(url) / "diffusion").exists()  # the damaged one isn't downloaded


def test_the_last_process_has_the_run_and_the_one_before_ends(url):
    def opened():
        return store.local_folder(url, flag="--workdir", train=True)

    with opened() as first, locked(first):
        store.push(first)
        with opened() as second, locked(second):
            (second / "config.json").write_text("second")
            store.push(second)
            (first / "config.json").write_text("first")
            with pytest.raises(RunError, match=rf"{url} is trained by process \d+ on .*, since .*; this process"):
                store.push(first)
    assert (mirror(url) / "config.json").read_text() == "second"


# Errors: one line, exit status 2, in seconds.


def run_status(data, url, *changes):
    return command_line.run(train.main, ["train", *jobs.flags(data, url, *changes)])


def one_line(capsys):
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "Traceback" not in error, error
    return error


@pytest.mark.parametrize("where", ["az://bucket/run", "ftp://host/run", "http://host/run"])
def test_another_scheme_is_one_line(where, tiny_data, capsys):
    assert run_status(tiny_data, where) == 2
    assert f"--workdir={where} is not supported; a run folder is a path, gs://BUCKET/RUN or s3://" in one_line(capsys)


@pytest.mark.parametrize(
    "where", ["s3://", "gs://bucket", "s3://bucket/", "s3:///run", "gs://bucket//run", "gs://b/a run"]
)
def test_a_url_without_bucket_or_path_is_one_line(where, tiny_data, capsys):
    assert run_status(tiny_data, where) == 2
    assert f"--workdir={where} is no run folder; it must be {where[:2]}://BUCKET/RUN" in one_line(capsys)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_without_its_package_a_url_is_one_line_that_names_it(scheme, tiny_data, capsys, monkeypatch):
    monkeypatch.setitem(PACKAGES, scheme, "no_such_package")
    assert run_status(tiny_data, f"{scheme}://bucket/run") == 2
    assert "needs no_such_package: pip install no_such_package" in one_line(capsys)


@pytest.mark.parametrize("where", ["s3:/bucket/run", "gs:/bucket/run"])
def test_a_url_that_has_lost_a_slash_does_not_become_a_folder(where, tiny_data, capsys):
    assert run_status(tiny_data, where) == 2
    assert f"--workdir={where} is a URL; it must be a local folder" in one_line(capsys)


def test_outputs_are_local(capsys):
    assert command_line.run(sample.main, ["sample", "--model=x", "--out=s3://bucket/samples"]) == 2
    assert "--out=s3:/bucket/samples is a URL; it must be a local folder" in one_line(capsys)
    assert command_line.run(evaluate.main, ["evaluate", "--model=s3://bucket/run"]) == 2
    assert "--out is missing; of --model=s3://bucket/run it must be a local folder" in one_line(capsys)


def test_a_bucket_that_is_not_there_is_one_line(server, tiny_data, capfd):
    url = f"{server.scheme}://no-bucket/run"
    begin = time.monotonic()
    assert run_status(tiny_data, url) == 2
    assert time.monotonic() - begin < TIMEOUT + 5
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train: ")]
    assert line.startswith(f"train: --workdir={url} cannot be written to: ") and "check the bucket" in line


def test_a_run_that_is_not_there_is_one_line(url):
    with pytest.raises(InputError, match=f"{url} is no run folder: it has no config.json"):
        load(url)


def test_a_read_only_store_can_be_sampled_from_and_not_trained_in(server, url, tiny_data, capfd):
    file_system(url).pipe_file(f"{url}/config.json", b"{}")
    server.read_only = True
    try:
        assert run_status(tiny_data, url) == 2
        assert (mirror(url) / "config.json").read_text() == "{}"
    finally:
        server.read_only = False
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train: ")]
    problem = (
        f"--workdir={url} cannot be written to: {server.denied}; check the bucket, the credentials and the endpoint"
    )
    assert line == f"train: {problem}"
    assert objects(url) == ["config.json"]


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_one_line_in_seconds(server, url, tiny_data, monkeypatch):
    for name, value in server.unreachable.items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    output = jobs.finish(jobs.start(tiny_data, url), status=2)
    assert time.monotonic() - begin < TIMEOUT + 30  # of it the start of Python on a busy machine
    line = next(line for line in output.splitlines() if line.startswith("train: "))
    assert line.startswith(f"train: --workdir={url} cannot be written to: ")
    assert re.search("no answer within 15 s; check the network, the endpoint|Could not connect to the endpoint", line)


@pytest.mark.slow
def test_without_credentials_there_is_one_line(server, url, tiny_data, monkeypatch):
    with monkeypatch.context() as patch:
        server.take_credentials(patch)
        patch.setenv("HOME", "/nonexistent")
        output = jobs.finish(jobs.start(tiny_data, url), status=2)
    (line,) = [line for line in output.splitlines() if line.startswith("train: ")]
    problem = f"--workdir={url} cannot be written to: {server.no_credentials}"
    assert line == f"train: {problem}; check the bucket, the credentials and the endpoint"
    assert not objects(url)


# Whole runs.

STORED = {"config.json", "data.json", "metrics.jsonl", "samples.npz", "samples.png", "evaluation.json", "report.html"}


def assert_equal_to(url, one_device_run, *, losses=True):
    """The run in the store has the checkpoints, losses and samples of a local one, to the last bit."""
    run = mirror(url)
    jobs.assert_same_training(run, one_device_run)
    if losses:  # which are means since the start, if a start is within an interval of the log
        assert jobs.losses(run) == jobs.losses(one_device_run)
    for name, array in jobs.samples(one_device_run).items():
        np.testing.assert_array_equal(jobs.samples(run)[name], array)


@pytest.mark.slow
def test_a_run_in_a_store_is_that_of_a_folder_and_can_be_sampled_from(server, url, one_device_run, tiny_data, tmp_path):
    """SIGTERM saves to the store, and the same command goes on."""
    process = jobs.start(tiny_data, url)
    jobs.stop_when(process, lambda: f"4/{store.COMMITTED}" in objects(f"{url}/diffusion"), signal.SIGTERM)
    output = jobs.finish(process, status=143)
    assert "The same command goes on from" in output  # "there", or "here" when there was nothing to save
    assert 0 < load_latest(mirror(url) / "diffusion")["step"] <= 8

    assert f"Done: {url}/report.html" in jobs.finish(jobs.start(tiny_data, url))
    assert STORED | {"autoencoder/scale.json"} <= set(names(url))
    assert any(name.startswith("events.out") for name in names(url))
    assert_equal_to(url, one_device_run)
    assert f"All is done: {url}/report.html" in jobs.finish(jobs.start(tiny_data, url))

    for name, model in (("there", url), ("here", one_device_run)):
        arguments = ["sample", f"--model={model}", f"--out={tmp_path / name}", "--num=2", "--steps=2"]
        assert command_line.run(sample.main, arguments) == 0
    one, other = (jobs.samples(tmp_path / name)["images"] for name in ("there", "here"))
    np.testing.assert_array_equal(one, other)
    arguments = ["evaluate", f"--model={url}", f"--out={tmp_path / 'scores'}", "--num=8", "--steps=2"]
    assert command_line.run(evaluate.main, arguments) == 0
    assert (tmp_path / "scores" / "evaluation.json").exists()
    assert command_line.run(convert.main, ["convert", f"--model={url}", f"--to={tmp_path / 'diffusers'}"]) == 0
    assert (tmp_path / "diffusers" / "model_index.json").exists()


@pytest.mark.hosts
def test_kill_at_any_moment_and_go_on_on_another_machine(server, url, one_device_run, tiny_data, tmp_path, monkeypatch):
    """SIGKILL in the middle of a save of either stage; every process starts from an empty folder of temporary files."""

    def saving(stage):
        """An unfinished checkpoint, and a finished one before it."""

        def seen():
            parts = [name.split("/") for name in objects(f"{url}/{stage}")]
            begun = {step for step, *_ in parts if step.isdecimal()}
            finished = {step for step, *rest in parts if rest == [store.COMMITTED]}
            return bool(finished) and bool(begun - finished)

        return seen

    killed = 0
    for number, moment in enumerate((saving("autoencoder"), saving("diffusion"))):
        monkeypatch.setenv("TMPDIR", str(tmp_path / f"machine{number}"))
        (tmp_path / f"machine{number}").mkdir()
        process = jobs.start(tiny_data, url, "--config.checkpoint_every=1")
        jobs.stop_when(process, moment, signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed == 2
    made = max(store.checkpoint_steps(mirror(url) / "diffusion"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert "Done: " in jobs.finish(jobs.start(tiny_data, url, "--config.checkpoint_every=1"))
    assert 0 < made <= 8
    lines = read_metrics(mirror(url) / "metrics.jsonl")
    assert sum(line["stage"] == "start" for line in lines) == 3
    assert_equal_to(url, one_device_run, losses=False)


@pytest.mark.hosts
def test_two_hosts_with_sharded_state_have_no_common_disk(server, url, tiny_data, start_hosts):
    """FSDP over two hosts: each writes its shards to the store; one host alone goes on from them."""
    changes = (
        "--config.parallel.engine=fsdp",
        "--config.sampling.num=0",
        "--config.stages=('autoencoder','diffusion')",
    )
    jobs.finish_all(start_hosts(2, url, *changes))
    flat = load_latest(mirror(url) / "diffusion")
    assert flat["step"] == 8
    processes = {name.split("/")[3] for name in objects(url) if "/state/ocdbt.process_" in name}
    assert processes == {"ocdbt.process_0", "ocdbt.process_1"}
    more = (*changes, "--config.diffusion.steps=10")
    assert "Done: " in jobs.finish(jobs.start(tiny_data, url, *more))
    assert load_latest(mirror(url) / "diffusion")["step"] == 10
