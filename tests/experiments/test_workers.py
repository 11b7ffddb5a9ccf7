"""experiments/workers.py: several processes that share the machine and the rows of an experiment."""

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

ROOT = Path(__file__).parents[2]


def program(folder, text):
    path = folder / "program.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(text))
    return path


def test_what_they_say_has_their_number(tmp_path, capfd):
    path = program(tmp_path, "print('here', *sys.argv[1:])\nprint()\n")
    workers.run([str(path), "--some"], 2)
    said = capfd.readouterr().out.splitlines()
    assert sorted(said) == ["", "", "1| here --some", "2| here --some"]
    workers.run([str(path)], 1)
    assert capfd.readouterr().out == "here\n\n"


def test_each_has_its_share(tmp_path):
    path = program(
        tmp_path,
        """
        import json, os, pathlib
        from experiments import workers
        own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        told = {"cores": own, "number": workers.number(), "memory": os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]}
        pathlib.Path(sys.argv[1], f"{os.getpid()}.json").write_text(json.dumps(told))
        """,
    )
    out = tmp_path / "out"
    out.mkdir()
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    workers.run([str(path), str(out)], 2)
    told = [json.loads(file.read_text()) for file in out.iterdir()]
    assert [one["number"] for one in told] == [2, 2] and workers.number() == 1
    assert {one["memory"] for one in told} == {"0.45"}
    if len(before) > 1:
        first, second = (set(one["cores"]) for one in told)
        assert first | second == before and not first & second
        assert os.sched_getaffinity(0) == before


def test_one_that_fails_is_told(tmp_path, capfd):
    path = program(tmp_path, "print('what went wrong')\nsys.exit(1)\n")
    with pytest.raises(RunError, match="2 of 2 processes failed; what went wrong is above"):
        workers.run([str(path)], 2)
    assert "1| what went wrong" in capfd.readouterr().out
    for known in (workers.INTERRUPTED, workers.REFUSED):  # of these the process itself has told
        with pytest.raises(SystemExit) as ended:
            workers.run([str(program(tmp_path, f"sys.exit({known})"))], 2)
        assert ended.value.code == known


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_who_stops_one_stops_all(tmp_path, asked):
    path = program(
        tmp_path,
        """
        import os, pathlib, signal, time
        from experiments import workers

        def stop(*_):
            pathlib.Path(sys.argv[1], f"saved_{os.getpid()}").touch()
            sys.exit(workers.INTERRUPTED)

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
    process.send_signal(asked)
    assert process.wait(timeout=30) == workers.INTERRUPTED
    assert len(list(tmp_path.glob("saved_*"))) == 2


def test_they_share_the_rows(tmp_path):
    """Two processes measure each row once, and the rows are kept in the order of the plan."""
    path = program(
        tmp_path,
        """
        import os, pathlib, time
        from experiments import frame

        folder = pathlib.Path(sys.argv[1])

        def measure(lab, arm, seed):
            (folder / f"{arm}_{os.getpid()}").touch()
            while len(list(folder.glob("?_*"))) < 2:  # until the other process measures too
                time.sleep(0.05)
            time.sleep(0.1)
            return {"by": os.getpid()}

        plan = [(arm, 0) for arm in "abcdef"]
        some = frame.Experiment(folder, "?", lambda budget: plan, measure, str, str, print)
        frame.measure_all(some, frame.Lab("cpu", "data", folder / "runs"), folder / "results.json")
        """,
    )
    workers.run([str(path), str(tmp_path)], 2)
    rows = json.loads((tmp_path / "results.json").read_text())["cpu"]
    assert [row["arm"] for row in rows.values()] == list("abcdef")
    assert len(list(tmp_path.glob("?_*"))) == 6
    assert {row["workers"] for row in rows.values()} == {2}
    assert len({row["by"] for row in rows.values()}) == 2
