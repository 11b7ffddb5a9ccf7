"""Sharded ArrayRecord files: their index, whole and damaged shards, a full disk."""

import json
import resource

import damage
import numpy as np
import pytest

from ldm_jax.data.feeds import HostFeed, in_order, read_in_order
from ldm_jax.data.shards import INDEX, Shards, write_index
from ldm_jax.errors import InputError, RunError

NUM, PER_SHARD = 41, 16
FEATURES = {"moments": ("<f4", (1, 64, 64, 4)), "label": ("<i4", ())}  # larger than a file's smallest size, 64 KB


class Random:
    """Examples of FEATURES, as a data set."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.moments = rng.normal(size=(NUM, 1, 64, 64, 4)).astype(np.float32)

    def __len__(self):
        return NUM

    def __getitem__(self, indices):
        return {"moments": self.moments[indices], "label": np.asarray(indices, np.int32)}


@pytest.fixture(scope="module")
def source():
    return Random()


@pytest.fixture
def shards(source, tmp_path):
    write_index(tmp_path / "set", "abc", NUM, PER_SHARD, FEATURES)
    shards = Shards(tmp_path / "set")
    for number, rows in enumerate(shards.rows):
        assert not shards.is_complete(number)
        shards.write(number, read_in_order(source, 8, rows))
    return shards


def test_the_index(shards, tmp_path):
    index = json.loads((tmp_path / "set" / INDEX).read_text())
    assert (index["content_hash"], index["num_examples"], index["examples_per_shard"]) == ("abc", NUM, PER_SHARD)
    assert shards.rows == [range(0, 16), range(16, 32), range(32, 41)]
    names = ["00000-of-00003.array_record", "00001-of-00003.array_record", "00002-of-00003.array_record"]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [*names, INDEX]
    assert all(shards.is_complete(number) for number in range(3))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"num_examples": 3}', b"\xff"])
def test_a_damaged_index_is_one_line(content, shards, tmp_path):
    (tmp_path / "set" / INDEX).write_bytes(content)
    with pytest.raises(InputError, match=r"index.json is damaged"):
        Shards(tmp_path / "set")


def test_the_same_batches_as_from_memory(source, shards):
    """Of the same dtypes, at any step, on each of two hosts."""
    for host in range(2):
        feeds = [HostFeed(each, 8, 3, host, 2) for each in (source, shards)]
        for step in (0, 1, 2, 40, 7):  # the last two are not the next steps
            memory, disk = (feed(step) for feed in feeds)
            assert memory.keys() == disk.keys()
            for name in memory:
                assert memory[name].dtype == disk[name].dtype
                np.testing.assert_array_equal(memory[name], disk[name])


def test_read_in_order_is_a_part_of_in_order(source):
    whole = list(in_order(source, 8))
    parts = [batch for rows in (range(0, 16), range(16, 41)) for batch in read_in_order(source, 8, rows)]
    assert len(whole) == len(parts) == 6 and whole[-1]["valid"].sum() == 1
    for one, other in zip(whole, parts):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("batch_size", [1, 7, 16, 41, 100])
def test_a_shard_has_its_own_rows_at_any_batch_size(batch_size, source, shards):
    """One of another size than that which the index was written with."""
    for number in (0, 2):
        shards.write(number, read_in_order(source, batch_size, shards.rows[number]))
        assert shards.is_complete(number)
    for name, values in Shards(shards.paths[0].parent)[range(NUM)].items():
        np.testing.assert_array_equal(values, source[range(NUM)][name])


def missing(path):
    path.unlink()


def nothing(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [damage.cut, missing, nothing])
def test_a_shard_that_is_not_whole_is_written_anew(harm, source, shards, capsys):
    before = shards.paths[1].read_bytes()
    harm(shards.paths[1])
    assert [shards.is_complete(number) for number in range(3)] == [True, False, True]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (harm is not missing) and all(str(shards.paths[1]) in line for line in lines)
    shards.write(1, read_in_order(source, 8, shards.rows[1]))
    assert shards.is_complete(1) and shards.paths[1].read_bytes() == before


def test_a_shard_of_another_number_is_not_complete(shards, capsys):
    shards.paths[0].write_bytes(shards.paths[2].read_bytes())
    assert not shards.is_complete(0)
    assert "is damaged (it has 9 of 16 examples)" in capsys.readouterr().out


def test_a_damaged_record_is_one_line_with_its_file(source, shards):
    """Also out of Grain's threads; all other records are read."""
    damage.flip_a_bit(shards.paths[1])
    feed, errors = HostFeed(shards, 1, 0), []
    for step in range(NUM):
        try:
            feed(step)
        except RunError as error:
            errors.append(str(error))
    assert len(errors) == 1 and "\n" not in errors[0]
    assert errors[0].startswith(f"{shards.paths[1]} is damaged (") and "delete this file" in errors[0]


def test_a_full_disk_is_one_line_and_leaves_no_file(source, shards):
    """By a limit of the size of files."""
    before = shards.paths[2].read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(RunError, match=rf"^cannot write {shards.paths[2]}: .*File too large"):
            shards.write(2, read_in_order(source, 8, shards.rows[2]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert shards.paths[2].read_bytes() == before and len(list(shards.paths[2].parent.iterdir())) == 4


def test_the_file_of_a_killed_process_is_removed(source, shards):
    leftover = shards.paths[0].with_name(f".{shards.paths[0].name}.abcd.array_record")
    leftover.write_bytes(b"a part")
    shards.write(0, read_in_order(source, 8, shards.rows[0]))
    assert not leftover.exists() and len(list(leftover.parent.iterdir())) == 4
