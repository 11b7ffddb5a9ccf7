"""The captions and splits of the emoji in Unicode's emoji-test.txt (UTS #51).

The captions of an emoji are its CLDR name as a phrase ("waving hand with dark skin tone") and templates of that.
Variants of an emoji in skin tone, hair, sex, age or direction have one base, and all of a base are in one split.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from ldm_jax.errors import InputError

LINE = re.compile(
    r"(?P<points>[0-9A-F]{1,6}( [0-9A-F]{1,6})*) *; (?P<status>[a-z-]+) *# \S+ (E\d+\.\d+ )?(?P<name>\S.*)"
)
TITLE = re.compile(r"# (?P<field>group|subgroup): (?P<title>\S.*)")
END = "#EOF"

TEMPLATES = ("{name}", "an emoji of {name}", "{name}, from {group}", "{subgroup}: {name}")
TYPED = str.maketrans("‘’“”", "''\"\"")  # as in a typed prompt
PLURALS = {"man": "men", "woman": "women", "person": "people", "boy": "boys", "girl": "girls"}
PLURALS |= {"adult": "adults", "child": "children"}

# By its hash, a base is in one of ten parts, one of which is held out: one without the sleepy face, pizza, cats and
# penguins, so that prompts can combine what training has seen, but not together.
NUM_PARTS, HELD_OUT = 10, 6
# The code points of variants: skin tones, hair, signs of the sexes, the arrow of directions, joiner, emoji style.
SKIN_TONES = range(0x1F3FB, 0x1F400)
VARIATIONS = {*SKIN_TONES, *range(0x1F9B0, 0x1F9B4), 0x2640, 0x2642, 0x27A1, 0x200D, 0xFE0F}
# Groups of characters that differ only in sex, age or direction: the base has the first.
ALIKE = """
🧑👨👩 🧒👦👧 🧓👴👵 🫅🤴👸 🫄🤰🫃 💃🕺 🎅🤶 👫👬👭 🫱🫲 🫷🫸 🤛🤜 👈👉👆👇 👍👎 🫳🫴 🔍🔎
➡⬅⬆⬇↔↕↖↗↘↙ ↩↪⤴⤵ ▶◀🔼🔽 ⏩⏪⏫⏬ ⏭⏮ 🔺🔻 ♀♂
"""
FIRST_OF = {ord(point): ord(group[0]) for group in ALIKE.split() for point in group[1:]}
PERSON, CHILD, FAMILY = "🧑", "🧒", "👪"
# Sequences -> the character of the same meaning.
SHORTER = {"🧑❤💋🧑": "💏", "🧑❤🧑": "💑", "🧑🤝🧑": "👫", "🧑🎄": "🎅", "🫱🫱": "🤝"}


class Emoji(NamedTuple):
    """One line of emoji-test.txt: code points, and in words its name and the titles it is listed under."""

    points: tuple[int, ...]
    name: str
    group: str
    subgroup: str


def read_emoji(path: Path) -> list[Emoji]:
    """The fully-qualified emoji of a file, in its order; InputError if it is damaged or has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError:
        raise InputError(f"{path} is damaged: it is not UTF-8 text") from None
    titles: dict[str, str] = {}
    emoji: dict[tuple[int, ...], Emoji] = {}
    for number, line in enumerate(lines, start=1):
        if title := TITLE.fullmatch(line):
            titles[title["field"]] = _in_words(title["title"])
        if not line.strip() or line.startswith("#"):
            continue
        parts = LINE.fullmatch(line)
        if not parts or len(titles) < 2:
            required = "code points; status # emoji name" if not parts else "a group and a subgroup before it"
            raise InputError(f"{path}, line {number} is damaged: it must have {required}")
        if parts["status"] == "fully-qualified":
            points = tuple(int(point, 16) for point in parts["points"].split())
            emoji[points] = Emoji(points, spoken(parts["name"]), titles["group"], titles["subgroup"])
    if not emoji:
        raise InputError(f"{path} has no line of a fully-qualified emoji: it must be Unicode's emoji-test.txt")
    if END not in lines:
        raise InputError(f"{path} is damaged: it ends after line {len(lines)}, without {END}")
    return list(emoji.values())


def spoken(name: str) -> str:
    """A CLDR name as a phrase, which includes the features after its colon.

    >>> spoken("person: medium skin tone, red hair"), spoken("flag: Chad"), spoken("family: man, boy")
    ('person with medium skin tone and red hair', 'flag of Chad', 'family of a man and a boy')
    """
    head, _, tail = name.translate(TYPED).replace("&", "and").partition(": ")
    if head in ("flag", "keycap"):
        return f"flag of {tail}" if head == "flag" else f"keycap {tail}"
    parts = tail.split(", ") if tail else []
    people = [part for part in parts if part in PLURALS]
    noun, *features = head.split(" with ") if parts else [head]
    features += [part for part in parts if part not in (*PLURALS, "bald")]
    phrase = f"bald {noun}" if "bald" in parts else noun
    if people:
        phrase += f" of {_listed([_counted(one, people.count(one)) for one in dict.fromkeys(people)])}"
    return f"{phrase} with {_listed(features)}" if features else phrase


def captions_of(emoji: Emoji) -> tuple[str, ...]:
    """The captions of an emoji, its name first."""
    return tuple(template.format(**emoji._asdict()) for template in TEMPLATES)


def base_of(points: tuple[int, ...]) -> tuple[int, ...]:
    """The code points of an emoji's base, which its variants share."""
    kept = [point for point in points if point not in VARIATIONS] or points[:1]
    base = "".join(chr(FIRST_OF.get(point, point)) for point in kept)
    if len(base) > 1 and set(base) <= {PERSON, CHILD}:
        base = FAMILY
    return tuple(map(ord, SHORTER.get(base, base)))


def split_of(points: tuple[int, ...]) -> str:
    """ "train" or "validation", by a hash of the base: it depends on no other emoji."""
    base = " ".join(f"{point:X}" for point in base_of(points))
    part = int(hashlib.sha256(base.encode()).hexdigest(), 16) % NUM_PARTS
    return "validation" if part == HELD_OUT else "train"


def toneless_of(points: tuple[int, ...]) -> tuple[int, ...]:
    """The code points without skin tones: equal for emoji that differ in these alone."""
    return tuple(point for point in points if point not in SKIN_TONES) or points


def in_hex(points: tuple[int, ...]) -> str:
    """ "1F468 200D 2695"."""
    return " ".join(f"{point:04X}" for point in points)


def _in_words(title: str) -> str:
    """ "Smileys & Emotion" and "face-smiling" as "smileys and emotion" and "face smiling"."""
    return title.lower().replace("&", "and").replace("-", " ")


def _counted(one: str, number: int) -> str:
    """ "a boy", "two boys"; no family has three."""
    return f"two {PLURALS[one]}" if number > 1 else f"{'an' if one == 'adult' else 'a'} {one}"


def _listed(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
