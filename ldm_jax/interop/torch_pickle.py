"""Pickled weight files of PyTorch (.pth, .pt, .bin, .ckpt), read without PyTorch; no code in them runs.

`torch.save` pickles tensors as calls of a rebuild function on storages: since PyTorch 1.6 these are members of a zip
archive, before that they follow the pickle. Both formats are read. Only the names of storages, rebuild functions and
the ordered dict are allowed in the pickle, and most resolve to the replacements below.

Training checkpoints also hold callbacks, counters and hyper-parameters. The names known from those resolve to `Inert`,
which does nothing; any other name is refused, and so is an `Inert` among the weights.
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
# Name in torch (storage) and in safetensors -> dtype.
DTYPES = {
    ("Double", "F64"): np.float64,
    ("Float", "F32"): np.float32,
    ("Half", "F16"): np.float16,
    ("BFloat16", "BF16"): ml_dtypes.bfloat16,
    ("Long", "I64"): np.int64,
    ("Int", "I32"): np.int32,
    ("Short", "I16"): np.int16,
    ("Char", "I8"): np.int8,
    ("Byte", "U8"): np.uint8,
    ("Bool", "BOOL"): np.bool_,
}
# Types without storages of their own: torch's name and safetensors' -> dtype.
FP8_DTYPES = {
    ("float8_e4m3fn", "F8_E4M3"): ml_dtypes.float8_e4m3fn,
    ("float8_e5m2", "F8_E5M2"): ml_dtypes.float8_e5m2,
}


class Tensor:
    """A tensor whose storage is yet to be read: a strided view of the storage called `key`."""

    def __init__(self, storage: tuple, offset: int, size: tuple, stride: tuple, *_: Any):
        self.key, self.dtype, self.numel = storage
        self.offset, self.size, self.stride = offset, tuple(size), tuple(stride)
        last = offset + sum((n - 1) * step for n, step in zip(self.size, self.stride))
        if len(self.size) != len(self.stride) or min((offset, *self.size, *self.stride)) < 0:
            raise ValueError(f"a tensor of size {self.size} and stride {self.stride}")
        if math.prod(self.size) > self.numel or (math.prod(self.size) and last >= self.numel):
            raise ValueError(f"a tensor of size {self.size} that reaches beyond its storage of {self.numel}")

    def view(self, storage: bytes) -> np.ndarray:
        """The tensor, any shape, as a read-only view of its storage."""
        strides = [step * self.dtype.itemsize for step in self.stride]
        return np.ndarray(self.size, self.dtype, storage, self.offset * self.dtype.itemsize, strides)


def _typed_tensor(storage: tuple, offset: int, size: tuple, stride: tuple, _, __, dtype: np.dtype, *___) -> Tensor:
    """A tensor of `dtype` in an untyped storage, whose elements are bytes: how torch pickles fp8."""
    key, _, num_bytes = storage
    if num_bytes % dtype.itemsize:
        raise ValueError(f"a {dtype} tensor in a storage of {num_bytes} bytes")
    return Tensor((key, dtype, num_bytes // dtype.itemsize), offset, size, stride)


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): Tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch.storage", "UntypedStorage"): np.dtype(np.uint8),
}
ALLOWED |= {("torch", f"{name}Storage"): np.dtype(dtype) for (name, _), dtype in DTYPES.items()}
ALLOWED |= {("torch", name): np.dtype(dtype) for (name, _), dtype in FP8_DTYPES.items()}


# What the checkpoints of CompVis and pytorch_lightning hold besides weights: packages, and single names.
INERT_PACKAGES = (
    *("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities"),
    *("omegaconf", "numpy", "ldm"),
)
_PLAIN = ("object", "dict", "list", "tuple", "set", "frozenset", "int", "float", "complex", "bool", "str", "bytes")
INERT_NAMES = {
    *((module, name) for module in ("builtins", "__builtin__") for name in _PLAIN),
    *(("collections", name) for name in ("defaultdict", "deque", "Counter")),
    *((module, "_reconstructor") for module in ("copyreg", "copy_reg")),
    *(("_codecs", "encode"), ("typing", "Any"), ("torch", "device"), ("torch", "Size")),
}


class Inert:
    """Replaces a class or function whose result is not needed: accepts whatever the pickle does with it."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """An instance, whatever the arguments of the class or function."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def _ignore(self, *_: Any) -> None:
        pass

    __setitem__ = __setstate__ = append = extend = add = _ignore


