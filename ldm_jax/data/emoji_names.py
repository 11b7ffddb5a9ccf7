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
# Characters that differ only in sex, age or direction: the base has the first.
ALIKE = (
    (0x1F9D1, 0x1F468, 0x1F469),  # person, man, woman
    (0x1F9D2, 0x1F466, 0x1F467),  # child, boy, girl
    (0x1F9D3, 0x1F474, 0x1F475),  # older person, old man, old woman
    (0x1FAC5, 0x1F934, 0x1F478),  # person with crown, prince, princess
    (0x1FAC4, 0x1F930, 0x1FAC3),  # pregnant person, woman, man
    (0x1F483, 0x1F57A),  # woman dancing, man dancing
    (0x1F385, 0x1F936),  # Santa Claus, Mrs. Claus
    (0x1F46B, 0x1F46C, 0x1F46D),  # woman and man, men, women holding hands
    (0x1FAF1, 0x1FAF2),  # rightwards, leftwards hand
    (0x1FAF7, 0x1FAF8),  # leftwards, rightwards pushing hand
    (0x1F91B, 0x1F91C),  # left-facing, right-facing fist
    (0x1F448, 0x1F449, 0x1F446, 0x1F447),  # backhand index pointing left, right, up, down
    (0x1F44D, 0x1F44E),  # thumbs up, down
    (0x1FAF3, 0x1FAF4),  # palm down, up hand
    (0x1F50D, 0x1F50E),  # magnifying glass tilted left, right
    (0x27A1, 0x2B05, 0x2B06, 0x2B07, 0x2194, 0x2195, 0x2196, 0x2197, 0x2198, 0x2199),  # straight arrows
    (0x21A9, 0x21AA, 0x2934, 0x2935),  # curving arrows
    (0x25B6, 0x25C0, 0x1F53C, 0x1F53D),  # play, reverse, upwards, downwards button
    (0x23E9, 0x23EA, 0x23EB, 0x23EC),  # fast-forward, fast reverse, fast up, fast down button
    (0x23ED, 0x23EE),  # next, last track button
    (0x1F53A, 0x1F53B),  # red triangle pointed up, down
    (0x2640, 0x2642),  # female, male sign
)
FIRST_OF = {point: first for first, *others in ALIKE for point in others}
PERSON, CHILD, HEART, KISS, HANDSHAKE = 0x1F9D1, 0x1F9D2, 0x2764, 0x1F48B, 0x1F91D
# Sequences -> the character of the same meaning.
SHORTER = {
    (PERSON, HEART, KISS, PERSON): 0x1F48F,
    (PERSON, HEART, PERSON): 0x1F491,
    (PERSON, HANDSHAKE, PERSON): 0x1F46B,
    (PERSON, 0x1F384): 0x1F385,  # Mx Claus
    (0x1FAF1, 0x1FAF1): HANDSHAKE,
}
FAMILY = 0x1F46A


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
    found: dict[tuple[int, ...], Emoji] = {}
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
            found[points] = Emoji(points, spoken(parts["name"]), titles["group"], titles["subgroup"])
    if not found:
        raise InputError(f"{path} has no line of a fully-qualified emoji: it must be Unicode's emoji-test.txt")
    if END not in lines:
        raise InputError(f"{path} is damaged: it ends after line {len(lines)}, without {END}")
    return list(found.values())


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
    kept = tuple(FIRST_OF.get(point, point) for point in kept)
    if len(kept) > 1 and set(kept) <= {PERSON, CHILD}:
        return (FAMILY,)
    return (SHORTER[kept],) if kept in SHORTER else kept


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
