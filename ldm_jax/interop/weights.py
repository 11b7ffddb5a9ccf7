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
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from ldm_jax.errors import InputError, RunError
from ldm_jax.files import atomic, read_json
from ldm_jax.interop.torch_pickle import PickledTensors

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


class _Entry(NamedTuple):
    """Where a safetensors file keeps a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    stop: int


def read_state_dict(folder: Path, *, variant: str | None = None, dtype: DTypeLike = None) -> dict[str, np.ndarray]:
    """The weights in a folder by name.

    Args:
      folder: a component's folder, such as the unet/ of Stable Diffusion.
      variant: for instance "fp16"; None takes full precision if it is there, else half.
      dtype: what floats are cast to; None keeps theirs. Safetensors kept as they are stay in the file until they are
        used (views of its mapped memory); cast ones are read one by one, as are those of a .bin.

    Raises:
      InputError: if there are no such weights, a file is missing or damaged, or a pickle holds anything but tensors.
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


def _read_shards(index: Path, dtype: DTypeLike) -> dict[str, np.ndarray]:
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


def _read_file(path: Path, dtype: DTypeLike) -> dict[str, np.ndarray]:
    file = open_weights(path)
    return {name: file.read(name, dtype) for name in file.shapes}


def _cast(stored: np.dtype, dtype: DTypeLike) -> np.dtype:
    """The type that an array gets: integers keep theirs."""
    return stored if dtype is None or not jnp.issubdtype(stored, jnp.floating) else np.dtype(dtype)


class WeightFile(NamedTuple):
    """A file of weights whose tensors are read one at a time."""

    shapes: dict[str, tuple[int, ...]]  # by name
    read: Callable[[str, DTypeLike], np.ndarray]  # (name, dtype) -> the tensor; `dtype` as in `read_state_dict`
    step: int | None = None  # updates behind the weights, if the file tells


def open_weights(path: Path) -> WeightFile:
    """One file of weights: .safetensors, or else a pickle of PyTorch's (.bin, .ckpt, .pt, .pth).

    Raises:
      InputError: missing or damaged, or a pickle that holds anything but tensors; `read` raises it too.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    file = PickledTensors(path)

    def read(name: str, dtype: DTypeLike) -> np.ndarray:
        array = file.read(name)
        return array.astype(_cast(array.dtype, dtype), copy=False)

    return WeightFile(file.shapes, read, file.step)


def _open_safetensors(path: Path) -> WeightFile:
    """A tensor that need not be cast is a view of the mapped file; another passes through memory by itself."""
    entries = _safetensors_entries(path)
    file = np.memmap(path, np.uint8, "r")

    def read(name: str, dtype: DTypeLike) -> np.ndarray:
        stored, shape, start, stop = entries[name]
        wanted = _cast(stored, dtype)
        if wanted == stored:
            return np.asarray(file[start:stop]).view(stored).reshape(shape)
        count = (stop - start) // stored.itemsize
        return np.fromfile(path, stored, count, offset=start).reshape(shape).astype(wanted)

    return WeightFile({name: entry.shape for name, entry in entries.items()}, read)


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


def read_weights(path: Path, dtype: DTypeLike = None) -> dict[str, np.ndarray]:
    """The weights in one file by name; `dtype` and errors as in `read_state_dict`."""
    return _read_file(Path(path), dtype)


def write_safetensors(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes weights by name for PyTorch to read, whole or not at all; raises RunError if that fails."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # The memory of an array is written, not the view of it.
    state = {name: np.asarray(value, order="C") for name, value in state.items()}
    try:
        with atomic(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # of new files here; safetensors lets nobody but the owner read its own
            save_file(state, temporary, metadata={"format": "pt"})
            temporary.chmod(mode)
    except SafetensorError as error:
        raise RunError(f"could not write {path}: {error}") from error
