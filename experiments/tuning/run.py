"""Ablations for configs/fashion_mnist.py: each row is the main job with a few fields changed.

    .venv/bin/python -m experiments.tuning.run autoencoder|diffusion [ROW ...] [--data_dir=data] [--runs=runs/tuning]

Rows in results.json are not run again. The rows of `diffusion` share one autoencoder. Prints the numbers of the tables
in README.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from experiments.budgets import BY_ADAMW
from experiments.judge.run import ClassifierEvaluation, load_evaluation
from ldm_jax.evaluation.features import lpips_distance
from ldm_jax.evaluation.metrics import psnr
from ldm_jax.evaluation.scoring import reconstruct
from ldm_jax.pipeline.load import load
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.runtime.xla import configure

HERE = Path(__file__).parent
SHORT = BY_ADAMW | {
    "autoencoder.steps": 800,
    "autoencoder.batch_size": 64,
    "autoencoder.warmup_steps": 100,
    "autoencoder.loss.perceptual": 0.0,
    "autoencoder.loss.adversarial": 0.0,
}
LPIPS = {"autoencoder.loss.perceptual": 0.5, "autoencoder.loss.perceptual_every": 8}
ADVERSARIAL = {
    "autoencoder.loss.adversarial": 0.2,
    "autoencoder.loss.adversarial_start": 400,
    "autoencoder.discriminator.layers": 2,
    "autoencoder.discriminator.channels": 32,
}
BATCH_32 = {"autoencoder.steps": 1600, "autoencoder.batch_size": 32}
BATCH_16 = {"autoencoder.steps": 3200, "autoencoder.batch_size": 16}
MUON = {"autoencoder.optimizer": "muon", "autoencoder.learning_rate": 3e-3}
LATE = (
    LPIPS
    | ADVERSARIAL
    | {
        "autoencoder.loss.perceptual": 1.0,
        "autoencoder.loss.perceptual_every": 4,
        "autoencoder.loss.perceptual_start": 2200,
        "autoencoder.loss.adversarial_start": 2200,
    }
)
TWICE_THE_RATE = {"autoencoder.learning_rate": 3e-3}
MIN_SNR = {"diffusion.weighting": "min_snr", "diffusion.snr_gamma": 5.0}
LOGIT_NORMAL = {"diffusion.timestep_sampling": "logit_normal", "diffusion.timestep_mean": 0.2}
DIFFUSION_BY_MUON = {"diffusion.optimizer": "muon", "diffusion.learning_rate": 2e-3}
COSINE_V = {"diffusion.schedule": "cosine", "diffusion.prediction": "v"}
ROWS = {
    "autoencoder": {
        "batch 64: L1": SHORT,
        "batch 64: L1 + LPIPS": SHORT | LPIPS,
        "batch 32: L1": SHORT | BATCH_32,
        "batch 32: L1 + adversarial": SHORT | BATCH_32 | ADVERSARIAL,
        "batch 32: L1 + adversarial, twice the rate": SHORT | BATCH_32 | ADVERSARIAL | TWICE_THE_RATE,
        "batch 16: L1": SHORT | BATCH_16,
        "batch 16: L1, Muon": SHORT | BATCH_16 | MUON,
        "batch 16: L1 + late LPIPS + adversarial, Muon": SHORT | BATCH_16 | MUON | LATE,
        "batch 16: the same, KL 1e-3": SHORT | BATCH_16 | MUON | LATE | {"autoencoder.loss.kl": 1e-3},
        "batch 16: the same, KL 1e-2": SHORT | BATCH_16 | MUON | LATE | {"autoencoder.loss.kl": 1e-2},
        "batch 16: L1 + adversarial": SHORT | BATCH_16 | ADVERSARIAL,
        "batch 16: L1 + LPIPS": SHORT | BATCH_16 | LPIPS,
        "batch 16: L1 + LPIPS + adversarial": SHORT | BATCH_16 | LPIPS | ADVERSARIAL,
    },
    "diffusion": {
        "linear": {},
        "scaled_linear": {"diffusion.schedule": "scaled_linear"},
        "cosine": {"diffusion.schedule": "cosine"},
        "linear, twice the batch, half the steps": {"diffusion.batch_size": 128, "diffusion.steps": 600},
        "cosine, v": COSINE_V,
        "scaled_linear, v": COSINE_V | {"diffusion.schedule": "scaled_linear"},
        "cosine, v, half the batch, twice the steps": COSINE_V | {"diffusion.batch_size": 32, "diffusion.steps": 2400},
        "cosine, v, min-SNR": COSINE_V | MIN_SNR,
        "cosine, v, min-SNR, Muon": COSINE_V | MIN_SNR | DIFFUSION_BY_MUON,
        "cosine, v, logit-normal timesteps, Muon": COSINE_V | LOGIT_NORMAL | DIFFUSION_BY_MUON,
        "cosine, v, twice the learning rate": COSINE_V | {"diffusion.learning_rate": 2e-3},
    },
}
ONLY_AUTOENCODER = {"diffusion.steps": 1, "sampling.num": 0, "sampling.progress_every": 0}
SHARED_AUTOENCODER = (
    BY_ADAMW
    | LPIPS
    | {
        "autoencoder.steps": 2800,
        "autoencoder.batch_size": 32,
        "autoencoder.loss.adversarial": 0.0,
    }
)
ONLY_DIFFUSION = SHARED_AUTOENCODER | {
    "diffusion.schedule": "linear",
    "diffusion.prediction": "eps",
    "diffusion.weighting": "uniform",
    "diffusion.steps": 1200,
    "diffusion.batch_size": 64,
    "sampling.num": 2000,
    "sampling.sampler": "dpmpp_2m",
    "sampling.steps": 12,
    "sampling.guidance": 1.5,
    "sampling.guidance_interval": (0.0, 1.0),
    "sampling.progress_every": 0,
    "evaluation.num_reference": 500,
}


def train(workdir: Path, changes: dict, data_dir: str) -> None:
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    command = [sys.executable, "-m", "ldm_jax.train", "--config=configs/fashion_mnist.py", f"--workdir={workdir}"]
    subprocess.run([*command, f"--config.data.dir={data_dir}", *flags], check=True, stdout=subprocess.DEVNULL)


def seconds(workdir: Path, stage: str) -> float:
    """The seconds of a training stage without compilation, from metrics.jsonl."""
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if f"{stage}_seconds" in line]
    return sum(line[f"{stage}_seconds"] - line[f"{stage}_compile_seconds"] for line in lines)


def score_autoencoder(workdir: Path, evaluation: ClassifierEvaluation) -> dict:
    x = evaluation.test_set["x"]
    images = reconstruct(*load(workdir), x, 500)
    return {
        "seconds": seconds(workdir, "autoencoder"),
        "psnr": float(np.mean(psnr(x, images))),
        "lpips": float(lpips_distance(batch_size=250)(x[:2000], images[:2000]).mean()),
    } | evaluation.scores(images, evaluation.test_set["label"])


def score_diffusion(workdir: Path, evaluation: ClassifierEvaluation) -> dict:
    with np.load(workdir / "samples.npz") as samples:
        return {"seconds": seconds(workdir, "diffusion")} | evaluation.scores(samples["images"], samples["labels"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=ROWS)
    parser.add_argument("rows", nargs="*", help="names of rows; default: all")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--runs", type=Path, default=Path("runs/tuning"))
    args = parser.parse_args()
    configure()
    path, rows = HERE / "results.json", ROWS[args.what]
    results = json.loads(path.read_text()) if path.exists() else {what: {} for what in ROWS}
    evaluation = load_evaluation(args.data_dir)
    score = score_autoencoder if args.what == "autoencoder" else score_diffusion
    shared = ONLY_AUTOENCODER
    if args.what == "diffusion":
        autoencoder = args.runs / "autoencoder_of_the_config"
        train(autoencoder, SHARED_AUTOENCODER | ONLY_AUTOENCODER, args.data_dir)
        shared = ONLY_DIFFUSION | {"autoencoder.checkpoint": autoencoder}
    for name in args.rows or rows:
        if name not in results[args.what]:
            workdir = args.runs / f"{args.what} {name}".replace(" ", "_")
            train(workdir, shared | rows[name], args.data_dir)
            results[args.what][name] = score(workdir, evaluation)
            path.write_text(json.dumps(results, indent=2) + "\n")
        print(
            f"{name:>40} " + "  ".join(f"{key} {value:.3f}" for key, value in results[args.what][name].items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
