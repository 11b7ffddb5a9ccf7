"""Does a diffusion model restore a picture better than interpolation does?

    .venv/bin/python -m ldm_jax.train --config=configs/fashion_mnist_superres.py
    .venv/bin/python -m experiments.super_resolution.run --run=runs/fashion_mnist_superres [--data_dir=data]

Takes the scores of a run of super-resolution or inpainting from its evaluation.json to results.json, and draws
figure.png (inpainting.png): what is given, what interpolation makes of it, three drawings, the original.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from ldm_jax import builders, given, run_folder, samplers, trained
from ldm_jax.evaluation import pictures
from ldm_jax.generate import request
from ldm_jax.training.parallel import replicate
from ldm_jax.xla import configure

HERE = Path(__file__).parent
FIGURES = {"low_resolution": "figure.png", "inpainting": "inpainting.png"}
COLUMNS, DRAWINGS = 12, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/fashion_mnist_superres"))
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    configure()
    model = trained.load(args.run)
    config = model.config.copy_and_resolve_references().unlock()
    config.data.dir = args.data_dir
    model, kind = model._replace(config=config.lock()), config.concat.kind

    cards = run_folder.read_json(args.run / "evaluation.json")
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[kind] = {group: cards[group] for group in ("restored", "baseline", "autoencoder")}
    path.write_text(json.dumps(results, indent=1) + "\n")

    # The same pictures and hidden parts, drawn from other noise: all follows from the number of the sample.
    known = given.from_split(config, builders.load_split(config, config.data.test_split), COLUMNS, config.seed)
    rows = {"given": given.shown(config, known), "interpolated": given.baseline(config, known)}
    generator = samplers.build_generator(config, len(model.class_names), COLUMNS)
    params = replicate(model.params)
    table, maps = samplers.build_table(config), generator.maps(params, known.known)
    sampling, labels = config.sampling, known.labels.tolist() if model.class_names else []
    for seed in range(DRAWINGS):
        asked = request(
            COLUMNS, labels, guidance=sampling.guidance, seed=seed, interval=sampling.guidance_interval, maps=maps
        )
        images = np.concatenate(list(generator.images(params, asked, table)))
        rows["drawn" + " " * seed] = given.keep_known(known, images)
    rows["original"] = known.originals
    pictures.save_png(pictures.comparison(rows, columns=COLUMNS), HERE / FIGURES[kind])
    for group, scores in results[kind].items():
        print(group, {name: round(card["value"], 4) for name, card in scores.items()})


if __name__ == "__main__":
    main()
