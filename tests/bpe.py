"""A small CLIP tokenizer as the files of a folder: one token per byte, one per merge, and the two special ones."""

import json
from collections import Counter
from itertools import pairwise

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LOW_LOWER = [("l", "o"), ("lo", "w</w>"), ("e", "r</w>")]


def byte_symbols():
    """The 256 characters that stand for bytes, "!" first: a printable byte for itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def make_vocab(merges):
    """CLIP's order: bytes, bytes that end a word, merges, begin, end."""
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges), BEGIN, END]
    return {token: i for i, token in enumerate(tokens)}


def learn_merges(words, number):
    """The pairs that byte-pair encoding (Sennrich et al. 2016, algorithm 1) merges on a list of ASCII words."""
    counts = Counter(tuple(word[:-1]) + (f"{word[-1]}</w>",) for word in words)
    merges = []
    for _ in range(number):
        pairs = Counter()
        for symbols, count in counts.items():
            for pair in pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        counts = Counter({merge(symbols, merges[-1]): count for symbols, count in counts.items()})
    return merges


def merge(symbols, pair):
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def write_tokenizer(folder, merges=LOW_LOWER, *, length=8, special_tokens_map=None, **config):
    """The files as Stable Diffusion's folders have them; returns the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = make_vocab(merges)
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special, **config}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if special_tokens_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))
    return vocab
