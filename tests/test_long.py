"""The list of tests that continuous integration leaves out names tests that are there."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import long
import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("pattern", long.PATTERNS)
def test_a_pattern_is_of_tests(pattern):
    file, test = pattern.split("::")
    source = "".join(path.read_text() for path in TESTS.rglob(file))
    function = test.split("[[]")[0]
    assert any(fnmatchcase(name, function) for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE))


def test_patterns_are_of_parameters():
    assert long.is_long("test_text_run.py", "test_diffusers_samples_the_same[euler]")
    assert not long.is_long("test_text_run.py", "test_diffusers_samples_the_same[unipc]")
    assert not long.is_long("test_other.py", "test_diffusers_samples_the_same[euler]")
