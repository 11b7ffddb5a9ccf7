"""The campaign of kills: its rows, its comparison with the job without a kill, its table; no job is started."""

import json
import signal
import sys

import numpy as np
import pytest

from experiments.kills import run as kills


@pytest.mark.parametrize(
    ("position", "phase"),
    [
        (("start", 0), "before the first step"),
        (("autoencoder", 1), "autoencoder"),
        (("autoencoder", kills.STEPS), "after the autoencoder"),
        (("diffusion", kills.STEPS - 1), "diffusion"),
        (("diffusion", kills.STEPS), "samples and scores"),
    ],
)
def test_the_phase_of_a_position(position, phase):
    assert kills.phase(*position) == phase


def write_lines(workdir, *lines):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0} | line) + "\n" for line in lines))


def test_steps_lost_are_those_since_the_last_complete_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "job"
    write_lines(folder, {"stage": "start", "step": 0}, {"stage": "diffusion", "step": 33, "loss": 1.0})
    (folder / "diffusion" / "20").mkdir(parents=True)
    (folder / "diffusion" / "30.orbax-checkpoint-tmp").mkdir()
    monkeypatch.setattr(kills, "run_job", lambda *args, **options: (137, True))
    row = kills.kill_once(folder, 0, 10.0, "data")
    assert (row["stage"], row["step"], row["lost"], row["status"]) == ("diffusion", 33, 13, 137)
    assert 0 <= row["after"] <= 10 and row == kills.kill_once(folder, 0, 10.0, "data")  # by the number alone


def test_a_job_that_fails_by_itself_stops_the_campaign(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "run_job", lambda *args, **options: (1, False))
    with pytest.raises(SystemExit, match="ended with status 1"):
        kills.kill_once(tmp_path / "job", 0, 10.0, "data")
    for sent in (False, True):  # a signal in the last moment
        monkeypatch.setattr(kills, "run_job", lambda *args, sent=sent, **options: (0, sent))
        assert kills.kill_once(tmp_path / "job", 0, 10.0, "data") is None


@pytest.mark.parametrize(("program", "after", "expected"), [
    ("pass", np.inf, (0, False)),
    ("raise SystemExit(3)", np.inf, (3, False)),
    ("import time; time.sleep(60)", 0.5, (137, True)),
])  # fmt: skip
def test_the_status_of_a_job_is_that_of_a_shell(tmp_path, monkeypatch, program, after, expected):
    monkeypatch.setattr(kills, "command", lambda workdir, data_dir: [sys.executable, "-c", program])
    assert kills.run_job(tmp_path / "job", "data", after=after, by=signal.SIGKILL) == expected


@pytest.mark.parametrize("changed", ["", "weights", "loss", "samples"])
def test_a_difference_in_one_bit_is_found(tmp_path, monkeypatch, changed):
    stored = {}
    for name in ("one", "other"):
        other = changed if name == "other" else ""
        folder = tmp_path / name
        loss = 1.0 + (2e-16 * 2 if other == "loss" else 0)
        write_lines(
            folder, {"stage": "diffusion", "step": 1, "loss": loss, "time": len(name)}, {"stage": "start", "step": 0}
        )
        np.savez(folder / "samples.npz", images=np.full(3, 7 + (other == "samples"), np.uint8))
        weights = np.ones(3, np.float32)
        stored[folder / "autoencoder"] = {"params/a": np.nextafter(weights, 2) if other == "weights" else weights}
        stored[folder / "diffusion"] = {"params/b": weights}
    monkeypatch.setattr(kills, "load_latest", stored.get)
    found = kills.differences(tmp_path / "one", tmp_path / "other")
    expected = {"": [], "weights": ["autoencoder/params/a"], "loss": ["metrics/diffusion/1/1"]}
    assert found == expected.get(changed, ["samples/images"])


def test_the_campaign_adds_to_its_results(tmp_path, monkeypatch, capsys):
    ends = iter([(0, False)] * 2 + [(137, True), (143, True), (0, False), (137, True)])

    def run_job(workdir, data_dir, **options):
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "report.html").touch()
        return next(ends)

    monkeypatch.setattr(kills, "run_job", run_job)
    monkeypatch.setattr(kills, "differences", lambda *folders: [])
    out = tmp_path / "results.json"
    for count in ("2", "1"):
        monkeypatch.setattr(
            sys, "argv", ["run.py", f"--kills={count}", f"--folder={tmp_path / 'runs'}", f"--out={out}"]
        )
        kills.main()
    results = json.loads(out.read_text())
    assert [row["job"] for row in results["kills"]] == [0, 0, 1] and results["starts"] == 4
    assert results["jobs"] == [{"job": 0, "differences": []}]
    assert "3 kills in 1 finished jobs, of which 1 are bit for bit" in capsys.readouterr().out


def test_the_table():
    row = {"job": 0, "phase": "diffusion", "lost": 3, "status": 143, "signal": "SIGTERM"}
    rows = [row, row | {"lost": 5, "status": 1}, row | {"signal": "SIGKILL", "status": 137}]
    text = kills.table({"kills": rows, "jobs": [{"job": 0, "differences": ["a"]}]})
    assert "3 kills in 1 finished jobs, of which 0 are" in text
    assert "| SIGTERM | diffusion | 2 | 1 of 2 | 5 |" in text and "| SIGKILL | diffusion | 1 | 1 of 1 | 3 |" in text
