"""experiments/gpu/pack.sh with a Python that downloads nothing: its parts are the wheels and the data set."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "gpu" / "pack.sh"
# Of the packages that it names, one has a wheel in the index and the other is built.
PYTHON = """#!/bin/bash
[[ $1 == - ]] && { cat >/dev/null; echo one==1; echo two==2; exit; }
for last; do :; done
while [[ $# -gt 0 ]]; do
    case $1 in download | wheel) how=$1 ;; -d | -w) folder=$2 ;; esac
    shift
done
[[ $how == download && $last == two==2 ]] && exit 1
echo "$how" > "$folder/${last%%=*}-none-any.whl"
"""


@pytest.fixture
def repository(tmp_path):
    """A folder with the script, a prepared data set and `.venv-parity`."""
    (tmp_path / "experiments" / "gpu").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "experiments" / "gpu")
    (tmp_path / "data" / "fashion_mnist").mkdir(parents=True)
    (tmp_path / "data" / "fashion_mnist" / "images").write_bytes(bytes(45_000_000))
    python = tmp_path / ".venv-parity" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "have.txt").write_text("jax==0.11.2\n")
    return tmp_path


def pack(repository, *arguments):
    command = ["bash", repository / "experiments" / "gpu" / "pack.sh", *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True)


def test_the_parts_are_a_tar_file_of_wheels_and_data(repository):
    assert pack(repository, "have.txt").returncode == 0
    parts = sorted((repository / "gpu_pack").glob("part_*"))
    assert [part.stat().st_size for part in parts[:-1]] == [40 * 2**20] and len(parts) == 2
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    wheels = {
        f"gpu_pack/wheels/{name}-none-any.whl": how for name, how in (("one", b"download\n"), ("two", b"wheel\n"))
    }
    assert files == wheels | {"data/fashion_mnist/images": bytes(45_000_000)}


def test_what_it_needs_is_said(repository):
    assert "experiments/gpu/pack.sh HAVE" in pack(repository).stderr
    (repository / "there").mkdir()
    failed = pack(repository, "have.txt", "there")
    assert (failed.returncode, failed.stderr) == (2, "pack.sh: there exists; choose a new folder\n")
    shutil.rmtree(repository / ".venv-parity")
    failed = pack(repository, "have.txt")
    assert failed.returncode == 2 and "`make test parity` makes both" in failed.stderr
