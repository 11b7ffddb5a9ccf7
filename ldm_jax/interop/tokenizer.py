"""CLIP's tokenizer from a model's folder: prompts to token ids.

The work is done by transformers' CLIPTokenizer, so that ids are the ones the model was trained on, down to Unicode
normalisation. It takes a second to import, so that waits until a folder is loaded; it needs no torch.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.runtime.files import write_json

CONFIG = "tokenizer_config.json"
# The vocabulary in either layout; transformers 5 writes the second one alone, and reads it if both are there.
LAYOUTS = (("vocab.json", "merges.txt"), ("tokenizer.json",))
OTHER_FILES = ("special_tokens_map.json", "added_tokens.json")
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")

MIN_LENGTH = 3  # begin, one token, end
MAX_LENGTH = 10_000  # transformers writes 10^30 where it did not know


class Tokens(NamedTuple):
    """What a tokenizer makes of N prompts.

    Fields:
      ids: int32 [N, max_length]: begin, tokens, end, padding.
      cut: bool [N]: whether the prompt had more tokens than that, so that its end was left out.
    """

    ids: np.ndarray
    cut: np.ndarray


class Tokenizer:
    """A function from prompts to `Tokens`, made by `load_tokenizer`.

    Attributes:
      max_length: the number of ids of every prompt.
      vocab_size: all ids are below it; the text encoder must have as many.
      end: the id that ends a text.
    """

    def __init__(self, tokenizer: Any, folder: Path, told: Mapping[str, Any] | None = None):
        """`told` are the fields of its config, unless the folder has that."""
        self._tokenizer, self._folder, self._told = tokenizer, folder, told
        self.max_length: int = tokenizer.model_max_length
        self.vocab_size: int = len(tokenizer)
        self.end: int = tokenizer.eos_token_id

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """One prompt or more to `Tokens`.

        Raises:
          InputError: for a prompt that is not Unicode text, as a command line in another encoding may be.
        """
        for prompt in prompts:
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise InputError(f"the prompt {prompt!a} is not Unicode text; give it in UTF-8")
        # What does not fit comes back in further rows, each with the number of its prompt.
        rows = self._tokenizer(list(prompts), padding="max_length", truncation=True, return_overflowing_tokens=True)
        _, first, count = np.unique(rows["overflow_to_sample_mapping"], return_index=True, return_counts=True)
        return Tokens(np.array(rows["input_ids"], np.int32)[first], count > 1)

    def save(self, folder: Path) -> None:
        """Writes a new folder, its config last: the files it was made of, or a vocabulary and what it was told."""
        folder.mkdir(parents=True)
        for name in (*sum(LAYOUTS, ()), *(() if self._told else (*OTHER_FILES, CONFIG))):
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, folder / name)
        if self._told:
            write_json(folder / CONFIG, {"tokenizer_class": CLASSES[0], **self._told})


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder such as Stable Diffusion's `tokenizer/`, with its own padding and maximum length.

    Raises:
      InputError: for a missing or damaged file, another kind of tokenizer, or a folder that lacks the maximum length.
    """
    folder = Path(folder)
    _check_files(folder)
    with _quiet():
        from transformers import CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # damaged files can raise nearly anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{folder}: not readable as a CLIP tokenizer: {reason}") from error
    if tokenizer.pad_token is None:
        raise InputError(f"{folder}: the tokenizer has no pad_token; {CONFIG} must name one")
    return Tokenizer(tokenizer, folder)


def tokenizer_of_vocabulary(folder: Path, *, pad_token: str, max_length: int) -> Tokenizer:
    """CLIP's tokenizer of the vocabulary in a folder, whatever padding and length the folder is set to.

    Args:
      folder: such as Stable Diffusion's `tokenizer/`; vocabulary and merges are enough.
      pad_token: what prompts are filled up with. As a token of its own it is told apart from the letters around it.
      max_length: number of ids of every prompt.

    Raises:
      InputError: for a missing or damaged file, or a vocabulary without CLIP's special tokens or `pad_token`.
    """
    folder = Path(folder)
    vocab, merges = _read_vocabulary(folder)
    for token in ("<|startoftext|>", "<|endoftext|>", pad_token):
        if token not in vocab:
            raise InputError(f"{folder}: the vocabulary has no token {token!r}, as CLIP's has")
    told = {"pad_token": pad_token, "model_max_length": max_length}
    with _quiet():
        from transformers import CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, **told)
        except Exception as error:  # damaged files can raise nearly anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{folder}: not readable as a CLIP tokenizer: {reason}") from error
    return Tokenizer(tokenizer, folder, told)


def text_to_words() -> tuple[Any, Any]:
    """How CLIPTokenizer brings a text to words before it merges their bytes: its normaliser and what splits."""
    with _quiet():
        from transformers import CLIPTokenizer

        parts = CLIPTokenizer().backend_tokenizer
    return parts.normalizer, parts.pre_tokenizer


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the pairs that are merged, in their order; of either layout."""
    if all((folder / name).is_file() for name in LAYOUTS[0]):
        vocab = _read_json(folder / "vocab.json")
        try:
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / 'merges.txt'}: cannot read the tokenizer's file: {error}") from error
        pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    elif (folder / "tokenizer.json").is_file():
        model = _read_json(folder / "tokenizer.json").get("model")
        model = model if isinstance(model, dict) else {}
        vocab, pairs = model.get("vocab"), model.get("merges")
        if not isinstance(vocab, dict) or not isinstance(pairs, list):
            raise InputError(f"{folder / 'tokenizer.json'}: damaged: it holds no vocabulary and merges")
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in pairs]
    else:
        layouts = " or ".join(" and ".join(layout) for layout in LAYOUTS)
        raise InputError(f"{folder}: the tokenizer's vocabulary is missing; there must be {layouts}")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InputError(f"{folder}: damaged: each of the tokenizer's merges must be a pair")
    return vocab, [tuple(pair) for pair in pairs]


def _check_files(folder: Path) -> None:
    """What transformers would pass over: without a vocabulary it makes a tokenizer that knows no words."""
    config = _read_json(folder / CONFIG)
    if "tokenizer_class" in config and config["tokenizer_class"] not in CLASSES:
        raise InputError(f"{folder}: the tokenizer must be a {CLASSES[0]}; got {config['tokenizer_class']!r}")
    length = config.get("model_max_length")
    if not isinstance(length, int) or not MIN_LENGTH <= length <= MAX_LENGTH:
        raise InputError(f"{folder / CONFIG}: model_max_length must be a number of tokens, 77 for CLIP; got {length!r}")
    if not any(all((folder / name).is_file() for name in layout) for layout in LAYOUTS):
        layouts = " or ".join(" and ".join(layout) for layout in LAYOUTS)
        raise InputError(f"{folder}: the tokenizer's vocabulary is missing; there must be {layouts}")
    for name in (*sum(LAYOUTS, ()), *OTHER_FILES):
        if name.endswith(".json") and (folder / name).exists():
            _read_json(folder / name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the tokenizer's file: {error.strerror}") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise InputError(f"{path}: damaged: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: damaged: not a JSON object")
    return tree


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers logs when it is imported without torch, and when it meets older files."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
