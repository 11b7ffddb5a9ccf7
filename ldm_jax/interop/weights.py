"""Weight files in a component's folder of diffusers or transformers: whole, sharded or pickled, read lazily.

|         | diffusers                                              | transformers                           |
|---------|--------------------------------------------------------|----------------------------------------|
| whole   | `diffusion_pytorch_model[.fp16].safetensors`           | `model[.fp16].safetensors`             |
| sharded | `diffusion_pytorch_model.safetensors.index[.fp16].json`| `model.safetensors.index[.fp16].json`  |
| pickled | `diffusion_pytorch_model[.fp16].bin`                   | `pytorch_model[.fp16].bin`             |

An index names the shard of each tensor.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from ldm_jax.errors import InputError
from ldm_jax.interop.stored import Stored
from ldm_jax.interop.torch_pickle import DTYPES, FP8_DTYPES, PickledTensors
from ldm_jax.runtime.files import atomic, read_json

# (name, suffix) of the files with weights, by preference.
FILES = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)
VARIANTS = (None, "fp16", "bf16")  # by preference; None is full precision

_TYPES = {name: np.dtype(dtype) for (_, name), dtype in (DTYPES | FP8_DTYPES).items()}  # of safetensors
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_Entry = tuple[np.dtype, tuple[int, ...], int, int]  # dtype, shape, first byte in the file, byte after the last


class WeightFile(NamedTuple):
    """A file of weights whose tensors are read one at a time."""

    shapes: dict[str, tuple[int, ...]]  # by name
    view: Callable[[str], np.ndarray]  # the tensor of that name as the file has it, not to be kept
    step: int | None = None  # training step, if the file states it
    metadata: Mapping[str, str] = MappingProxyType({})  # of a .safetensors

    def stored(self, name: str, dtype: DTypeLike) -> Stored:
        """A lazy tensor of its shape in `shapes`; `dtype` as in `read_state_dict`."""
        return Stored(partial(self.view, name), dtype)


def read_state_dict(folder: Path, *, variant: str | None = None, dtype: DTypeLike = None) -> dict[str, Stored]:
    """The state dict in a component's folder: name -> lazy tensor.

    Args:
      folder: such as the unet/ of Stable Diffusion.
      variant: for instance "fp16"; None prefers full precision, then half.
      dtype: what floats are cast to; None keeps theirs.

    Raises InputError: there are no such weights, a file is missing or damaged, or a pickle holds anything but tensors.
    A damaged storage of a pickle raises it only when the tensor is read.
    """
    path = _choose(Path(folder), variant)
    state = _read_shards(path, dtype) if path.suffix == ".json" else _read_file(path, dtype)
    if not state:
        raise InputError(f"{path} has no tensors")
    return state


def _names(variant: str | None) -> Iterator[str]:
    """The files that hold, or index, the weights of a variant, by preference."""
    v = f".{variant}" if variant else ""
    for name, suffix in FILES:
        yield f"{name}.{suffix}.index{v}.json"
        yield f"{name}.{suffix}{v}.index.json"  # of diffusers before 0.32; the same without a variant
        yield f"{name}{v}.{suffix}"


def best_weights(names: Collection[str], variant: str | None = None) -> str | None:
    """The file among `names` that is read: weights, or an index of shards; None if there is neither."""
    variants = VARIANTS if variant is None else (variant,)
    return next((name for each in variants for name in _names(each) if name in names), None)


def _choose(folder: Path, variant: str | None) -> Path:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    best = best_weights({path.name for path in folder.iterdir() if path.is_file()}, variant)
    if best is None:
        present = ", ".join(weight_files(folder)) or "no weights at all"
        missing = "weights" if variant is None else f"weights of the variant {variant!r}"
        raise InputError(f"{folder} has no {missing}, for instance {[*_names(variant)][2]}; it has {present}")
    return folder / best


def weight_files(folder: Path) -> list[str]:
    """The names of all files in a folder that hold or index weights, sorted."""
    return sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin") or ".index." in p.name)


def _read_shards(index: Path, dtype: DTypeLike) -> dict[str, Stored]:
    files = read_json(index, "weight_map")["weight_map"]
    shards = [*files.values()] if isinstance(files, dict) else [None]
    if not all(isinstance(name, str) and name and Path(name).name == name for name in shards):
        raise InputError(f"{index} is damaged: its weight_map must name a file of the same folder for each tensor")
    state = {}
    for shard in dict.fromkeys(shards):
        path = index.parent / shard
        if not path.is_file():
            raise InputError(f"{path} is missing; {index.name} lists weights in it")
        tensors = _read_file(path, dtype)
        names = [name for name, file in files.items() if file == shard]
        if absent := [name for name in names if name not in tensors]:
            raise InputError(f"{path} has no tensor {absent[0]}, which {index.name} lists")
        state |= {name: tensors[name] for name in names}
    return state


def _read_file(path: Path, dtype: DTypeLike) -> dict[str, Stored]:
    file = open_weights(path)
    return {name: file.stored(name, dtype) for name in file.shapes}


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors in one file by name, each of its shape there; errors as in `open_weights`."""
    return {name: np.asarray(tensor) for name, tensor in _read_file(path, None).items()}


