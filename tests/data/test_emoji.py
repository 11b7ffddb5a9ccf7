import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from emoji_font import write_font
from fontTools.fontBuilder import FontBuilder
from PIL import Image

from ldm_jax.config import defaults
from ldm_jax.data import emoji
from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.emoji_font import BITMAP, read_font, render
from ldm_jax.data.emoji_names import base_of, captions_of, read_emoji, split_of, spoken
from ldm_jax.data.from_config import load_split
from ldm_jax.data.images import decode
from ldm_jax.data.skipped import print_once
from ldm_jax.errors import InputError

REPOSITORY = Path(emoji.__file__).parents[2]

LINES = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                       ; fully-qualified     # 😀 E1.0 grinning face
263A FE0F                   ; fully-qualified     # ☺️ E0.6 smiling face
263A                        ; unqualified         # ☺ E0.6 smiling face

# group: People & Body
# subgroup: hand-fingers-open
1F44B 1F3FE                 ; fully-qualified     # 👋🏾 E1.0 waving hand: medium-dark skin tone
# subgroup: person-role
1F9D1 200D 1F692            ; fully-qualified     # 🧑‍🚒 E12.1 firefighter
1F468 1F3FD 200D 1F692      ; fully-qualified     # 👨🏽‍🚒 E4.0 man firefighter: medium skin tone

# group: Component
# subgroup: skin-tone
1F3FB                       ; component           # 🏻 E1.0 light skin tone

# group: Flags
# subgroup: country-flag
1F1E9 1F1EA                 ; fully-qualified     # 🇩🇪 E0.6 flag: Germany

#EOF
"""
COLOURS = {
    (0x1F600,): "red",
    (0x263A, 0xFE0F): "green",
    (0x1F44B, 0x1F3FE): "blue",
    (0x1F9D1, 0x200D, 0x1F692): "cyan",
    (0x1F468, 0x1F3FD, 0x200D, 0x1F692): "magenta",
    (0x1F1E9, 0x1F1EA): "yellow",
}


def disc(colour, size=BITMAP):
    """A picture with a disc of one colour in its middle and nothing else."""
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    middle = (slice(size[1] // 4, -size[1] // 4), slice(size[0] // 4, -size[0] // 4))
    pixels = np.array(picture)
    pixels[middle] = np.array(Image.new("RGBA", (1, 1), colour))[0, 0]
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a small font and its emoji; copy it to change it."""
    folder = tmp_path_factory.mktemp("emoji")
    write_font(folder / emoji.FONT, {points: disc(colour) for points, colour in COLOURS.items()})
    (folder / emoji.NAMES).write_text(LINES, encoding="utf-8")
    return folder


@pytest.fixture
def source(made, tmp_path):
    return shutil.copytree(made, tmp_path / "source")


@pytest.fixture(scope="module")
def prepared(made, tmp_path_factory):
    """A folder of data sets in which "emoji" is prepared from that."""
    data_dir = tmp_path_factory.mktemp("data")
    emoji.prepare(data_dir, made)
    return data_dir


