import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`

jax.config.update("jax_num_cpu_devices", 4)  # so that every test is a test of data parallelism too


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder with the data set "tiny", prepared."""
    import tiny

    folder = tmp_path_factory.mktemp("data")
    tiny.prepare(folder)
    return folder
