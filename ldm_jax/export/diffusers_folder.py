"""Models written to new folders: for diffusers and transformers to open, and what was a run of ours as a run again."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.export import model_card
from ldm_jax.export.latents_scaling import into_autoencoder
from ldm_jax.interop import class_table, folder, pipelines
from ldm_jax.interop.clip_weights import config_from_text_encoder, state_dict_from_text_params
from ldm_jax.interop.config_fields import hints
from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.interop.modules import VERSION, config_from_autoencoder, config_from_unet
from ldm_jax.interop.pipelines import PIPELINE_CLASS
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline import from_diffusers, from_run
from ldm_jax.pipeline import model as pipeline_model
from ldm_jax.pipeline.from_exported import Exported
from ldm_jax.pipeline.model import Pretrained
from ldm_jax.pipeline.scheduler_config import scheduler_config
from ldm_jax.run_folder import checkpoint
from ldm_jax.run_folder.checkpoint import Checkpoints, load_latest
from ldm_jax.runtime.files import read_json, write_json

# The class that diffusers draws a run of ours with, and the file that has it: for PyTorch, nothing here imports it.
PIPELINE = Path(__file__).with_name("latent_diffusion_pipeline.py")

# What is copied of a diffusers folder beside the model: words on it, and under what terms it may be used.
WORDS = ("README*", "LICENSE*", "LICENCE*")


def write_pretrained(
    to: Path,
    model: Pretrained,
    params: Mapping[str, Any],
    *,
    size: tuple[int, int],
    told: Mapping[str, dict[str, Any]],
) -> None:
    """Writes Stable Diffusion and its kin, but for models of classes, as a diffusers folder.

    Args:
      to: a new folder.
      model, params: as of `pretrained_files.load`. The parameters are written in their own type.
      size: (height, width) of the latents.
      told: component -> fields of its config.json that change nothing here (see `config_fields.hints`), if known.
    """
    family = pipelines.PIPELINES[model.pipeline]
    scaling, side = (params["shift"], params["scale"]), size[0] if size[0] == size[1] else list(size)
    parts = {
        "unet": (config_from_unet(model.unet, side), params["unet"]),
        family.autoencoder: (
            config_from_autoencoder(model.autoencoder, *scaling, model.tile),
            params["autoencoder"],
        ),
    }
    index = {"_class_name": model.pipeline, "_diffusers_version": VERSION}
    for name, (config, tree) in parts.items():
        folder.write_component(to / name, config | told.get(name, {}), state_dict_from_params(tree))
        index[name] = ["diffusers", config["_class_name"]]
    index |= _write_texts(to, family.encoders, model, params["conditioner"])
    schedulers = {"scheduler": model.scheduler}
    if model.upscaling:
        schedulers["low_res_scheduler"] = model.upscaling.scheduler
        index |= {"max_noise_level": model.upscaling.max_noise_level}
        index |= {name: [None, None] for name in (*folder.SKIPPED, "watermarker")}
    elif len(family.encoders) == 1:  # what judges pictures is no part of the model
        index |= {name: [None, None] for name in folder.SKIPPED} | {"requires_safety_checker": False}
    elif family.encoders:
        index["force_zeros_for_empty_prompt"] = model.zeros_for_nothing
    for name, config in schedulers.items():
        write_json(to / name / "scheduler_config.json", dict(config))
        index[name] = ["diffusers", config["_class_name"]]
    write_json(to / folder.INDEX, index)


def _write_texts(to: Path, names: tuple[str, ...], model: Pretrained, params: Sequence[Any]) -> dict[str, list[str]]:
    """Writes the text encoders with their tokenizers; gives their entries in the index."""
    index = {}
    for name, encoder, tokenizer, tree in zip(names, model.encoders, model.tokenizers, params, strict=True):
        state, tokenizer_name = state_dict_from_text_params(tree), name.replace("text_encoder", "tokenizer")
        config = config_from_text_encoder(encoder)
        config["dtype"] = str(next(iter(state.values())).dtype)
        folder.write_component(to / name, config, state)
        tokenizer.save(to / tokenizer_name)
        index |= {name: ["transformers", config["architectures"][0]], tokenizer_name: ["transformers", "CLIPTokenizer"]}
    return index


def write_pretrained_anew(path: Path, to: Path, model: pipeline_model.Trained) -> None:
    """Writes what was read from `path`, if that is a diffusers folder with its words on it; `to` is a new folder."""
    told, words = {}, []
    if from_diffusers.is_folder(path):
        for name in ("unet", pipelines.PIPELINES[model.pretrained.pipeline].autoencoder):
            config = folder.component_config(path, name)
            told[name] = hints(config, config["_class_name"])
        words = sorted(file for pattern in WORDS for file in path.glob(pattern) if file.is_file())
    size = pipeline_from_config.latent_shape(model.config)[:2]
    if model.pretrained.classes:
        _write_classes(to, model, told)
    else:
        own = "clip" in model.config.get("stages", ())  # its latents have a scale for each channel
        params = into_autoencoder(model.params) if own else model.params
        write_pretrained(to, model.pretrained, params, size=size, told=told)
    for file in words:
        shutil.copyfile(file, to / file.name)


def _write_classes(to: Path, model: pipeline_model.Trained, told: Mapping[str, dict[str, Any]]) -> None:
    """Writes a class-conditional model as `class_folder` reads it; `told` as in `write_pretrained`."""
    theirs, params, tokens = model.pretrained, model.params, model.pretrained.classes.tokens
    table = params["conditioner"]["embedding"]["embedding"]
    fields = config_from_unet(theirs.unet, pipeline_from_config.latent_shape(model.config)[0])
    fields |= class_table.fields_of(len(table) * tokens) | told.get("unet", {})
    state = state_dict_from_params(params["unet"]) | class_table.projection_of(table, theirs.classes.dim)
    folder.write_component(to / "unet", fields, state)
    vae = config_from_autoencoder(theirs.autoencoder, *_in_vae(model), theirs.tile) | told.get("vae", {})
    folder.write_component(to / "vae", vae, state_dict_from_params(params["autoencoder"]))
    classes = {"unet": fields, "vae": vae, "scheduler": theirs.scheduler}
    # A run that was fine-tuned has names for those that it was trained on.
    names = (*model.class_names, *theirs.class_names[len(model.class_names) :])
    of_class = {name: config["_class_name"] for name, config in classes.items()}
    _write_pipeline(to, of_class, _how_it_draws(model, names, tokens))
    (to / "README.md").write_text(model_card.of_classes(names, pipeline_from_config.picture_size(model.config)))
    write_json(to / "scheduler" / "scheduler_config.json", dict(theirs.scheduler))


def _write_pipeline(to: Path, classes: Mapping[str, str | None], settings: Mapping[str, Any]) -> None:
    """Writes pipeline.py and the index of such a folder, whose components are of these classes; None = absent."""
    index = {"_class_name": ["pipeline", PIPELINE_CLASS], "_diffusers_version": VERSION}
    index |= {name: ["diffusers", kind] if kind else [None, None] for name, kind in classes.items()}
    write_json(to / folder.INDEX, index | settings)
    shutil.copyfile(PIPELINE, to / "pipeline.py")


def write_run_for_diffusers(path: Path, to: Path, model: pipeline_model.Trained, dtype: str) -> None:
    """Writes the run of ours that was read from `path` as a diffusers folder (see `exported`); `to` is a new folder.

    Args:
      path: a run folder.
      to: where it goes.
      model: what `trained.load` read of it.
      dtype: that its parameters are written in, float32 or bfloat16.
    """
    config, data = model.config, read_json(path / "data.json")
    scheduler, notes = scheduler_config(config)
    classes = {"unet": _write_unet(to / "unet", model, dtype), "vae": None, "scheduler": scheduler["_class_name"]}
    if config.autoencoder.kind != "none":
        classes["vae"] = _write_autoencoder(to / "vae", model, dtype)
    write_json(to / "scheduler" / "scheduler_config.json", scheduler)
    draws, known = _how_it_draws(model, model.class_names, config.unet.context_tokens), _how_it_is_told(config)
    _write_pipeline(to, classes, draws | known)
    recipe = {"config": config_io.from_json(path / "config.json").to_dict(), "data": data, "step": model.step}
    write_json(to / pipelines.RECIPE, recipe | _about_first_stage(path, config))
    if "classifier" in config.stages:
        notes.append("The run's classifier of noisy latents is left out.")
    evaluation = read_json(path / "evaluation.json") if (path / "evaluation.json").exists() else {}
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(model.params[name])) for name in ("autoencoder", "unet")}
    (to / "README.md").write_text(model_card.of_run(config, data, model.step, counts, evaluation, notes, known))


def _write_unet(to: Path, model: pipeline_model.Trained, dtype: str) -> str:
    """With tau(y) in it; returns its class."""
    config, params = model.config, model.params
    fields = config_from_unet(pipeline_from_config.build_unet(config), pipeline_from_config.latent_shape(config)[0])
    rows = (len(model.class_names) + 1) * config.unet.context_tokens
    fields |= class_table.fields_of(rows)
    table = params["conditioner"]["embedding"]["embedding"]
    state = state_dict_from_params(params["unet"]) | class_table.projection_of(table, config.unet.context_dim)
    folder.write_component(to, fields, _cast(state, dtype))
    return fields["_class_name"]


def _write_autoencoder(to: Path, model: pipeline_model.Trained, dtype: str) -> str:
    """Returns its class."""
    autoencoder = pipeline_from_config.build_autoencoder(model.config)
    fields = config_from_autoencoder(autoencoder, *_in_vae(model), model.config.data.image_size)
    folder.write_component(to, fields, _cast(state_dict_from_params(model.params["autoencoder"]), dtype))
    return fields["_class_name"]


def _in_vae(model: pipeline_model.Trained) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale in vae/: a VQModel in diffusers has no fields for what model_index.json says of the latents."""
    shift, scale = model.params["shift"], model.params["scale"]
    return (np.zeros_like(shift), np.ones_like(scale)) if model.config.autoencoder.kind == "vq" else (shift, scale)


