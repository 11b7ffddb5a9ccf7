"""The colour emoji of Noto (Google, OFL) with captions, as a TensorFlow Datasets builder: 3,655 pictures in Unicode 15.

Each example has an `image`, RGB, 128 x 128, on white; `captions`, several, of which the first is the name; the `group`
and `subgroup` that Unicode lists it in; its `codepoints`, and these without skin tones, `toneless`. "validation" holds
about a tenth of the emoji with all their variants. Two files make it, from Debian's packages fonts-noto-color-emoji and
unicode-data: `make emoji-data`.
"""

import hashlib
import io
from pathlib import Path

import tensorflow_datasets as tfds
from tqdm import tqdm

from ldm_jax.data.emoji_font import SIZE, draw, read_font
from ldm_jax.data.emoji_names import Emoji, captions_of, in_hex, read_emoji, split_of, toneless_of
from ldm_jax.data.prepare import build, one_at_a_time
from ldm_jax.data.skipped import Skipped, report, tell
from ldm_jax.errors import InputError
from ldm_jax.runtime.files import read_json, write_json

FONT, NAMES = "NotoColorEmoji.ttf", "emoji-test.txt"
# File -> Debian's package with it, and where that puts it.
PACKAGES = {FONT: "fonts-noto-color-emoji", NAMES: "unicode-data"}
PLACES = {FONT: "usr/share/fonts/truetype/noto", NAMES: "usr/share/unicode/emoji"}
SPLITS = ("train", "validation")
MADE_OF = "made_of.json"  # beside the prepared data set: {"sha256": {file: ...}, "skipped": [[why, example], ...]}

Drawn = dict[Emoji, bytes]  # the picture as a PNG file


class EmojiPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The builder. `drawn` is from `draw_all`; the rest of the arguments are TFDS's."""

    name = "emoji"
    VERSION = tfds.core.Version("1.1.0")
    code_path = None  # as in `FashionMnist`

    def __init__(self, *, drawn: Drawn, **kwargs):
        self._drawn = drawn
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "group": tfds.features.ClassLabel(names=list(dict.fromkeys(emoji.group for emoji in self._drawn))),
            "subgroup": tfds.features.ClassLabel(names=list(dict.fromkeys(emoji.subgroup for emoji in self._drawn))),
            "codepoints": tfds.features.Text(),
            "toneless": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        for emoji, png in self._drawn.items():
            if split_of(emoji.points) == split:
                told = {"captions": captions_of(emoji), "group": emoji.group, "subgroup": emoji.subgroup}
                points, toneless = in_hex(emoji.points), in_hex(toneless_of(emoji.points))
                yield points, {"image": io.BytesIO(png), "codepoints": points, "toneless": toneless} | told


def prepare(data_dir: Path, manual_dir: Path | None = None) -> Path:
    """The folder of the prepared data set under `data_dir`; prepares it at the first call (seconds).

    Args:
        data_dir: where data sets live; also searched for the two packages, unpacked there by `make emoji-data`.
        manual_dir: a folder with the two files, instead of searching for them.

    Raises:
        InputError: a file is missing or damaged, or the data set is prepared from others than those in `manual_dir`.
        RunError: the data set cannot be written.
    """
    home = data_dir / EmojiPictures.name
    done = home / str(EmojiPictures.VERSION)
    if manual_dir or not done.is_dir():
        files = find_files(data_dir, manual_dir)
        with one_at_a_time(home):
            if not done.is_dir():
                _prepare(files, data_dir, home)
        _check_same(files, home)
    for line in report([tuple(entry) for entry in read_json(home / MADE_OF, "skipped")["skipped"]]):
        tell(line)
    return done


def find_files(data_dir: Path, manual_dir: Path | None) -> dict[str, Path]:
    """Name of each file -> where it lies: in `manual_dir` if given, else where its package puts it.

    Raises:
        InputError: one is not there.
    """
    found = {}
    for name, place in PLACES.items():
        candidates = [manual_dir] if manual_dir else [data_dir / place, Path("/", place)]
        paths = [folder / name for folder in candidates if (folder / name).is_file()]
        if not paths:
            looked = " or ".join(map(str, candidates))
            raise InputError(
                f"{name} is not in {looked}: `make emoji-data` fetches it where apt is at hand, `apt-get install "
                f"{PACKAGES[name]}` installs it, and --config.data.path=FOLDER says where it and {_other(name)} are"
            )
        found[name] = paths[0]
    return found


def draw_all(font_path: Path, names_path: Path) -> tuple[Drawn, Skipped]:
    """Every emoji with its picture, and those that the font has none of.

    Raises:
        InputError: a file is damaged, or the font has not one of the emoji.
    """
    font, drawn, skipped = read_font(font_path), {}, []
    for emoji in tqdm(read_emoji(names_path), desc="Drawing emoji", leave=False, disable=None):
        image = draw(font, emoji.points)
        if image is None:
            skipped.append((f"that {FONT} has no single glyph for", emoji.name))
        elif all(low == high for low, high in image.getextrema()):
            skipped.append((f"that {FONT} has a blank for", emoji.name))
        else:
            png = io.BytesIO()
            image.save(png, "png")
            drawn[emoji] = png.getvalue()
    missing = [split for split in SPLITS if split not in map(split_of, (emoji.points for emoji in drawn))]
    if missing:
        raise InputError(f"{font_path} has too few of the emoji in {names_path}: none for {' and '.join(missing)}")
    return drawn, skipped


def _prepare(files: dict[str, Path], data_dir: Path, home: Path) -> None:
    drawn, skipped = draw_all(files[FONT], files[NAMES])
    write_json(home / MADE_OF, {"sha256": _hashes(files), "skipped": skipped})
    build(EmojiPictures(drawn=drawn, data_dir=data_dir, file_format="array_record"))


def _check_same(files: dict[str, Path], home: Path) -> None:
    """Whether the data set is made of these files: a folder that is named is not to be passed over."""
    known, found = read_json(home / MADE_OF, "sha256")["sha256"], _hashes(files)
    others = [str(files[name]) for name in PLACES if known.get(name) != found[name]]
    if others:
        raise InputError(
            f"{home} is prepared from other files than {' and '.join(others)}: delete it, or choose another data.dir"
        )


def _hashes(files: dict[str, Path]) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def _other(name: str) -> str:
    return NAMES if name == FONT else FONT
