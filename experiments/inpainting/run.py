"""Is inpainting by a latent diffusion model better than copying the nearest known pixel?

    python experiments/inpainting/run.py [--budget=smoke|minutes|gpu]

Boxes are masked, as in configs/fashion_mnist_inpainting.py: the mask and the latents of the masked image are
concatenated to the noisy latents that the UNet denoises.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

from experiments import restoration, runner

EXPERIMENT = restoration.make_experiment(
    Path(__file__).parent,
    "Is inpainting by a latent diffusion model better than copying the nearest known pixel?",
    "nearest known pixel",
    {"concat.type": "inpainting"},
)

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
