"""batch = feed(step): what a step trains on is a function of the seed and the step alone, so there is nothing to save.

Step s of a run takes the positions s*B ... s*B + B - 1 of an endless sequence. Every N positions of it are one epoch:
a permutation of the N examples that depends on the seed and the number of the epoch alone. Batches go on across the end
of an epoch, and may be larger than the data set. Of P processes, process p takes the p-th of P equal parts of each.

Where examples are in groups, as many as there are groups are one epoch: one of each group, the next one in the next
epoch.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from ldm_jax.errors import InputError

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Examples by number: `source[[3, 5]]` stacks two, as a `Dataset` does."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """The examples at `indices`, stacked."""


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of range(n) that an epoch visits, int32 [n]: Philox numbers, one per example, sorted.

    NumPy promises Philox's numbers for good, but not what its own shuffles make of them.
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
    """This process's part of every step's batch: `order(step)` is the examples, `order.id` their places in the batch.

    Args:
        n: the number of examples.
        batch_size: B, over all processes.
        seed: 0 or more; another seed is another order.
        process_index, process_count: which part of each batch is wanted.
        groups: int [n], the group of each example; None = each is one of its own.

    Raises:
        InputError: no examples, or a batch that does not divide.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        groups: np.ndarray | None = None,
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
        """The examples of this process's part of step's batch, int32 [B / process_count]."""
        positions = step * self._batch_size + self.id.astype(np.int64)
        groups = examples_at(positions, len(self._count), self._seed)
        epochs = positions // len(self._count)
        # By the group's number they do not all begin with their first, which may be alike.
        return self._by_group[self._first[groups] + (epochs + groups) % self._count[groups]]


class DeviceFeed:
    """For data that fits on the device: the arrays go there once, each step brings only the rows to gather.

    Args:
        arrays: name -> [N, ...], such as a `Dataset`'s.
        batch_size, seed, process_index, process_count, groups: see `Order`.

    Attributes:
        resident: the arrays, to be put on the device once.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        groups: np.ndarray | None = None,
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
    """Whole batches, read ahead by Grain's threads. Starts anywhere at once.

    Args:
        read: step -> its batch.
        prefetch: batches read ahead.
        threads: that read them, one batch each.

    Attributes:
        resident: empty, as nothing stays on the device.
    """

    def __init__(self, read: Callable[[int], Batch], prefetch: int, threads: int) -> None:
        self.resident: dict[str, np.ndarray] = {}
        self._read, self._prefetch, self._threads = read, prefetch, threads
        self._batches: Iterator[Batch] = iter(())
        self._next_step: int | None = None

    def __call__(self, step: int) -> Batch:
        """{"x": uint8 [B_local, H, W, C], ..., as the source has it, "id": int32 [B_local] places in the batch}."""
        if step != self._next_step:
            self._batches = self._from(step)
        self._next_step = None  # should the next line raise
        batch = next(self._batches)
        self._next_step = step + 1
        return batch

    def _from(self, step: int) -> Iterator[Batch]:
        import grain  # brings half a second of imports

        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch)
        steps = grain.MapDataset.range(step, np.iinfo(np.int64).max)
        return iter(steps.map(self._read).to_iter_dataset(options))


class HostFeed(_Streamed):
    """For data that does not fit on the device: whole batches, read ahead by Grain's threads. Starts anywhere at once.

    Args:
        source: see `Source`.
        batch_size, seed, process_index, process_count, groups: see `Order`.
        prefetch, threads: batches read ahead, and threads that read them, one batch each.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        groups: np.ndarray | None = None,
        *,
        prefetch: int = 8,
        threads: int = 8,
    ) -> None:
        order = Order(len(source), batch_size, seed, process_index, process_count, groups)
        super().__init__(lambda step: source[order(step)] | {"id": order.id}, prefetch, threads)


class BucketFeed(_Streamed):
    """For examples of several shapes: each batch is of one source, whose turns are as many as it has batches.

    Every so many steps are one round, in which each source has its turns, at least one, in an order that depends on the
    seed and the number of the round alone.

    Args:
        sources: see `Source`.
        batch_size, seed, process_index, process_count: see `Order`, of each source.
        prefetch, threads: see `HostFeed`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        *,
        prefetch: int = 8,
        threads: int = 8,
    ) -> None:
        super().__init__(self._batch, prefetch, threads)
        self._sources, self._seed = sources, seed
        self._orders = [Order(len(source), batch_size, seed, process_index, process_count) for source in sources]
        self._turns = np.array([max(1, round(len(source) / batch_size)) for source in sources])

    def _batch(self, step: int) -> Batch:
        round_, place = divmod(step, int(self._turns.sum()))
        whose = np.repeat(np.arange(len(self._turns)), self._turns)
        whose = whose[epoch_order(len(whose), self._seed, round_)]
        own = whose[place]
        turn = round_ * int(self._turns[own]) + int((whose[:place] == own).sum())
        return self._sources[own][self._orders[own](turn)] | {"id": self._orders[own].id}


def in_order(source: Source, batch_size: int, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """Every example once, in order, in batches of one size: for encoding a whole data set, and for evaluation.

    The last batch is filled up with the last example; "valid" bool [B_local] tells which rows count, "id" int32
    [B_local] which examples they are.
    """
    n = len(source)
    places = Order(n, batch_size, 0, process_index, process_count).id
    for start in range(0, n, batch_size):
        index = start + places
        shown = np.minimum(index, n - 1)
        yield source[shown] | {"id": shown, "valid": index < n}
