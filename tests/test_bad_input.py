"""Whatever is wrong with the input: one line that says what, status 2, no traceback, and nothing written."""

import functools
import json
import re
import resource
import shutil
from contextlib import contextmanager

import jobs
import numpy as np
import pytest
import random_runs
from PIL import Image

from ldm_jax import command_line, evaluate, sample, train
from ldm_jax.config import io as config_io
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.run_folder.checkpoint import load_latest

TINY = "--config=tests/tiny.py"

WEIGHTS = ("reconstruction", "perceptual", "kl", "codebook", "commitment", "adversarial")

TRAIN = {  # flags -> what the line must say
    "no config": ([], "--config=configs/fashion_mnist.py"),
    "a config without a name": (["--config="], "configs are in configs/"),
    "a folder for a config": (["--config=configs"], "configs are in configs/"),
    "a config file that is not there": (["--config=configs/nope.py"], "configs/nope.py"),
    "a stray word": ([TINY, "faster"], "'faster' is no flag"),
    "an unknown flag": ([TINY, "--workdirr=x"], "did you mean workdir?"),
    "a misspelt field": ([TINY, "--config.diffusion.stepz=3"], "did you mean diffusion.steps?"),
    "a misspelt section": ([TINY, "--config.difusion.steps=3"], "did you mean diffusion.steps?"),
    "a word for a whole number": ([TINY, "--config.diffusion.steps=many"], "config.diffusion.steps"),
    "a fraction for a whole number": ([TINY, "--config.diffusion.steps=1.5"], "config.diffusion.steps"),
    "a word for a number": ([TINY, "--config.diffusion.learning_rate=fast"], "config.diffusion.learning_rate"),
    "a word for a truth value": ([TINY, "--config.data.flip=perhaps"], "config.data.flip"),
    "a number for a section": ([TINY, "--config.unet=3"], "config.unet"),
    "words in a tuple": ([TINY, "--config.unet.block_out_channels=(8,big)"], "config.unet.block_out_channels"),
    "an empty tuple": ([TINY, "--config.unet.block_out_channels=()"], "config.unet.block_out_channels"),
    "a negative width": ([TINY, "--config.unet.block_out_channels=(-8,16)"], "config.unet.block_out_channels"),
    "an unknown prediction": ([TINY, "--config.diffusion.prediction=epz"], "eps, v, z0, flow, edm; did you mean eps?"),
    "an unknown schedule": ([TINY, "--config.diffusion.schedule=linea"], "did you mean linear?"),
    "an unknown weighting": ([TINY, "--config.diffusion.weighting=snr"], "uniform, min_snr"),
    "an unknown sampler": ([TINY, "--config.sampling.sampler=ddimm"], "did you mean ddim?"),
    "an unknown spacing": ([TINY, "--config.sampling.spacing=even"], "leading, trailing, linspace"),
    "an unknown autoencoder": ([TINY, "--config.autoencoder.type=vae"], "kl, vq, none"),
    "an unknown number type": ([TINY, "--config.dtype=float8"], "float32, bfloat16"),
    "an unknown perceptual net": ([TINY, "--config.autoencoder.loss.perceptual_net=vgg19"], "vgg16, alexnet"),
    "an unknown learning rate decay": ([TINY, "--config.diffusion.decay=step"], "constant, cosine"),
    "a second moment without gradients": ([TINY, "--config.diffusion.adam_b2=1.0"], "from 0.0 to 0.999999"),
    "a second moment that float32 rounds to 1": (
        [TINY, "--config.autoencoder.adam_b2=0.99999999"],
        "config.autoencoder.adam_b2 is 0.99999999; it must be from 0.0 to 0.999999",
    ),
    "gradients clipped to nothing": ([TINY, "--config.diffusion.clip_norm=0.0"], "it must be 1e-06 or more"),
    **{
        f"a negative {name}": ([TINY, f"--config.autoencoder.{name}=-1.0"], f"{name} is -1.0; it must be 0 or more")
        for name in ("discriminator.learning_rate", *(f"loss.{name}" for name in WEIGHTS))
    },
    "min-SNR of no SNR": (
        [TINY, "--config.diffusion.snr_gamma=0.0"],
        "config.diffusion.snr_gamma is 0.0; it must be 1e-06",
    ),
    "a misspelt field after a space": (["--config", "tests/tiny.py", "--config.diffusion.stepz=3"], "diffusion.steps?"),
    "guidance away from an untrained condition": (
        [TINY, "--config.diffusion.label_dropout=0.0"],
        "is trained by it: it must be above 0, or config.sampling.guidance 1",
    ),
    "autoguidance with an untrained condition": (
        [
            TINY,
            "--config.diffusion.label_dropout=0.0",
            "--config.sampling.guidance=1.0",
            "--config.checkpoint_every=4",
            "--config.sampling.guide_step=4",
        ],
        "it must be above 0, or config.sampling.guide_step 0",
    ),
    "captions without CLIP": (
        [TINY, "--config.data.caption_key=auto"],
        "config.data.caption_key is 'auto'; without 'clip' in config.stages it must be 'none'",
    ),
    "captions for a classifier": (
        [TINY, *jobs.TEXTS[1:], "--config.stages=('autoencoder','clip','diffusion','classifier')"],
        "config.data.caption_key is 'auto'; a classifier needs classes: it must be 'none', or train it apart",
    ),
    "an unknown optimizer": ([TINY, "--config.diffusion.optimizer=sgd"], "adamw, muon"),
    "an unknown distribution of timesteps": (
        [TINY, "--config.diffusion.timestep_sampling=lognormal"],
        "it must be one of uniform, logit_normal",
    ),
    "timesteps without spread": ([TINY, "--config.diffusion.timestep_std=0.0"], "it must be from 0.01 to 10"),
    "the VLB with other timesteps": (
        [TINY, "--config.diffusion.variance=learned", "--config.diffusion.timestep_sampling=logit_normal"],
        "needs uniform timesteps",
    ),
    "shifted timesteps for the VLB": (
        [TINY, "--config.diffusion.variance=learned", "--config.diffusion.timestep_shift=3.0"],
        "needs uniform timesteps",
    ),
    "LPIPS before the first step": ([TINY, "--config.autoencoder.loss.perceptual_start=-1"], "it must be 0 or more"),
    "two colours": ([TINY, "--config.data.channels=2"], "1, 3"),
    "an unknown crop": ([TINY, "--config.data.crop=middle"], "center, none"),
    "a negative seed": ([TINY, "--config.seed=-1"], "config.seed is -1"),
    "no steps": ([TINY, "--config.diffusion.steps=0"], "config.diffusion.steps is 0"),
    "an empty batch": ([TINY, "--config.autoencoder.batch_size=0"], "config.autoencoder.batch_size is 0"),
    "more than all labels dropped": ([TINY, "--config.diffusion.label_dropout=1.5"], "from 0.0 to 1.0"),
    "an eta beyond 1": ([TINY, "--config.sampling.eta=2.0"], "from 0.0 to 1.0"),
    "an interval beyond 1": ([TINY, "--config.sampling.guidance_interval=(0.5,2.0)"], "two rising numbers from 0 to 1"),
    "eta for a solver without": ([TINY, "--config.sampling.eta=0.5", "--config.sampling.sampler=ddpm"], "eta"),
    "an unknown variance": ([TINY, "--config.diffusion.variance=learnt"], "did you mean learned?"),
    "an unknown variance of the steps": ([TINY, "--config.sampling.variance=large"], "fixed_large, learned"),
    "a variance that was not learned": (
        [TINY, "--config.sampling.variance=learned", "--config.sampling.sampler=ddpm"],
        "needs a model trained with --config.diffusion.variance=learned",
    ),
    "a variance for a solver without": ([TINY, "--config.sampling.variance=fixed_large"], "variance is for ddpm only"),
    "a bound without weight": (
        [TINY, "--config.diffusion.variance=learned", "--config.diffusion.vlb_weight=0.0"],
        "config.diffusion.vlb_weight is 0",
    ),
    "a bound of fewer than no examples": ([TINY, "--config.evaluation.vlb_examples=-1"], "it must be 0 or more"),
    "a threshold for latents": ([TINY, "--config.sampling.threshold=0.99"], "latents are not bounded"),
    "falling betas": ([TINY, "--config.diffusion.beta_start=0.5"], "config.diffusion.beta_start"),
    "more steps than timesteps": ([TINY, "--config.sampling.steps=21"], "config.diffusion.timesteps = 20"),
    "eps where z_T is pure noise": (
        [TINY, "--config.diffusion.zero_terminal_snr=True"],
        "(zero terminal SNR); predict v or z0 or flow",
    ),
    "an image size that does not halve": ([TINY, "--config.data.image_size=9"], "multiple of 2"),
    "groups that do not divide": ([TINY, "--config.unet.norm_num_groups=3"], "it must divide 8"),
    "groups that do not divide the autoencoder": (
        [TINY, "--config.autoencoder.norm_num_groups=5"],
        "it must divide 8",
    ),
    "an unknown denoiser": ([TINY, "--config.denoiser=DiT"], "it must be one of unet, dit"),
    "patches that do not divide the latents": (
        [TINY, "--config.denoiser=dit", "--config.dit.patch_size=3"],
        "config.dit.patch_size is 3; it must divide the size of the latents, 4",
    ),
    "heads that do not divide a DiT": (
        [TINY, "--config.denoiser=dit", "--config.dit.heads=3"],
        "config.dit.heads is 3; it must divide config.dit.hidden_size = 128",
    ),
    "a DiT without room for its positions": (
        [TINY, "--config.denoiser=dit", "--config.dit.hidden_size=10"],
        "config.dit.hidden_size is 10; it must be a multiple of 4",
    ),
    "an unknown norm of a DiT": ([TINY, "--config.dit.norm=group"], "it must be one of layer, rms"),
    "an unknown norm of queries": ([TINY, "--config.dit.qk_norm=layer"], "it must be one of none, rms"),
    "no blocks": ([TINY, "--config.dit.depth=0"], "config.dit.depth is 0"),
    "too narrow a feed-forward network": ([TINY, "--config.dit.mlp_ratio=0.0"], "it must be from 0.25 to 100"),
    "an odd width": (
        [
            TINY,
            "--config.unet.block_out_channels=(9,)",
            "--config.unet.attention=(False,)",
            "--config.unet.attention_heads=3",
            "--config.unet.norm_num_groups=3",
        ],
        "config: block_out_channels[0] must be even for the time embedding; got 9",
    ),
    "a norm that erases the time": ([TINY, "--config.unet.norm_num_groups=8"], "must be less"),
    "heads that do not divide": ([TINY, "--config.unet.attention_heads=3"], "it must divide 8"),
    "texts without attention": (
        [TINY, *jobs.TEXTS, jobs.NO_ATTENTION],
        "config.unet.attention is (False,); the UNet is conditioned on texts by it: one entry must be True",
    ),
    "attention for other resolutions": (
        [TINY, "--config.unet.attention=(True,False)"],
        "it must be as long as block_out_channels",
    ),
    "more resolutions than latents have": (
        [TINY, "--config.unet.block_out_channels=(8,8,8,8)", "--config.unet.attention=(False,False,False,False)"],
        "cannot be halved so often",
    ),
    "a discriminator too deep for the images": (
        [TINY, "--config.autoencoder.loss.adversarial=0.5", "--config.autoencoder.discriminator.layers=3"],
        "discriminator",
    ),
    "a guiding step without a checkpoint": (
        [TINY, "--config.checkpoint_every=4", "--config.sampling.guide_step=3"],
        "config.sampling.guide_step is 3; it must be a multiple of config.checkpoint_every = 4, or 0",
    ),
    "a guiding step of another objective": (
        [
            TINY,
            "--config.diffusion.objective=mean_flow",
            "--config.checkpoint_every=4",
            "--config.sampling.guide_step=4",
        ],
        "a model with config.diffusion.objective=mean_flow is not guided: it must be 0",
    ),
    "LPIPS on a share that does not divide": ([TINY, "--config.autoencoder.loss.perceptual_every=3"], "must divide"),
    "images too small for LPIPS": (
        [TINY, "--config.autoencoder.loss.perceptual=0.5"],
        "config.autoencoder.loss.perceptual_size is 0; it must be 16 or more for LPIPS by vgg16 on images of 8 pixels",
    ),
    "images resized too small for LPIPS": (
        [TINY, "--config.autoencoder.loss.perceptual=0.5", "--config.autoencoder.loss.perceptual_size=15"],
        "config.autoencoder.loss.perceptual_size is 15; it must be 16 or more",
    ),
    "images too small for AlexNet": (
        [
            TINY,
            "--config.data.image_size=28",
            "--config.autoencoder.loss.perceptual=0.5",
            "--config.autoencoder.loss.perceptual_net=alexnet",
        ],
        "it must be 31 or more for LPIPS by alexnet on images of 28 pixels",
    ),
    "a batch that does not divide over devices": ([TINY, "--config.diffusion.batch_size=6"], "the 4 devices"),
    "a batch that does not divide over micro-batches": (
        [TINY, "--config.parallel.accumulate=4", "--config.autoencoder.batch_size=16"],
        "config.diffusion.batch_size is 8; it must be a multiple of 4 devices x 4 micro-batches",
    ),
    "micro-batches of LPIPS on a share": (
        [TINY, "--config.parallel.accumulate=2", "--config.autoencoder.loss.perceptual_every=4"],
        "4 devices x 2 micro-batches (config.parallel.accumulate) x 4 (config.autoencoder.loss.perceptual_every)",
    ),
    "no micro-batch": ([TINY, "--config.parallel.accumulate=0"], "config.parallel.accumulate is 0"),
    "micro-batches of the adversarial loss": (
        [TINY, "--config.parallel.accumulate=2", "--config.autoencoder.loss.adversarial=0.5"],
        "config.parallel.accumulate is 2; the weight of the autoencoder's adversarial loss follows from",
    ),
    "micro-batches of the contrastive loss": (
        [TINY, "--config.parallel.accumulate=2", *jobs.TEXTS],
        "config.parallel.accumulate is 2; CLIP's loss compares all examples of a batch",
    ),
    "an unknown engine": ([TINY, "--config.parallel.engine=fsdpp"], "pmap, fsdp; did you mean fsdp?"),
    "shards that do not divide over devices": (
        [TINY, "--config.parallel.engine=fsdp", "--config.parallel.fsdp=3"],
        "config.parallel.fsdp is 3; it must divide the 4 devices",
    ),
    "shards of pmap": ([TINY, "--config.parallel.fsdp=4"], "that needs config.parallel.engine = 'fsdp'"),
    "a word for remat": ([TINY, "--config.parallel.remat=some"], "config.parallel.remat"),
    "an unknown data set": ([TINY, "--config.data.name=tinny"], "tinny"),
    "an unknown split": ([TINY, "--config.data.train_split=dev"], "dev"),
    "an unknown image feature": ([TINY, "--config.data.image_key=photo"], "photo"),
    "an unknown label feature": ([TINY, "--config.data.label_key=kind"], "kind"),
    "an unknown map": ([TINY, "--config.concat.type=depth"], "none, low_resolution, inpainting, segments"),
    "an image that does not get smaller": (
        [TINY, "--config.concat.type=low_resolution", "--config.concat.factor=3"],
        "must divide config.data.image_size = 8",
    ),
    "segments of no feature": ([TINY, "--config.concat.type=segments"], "config.data.segments_key must name"),
    "an unknown feature of segments": ([TINY, "--config.data.segments_key=parts"], "there is areas, image"),
    "more segments than num_segments": (
        [TINY, "--config.concat.type=segments", "--config.data.segments_key=areas"],
        "tiny has a pixel of class 2, so it must be 3 or more",
    ),
    "a data folder that is not there": ([TINY, "--config.data.dir=nowhere"], "nowhere"),
    "a negative split": ([TINY, "--config.data.train_split=train[:0]"], "train[:0]"),
    "weights that are not there": ([TINY, "--config.evaluation.inception_weights=no.pth"], "no.pth does not exist"),
    "a process beyond the last": (
        [TINY, "--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
        "--process_id is 2",
    ),
    "a coordinator without a port": ([TINY, "--coordinator=localhost", "--num_processes=2"], "host:port"),
    "an unknown stage": ([TINY, "--config.stages=('autoencoder','difusion')"], "did you mean diffusion?"),
    "a stage twice": ([TINY, "--config.stages=('autoencoder','diffusion','diffusion')"], "each once, in this order"),
    "stages in another order": ([TINY, "--config.stages=('diffusion','autoencoder')"], "each once, in this order"),
    "no stages": ([TINY, "--config.stages=()"], "nothing to train"),
    "nothing but the autoencoder of pixels": (
        [TINY, "--config.stages=('autoencoder',)", "--config.autoencoder.type=none"],
        "nothing to train",
    ),
    "latents of no autoencoder": ([TINY, "--config.stages=('diffusion',)"], "needs 'autoencoder' before it"),
    "a classifier without classes": ([TINY, jobs.CLASSIFIER[0], "--config.data.label_key=none"], "2 or more classes"),
    "a classifier whose groups do not divide": (
        [TINY, jobs.CLASSIFIER[0], "--config.classifier.norm_num_groups=3"],
        "config.classifier.norm_num_groups is 3; it must divide 8",
    ),
    "a classifier's attention for other resolutions": (
        [TINY, jobs.CLASSIFIER[0], "--config.classifier.attention=(True,False)"],
        "config.classifier.attention is (True, False)",
    ),
    "a classifier deeper than the latents": (
        [
            TINY,
            jobs.CLASSIFIER[0],
            "--config.classifier.block_out_channels=(8,8,8,8)",
            "--config.classifier.attention=(False,False,False,False)",
        ],
        "config.classifier.block_out_channels is (8, 8, 8, 8); latents of 4x4",
    ),
    "a classifier's batch that does not divide over devices": (
        [TINY, jobs.CLASSIFIER[0], "--config.classifier.batch_size=6"],
        "config.classifier.batch_size is 6",
    ),
    "an autoencoder that is not there": ([TINY, "--config.autoencoder.checkpoint=nowhere"], "nowhere"),
}


def fails(command, flags, capsys, status=2):
    """The one line of a command that must fail."""
    capsys.readouterr()
    assert command_line.run(command, ["command", *map(str, flags)]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("command: ")
    assert "Traceback" not in lines[0]
    return lines[0]


def contents(folder):
    """Everything in a folder: path -> (size, time of the last change)."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses(case, four_devices, tiny_data, tmp_path, capsys):
    flags, expected = TRAIN[case]
    workdir = tmp_path / "run"
    data = [f"--config.data.dir={tiny_data}"] if TINY in flags else []
    line = fails(train.main, [*flags[:1], *data, *flags[1:], f"--workdir={workdir}"], capsys)
    assert expected in line
    assert not workdir.exists()


# Config files: name -> (text, what the line must say)
CONFIG_FILES = {
    "one with a syntax error": ("def get_config(:\n", "line 1"),
    "one that fails": ("raise RuntimeError('oh no')\n", "oh no"),
    "one of another program": (
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'lr': 1.0})\n",
        "configs start from configs/base.py",
    ),
    "one with a field of its own": (
        "from configs import base\ndef get_config():\n    c = base.get_config()\n    c.sede = 1\n    return c\n",
        "sede",
    ),
    "one with a wrong type": (
        "from configs import base\ndef get_config():\n    c = base.get_config()\n    c.seed = 'one'\n    return c\n",
        "seed",
    ),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_train_refuses_a_config_file(case, tmp_path, capsys):
    text, expected = CONFIG_FILES[case]
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert expected in fails(train.main, [f"--config={file}", f"--workdir={tmp_path / 'run'}"], capsys)
    assert not (tmp_path / "run").exists()


def set_field(path, **fields):
    """Changes top-level fields of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def set_config(run, section, field, value):
    fields = json.loads((run / "config.json").read_text())
    fields[section][field] = value
    (run / "config.json").write_text(json.dumps(fields))


def truncate(path):
    """Cuts a file's second half off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_arrays(folder):
    """Damages the arrays of all checkpoints in `folder`."""
    files = [path for path in folder.glob("*/state/**/*") if path.is_file() and path.parent.name == "d"]
    assert files
    for path in files:
        truncate(path)


def replace_by_file(path):
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("I am a file")


# What is done to the run folder of a trained model before the same command -> what the line must say
WORKDIRS = {
    "a file": (replace_by_file, "is a file"),
    "below a file": (lambda run: replace_by_file(run.parent), "is a file"),
    "of another config": (
        lambda run: set_config(run, "diffusion", "ema_decay", 0.5),
        "diffusion.ema_decay: 0.5 -> 0.999",
    ),
    "of an older version": (lambda run: set_config(run, "diffusion", "nonsense", 9), "diffusion.nonsense: 9 -> None"),
    "without a config": (lambda run: (run / "config.json").unlink(), "has no config.json"),
    "with half a config": (lambda run: truncate(run / "config.json"), "config.json is damaged"),
    "with a config of no fields": (lambda run: (run / "config.json").write_text("[1]"), "config.json is damaged"),
    "with a config that is no text": (
        lambda run: (run / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json is damaged",
    ),
}


@pytest.mark.parametrize("case", WORKDIRS)
def test_train_refuses_a_workdir(case, tiny_data, tmp_path, capsys):
    damage, expected = WORKDIRS[case]
    run = tmp_path / "parent" / "run"
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("someone's own")
    (run / "config.json").write_text(config_io.to_json(small_config()))
    damage(run)
    before = contents(tmp_path)
    assert expected in fails(train.main, jobs.flags(tiny_data, run), capsys)
    assert contents(tmp_path) == before


def small_config():
    """The config of `jobs.SMALL`."""
    values = train.define_flags()
    command_line.parse(values, ["train", *jobs.SMALL], config=True)
    return values.config


@pytest.fixture
def run_copy(trained_run, tmp_path):
    """The trained run, to be damaged."""
    return shutil.copytree(trained_run, tmp_path / "run")


# What is done to a trained run -> what `sample` and `evaluate` must say
MODELS = {
    "not there": (shutil.rmtree, "does not exist"),
    "a file": (replace_by_file, "is a file"),
    "no run folder": (lambda run: (run / "config.json").unlink(), "is no run folder: it has no config.json"),
    "without the classes": (lambda run: (run / "data.json").unlink(), "data.json"),
    "with foreign classes": (lambda run: (run / "data.json").write_text("{}"), "it has no class_names"),
    "with half a config": (lambda run: truncate(run / "config.json"), "config.json is damaged"),
    "with a config that lacks fields": (lambda run: set_field(run / "config.json", unet=None), "config.unet."),
    "with a text for a number": (lambda run: set_config(run, "diffusion", "timesteps", "20"), "must be a number"),
    "not trained yet": (
        lambda run: [shutil.rmtree(run / stage) for stage in ("autoencoder", "diffusion")],
        "diffusion",
    ),
    "with half of the training": (lambda run: shutil.rmtree(run / "diffusion"), "no readable checkpoint"),
    "without an autoencoder": (
        lambda run: [shutil.rmtree(step) for step in (run / "autoencoder").glob("[0-9]*")],
        "no readable checkpoint",
    ),
    "without a scale": (lambda run: (run / "autoencoder/scale.json").unlink(), "scale.json"),
    "with half a scale": (lambda run: truncate(run / "autoencoder/scale.json"), "scale.json is damaged"),
    "with a scale of nothing": (lambda run: (run / "autoencoder/scale.json").write_text("{}"), "shift"),
    "with damaged checkpoints": (lambda run: truncate_arrays(run / "diffusion"), "no readable checkpoint"),
    "with checkpoints of another shape": (
        lambda run: set_config(run, "unet", "context_dim", 16),
        "belongs to another model",
    ),
    "with checkpoints of another depth": (
        lambda run: set_config(run, "unet", "layers_per_block", 2),
        "belongs to another model",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_is_refused(case, run_copy, tmp_path, capsys):
    damage, expected = MODELS[case]
    damage(run_copy)
    before = contents(tmp_path)
    for command in (sample.main, evaluate.main):
        line = fails(command, [f"--model={run_copy}", f"--out={tmp_path / 'out'}"], capsys)
        assert expected in line
        assert contents(tmp_path) == before


# What is done to the run of a classifier, or to the config of the model, -> what the line must say
CLASSIFIERS = {
    "not there": (shutil.rmtree, "does not exist"),
    "no run folder": (lambda run: (run / "config.json").unlink(), "is no run folder: it has no config.json"),
    "without a checkpoint": (lambda run: shutil.rmtree(run / "classifier"), "no readable checkpoint"),
    "of another shape": (lambda run: set_config(run, "classifier", "layers_per_block", 2), "belongs to another model"),
    "of another schedule": (
        lambda run: set_config(run, "diffusion", "schedule", "cosine"),
        "have other noise schedules: T 20 with sigma",
    ),
    "of fewer timesteps": (
        lambda run: set_config(run, "diffusion", "timesteps", 19),
        "have other noise schedules: T 19 with sigma",
    ),
    "of other classes": (
        lambda run: set_field(run / "data.json", class_names=["a", "b", "c", "d"]),
        "has 4 classes (a, b, c, d); those of --model are 4 (horizontal, vertical, bright, dark)",
    ),
    "of latents at another scale": (
        lambda run: set_field(run / "autoencoder" / "scale.json", shift=[0.0, 1.0]),
        "must be trained with --config.autoencoder.checkpoint set to the run",
    ),
    "of images of another size": (
        lambda run: set_config(run, "data", "image_size", 16),
        "was trained on other latents than those of --model",
    ),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_classifier_is_refused(case, classifier_run, trained_run, tmp_path, capsys, monkeypatch, loaded_once):
    monkeypatch.setattr(pipeline_load, "load", loaded_once)
    damage, expected = CLASSIFIERS[case]
    run = shutil.copytree(classifier_run, tmp_path / "run")
    damage(run)
    before = contents(tmp_path)
    flags = [f"--model={trained_run}", f"--classifier={run}", f"--out={tmp_path / 'out'}", "--num=4"]
    for command in (sample.main, evaluate.main):
        assert expected in fails(command, flags, capsys)
        assert contents(tmp_path) == before


def test_a_classifier_is_no_model(classifier_run, tmp_path, capsys):
    line = fails(sample.main, [f"--model={classifier_run}", f"--out={tmp_path / 'out'}"], capsys)
    assert "has no diffusion model: its config.stages are autoencoder, classifier" in line


def test_a_classifier_adopts_no_autoencoder_without_its_scale(run_copy, tiny_data, tmp_path, capsys):
    (run_copy / "autoencoder" / "scale.json").unlink()
    changes = [*jobs.CLASSIFIER, f"--config.autoencoder.checkpoint={run_copy}"]
    assert "scale.json" in fails(train.main, jobs.flags(tiny_data, tmp_path / "new", *changes), capsys)
    assert not (tmp_path / "new").exists()


BOTH = {  # flags -> what the line must say
    "a classifier's scale without a classifier": (
        ["--model=MODEL", "--classifier_scale=2"],
        "--classifier_scale needs --classifier",
    ),
    "a negative scale": (["--model=MODEL", "--classifier=MODEL", "--classifier_scale=-1"], "classifier_scale"),
    "a model for a classifier": (["--model=MODEL", "--classifier=MODEL"], "has no classifier: its config.stages are"),
    "no model": ([], "--model is missing"),
    "an unknown flag": (["--model=MODEL", "--stepz=3"], "did you mean steps?"),
    "a stray word": (["--model=MODEL", "faster"], "'faster' is no flag"),
    "a config field": (["--model=MODEL", "--config.sampling.steps=3"], "--config.sampling.steps"),
    "an unknown sampler": (["--model=MODEL", "--sampler=ddimm"], "did you mean ddim?"),
    "more steps than timesteps": (["--model=MODEL", "--steps=21"], "20"),
    "no steps": (["--model=MODEL", "--steps=0"], "steps"),
    "a word for steps": (["--model=MODEL", "--steps=few"], "steps"),
    "no images": (["--model=MODEL", "--num=0"], "num"),
    "a negative seed": (["--model=MODEL", "--seed=-1"], "seed"),
    "an eta beyond 1": (["--model=MODEL", "--eta=1.5"], "eta"),
    "eta for a solver without": (["--model=MODEL", "--eta=0.5", "--sampler=dpmpp_2m"], "eta is for ddim and tcd only"),
    "churn for a solver without": (["--model=MODEL", "--churn=5", "--sampler=heun"], "churn is for edm only"),
    "negative churn": (["--model=MODEL", "--churn=-5", "--sampler=edm"], "churn"),
    "an unknown variance": (["--model=MODEL", "--sampler=ddpm", "--variance=fixed_smal"], "did you mean fixed_small?"),
    "variance for a solver without": (["--model=MODEL", "--variance=fixed_large"], "variance is for ddpm only"),
    "a variance that was not learned": (
        ["--model=MODEL", "--sampler=ddpm", "--variance=learned"],
        "needs a model trained with --config.diffusion.variance=learned",
    ),
    "an unknown spacing of the steps": (["--model=MODEL", "--spacing=karas"], "did you mean karras?"),
    "lcm by another's steps": (["--model=MODEL", "--sampler=lcm", "--spacing=karras"], "have timesteps of their own"),
    "timesteps that rise": (["--model=MODEL", "--timesteps=0,5,10"], "descending whole numbers"),
    "timesteps beyond the last": (["--model=MODEL", "--timesteps=20,5,0"], "whole numbers in 0..19"),
    "timesteps in words": (["--model=MODEL", "--timesteps=many"], "must be whole numbers, e.g."),
    "timesteps and steps": (["--model=MODEL", "--timesteps=9,0", "--steps=2"], "leave out --steps"),
    "a rescaling beyond 1": (["--model=MODEL", "--guidance_rescale=2"], "guidance_rescale"),
    "interval of one": (["--model=MODEL", "--guidance_interval=0.5"], "two rising numbers"),
    "interval of words": (["--model=MODEL", "--guidance_interval=low,high"], "low,high; it must be two rising numbers"),
    "interval the wrong way round": (["--model=MODEL", "--guidance_interval=0.8,0.2"], "[0.8, 0.2]"),
    "negative guidance": (["--model=MODEL", "--guidance=-1"], "guidance"),
    "an empty batch": (["--model=MODEL", "--batch_size=0"], "batch_size"),
    "a batch that does not divide": (["--model=MODEL", "--batch_size=6"], "4 devices"),
    "an output that is a file": (["--model=MODEL", "--out=FILE"], "is a file"),
    "an output below a file": (["--model=MODEL", "--out=FILE/below"], "is a file"),
}

SAMPLE = {
    "a class beyond the last": (["--label=4"], "--label=4 is no class; the model has 0 horizontal"),
    "a negative class": (["--label=-1"], "--label=-1 is no class"),
    "an unknown class": (["--label=dark,blue"], "--label=blue is no class"),
    "an empty class": (["--label="], "--label= is no class"),
    "latents that are not there": (["--init_latents=nowhere.npy"], "nowhere.npy"),
    "latents that are no array": (["--init_latents=FILE"], "cannot be read as .npy"),
    "latents in an archive": (["--init_latents=ARCHIVE"], "an archive"),
    "latents that are objects": (["--init_latents=OBJECTS"], "cannot be read as .npy"),
    "latents of another number": (["--init_latents=LATENTS", "--num=5"], "it must be float32[5, 4, 4, 2]"),
    "latents of another shape": (["--init_latents=SHAPE"], "it must be float32[4, 4, 4, 2]"),
    "latents of another type": (["--init_latents=FLOAT64"], "is float64[4, 4, 4, 2]"),
    "latents that are not finite": (["--init_latents=NAN"], "not finite"),
    "an image that is not there": (["--init_image=nowhere.png"], "--init_image=nowhere.png: No such file"),
    "an image that is none": (["--init_image=FILE"], "not an image"),
    "half an image": (["--init_image=BROKEN"], "not an image"),
    "a folder for an image": (["--init_image=tests"], "directory"),
    "no strength": (["--init_image=PICTURE", "--strength=0"], "strength must lie above 0"),
    "too much strength": (["--init_image=PICTURE", "--strength=1.5"], "strength"),
    "negative strength": (["--init_image=PICTURE", "--strength=-0.5"], "strength"),
    "strength that leaves no step": (["--init_image=PICTURE", "--strength=0.1"], "runs none; use 10 or more"),
    "strength of nothing": (["--strength=0.5"], "--strength needs --init_image"),
    "a mask of nothing": (["--mask=PICTURE"], "--mask needs --init_image"),
    "a mask of another size": (["--init_image=PICTURE", "--mask=LARGE"], "is 16x16; it must be 8x8"),
    "a mask that is not there": (["--init_image=PICTURE", "--mask=nowhere.png"], "--mask=nowhere.png"),
    "a mask that is none": (["--init_image=PICTURE", "--mask=FILE"], "not an image"),
    "a black mask": (["--init_image=PICTURE", "--mask=BLACK"], "no white part"),
    "resampling of nothing": (["--resample=3"], "--resample needs --mask"),
    "no resampling": (["--init_image=PICTURE", "--mask=WHITE", "--resample=0"], "resample"),
    "a jump without resampling": (["--init_image=PICTURE", "--mask=WHITE", "--resample_jump=2"], "needs --resample"),
    "resampling with a memory": (
        ["--init_image=PICTURE", "--mask=WHITE", "--resample=2", "--sampler=dpmpp_2m"],
        "needs a one-step solver",
    ),
    "resampling without end": (
        ["--init_image=PICTURE", "--mask=WHITE", "--resample=99", "--sampler=ddpm", "--steps=20"],
        "a table holds 40 network calls",
    ),
    "a height that does not halve": (["--height=9"], "--height=9 must be a multiple of 2, the pixels of a latent"),
    "outpainting of nothing": (["--outpaint=up:2"], "--outpaint needs --init_image"),
    "outpainting and a mask": (["--init_image=PICTURE", "--mask=WHITE", "--outpaint=up:2"], "choose one"),
    "outpainting to nowhere": (["--init_image=PICTURE", "--outpaint=top:2"], "must be left, right, up, down"),
    "outpainting by nothing": (["--init_image=PICTURE", "--outpaint=up:0"], "and 1 to 7 pixels"),
    "outpainting beyond the window": (["--init_image=PICTURE", "--outpaint=up:8"], "and 1 to 7 pixels"),
    "outpainting of an inverted image": (
        ["--init_image=PICTURE", "--outpaint=up:2", "--invert"],
        "do not go together",
    ),
    "a threshold for latents": (["--threshold=0.99"], "is for diffusion on pixels; latents have no bounds"),
    "a threshold beyond 1": (["--threshold=1.5"], "threshold"),
    "inversion of nothing": (["--invert"], "--invert needs --init_image"),
    "a way from nothing": (["--to_image=PICTURE"], "--to_image needs --init_image"),
    "a way to nothing": (["--init_image=PICTURE", "--to_image=nowhere.png"], "--to_image=nowhere.png"),
    "two noises": (["--init_latents=LATENTS", "--to_seed=1"], "both set the initial noise"),
    "inversion and a seed": (["--init_image=PICTURE", "--invert", "--to_seed=3"], "both set the initial noise"),
    "inversion of a part": (["--init_image=PICTURE", "--mask=WHITE", "--invert"], "do not go together"),
    "inversion with a strength": (["--init_image=PICTURE", "--strength=0.5", "--invert"], "do not go together"),
    "a negative seed to go to": (["--to_seed=-1"], "to_seed"),
    "away from an unknown class": (["--negative_label=blue"], "--negative_label=blue is no class"),
    "half the latents": (["--init_latents=HALF"], "cannot be read as .npy"),
}

TILES = {  # changes of the config -> what the line must say
    "of no autoencoder": ({"autoencoder.type": "none"}, "--vae_tiling is for latent diffusion; this model has no"),
    "of another size": ({"data.image_size": 12}, "a tile of 12 pixels must be a multiple of 4 x 2"),
}

EVALUATE = {
    "weights that are not there": (["--inception_weights=nowhere.pth"], "nowhere.pth"),
    "a single image": (["--num=1"], "num"),
    "weights that are none": (["--inception_weights=FILE"], "FILE.txt: not readable"),
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Files that the flags name in capitals."""
    folder, z_T = tmp_path_factory.mktemp("files"), np.zeros((4, 4, 4, 2), np.float32)
    paths = {name: folder / f"{name}.npy" for name in ("LATENTS", "SHAPE", "FLOAT64", "NAN", "HALF", "OBJECTS")}
    paths |= {"FILE": folder / "FILE.txt", "ARCHIVE": folder / "ARCHIVE.npz"}
    paths["FILE"].write_text("I am a file")
    np.savez(paths["ARCHIVE"], z_T=z_T)
    arrays = {
        "LATENTS": z_T,
        "SHAPE": z_T[..., :1],
        "FLOAT64": z_T.astype(np.float64),
        "NAN": z_T * np.nan,
        "HALF": z_T,
    }
    for name, array in arrays.items():
        np.save(paths[name], array)
    for name, side, value in (("PICTURE", 8, 99), ("LARGE", 16, 255), ("BLACK", 8, 0), ("WHITE", 8, 255)):
        paths[name] = folder / f"{name}.png"
        Image.fromarray(np.full((side, side), value, np.uint8)).save(paths[name])
    paths["BROKEN"] = folder / "BROKEN.png"
    paths["BROKEN"].write_bytes(paths["PICTURE"].read_bytes())
    truncate(paths["BROKEN"])
    np.save(paths["OBJECTS"], np.array([{}, None]), allow_pickle=True)
    truncate(paths["HALF"])
    return paths


def filled_in(flags, files):
    """The flags with the names in capitals replaced by paths."""
    for name, path in files.items():
        flags = [flag.replace(f"={name}", f"={path}") for flag in flags]
    return flags


@pytest.fixture(scope="session")
def loaded_once():
    """`load`, which takes longer than all else in these cases, for a run folder that none of them changes."""
    return functools.cache(pipeline_load.load)


@pytest.mark.parametrize("case", BOTH)
@pytest.mark.parametrize("command", [sample, evaluate])
def test_a_command_refuses(command, case, trained_run, files, tmp_path, capsys, monkeypatch, loaded_once, four_devices):
    monkeypatch.setattr(pipeline_load, "load", loaded_once)
    flags, expected = BOTH[case]
    out = [] if any(flag.startswith("--out=") for flag in flags) else [f"--out={tmp_path / 'out'}"]
    before = contents(trained_run)
    line = fails(command.main, [*filled_in(flags, files | {"MODEL": trained_run}), *out], capsys)
    assert expected in line
    assert contents(trained_run) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", SAMPLE)
def test_sample_refuses(case, trained_run, files, tmp_path, capsys, monkeypatch, loaded_once):
    monkeypatch.setattr(pipeline_load, "load", loaded_once)
    flags, expected = SAMPLE[case]
    out = tmp_path / "out"
    line = fails(sample.main, ["--num=4", *filled_in(flags, files), f"--model={trained_run}", f"--out={out}"], capsys)
    assert expected in line
    assert not out.exists()


@pytest.mark.parametrize("case", TILES)
def test_tiles_are_refused(case, tmp_path, capsys):
    changes, expected = TILES[case]
    run, out = random_runs.random_run(tmp_path / "run", tuple(changes.items())), tmp_path / "out"
    assert expected in fails(sample.main, ["--num=4", "--vae_tiling", f"--model={run}", f"--out={out}"], capsys)
    assert not out.exists()


@pytest.mark.parametrize("case", EVALUATE)
def test_evaluate_refuses(case, trained_run, files, tmp_path, capsys, monkeypatch, loaded_once):
    monkeypatch.setattr(pipeline_load, "load", loaded_once)
    flags, expected = EVALUATE[case]
    out = tmp_path / "out"
    line = fails(evaluate.main, ["--num=4", *filled_in(flags, files), f"--model={trained_run}", f"--out={out}"], capsys)
    assert expected in line
    assert not out.exists()


def test_sample_wants_to_know_where_to(trained_run, capsys):
    assert "--out is missing" in fails(sample.main, [f"--model={trained_run}"], capsys)


def test_evaluate_without_its_data(run_copy, tmp_path, capsys):
    set_config(run_copy, "data", "dir", str(tmp_path / "gone"))
    assert "gone" in fails(evaluate.main, [f"--model={run_copy}", "--num=4", f"--out={tmp_path / 'out'}"], capsys)
    assert not (tmp_path / "out").exists()


REUSED = {  # damage of the run whose autoencoder is reused, and changes of the config
    "not trained yet": (lambda run: shutil.rmtree(run / "autoencoder"), [], "no readable checkpoint"),
    "damaged": (lambda run: truncate_arrays(run / "autoencoder"), [], "no readable checkpoint"),
    "of another shape": (lambda run: None, ["--config.autoencoder.latent_channels=3"], "belongs to another model"),
    "of another type": (lambda run: None, ["--config.autoencoder.type=vq"], "belongs to another model"),
    "of other groups": (
        lambda run: None,
        ["--config.autoencoder.norm_num_groups=2"],
        "config.autoencoder.norm_num_groups is 2; for config.autoencoder.checkpoint=",
    ),
}


@pytest.mark.parametrize("case", REUSED)
def test_train_refuses_an_autoencoder(case, run_copy, tiny_data, tmp_path, capsys):
    damage, changes, expected = REUSED[case]
    damage(run_copy)
    changes = [f"--config.autoencoder.checkpoint={run_copy}", *changes]
    line = fails(train.main, jobs.flags(tiny_data, tmp_path / "new", *changes), capsys)
    assert expected in line
    assert not (tmp_path / "new").exists()


def test_checkpoints_of_another_run_are_refused(run_copy, trained_run, tiny_data, tmp_path, capsys):
    """A folder copied in from elsewhere: its checkpoints have a note of their own run."""
    set_config(run_copy, "diffusion", "ema_decay", 0.5)
    changes = ["--config.diffusion.ema_decay=0.5", "--config.sampling.steps=3"]
    assert "belongs to another run" in fails(train.main, jobs.flags(tiny_data, run_copy, *changes), capsys)
    jobs.assert_same_training(run_copy, trained_run)


def test_train_stops_when_no_checkpoint_is_sound(run_copy, tiny_data, tmp_path, capsys):
    truncate_arrays(run_copy / "autoencoder")
    flags = jobs.flags(tiny_data, run_copy, "--config.sampling.steps=3")
    assert "move the folder away" in fails(train.main, flags, capsys)


def test_a_damaged_image_of_the_data_set(tiny_data, tmp_path, capsys):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (shard,) = data.glob("tiny/*/tiny-train*")
    truncate(shard)
    line = fails(train.main, jobs.flags(data, tmp_path / "run"), capsys)
    assert line.endswith(f"{shard.parent} (train): example 0 cannot be read: its file is truncated")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite(tiny_data, tmp_path, capsys):
    """Status 1: the line names the step and the first tensor, and the last good state is saved."""
    workdir = tmp_path / "run"
    flags = jobs.flags(tiny_data, workdir, "--config.autoencoder.learning_rate=1e36")
    line = fails(train.main, flags, capsys, status=1)
    step = int(re.search(r"not finite at step (\d+) \(seed 0\)", line)[1])
    assert "stage 'autoencoder'" in line
    assert re.search(r"the first tensor that is not: \w+", line)
    assert "none, when computed again" not in line
    state = load_latest(workdir / "autoencoder")
    assert state["step"] == step
    assert all(np.isfinite(array).all() for array in state.values())


@contextmanager
def files_of_at_most(size):
    """As on a full disk: writing beyond `size` bytes fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("size", [100, 60_000])
def test_a_full_disk(size, tiny_data, trained_run, tmp_path, capsys):
    """Status 1, whether it is full at once or at the first checkpoint; with room again, the command goes on."""
    flags = jobs.flags(tiny_data, tmp_path / "run", "--config.stages=('autoencoder',)")
    with files_of_at_most(size):
        line = fails(train.main, flags, capsys, status=1)
    assert str(tmp_path / "run") in line
    assert command_line.run(train.main, ["train", *flags]) == 0
    jobs.assert_same_training(tmp_path / "run", trained_run, stages=("autoencoder",))


def test_a_disk_that_takes_nothing(tiny_data, capsys):
    line = fails(train.main, jobs.flags(tiny_data, "/proc/nowhere/run"), capsys, status=1)
    assert "/proc/nowhere" in line


def test_a_unet_without_attention_is_noted(tiny_data, tmp_path, capsys):
    """It is not conditioned on the classes, which may be meant: as of data without them, or a DiT."""
    note = "note: config.unet.attention is (False,): the UNet is not conditioned on classes"
    for changes, expected in (
        ([], 0),
        ([jobs.NO_ATTENTION], 1),
        ([jobs.NO_ATTENTION, "--config.data.label_key=none"], 0),
        ([jobs.NO_ATTENTION, "--config.denoiser=dit", "--config.dit.hidden_size=8"], 0),
    ):
        assert jobs.train_here(tiny_data, tmp_path / "run", *changes, "--dry_run=true") == 0
        assert capsys.readouterr().out.count(note) == expected
