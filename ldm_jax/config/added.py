"""Config fields added since version 0.2, each with the value that a config without it stands for.

Such a value is the behaviour of the versions without the field. It never changes, whatever becomes of the default in
`defaults`: a saved config that lacks the field means it (see `with_added`), and hashes leave out fields that have it
(see `io.identity`), so that older runs go on and their caches and checkpoints stay valid.
"""

from typing import Any

# The full name of a field -> its value; a field that is renamed is renamed here, too.
ADDED: dict[str, Any] = {
    "wandb": "",
    "textual_inversion.token": "",
    "textual_inversion.init_word": "object",
    "textual_inversion.vectors": 1,
    "textual_inversion.learnable_property": "object",
    "diffusion.objective": "diffusion",
    "mean_flow.interval_ratio": 0.25,
    "mean_flow.guidance": 1.0,
    "mean_flow.kappa": 0.0,
    "mean_flow.tangent": "sample",
    "mean_flow.adaptive_power": 1.0,
    "consistency.guidance_min": 6.0,
    "consistency.guidance_max": 16.0,
    "consistency.huber_c": 1e-3,
    "autoencoder.loss.perceptual_start": 0,
    "diffusion.timestep_sampling": "uniform",
    "diffusion.timestep_mean": 0.0,
    "diffusion.timestep_std": 1.0,
    "diffusion.timestep_shift": 1.0,
    "diffusion.ema_sigma_rels": (),
    "diffusion.ema_snapshot_every": 1_000,
    **{f"{stage}.optimizer": "adamw" for stage in ("autoencoder", "clip", "diffusion", "classifier")},
    "denoiser": "unet",
    "dit.patch_size": 1,
    "dit.hidden_size": 128,
    "dit.depth": 6,
    "dit.heads": 4,
    "dit.mlp_ratio": 4.0,
    "dit.norm": "layer",
    "dit.qk_norm": "none",
    "parallel.engine": "pmap",
    "parallel.fsdp": 0,
    "parallel.accumulate": 1,
    "parallel.remat": False,
    "sampling.guide_step": 0,
}

# The sections that are new; a config that lacks another section is of a version before 0.2.
ADDED_SECTIONS = ("textual_inversion", "parallel", "mean_flow", "consistency", "dit")

# The sections that every config of ldm_jax has had since the first version.
REQUIRED_SECTIONS = ("data", "autoencoder", "diffusion", "unet", "sampling", "evaluation")


def is_config(fields: dict[str, Any]) -> bool:
    """Whether nested fields are those of a config of ldm_jax, of any version."""
    return all(isinstance(fields.get(name), dict) for name in REQUIRED_SECTIONS)


def with_added(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved config with those of ADDED that it lacks; what is no config is not changed."""
    if not is_config(fields):
        return fields
    for name, value in ADDED.items():
        fields = _with_default(fields, name.split("."), value)
    return fields


def _with_default(fields: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """The nested fields, with `value` at `path` if nothing is there; not in a section that is missing and not new."""
    name, *rest = path
    if not rest:
        return {name: value} | fields
    section = fields.get(name, {} if name in ADDED_SECTIONS else None)
    return fields | {name: _with_default(section, rest, value)} if isinstance(section, dict) else fields


def is_as_before(name: str, value: Any) -> bool:
    """Whether a field of ADDED, by its full name, has the value that configs without it stand for."""
    return name in ADDED and value == ADDED[name]
