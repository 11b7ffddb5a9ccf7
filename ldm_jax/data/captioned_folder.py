"""A folder of images with captions, as in Hugging Face's imagefolder: --config.data.name=folder --config.data.path=DIR

The caption of an image is the `text` of the line with its `file_name` in a metadata.jsonl, in the image's folder or
one above (the name is relative to that file), or else the .txt file of the image's name. As in `image_folder`, the
folders of DIR are the splits if one of them is "train"; otherwise all is "train". Images without a caption or that
cannot be read are left out, and counted on the screen.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from ldm_jax.data.image_folder import VERSION, Splits, folder_builder, image_files, split_folders
from ldm_jax.data.images import decode
from ldm_jax.data.prepare import build, one_at_a_time
from ldm_jax.data.skipped import Skipped, print_once, summarize
from ldm_jax.errors import InputError
from ldm_jax.runtime.files import read_json, write_json

METADATA = "metadata.jsonl"
SKIPPED = "skipped.json"  # in the folder of the prepared data set


def prepare(data_dir: Path, manual_dir: Path | None) -> Path:
    """The folder of the data set prepared from the images of `manual_dir`, below `data_dir`; one for each content.

    Raises InputError without images with captions or for a damaged metadata.jsonl, RunError if it cannot be written.
    """
    if manual_dir is None:
        raise InputError("config.data.name=folder needs config.data.path: the folder of your images and captions")
    if not manual_dir.is_dir():
        raise InputError(f"config.data.path={manual_dir} is no folder; it must be one of images and captions")
    splits, skipped = _find_images(manual_dir)
    home = data_dir / f"folder_{_content_hash(splits)}"
    with one_at_a_time(home):
        if not (home / VERSION).is_dir():
            splits, unreadable = _readable(splits)
            _check_any(manual_dir, splits, [*skipped, *unreadable])
            write_json(home / SKIPPED, unreadable)
            build(folder_builder(home.name, data_dir, splits, "caption"))
        unreadable = [tuple(entry) for entry in read_json(home / SKIPPED)]
    for line in summarize([*skipped, *unreadable]):
        print_once(line)
    return home / VERSION


def _find_images(source: Path) -> tuple[Splits, Skipped]:
    splits: Splits = {}
    skipped: Skipped = []
    for split, root in split_folders(source).items():
        listed = dict(line for path in sorted(root.rglob(METADATA)) for line in _metadata(path))
        splits[split] = []
        for path in image_files(root):
            caption = listed.pop(path.resolve(), None)
            try:
                caption = _caption_file(path) if caption is None else caption
            except ValueError:
                skipped.append(("with a .txt file that is not UTF-8 text", str(path)))
                continue
            if caption:
                splits[split].append((path, caption))
            else:
                skipped.append(("without a caption", str(path)))
        skipped += [(f"named in a {METADATA} but not there", str(path)) for path in listed]
    splits = {split: images for split, images in splits.items() if images}
    _check_any(source, splits, skipped)
    return splits, skipped


def _metadata(path: Path) -> Iterator[tuple[Path, str]]:
    """The images and captions that a metadata.jsonl lists."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except ValueError:
        raise InputError(f"{path} is damaged: it is not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is damaged: {error}") from None
        fields = [entry.get(name) if isinstance(entry, dict) else None for name in ("file_name", "text")]
        if not all(isinstance(field, str) for field in fields):
            example = '{"file_name": "1.png", "text": "a cat"}'
            raise InputError(f"{path}, line {number} must have a file_name and a text, e.g. {example}")
        yield (path.parent / fields[0]).resolve(), fields[1].strip()


def _caption_file(path: Path) -> str:
    """The content of the .txt file of an image's name; "" if there is none. Raises ValueError if it is not text."""
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""


def _readable(splits: Splits) -> tuple[Splits, Skipped]:
    """The images that can be decoded, and those that cannot."""
    readable: Splits = {}
    skipped: Skipped = []
    for split, images in splits.items():
        for path, caption in images:
            try:
                decode(path.read_bytes())
                readable.setdefault(split, []).append((path, caption))
            except (InputError, OSError) as error:
                skipped.append(("that cannot be read", f"{path}: {error}"))
    return readable, skipped


def _check_any(source: Path, splits: Splits, skipped: Skipped) -> None:
    if not splits:
        why = (
            f"left out are {'; '.join(summarize(skipped))}" if skipped else f"it needs images, and a {METADATA} or .txt"
        )
        raise InputError(
            f"config.data.path={source} has no image with a caption: {why}; for images without captions, see "
            "python -m ldm_jax.data.image_folder --help"
        )


def _content_hash(splits: Splits) -> str:
    """A hash of the captions and of the images' names, sizes and modification times."""
    digest = hashlib.sha256()
    for split, images in splits.items():
        for path, caption in images:
            stat = path.stat()
            digest.update(json.dumps([split, str(path), stat.st_size, stat.st_mtime_ns, caption]).encode())
    return digest.hexdigest()[:12]
