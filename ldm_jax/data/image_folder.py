"""Your own pictures as a data set: python -m ldm_jax.data.image_folder --source=photos --name=photos

Pictures may lie in SOURCE itself (no labels) or in one folder per class. If SOURCE has a folder "train", its folders
are the splits instead ("train", "test", ...), each laid out that way; otherwise all is "train", and "train[:90%]" and
"train[90%:]" are ready to use as splits, since the order is shuffled. The files are taken over as they are, without
loss: size, crop and colours stay a matter of the run's config. Then: --config.data.name=photos
"""

import argparse
import sys
from pathlib import Path

import tensorflow_datasets as tfds
from tqdm import tqdm

from ldm_jax.data.catalog import BUILDERS, NAME
from ldm_jax.data.images import decode
from ldm_jax.data.prepare import build, one_at_a_time
from ldm_jax.errors import InputError, RunError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VERSION = "1.0.0"


class ImageFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The builder. `splits` is from `find_pictures`, or with `captions` has a caption beside each path; the rest of the
    arguments are TFDS's.
    """

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # as in `FashionMnist`

    def __init__(
        self, *, name: str, splits: dict[str, list[tuple[Path, str | None]]], captions: bool = False, **kwargs
    ):
        self.name = name
        self._splits, self._captions = splits, captions
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image()}  # encoded files; only arrays would need TensorFlow
        classes = sorted({label for pictures in self._splits.values() for _, label in pictures if label is not None})
        if self._captions:
            features["caption"] = tfds.features.Text()
        elif classes:
            features["label"] = tfds.features.ClassLabel(names=classes)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split, pictures) for split, pictures in self._splits.items()}

    def _generate_examples(self, split, pictures):
        for path, label in tqdm(pictures, desc=f"Preparing {split}", leave=False, disable=None):
            try:
                decode(path.read_bytes())
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            told = {"caption" if self._captions else "label": label}
            yield str(path), {"image": path} | ({} if label is None else told)


def find_pictures(source: Path) -> dict[str, list[tuple[Path, str | None]]]:
    """Split -> its pictures' paths with their classes (None: no classes), in the order of their names.

    Raises:
        InputError: `source` has no pictures, or some with a class and some without.
    """
    splits = {}
    for split, root in roots_of(source).items():
        paths = picture_files(root)
        parts = [path.relative_to(root).parts for path in paths]
        splits[split] = [(path, part[0] if len(part) > 1 else None) for path, part in zip(paths, parts)]
    labels = [label for pictures in splits.values() for _, label in pictures]
    if not labels:
        raise InputError(f"{source} has no pictures ({', '.join(sorted(EXTENSIONS))})")
    if None in labels and any(labels):
        path = next(path for pictures in splits.values() for path, label in pictures if label is None)
        raise InputError(f"{path} is in no class's folder, others in {source} are: all of them or none")
    return splits


def roots_of(source: Path) -> dict[str, Path]:
    """Split -> its folder."""
    if (source / "train").is_dir():
        return {folder.name: folder for folder in sorted(source.iterdir()) if folder.is_dir()}
    return {"train": source}


def picture_files(root: Path) -> list[Path]:
    """The files below `root` that are pictures by their names, in the order of these."""
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def prepare(source: Path, name: str, data_dir: Path) -> Path:
    """Prepares the pictures in `source` as the data set `name` under `data_dir`, and returns its folder."""
    parts = NAME.fullmatch(name)
    if not parts or parts["config"] or parts["version"] or name in BUILDERS:
        raise InputError(f"--name={name}: letters, digits and underscores, and none of {', '.join(BUILDERS)}")
    folder = data_dir / name
    splits = find_pictures(source)
    with one_at_a_time(folder):
        if (folder / VERSION).is_dir():
            raise InputError(f"{folder / VERSION} is there already: delete it to prepare it anew")
        return build(ImageFolder(name=name, splits=splits, data_dir=data_dir, file_format="array_record"))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the folder of pictures")
    parser.add_argument("--name", required=True, help="what to call the data set")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where data sets live (default: data)")
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
