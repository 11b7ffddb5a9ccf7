"""CLIP's tokenizer from a model's folder: prompts to token ids.

transformers' CLIPTokenizer does the work, so that ids are those of the model's training, down to Unicode normalisation.
It takes a second to import, so that waits until a folder is loaded; it does not need torch.
"""

import copy
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop.unpickle import first_line
from ldm_jax.runtime.files import read_json_object, write_json

CONFIG = "tokenizer_config.json"
# The vocabulary in either layout; transformers 5 writes the second alone, and prefers it.
LAYOUTS = (("vocab.json", "merges.txt"), ("tokenizer.json",))
NO_VOCABULARY = "the tokenizer's vocabulary is missing; there must be vocab.json and merges.txt or tokenizer.json"
OTHER_FILES = ("special_tokens_map.json", "added_tokens.json")
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")

MIN_LENGTH = 3  # begin, one token, end
MAX_LENGTH = 10_000  # transformers writes 10^30 for an unknown length


class Tokens(NamedTuple):
    """The token ids of N prompts."""

    ids: np.ndarray  # int32 [N, max_length]: begin, tokens, end, padding
    truncated: np.ndarray  # bool [N]: whether the prompt had more tokens than that


class Tokenizer:
    """A function from prompts to `Tokens`, see `load_tokenizer`.

    Attributes:
      max_length: the number of ids of every prompt.
      vocab_size: all ids are less; the text encoder must have as many, or more.
      end: the id of the end token.
      added: the tokens beyond the vocabulary's files, as of textual inversion. One of n vectors is n of them, TOKEN,
        TOKEN_1, ... (diffusers' names), and in prompts TOKEN stands for all.
    """

    def __init__(self, tokenizer: Any, folder: Path, config: Mapping[str, Any] | None = None):
        """`config` replaces the config of the folder."""
        self._tokenizer, self._folder, self._config = tokenizer, folder, config
        self.max_length: int = tokenizer.model_max_length
        self.vocab_size: int = len(tokenizer)
        self.end: int = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder.items()
        self.added = tuple(t.content for i, t in added if i >= tokenizer.vocab_size and not t.special)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """The ids [N, max_length] of N prompts; InputError for one that is not Unicode, from another encoding."""
        for prompt in prompts:
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise InputError(f"the prompt {prompt!a} is not Unicode text; pass it in UTF-8")
        for token in self.added:
            if len(names := self._names(token)) > 1:
                prompts = [prompt.replace(token, " ".join(names)) for prompt in prompts]
        # Overflowing tokens come back in further rows, each with the number of its prompt.
        rows = self._tokenizer(list(prompts), padding="max_length", truncation=True, return_overflowing_tokens=True)
        _, first, counts = np.unique(rows["overflow_to_sample_mapping"], return_index=True, return_counts=True)
        return Tokens(np.array(rows["input_ids"], np.int32)[first], counts > 1)

    def _names(self, token: str) -> list[str]:
        """All added tokens of an added one: itself, TOKEN_1, ..."""
        further = takewhile(self.added.__contains__, (f"{token}_{i}" for i in count(1)))
        return [token, *further]

    def ids_of(self, text: str) -> list[int]:
        """The ids of a text alone, without begin, end and padding."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def with_token(self, token: str, vectors: int) -> "Tokenizer":
        """The tokenizer with a new token of so many ids, the next ones; in prompts it stands for all of them.

        Raises ValueError for a token that the vocabulary has.
        """
        names = [token, *(f"{token}_{i}" for i in range(1, vectors))]
        if known := [name for name in names if name in self._tokenizer.get_vocab()]:
            raise ValueError(f"the vocabulary has a token {known[0]!r} already")
        tokenizer = copy.deepcopy(self._tokenizer)
        tokenizer.add_tokens(names)
        return Tokenizer(tokenizer, self._folder, self._config)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files to a new folder, its config last."""
        folder.mkdir(parents=True)
        for name in (*sum(LAYOUTS, ()), *(() if self._config else (*OTHER_FILES, CONFIG))):
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, folder / name)
        if self._config:
            write_json(folder / CONFIG, {"tokenizer_class": CLASSES[0], **self._config})
        if self.added:
            self._save_added(folder)

    def _save_added(self, folder: Path) -> None:
        """Writes the added tokens to each of a folder's files that may list them: readers differ in which they read."""
        decoder = {str(i): token for i, token in self._tokenizer.added_tokens_decoder.items()}
        fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        stated = {i: {field: getattr(token, field) for field in fields} for i, token in decoder.items()}
        write_json(
            folder / OTHER_FILES[1], {token: self._tokenizer.added_tokens_encoder[token] for token in self.added}
        )
        if (folder / LAYOUTS[1][0]).exists():
            self._tokenizer.backend_tokenizer.save(str(folder / LAYOUTS[1][0]))
        write_json(folder / CONFIG, read_json_object(folder / CONFIG) | {"added_tokens_decoder": stated})


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder such as Stable Diffusion's `tokenizer/`, with its own padding and maximum length.

    Raises InputError: a file is missing or damaged, it is another type of tokenizer, or has no maximum length.
    """
    folder = Path(folder)
    _check_files(folder)
    tokenizer = _make(folder, lambda clip: clip.from_pretrained(folder, local_files_only=True))
    if tokenizer.pad_token is None:
        raise InputError(f"{folder}: the tokenizer has no pad_token; {CONFIG} must name one")
    return Tokenizer(tokenizer, folder)


def tokenizer_of_vocabulary(folder: Path, *, pad_token: str, max_length: int) -> Tokenizer:
    """CLIP's tokenizer with the vocabulary in a folder, but not its padding and maximum length.

    Args:
      folder: such as Stable Diffusion's `tokenizer/`; vocabulary and merges are enough.
      pad_token: the token that fills up prompts; a special token, so that the same letters in a prompt differ from it.
      max_length: number of ids of every prompt.

    Raises InputError: a file is missing or damaged, or the vocabulary lacks CLIP's special tokens or `pad_token`.
    """
    folder = Path(folder)
    vocab, merges = _read_vocabulary(folder)
    for token in ("<|startoftext|>", "<|endoftext|>", pad_token):
        if token not in vocab:
            raise InputError(f"{folder}: the vocabulary has no token {token!r}, as CLIP's has")
    config = {"pad_token": pad_token, "model_max_length": max_length}
    return Tokenizer(_make(folder, lambda clip: clip(vocab=vocab, merges=merges, **config)), folder, config)


def _make(folder: Path, construct: Callable[[type], Any]) -> Any:
    """An instance of transformers' CLIPTokenizer; InputError names `folder` if its files are damaged."""
    with _quiet():
        from transformers import CLIPTokenizer

        try:
            return construct(CLIPTokenizer)
        except Exception as error:  # damaged files can raise nearly anything
            raise InputError(f"{folder}: not readable as a CLIP tokenizer: {first_line(error)}") from error


