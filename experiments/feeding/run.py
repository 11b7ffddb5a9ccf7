"""Feeding rates: JPEG images with captions, and latents, streamed from ArrayRecord by Grain, on one host.

    .venv/bin/python -m experiments.feeding.run [--num=100000] [--num512=20000] [--seconds=20]

Writes results.json and prints the table of README.md. The set of `num` images of 256 x 256 takes some 3 GB below
--folder, and is kept there; it can be trained on by --config.data.name=synthetic_256.
"""

import argparse
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.feeds import HostFeed, Source
from ldm_jax.data.prepare import Builder, build, one_at_a_time
from ldm_jax.data.shards import Shards, write_index

HERE = Path(__file__).parent
BATCH, WARM_UP = 64, 16  # examples; batches before the measurement, twice as many as Grain reads ahead
QUALITY = 90  # of JPEG
LATENTS = 8192  # examples of latents
COLOURS = ("red", "green", "blue", "grey", "yellow", "purple")
ADJECTIVES = ("smooth", "rough", "bright", "dark", "soft", "wild")


def clouds(side: int) -> np.ndarray:
    """An image uint8 [side, side, 3] with the spectrum of photographs: amplitudes that fall as 1 / frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    spectrum = np.fft.fft2(rng.normal(size=(3, side, side))) / frequency
    image = np.fft.ifft2(spectrum).real
    return (128 + 50 * image / image.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def captioned_images(numbers: range, size: int) -> Iterator[tuple[int, dict]]:
    """JPEG files of random parts of one large image, each with a caption of its own, which has its number."""
    whole, rng = Image.fromarray(clouds(2048)), np.random.default_rng(1 + numbers.start)
    for number in tqdm(numbers, desc=f"{size} px", disable=None):
        left, upper = rng.integers(0, 2048 - size, 2)
        file = io.BytesIO()
        whole.crop((left, upper, left + size, upper + size)).save(file, "JPEG", quality=QUALITY)
        adjective, colour = rng.choice(ADJECTIVES), rng.choice(COLOURS)
        yield (
            number,
            {"image": io.BytesIO(file.getvalue()), "caption": f"a {adjective} {colour} cloud, number {number}"},
        )


def prepare(folder: Path, num: int, test: int, size: int) -> str:
    """The name of the data set of `num` images to train on and `test` to test, prepared below `folder`."""
    name, version = f"synthetic_{size}", f"1.{num}.{test}"
    features = {"image": tfds.features.Image(shape=(size, size, 3)), "caption": tfds.features.Text()}
    splits = {"train": captioned_images(range(num), size), "test": captioned_images(range(num, num + test), size)}
    with one_at_a_time(folder / name):
        if not (folder / name / version).is_dir():
            build(Builder(name, version, folder, features, splits))
    return f"{name}:{version}"


def shards_of_latents(folder: Path, side: int) -> Shards:
    """Moments of Stable Diffusion's shape, random numbers, [LATENTS, 1, side, side, 8], written below `folder`."""
    folder, rng = folder / f"latents_{side}", np.random.default_rng(0)
    write_index(folder, "random", LATENTS, 1024, {"moments": ("<f4", (1, side, side, 8)), "label": ("<i4", ())})
    shards, valid = Shards(folder), np.ones(BATCH, bool)
    for number, rows in enumerate(shards.rows):
        if not shards.is_complete(number):
            moments = (rng.normal(size=(BATCH, 1, side, side, 8)) for _ in range(0, len(rows), BATCH))
            shards.write(number, ({"moments": each, "label": np.zeros(BATCH), "valid": valid} for each in moments))
    return shards


def rates(source: Source, seconds: float, threads: int) -> dict[str, float]:
    """Examples a second of the feed with so many threads, and a second of a core."""
    feed = HostFeed(source, BATCH, 0, threads=threads)
    for step in range(WARM_UP):
        feed(step)
    step, start, core_start = WARM_UP, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        feed(step)
        step += 1
    num = (step - WARM_UP) * BATCH
    return {"a second": num / (time.perf_counter() - start), "a core": num / (time.process_time() - core_start)}


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*array_record*"))


def measure_images(folder: Path, num: int, test: int, size: int, seconds: float) -> dict[str, float]:
    """The rates of a captioned set."""
    name, start = prepare(folder, num, test, size), time.perf_counter()
    options = {"caption_key": "caption", "image_size": size, "data_dir": folder, "memory_limit": 0}
    dataset = load_dataset(name, "train", **options)
    row = {"examples": num, "opening": time.perf_counter() - start}
    row["bytes each"] = size_on_disk(folder / name.replace(":", "/")) / (num + test)
    return row | _all_rates(dataset, seconds)


def measure_latents(folder: Path, side: int, seconds: float) -> dict[str, float]:
    """The rates of latents in shards."""
    shards = shards_of_latents(folder, side)
    row = {"examples": LATENTS, "bytes each": size_on_disk(shards.paths[0].parent) / LATENTS}
    return row | _all_rates(shards, seconds)


def _all_rates(source: Source, seconds: float) -> dict[str, float]:
    return {f"threads {threads}": rates(source, seconds, threads) for threads in (1, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=100_000, help="images of 256 x 256")
    parser.add_argument("--num512", type=int, default=20_000, help="images of 512 x 512")
    parser.add_argument("--test", type=int, default=64, help="images of the test splits")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--folder", type=Path, default=Path("data/feeding"))
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    rows = {
        "JPEG, 256 px": measure_images(args.folder, args.num, args.test, 256, args.seconds),
        "JPEG, 512 px": measure_images(args.folder, args.num512, args.test, 512, args.seconds),
        "latents, 256 px": measure_latents(args.folder, 32, args.seconds),
        "latents, 512 px": measure_latents(args.folder, 64, args.seconds),
    }
    for name, row in rows.items():
        opening = f", opened in {row['opening']:.1f} s" if "opening" in row else ""
        print(
            f"{name:>16} {row['examples']:7,} examples of {row['bytes each'] / 1000:6.1f} kB: "
            f"{row['threads 1']['a core']:7.0f} a core, {row['threads 8']['a second']:7.0f} a second on "
            f"{os.cpu_count()} cores{opening}"
        )
    args.results.write_text(json.dumps({"cores": os.cpu_count(), "batch": BATCH, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
