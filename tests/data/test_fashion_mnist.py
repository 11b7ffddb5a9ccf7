import functools
import gzip
import hashlib
import json
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from ldm_jax.data import fashion_mnist, prepare
from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.idx import parse_idx
from ldm_jax.errors import InputError, RunError


@pytest.fixture
def no_debian_package(monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", "usr/share/no-such-folder")


def test_prepared_set_is_the_files_in_their_order(fake_files, tmp_path):
    folder = fashion_mnist.prepare(tmp_path / "data", fake_files)
    assert folder == tmp_path / "data" / "fashion_mnist" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    for split, prefix in (("train", "train"), ("test", "t10k")):
        dataset = load_dataset("fashion_mnist", split, data_dir=tmp_path / "data")
        for key, kind, axes in (("x", "images-idx3", 3), ("label", "labels-idx1", 1)):
            path = fake_files / f"{prefix}-{kind}-ubyte.gz"
            expected = parse_idx(gzip.decompress(path.read_bytes()), axes=axes, where=path)
            np.testing.assert_array_equal(np.squeeze(dataset.arrays[key]), expected)
        assert dataset.shape == ({"train": 20, "test": 10}[split], 28, 28, 1)
        assert dataset.class_names[1::8] == ("Trouser", "Ankle boot")


def test_second_call_does_nothing(fake_files, tmp_path):
    folder = fashion_mnist.prepare(tmp_path / "data", fake_files)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    shutil.rmtree(fake_files)
    assert fashion_mnist.prepare(tmp_path / "data", fake_files) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_nothing_is_printed(fake_files, tmp_path, capfd):
    fashion_mnist.prepare(tmp_path / "data", fake_files)
    assert capfd.readouterr() == ("", "")


def test_debian_package_unpacked_below_the_data_folder(fake_files, tmp_path):
    shutil.move(fake_files, tmp_path / "data" / fashion_mnist.DEBIAN_FOLDER)
    assert load_dataset("fashion_mnist", "test", data_dir=tmp_path / "data").shape == (10, 28, 28, 1)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def site(fake_files, monkeypatch):
    """The four files served on this machine in place of the real ones; gives their folder."""
    handler = functools.partial(Quiet, directory=str(fake_files))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(fashion_mnist, "HOME", f"http://127.0.0.1:{server.server_port}")
        digests = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in fake_files.iterdir()}
        monkeypatch.setattr(fashion_mnist, "MD5", digests)
        monkeypatch.setattr(fashion_mnist, "ATTEMPTS", 1)
        yield fake_files
        server.shutdown()


def test_download_when_they_are_nowhere(site, tmp_path, no_debian_package):
    fashion_mnist.prepare(tmp_path / "data")
    assert {path.name for path in (tmp_path / "data/downloads/fashion_mnist").iterdir()} == set(fashion_mnist.SHA256)


def test_incomplete_folder_is_passed_over(site, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", "usr/share/half")
    half = tmp_path / "data/usr/share/half"
    half.mkdir(parents=True)
    shutil.copy(site / "t10k-labels-idx1-ubyte.gz", half)
    assert fashion_mnist.find_files(tmp_path / "data", None) == tmp_path / "data/downloads/fashion_mnist"


def test_a_download_of_another_file_is_refused(site, tmp_path):
    """And the next one begins where it ended."""
    path = site / "t10k-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content + b"?")
    with pytest.raises(InputError, match=r"cannot download http://127.*labels-idx1-ubyte.gz: MD5 hash of") as error:
        fashion_mnist.download(tmp_path / "new")
    assert "\n" not in str(error.value)
    done = {each.name for each in (tmp_path / "new").iterdir()}
    assert done <= fashion_mnist.MD5.keys() - {path.name}
    path.write_bytes(content)
    for name in done:
        (site / name).unlink()
    fashion_mnist.download(tmp_path / "new")
    assert {each.name for each in (tmp_path / "new").iterdir()} == set(fashion_mnist.MD5)


def test_nowhere_and_no_network(tmp_path, monkeypatch, no_debian_package):
    monkeypatch.setattr(fashion_mnist, "HOME", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(InputError, match=r"cannot download http://127.0.0.1:9/.*refused") as error:
        fashion_mnist.prepare(tmp_path / "data")
    message = str(error.value)
    assert "\n" not in message
    assert "are not in" in message and "/usr/share/no-such-folder" in message  # what, where
    assert "dataset-fashion-mnist" in message and "downloads/fashion_mnist" in message  # what to do


def test_missing_files_in_a_given_folder(fake_files, tmp_path):
    (fake_files / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"not all there: train-images-idx3-ubyte.gz missing"):
        fashion_mnist.prepare(tmp_path / "data", fake_files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "not Fashion-MNIST's file: sha256 of the content"),
        (lambda content: content[:-1], "requires 7856"),
    ],
)
def test_foreign_or_damaged_file(fake_files, tmp_path, change, message):
    path = fake_files / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    with pytest.raises(InputError, match=message) as error:
        fashion_mnist.prepare(tmp_path / "data", fake_files)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "data" / "fashion_mnist").glob("*1.0.0"))  # nor any incomplete.*_1.0.0


def test_killed_half_way_is_done_again(fake_files, tmp_path):
    left = tmp_path / "data/fashion_mnist/incomplete.ABCDEF_1.0.0"
    left.mkdir(parents=True)
    (left / "fashion_mnist-train.array_record-00000-of-00001").write_bytes(b"half")
    fashion_mnist.prepare(tmp_path / "data", fake_files)
    assert not left.exists()
    assert len(load_dataset("fashion_mnist", "train", data_dir=tmp_path / "data")) == 20


def test_failure_while_writing_leaves_nothing(fake_files, tmp_path, monkeypatch):
    def full(images, labels):
        yield 0, {"image": images[0], "label": 0}
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fashion_mnist, "_examples", full)
        with pytest.raises(RunError, match=r"cannot prepare fashion_mnist in .*No space left") as error:
            fashion_mnist.prepare(tmp_path / "data", fake_files)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "data" / "fashion_mnist").glob("*1.0.0"))
    fashion_mnist.prepare(tmp_path / "data", fake_files)


def test_data_folder_that_cannot_be_written(fake_files, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(RunError, match=r"cannot write to .*data/fashion_mnist"):
        fashion_mnist.prepare(tmp_path / "data", fake_files)


def test_one_process_at_a_time(tmp_path):
    import threading

    entered, order = threading.Event(), []

    def second():
        entered.wait()
        with prepare.one_at_a_time(tmp_path / "set"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with prepare.one_at_a_time(tmp_path / "set"):
        entered.set()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
