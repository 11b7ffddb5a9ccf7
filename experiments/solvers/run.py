"""Which solver makes the best pictures in how many network calls, on a trained model?

    .venv/bin/python -m experiments.solvers.run --run=runs/fashion_mnist [--budget=smoke|cpu|gpu] [--data_dir=data]

FD-VGG16 and the share that the judge of experiments/judge reads as intended, for every solver, with the run's own
guidance and spacing. What is in results.json already is not measured again. See also analytic.py.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.judge.run import open_court
from ldm_jax import samplers, trained
from ldm_jax.evaluation.features import vgg16_features
from ldm_jax.evaluation.metrics import frechet_distance
from ldm_jax.generate import request
from ldm_jax.training.parallel import replicate
from ldm_jax.xla import configure

HERE = Path(__file__).parent
PLAIN = ("ddpm", "ddim", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc")
WITH_EPS = ("plms", "heun", "edm")  # also with leading steps, which leave the last timesteps out
SETTINGS = {name: {"sampler": name, "eta": 0.0} for name in (*PLAIN, *WITH_EPS)}
SETTINGS["edm"]["churn"] = 10.0
for name in WITH_EPS:
    SETTINGS = {f"{name} leading": SETTINGS[name] | {"spacing": "leading"}} | SETTINGS
CALLS = (10, 5, 20, 50, 250)
BUDGETS = {  # pictures, and for how many network calls
    "smoke": (100, (5,)),
    "cpu": (1000, CALLS),
    "gpu": (10_000, CALLS),
}


def steps_for(solver: str, calls: int) -> int:
    """As many steps as `calls` network calls allow."""
    return {"plms": calls - 1, "heun": (calls + 1) // 2, "edm": (calls + 1) // 2}.get(solver, calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/fashion_mnist"))
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    configure()
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    court, model, (num, all_calls) = open_court(args.data_dir), trained.load(args.run), BUDGETS[args.budget]
    extractor = vgg16_features(resize=model.config.evaluation.resize, batch_size=250)
    reference = extractor(court.test_set["x"])
    generator, params = samplers.build_generator(model.config, 10, 250), replicate(model.params)
    sampling = model.config.sampling
    for calls in all_calls:
        for setting, options in SETTINGS.items():
            name = f"{args.budget} {calls} {setting}"
            if name not in results:
                steps = steps_for(options["sampler"], calls)
                table = samplers.build_table(model.config, steps=steps, **options)
                wanted = request(
                    num,
                    list(range(10)),
                    guidance=sampling.guidance,
                    seed=0,
                    interval=sampling.guidance_interval,
                    rescale=sampling.guidance_rescale,
                )
                batches = tqdm(generator.images(params, wanted, table), total=-(-num // 250), desc=name)
                images = np.concatenate(list(batches))
                results[name] = {
                    "n": num,
                    "calls": int(table.rows),
                    "fd_vgg16": frechet_distance(extractor(images), reference),
                } | court.scores(images, wanted.labels)
                path.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name:>24}  " + "  ".join(f"{key} {value:.4g}" for key, value in results[name].items()), flush=True)


if __name__ == "__main__":
    main()
