"""Does a latent diffusion model fill hidden parts of a picture better than the nearest known pixels do?

    python experiments/inpainting/run.py [--budget=smoke|cpu|gpu]

Boxes hidden, as configs/fashion_mnist_inpainting.py has it: the mask and the latents of the masked image lie beside
those that the UNet denoises.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

from experiments import frame, restoration

EXPERIMENT = restoration.make_experiment(
    Path(__file__).parent,
    "Does a latent diffusion model fill hidden parts of a picture better than the nearest known pixels do?",
    "nearest known pixel",
    {"concat.type": "inpainting"},
)

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
