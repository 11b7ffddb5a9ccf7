"""The weights of diffusers' DiTTransformer2DModel <-> `models.dit.DiT` and a class embedding.

There each block has its own embedding of timestep and class, in released weights all the same, which are one here:

| diffusers                                                       | here                                      |
|-----------------------------------------------------------------|-------------------------------------------|
| `transformer_blocks.N.norm1.emb.timestep_embedder`              | `timestep_embedder_N`, or 0 of all blocks |
| `transformer_blocks.N.norm1.emb.class_embedder.embedding_table` | the class embedding, [K + 1, N or 1, C]   |
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ldm_jax.errors import InputError
from ldm_jax.interop import folder
from ldm_jax.interop.diffusers import Params, mismatch, params_from_state_dict, state_dict_from_params
from ldm_jax.interop.modules import abstract_params, dit_from_config
from ldm_jax.interop.stored import Stored
from ldm_jax.interop.weights import read_state_dict
from ldm_jax.models.dit import DiT
from ldm_jax.models.layers import Dtype
from ldm_jax.runtime.files import prefix_errors

NULL_CLASS = 1000  # of DiTPipeline, whatever the number of classes
TABLE = "class_embedder.embedding_table.weight"
TIMESTEP = tuple(f"timestep_embedder.linear_{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias"))


def load_dit(
    path: Path, *, dtype: Dtype = None, params_dtype: DTypeLike = np.float32
) -> tuple[DiT, dict[str, Any], np.ndarray]:
    """The diffusion transformer in a component's folder; arguments and errors as in `folder.load_unet`.

    Returns:
      The module; its parameters; the class embedding [K + 1, dit.num_embeddings, C], the null class last.
    """
    config = folder.component_config(path.parent, path.name)
    with prefix_errors(path):
        dit, num_classes = dit_from_config(config, dtype=dtype)
        state, table = _split_embeddings(read_state_dict(path, dtype=params_dtype), dit.depth)
        if table.shape[::2] != (num_classes + 1, dit.hidden_size):
            shapes = f"{list(table.shape[::2])} for {[num_classes + 1, dit.hidden_size]}"
            raise InputError(f"the class embedding does not fit num_embeds_ada_norm: size mismatch: {shapes}")
        dit = dit.clone(separate_embeddings=table.shape[1] > 1)
        return dit, params_from_state_dict(state, abstract_params(dit)), table


def _split_embeddings(
    state: Mapping[str, np.ndarray | Stored], depth: int
) -> tuple[dict[str, np.ndarray | Stored], np.ndarray]:
    """The state dict with the blocks' timestep embeddings by their names here, and their class embeddings.

    Of all blocks only the first if they are the same.
    """
    state = {name: value for name, value in state.items() if name != "pos_embed.pos_embed"}  # fixed
    names = [{name: f"transformer_blocks.{i}.norm1.emb.{name}" for name in (TABLE, *TIMESTEP)} for i in range(depth)]
    if missing := [name for block in names for name in block.values() if name not in state]:
        raise InputError(f"the state_dict does not fit this model: {mismatch({'missing keys': missing})}")
    blocks = [{short: np.asarray(state.pop(name)) for short, name in block.items()} for block in names]
    if all(np.array_equal(value, blocks[0][name]) for block in blocks for name, value in block.items()):
        blocks = blocks[:1]
    for i, block in enumerate(blocks):
        state |= {_timestep_name(name, i): block[name] for name in TIMESTEP}
    if len({block[TABLE].shape for block in blocks}) > 1:
        raise InputError("the class embeddings of the blocks differ in their shapes")
    return state, np.stack([block[TABLE] for block in blocks], axis=1)


def _timestep_name(name: str, i: int) -> str:
    return name.replace("timestep_embedder", f"timestep_embedder.{i}")


def state_dict_from_dit(dit: DiT, params: Params, table: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse: a state dict of DiTTransformer2DModel with NULL_CLASS classes and the null class.

    `table` is the class embedding [K + 1, dit.num_embeddings, C] with K at most NULL_CLASS; the classes from K on are
    the null class, too.
    """
    state = state_dict_from_params(params)
    table = np.concatenate([table, np.repeat(table[-1:], NULL_CLASS + 1 - len(table), axis=0)])
    timestep = [{name: state.pop(_timestep_name(name, i)) for name in TIMESTEP} for i in range(dit.num_embeddings)]
    for i in range(dit.depth):
        k = i if dit.separate_embeddings else 0
        block = {TABLE: table[:, k], **timestep[k]}
        state |= {f"transformer_blocks.{i}.norm1.emb.{name}": value for name, value in block.items()}
    return state
