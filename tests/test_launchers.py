"""The launchers of docs/launch: they parse, and train with flags and fields that exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from ldm_jax import command_line, train
from ldm_jax.config import rules

ROOT = Path(__file__).parents[1]
LAUNCHERS = sorted((ROOT / "docs" / "launch").iterdir())
SCRIPTS = [path for path in LAUNCHERS if path.suffix == ".sh"]


def container():
    """The job and the container of the JobSet."""
    jobset = yaml.safe_load((ROOT / "docs" / "launch" / "jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (found,) = job["template"]["spec"]["containers"]
    return jobset, job, found


def training_flags(path):
    """The arguments of ldm_jax.train in a launcher."""
    if path.suffix == ".yaml":
        _, _, found = container()
        words = [*found["command"], *found["args"]]
    else:
        text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
        (command,) = re.findall(r"-m ldm_jax\.train[^\n\"]*", text.replace("\\\n", " "))
        words = shlex.split(command)
    assert "ldm_jax.train" in words
    return words[words.index("ldm_jax.train") + 1 :]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_the_training_has_flags_and_fields_that_exist(path):
    values, flags = (
        train.define_flags(),
        [flag.replace("$(JOB_COMPLETION_INDEX)", "3") for flag in training_flags(path)],
    )
    command_line.parse(
        values, ["train", *(flag.replace("configs/", f"{ROOT}/configs/") for flag in flags)], config=True
    )
    rules.validate(values.config)
    assert values.distributed or (values.coordinator and 0 <= values.process_id < values.num_processes)
    assert values.workdir


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses(path):
    assert path.stat().st_mode & 0o100, "it must be executable"
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (143, True), (2, False), (1, False)])
def test_slurm_queues_the_job_again_when_it_was_stopped_and_saved(status, requeued, tmp_path):
    srun, scontrol = f'echo "$1" > {tmp_path}/options; exit {status}', f'echo "$*" > {tmp_path}/requeued'
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "32"}
    done = subprocess.run(["bash", str(ROOT / "docs" / "launch" / "slurm.sh")], env=environment)
    assert done.returncode == status
    assert (tmp_path / "options").read_text() == "--cpus-per-task=32\n"  # which srun does not take from sbatch
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 12\n"


def test_slurm_sends_sigterm_before_the_limit_to_one_process_a_node():
    options = re.findall(
        r"^#SBATCH --([\w-]+)=?(.*)$", (ROOT / "docs" / "launch" / "slurm.sh").read_text(), re.MULTILINE
    )
    options = dict(options)
    assert options["signal"] == "TERM@300" and options["ntasks-per-node"] == "1" and "requeue" in options


def test_the_jobset_starts_a_stopped_run_again():
    jobset, job, found = container()
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    codes, disruption = job["podFailurePolicy"]["rules"]
    assert codes == {
        "action": "FailJob",
        "onExitCodes": {"containerName": found["name"], "operator": "In", "values": [143]},
    }
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in found["args"])
    assert int(flags["num_processes"]) == job["completions"] == job["parallelism"]
    name, replicated = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]["name"]
    assert flags["coordinator"].split(":")[0] == f"{name}-{replicated}-0-0.{name}"


GCLOUD = """#!/bin/bash
echo "$*" >> {folder}/calls
case "$*" in
    *describe*) cat {folder}/state ;;
    *create*) echo READY > {folder}/state ;;
    *ldm_jax.train*)
        [ -e {folder}/preempted ] && exit 0
        touch {folder}/preempted
        echo {after} > {folder}/state
        exit {status} ;;
esac
"""


@pytest.mark.parametrize(
    ("after", "trained", "status", "created"),
    [("PREEMPTED", 1, 0, 2), ("PREEMPTED", 143, 0, 2), ("READY", 143, 0, 1), ("READY", 1, 1, 1), ("READY", 2, 1, 1)],
)
def test_a_preempted_tpu_slice_is_made_again(after, trained, status, created, tmp_path):
    """A training that was stopped and saved goes on; one that fails on a slice that is still there does not."""
    (tmp_path / "gcloud").write_text(GCLOUD.format(folder=tmp_path, after=after, status=trained))
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "state").touch()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SHARE": "10.0.0.2:/runs", "REPOSITORY": "somewhere"}
    script = ROOT / "docs" / "launch" / "tpu_vm.sh"
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert len(re.findall(" create ldm ", calls)) == created
    assert calls.count("--worker=all --command=cd ldm_jax") == 2 - status
