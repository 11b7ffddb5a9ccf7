"""Training CLIP's tokenizer on texts of one's own: byte-pair encoding (Sennrich et al. 2016, algorithm 1) of bytes.

The result is a folder in the layout of Stable Diffusion's `tokenizer/`. Texts are normalised and cut into words by the
very parts of transformers' CLIPTokenizer that will do so when the folder is read.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ldm_jax.errors import InputError
from ldm_jax.interop.tokenizer import (
    CLASSES,
    CONFIG,
    LAYOUTS,
    MAX_LENGTH,
    MIN_LENGTH,
    OTHER_FILES,
    Tokenizer,
    load_tokenizer,
    text_to_words,
)
from ldm_jax.runtime.files import atomic, write_json

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
SPECIAL = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
# Characters that stand for bytes in files of text: a printable byte for itself, the others from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTES = tuple(map(chr, (*_PRINTABLE, *range(0x100, 0x200 - len(_PRINTABLE)))))
ALPHABET = (*BYTES, *(byte + WORD_END for byte in BYTES))
LEAST_VOCAB = len(ALPHABET) + len((BEGIN, END))


def train_bpe(texts: Sequence[str], vocab_size: int, folder: Path, max_length: int) -> Tokenizer:
    """Learns a vocabulary from texts and writes it as a tokenizer's folder. The same texts give the same bytes.

    Ids are in CLIP's order: the 256 bytes, the bytes at the end of a word, what is merged in the order in which it was
    learned, begin, end. So every text can be written, and no token is unknown. The end token pads.

    Args:
      texts: one or more.
      vocab_size: how many ids there may be; there are fewer if the texts have not as many pairs to merge.
      folder: a new one. It can be read when all of it is written; one that was left half written is written anew.
      max_length: number of ids of every prompt, begin and end among them.

    Returns:
      The tokenizer, read back from the folder.

    Raises:
      InputError: for a number out of range, texts that are not Unicode or without a word, or a folder that has a
        tokenizer already or cannot be written.
    """
    folder = Path(folder)
    _check(texts, vocab_size, max_length)
    taken = [name for name in (CONFIG, *LAYOUTS[1]) if (folder / name).exists()]
    if taken:
        raise InputError(f"{folder} has a tokenizer already ({taken[0]}): delete it, or choose another folder")
    vocab, merges = _learn(texts, vocab_size - len((BEGIN, END)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / LAYOUTS[0][0], vocab | {BEGIN: len(vocab), END: len(vocab) + 1})
        with atomic(folder / LAYOUTS[0][1]) as path:
            path.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
        write_json(folder / OTHER_FILES[0], SPECIAL)
        write_json(folder / CONFIG, {"tokenizer_class": CLASSES[0], "model_max_length": max_length, **SPECIAL})
    except OSError as error:
        raise InputError(f"{folder}: the tokenizer cannot be written there: {error.strerror}") from error
    return load_tokenizer(folder)


def _check(texts: Sequence[str], vocab_size: int, max_length: int) -> None:
    if vocab_size < LEAST_VOCAB:
        raise InputError(
            f"vocab_size={vocab_size} is too small: it must be at least {LEAST_VOCAB}, for 256 bytes within a word, "
            "256 at its end, begin and end"
        )
    if not MIN_LENGTH <= max_length <= MAX_LENGTH:
        raise InputError(f"max_length={max_length}: it must be from {MIN_LENGTH} to {MAX_LENGTH} tokens; 77 in CLIP")
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"the text {text!a} is not Unicode text; read it as UTF-8") from None
    if not any(text.strip() for text in texts):
        raise InputError(f"there are no words to learn a tokenizer from, in {len(texts)} texts")


def _learn(texts: Sequence[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, without begin and end, and the pairs that are merged, in their order."""
    from tokenizers import Tokenizer as Learner
    from tokenizers import models, trainers

    learner = Learner(models.BPE(continuing_subword_prefix="", end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = text_to_words()
    # As special tokens these have their ids before the words are looked at, whose order is by chance: among pairs that
    # are as frequent the one with the lowest ids is merged first.
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(ALPHABET), end_of_word_suffix=WORD_END, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return dict(sorted(model["vocab"].items(), key=lambda entry: entry[1])), [tuple(pair) for pair in model["merges"]]
