"""Models written as diffusers folders."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.config import io as config_io
from ldm_jax.errors import InputError
from ldm_jax.export import dit_pipeline, model_card
from ldm_jax.export.latents_scaling import into_autoencoder
from ldm_jax.interop import class_table, folder
from ldm_jax.interop.clip_weights import config_from_text_encoder, state_dict_from_text_params
from ldm_jax.interop.config_fields import ignored_fields
from ldm_jax.interop.diffusers import cast, state_dict_from_params
from ldm_jax.interop.flow_schedulers import is_flow
from ldm_jax.interop.modules import TRANSFORMERS, VERSION, config_from_autoencoder, config_from_unet
from ldm_jax.interop.pipelines import DIT_PIPELINE, GUIDE, PIPELINE_CLASS, PIPELINES, RECIPE
from ldm_jax.models.concat_conditioning import Inpainting, LowResolution, Segmentation
from ldm_jax.models.conditioning import ClassConditioning, TextConditioning
from ldm_jax.models.dit import DiT
from ldm_jax.pipeline.from_diffusers import DEFAULTS
from ldm_jax.pipeline.from_run import load_scale
from ldm_jax.pipeline.load import load_guide
from ldm_jax.pipeline.model import LatentDiffusion, Params, Solver
from ldm_jax.pipeline.scheduler import flow_spacing, scheduler_of_run
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.runtime.files import read_json, write_json

# The custom pipeline, in PyTorch, of class-conditional models; nothing here imports it.
PIPELINE = Path(__file__).with_name("latent_diffusion_pipeline.py")

# Model card and licence, which are copied from a diffusers folder.
DOCUMENTS = ("README*", "LICENSE*", "LICENCE*")

CONCAT_TYPES = {LowResolution: "low_resolution", Inpainting: "inpainting", Segmentation: "segments"}

Index = dict[str, list[str | None]]  # component -> library and class


def write_diffusers(model: LatentDiffusion, params: Params, to: Path, *, dtype: str = "float32") -> list[str]:
    """Writes a model as a diffusers folder.

    A class-conditional or unconditional model of a run becomes a LatentDiffusionPipeline, with its pipeline.py in the
    folder; the pipelines of all others, DiT among them, are diffusers' own. The folder `to` is new; `dtype` of the
    weights is float32 or bfloat16. Returns notes for the user, but those in the model card.

    Raises InputError for a MeanFlow model, for a DiT that diffusers does not have, see `dit_pipeline.check`, and for
    weights beyond the range of `dtype`.
    """
    if model.mean_flow:
        raise InputError("a MeanFlow model cannot be written for diffusers, which has no pipeline with its intervals")
    is_dit, source = isinstance(model.denoiser, DiT), model.origin.path
    if is_dit:
        dit_pipeline.check(model)
    custom = isinstance(model.conditioning, ClassConditioning) and not is_dit
    ignored, documents = {}, []
    pipeline = PIPELINE_CLASS if custom else DIT_PIPELINE if is_dit else model.origin.pipeline
    per_channel = np.ptp(params["scale"]) or np.any(params["shift"])  # of an autoencoder of ours
    if (is_dit or isinstance(model.conditioning, TextConditioning)) and per_channel:
        params = into_autoencoder(params)
    params = {**params, "scale": params["scale"] * np.float32(model.sigma_data)}  # as the scheduler there divides by it
    if source is not None and (source / folder.INDEX).is_file():
        for name in (PIPELINES[pipeline].denoiser, PIPELINES[pipeline].autoencoder):
            fields = folder.component_config(source, name)
            class_name = fields["_class_name"]
            ignored[name] = ignored_fields(fields, TRANSFORMERS[0] if class_name in TRANSFORMERS else class_name)
        documents = sorted(file for pattern in DOCUMENTS for file in source.glob(pattern) if file.is_file())
    write_denoiser = dit_pipeline.write_transformer if is_dit else _write_unet
    index = write_denoiser(to, model, params, dtype, ignored.get(PIPELINES[pipeline].denoiser, {}))
    config = model.origin.config
    recorded = custom and config is not None and not config.init_from  # with a recipe.json
    guide = load_guide(model) if recorded else None
    if guide is not None:
        index |= _write_unet(to, model, guide, dtype, {}, name=GUIDE)
    index |= _write_autoencoder(to, model, params, dtype, pipeline, ignored)
    index |= _write_text_encoders(to, model, params, dtype)
    schedulers, notes = model.origin.schedulers, []
    if not schedulers:
        scheduler, notes = scheduler_of_run(config, pipeline)
        schedulers = {"scheduler": scheduler}
    if guide is None and 0 < model.defaults.guide_step < model.origin.step:
        step = f"the checkpoint of step {model.defaults.guide_step:,}"
        notes = [*notes, f"By classifier-free guidance instead of autoguidance by {step}."]
    for name, fields in schedulers.items():
        write_json(to / name / "scheduler_config.json", dict(fields))
        index[name] = ["diffusers", fields["_class_name"]]
    header = {"_class_name": ["pipeline", PIPELINE_CLASS] if custom else pipeline, "_diffusers_version": VERSION}
    if custom:
        settings = _settings(model, params) | _flow_settings(model, schedulers)
    else:
        settings = _labels(model) if is_dit else _missing(model)
    write_json(to / folder.INDEX, header | index | settings)
    if custom:
        shutil.copyfile(PIPELINE, to / "pipeline.py")
        _write_documents(to, model, params, notes, guided=guide is not None)
    for file in documents:
        shutil.copyfile(file, to / file.name)
    return [] if recorded else notes


def _write_unet(
    to: Path, model: LatentDiffusion, params: Params, dtype: str, ignored: Mapping[str, Any], name: str = "unet"
) -> Index:
    """Writes the UNet, with the class embedding in it; returns its entry in the index."""
    height, width, _ = model.latent_shape
    fields = config_from_unet(model.denoiser, height if height == width else [height, width])
    state, conditioning = state_dict_from_params(params["denoiser"]), model.conditioning
    if isinstance(conditioning, ClassConditioning):
        table = params["conditioning"]["embedding"]["embedding"]
        fields |= class_table.config_fields(len(table) * conditioning.embedder.tokens)
        state |= class_table.projection_weights(table, conditioning.embedder.dim)
    folder.write_component(to / name, fields | ignored, cast(state, dtype))
    return {name: ["diffusers", fields["_class_name"]]}


def _write_autoencoder(
    to: Path, model: LatentDiffusion, params: Params, dtype: str, pipeline: str, ignored: Mapping[str, Any]
) -> Index:
    """Writes the autoencoder; returns its entry in the index, empty for a model of pixels."""
    name, first_stage = PIPELINES[pipeline].autoencoder, model.first_stage
    if first_stage.module is None:
        return {name: [None, None]}
    shift, scale = params["shift"], params["scale"]
    if pipeline == PIPELINE_CLASS and not first_stage.stochastic:  # a VQModel; model_index.json has the scaling
        shift, scale = np.zeros_like(shift), np.ones_like(scale)
    config = config_from_autoencoder(first_stage.module, shift, scale, first_stage.sample_size)
    state = cast(state_dict_from_params(params["first_stage"]), dtype)
    folder.write_component(to / name, config | ignored.get(name, {}), state)
    return {name: ["diffusers", config["_class_name"]]}


def _write_text_encoders(to: Path, model: LatentDiffusion, params: Params, dtype: str) -> Index:
    """Writes the text encoders with their tokenizers; returns their entries in the index."""
    conditioning, index = model.conditioning, {}
    if not isinstance(conditioning, TextConditioning):
        return index
    parts = conditioning.encoders, conditioning.tokenizers, params["conditioning"]
    for name, encoder, tokenizer, tree in zip(conditioning.components, *parts, strict=True):
        state = cast(state_dict_from_text_params(tree), dtype)
        tokenizer_name = name.replace("text_encoder", "tokenizer")
        config = config_from_text_encoder(encoder) | {"dtype": str(next(iter(state.values())).dtype)}
        folder.write_component(to / name, config, state)
        tokenizer.save(to / tokenizer_name)
        index |= {name: ["transformers", config["architectures"][0]], tokenizer_name: ["transformers", "CLIPTokenizer"]}
    return index


def _missing(model: LatentDiffusion) -> dict[str, Any]:
    """The index's entries of absent components, and the pipeline's options."""
    conditioning, skipped = model.conditioning, {name: [None, None] for name in folder.SKIPPED}
    if isinstance(model.concat, LowResolution):
        return {"max_noise_level": model.concat.noise.max_noise_level} | skipped | {"watermarker": [None, None]}
    if not isinstance(conditioning, TextConditioning):
        return {}
    if not conditioning.time_ids:
        return skipped | {"requires_safety_checker": False}
    options = {"force_zeros_for_empty_prompt": conditioning.force_zeros_for_empty_prompt}
    if "text_encoder" not in conditioning.components:
        options |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    score = conditioning.time_ids == "aesthetic_score"
    return options | ({"requires_aesthetics_score": True} if score else {})


def _labels(model: LatentDiffusion) -> dict[str, dict[str, str]]:
    """The class names in model_index.json."""
    names = (*model.class_names, *model.origin.other_class_names)
    return {"id2label": {str(label): name for label, name in enumerate(names)}}


def _settings(model: LatentDiffusion, params: Params) -> dict[str, Any]:
    """The arguments of LatentDiffusionPipeline without the components."""
    defaults, embedder = model.defaults, model.conditioning.embedder
    solver = defaults.solvers[defaults.sampler]
    own = solver.options if isinstance(solver, Solver) else {}
    stated = {argument: defaults._asdict().get(field, own.get(field, 0.0)) for field, argument in DEFAULTS.items()}
    return {
        **_labels(model),
        "class_tokens": embedder.tokens,
        "latents_shift": params["shift"].tolist(),
        "latents_scale": params["scale"].tolist(),
        **stated,
        "guidance_interval": list(defaults.guidance_interval),
        **_concat_settings(model),
    }


def _flow_settings(model: LatentDiffusion, schedulers: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of LatentDiffusionPipeline for rectified flow; {} of other models."""
    if not is_flow(schedulers["scheduler"]):
        return {}
    solver = model.defaults.solvers[model.defaults.sampler]
    spacing = solver.options["spacing"] if isinstance(solver, Solver) else "flow"
    return {"timestep_offset": model.time_offset - 1, "timestep_spacing": flow_spacing(spacing)}


