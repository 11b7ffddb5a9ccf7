import hashlib
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from bpe import BEGIN, END, byte_symbols, make_vocab, merge
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers

from ldm_jax.errors import InputError
from ldm_jax.interop import bpe
from ldm_jax.interop.bpe import LEAST_VOCAB, train_bpe
from ldm_jax.interop.tokenizer import load_tokenizer

REPOSITORY = Path(bpe.__file__).parents[2]
WORDS = "low low low lower lower newest newest newest newest widest Widest waving hand red heart café"
TEXTS = [WORDS, "a red cat", "the Café, the hand", "日本語", "😀 grinning"]
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
SYMBOL = dict(zip([*PRINTABLE, *(byte for byte in range(256) if byte not in PRINTABLE)], byte_symbols()))
BYTE = {symbol: byte for byte, symbol in SYMBOL.items()}
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe") / "tokenizer"
    train_bpe(TEXTS, 560, folder, 400)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def vocab(folder):
    return json.loads((folder / "vocab.json").read_text())


def split(word):
    """A word as the bytes' symbols, the last of them at its end."""
    symbols = [SYMBOL[byte] for byte in word.encode()]
    return (*symbols[:-1], f"{symbols[-1]}</w>")


def learn_slowly(words, number):
    """The algorithm as Sennrich et al. print it; the most frequent pair first, of several that with the lowest ids."""
    counts = Counter(map(split, words))
    ids = {token: i for token, i in make_vocab([]).items() if token not in (BEGIN, END)}
    merges = []
    for _ in range(number):
        pairs = Counter()
        for symbols, count in counts.items():
            for pair in pairwise(symbols):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], [ids[symbol] for symbol in pair]))
        merges.append(best)
        ids["".join(best)] = len(ids)
        counts = Counter({merge(symbols, best): count for symbols, count in counts.items()})
    return merges, ids


def test_merges_are_those_of_the_slow_algorithm(tmp_path):
    words = WORDS.lower().split()
    merges, ids = learn_slowly(words, 20)
    train_bpe([WORDS], LEAST_VOCAB + 20, tmp_path / "made", 8)
    assert (tmp_path / "made" / "merges.txt").read_text().splitlines() == ["#version: 0.2", *map(" ".join, merges)]
    expected = ids | {BEGIN: 532, END: 533}
    assert json.loads((tmp_path / "made" / "vocab.json").read_text()) == expected == make_vocab(merges)
    assert merges[0] == ("e", "s")  # by hand: "es", "st" and "we" are six times in it, "e" and "s" come first


def test_the_folder_is_in_the_layout_of_clip(folder, vocab, tokenizer):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert list(vocab.values()) == list(range(len(vocab))) and len(vocab) == 560 == tokenizer.vocab_size
    assert list(vocab)[:256] == byte_symbols()
    assert list(vocab)[256:512] == [f"{symbol}</w>" for symbol in byte_symbols()]
    assert list(vocab)[-2:] == [BEGIN, END]
    assert tokenizer.max_length == 400
    tokens = tokenizer(["red", ""])
    assert tokens.ids[0].tolist() == [558, *(vocab[t] for t in ["red</w>"]), *[559] * 398]
    assert tokens.ids[1].tolist() == [558, *[559] * 399]


def test_the_ids_are_those_that_training_meant(tmp_path):
    """Transformers merges each word as the slow algorithm leaves it."""
    words = WORDS.lower().split()
    merges, ids = learn_slowly(words, 30)
    tokenizer = train_bpe([WORDS], LEAST_VOCAB + 30, tmp_path / "made", 120)
    for word in (*words, "lowest", "wand", "x"):
        symbols = split(word)
        for pair in merges:
            symbols = merge(symbols, pair)
        found = tokenizer([word]).ids[0].tolist()
        assert found[1 : found.index(tokenizer.vocab_size - 1)] == [ids[symbol] for symbol in symbols], word


CODE = """if True:
    import sys
    from pathlib import Path
    from ldm_jax.interop.bpe import train_bpe
    train_bpe(sys.argv[2:], 560, Path(sys.argv[1]), 400)
"""


def test_the_same_texts_give_the_same_bytes(folder, tmp_path):
    """In another process, whose hash tables are in another order; and it prints nothing."""
    command = [sys.executable, "-c", CODE, str(tmp_path / "again"), *TEXTS]
    done = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name in FILES:
        hashes = [hashlib.sha256((where / name).read_bytes()).hexdigest() for where in (folder, tmp_path / "again")]
        assert hashes[0] == hashes[1], name


NORMALISE = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])


