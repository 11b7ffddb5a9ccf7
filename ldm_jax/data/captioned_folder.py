"""Your own pictures with captions, in the convention of imagefolder: --config.data.name=folder --config.data.path=DIR

A picture's caption is the `text` of the line of a metadata.jsonl, in its folder or one above, whose `file_name` it has
(relative to that file), or else the content of the .txt file beside it that has its name. As in `image_folder`, the
folders of DIR are the splits if one of them is "train"; otherwise all is "train". What cannot be used is left out, and
counted on the screen.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from ldm_jax.data.image_folder import VERSION, ImageFolder, picture_files, roots_of
from ldm_jax.data.images import decode
from ldm_jax.data.prepare import build, one_at_a_time
from ldm_jax.data.skipped import Skipped, report, tell
from ldm_jax.errors import InputError
from ldm_jax.runtime.files import read_json, write_json

METADATA = "metadata.jsonl"
SKIPPED = "skipped.json"  # beside the prepared data set

Splits = dict[str, list[tuple[Path, str]]]


def prepare(data_dir: Path, manual_dir: Path | None) -> Path:
    """The folder of the pictures in `manual_dir` as a prepared data set below `data_dir`; another for other contents.

    Raises:
        InputError: there are no pictures with captions, or a metadata.jsonl is damaged.
        RunError: the data set cannot be written.
    """
    if manual_dir is None:
        raise InputError("config.data.name=folder needs config.data.path: the folder with your pictures and captions")
    if not manual_dir.is_dir():
        raise InputError(f"config.data.path={manual_dir} is no folder; it must be one with pictures and captions")
    splits, skipped = find_captioned(manual_dir)
    name = f"folder_{_content_hash(splits)}"
    with one_at_a_time(data_dir / name):
        if not (data_dir / name / VERSION).is_dir():
            splits, unreadable = _readable(splits)
            _check_any(manual_dir, splits, [*skipped, *unreadable])
            write_json(data_dir / name / SKIPPED, unreadable)
            options = {"data_dir": data_dir, "file_format": "array_record"}
            build(ImageFolder(name=name, splits=splits, captions=True, **options))
        unreadable = [tuple(entry) for entry in read_json(data_dir / name / SKIPPED)]
    for line in report([*skipped, *unreadable]):
        tell(line)
    return data_dir / name / VERSION


def find_captioned(source: Path) -> tuple[Splits, Skipped]:
    """Split -> its pictures' paths with their captions, and what is left out.

    Raises:
        InputError: no picture has a caption, or a metadata.jsonl is damaged.
    """
    splits: Splits = {}
    skipped: Skipped = []
    for split, root in roots_of(source).items():
        listed = dict(line for path in sorted(root.rglob(METADATA)) for line in _metadata(path))
        splits[split] = []
        for path in picture_files(root):
            caption = listed.pop(path.resolve(), None)
            try:
                caption = _beside(path) if caption is None else caption
            except ValueError:
                skipped.append(("with a .txt file that is not UTF-8 text", str(path)))
                continue
            if caption:
                splits[split].append((path, caption))
            else:
                skipped.append(("without a caption", str(path)))
        skipped += [(f"named in a {METADATA} but not there", str(path)) for path in listed]
    splits = {split: pictures for split, pictures in splits.items() if pictures}
    _check_any(source, splits, skipped)
    return splits, skipped


def _metadata(path: Path) -> Iterator[tuple[Path, str]]:
    """The pictures that a metadata.jsonl names, and their captions."""
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
            raise InputError(
                f"{path}, line {number} must have a file_name and a text, "
                'e.g. {"file_name": "1.png", "text": "a cat"}'
            )
        yield (path.parent / fields[0]).resolve(), fields[1].strip()


def _beside(path: Path) -> str:
    """The caption in the .txt file beside a picture; "" if there is none. Raises ValueError for what is no text."""
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""


def _readable(splits: Splits) -> tuple[Splits, Skipped]:
    """The pictures that can be read, and those that cannot."""
    sound: Splits = {}
    skipped: Skipped = []
    for split, pictures in splits.items():
        for path, caption in pictures:
            try:
                decode(path.read_bytes())
                sound.setdefault(split, []).append((path, caption))
            except (InputError, OSError) as error:
                skipped.append(("that cannot be read", f"{path}: {error}"))
    return sound, skipped


def _check_any(source: Path, splits: Splits, skipped: Skipped) -> None:
    if not splits:
        why = (
            f"left out are {'; '.join(report(skipped))}" if skipped else f"it needs pictures, and a {METADATA} or .txt"
        )
        raise InputError(
            f"config.data.path={source} has no picture with a caption: {why}; for pictures without, see "
            "python -m ldm_jax.data.image_folder --help"
        )


def _content_hash(splits: Splits) -> str:
    """Of what the data set is made of: captions, and the names, sizes and times of the pictures."""
    digest = hashlib.sha256()
    for split, pictures in splits.items():
        for path, caption in pictures:
            about = path.stat()
            digest.update(json.dumps([split, str(path), about.st_size, about.st_mtime_ns, caption]).encode())
    return digest.hexdigest()[:12]
