"""Weight files of PyTorch (.pth, .pt, .bin, .ckpt, .safetensors), read without PyTorch; nothing in them runs.

`torch.save` writes a pickle in which tensors are calls of a rebuild function on storages kept beside it: since 1.6 in a
zip archive, before that one after the other behind the pickle. Both are read here; of all names in the pickle only
those of storages, of the rebuild functions and of the ordered dict are known, and most are stand-ins of ours.

Training checkpoints keep callbacks, counters and hyper-parameters beside the weights. The names that these are known to
ask for all become `Inert`, which does nothing; any other name is refused, as is an `Inert` among the weights.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop.unpickle import WhitelistUnpickler, load_restricted

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class Tensor:
    """Stands in for a tensor until its storage is read: a strided view of the storage called `key`."""

    def __init__(self, storage: tuple, offset: int, size: tuple, stride: tuple, *_: Any):
        self.key, self.dtype, self.numel = storage
        self.offset, self.size, self.stride = offset, tuple(size), tuple(stride)
        last = offset + sum((n - 1) * step for n, step in zip(self.size, self.stride))
        if len(self.size) != len(self.stride) or min((offset, *self.size, *self.stride)) < 0:
            raise ValueError(f"a tensor of size {self.size} and stride {self.stride}")
        if math.prod(self.size) > self.numel or (math.prod(self.size) and last >= self.numel):
            raise ValueError(f"a tensor of size {self.size} that reaches beyond its storage of {self.numel}")

    def view(self, storage: np.ndarray) -> np.ndarray:
        """The tensor as a view of its storage."""
        strides = [step * storage.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(storage[self.offset :], self.size, strides, writeable=False)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    """Stands in for `torch.nn.Parameter`'s rebuild function."""
    return data


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): Tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
} | {("torch", name): np.dtype(dtype) for name, dtype in STORAGES.items()}


# What training checkpoints hold beside the weights, seen in those of CompVis and of pytorch_lightning: packages, and
# single names.
INERT_PACKAGES = (
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "omegaconf",
    "numpy",
    "ldm",
)
_PLAIN = ("object", "dict", "list", "tuple", "set", "frozenset", "int", "float", "complex", "bool", "str", "bytes")
INERT_NAMES = {
    *((module, name) for module in ("builtins", "__builtin__") for name in _PLAIN),
    *(("collections", name) for name in ("defaultdict", "deque", "Counter")),
    *((module, "_reconstructor") for module in ("copyreg", "copy_reg")),
    ("_codecs", "encode"),
    ("typing", "Any"),
    ("torch", "device"),
    ("torch", "Size"),
}


class Inert:
    """Stands in for a class or function whose result is not wanted: takes whatever the pickle does, and drops it."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """What the pickle takes for a call of the function, or for an object of the class."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        """As of a kind of dict."""

    def __setstate__(self, state: Any) -> None:
        """As of an object with fields."""

    def append(self, item: Any) -> None:
        """As of a kind of list."""

    extend = add = append


def _is_inert(module: str, name: str) -> bool:
    return module.split(".")[0] in INERT_PACKAGES or (module, name) in INERT_NAMES


class _TensorUnpickler(WhitelistUnpickler):
    """Reads storages by reference; ("storage", type, key, device, number of elements ...) -> (key, dtype, number)."""

    def find_class(self, module: str, name: str) -> Any:
        """What is on the list, or an `Inert`; `pickle.UnpicklingError` for any other name."""
        return Inert if _is_inert(module, name) else super().find_class(module, name)

    def persistent_load(self, reference: tuple) -> tuple[str, np.dtype, int]:
        kind, dtype, key, _, numel, *_ = reference
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"an unknown reference {kind!r}")
        return str(key), dtype, int(numel)


class PickledTensors:
    """The tensors of a pickle of PyTorch's, each read when it is asked for.

    A file that keeps them below "state_dict", as training checkpoints do, gives those.

    Attributes:
        shapes: name -> shape.
        step: how many updates the training had made, if the file says so beside its "state_dict".
    """

    def __init__(self, path: Path):
        """Raises InputError: missing, damaged or foreign file, or one whose pickle asks for anything but tensors."""
        self._path = Path(path)
        if not self._path.is_file():
            raise InputError(f"there is no file of weights {path}")
        whole, self._read_storage = (_open_zip if zipfile.is_zipfile(path) else _open_legacy)(self._path)
        tree = whole.get("state_dict", whole) if isinstance(whole, dict) else whole
        if not isinstance(tree, dict) or not any(isinstance(value, Tensor) for value in tree.values()):
            raise InputError(f"{path}: holds no dict of tensors")
        for name, value in tree.items():
            if isinstance(value, Inert) or value is Inert:
                raise InputError(f"{path}: {name!r} is no tensor, but something that only its training knows")
        self._tensors = {str(name): value for name, value in tree.items() if isinstance(value, Tensor)}
        self.shapes = {name: tensor.size for name, tensor in self._tensors.items()}
        step = whole.get("global_step")
        self.step = step if isinstance(step, int) else None
        self._last = ("", np.empty(0))  # tensors that share a storage mostly follow each other

    def view(self, name: str) -> np.ndarray:
        """The tensor as a view of its storage, which is read; InputError if the file is damaged there."""
        tensor = self._tensors[name]
        if tensor.key != self._last[0]:
            self._last = (tensor.key, _storage(self._read_storage(tensor.key), tensor, self._path))
        return tensor.view(self._last[1])


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a weight file by name, floats of 16 bits and less as float32 where NumPy lacks the type.

    Raises:
        InputError: missing, damaged or foreign file, or one whose pickle asks for anything but tensors.
    """
    if Path(path).suffix == ".safetensors" and Path(path).is_file():
        return _load_safetensors(Path(path))
    file = PickledTensors(path)
    return {name: np.array(_in_numpy(file.view(name)), order="C") for name in file.shapes}


