"""Your own images as a data set: python -m ldm_jax.data.image_folder --source=photos --name=photos

Images may lie in SOURCE itself (no labels) or in one folder per class. If all folders of SOURCE are named as splits
(train, test, validation, valid, val, dev) and one is "train", they are the splits, each laid out that way; otherwise
all is "train", and "train[:90%]" and "train[90%:]" are ready to use as splits, since the order is shuffled. Links are
followed; hidden files and files of other types are left out, counted, and listed in left_out.txt in the folder of the
data set. The files are stored as they are: size, crop and channels are set in the run's config. Then:
--config.data.name=photos
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ldm_jax.data.caption_files import caption_files
from ldm_jax.data.catalog import BUILDERS, NAME
from ldm_jax.data.folder_builder import VERSION, describe, folder_builder
from ldm_jax.data.image_files import EXTENSIONS, SPLITS, Splits, by_type, list_files, readable, show, split_folders
from ldm_jax.data.prepare import build, one_at_a_time
from ldm_jax.data.skipped import LEFT_OUT, Skipped, report
from ldm_jax.errors import InputError, RunError
from ldm_jax.runtime.files import atomic
from ldm_jax.runtime.terminal import print_any_text

DAMAGED = "damaged.txt"  # in the folder of the data set: the images for which it was not prepared
NAMED = 3  # damaged images in an error, at most


class FolderImages(NamedTuple):
    """The images of a folder."""

    splits: Splits  # each image with its class; None: no classes
    left_out: Skipped
    notes: list[str]  # on what the folder could have been taken for


def find_images(source: Path) -> FolderImages:
    """The images of a folder with their classes, sorted by path.

    Raises InputError if `source` has no images, or some with a class and some without.
    """
    files = list_files(source)
    folders, note = split_folders(source, files.images)
    splits: Splits = {}
    for split, root in folders.items():
        paths = [path for path in files.images if path.is_relative_to(root)]
        parts = [path.relative_to(root).parts for path in paths]
        splits[split] = [(path, part[0] if len(part) > 1 else None) for path, part in zip(paths, parts)]
    images = [image for split in splits.values() for image in split]
    captions = caption_files(files)
    left_out = [*files.left_out, *by_type(path for path in files.others if path not in captions)]
    if not images:
        formats = f"has no images ({', '.join(sorted(EXTENSIONS))})"
        raise InputError(f"{show(source)} {formats}{f'; it has {left_out[0][0]}' if left_out else ''}")
    unlabelled = [path for path, label in images if label is None]
    if 0 < len(unlabelled) < len(images):
        more = f" (nor {'is' if len(unlabelled) == 2 else 'are'} {len(unlabelled) - 1} more)"
        where = f"{show(unlabelled[0])} is in no class's folder{more if len(unlabelled) > 1 else ''}"
        raise InputError(f"{where}, others in {show(source)} are: all of them or none")
    within = {path for path, _ in images}
    left_out += [("images outside the folders of splits", show(path)) for path in files.images if path not in within]
    notes = [note] if note else []
    if nested := _only_folder(files.images, source):
        notes.append(
            f"all images are in folders of {show(nested)}: if those are the classes, that is the folder to give"
        )
    if captions:
        notes.append(f"{show(next(iter(captions)))}: captions, which are not used here; with them: "
                     f"--config.data.name=folder --config.data.path={show(source)}")  # fmt: skip
    return FolderImages(_with_class_names(splits), left_out, notes)


def _only_folder(images: list[Path], source: Path) -> Path | None:
    """The one folder in `source` if all images are in folders of it, as in unpacked archives; else None."""
    parts = [path.relative_to(source).parts for path in images]
    one = len({part[0] for part in parts}) == 1 and min(map(len, parts)) > 2
    return source / parts[0][0] if one and parts[0][0].lower() not in SPLITS else None


def _with_class_names(splits: Splits) -> Splits:
    """The images with the names of their classes in one line; InputError if two folders' names are then the same."""
    folders = {label for images in splits.values() for _, label in images if label is not None}
    names = {folder: show(folder).strip() for folder in folders}
    counts = Counter(names.values())
    for folder, name in names.items():
        if not name or counts[name] > 1:
            raise InputError(f"{name or folder!r} is no name of a class, or of two: rename the folder {folder!a}")
    return {split: [(path, names.get(label)) for path, label in images] for split, images in splits.items()}


def prepare(source: Path, name: str, data_dir: Path, *, skip_damaged: bool = False) -> Path:
    """Prepares the images in `source` as the data set `name` under `data_dir`; returns its folder.

    Prints the numbers of images and what is left out. Raises InputError if there are none, or for damaged ones, which
    `skip_damaged` leaves out.
    """
    parts = NAME.fullmatch(name)
    if not parts or parts["config"] or parts["version"] or name in BUILDERS:
        raise InputError(f"--name={name}: letters, digits and underscores, and none of {', '.join(BUILDERS)}")
    folder, images = data_dir / name, find_images(source)
    with one_at_a_time(folder):
        if (folder / VERSION).is_dir():
            raise InputError(f"{folder / VERSION} is there already: delete it to prepare it anew")
        splits, damaged = readable(images.splits)
        if damaged and not (skip_damaged and splits):
            raise InputError(_damaged(damaged, folder / DAMAGED, any_left=bool(splits)))
        for line in [*describe(splits), *images.notes]:
            print(line, flush=True)
        prepared = build(folder_builder(name, data_dir, splits, "label"))
        (folder / DAMAGED).unlink(missing_ok=True)
        report([*images.left_out, *damaged], folder / LEFT_OUT)
    return prepared


def _damaged(damaged: Skipped, path: Path, *, any_left: bool) -> str:
    """The message on damaged images, after all are listed in a file."""
    with atomic(path) as temporary:
        temporary.write_text("".join(f"{example}\n" for _, example in damaged), encoding="utf-8")
    first = "; ".join(example for _, example in damaged[:NAMED])
    more = f"; and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
    number = "1 image" if len(damaged) == 1 else f"{len(damaged)} images"
    what = "--skip_damaged leaves them out" if any_left else "no other image is there"
    return f"{number} cannot be read, listed in {path}: {first}{more}; {what}"


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the folder of images")
    parser.add_argument("--name", required=True, help="the name of the data set")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="the folder of data sets (default: data)")
    parser.add_argument("--skip_damaged", action="store_true", help="leave out images that cannot be read")
    flags = parser.parse_args()
    print_any_text()
    try:
        folder = prepare(flags.source, flags.name, flags.data_dir, skip_damaged=flags.skip_damaged)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(f"prepared in {folder}: use it with --config.data.name={flags.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
