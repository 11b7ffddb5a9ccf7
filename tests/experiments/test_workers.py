"""experiments/workers.py: worker processes share the cores and the rows of an experiment."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from experiments import workers
from ldm_jax.errors import RunError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def program(folder, text):
    path = folder / "program.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(text))
    return path


def test_output_has_the_worker_number(tmp_path, capfd):
    path = program(tmp_path, "print('here', *sys.argv[1:])\nprint()\n")
    workers.run([str(path), "--some"], 2)
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["", "", "1| here --some", "2| here --some"]
    workers.run([str(path)], 1)
    assert capfd.readouterr().out == "here\n\n"


def test_each_worker_has_its_share_of_cores_and_memory(tmp_path):
    path = program(
        tmp_path,
        """
        import json, os, pathlib
        from experiments import workers
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        memory = os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]
        share = {"cores": cores, "workers": workers.num_workers(), "memory": memory}
        pathlib.Path(sys.argv[1], f"{os.getpid()}.json").write_text(json.dumps(share))
        """,
    )
    out = tmp_path / "out"
    out.mkdir()
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    workers.run([str(path), str(out)], 2)
    shares = [json.loads(file.read_text()) for file in out.iterdir()]
    assert [share["workers"] for share in shares] == [2, 2] and workers.num_workers() == 1
    assert {share["memory"] for share in shares} == {"0.45"}
    if len(before) > 1:
        first, second = (set(share["cores"]) for share in shares)
        assert first | second == before and not first & second
        assert os.sched_getaffinity(0) == before


def test_a_failed_worker_raises(tmp_path, capfd):
    path = program(tmp_path, "print('the cause')\nsys.exit(1)\n")
    with pytest.raises(RunError, match="2 of 2 processes failed; their output is above"):
        workers.run([str(path)], 2)
    assert "1| the cause" in capfd.readouterr().out
    for status in (*workers.INTERRUPTED, workers.REFUSED):  # the worker itself has printed an error
        with pytest.raises(SystemExit) as exit_info:
            workers.run([str(program(tmp_path, f"sys.exit({status})"))], 2)
        assert exit_info.value.code == status


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_forwarded(tmp_path, signal_number):
    path = program(
        tmp_path,
        """
        import os, pathlib, signal, time
        from experiments import workers

        def stop(number, _):
            pathlib.Path(sys.argv[1], f"saved_{os.getpid()}").touch()
            sys.exit(128 + number)

        if sys.argv[2:]:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            pathlib.Path(sys.argv[1], f"begun_{os.getpid()}").touch()
            time.sleep(60)
        workers.run([*sys.argv, "--only"], 2)
        """,
    )
    process = subprocess.Popen([sys.executable, str(path), str(tmp_path)])
    while len(list(tmp_path.glob("begun_*"))) < 2:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal_number)
    assert process.wait(timeout=30) == 128 + signal_number
    assert len(list(tmp_path.glob("saved_*"))) == 2


def test_workers_share_the_rows(tmp_path):
    """Two workers measure each row once, and the rows are stored in the order of the plan."""
    path = program(
        tmp_path,
        """
        import os, pathlib, time
        from experiments import runner

        folder = pathlib.Path(sys.argv[1])

        def measure(workspace, arm, seed):
            (folder / f"{arm}_{os.getpid()}").touch()
            while len(list(folder.glob("?_*"))) < 2:  # until the other worker measures too
                time.sleep(0.05)
            time.sleep(0.1)
            return {"by": os.getpid()}

        plan = [(arm, 0) for arm in "abcdef"]
        experiment = runner.Experiment(folder, "?", lambda budget: plan, measure, str, str, print)
        runner.measure_all(experiment, runner.Workspace("minutes", "data", folder / "runs"), folder / "results.json")
        """,
    )
    workers.run([str(path), str(tmp_path)], 2)
    rows = json.loads((tmp_path / "results.json").read_text())["minutes"]
    assert [row["arm"] for row in rows.values()] == list("abcdef")
    assert len(list(tmp_path.glob("?_*"))) == 6
    assert {row["workers"] for row in rows.values()} == {2}
    assert len({row["by"] for row in rows.values()}) == 2
