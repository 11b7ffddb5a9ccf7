"""The LoRA of a file, added to a model's UNet and text encoders."""

from pathlib import Path

from ldm_jax.errors import InputError
from ldm_jax.interop.diffusers import mismatch
from ldm_jax.interop.lora_files import UNET, Pair, add_lora, layer_names, read_lora
from ldm_jax.models import unet
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion, Params


def with_lora(model: LatentDiffusion, params: Params, path: Path, scale: float) -> Params:
    """The parameters with a file's LoRA times `scale` added; raises InputError for a layer that the model lacks."""
    where, trees = f"--lora={path}", {UNET: params["denoiser"]}
    if isinstance(model.conditioning, TextConditioning):
        trees |= dict(zip(model.conditioning.components, params["conditioning"]))
    module = model.denoiser if isinstance(model.denoiser, unet.UNet) else None
    names = {name: layer_names(tree, module if name == UNET else None) for name, tree in trees.items()}
    found: dict[str, dict[tuple[str, ...], Pair]] = {name: {} for name in trees}
    unknown = []
    for (component, layer), pair in read_lora(path).items():
        places = [name for name in ([component] if component else trees) if layer in names.get(name, ())]
        if places:
            found[places[0]][names[places[0]][layer]] = pair
        else:
            unknown.append(f"{component} {layer}".strip())
    if unknown:
        raise InputError(f"{where} is for another model: {mismatch({'layers that --model lacks': unknown[:8]})}")
    trees = {name: add_lora(tree, found[name], scale, where=where) for name, tree in trees.items()}
    texts = [tree for name, tree in trees.items() if name != UNET]
    return params | {"denoiser": trees[UNET]} | ({"conditioning": texts} if texts else {})
