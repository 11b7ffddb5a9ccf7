"""Arrays of examples in sharded ArrayRecord files: written one shard at a time, read by index.

ArrayRecord hashes every record, so that damage is an error, never other numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ldm_jax.data.feeds import Batch
from ldm_jax.errors import RunError
from ldm_jax.runtime.files import atomic, read_json, write_json

INDEX = "index.json"
# One example a record. Latents compress by some 7 %, and uncompressed they are read five times as fast.
OPTIONS = "group_size:1,uncompressed"


def write_index(
    folder: Path, content_hash: str, num: int, per_shard: int, features: Mapping[str, tuple[str, Sequence[int]]]
) -> None:
    """Writes the index of `num` examples, `per_shard` in each file.

    `features` are name -> NumPy dtype, as "<f4", and shape of each example.
    """
    arrays = [[name, dtype, list(shape)] for name, (dtype, shape) in features.items()]
    index = {"content_hash": content_hash, "num_examples": num, "examples_per_shard": per_shard, "features": arrays}
    write_json(folder / INDEX, index)


class Shards:
    """The examples of a folder with an index, as a data set (see `feeds.Source`): `shards[[3, 5]]` stacks two.

    Attributes:
        arrays: None: the examples are on the disk, not in memory.
        paths: the file of each shard.
        rows: the examples of each shard, a range.

    Raises:
        InputError: the index is missing or damaged.
    """

    arrays = None

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / INDEX, "content_hash", "num_examples", "examples_per_shard", "features")
        self._num, self._per_shard = index["num_examples"], index["examples_per_shard"]
        self._dtype = np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in index["features"]])
        starts = range(0, self._num, self._per_shard)
        self.rows = [range(start, min(start + self._per_shard, self._num)) for start in starts]
        self.paths = [folder / f"{k:05d}-of-{len(starts):05d}.array_record" for k in range(len(starts))]

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """The examples at `indices`, stacked; raises RunError, with the shard's file, for a damaged one."""
        indices = [int(index) for index in indices]
        try:
            records = self._source.__getitems__(indices)
        except RuntimeError:
            self._name_damaged(indices)
            raise
        rows = np.frombuffer(b"".join(records), self._dtype)
        return {name: np.ascontiguousarray(rows[name]) for name in self._dtype.names}

    def is_complete(self, number: int) -> bool:
        """Whether a shard has all its examples, by the end of its file; prints what is wrong with its file if not."""
        path = self.paths[number]
        if not path.exists():
            return False
        try:
            found = len(_open([path]))
        except RuntimeError as error:
            print(f"     {path} is damaged ({_first_line(error)})", flush=True)
            return False
        if found != len(self.rows[number]):
            print(f"     {path} is damaged (it has {found} of {len(self.rows[number])} examples)", flush=True)
        return found == len(self.rows[number])

    def write(self, number: int, batches: Iterable[Batch]) -> None:
        """Writes a shard, all of it or nothing, from batches with "valid" bool [B] (see `feeds.in_order`).

        Raises RunError: the file cannot be written, as on a full disk.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        path = self.paths[number]
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        with atomic(path) as temporary:
            writer = ArrayRecordWriter(str(temporary), OPTIONS)
            for batch in batches:
                rows = np.empty(len(batch["valid"]), self._dtype)
                for name in self._dtype.names:
                    rows[name] = batch[name]
                for row in rows[batch["valid"]]:
                    _checked(path, writer.write, row.tobytes())
            _checked(path, writer.close)

    @cached_property
    def _source(self) -> Sequence[bytes]:
        return _open(self.paths)

    def _name_damaged(self, indices: list[int]) -> None:
        for index in indices:
            try:
                self._source[index]
            except RuntimeError as error:
                raise RunError(
                    f"{self.paths[index // self._per_shard]} is damaged ({_first_line(error)}): delete this file, and "
                    "the same command writes it anew and goes on"
                ) from error


def _open(paths: Sequence[Path]) -> Sequence[bytes]:
    """The records of files; RuntimeError if one is damaged at its end, where ArrayRecord has its own index."""
    import grain  # takes half a second

    return grain.sources.ArrayRecordDataSource([str(path) for path in paths])


def _checked(path: Path, write, *content: bytes) -> None:
    try:
        write(*content)
    except RuntimeError as error:  # ArrayRecord's for all that goes wrong
        raise RunError(f"cannot write {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
