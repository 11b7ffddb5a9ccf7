"""Is super-resolution by a latent diffusion model better than bicubic interpolation?

    python experiments/super_resolution/run.py [--budget=smoke|minutes|gpu]

From 7 x 7 pixels to 28 x 28, as in configs/fashion_mnist_superres.py: the low-resolution image is concatenated to the
noisy latents as one more input channel of the UNet.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

from experiments import restoration, runner

CHANGES = {
    "data.label_key": "none",
    "concat.type": "low_resolution",
    "concat.factor": 4,
    "sampling.guidance": 1.0,
}
EXPERIMENT = restoration.make_experiment(
    Path(__file__).parent,
    "Is super-resolution by a latent diffusion model better than bicubic interpolation?",
    "bicubic",
    CHANGES,
)

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