def _in_numpy(array: np.ndarray) -> np.ndarray:
    """bfloat16 as float32."""
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def _storage(data: bytes, tensor: Tensor, path: Path) -> np.ndarray:
    if len(data) != tensor.numel * tensor.dtype.itemsize:
        raise InputError(f"{path}: damaged: storage {tensor.key} has {len(data)} bytes, not {tensor.numel} elements")
    return np.frombuffer(data, tensor.dtype)


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not readable as safetensors: {error}") from error
    return {name: _in_numpy(array) for name, array in tensors.items()}


def _open_zip(path: Path) -> tuple[Any, Callable[[str], bytes]]:
    """The unpickled tree, and a function from the key of a storage to its bytes."""
    try:
        archive = zipfile.ZipFile(path)
        (entry,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        folder = entry.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise InputError(f"{path}: written on a big-endian machine, which is not supported")
        with archive.open(entry) as file:
            tree = load_restricted(_TensorUnpickler(file, ALLOWED), path)
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as a PyTorch file: {error}") from error

    def read_storage(key: str) -> bytes:
        try:
            return archive.read(f"{folder}data/{key}")
        except (KeyError, zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{path}: damaged: cannot read storage {key}") from error

    return tree, read_storage


def _open_legacy(path: Path) -> tuple[Any, Callable[[str], bytes]]:
    """The same for files from before PyTorch 1.6: magic, version, system, tree, keys, storages with their lengths."""
    with path.open("rb") as file:
        magic, _, system = (load_restricted(_TensorUnpickler(file, ALLOWED), path) for _ in range(3))
        if magic != LEGACY_MAGIC or not isinstance(system, dict) or not system.get("little_endian"):
            raise InputError(f"{path}: not a PyTorch file")
        unpickler = _LegacyUnpickler(file, ALLOWED)
        tree, keys = load_restricted(unpickler, path), load_restricted(_TensorUnpickler(file, ALLOWED), path)
        places = {str(key): _legacy_place(file, unpickler.itemsizes, str(key), path) for key in keys}

    def read_storage(key: str) -> bytes:
        if key not in places:
            raise InputError(f"{path}: damaged: there is no storage {key}")
        start, length = places[key]
        with path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    return tree, read_storage


class _LegacyUnpickler(_TensorUnpickler):
    """Remembers the element size of each storage, which the storages behind the pickle do not tell."""

    def __init__(self, file: IO[bytes], allowed: dict):
        super().__init__(file, allowed)
        self.itemsizes: dict[str, int] = {}

    def persistent_load(self, reference: tuple) -> tuple[str, np.dtype, int]:
        key, dtype, numel = super().persistent_load(reference)
        self.itemsizes[key] = dtype.itemsize
        return key, dtype, numel


def _legacy_place(file: IO[bytes], itemsizes: dict[str, int], key: str, path: Path) -> tuple[int, int]:
    """Where the next storage begins, and how many bytes it has; the file is left behind it."""
    head = file.read(8)
    if len(head) < 8 or key not in itemsizes:
        raise InputError(f"{path}: damaged: cannot read storage {key}")
    start, length = file.tell(), struct.unpack("<q", head)[0] * itemsizes[key]
    file.seek(start + length)
    return start, length
