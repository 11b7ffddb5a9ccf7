"""Your own images as a data set: python -m ldm_jax.data.image_folder --source=photos --name=photos

Images may lie in SOURCE itself (no labels) or in one folder per class. If SOURCE has a folder "train", its folders
are the splits instead ("train", "test", ...), each laid out that way; otherwise all is "train", and "train[:90%]" and
"train[90%:]" are ready to use as splits, since the order is shuffled. The files are stored as they are: size, crop
and channels are set in the run's config. Then: --config.data.name=photos
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from ldm_jax.data.catalog import BUILDERS, NAME
from ldm_jax.data.images import decode
from ldm_jax.data.prepare import Builder, build, one_at_a_time
from ldm_jax.errors import InputError, RunError
from ldm_jax.runtime.files import prefix_errors

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VERSION = "1.0.0"
Splits = dict[str, list[tuple[Path, str | None]]]  # split -> paths of its images, with their class or caption


def folder_builder(name: str, data_dir: Path, splits: Splits, target: str) -> Builder:
    """The TFDS builder of images in folders, each with a class ("label") or a "caption" as its `target`."""
    features = {"image": tfds.features.Image()}  # encoded files; only arrays would need TensorFlow
    classes = sorted({label for images in splits.values() for _, label in images if label is not None})
    if target == "caption":
        features["caption"] = tfds.features.Text()
    elif classes:
        features["label"] = tfds.features.ClassLabel(names=classes)

    def examples(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, label in tqdm(splits[split], desc=f"Preparing {split}", leave=False, disable=None):
            with prefix_errors(path):
                decode(path.read_bytes())
            yield str(path), {"image": path} | ({} if label is None else {target: label})

    return Builder(name, VERSION, data_dir, features, {split: examples(split) for split in splits})


def find_images(source: Path) -> Splits:
    """Split -> paths of its images with their classes (None: no classes), sorted by path.

    Raises InputError if `source` has no images, or some with a class and some without.
    """
    splits = {}
    for split, root in split_folders(source).items():
        paths = image_files(root)
        parts = [path.relative_to(root).parts for path in paths]
        splits[split] = [(path, part[0] if len(part) > 1 else None) for path, part in zip(paths, parts)]
    images = [image for split in splits.values() for image in split]
    if not images:
        raise InputError(f"{source} has no images ({', '.join(sorted(EXTENSIONS))})")
    unlabelled = [path for path, label in images if label is None]
    if 0 < len(unlabelled) < len(images):
        raise InputError(f"{unlabelled[0]} is in no class's folder, others in {source} are: all of them or none")
    return splits


def split_folders(source: Path) -> dict[str, Path]:
    """Split -> its folder."""
    if (source / "train").is_dir():
        return {folder.name: folder for folder in sorted(source.iterdir()) if folder.is_dir()}
    return {"train": source}


def image_files(root: Path) -> list[Path]:
    """The files below `root` with the extension of an image format, sorted."""
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def prepare(source: Path, name: str, data_dir: Path) -> Path:
    """Prepares the images in `source` as the data set `name` under `data_dir`; returns its folder."""
    parts = NAME.fullmatch(name)
    if not parts or parts["config"] or parts["version"] or name in BUILDERS:
        raise InputError(f"--name={name}: letters, digits and underscores, and none of {', '.join(BUILDERS)}")
    folder, splits = data_dir / name, find_images(source)
    with one_at_a_time(folder):
        if (folder / VERSION).is_dir():
            raise InputError(f"{folder / VERSION} is there already: delete it to prepare it anew")
        return build(folder_builder(name, data_dir, splits, "label"))


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the folder of images")
    parser.add_argument("--name", required=True, help="the name of the data set")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="the folder of data sets (default: data)")
    flags = parser.parse_args()
    try:
        folder = prepare(flags.source, flags.name, flags.data_dir)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(f"prepared in {folder}: use it with --config.data.name={flags.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
