"""The weight files of a model's folder as diffusers and transformers name them, whole or in shards.

| kind      | diffusers                                              | transformers                           |
|-----------|--------------------------------------------------------|----------------------------------------|
| whole     | `diffusion_pytorch_model[.fp16].safetensors`           | `model[.fp16].safetensors`             |
| in shards | `diffusion_pytorch_model.safetensors.index[.fp16].json`| `model.safetensors.index[.fp16].json`  |
| pickled   | `diffusion_pytorch_model[.fp16].bin`                   | `pytorch_model[.fp16].bin`             |

An index tells for each tensor which file has it.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from ldm_jax.errors import InputError
from ldm_jax.interop.stored import Stored
from ldm_jax.interop.torch_pickle import PickledTensors
from ldm_jax.runtime.files import atomic, read_json

# (name, suffix) of the files with weights, the first that is there is taken.
FILES = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)
# Without a wish: full precision, otherwise what there is.
VARIANTS = (None, "fp16", "bf16")

SAFETENSORS_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


_NAMES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_TYPES.items()}


class _Entry(NamedTuple):
    """Where a safetensors file keeps a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    stop: int


def read_state_dict(folder: Path, *, variant: str | None = None, dtype: DTypeLike = None) -> dict[str, Stored]:
    """The weights in a folder by name, each of which stays in its file until it is asked for.

    Args:
      folder: a component's folder, such as the unet/ of Stable Diffusion.
      variant: for instance "fp16"; None takes full precision if it is there, else half.
      dtype: what floats are cast to; None keeps theirs.

    Raises:
      InputError: if there are no such weights, a file is missing or damaged, or a pickle holds anything but tensors.
        That a pickle's storage is damaged is found when the tensor is asked for.
    """
    folder = Path(folder)
    path = _choose(folder, variant)
    state = _read_shards(path, dtype) if path.suffix == ".json" else _read_file(path, dtype)
    if not state:
        raise InputError(f"{path} has no tensors")
    return state


def _names(variant: str | None) -> Iterator[str]:
    """The files that hold, or list, the weights of a variant; the best first."""
    v = f".{variant}" if variant else ""
    for name, suffix in FILES:
        yield f"{name}.{suffix}.index{v}.json"
        yield f"{name}.{suffix}{v}.index.json"  # what diffusers wrote before 0.32; the same without a variant
        yield f"{name}{v}.{suffix}"


def best_weights(names: Collection[str], variant: str | None = None) -> str | None:
    """Which of the files in a component's folder is read: one with weights, or an index of shards; None if none is."""
    for wanted in VARIANTS if variant is None else (variant,):
        for name in _names(wanted):
            if name in names:
                return name
    return None


def _choose(folder: Path, variant: str | None) -> Path:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    best = best_weights({path.name for path in folder.iterdir() if path.is_file()}, variant)
    if best is not None:
        return folder / best
    there = ", ".join(weight_files(folder)) or "no weights at all"
    what = "weights" if variant is None else f"weights of the variant {variant!r}"
    raise InputError(f"{folder} has no {what}, for instance {[*_names(variant)][2]}; it has {there}")


def weight_files(folder: Path) -> list[str]:
    """The names of all files in a folder that hold or list weights."""
    return sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin") or ".index." in p.name)


def _read_shards(index: Path, dtype: DTypeLike) -> dict[str, Stored]:
    files = read_json(index, "weight_map")["weight_map"]
    names = [*files.values()] if isinstance(files, dict) else [None]
    if not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise InputError(f"{index} is damaged: its weight_map must give the name of a file beside it for each tensor")
    state = {}
    for name in dict.fromkeys(names):
        path = index.parent / name
        if not path.is_file():
            raise InputError(f"{path} is missing; {index.name} says that there are weights in it")
        tensors = _read_file(path, dtype)
        wanted = [tensor for tensor, file in files.items() if file == name]
        absent = [tensor for tensor in wanted if tensor not in tensors]
        if absent:
            raise InputError(f"{path} has no tensor {absent[0]}; {index.name} says that it is there")
        state |= {tensor: tensors[tensor] for tensor in wanted}
    return state


def _read_file(path: Path, dtype: DTypeLike) -> dict[str, Stored]:
    file = open_weights(path)
    return {name: file.stored(name, dtype) for name in file.shapes}


class WeightFile(NamedTuple):
    """A file of weights whose tensors are read one at a time."""

    shapes: dict[str, tuple[int, ...]]  # by name
    view: Callable[[str], np.ndarray]  # the tensor of a name as the file has it; not to be kept
    step: int | None = None  # updates behind the weights, if the file tells

    def stored(self, name: str, dtype: DTypeLike) -> Stored:
        """A tensor that is yet to be read; `dtype` as in `read_state_dict`."""
        return Stored(partial(self.view, name), dtype)


def open_weights(path: Path) -> WeightFile:
    """One file of weights: .safetensors, or else a pickle of PyTorch's (.bin, .ckpt, .pt, .pth).

    Raises:
      InputError: missing or damaged, or a pickle that holds anything but tensors; `view` raises it too.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    file = PickledTensors(path)
    return WeightFile(file.shapes, file.view, file.step)


def _open_safetensors(path: Path) -> WeightFile:
    """Each tensor is a map of its part of the file: the memory is the system's again as soon as it was looked at."""
    entries = _safetensors_entries(path)

    def view(name: str) -> np.ndarray:
        dtype, shape, start, stop = entries[name]
        if start == stop:  # there is nothing to map
            return np.empty(shape, dtype)
        return np.memmap(path, np.uint8, "r", start, stop - start).view(np.ndarray).view(dtype).reshape(shape)

    return WeightFile({name: entry.shape for name, entry in entries.items()}, view)


def _safetensors_entries(path: Path) -> dict[str, _Entry]:
    """The header of a safetensors file, every number in it checked: its length in 8 bytes, JSON, then the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{path} is damaged: it ends within its header")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(value, 8 + length) for name, value in header.items()}
    except InputError as error:
        raise InputError(f"{path} holds {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: its header cannot be read") from error
    for name, entry in entries.items():
        if entry.stop > size:
            raise InputError(f"{path} is damaged: it ends within {name}")
    return entries


def _entry(value: Mapping[str, Any], origin: int) -> _Entry:
    if value["dtype"] not in SAFETENSORS_TYPES:
        raise InputError(f"a tensor of type {value['dtype']}; supported are {', '.join(SAFETENSORS_TYPES)}")
    dtype, shape = np.dtype(SAFETENSORS_TYPES[value["dtype"]]), tuple(value["shape"])
    start, stop = value["data_offsets"]
    whole = all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop))
    if not whole or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("shape and place do not agree")
    return _Entry(dtype, shape, origin + start, origin + stop)


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The weights in one file by name; errors as in `read_state_dict`."""
    return {name: np.asarray(tensor) for name, tensor in _read_file(Path(path), None).items()}


def write_safetensors(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes weights by name for PyTorch to read, whole or not at all; arrays may be views, in any order of axes.

    It is done here rather than by the safetensors library as that writes an array's memory, whatever the view of it,
    so that all kernels would have to be transposed, and in memory again, before the first is written.
    """
    header, place = {"__metadata__": {"format": "pt"}}, 0
    state = {name: np.asarray(state[name]) for name in sorted(state, key=lambda name: (-state[name].itemsize, name))}
    for name, value in state.items():
        span = [place, place := place + value.nbytes]
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in state.values():
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