def test_pictures_and_captions_by_hand(prepared):
    split_and_pixel = {}
    for split in ("train", "validation"):
        dataset = load_dataset("emoji", split, data_dir=prepared, caption_key="auto")
        assert dataset.shape[1:] == (128, 128, 3)
        assert dataset.class_names == tuple(captions[0] for captions in dataset.captions)
        for x, label in zip(dataset.arrays["x"], dataset.arrays["label"]):
            assert (x[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()  # transparent is white
            split_and_pixel[dataset.captions[label]] = (split, tuple(x[64, 64].tolist()))
    expected = {
        "grinning face": ("train", "red"),
        "smiling face": ("train", "green"),
        "waving hand with medium-dark skin tone": ("train", "blue"),
        "firefighter": ("validation", "cyan"),
        "man firefighter with medium skin tone": ("validation", "magenta"),
        "flag of Germany": ("train", "yellow"),
    }
    assert {captions[0] for captions in split_and_pixel} == expected.keys()
    for captions, (split, pixel) in split_and_pixel.items():
        assert (split, pixel) == (
            expected[captions[0]][0],
            Image.new("RGB", (1, 1), expected[captions[0]][1]).getpixel((0, 0)),
        )
    assert (
        "waving hand with medium-dark skin tone",
        "an emoji of waving hand with medium-dark skin tone",
        "waving hand with medium-dark skin tone, from people and body",
        "hand fingers open: waving hand with medium-dark skin tone",
    ) in split_and_pixel


def test_the_other_features(prepared):
    captioned = load_dataset("emoji", "train", data_dir=prepared, caption_key="captions")
    points = load_dataset("emoji", "train", data_dir=prepared, caption_key="codepoints")
    said = {
        points.class_names[p]: captioned.class_names[c]
        for p, c in zip(points.arrays["label"], captioned.arrays["label"])
    }
    assert said["263A FE0F"] == "smiling face" and said["1F1E9 1F1EA"] == "flag of Germany"
    toneless = load_dataset("emoji", "all", data_dir=prepared, caption_key="toneless").class_names
    assert toneless == ("1F1E9 1F1EA", "1F44B", "1F468 200D 1F692", "1F600", "1F9D1 200D 1F692", "263A FE0F")
    for key, names, of_flag in (
        ("group", ("smileys and emotion", "people and body", "flags"), "flags"),
        ("subgroup", ("face smiling", "hand fingers open", "person role", "country flag"), "country flag"),
    ):
        labelled = load_dataset("emoji", "train", data_dir=prepared, label_key=key)
        assert labelled.class_names == names and labelled.captions == ()
        of = {captioned.class_names[c]: names[k] for c, k in zip(captioned.arrays["label"], labelled.arrays["label"])}
        assert of["flag of Germany"] == of_flag


def test_by_config(prepared):
    config = defaults.get_config().unlock()
    config.data.update({"name": "emoji", "dir": str(prepared), "image_size": 16, "channels": 3, "caption_key": "auto"})
    assert load_split(config, "train").shape == (4, 16, 16, 3)
    assert load_split(config, "validation").shape == (2, 16, 16, 3)


def test_a_second_call_needs_no_files(source, tmp_path):
    folder = emoji.prepare(tmp_path / "data", source)
    assert emoji.prepare(tmp_path / "data", source) == folder == tmp_path / "data" / "emoji" / "1.1.0"
    shutil.rmtree(source)
    assert emoji.prepare(tmp_path / "data") == folder
    assert not list(folder.parent.glob("incomplete*"))


def test_the_packages_are_found_below_the_data_folder(made, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "PLACES", {name: f"usr/share/no-such/{name[:5]}" for name in emoji.PLACES})
    for name, place in emoji.PLACES.items():
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(made / name, tmp_path / place)
    assert emoji.find_files(tmp_path, None) == {name: tmp_path / place / name for name, place in emoji.PLACES.items()}


def test_what_is_left_out_is_printed(source, tmp_path, capsys):
    more = """\
1F47B             ; fully-qualified # 👻 E0.6 ghost
1F600 200D 1F600  ; fully-qualified # 😀 E0.6 twins
26AA              ; fully-qualified # ⚪ E0.6 nothing
"""
    (source / emoji.NAMES).write_text(LINES.replace("#EOF", f"{more}#EOF"), encoding="utf-8")
    pictures = {points: disc(colour) for points, colour in COLOURS.items()}
    write_font(source / emoji.FONT, pictures | {(0x26AA,): Image.new("RGBA", BITMAP, (9, 9, 9, 0))})
    for manual_dir in (source, None):  # once drawn, once from the prepared data set
        print_once.cache_clear()
        emoji.prepare(tmp_path / "data", manual_dir)
        assert capsys.readouterr().out.splitlines() == [
            "Skipped: 2 that NotoColorEmoji.ttf has no single glyph for, e.g. ghost",
            "Skipped: 1 that NotoColorEmoji.ttf has a blank for, e.g. nothing",
        ]
    assert len(load_dataset("emoji", "all", data_dir=tmp_path / "data", caption_key="auto")) == 6


# What Debian has.

PACKAGED = ("usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "usr/share/unicode/emoji/emoji-test.txt")


@pytest.fixture(scope="module")
def real_files():
    """Skips only where a file is in neither place, which is looked at here: `find_files` itself must find them."""
    roots = (REPOSITORY / "data", Path("/"))
    missing = [path for path in PACKAGED if not any((root / path).is_file() for root in roots)]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not here: `make emoji-data` fetches them")
    return emoji.find_files(REPOSITORY / "data", None)


@pytest.fixture(scope="module")
def real_emoji(real_files):
    return read_emoji(real_files[emoji.NAMES])


def test_every_emoji_has_a_picture(real_files, real_emoji):
    """One whole glyph each: neither a blank, nor the box for what is missing, nor cut off."""
    font = read_font(real_files[emoji.FONT])
    drawn = {one: render(font, one.points) for one in real_emoji}
    pictures = {one: np.asarray(picture) for one, picture in drawn.items() if picture is not None}
    # A font may be a year older than the names, which then have some hundred more.
    assert len(real_emoji) > 3500 and len(pictures) > 0.95 * len(real_emoji)
    same = defaultdict(list)
    for one, pixels in pictures.items():
        assert pixels.shape == (128, 128, 3)
        assert np.ptp(pixels) > 30 and (pixels < 250).any(-1).mean() > 0.02, one.name
        same[pixels.tobytes()].append(one)
    # Some flags are another country's, and the font may draw somebody in one skin tone only.
    for alike in same.values():
        assert len(alike) <= 5 or len({base_of(one.points) for one in alike}) == 1, [one.name for one in alike]
    assert len(same) > 0.99 * len(pictures)


def test_nothing_is_cut_off(real_files, real_emoji):
    """The columns that `render` leaves out of a bitmap are empty."""
    font = read_font(real_files[emoji.FONT])
    for one in (one for one in real_emoji[::10] if render(font, one.points)):
        names = tuple(font.glyphs[point] for point in one.points if point != 0xFE0F)
        content = font.bitmaps[names[0] if len(names) == 1 else font.ligatures[names]].imageData
        alpha = np.asarray(decode(content).convert("RGBA"))[..., 3]
        assert not alpha[:, :4].any() and not alpha[:, -4:].any(), one.name


def test_captions_of_one_split_are_not_in_the_other(real_emoji):
    captions = {"train": Counter(), "validation": Counter()}
    bases = {"train": set(), "validation": set()}
    for one in real_emoji:
        captions[split_of(one.points)].update(captions_of(one))
        bases[split_of(one.points)].add(base_of(one.points))
    assert not captions["train"].keys() & captions["validation"].keys()
    assert max((captions["train"] | captions["validation"]).values()) == 1  # nor is one said of two emoji
    assert not bases["train"] & bases["validation"]
    assert 0.08 < len(bases["validation"]) / sum(map(len, bases.values())) < 0.12
    assert 0.08 < sum(captions["validation"].values()) / sum(sum(c.values()) for c in captions.values()) < 0.12
    assert all(":" not in one.name and "&" not in one.name for one in real_emoji)


# Names.

SPOKEN = {
    "grinning face": "grinning face",
    "waving hand: medium-dark skin tone": "waving hand with medium-dark skin tone",
    "person: blond hair": "person with blond hair",
    "man: light skin tone, red hair": "man with light skin tone and red hair",
    "woman: bald": "bald woman",
    "person: dark skin tone, bald": "bald person with dark skin tone",
    "man with white cane: light skin tone": "man with white cane and light skin tone",
    "man with white cane": "man with white cane",
    "handshake: light skin tone, dark skin tone": "handshake with light skin tone and dark skin tone",
    "kiss: woman, man": "kiss of a woman and a man",
    "kiss: person, person, dark skin tone": "kiss of two people with dark skin tone",
    "couple with heart: man, man, dark skin tone": "couple of two men with heart and dark skin tone",
    "family: man, woman, girl, boy": "family of a man, a woman, a girl and a boy",
    "family: woman, boy, boy": "family of a woman and two boys",
    "family: adult, adult, child": "family of two adults and a child",
    "flag: Antigua & Barbuda": "flag of Antigua and Barbuda",
    "Japanese “secret” button": 'Japanese "secret" button',
    "woman’s hat": "woman's hat",
    "keycap: #": "keycap #",
    "keycap: 10": "keycap 10",
}  # fmt: skip


@pytest.mark.parametrize("name", SPOKEN)
def test_names_in_words(name):
    assert spoken(name) == SPOKEN[name]


ONE_BASE = [
    "👋 👋🏻 👋🏿",
    "🧑 👨 👩🏽 👨‍🦰 👩🏿‍🦲 🧑‍🦱",
    "👱 👱🏻‍♀️ 👱‍♂️",
    "🧑‍🚒 👨‍🚒 👩🏽‍🚒",
    "🏃 🏃‍♀️ 🏃🏾‍♂️ 🏃‍➡️ 🏃🏻‍♀️‍➡️",
    "👪 👨‍👩‍👦 👩‍👧‍👧 🧑‍🧑‍🧒",
    "💏 👩‍❤️‍💋‍👨 🧑🏻‍❤️‍💋‍🧑🏿",
    "💑 👨‍❤️‍👨 👩🏽‍❤️‍👩🏽",
    "👫 👬🏻 👭 🧑‍🤝‍🧑 👩🏻‍🤝‍👨🏾",
    "🤝 🤝🏽 🫱🏻‍🫲🏿",
    "🎅 🤶🏽 🧑‍🎄",
    "👈 👉🏻 👆 👇",
    "➡️ ⬅️ ↗️",
    "♀️ ♂️",
]


@pytest.mark.parametrize("variants", ONE_BASE)
def test_variants_have_one_base(variants):
    bases = {base_of(tuple(map(ord, one))) for one in variants.split()}
    assert len(bases) == 1 and () not in bases
    assert len({split_of(tuple(map(ord, one))) for one in variants.split()}) == 1


def test_bases_are_told_apart():
    people = "👋 🧑 👶 🧒 👱 🧑‍🚒 🧑‍🌾 🏃 👪 💏 💑 👫 🤝 🎅 👈"
    others = "➡️ ♀️ 🐻 🐻‍❄️ 🐱 🐈 🐈‍⬛ 🏳️ 🏳️‍🌈 🏴‍☠️ 🇩🇪 🇪🇩 1️⃣ 2️⃣ ❤️ 🧡 🕐 🕑"
    different = f"{people} {others}".split()
    assert len({base_of(tuple(map(ord, one))) for one in different}) == len(different)


def test_the_splits_never_change():
    """Pinned: a run is measured on the same emoji as one a year ago."""
    held_out = "🧑‍🚒 👮 👐 🇧🇧"
    kept = "😀 👋 🍕 🐧 🐱 🐈 🕶️ 😎 😪 ❤️ 🇩🇪 🚀"
    assert {split_of(tuple(map(ord, one))) for one in held_out.split()} == {"validation"}
    assert {split_of(tuple(map(ord, one))) for one in kept.split()} == {"train"}


# What cannot be used.


def replaced(name, *changes):
    """A change to a file of the source: each of the old bytes by the new ones."""

    def change(source):
        content = (source / name).read_bytes()
        for old, new in changes:
            assert old in content
            content = content.replace(old, new)
        (source / name).write_bytes(content)

    return change


def written(name, content):
    return lambda source: (source / name).write_bytes(content)


def cut_short(source):
    path = source / emoji.FONT
    path.write_bytes(path.read_bytes()[:900])


def no_bitmaps(source):
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef"])
    builder.setupCharacterMap({})
    builder.save(source / emoji.FONT)


def another_size(source):
    write_font(source / emoji.FONT, {points: disc(colour, (72, 72)) for points, colour in COLOURS.items()})


def other_emoji(source):
    write_font(source / emoji.FONT, {points: disc("red") for points in [*COLOURS][:3]})


def gone(name):
    return lambda source: (source / name).unlink()


FONT, NAMES = emoji.FONT, emoji.NAMES
REFUSED = {
    "no font": (gone(FONT), rf"{FONT} is not in .*source: `make emoji-data` .*`apt-get install fonts-noto-color-emoji"),
    "no names": (gone(NAMES), rf"{NAMES} is not in .*source: .*`apt-get install unicode-data` .*data.path=FOLDER"),
    "a font that is none": (written(FONT, b"no font"), rf"{FONT} is damaged, or no font: "),
    "an empty font": (written(FONT, b""), rf"{FONT} is damaged, or no font: "),
    "a font cut short": (cut_short, rf"{FONT} is damaged"),
    "a font of outlines": (no_bitmaps, rf"{FONT} has no GSUB and no CBLC and no CBDT: it must be a font of bitma"),
    "a damaged bitmap": (replaced(FONT, (b"IDAT", b"IDAX")), rf"{FONT} is damaged: the bitmap of .* cannot be read"),
    "bitmaps of another size": (another_size, r"a bitmap of 72 x 72 pixels \(u1F600\); those of Noto Color Emoji ar"),
    "none for a split": (other_emoji, rf"{FONT} has too few of the emoji in .*{NAMES}: none for validation"),
    "names in Latin-1": (written(NAMES, b"\xe9\xff"), rf"{NAMES} is damaged: it is not UTF-8 text"),
    "no emoji": (written(NAMES, b"#EOF\n"), rf"{NAMES} has no line of a fully-qualified emoji"),
    "names cut short": (replaced(NAMES, (b"#EOF", b"")), rf"{NAMES} is damaged: it ends after line \d+, without #EOF"),
    "a line without a name": (replaced(NAMES, (b" E1.0 grinning face", b"")), rf"{NAMES}, line 3 is damaged: it must"),
    "no code points": (replaced(NAMES, (b"\n1F600 ", b"\n1FX00 ")), r"line 3 is damaged: it must have code "),
    "no groups": (replaced(NAMES, (b"# group: Sm", b"# Sm")), r"line 3 is damaged: .* a group and a subgroup befo"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, source, tmp_path):
    change, expected = REFUSED[case]
    change(source)
    with pytest.raises(InputError, match=expected) as error:
        emoji.prepare(tmp_path / "data", source)
    assert "\n" not in str(error.value) and str(source) in str(error.value)
    assert not list((tmp_path / "data").glob("emoji/*.0.0"))


def test_files_that_are_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "PLACES", dict.fromkeys(emoji.PLACES, "usr/share/no-such"))
    expected = rf"{FONT} is not in {tmp_path}/usr/share/no-such or /usr/share/no-such: `make emoji-data` fetches it"
    with pytest.raises(InputError, match=expected):
        emoji.prepare(tmp_path)


def test_other_files_than_those_it_was_prepared_from(prepared, source):
    (source / emoji.NAMES).write_text(LINES.replace("Germany", "Utopia"), encoding="utf-8")
    with pytest.raises(InputError, match=rf"prepared from other files than {source}/{NAMES}: delete it, or set"):
        emoji.prepare(prepared, source)


def test_a_record_of_the_sources_that_is_damaged(source, tmp_path):
    emoji.prepare(tmp_path / "data", source)
    for content in ("{", json.dumps({"sha256": {}})):
        (tmp_path / "data" / "emoji" / emoji.MADE_OF).write_text(content)
        with pytest.raises(InputError, match=rf"{emoji.MADE_OF} is damaged"):
            emoji.prepare(tmp_path / "data")
