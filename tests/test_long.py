"""The list of tests that continuous integration leaves out names tests that are there."""

import re
import subprocess
import sys
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

import long
import pytest

TESTS = Path(__file__).parent


def stale(patterns, tests):
    return [pattern for pattern in patterns if not any(fnmatchcase(test, pattern) for test in tests)]


def collected(folder):
    """FILE::TEST of all tests that pytest collects in a folder, with their parameters."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-m", "", folder]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ids = [line.split("::", 1) for line in done.stdout.splitlines() if "::" in line]
    return [f"{Path(file).name}::{test}" for file, test in ids]


def test_each_pattern_is_of_a_test():
    assert stale(long.PATTERNS, collected("tests")) == []


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not find_spec("diffusers"), reason="the tests of parity need diffusers")
def test_each_pattern_of_parity_is_of_a_test():
    assert stale(long.PARITY, collected("tests/parity")) == []


@pytest.mark.parametrize("pattern", long.PARITY)
def test_a_pattern_of_parity_is_of_a_function(pattern):
    """Where the tests of parity are not collected, their functions at least are there."""
    file, test = pattern.split("::")
    functions = re.findall(r"^def (test_\w+)", (TESTS / "parity" / file).read_text(), re.MULTILINE)
    assert any(fnmatchcase(name, test.split("[[]")[0]) for name in functions)


def test_a_stale_parameter_or_function_is_found():
    tests = ["test_a.py::test_one[x-1]", "test_b.py::test_two"]
    assert stale(["test_a.py::test_one[[]x-*", "test_b.py::*"], tests) == []
    for pattern in ("test_a.py::test_one[[]y-*", "test_a.py::test_two", "test_a.py::test_one", "test_c.py::*"):
        assert stale([pattern], tests) == [pattern]


def test_patterns_are_of_parameters():
    assert long.is_long("test_text_run.py", "test_diffusers_samples_the_same[euler]")
    assert not long.is_long("test_text_run.py", "test_diffusers_samples_the_same[unipc]")
    assert not long.is_long("test_other.py", "test_diffusers_samples_the_same[euler]")