def _concat_settings(model: LatentDiffusion) -> dict[str, Any]:
    """The arguments of LatentDiffusionPipeline for concat conditioning; {} without it."""
    if model.concat is None:
        return {}
    factor = model.concat.factor if isinstance(model.concat, LowResolution) else 1
    return {
        "map_kind": CONCAT_TYPES[type(model.concat)],
        "map_channels": model.concat.channels,
        "map_size": [side // factor for side in model.image_shape[:2]],
    }


def _write_documents(to: Path, model: LatentDiffusion, params: Params, notes: list[str], *, guided: bool) -> None:
    """Writes the model card and, of a run trained from scratch, recipe.json, which restores the run folder.

    `guided`: whether the folder has the weaker model of autoguidance.
    """
    config, path = model.origin.config, model.origin.path
    if config is None or config.init_from:
        names = (*model.class_names, *model.origin.other_class_names)
        (to / "README.md").write_text(model_card.of_classes(names, model.image_shape[:2]))
        return
    data = read_json(path / "data.json")
    fields = config_io.from_json(path / "config.json").to_dict()
    fields["sampling"]["guide_step"] *= guided
    record = {"config": fields, "data": data, "step": model.origin.step}
    autoencoder = {"autoencoder_step": 0, "measured_on": ""}
    if model.first_stage.module is not None:
        step = int(load_latest(path / "autoencoder")["step"])
        autoencoder = {"autoencoder_step": step, "measured_on": load_scale(path)[2]}
    write_json(to / RECIPE, record | autoencoder)
    if "classifier" in config.stages:
        notes = [*notes, "The run's classifier of noisy latents is left out."]
    ema_sigma_rel, scores = model.origin.ema_sigma_rel, path / "evaluation.json"
    evaluation = read_json(scores) if scores.exists() and ema_sigma_rel is None else {}  # they are of the EMA
    names = {"autoencoder": "first_stage", "unet": "denoiser"}
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(params[name])) for part, name in names.items()}
    concat = _concat_settings(model)
    card = model_card.of_run(config, data, model.origin.step, counts, evaluation, notes, concat, ema_sigma_rel, guided)
    (to / "README.md").write_text(card)
