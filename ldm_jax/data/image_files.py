"""The image files in a folder and below, its splits, and the files that are left out."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from ldm_jax.data.images import decode, eight_bits
from ldm_jax.data.skipped import Skipped
from ldm_jax.errors import InputError

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
Image.init()  # so that `Image.OPEN` has the formats of this installation
EXTENSIONS = {end for end, name in Image.registered_extensions().items() if name in FORMATS and name in Image.OPEN}
# Files and folders of operating systems and NAS boxes, in lower case; those that begin with a dot are hidden anyway.
SYSTEM = {"@eadir", "@recycle", "#recycle", "$recycle.bin", "__macosx", "__pycache__", "desktop.ini", "ehthumbs.db"}
SYSTEM |= {"lost+found", "system volume information", "thumbs.db"}
# Name of a folder, in lower case -> its split.
SPLITS = {name: name for name in ("train", "test", "validation", "valid", "val", "dev")}
SPLITS |= {"training": "train", "testing": "test"}

Splits = dict[str, list[tuple[Path, str | None]]]  # split -> paths of its images, with their class or caption


class Files(NamedTuple):
    """The files in a folder and below, each list sorted."""

    images: list[Path]
    others: list[Path]
    left_out: Skipped  # hidden files and folders, broken links, ...


def list_files(source: Path) -> Files:
    """The files in a folder and below, through symbolic links too; InputError if it is no folder."""
    if not source.is_dir():
        raise InputError(f"{show(source)} is no folder")
    files = Files([], [], [])
    pending = [(source, frozenset({source.resolve()}))]  # a folder, and the real paths of it and of those above it
    while pending:
        folder, above = pending.pop()
        try:
            for path in folder.iterdir():
                why = _why_not(path)
                if not why and path.is_dir():
                    real = path.resolve()
                    why = "links to a folder that they are in" if real in above else ""
                    if not why:
                        pending.append((path, above | {real}))
                elif not why:
                    (files.images if path.suffix.lower() in EXTENSIONS else files.others).append(path)
                if why:
                    files.left_out.append((why, show(path)))
        except OSError as error:
            files.left_out.append(("folders that cannot be read", f"{show(folder)}: {error.strerror}"))
    return Files(*map(sorted, files))


def _why_not(path: Path) -> str:
    """Why a file or folder is left out, whatever it holds; "" if it is not."""
    if path.name.startswith(".") or path.name.lower() in SYSTEM:
        return "hidden or system files and folders"
    if path.is_dir() or path.is_file():
        return ""
    return "broken links" if path.is_symlink() else "neither files nor folders"


def show(path: Path | str) -> str:
    """A path as text of one line: control characters, and bytes that are not UTF-8, are escaped."""
    try:
        text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # other lone surrogates, as in JSON
        text = str(path).encode("utf-8", "backslashreplace").decode()
    unprintable = ("Cc", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in unprintable else c for c in text)


def by_type(others: Iterable[Path]) -> Skipped:
    """Files that are no images, or of formats that cannot be read here, each with its type as the reason."""
    return [(f"{show(path.suffix.lower())} files" if path.suffix else "files without an extension", show(path))
            for path in others]  # fmt: skip


def split_folders(source: Path, images: Iterable[Path]) -> tuple[dict[str, Path], str]:
    """Split -> its folder in `source`, and a note on folders that could have been splits, or "".

    The folders in `source` with images are splits if all have the name of one and "train" is among them; else
    "train" is `source` itself.
    """
    parts = (path.relative_to(source).parts for path in images)
    folders = sorted({part[0] for part in parts if len(part) > 1})
    splits = [SPLITS.get(folder.lower()) for folder in folders]
    if "train" not in splits:
        return {"train": source}, ""
    if None in splits or len(set(splits)) < len(splits):
        named = [show(folder) for folder, split in zip(folders, splits) if split]
        others = [show(folder) for folder, split in zip(folders, splits) if not split]
        why = f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''} {'is' if len(others) == 1 else 'are'} not"
        why = why if others else "two are of one split"
        return {"train": source}, f"{', '.join(named)}: no splits, though named so, as {why}"
    return {split: source / folder for split, folder in zip(splits, folders)}, ""


def readable(splits: Splits) -> tuple[Splits, Skipped]:
    """The images that can be decoded, and those that cannot, with the reason; splits without images are left out."""
    kept: Splits = {}
    damaged: Skipped = []
    total = sum(map(len, splits.values()))
    with tqdm(desc="Reading images", total=total, delay=3, leave=False, disable=None) as bar:
        for split, images in splits.items():
            for path, label in images:
                bar.update()
                try:
                    eight_bits(decode(path.read_bytes()))
                    kept.setdefault(split, []).append((path, label))
                except InputError as error:
                    damaged.append(("that cannot be read", f"{show(path)}: {error}"))
                except OSError as error:
                    damaged.append(("that cannot be read", f"{show(path)}: {error.strerror}"))
    return kept, damaged
