"""A run from top to bottom: data, autoencoder, latents, diffusion model, samples, evaluation, report.

Each stage writes its result to the run folder and skips what is there already, so that the same call resumes a run.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.config import rules as config_rules
from ldm_jax.config.fields import STAGES
from ldm_jax.data.datasets import Dataset
from ldm_jax.data.from_config import load_split
from ldm_jax.errors import InputError
from ldm_jax.evaluation import scoring
from ldm_jax.evaluation.goodput import shares
from ldm_jax.evaluation.report import write_report
from ldm_jax.pipeline.clip import clip_of
from ldm_jax.pipeline.data_record import check_unchanged, data_record
from ldm_jax.pipeline.fine_tuning import check_data
from ldm_jax.pipeline.from_run import of_classes, on_paper
from ldm_jax.pipeline.load import load_base
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.trainable import trainable_of, trained_shapes
from ldm_jax.run_folder import wandb_log
from ldm_jax.run_folder.lock import locked
from ldm_jax.run_folder.log import Log, read_metrics
from ldm_jax.run_folder.software import describe_device, software
from ldm_jax.run_folder.store import address, checkpoint_steps
from ldm_jax.run_folder.wandb_log import WandbLog
from ldm_jax.runtime.clock import Clock
from ldm_jax.runtime.files import read_json, write_json
from ldm_jax.runtime.interrupt import InterruptWatch
from ldm_jax.runtime.parallel import check_same_on_hosts, wait_for_hosts
from ldm_jax.runtime.topology import load_topology
from ldm_jax.sampling import prompt_sheets
from ldm_jax.sampling.concat_inputs import check_segments
from ldm_jax.sampling.recipe import solving_defaults
from ldm_jax.sampling.sample_images import sample_run
from ldm_jax.sampling.tables import make_table
from ldm_jax.training import clip_data, stages
from ldm_jax.training.compile_report import print_report
from ldm_jax.training.estimate import print_estimate
from ldm_jax.training.from_config import make_autoencoder_stage, make_classifier_stage, make_clip_stage
from ldm_jax.training.run import Run
from ldm_jax.training.state import state_shapes
from ldm_jax.training.text_embeddings import check_memory

DATA = "data.json"  # in the run folder: its data sets, device and command
LOCAL = "local"  # the devices of this machine, to compile for
EARLIER = "earlier"  # in it: steps and learning rates before they were changed
PLACES = ("data.dir", "data.path")  # each host may have its own copy of the data


def run(config: ConfigDict, workdir: Path, *, command: str = "", dry_run: bool = False) -> None:
    """Runs or resumes all stages of `config` in the run folder `workdir`.

    Args:
      config: a valid config (see `config.rules.validate`).
      workdir: the run folder; it may not exist yet.
      command: the command line, for the report.
      dry_run: check all inputs; compile and write nothing.

    Raises:
      InputError: data or weights are missing or do not fit, or the folder holds another run.
      RunError: a loss is not finite, or a checkpoint cannot be written.
      Interrupted: a signal stopped the run, whose state is saved.
    """
    clock = Clock()
    wandb_log.check(config.wandb)
    scoring.check_weights(config.evaluation.inception_weights, "config.evaluation.inception_weights")
    recorded = config  # load_base replaces fields by those of the pretrained model
    config, base, (train_set, test_set) = _load(config, jax.device_count())
    model, params = base or on_paper(config, train_set.class_names)
    data = data_record(train_set, test_set, model.origin.fingerprint)
    if (workdir / DATA).exists():
        check_unchanged(read_json(workdir / DATA), data, f"--workdir={workdir}")
    _check(config, model, params, train_set, test_set)
    done = workdir.exists() and scoring.is_done(workdir, recorded)
    if not done:
        _check_guide(config, workdir)
    if dry_run:
        return
    earlier = _earlier_training(workdir, config)
    if done:
        print(f"All is done: {address(workdir)}/report.html")
        return
    # from here on all of them have read the folder that the primary one writes to
    check_same_on_hosts(
        {f"config.{name}": value for name, value in config_io.flatten(config).items() if name not in PLACES}
    )
    primary = jax.process_index() == 0
    if primary:
        workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir) if primary else nullcontext():
        if primary:
            about = {"device": describe_device(), "command": command, EARLIER: earlier}
            _write_records(workdir, recorded, data | about)
        logger = WandbLog(config.wandb, workdir, recorded.to_dict()) if primary and config.wandb else None
        log = Log(workdir, write=primary, clock=clock, logger=logger)
        try:
            with InterruptWatch() as watch:
                before = tuple(_with_fields(config, fields) for fields in earlier)
                job = Run(config, workdir, train_set, test_set, log, watch, base, before)
                if primary:
                    log.start(software())
                    log.upload()
                print_estimate(job)
                log.account("setup", 0)
                for name, stage in _training(config):
                    _run_timed(job, name, stage)
                watch.end_training()
                for name, stage in _results(config) if primary else ():
                    _run_timed(job, name, stage)
                if primary:
                    log("goodput", 0, **shares(read_metrics(workdir / "metrics.jsonl")))
                    write_report(workdir)
                    log.upload()
                    print(f"Done: {address(workdir)}/report.html")
                wait_for_hosts("done")  # a host that exits early makes the others fail
        finally:
            log.close()


def compile_for(config: ConfigDict, workdir: Path, target: str) -> None:
    """Compiles the training steps of `config` and prints what they need (see `compile_report`); writes nothing.

    Args:
      config, workdir: as of `run`.
      target: a TPU topology (see `topology.load_topology`), or LOCAL, the devices of this machine.

    Raises:
      InputError: as `run`; there is no such topology, or no libtpu; a batch does not divide over its devices; a step
        does not fit.
    """
    topology = None if target == LOCAL else load_topology(target)
    config, base, splits = _load(config, len(topology.devices) if topology else jax.device_count())
    model, params = base or on_paper(config, splits[0].class_names)
    _check(config, model, params, *splits)
    if base:
        base = model, jax.eval_shape(lambda tree: tree, params)
    del params  # compiling needs the memory
    print_report(Run(config, workdir, *splits, log=None, watch=None, base=base), topology)


def _load(config: ConfigDict, devices: int) -> tuple[ConfigDict, tuple[LatentDiffusion, Params] | None, list[Dataset]]:
    """The config with the fields of the pretrained model, that model or None, and the training and the test set."""
    config_rules.validate_devices(config, devices)
    base, config = load_base(config) if config.init_from else (None, config)
    train_set, test_set = (load_split(config, split) for split in (config.data.train_split, config.data.test_split))
    print(f"Data: {train_set.name}, {len(train_set):,} images to train on, {len(test_set):,} to test, "
          f"{train_set.num_classes:,} {'classes' if config.data.caption_key == 'none' else 'captions'}",
          flush=True)  # fmt: skip
    if base:
        base = of_classes(base[0], train_set.class_names), base[1]
    return config, base, [train_set, test_set]


def _earlier_training(workdir: Path, config: ConfigDict) -> list[dict[str, Any]]:
    """The steps and learning rates that a run had before those of `config`, latest last."""
    if not (workdir / "config.json").exists():
        return []
    last = config_io.training_fields(config_io.from_json(workdir / "config.json"))
    recorded = read_json(workdir / DATA).get(EARLIER, []) if (workdir / DATA).exists() else []
    now = config_io.training_fields(config)
    return [fields for fields in (*(f for f in recorded if f != last), last) if fields != now]


def _write_records(workdir: Path, config: ConfigDict, about: dict[str, Any]) -> None:
    """Writes config.json and data.json.

    Of a run that continues with other fields, data.json first: it has the earlier fields, without which the checkpoints
    would be of another run. Of a new run config.json first, without which the folder is no run.
    """
    records = [("config.json", config.to_dict()), (DATA, about)]
    for name, record in reversed(records) if about[EARLIER] else records:
        write_json(workdir / name, record)


def _with_fields(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    changed = config.copy_and_resolve_references().unlock()
    changed.update_from_flattened_dict(fields)
    return changed.lock()


def _training(config: ConfigDict) -> Iterator[tuple[str, Callable[[Run], None]]]:
    """The stages of training in order, by name."""
    names = config.stages
    if "autoencoder" in names and config.autoencoder.type != "none":
        yield "autoencoder", stages.train_autoencoder
        yield "latents", stages.measure_latents
    if "clip" in names:
        yield "clip", stages.train_clip
    if "diffusion" in names:
        yield "diffusion", stages.train_diffusion
    if "classifier" in names:
        yield "classifier", stages.train_classifier


def _results(config: ConfigDict) -> Iterator[tuple[str, Callable[[Run], None]]]:
    """The stages after training, of the primary host alone: samples and scores."""
    if "diffusion" in config.stages:
        yield "sampling", lambda job: sample_run(job.workdir, job.sampling_set)
        if config_rules.text_conditioned(config):
            yield "prompts", lambda job: prompt_sheets.sample_sheets(job.workdir, job.train_set, job.test_set)
    yield "scoring", lambda job: scoring.score_run(job.workdir, job.train_set, job.test_set)


def _run_timed(job: Run, name: str, stage: Callable[[Run], None]) -> None:
    """Runs a stage; logs and prints its seconds and those of compiling."""
    start, compiling = time.monotonic(), job.log.clock.compiler.seconds
    stage(job)
    job.log.account(name, 0)
    job.log.upload()
    seconds, compiling = time.monotonic() - start, job.log.clock.compiler.seconds - compiling
    if jax.process_index() == 0:
        print(f"{name:>12} took {seconds:.0f} s, {compiling:.0f} s of it compiling", flush=True)


def _check(config: ConfigDict, model: LatentDiffusion, params: Params, train_set: Dataset, test_set: Dataset) -> None:
    """Raises InputError, before anything is compiled, if a model is missing or does not fit the data; prints sizes."""
    check_segments(model, train_set)
    if config.init_from:
        check_data(config, model, params, train_set)
        check_memory(model, params, train_set.captions, config)
    if "autoencoder" in config.stages and config.autoencoder.checkpoint and model.first_stage.module is not None:
        stages.reused_autoencoder(config)
        stages.reused_scale(config)
        stages.note_unfinished(config, "autoencoder")
    if "clip" in config.stages:
        clip_data.check(config)
        if config.clip.checkpoint:
            stages.note_unfinished(config, "clip")
        scoring.zero_shot_classes(config)
    print_sizes(config, model, params, train_set.num_classes)
    scored = "diffusion" in config.stages and not config.init_from and config.sampling.num
    if scored and (line := scoring.scores_left_out(config.sampling.num, config, train_set, test_set)):
        print(line, flush=True)


def _check_guide(config: ConfigDict, workdir: Path) -> None:
    """Raises InputError if a run is past the step of its guide model and has no checkpoint of it."""
    step, steps = config.sampling.guide_step, sorted(checkpoint_steps(workdir / "diffusion"))
    guided = "diffusion" in config.stages and 0 < step < config.diffusion.steps
    if guided and step not in steps and step < max(steps, default=0):
        kept = f"the run has no checkpoint of it, but of {', '.join(map(str, steps))}"
        raise InputError(f"config.sampling.guide_step is {step}; {kept}: it must be one of these, or 0")


def print_sizes(config: ConfigDict, model: LatentDiffusion, params: Params, num_classes: int) -> None:
    """Prints the number of trained parameters of each stage's networks; `params` may be shapes.

    Raises InputError if a network or the solver's table cannot be built.
    """
    try:
        shapes = _trained_shapes(config, model, params, num_classes)
        if "diffusion" in config.stages:
            make_table(model, solving_defaults(model, model.defaults.sampler))
    except ValueError as error:
        raise InputError(f"config: {error}") from error
    for stage, networks in shapes.items():
        for name, tree in networks.items():
            print(f"{stage:>12} {name}: {sum(leaf.size for leaf in jax.tree.leaves(tree)):,} parameters", flush=True)


def _trained_shapes(config: ConfigDict, model: LatentDiffusion, params: Params, num_classes: int) -> dict[str, Any]:
    """Stage -> the shapes of its trained parameters."""
    made: dict[str, Any] = {}
    if "autoencoder" in config.stages and model.first_stage.module is not None:
        made["autoencoder"] = make_autoencoder_stage(config)
    if "clip" in config.stages:
        made["clip"] = make_clip_stage(clip_of(config), config)
    if "classifier" in config.stages:
        made["classifier"] = make_classifier_stage(model, num_classes, config)
    shapes = {name: state_shapes(stage).params for name, stage in made.items()}
    if "diffusion" in config.stages:
        shapes["diffusion"] = trained_shapes(trainable_of(config, model), params)
    return {name: shapes[name] for name in STAGES if name in shapes}
