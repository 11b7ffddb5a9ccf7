"""Feeds: batch = feed(step), a function of the seed and the step alone, so that a run has no data state to save.

Step s of a run takes the positions s*B ... s*B + B - 1 of an endless sequence of epochs. An epoch is a permutation of
the N examples that depends on the seed and the epoch's number alone. Batches continue across the end of an epoch, and
may be larger than the data set. Of P processes, process p takes the p-th of P equal parts of each batch.

With examples in G groups, an epoch has G positions: one example of each group, the next one in the next epoch.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from ldm_jax.errors import InputError

Batch = dict[str, np.ndarray]
Groups = np.ndarray | None  # int [n], the group of each example; None: no groups


class Source(Protocol):
    """A data set that is indexed by lists, as `Dataset`: `source[[3, 5]]` stacks two examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """The examples at `indices`, stacked."""


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of range(n) in an epoch, int32 [n]: the argsort of Philox numbers, one per example.

    NumPy promises that Philox's numbers never change, but not its own shuffles.
    """
    numbers = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    order = np.argsort(numbers, kind="stable").astype(np.int32)
    order.flags.writeable = False  # it is shared
    return order


def examples_at(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The examples, int32 [...], at `positions` int64 [...] of the endless sequence over n examples."""
    epochs, places = np.divmod(positions, n)
    examples = np.empty(positions.shape, np.int32)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        examples[now] = epoch_order(n, seed, int(epoch))[places[now]]
    return examples


class Order:
    """The order of examples: indices `order(step)` int32 [B / process_count] and `order.id`, their places in the batch.

    Args:
        n: number of examples.
        batch_size: B, over all processes.
        seed: 0 or more.
        process_index, process_count: which part of each batch is this process's.
        groups: see `Groups`.

    Raises:
        InputError: no examples, or a batch that does not divide.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1, groups: Groups = None
    ) -> None:
        if n < 1:
            raise InputError("the data set is empty")
        if batch_size < 1 or batch_size % process_count:
            raise InputError(
                f"batch_size={batch_size} does not divide over {process_count} process{'es' * (process_count > 1)}: "
                f"it must be a multiple of {process_count}"
            )
        if not 0 <= seed < 2**64:
            raise InputError(f"seed={seed} is not in 0 ... 2^64 - 1")
        local = batch_size // process_count
        self.id = np.arange(process_index * local, (process_index + 1) * local, dtype=np.int32)
        self._batch_size, self._seed = batch_size, seed
        groups = np.arange(n) if groups is None else groups
        self._by_group = np.argsort(groups, kind="stable").astype(np.int32)
        _, self._first, self._count = np.unique(groups[self._by_group], return_index=True, return_counts=True)

    def __call__(self, step: int) -> np.ndarray:
        """The examples of this process's part of the step's batch, int32 [B / process_count]."""
        positions = step * self._batch_size + self.id.astype(np.int64)
        groups = examples_at(positions, len(self._count), self._seed)
        epochs = positions // len(self._count)
        # Offset by the group's number, as the first examples of all groups may be alike.
        return self._by_group[self._first[groups] + (epochs + groups) % self._count[groups]]


class DeviceFeed:
    """A feed of arrays (name -> [N, ...]) that stay on the device: each step transfers only its examples' indices.

    `resident` holds the arrays, to be put on the device once. For the other arguments see `Order`.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        groups: Groups = None,
    ) -> None:
        lengths = {name: len(values) for name, values in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"arrays of unequal length: {lengths}")
        self.resident = dict(arrays)
        self._order = Order(max(lengths.values(), default=0), batch_size, seed, process_index, process_count, groups)

    def __call__(self, step: int) -> Batch:
        """{"index": int32 [B_local] rows of the resident arrays, "id": int32 [B_local] places in the batch}."""
        return {"index": self._order(step), "id": self._order.id}


class _Streamed:
    """A feed of the batches `read(step)`, of which Grain's threads read `prefetch` ahead. It starts at any step."""

    def __init__(self, read: Callable[[int], Batch], prefetch: int = 8, threads: int = 8) -> None:
        self.resident: dict[str, np.ndarray] = {}  # nothing stays on the device
        self._read, self._prefetch, self._threads = read, prefetch, threads
        self._batches: Iterator[Batch] = iter(())
        self._next_step: int | None = None

    def __call__(self, step: int) -> Batch:
        """{"x": uint8 [B_local, H, W, C], ..., as the source has it, "id": int32 [B_local] places in the batch}."""
        if step != self._next_step:
            import grain  # takes half a second

            options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch)
            steps = grain.MapDataset.range(step, np.iinfo(np.int64).max)
            self._batches = iter(steps.map(self._read).to_iter_dataset(options))
        self._next_step = None  # should the next line raise
        batch = next(self._batches)
        self._next_step = step + 1
        return batch


class HostFeed(_Streamed):
    """A feed of data that does not fit on the device: whole batches, read ahead.

    For the arguments see `Order`; options are `prefetch` batches and `threads`, each of which reads one batch.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        groups: Groups = None,
        **options: int,
    ) -> None:
        order = Order(len(source), batch_size, seed, process_index, process_count, groups)
        super().__init__(lambda step: source[order(step)] | {"id": order.id}, **options)


class BucketFeed(_Streamed):
    """A feed of examples of several shapes: each batch is of one source, in proportion to the sources' sizes.

    The steps are in rounds. In a round each source has as many turns as it has batches, at least one, in an order that
    depends on the seed and the round's number alone. For the other arguments, of each source, see `Order`.
    """

    def __init__(
        self, sources: Sequence[Source], batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        super().__init__(self._batch)
        self._sources, self._seed = sources, seed
        self._orders = [Order(len(source), batch_size, seed, process_index, process_count) for source in sources]
        self._turns = np.array([max(1, round(len(source) / batch_size)) for source in sources])

    def _batch(self, step: int) -> Batch:
        round_, place = divmod(step, int(self._turns.sum()))
        turns = np.repeat(np.arange(len(self._turns)), self._turns)  # the source of each turn
        turns = turns[epoch_order(len(turns), self._seed, round_)]
        source = turns[place]
        source_step = round_ * int(self._turns[source]) + int((turns[:place] == source).sum())
        order = self._orders[source]
        return self._sources[source][order(source_step)] | {"id": order.id}


def in_order(source: Source, batch_size: int) -> Iterator[Batch]:
    """Batches of all examples in order, of one size, for encoding a data set.

    The last batch is padded with the last example. "id" int32 [B] is the index of each row's example, "valid" bool [B]
    is False for padding.
    """
    for start in range(0, len(source), batch_size):
        yield _padded(source, batch_size, start, len(source))


def read_in_order(source: Source, batch_size: int, rows: range) -> Iterator[Batch]:
    """Batches of the examples in `rows` as `in_order` has them, the last one padded; Grain's threads read ahead."""
    import grain

    options = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)
    starts = grain.MapDataset.range(rows.start, rows.stop, batch_size)
    yield from starts.map(lambda start: _padded(source, batch_size, start, rows.stop)).to_iter_dataset(options)


def _padded(source: Source, batch_size: int, start: int, stop: int) -> Batch:
    index = np.arange(start, start + batch_size, dtype=np.int32)
    clamped = np.minimum(index, stop - 1)
    return source[clamped] | {"id": clamped, "valid": index < stop}