class _TensorUnpickler(WhitelistUnpickler):
    """Reads storages by reference; ("storage", type, key, device, numel ...) -> (key, dtype, numel)."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, ALLOWED)
        self.itemsizes: dict[str, int] = {}  # of each storage, in bytes

    def find_class(self, module: str, name: str) -> Any:
        """The whitelisted replacement, or `Inert`; `pickle.UnpicklingError` for any other name."""
        inert = module.split(".")[0] in INERT_PACKAGES or (module, name) in INERT_NAMES
        return Inert if inert else super().find_class(module, name)

    def persistent_load(self, reference: tuple) -> tuple[str, np.dtype, int]:
        tag, dtype, key, _, numel, *_ = reference
        if tag != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"an unknown reference {tag!r}")
        self.itemsizes[str(key)] = dtype.itemsize
        return str(key), dtype, int(numel)


class PickledTensors:
    """The tensors of a PyTorch pickle, each read on access; those under "state_dict" if there is one.

    Attributes:
        shapes: name -> shape.
        step: the training step ("global_step" next to "state_dict"), None if the file has none.
    """

    def __init__(self, path: Path):
        """Raises InputError: a damaged or foreign file, or one whose pickle uses more than tensors need."""
        self._path = Path(path)
        content, self._read_storage = (_open_zip if zipfile.is_zipfile(path) else _open_legacy)(self._path)
        tree = content.get("state_dict", content) if isinstance(content, dict) else content
        if isinstance(tree, dict) and isinstance(tree.get("string_to_param"), dict):  # of textual inversion
            tree = tree["string_to_param"]
        if not isinstance(tree, dict) or not any(isinstance(value, Tensor) for value in tree.values()):
            raise InputError(f"{path}: holds no dict of tensors (state_dict)")
        for name, value in tree.items():
            if isinstance(value, Inert) or value is Inert:
                raise InputError(f"{path}: {name!r} in its state_dict is an object of the training code, not a tensor")
        self._tensors = {str(name): value for name, value in tree.items() if isinstance(value, Tensor)}
        self.shapes = {name: tensor.size for name, tensor in self._tensors.items()}
        step = content.get("global_step")
        self.step = step if isinstance(step, int) else None
        self._last = ("", b"")  # tensors that share a storage mostly follow each other

    def view(self, name: str) -> np.ndarray:
        """The tensor, shape `shapes[name]`, as a view of its storage; InputError if the file is damaged there."""
        tensor = self._tensors[name]
        if tensor.key != self._last[0]:
            self._last = (tensor.key, self._read_storage(tensor.key))
        data = self._last[1]
        if len(data) != tensor.numel * tensor.dtype.itemsize:
            sizes = f"{len(data)} bytes, not {tensor.numel} elements"
            raise InputError(f"{self._path}: damaged: storage {tensor.key} has {sizes}")
        return tensor.view(data)


def _open_zip(path: Path) -> tuple[Any, Callable[[str], bytes]]:
    """The unpickled tree; a function from a storage's key to its bytes."""
    try:
        archive = zipfile.ZipFile(path)
        (entry,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        folder = entry.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise InputError(f"{path}: written on a big-endian machine, which is not supported")
        with archive.open(entry) as file:
            tree = load_restricted(_TensorUnpickler(file), path)
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as a PyTorch file: {error}") from error

    def read_storage(key: str) -> bytes:
        try:
            return archive.read(f"{folder}data/{key}")
        except (KeyError, zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{path}: damaged: cannot read storage {key}") from error

    return tree, read_storage


def _open_legacy(path: Path) -> tuple[Any, Callable[[str], bytes]]:
    """The same before PyTorch 1.6: magic, version, system, tree, keys, then the storages with their lengths."""
    with path.open("rb") as file:
        magic, _, system = (load_restricted(_TensorUnpickler(file), path) for _ in range(3))
        if magic != LEGACY_MAGIC or not isinstance(system, dict) or not system.get("little_endian"):
            raise InputError(f"{path}: not a PyTorch file")
        unpickler = _TensorUnpickler(file)
        tree, keys = load_restricted(unpickler, path), load_restricted(_TensorUnpickler(file), path)
        places = {}  # key of a storage -> its first byte, number of bytes
        for key in map(str, keys):
            head = file.read(8)
            if len(head) < 8 or key not in unpickler.itemsizes:
                raise InputError(f"{path}: damaged: cannot read storage {key}")
            places[key] = file.tell(), struct.unpack("<q", head)[0] * unpickler.itemsizes[key]
            file.seek(sum(places[key]))

    def read_storage(key: str) -> bytes:
        if key not in places:
            raise InputError(f"{path}: damaged: there is no storage {key}")
        start, length = places[key]
        with path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    return tree, read_storage
