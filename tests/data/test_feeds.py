import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.data.feeds import BucketFeed, DeviceFeed, HostFeed, Order, epoch_order, examples_at, in_order
from ldm_jax.errors import InputError

seeds = st.integers(0, 2**64 - 1)
sizes = st.integers(1, 40)


class Squares:
    """Example k is k * k."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, indices):
        indices = np.asarray(indices, np.int64)
        assert ((indices >= 0) & (indices < self.n)).all()
        return {"x": indices**2, "label": indices.astype(np.int32)}


def test_order_is_pinned():
    # Sorting Philox's first numbers under key (seed 1, epoch 2). If this changes, runs cannot be resumed.
    np.testing.assert_array_equal(epoch_order(8, 1, 2), [4, 2, 0, 6, 1, 5, 7, 3])


@given(sizes, seeds, st.integers(0, 1000))
def test_each_epoch_is_a_permutation(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_seed_and_epoch_change_the_order():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed, epoch in itertools.product(range(3), range(3))}
    assert len(orders) == 9


def test_shuffle_is_uniform():
    # 6,000 orders of 3 things: each of the 6 comes 1000 times, give or take sqrt(833) = 29
    orders = [tuple(epoch_order(3, 0, epoch)) for epoch in range(6000)]
    counts = [orders.count(order) for order in itertools.permutations(range(3))]
    assert sum(counts) == 6000 and max(abs(count - 1000) for count in counts) < 130


def test_positions_run_on_over_the_epochs():
    expected = np.concatenate([epoch_order(5, 7, epoch) for epoch in range(3)])
    np.testing.assert_array_equal(examples_at(np.arange(15), 5, 7), expected)
    np.testing.assert_array_equal(examples_at(np.array([[14], [2]]), 5, 7), expected[[[14], [2]]])


@given(sizes, st.integers(1, 12), seeds, st.integers(0, 60))
def test_any_step_is_what_running_from_zero_gives(n, batch_size, seed, step):
    from_zero = np.concatenate([epoch_order(n, seed, epoch) for epoch in range((step + 1) * batch_size // n + 1)])
    expected = from_zero[step * batch_size : (step + 1) * batch_size]
    np.testing.assert_array_equal(Order(n, batch_size, seed)(step), expected)


@given(sizes, seeds, st.integers(0, 30), st.sampled_from([1, 2, 4]))
def test_processes_share_one_batch(n, seed, step, processes):
    whole = Order(n, 8, seed)
    parts = [Order(n, 8, seed, p, processes) for p in range(processes)]
    np.testing.assert_array_equal(np.concatenate([part(step) for part in parts]), whole(step))
    np.testing.assert_array_equal(np.concatenate([part.id for part in parts]), np.arange(8))


GROUPS = np.array([7, 3, 7, 7, 5, 3])  # 3: examples 1 and 5; 5: example 4; 7: examples 0, 2 and 3


def test_each_kind_has_one_turn_in_an_epoch():
    # Six epochs of three turns: kind 3 shows each of its two examples three times, 7 each of its three twice.
    order = Order(6, 3, 11, groups=GROUPS)
    epochs = [order(step) for step in range(6)]
    assert all(sorted(GROUPS[epoch]) == [3, 5, 7] and epoch.dtype == np.int32 for epoch in epochs)
    assert np.bincount(np.concatenate(epochs)).tolist() == [2, 3, 2, 2, 6, 3]
    by_kind = np.array([sorted(epoch, key=lambda example: GROUPS[example]) for epoch in epochs]).T
    assert by_kind.tolist() == [
        [1, 5, 1, 5, 1, 5],
        [4] * 6,
        [3, 0, 2, 3, 0, 2],
    ]  # in turn, from their groups' numbers on
    np.testing.assert_array_equal(GROUPS[epochs], np.array([3, 5, 7])[[epoch_order(3, 11, e) for e in range(6)]])


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), seeds, st.integers(0, 30), st.sampled_from([1, 2, 4]))
def test_kinds_on_several_processes_and_either_feed(groups, seed, step, processes):
    groups, n = np.array(groups), len(groups)
    whole = Order(n, 8, seed, groups=groups)(step)
    parts = [Order(n, 8, seed, p, processes, groups)(step) for p in range(processes)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    source = Squares(n)
    np.testing.assert_array_equal(DeviceFeed(source[range(n)], 8, seed, groups=groups)(step)["index"], whole)
    np.testing.assert_array_equal(HostFeed(source, 8, seed, groups=groups)(step)["label"], whole)


def test_examples_of_their_own_kinds_are_in_the_usual_order():
    np.testing.assert_array_equal(Order(9, 4, 5, groups=np.arange(9))(3), examples_at(np.arange(12, 16), 9, 5))


def test_far_steps_do_not_overflow():
    step = 2**40
    order = Order(60_000, 4096, 0)(step)
    assert order.min() >= 0 and order.max() < 60_000
    position = step * 4096
    assert order[0] == epoch_order(60_000, 0, position // 60_000)[position % 60_000]


def test_device_feed():
    arrays = {"x": np.arange(10)[:, None], "label": np.arange(10)}
    feed = DeviceFeed(arrays, 4, seed=3, process_index=1, process_count=2)
    assert feed.resident.keys() == arrays.keys() and feed.resident["x"] is arrays["x"]
    batch = feed(5)
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        "index": ((2,), np.int32),
        "id": ((2,), np.int32),
    }
    np.testing.assert_array_equal(batch["id"], [2, 3])
    np.testing.assert_array_equal(batch["index"], Order(10, 4, 3)(5)[2:])


@settings(max_examples=15)
@given(sizes, st.integers(0, 100), st.integers(0, 50), st.sampled_from([(0, 1), (1, 2), (3, 4)]))
def test_host_feed_is_device_feed(n, seed, start, place):
    source = Squares(n)
    host = HostFeed(source, 8, seed, *place)
    device = DeviceFeed(source[range(n)], 8, seed, *place)
    assert host.resident == {}
    for step in (start, start + 1, start + 2, 7, 8, start):  # on, and to and fro
        batch, rows = host(step), device(step)
        assert batch.keys() == {"x", "label", "id"}
        for name in ("x", "label"):
            np.testing.assert_array_equal(batch[name], device.resident[name][rows["index"]])
        np.testing.assert_array_equal(batch["id"], rows["id"])


class Named(Squares):
    """Squares that say whose they are."""

    def __init__(self, n, name):
        super().__init__(n)
        self.name = name

    def __getitem__(self, indices):
        return super().__getitem__(indices) | {"name": np.full(len(indices), self.name)}


def test_buckets_take_turns_by_their_sizes():
    """Of 4, 12 and 1 examples, one, three and one batch of 4 in each round; each goes on where its last turn ended."""
    feed = BucketFeed([Named(4, 0), Named(12, 1), Named(1, 2)], 4, seed=3)
    batches = [feed(step) for step in range(20)]
    assert all(len(set(batch["name"])) == 1 for batch in batches)
    whose = np.array([batch["name"][0] for batch in batches]).reshape(4, 5)
    assert (np.sort(whose) == [0, 1, 1, 1, 2]).all()
    assert len({tuple(row) for row in whose}) > 1  # another order in each round
    for name, n in ((0, 4), (1, 12)):
        labels = np.concatenate([batch["label"] for batch in batches if batch["name"][0] == name])
        np.testing.assert_array_equal(labels, examples_at(np.arange(len(labels)), n, 3))
    again = BucketFeed([Named(4, 0), Named(12, 1), Named(1, 2)], 4, seed=3)
    for step in (13, 14, 2):
        for name, values in again(step).items():
            np.testing.assert_array_equal(values, batches[step][name])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_bucket(processes):
    whole = BucketFeed([Named(9, 0), Named(5, 1)], 4, 7)
    parts = [BucketFeed([Named(9, 0), Named(5, 1)], 4, 7, p, processes) for p in range(processes)]
    for step in range(6):
        batch, split = whole(step), [part(step) for part in parts]
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([some[name] for some in split]), values)


def test_host_feed_reads_ahead_but_not_far():
    read = []

    class Watched(Squares):
        def __getitem__(self, indices):
            read.append(len(indices))
            return super().__getitem__(indices)

    feed = HostFeed(Watched(1000), 4, 0, prefetch=3, threads=2)
    assert not read  # nothing before the first batch is asked for
    for step in range(10**9, 10**9 + 5):  # at once, wherever it starts
        feed(step)
    assert 5 <= len(read) <= 5 + 3 + 2


def test_host_feed_tells_of_damage_at_its_step():
    class Damaged(Squares):
        def __getitem__(self, indices):
            if 3 in indices:
                raise InputError("example 3 cannot be read")
            return super().__getitem__(indices)

    feed = HostFeed(Damaged(5), 1, 0)
    at = list(epoch_order(5, 0, 0)).index(3)
    for step in range(at):
        feed(step)
    for _ in range(2):
        with pytest.raises(InputError) as error:
            feed(at)
        assert str(error.value) == "example 3 cannot be read"


@pytest.mark.parametrize(
    "make", [lambda n, *args: DeviceFeed({"x": np.zeros(n)}, *args), lambda n, *args: HostFeed(Squares(n), *args)]
)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 4, 0), "the data set is empty"),
        ((10, 6, 0, 0, 4), "batch_size=6 does not divide over 4 processes: it must be a multiple of 4"),
        ((10, 0, 0), "batch_size=0 does not divide over 1 process:"),
        ((10, -4, 0, 0, 2), "batch_size=-4"),
        ((10, 4, -1), "seed=-1 is not in"),
    ],
)
def test_errors(make, args, message):
    with pytest.raises(InputError, match=message):
        make(*args)


def test_arrays_of_unequal_length():
    with pytest.raises(InputError, match=r"unequal length: \{'x': 3, 'label': 2\}"):
        DeviceFeed({"x": np.zeros(3), "label": np.zeros(2)}, 1, 0)
    with pytest.raises(InputError, match="empty"):
        DeviceFeed({}, 1, 0)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16])
def test_in_order(n):
    seen = []
    for batch in in_order(Squares(n), 8):
        assert batch["x"].shape == batch["valid"].shape == batch["id"].shape == (8,)
        np.testing.assert_array_equal(batch["x"], batch["id"].astype(np.int64) ** 2)
        seen.extend(batch["id"][batch["valid"]])
    np.testing.assert_array_equal(seen, np.arange(n))