def _how_it_draws(model: pipeline_model.Trained, names: Sequence[str], tokens: int) -> dict[str, Any]:
    """The arguments of LatentDiffusionPipeline beside the components."""
    sampling = model.config.sampling
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "class_tokens": tokens,
        "latents_shift": model.params["shift"].tolist(),
        "latents_scale": model.params["scale"].tolist(),
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "guidance_interval": list(sampling.guidance_interval),
        "guidance_rescale": sampling.guidance_rescale,
        "eta": sampling.eta,
    }


def _how_it_is_told(config: ConfigDict) -> dict[str, Any]:
    """The pipeline's arguments for the map beside the latents, if there is one."""
    condition, (height, width) = (
        pipeline_from_config.build_map_condition(config),
        pipeline_from_config.picture_size(config),
    )
    if condition is None:
        return {}
    factor = config.concat.factor if config.concat.kind == "low_resolution" else 1
    return {
        "map_kind": config.concat.kind,
        "map_channels": condition.channels,
        "map_size": [height // factor, width // factor],
    }


def _about_first_stage(path: Path, config: ConfigDict) -> dict[str, Any]:
    if config.autoencoder.kind == "none":
        return {"autoencoder_step": 0, "measured_on": ""}
    step = int(load_latest(path / "autoencoder")["step"])
    return {"autoencoder_step": step, "measured_on": from_run.load_scale(path)[2]}


def _cast(state: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    return {name: array.astype(jnp.dtype(dtype), copy=False) for name, array in state.items()}


def write_run(to: Path, found: Exported) -> None:
    """Writes what was a run of ours as a run folder again: what draws and is scored, not what would train on."""
    config, params = found.config, found.params
    write_json(to / "config.json", config.to_dict())
    write_json(to / "data.json", found.data)
    if config.autoencoder.kind != "none":
        with _checkpoints(to / "autoencoder", config, checkpoint.AUTOENCODER_FIELDS) as checkpoints:
            ema_params = {"autoencoder": params["autoencoder"]}
            checkpoints.save({"step": np.int32(found.autoencoder_step), "ema_params": ema_params})
        from_run.save_scale(to, params["shift"], params["scale"], measured_on=found.measured_on)
    with _checkpoints(to / "diffusion", config, checkpoint.IDENTITY_FIELDS["diffusion"]) as checkpoints:
        ema_params = {name: params[name] for name in ("unet", "conditioner")}
        checkpoints.save({"step": np.int32(found.step), "ema_params": ema_params})


def _checkpoints(path: Path, config: ConfigDict, fields: tuple[str, ...]) -> Checkpoints:
    return Checkpoints(path, keep=1, identity={"config": config_io.identity(config, fields)})
