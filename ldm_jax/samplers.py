"""What a trained model draws with: its generator, compiled once, and its solver tables."""

from typing import Any

from ml_collections import ConfigDict

from ldm_jax import builders, pretrained
from ldm_jax.diffusion.solvers import make_inversion_table, make_table
from ldm_jax.diffusion.tables import Table, with_resampling
from ldm_jax.errors import InputError
from ldm_jax.first_stage import make_first_stage
from ldm_jax.generate import Generator, make_generator
from ldm_jax.guides import NO_GUIDES, Guides, make_similarity
from ldm_jax.pretrained import Pretrained
from ldm_jax.text_condition import make_class_tau, make_tau
from ldm_jax.tiling import tiled
from ldm_jax.trained import Trained

SNAPSHOTS = 24  # frames of denoising.gif


def generator_of(model: Trained, batch_size: int, guides: Guides = NO_GUIDES, *, vae_tiling: bool = False) -> Generator:
    """The generator of a trained model; `vae_tiling`: the autoencoder of a diffusers model works in tiles."""
    if model.pretrained:
        shape = builders.latent_shape(model.config)
        return _pretrained_generator(model.pretrained, shape, batch_size, guides, vae_tiling)
    return build_generator(model.config, len(model.class_names), batch_size, guides)


def build_generator(config: ConfigDict, num_classes: int, batch_size: int, guides: Guides = NO_GUIDES) -> Generator:
    """The generator of a config (see `generate.make_generator`)."""
    tau, null = builders.build_tau(config, num_classes)
    return make_generator(
        unet=builders.build_unet(config),
        tau=tau,
        null=null,
        map_condition=builders.build_map_condition(config),
        first_stage=builders.build_first_stage(config),
        latent_shape=builders.latent_shape(config),
        alpha_bar=builders.build_schedule(config).alpha_bar,
        prediction=config.diffusion.prediction,
        pixels=config.autoencoder.kind == "none",
        batch_size=batch_size,
        snapshots=SNAPSHOTS,
        classify=builders.build_classify(guides.classifier.config, num_classes) if guides.classifier else None,
        similarity=make_similarity(guides.clip) if guides.clip else None,
    )


def _pretrained_generator(
    model: Pretrained, latent_shape: tuple[int, int, int], batch_size: int, guides: Guides, vae_tiling: bool
) -> Generator:
    """Noise to pictures, as `generate.make_generator` makes it; raises InputError for tiles of no whole latents."""
    first_stage, scheduler = make_first_stage(model.autoencoder), pretrained.scheduler_of(model)
    if vae_tiling:
        try:
            first_stage = tiled(first_stage, model.tile, model.autoencoder.downsampling)
        except ValueError as error:
            raise InputError(f"--vae_tiling: the autoencoder's sample_size says so, but {error}") from error
    classes = model.classes
    return make_generator(
        unet=model.unet,
        tau=make_class_tau(classes) if classes else make_tau(model.encoders, upscales=model.upscaling is not None),
        null=None if model.encoders else classes.null if classes else 0,
        map_condition=pretrained.map_condition_of(model, first_stage, latent_shape),
        first_stage=first_stage,
        latent_shape=latent_shape,
        alpha_bar=scheduler.schedule.alpha_bar,
        prediction=scheduler.prediction,
        pixels=False,
        batch_size=batch_size,
        snapshots=SNAPSHOTS,
        similarity=make_similarity(guides.clip) if guides.clip else None,
    )


def defaults_of(model: Trained, sampler: str) -> dict[str, Any]:
    """What `sampler` is told unless the user says otherwise: the config's if it is the config's own sampler."""
    sampling = model.config.sampling
    own = {name: sampling[name] for name in ("spacing", "eta", "churn", "variance")}
    if sampler == sampling.sampler:
        return own
    plain = {"eta": 0.0, "churn": 0.0, "variance": "fixed_small"}
    options = pretrained.scheduler_of(model.pretrained, sampler).options if model.pretrained else {}
    return own | plain | {name: value for name, value in options.items() if name in own}


def table_of(model: Trained, **choices: Any) -> Table:
    """The solver table of a trained model; choices and errors as in `build_table`."""
    if not model.pretrained:
        return build_table(model.config, **choices)
    sampler, steps, resample, jump = (choices.pop(name) for name in ("sampler", "steps", "resample", "jump"))
    return _resampled(pretrained.scheduler_of(model.pretrained, sampler).table(steps, **choices), resample, jump)


def build_table(config: ConfigDict, *, resample: int = 1, jump: int = 1, **changes: object) -> Table:
    """The solver table of `config.sampling`, with `changes`: `sampler` and arguments of `make_table`.

    `resample` and `jump` are RePaint's: see `with_resampling`.

    Raises:
      InputError: a combination that the solver does not take.
    """
    names = ("sampler", "steps", "eta", "churn", "variance", "spacing")
    fields = {name: config.sampling[name] for name in names} | changes
    if fields["variance"] == "learned" and config.diffusion.variance != "learned":
        raise InputError(
            "sampling: variance learned needs a model trained with --config.diffusion.variance=learned; this one's is "
            "fixed, choose fixed_small or fixed_large"
        )
    try:
        table = make_table(
            fields.pop("sampler"),
            builders.build_schedule(config),
            fields.pop("steps"),
            prediction=config.diffusion.prediction,
            **fields,
        )
    except ValueError as error:
        raise InputError(f"sampling: {error}") from error
    return _resampled(table, resample, jump)


def _resampled(table: Table, times: int, jump: int) -> Table:
    try:
        return table if times == 1 else with_resampling(table, times, jump)
    except ValueError as error:
        raise InputError(f"sampling: {error}") from error


def inversion_table_of(model: Trained, steps: int, spacing: str) -> Table:
    """The table that leads from clean latents to their noise in `steps` steps of DDIM; raises InputError."""
    if model.pretrained:
        schedule = pretrained.scheduler_of(model.pretrained).schedule
    else:
        schedule = builders.build_schedule(model.config)
    try:
        return make_inversion_table(schedule, steps, spacing=spacing)
    except ValueError as error:
        raise InputError(f"inversion: {error}") from error
