"""Does a latent diffusion model enlarge a picture better than bicubic interpolation does?

    python experiments/super_resolution/run.py [--budget=smoke|cpu|gpu]

7 x 7 pixels to 28 x 28, as configs/fashion_mnist_superres.py has it: the small image lies beside the latents as one
more channel of the UNet's input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

from experiments import frame, restoration

CHANGES = {
    "data.label_key": "none",
    "concat.type": "low_resolution",
    "concat.factor": 4,
    "sampling.guidance": 1.0,
}
EXPERIMENT = restoration.make_experiment(
    Path(__file__).parent,
    "Does a latent diffusion model enlarge a picture better than bicubic interpolation does?",
    "bicubic",
    CHANGES,
)

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
