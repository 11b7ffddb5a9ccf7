"""Classes of samples by name or number: case, Unicode normalization, commas, names that are numbers."""

import unicodedata

import numpy as np
import pytest

from ldm_jax import command_line, sample
from ldm_jax.errors import InputError
from ldm_jax.sampling.from_arguments import label_indices

NFD = unicodedata.normalize("NFD", "café")
NAMES = ("Cat", "cat", NFD, "cats, small", "猫", "t-shirt top", "Straße")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["cat"], [1]),
        (["Cat"], [0]),
        (["café"], [2]),
        ([NFD], [2]),
        (["CAFÉ"], [2]),
        (["猫", "T-Shirt top", "STRASSE"], [4, 5, 6]),
        (["cats", "small"], [3]),  # of --label="cats, small"
        (["cats, small"], [3]),
        (["cat", "Cats", "Small", "3", "Cat"], [1, 3, 3, 0]),
        ([" cat "], [1]),
        ([6, 0], [6, 0]),
        (["6"], [6]),
        (["٣"], [3]),
        (None, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_names_and_numbers(labels, expected):
    assert label_indices("--label", labels, NAMES) == expected


def test_a_name_comes_before_a_number():
    names = ("1", "10", "2")
    assert label_indices("--label", ["1", "2", "10", "0"], names) == [0, 2, 1, 0]
    assert label_indices("labels", [1, 2, 0], names) == [1, 2, 0]  # of Python: indices
    assert label_indices("labels", np.array([1, 2, 0]), names) == [1, 2, 0]


def test_a_name_with_a_comma_comes_before_its_parts():
    names = ("cats", "small", "cats, small")
    assert label_indices("--label", ["cats", "small"], names) == [2]
    assert label_indices("--label", ["small", "cats"], names) == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["CAT"], "--label=CAT is the name of several classes; choose by the exact name or number: 0 Cat, 1 cat"),
        (["7"], "--label=7 is no class"),
        ([7], "--label=7 is no class"),
        ([-1], "--label=-1 is no class"),
        (["-1"], "--label=-1 is no class"),
        (["²"], "--label=² is no class"),
        (["cats"], "--label=cats is no class"),
        (["cat", "tiny"], "--label=tiny is no class; the model has 0 Cat, 1 cat"),
        ([], "--label= is no class"),
    ],
)
def test_refused(labels, message):
    with pytest.raises(InputError) as error:
        label_indices("--label", labels, NAMES)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("flag", ["--label=cats, small", '--label="cats, small"', "--label=cats,small"])
def test_the_flag_of_a_name_with_a_comma(flag):
    values = sample.define_flags()
    command_line.parse(values, ["sample", flag])
    assert label_indices("--label", values.label, NAMES) == [3]


def test_equal_names_are_chosen_by_number():
    with pytest.raises(InputError, match="several classes; choose by the exact name or number: 0 crane, 2 crane"):
        label_indices("--label", ["crane"], ("crane", "heron", "crane"))
    assert label_indices("--label", ["2"], ("crane", "heron", "crane")) == [2]
    with pytest.raises(InputError, match="--label=a,b: the model has no classes"):
        label_indices("--label", ["a", "b"], ())