def normalizer_and_splitter() -> tuple[Any, Any]:
    """The first two steps of CLIPTokenizer, before the merges: its normalizer and its pre-tokenizer."""
    with _quiet():
        from transformers import CLIPTokenizer

        backend = CLIPTokenizer().backend_tokenizer
    return backend.normalizer, backend.pre_tokenizer


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in order; of either layout."""
    if _has(folder, LAYOUTS[0]):
        vocab = read_json_object(folder / "vocab.json")
        try:
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / 'merges.txt'}: cannot read the tokenizer's file: {error}") from error
        pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    elif _has(folder, LAYOUTS[1]):
        model = read_json_object(folder / "tokenizer.json").get("model")
        model = model if isinstance(model, dict) else {}
        vocab, pairs = model.get("vocab"), model.get("merges")
        if not isinstance(vocab, dict) or not isinstance(pairs, list):
            raise InputError(f"{folder / 'tokenizer.json'}: damaged: it holds no vocabulary and merges")
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in pairs]
    else:
        raise InputError(f"{folder}: {NO_VOCABULARY}")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InputError(f"{folder}: damaged: each of the tokenizer's merges must be a pair")
    return vocab, [tuple(pair) for pair in pairs]


def _has(folder: Path, layout: Sequence[str]) -> bool:
    return all((folder / name).is_file() for name in layout)


def _check_files(folder: Path) -> None:
    """Checks that transformers does not make: without a vocabulary it returns a tokenizer without words."""
    config = read_json_object(folder / CONFIG)
    if "tokenizer_class" in config and config["tokenizer_class"] not in CLASSES:
        raise InputError(f"{folder}: the tokenizer must be a {CLASSES[0]}; got {config['tokenizer_class']!r}")
    length = config.get("model_max_length")
    if not isinstance(length, int) or not MIN_LENGTH <= length <= MAX_LENGTH:
        raise InputError(f"{folder / CONFIG}: model_max_length must be a number of tokens, 77 for CLIP; got {length!r}")
    if not any(_has(folder, layout) for layout in LAYOUTS):
        raise InputError(f"{folder}: {NO_VOCABULARY}")
    for name in (*sum(LAYOUTS, ()), *OTHER_FILES):
        if name.endswith(".json") and (folder / name).exists():
            read_json_object(folder / name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what transformers logs when imported without torch, and about older files."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
