"""The colour emoji of Noto (Google, OFL) with captions, prepared as a TFDS data set: 3,655 images in Unicode 15.

Each example has an `image`, RGB, 128 x 128, on white; several `captions`, the name first; the `group` and `subgroup`
of Unicode's list; its `codepoints`, and these without skin tones, `toneless`. "validation" holds about a tenth of the
emoji with all their variants. The font and the list come from Debian's packages fonts-noto-color-emoji and
unicode-data: `make emoji-data`.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from ldm_jax.data.emoji_font import SIZE, read_font, render
from ldm_jax.data.emoji_names import Emoji, captions_of, in_hex, read_emoji, split_of, toneless_of
from ldm_jax.data.prepare import Builder, build, one_at_a_time
from ldm_jax.data.skipped import Skipped, print_once, summarize
from ldm_jax.errors import InputError
from ldm_jax.runtime.files import read_json, write_json

FONT, NAMES = "NotoColorEmoji.ttf", "emoji-test.txt"
# File -> its Debian package, and its folder in that package.
PACKAGES = {FONT: "fonts-noto-color-emoji", NAMES: "unicode-data"}
PLACES = {FONT: "usr/share/fonts/truetype/noto", NAMES: "usr/share/unicode/emoji"}
VERSION, SPLITS = "1.1.0", ("train", "validation")
MADE_OF = "made_of.json"  # next to the prepared versions: {"sha256": {file: ...}, "skipped": [[why, example], ...]}


def _builder(data_dir: Path, images: dict[Emoji, bytes]) -> Builder:
    """The TFDS builder of `images`, emoji -> PNG file, from `render_all`."""
    features = {
        "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "group": tfds.features.ClassLabel(names=list(dict.fromkeys(emoji.group for emoji in images))),
        "subgroup": tfds.features.ClassLabel(names=list(dict.fromkeys(emoji.subgroup for emoji in images))),
        "codepoints": tfds.features.Text(),
        "toneless": tfds.features.Text(),
    }

    def examples(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for emoji, png in images.items():
            if split_of(emoji.points) == split:
                texts = {"captions": captions_of(emoji), "group": emoji.group, "subgroup": emoji.subgroup}
                points, toneless = in_hex(emoji.points), in_hex(toneless_of(emoji.points))
                yield points, {"image": io.BytesIO(png), "codepoints": points, "toneless": toneless} | texts

    return Builder("emoji", VERSION, data_dir, features, {split: examples(split) for split in SPLITS})


def prepare(data_dir: Path, manual_dir: Path | None = None) -> Path:
    """The folder of the prepared data set under `data_dir`; prepares it at the first call (seconds).

    Args:
        data_dir: the folder of data sets; also searched for the two packages, unpacked there by `make emoji-data`.
        manual_dir: the folder of the two files; None searches for them.

    Raises:
        InputError: a file is missing or damaged, or the data set is prepared from other files than in `manual_dir`.
        RunError: the data set cannot be written.
    """
    home = data_dir / "emoji"
    done = home / VERSION
    if manual_dir or not done.is_dir():
        files = find_files(data_dir, manual_dir)
        sha256 = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
        with one_at_a_time(home):
            if not done.is_dir():
                images, skipped = render_all(files[FONT], files[NAMES])
                write_json(home / MADE_OF, {"sha256": sha256, "skipped": skipped})
                build(_builder(data_dir, images))
        recorded = read_json(home / MADE_OF, "sha256")["sha256"]
        if others := [str(path) for name, path in files.items() if recorded.get(name) != sha256[name]]:
            raise InputError(
                f"{home} is prepared from other files than {' and '.join(others)}: delete it, or set another data.dir"
            )
    for line in summarize([tuple(entry) for entry in read_json(home / MADE_OF, "skipped")["skipped"]]):
        print_once(line)
    return done


def find_files(data_dir: Path, manual_dir: Path | None) -> dict[str, Path]:
    """File name -> path: in `manual_dir`, or for None in the folder of its package; InputError if one is missing."""
    files = {}
    for name, place in PLACES.items():
        folders = [manual_dir] if manual_dir else [data_dir / place, Path("/", place)]
        files[name] = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if files[name] is None:
            raise InputError(
                f"{name} is not in {' or '.join(map(str, folders))}: `make emoji-data` fetches it by apt, "
                f"`apt-get install {PACKAGES[name]}` installs it, and --config.data.path=FOLDER sets the folder of "
                f"{' and '.join(PLACES)}"
            )
    return files


def render_all(font_path: Path, names_path: Path) -> tuple[dict[Emoji, bytes], Skipped]:
    """Every emoji with its image as a PNG file, and the emoji that the font lacks; InputError for damaged files."""
    font, images, skipped = read_font(font_path), {}, []
    for emoji in tqdm(read_emoji(names_path), desc="Rendering emoji", leave=False, disable=None):
        image = render(font, emoji.points)
        if image is None:
            skipped.append((f"that {FONT} has no single glyph for", emoji.name))
        elif all(low == high for low, high in image.getextrema()):
            skipped.append((f"that {FONT} has a blank for", emoji.name))
        else:
            png = io.BytesIO()
            image.save(png, "png")
            images[emoji] = png.getvalue()
    missing = [split for split in SPLITS if split not in {split_of(emoji.points) for emoji in images}]
    if missing:
        raise InputError(f"{font_path} has too few of the emoji in {names_path}: none for {' and '.join(missing)}")
    return images, skipped
