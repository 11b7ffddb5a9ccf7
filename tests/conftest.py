import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

from ldm_jax.runtime.xla import OBJECTS_PER_COLLECTION, fast_compile_flags

sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`, `import jobs`

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # workers and jobs share the cores, and its threads wait busily

# Most tests compile for longer than they compute.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast_compile_flags()}".strip()

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for the hub

import jax
import long

gc.set_threshold(OBJECTS_PER_COLLECTION)
jax.config.update("jax_num_cpu_devices", 4)  # of which a test uses one, unless it takes the fixture `four_devices`
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# No test fails for its time: on a busy machine an example takes ten times as long.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# One compilation cache for the whole session, its workers and the processes that tests start. JAX looks once, at its
# first compilation, whether there is one, so it is set before any test runs.
OWNER = "LDM_JAX_TESTS" not in os.environ
if OWNER:
    os.environ["LDM_JAX_TESTS"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ldm_jax_tests_")
jax.config.update("jax_compilation_cache_dir", str(Path(os.environ["XDG_CACHE_HOME"]) / "ldm_jax" / "xla"))


# A training step for four devices compiles for a third longer than for one, and runs for three times as long.
DEVICES = {name: getattr(jax, name) for name in ("devices", "local_devices", "local_device_count", "device_count")}
jax.devices = lambda *backend: DEVICES["devices"](*backend)[:1]
jax.local_devices = lambda *backend, **options: DEVICES["local_devices"](*backend, **options)[:1]
jax.local_device_count = jax.device_count = lambda *backend, **options: 1


@pytest.fixture
def four_devices(monkeypatch):
    """The test uses four devices: for what is compiled in the test itself, not in fixtures of a whole session."""
    for name, function in DEVICES.items():
        monkeypatch.setattr(jax, name, function)


def pytest_unconfigure():
    if OWNER:
        shutil.rmtree(os.environ["LDM_JAX_TESTS"], ignore_errors=True)


# What takes long, first, and so that no worker waits for a run folder that another one is making: the stages need none.
FIRST = ("test_bad_input", "test_stages", "test_resume", "test_parallel", "test_from_diffusers", "test_finetune",
         "test_from_run", "test_guidance_models", "test_job", "test_concat_inputs", "test_baselines", "test_speed",
         "test_docs", "test_diffusers_folder", "test_from_single_file", "test_classifier", "test_compilation",
         "test_solvers_analytic")  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Puts the files in an order in which the workers end at the same time; what needs `text_run` is slow."""
    for item in items:
        if long.is_long(item.path.name, item.name):
            item.add_marker(pytest.mark.long)
            if "parity" not in item.path.parts:
                item.add_marker(pytest.mark.slow)
        if "text_run" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


MOST_MAPPINGS = 15_000  # of memory: some 3 GB; each compiled program takes several, and a process may have 65,530


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Compiled programs are shared by the tests of a process until there are too many."""
    yield
    if Path("/proc/self/maps").exists() and len(Path("/proc/self/maps").read_bytes().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def start_hosts(tiny_data):
    """start_hosts(count, run, *changes): the processes of a small job on `count` hosts, ended with the test."""
    import jobs

    started = []

    def start(count, run, *changes, devices=1):
        processes = jobs.start_hosts(tiny_data, run, count, *changes, devices=devices)
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder with the data set "tiny", prepared."""
    import tiny

    folder = tmp_path_factory.mktemp("data")
    tiny.prepare(folder)
    return folder


def made_once(name, tmp_path_factory, make):
    """A run folder that the first test process to need it makes (`make(folder)` returns 0), and the others copy."""
    mine = tmp_path_factory.mktemp(name) / "run"
    shared = tmp_path_factory.getbasetemp().parent / f"{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}_{name}"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            assert make(mine) == 0
            shutil.copytree(mine, shared)
            return mine
    return shutil.copytree(shared, mine)


@pytest.fixture(scope="session")
def trained_run(tiny_data, tmp_path_factory):
    """The run folder of a whole small job, made in a test process. Read it, or copy it: it is shared."""
    import jobs

    return made_once("trained", tmp_path_factory, lambda workdir: jobs.train_here(tiny_data, workdir))


@pytest.fixture(scope="session")
def classifier_run(tiny_data, trained_run, tmp_path_factory):
    """The run folder of a classifier of the trained run's latents."""
    import jobs

    changes = (*jobs.CLASSIFIER, f"--config.autoencoder.checkpoint={trained_run}")
    return made_once("classifier", tmp_path_factory, lambda workdir: jobs.train_here(tiny_data, workdir, *changes))


@pytest.fixture(scope="session")
def text_run(tiny_data, tmp_path_factory):
    """The run folder of a job that is told of texts by a CLIP of its own."""
    import jobs

    return made_once("text", tmp_path_factory, lambda workdir: jobs.train_here(tiny_data, workdir, *jobs.TEXTS))


@pytest.fixture(scope="session")
def one_device_run(tiny_data, tmp_path_factory):
    """That of a small job in a process of its own, of one device: of four, a process rounds in another way."""
    import jobs

    def train_alone(workdir):
        return 0 if "Done: " in jobs.finish(jobs.start(tiny_data, workdir)) else 1

    return made_once("one_device", tmp_path_factory, train_alone)