def open_weights(path: Path) -> WeightFile:
    """One file of weights: .safetensors, or a pickle of PyTorch (.bin, .ckpt, .pt, .pth).

    Raises InputError: missing or damaged, or a pickle that holds anything but tensors; `view` raises it too.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file of weights {path}")
    if _is_pickle(path):
        file = PickledTensors(path)
        return _unscaled(WeightFile(file.shapes, file.view, file.step))
    entries, metadata = _safetensors_entries(path)

    def view(name: str) -> np.ndarray:
        """A memory map of its part of the file alone, so that the memory is free again once it was used."""
        dtype, shape, start, stop = entries[name]
        if start == stop:  # there is nothing to map
            return np.empty(shape, dtype)
        return np.memmap(path, np.uint8, "r", start, stop - start).view(np.ndarray).view(dtype).reshape(shape)

    return _unscaled(WeightFile({name: shape for name, (_, shape, *_) in entries.items()}, view, metadata=metadata))


# In files of ComfyUI: a marker of the scaled dtype, and weights with a scale each (one number, or one a row).
SCALED_MARKER = "scaled_fp8"
_SCALE = re.compile(r"(.*\.)(?:scale_weight|weight_scale)")
_UNUSED_SCALES = re.compile(r".*\.(scale_input|input_scale)")  # of activations, for matrix products in fp8
_LAYER_FORMAT = ".comfy_quant"  # the end of the name of a layer's quantization format: JSON as uint8
_LAYER_FORMATS = ("float8_e4m3fn", "float8_e5m2")  # those of one scale a tensor or a row


def _unscaled(file: WeightFile) -> WeightFile:
    """The file with fp8 weights times their scales, float32, and without these; others are returned as they are.

    Raises InputError if a layer has another quantization format, or a scale another shape.
    """
    formats = [name for name in file.shapes if name.endswith(_LAYER_FORMAT)]
    for name in formats:
        _check_layer_format(name, file.view(name))
    file = file._replace(shapes={name: shape for name, shape in file.shapes.items() if name not in formats})
    scale_of = {f"{m[1]}weight": name for name in file.shapes if (m := _SCALE.fullmatch(name))}
    scale_of = {name: scale for name, scale in scale_of.items() if name in file.shapes}
    if not scale_of:
        return file._replace(shapes={name: shape for name, shape in file.shapes.items() if name != SCALED_MARKER})

    def view(name: str) -> np.ndarray:
        tensor = file.view(name)
        if name not in scale_of:
            return tensor
        scale = file.view(scale_of[name]).astype(np.float32)
        if scale.size not in (1, len(tensor)):
            shapes = f"shape {list(scale.shape)}, of a weight of {list(tensor.shape)}"
            raise InputError(f"{scale_of[name]} has {shapes}; it must be one number, or one a row")
        return tensor.astype(np.float32) * scale.reshape(-1, *[1] * (tensor.ndim - 1))

    dropped = {SCALED_MARKER, *scale_of.values()}
    kept = {n: s for n, s in file.shapes.items() if n not in dropped and not _UNUSED_SCALES.fullmatch(n)}
    return file._replace(shapes=kept, view=view)


def _check_layer_format(name: str, stored: np.ndarray) -> None:
    """Raises InputError unless a layer's quantization format, `stored` [bytes] uint8, is an fp8 format."""
    try:
        found = json.loads(stored.tobytes())["format"]
    except (ValueError, TypeError, KeyError):
        found = None
    if found not in _LAYER_FORMATS:
        raise InputError(
            f"{name} says that the layer is quantized as {found!r}; supported are {', '.join(_LAYER_FORMATS)}: use the "
            "model's file in fp8, float16 or bfloat16"
        )


# The first bytes of files that are taken for weights -> what they are.
_OTHERS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights themselves: git lfs pull, or download it again",
    b"<": "is a web page, not weights: the download failed",
}


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle of PyTorch, by its content, whatever its name; raises InputError if it is neither."""
    with path.open("rb") as file:
        start = file.read(24)
    if start[8:9] == b"{":  # the header of safetensors, after its length
        return False
    for beginning, what in _OTHERS.items():
        if start.lstrip().startswith(beginning):
            raise InputError(f"{path} {what}")
    return path.suffix != ".safetensors" or start.startswith((b"PK\x03\x04", b"\x80\x02"))


def _safetensors_entries(path: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """The checked header of a safetensors file, and its metadata.

    The file is 8 bytes with the length of a JSON object, the object, then the data.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{path} is damaged: it ends within its header")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(value, 8 + length) for name, value in header.items()}
    except InputError as error:
        raise InputError(f"{path} holds {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: its header cannot be read") from error
    for name, (*_, stop) in entries.items():
        if stop > size:
            raise InputError(f"{path} is damaged: it ends within {name}")
    return entries, metadata if isinstance(metadata, dict) else {}


def _entry(value: Mapping[str, Any], origin: int) -> _Entry:
    if value["dtype"] not in _TYPES:
        raise InputError(f"a tensor of type {value['dtype']}; supported are {', '.join(_TYPES)}")
    dtype, shape = _TYPES[value["dtype"]], tuple(value["shape"])
    start, stop = value["data_offsets"]
    valid = all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop))
    if not valid or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("shape and data_offsets do not agree")
    return dtype, shape, origin + start, origin + stop


def write_safetensors(path: Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a state dict for PyTorch to read, atomically; arrays [...] may be views with any order of axes.

    The safetensors library writes an array's memory whatever its strides, so that every kernel would have to be copied
    in memory before the first is written.
    """
    header, place = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    state = {name: np.asarray(state[name]) for name in sorted(state, key=lambda name: (-state[name].itemsize, name))}
    for name, value in state.items():
        span = [place, place := place + value.nbytes]
        header[name] = {"dtype": _TYPE_NAMES[value.dtype], "shape": list(value.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in state.values():
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
