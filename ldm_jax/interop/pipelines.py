"""The supported pipeline classes of diffusers: their components and sampling defaults."""

from pathlib import Path
from typing import NamedTuple

from ldm_jax.errors import InputError
from ldm_jax.interop import folder

PIPELINE_CLASS = "LatentDiffusionPipeline"  # of the pipeline.py that ldm_jax writes into an exported folder
DIT_PIPELINE = "DiTPipeline"
RECIPE = "recipe.json"  # in such a folder: the config and data of the run
GUIDE = "guide_unet"  # in it, too: the checkpoint of an earlier step, the weaker model of autoguidance


class Components(NamedTuple):
    """The components of a pipeline class, and its defaults in diffusers."""

    encoders: tuple[str, ...]
    autoencoder: str
    guidance: float
    steps: int = 50
    schedulers: tuple[str, ...] = ("scheduler",)
    denoiser: str = "unet"


SD = Components(("text_encoder",), "vae", 7.5)
XL = Components(("text_encoder", "text_encoder_2"), "vae", 5.0)
LCM = SD._replace(guidance=8.5, steps=4)
PIPELINES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": SD,
    "LatentConsistencyModelPipeline": LCM,
    "LatentConsistencyModelImg2ImgPipeline": LCM,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL._replace(guidance=7.5),
    "StableDiffusionUpscalePipeline": SD._replace(
        guidance=9.0, steps=75, schedulers=("scheduler", "low_res_scheduler")
    ),
    "LDMPipeline": Components((), "vqvae", 1.0),
    DIT_PIPELINE: Components((), "vae", 4.0, denoiser="transformer"),
    PIPELINE_CLASS: Components((), "vae", 3.0),  # the guidance scale of CompVis's class-conditional samples
}


def read_pipeline(path: Path) -> tuple[str, Components]:
    """The pipeline class of a diffusers folder, and its components; raises InputError if it is not supported.

    Of SDXL's pipelines the first text encoder may be absent: its refiner has none.
    """
    pipeline = folder.read_settings(path).get("_class_name")
    if pipeline == ["pipeline", PIPELINE_CLASS]:  # a custom pipeline, in the file pipeline.py
        pipeline = PIPELINE_CLASS
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise InputError(f"{path} is a {pipeline}; supported are {', '.join(PIPELINES)}")
    components = PIPELINES[pipeline]
    present = tuple(name for name in components.encoders if name in folder.read_index(path))
    return pipeline, components._replace(encoders=present) if present == XL.encoders[1:] else components
