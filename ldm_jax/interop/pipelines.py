"""The pipeline classes of diffusers: their components and defaults."""

from pathlib import Path
from typing import NamedTuple

from ldm_jax.errors import InputError
from ldm_jax.interop import folder

PIPELINE_CLASS = "LatentDiffusionPipeline"  # in the folder's pipeline.py


RECIPE = "recipe.json"


class Family(NamedTuple):
    """The components of a pipeline, and what it does unless told otherwise, as in diffusers."""

    encoders: tuple[str, ...]
    autoencoder: str
    guidance: float
    steps: int = 50
    schedulers: tuple[str, ...] = ("scheduler",)


SD = Family(("text_encoder",), "vae", 7.5)


XL = Family(("text_encoder", "text_encoder_2"), "vae", 5.0)


PIPELINES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": SD,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL._replace(guidance=7.5),
    "StableDiffusionUpscalePipeline": SD._replace(
        guidance=9.0, steps=75, schedulers=("scheduler", "low_res_scheduler")
    ),
    "LDMPipeline": Family((), "vqvae", 1.0),
    PIPELINE_CLASS: Family((), "vae", 3.0),  # the guidance that CompVis drew their model's pictures with
}


def family_of(path: Path) -> tuple[str, Family]:
    """The class of a folder's pipeline, and what that has; raises InputError for one that is not supported."""
    pipeline = folder.read_settings(path).get("_class_name")
    if pipeline == ["pipeline", PIPELINE_CLASS]:  # its own, in the file pipeline.py
        pipeline = PIPELINE_CLASS
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise InputError(f"{path} is a {pipeline}; supported are {', '.join(PIPELINES)}")
    return pipeline, PIPELINES[pipeline]