def decode(folder_vocab, ids):
    """The text that ids say, words parted by blanks: from the files alone."""
    tokens = {i: token for token, i in folder_vocab.items()}
    said = [tokens[i] for i in ids]
    content = bytearray()
    for token in said[1 : said.index(END)]:
        content += bytes(BYTE[symbol] for symbol in token.removesuffix("</w>"))
        content += b" " if token.endswith("</w>") else b""
    return content.decode("utf-8")


ALPHABETS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from("aÀé\u0301ß 😀👩🏽\u200d🚀日本語ｶﾞ\t\n0٣'sІ"), max_size=40),
    st.sampled_from(["", " ", "e\u0301", "👩🏽\u200d🚀 woman astronaut", "it's WE'LL", "x" * 390, "\x00\x85\xa0"]),
)


@settings(max_examples=150)
@given(text=ALPHABETS)
def test_nothing_is_lost_on_the_way_there_and_back(vocab, tokenizer, text):
    """Up to the blanks, which part the words and are no tokens."""
    tokens = tokenizer([text])
    back = decode(vocab, tokens.ids[0].tolist())
    assert not tokens.truncated.any()
    assert "".join(back.split(" ")) == "".join(NORMALISE.normalize_str(text).split(" "))


def test_words_come_back_with_blanks(vocab, tokenizer):
    said = {"  A Red\n CAT ": "a red cat ", "café, 42!": "café , 4 2 ! ", "日本語 😀": "日本語 😀 ", "": ""}
    for text, expected in said.items():
        assert decode(vocab, tokenizer([text]).ids[0].tolist()) == expected


def test_a_very_long_text_is_cut(vocab, tokenizer):
    tokens = tokenizer(["red " * 5000, "日" * 5000])
    assert tokens.truncated.all() and tokens.ids.shape == (2, 400)
    assert decode(vocab, tokens.ids[0].tolist()) == "red " * 398


def test_every_byte_can_be_written(vocab, tokenizer):
    """Alone and at the end of a word: a code point of each first byte, and each byte that may follow one."""
    assert set(SYMBOL.values()) == set(list(vocab)[:256])
    for start in range(0, 0x110000, 0x1C71):
        text = "".join(chr(point) for point in range(start, min(start + 30, 0x110000)) if not 0xD800 <= point < 0xE000)
        back = decode(vocab, tokenizer([text]).ids[0].tolist())
        assert back.replace(" ", "") == NORMALISE.normalize_str(text).replace(" ", "")


def test_texts_with_few_pairs_make_a_small_vocabulary(tmp_path):
    assert train_bpe(["ab"], 10_000, tmp_path / "made", 8).vocab_size == LEAST_VOCAB + 1
    assert train_bpe(["ab"], LEAST_VOCAB, tmp_path / "least", 8).vocab_size == LEAST_VOCAB


def test_a_folder_left_half_written_is_written_anew(folder, tmp_path):
    (tmp_path / "vocab.json").write_text("{")
    train_bpe(TEXTS, 560, tmp_path, 400)
    assert (tmp_path / "vocab.json").read_bytes() == (folder / "vocab.json").read_bytes()


REFUSED = {
    "a vocabulary of nothing": ({"vocab_size": 0}, r"vocab_size=0 is too small: it must be at least 514"),
    "one too few": ({"vocab_size": 513}, r"vocab_size=513 is too small: it must be at least 514"),
    "no room for a token": ({"max_length": 2}, r"max_length=2: it must be from 3 to 10000 tokens; 77 in CLIP"),
    "no end of it": ({"max_length": 10**30}, r"it must be from 3 to 10000 tokens"),
    "no texts": ({"texts": []}, r"no words to learn a tokenizer from, in 0 texts"),
    "empty texts": ({"texts": ["", " \n"]}, r"no words to learn a tokenizer from, in 2 texts"),
    "bytes": ({"texts": ["a", b"caf\xe9".decode("utf-8", "surrogateescape")]}, r"text 'caf\\udce9' is not Unicode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    changes, expected = REFUSED[case]
    arguments = {"texts": ["low lower"], "vocab_size": 520, "folder": tmp_path / "made", "max_length": 8} | changes
    with pytest.raises(InputError, match=expected) as error:
        train_bpe(**arguments)
    assert "\n" not in str(error.value) and not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_folder_with_a_tokenizer(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=rf"has a tokenizer already \({name}\): delete it, or choose another folder"):
        train_bpe(["low"], 520, tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/made: the tokenizer cannot be written there: Not a directory"):
        train_bpe(["low"], 520, tmp_path / "file" / "made", 8)
