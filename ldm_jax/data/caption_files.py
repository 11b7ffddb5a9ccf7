"""Caption files: metadata.jsonl and metadata.csv as in Hugging Face's imagefolder, and .txt or .caption by an image.

A line or row of metadata has a `file_name`, relative to the file's folder, and a `text` (or `caption`, or `prompt`).
Files are UTF-8, or UTF-16 with its byte order mark. Names are found in either Unicode normalization, with "/" or "\\".
"""

import codecs
import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.data.image_files import Files, show
from ldm_jax.data.skipped import Skipped
from ldm_jax.errors import InputError

METADATA = ("metadata.jsonl", "metadata.csv")
TEXTS = (".txt", ".caption")  # the first with a text counts
NAME, KEYS = "file_name", ("text", "caption", "prompt")
EXAMPLE = '{"file_name": "1.png", "text": "a cat"}'
Entry = tuple[str, Any]  # name of an image and its caption, which may be any value of JSON


class Captions(NamedTuple):
    """The captions of a folder's images."""

    of: dict[Path, str]  # "": none
    skipped: Skipped  # captions that are not used
    why: dict[Path, str]  # why an image has no caption, if there is something in its place


def caption_files(files: Files) -> dict[Path, None]:
    """The metadata files, and the text files with an image's name, as an ordered set."""
    stems = {_key(path.with_suffix("")) for path in files.images}
    named = [path for path in files.others if path.suffix.lower() in TEXTS and _key(path.with_suffix("")) in stems]
    return dict.fromkeys([*_metadata_files(files), *named])


def read_captions(files: Files) -> Captions:
    """The captions of images, by metadata (the nearest file first) or else by a text file of an image's name.

    Raises InputError for metadata that are damaged or of another form.
    """
    captions = Captions({}, [], {})
    exact, by_key = {str(path): path for path in files.images}, {}
    for path in files.images:
        by_key.setdefault(_key(path), []).append(path)
    for metadata in _metadata_files(files):
        for name, value in (_json_lines if metadata.suffix.lower() == ".jsonl" else _csv_rows)(metadata):
            path = _find(metadata.parent, name, exact, by_key)
            if path is None:
                why = f"named in a {metadata.name} but not there"
                captions.skipped.append((why, show(os.path.normpath(metadata.parent / name))))
            else:
                _add(captions, path, value)
    texts = {(_key(path.with_suffix("")), path.suffix.lower()): path for path in files.others}
    for path in files.images:
        if path not in captions.of:
            _add_text_files(captions, path, [texts.get((_key(path.with_suffix("")), end)) for end in TEXTS])
    return captions


def _metadata_files(files: Files) -> list[Path]:
    """The deepest first."""
    return sorted(
        (path for path in files.others if path.name.lower() in METADATA), key=lambda path: (-len(path.parts), path)
    )


def _key(path: Path | str) -> str:
    """A path in one Unicode normalization: macOS decomposes names."""
    return unicodedata.normalize("NFC", os.path.normpath(path))


def _find(folder: Path, name: str, exact: dict[str, Path], by_key: dict[str, list[Path]]) -> Path | None:
    """The image that metadata in `folder` name: exactly, with the backslashes of Windows, or in another normal form."""
    for spelling in (name, name.replace("\\", "/")):
        path = os.path.normpath(folder / spelling)
        alike = by_key.get(_key(path), [])
        if path in exact or len(alike) == 1:
            return exact.get(path) or alike[0]
    return None


def _add(captions: Captions, path: Path, value: Any) -> None:
    """Adds a caption of metadata; of several that differ the first counts."""
    text = value.strip() if isinstance(value, str) else ""
    if not _is_text(text) or not isinstance(value, str | None):
        captions.why[path], text = "with a caption in a metadata file that is no text", ""
    if captions.of.get(path):
        if text not in ("", captions.of[path]):
            captions.skipped.append(("further captions of an image that has one", f"{show(path)}: {show(text)}"))
        return
    captions.of[path] = text


def _add_text_files(captions: Captions, path: Path, files: list[Path | None]) -> None:
    for file in filter(None, files):
        try:
            text = _decode(file.read_bytes()).strip()
        except ValueError:
            text = "\0"
        if not _is_text(text):
            captions.why[path] = f"with a {file.suffix.lower()} file that is not UTF-8 text"
        elif text:
            captions.of[path] = text
            return


def _is_text(text: str) -> bool:
    """Whether it can be stored as UTF-8, and holds no binary zeros."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _decode(content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark; raises ValueError for others."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def _read(path: Path) -> str:
    try:
        return _decode(path.read_bytes())
    except ValueError:
        raise InputError(f"{show(path)} is damaged: it is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{show(path)} cannot be read: {error.strerror}") from None


def _json_lines(path: Path) -> Iterator[Entry]:
    for number, line in enumerate(_read(path).split("\n"), start=1):  # texts may hold other line separators
        where = f"{show(path)}, line {number}"
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise InputError(
                f"{show(path)} is a JSON array; each line must have a file_name and a text, e.g. {EXAMPLE}"
            )
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is damaged: {error}") from None
        keys = [key for key in KEYS if isinstance(entry, dict) and key in entry]
        if not keys or not isinstance(entry.get(NAME), str):
            raise InputError(f"{where} must have a file_name and a text, e.g. {EXAMPLE}")
        yield entry[NAME], next((entry[key] for key in keys if entry[key] is not None), None)


def _csv_rows(path: Path) -> Iterator[Entry]:
    """The rows of a table, separated by commas, semicolons or tabs, quoted by double or single quotes."""
    text, where = _read(path), show(path)
    for delimiter in ",;\t":
        header = [name.strip().lower() for _, row in _table(text, delimiter, '"', where)[:1] for name in row]
        columns = [header.index(key) for key in KEYS if key in header]
        if NAME in header and columns:
            break
    else:
        raise InputError(f"{where} must begin with the names of its columns: file_name,text")
    tables = (_table(text, delimiter, quote, where) for quote in "\"'")
    too_long = [[line for line, row in table if len(row) > len(header)] for table in tables]
    if all(too_long):
        rule = "a text with a comma must be in double quotes"
        raise InputError(f"{where}, line {too_long[0][0]} has more columns than the first line: {rule}")
    for _, row in _table(text, delimiter, "'" if too_long[0] else '"', where)[1:]:
        filled = row + [""] * (len(header) - len(row))
        yield filled[header.index(NAME)], next((filled[column] for column in columns if filled[column]), "")


def _table(text: str, delimiter: str, quote: str, where: str) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, with the numbers of their last lines."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quotechar=quote, strict=quote == '"')
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{where} is damaged: {error}") from None
