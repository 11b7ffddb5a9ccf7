"""Training CLIP's tokenizer on one's own texts: byte-pair encoding (Sennrich et al. 2016, algorithm 1) of bytes.

The result is a folder in the layout of Stable Diffusion's `tokenizer/`. Texts are normalised and split into words by
transformers' CLIPTokenizer, as they are when the tokenizer is used.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ldm_jax.errors import InputError
from ldm_jax.interop import tokenizer
from ldm_jax.interop.tokenizer import CONFIG, LAYOUTS, MAX_LENGTH, MIN_LENGTH, Tokenizer, load_tokenizer
from ldm_jax.runtime.files import atomic, write_json

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
SPECIAL = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
# Characters for bytes in vocab.json: printable bytes are themselves, the others are U+0100 and following.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTES = tuple(map(chr, (*_PRINTABLE, *range(0x100, 0x200 - len(_PRINTABLE)))))
ALPHABET = (*BYTES, *(byte + WORD_END for byte in BYTES))
LEAST_VOCAB = len(ALPHABET) + len((BEGIN, END))


def train_bpe(texts: Sequence[str], vocab_size: int, folder: Path, max_length: int) -> Tokenizer:
    """Trains a tokenizer on texts and writes its folder; the same texts give the same bytes.

    Ids are in CLIP's order: the 256 bytes, the bytes at the end of a word, the merged tokens in the order of their
    merges, begin, end. So there are no unknown tokens. The end token is also the pad token.

    Args:
      texts: one or more.
      vocab_size: maximum number of ids; there are fewer if the texts have too few pairs to merge.
      folder: a new one; an incomplete one is overwritten. Its config is written last.
      max_length: number of ids of every prompt, begin and end included.

    Raises InputError: a number is out of range, texts are not Unicode or without words, or the folder has a tokenizer
    already or cannot be written.
    """
    folder = Path(folder)
    _check(texts, vocab_size, max_length)
    present = [name for name in (CONFIG, *LAYOUTS[1]) if (folder / name).exists()]
    if present:
        raise InputError(f"{folder} has a tokenizer already ({present[0]}): delete it, or choose another folder")
    vocab, merges = _learn(texts, vocab_size - len((BEGIN, END)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / LAYOUTS[0][0], vocab | {BEGIN: len(vocab), END: len(vocab) + 1})
        with atomic(folder / LAYOUTS[0][1]) as path:
            path.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
        write_json(folder / tokenizer.OTHER_FILES[0], SPECIAL)
        config = {"tokenizer_class": tokenizer.CLASSES[0], "model_max_length": max_length, **SPECIAL}
        write_json(folder / CONFIG, config)
    except OSError as error:
        raise InputError(f"{folder}: the tokenizer cannot be written there: {error.strerror}") from error
    return load_tokenizer(folder)


def _check(texts: Sequence[str], vocab_size: int, max_length: int) -> None:
    if vocab_size < LEAST_VOCAB:
        parts = "256 bytes within a word, 256 at its end, begin and end"
        raise InputError(f"vocab_size={vocab_size} is too small: it must be at least {LEAST_VOCAB}, for {parts}")
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
    """Token -> id, without begin and end; the merged pairs in order."""
    from tokenizers import Tokenizer as Learner
    from tokenizers import models, trainers

    learner = Learner(models.BPE(continuing_subword_prefix="", end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = tokenizer.normalizer_and_splitter()
    # As special tokens the bytes get their ids first. Otherwise their order would be random, and of equally frequent
    # pairs that with the lowest ids is merged first.
    special = {"special_tokens": list(ALPHABET), "end_of_word_suffix": WORD_END}
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, **special))
    model = json.loads(learner.to_str())["model"]
    return dict(sorted(model["vocab"].items(), key=lambda entry: entry[1])), [tuple(pair) for pair in model["merges"]]
