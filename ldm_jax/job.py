"""The main job, top to bottom: data, autoencoder, latents, diffusion model, samples, scores, report.

Every part leaves its result in the run folder and first looks whether it is there already, so the same call again goes
on where the last one stopped.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ldm_jax.config import rules as config_rules
from ldm_jax.config.fields import STAGES
from ldm_jax.data import from_config as data_from_config
from ldm_jax.errors import InputError
from ldm_jax.evaluation import scoring
from ldm_jax.evaluation.report import write_report
from ldm_jax.interop.modules import abstract_params
from ldm_jax.pipeline import base_model, from_run, trainable
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.run_folder.log import Log
from ldm_jax.runtime import files as runtime_files
from ldm_jax.runtime.interrupt import Interrupted, InterruptWatch
from ldm_jax.runtime.parallel import wait_for_hosts
from ldm_jax.runtime.xla import CompileClock
from ldm_jax.sampling import prompt_sheets, sample_images, tables
from ldm_jax.sampling.concat_inputs import check_segments
from ldm_jax.sampling.recipe import of_config
from ldm_jax.training import clip_data, stages
from ldm_jax.training import from_config as training_from_config
from ldm_jax.training.run import Run


def run(config: ConfigDict, workdir: Path, *, command: str = "", dry_run: bool = False) -> None:
    """Runs or resumes the job of `config` in `workdir`. With `dry_run`, checks all inputs and writes nothing.

    `command` is the command line, for the report.

    Raises:
      InputError: data or weights that are missing or do not fit, another run's folder.
      RunError: a loss that is not finite, a checkpoint that cannot be written.
    """
    config_rules.validate_devices(config, jax.device_count())
    scoring.check_weights(config.evaluation.inception_weights, "config.evaluation.inception_weights")
    asked = config  # is recorded; a model that is fine-tuned has fields of its own
    base, config = base_model.load_base(asked) if asked.init_from else (None, asked)
    train_set, test_set = (
        data_from_config.load_split(config, split) for split in (config.data.train_split, config.data.test_split)
    )
    print(f"Data: {train_set.name}, {len(train_set):,} images to train on, {len(test_set):,} to test, "
          f"{train_set.num_classes:,} {'classes' if config.data.caption_key == 'none' else 'captions'}",
          flush=True)  # fmt: skip
    check_segments(config, train_set)
    describe_models(config, train_set.num_classes, base)
    if base:
        training_from_config.check_data(config, base, train_set)
        model = stages.before_fine_tuning(config, base, train_set)
        sample_images.table_for(model, of_config(model, test_set))  # for its errors, before anything is written
    if config.autoencoder.kind != "none" and config.autoencoder.checkpoint and not base:
        stages.adopted_autoencoder(config)  # for its errors, before anything is written
        stages.adopted_scale(config)
    if "clip" in config.stages:
        clip_data.check(config)
        scoring.zero_shot_classes(config)
    if dry_run:
        return
    if workdir.exists() and scoring.is_done(workdir, asked):
        print(f"All is done: {workdir / 'report.html'}")
        return
    primary = jax.process_index() == 0
    if primary:
        workdir.mkdir(parents=True, exist_ok=True)
        runtime_files.write_json(workdir / "config.json", asked.to_dict())
        runtime_files.write_json(
            workdir / "data.json",
            {"class_names": train_set.class_names, "train": len(train_set), "test": len(test_set),
             "train_fingerprint": train_set.fingerprint, "test_fingerprint": test_set.fingerprint,
             "device": describe_device(), "command": command,
             **({"init_from_fingerprint": base.fingerprint} if base else {})},
        )  # fmt: skip
    log = Log(workdir, write=primary)
    try:
        with InterruptWatch() as watch:
            run = Run(config, workdir, train_set, test_set, log, watch, base)
            clock = CompileClock()
            if "autoencoder" in config.stages and config.autoencoder.kind != "none" and not base:
                _timed(run, clock, "autoencoder", stages.train_autoencoder)
                _timed(run, clock, "latents", stages.measure_latents)
            if "clip" in config.stages:
                _timed(run, clock, "clip", stages.train_clip)
            if "diffusion" in config.stages:
                part = stages.train_on_texts if config_rules.tells_texts(config) else stages.train_diffusion
                _timed(run, clock, "diffusion", stages.fine_tune if base else part)
            if "classifier" in config.stages:
                _timed(run, clock, "classifier", stages.train_classifier)
            if primary:
                if "diffusion" in config.stages:
                    told_texts = config_rules.tells_texts(config)
                    split = train_set if told_texts else test_set
                    _timed(run, clock, "sampling", lambda run: sample_images.draw_final(run.workdir, split))
                    if told_texts:
                        _timed(run, clock, "prompts", lambda run: prompt_sheets.draw(run.workdir, train_set, test_set))
                _timed(run, clock, "scoring", lambda run: scoring.score_run(run.workdir, run.train_set, run.test_set))
    except Interrupted as interrupted:
        print(f"\nInterrupted: {interrupted}. The same command goes on from there.")
        return
    finally:
        log.close()
    if primary:
        write_report(workdir)
        print(f"Done: {workdir / 'report.html'}")
    wait_for_hosts("done")  # the others would leave, and a host that misses another ends with an error


def _timed(run: Run, clock: CompileClock, name: str, part: Callable[[Run], None]) -> None:
    start, compiling, count = time.monotonic(), clock.seconds, clock.count
    part(run)
    seconds = time.monotonic() - start
    run.log("timing", 0, **{f"{name}_seconds": seconds, f"{name}_compile_seconds": clock.seconds - compiling,
                            f"{name}_compilations": clock.count - count})  # fmt: skip
    if jax.process_index() == 0:
        print(f"{name:>12} took {seconds:.0f} s, {clock.seconds - compiling:.0f} s of it compiling", flush=True)


def describe_models(config: ConfigDict, num_classes: int, base: base_model.Base | None = None) -> None:
    """Builds all models on paper and prints their sizes, of one that is fine-tuned that of what learns.

    Raises:
      InputError: one cannot be built.
    """
    sizes = {}
    try:
        if base:
            sizes["diffusion"] = trainable.trained_shapes(config, base)
        else:
            sizes = {name: jax.eval_shape(stage.init, jax.random.key(0)).params
                     for name, stage in _stages(config, num_classes).items()}  # fmt: skip
        if config_rules.tells_texts(config):
            from_run.check(config)
            sizes["diffusion"] = {"unet": abstract_params(pipeline_from_config.build_unet(config))}
        elif "diffusion" in config.stages and not base:
            tables.build_table(config)
    except ValueError as error:
        raise InputError(f"config: {error}") from error
    for name in sorted(sizes, key=STAGES.index):
        for part, params in sizes[name].items():
            print(f"{name:>12} {part}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters", flush=True)


def _stages(config: ConfigDict, num_classes: int) -> dict[str, Any]:
    """The stages of a config, but for what is known only when others are trained."""
    stages: dict[str, Any] = {}
    if "autoencoder" in config.stages and config.autoencoder.kind != "none":
        stages["autoencoder"] = training_from_config.build_autoencoder_stage(config)
    if "clip" in config.stages:
        stages["clip"] = clip_data.on_paper(config)
    if "diffusion" in config.stages and not config_rules.tells_texts(config):
        stages["diffusion"] = training_from_config.build_diffusion_stage(config, num_classes)
    if "classifier" in config.stages:
        stages["classifier"] = training_from_config.build_classifier_stage(config, num_classes)
    return stages


def describe_device() -> str:
    """For the record: how many of which device."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
