import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bpe import BEGIN, END, write_tokenizer

from ldm_jax.errors import InputError
from ldm_jax.interop import tokenizer
from ldm_jax.interop.tokenizer import load_tokenizer, tokenizer_of_vocabulary

REPOSITORY = Path(tokenizer.__file__).parents[2]
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def padded(vocab, tokens, length, pad):
    return [vocab[token] for token in tokens] + [vocab[pad]] * (length - len(tokens))


def test_ids_by_hand(tmp_path):
    """Lower case, merges in order, one token per digit, bytes of what is not ASCII."""
    vocab = write_tokenizer(tmp_path, length=12)
    tokenizer = load_tokenizer(tmp_path)
    expected = {
        "low": ["low</w>"],
        "  Low \n lower ": ["low</w>", "lo", "w", "er</w>"],
        "lo 42!": ["l", "o</w>", "4</w>", "2</w>", "!</w>"],
        "é": ["Ã", "©</w>"],  # U+00E9 is the bytes C3 A9
        "e\u0301": ["Ã", "©</w>"],  # and so is e with a combining accent, by NFC
        "": [],
    }
    tokens = tokenizer(list(expected))
    assert tokens.ids.dtype == np.int32 and tokens.ids.shape == (6, 12)
    for prompt, ids in zip(expected, tokens.ids):
        assert ids.tolist() == padded(vocab, [BEGIN, *expected[prompt], END], 12, END), prompt
    assert tokens.truncated.dtype == bool and not tokens.truncated.any()
    assert (tokenizer.max_length, tokenizer.vocab_size) == (12, len(vocab))


def test_which_prompts_are_truncated(tmp_path):
    vocab = write_tokenizer(tmp_path, length=6)
    letters = "abcdefghijklmno"
    tokens = load_tokenizer(tmp_path)([" ".join(letters[:n]) for n in (15, 4, 5, 0, 12)])
    assert tokens.truncated.tolist() == [True, False, True, False, True]
    first_four = padded(vocab, [BEGIN, *(f"{letter}</w>" for letter in letters[:4]), END], 6, END)
    assert tokens.ids[[0, 1, 2, 4]].tolist() == [first_four] * 4
    assert tokens.ids[3].tolist() == padded(vocab, [BEGIN, END], 6, END)


ADDED = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
# What is in the files -> the token that pads.
PADS = {
    "Stable Diffusion 1": ({"pad_token": END}, {"pad_token": END, "bos_token": {"content": BEGIN, **ADDED}}, END),
    "Stable Diffusion 2": ({"pad_token": END}, {"pad_token": "!", "eos_token": {"content": END, **ADDED}}, "!"),
    "SDXL's second": ({"pad_token": "!", "added_tokens_decoder": {"0": {"content": "!", **ADDED}}}, None, "!"),
    "no map": ({"pad_token": "!"}, None, "!"),
}


@pytest.mark.parametrize("config, special_tokens_map, pad", PADS.values(), ids=PADS.keys())
def test_the_pad_token_is_the_folders(config, special_tokens_map, pad, tmp_path):
    vocab = write_tokenizer(tmp_path, special_tokens_map=special_tokens_map, **config)
    assert vocab["!"] == 0
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(["low"]).ids.tolist() == [padded(vocab, [BEGIN, "low</w>", END], 8, pad)]
    assert tokenizer.vocab_size == len(vocab)


def test_a_token_that_the_vocabulary_lacks_is_added_to_it(tmp_path):
    """As transformers does it; a text encoder of the old size then shows in `vocab_size`."""
    vocab = write_tokenizer(tmp_path, pad_token="<pad>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer([""]).ids.tolist() == [[vocab[BEGIN], vocab[END], *[len(vocab)] * 6]]
    assert tokenizer.vocab_size == len(vocab) + 1


def test_a_folder_that_transformers_5_writes(tmp_path):
    """The vocabulary is in tokenizer.json alone; the class name of fast tokenizers is understood too."""
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path / "old", pad_token="!")
    CLIPTokenizer.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "vocab.json").exists()
    edit(tmp_path / "new" / "tokenizer_config.json", tokenizer_class="CLIPTokenizerFast")
    prompts = ["low lower", "!?", ""]
    old, new = (load_tokenizer(tmp_path / name)(prompts) for name in ("old", "new"))
    assert np.array_equal(old.ids, new.ids)


def of_layout(folder, layout):
    """A tokenizer from the files of a layout."""
    write_tokenizer(folder / "old", pad_token="!")
    if layout == "vocabulary alone":
        return tokenizer_of_vocabulary(folder / "old", pad_token="!", max_length=8)
    if layout != "vocab.json":
        load_tokenizer(folder / "old")._tokenizer.save_pretrained(folder / "new")
    if layout == "both":
        shutil.copyfile(folder / "new" / "tokenizer.json", folder / "old" / "tokenizer.json")
    return load_tokenizer(folder / ("new" if layout == "tokenizer.json" else "old"))


@pytest.mark.parametrize("layout", ["vocab.json", "tokenizer.json", "both", "vocabulary alone"])
def test_added_tokens_are_saved_in_every_layout(layout, tmp_path):
    """A prompt's token stands for all of its vectors again, saved a second time too; transformers has the same ids."""
    from transformers import CLIPTokenizer

    plain = of_layout(tmp_path, layout)
    tokenizer = plain.with_token("<X>", 3).with_token("<y>", 1)
    assert plain.added == () and tokenizer.added == ("<X>", "<X>_1", "<X>_2", "<y>")
    tokenizer.save(tmp_path / "once")
    load_tokenizer(tmp_path / "once").save(tmp_path / "twice")
    size, prompts = plain.vocab_size, ["low <X>", "<y> <X> low", "low"]
    ids = tokenizer(prompts).ids
    assert [i for i in ids[1].tolist() if i >= size] == [size + 3, size, size + 1, size + 2]
    np.testing.assert_array_equal(ids[2], plain(["low"]).ids[0])
    for name in ("once", "twice"):
        again = load_tokenizer(tmp_path / name)
        assert (again.added, again.vocab_size, again.max_length) == (tokenizer.added, size + 4, 8)
        np.testing.assert_array_equal(again(prompts).ids, ids)
        expanded = [prompt.replace("<X>", "<X> <X>_1 <X>_2") for prompt in prompts]
        expected = CLIPTokenizer.from_pretrained(tmp_path / name)(expanded, padding="max_length", truncation=True)
        assert expected["input_ids"] == ids.tolist()


def test_nothing_is_imported_or_printed_before_or_while_loading(tmp_path):
    write_tokenizer(tmp_path, special_tokens_map={"pad_token": "!"})
    code = f"""if True:
        import sys
        from ldm_jax.interop.tokenizer import load_tokenizer, tokenizer_of_vocabulary
        assert "transformers" not in sys.modules
        load_tokenizer({str(tmp_path)!r})(["low " * 20])
        assert "transformers" in sys.modules and "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_loading_leaves_logging_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.root.manager, "disable", logging.DEBUG)
    write_tokenizer(tmp_path / "good")
    load_tokenizer(tmp_path / "good")
    assert logging.root.manager.disable == logging.DEBUG
    write_tokenizer(tmp_path / "bad")
    (tmp_path / "bad" / "merges.txt").write_text("no such")
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / "bad")
    assert logging.root.manager.disable == logging.DEBUG


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_vocabulary(name, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"there must be vocab.json and merges.txt or tokenizer.json$"):
        load_tokenizer(tmp_path)


def test_a_missing_config_and_a_missing_folder(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"there is no .*tokenizer_config.json$"):
            load_tokenizer(folder)


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe{}"])
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_damaged_json(name, content, tmp_path):
    write_tokenizer(tmp_path, special_tokens_map={})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is damaged: ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_does_not_fit_its_merges(tmp_path):
    write_tokenizer(tmp_path)
    with (tmp_path / "merges.txt").open("a") as file:
        file.write("no such\n")
    with pytest.raises(InputError, match="not readable as a CLIP tokenizer: ") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [None, 10**30, 2, 77.0, "77"])
def test_a_folder_without_the_maximum_length(length, tmp_path):
    write_tokenizer(tmp_path, length=length)
    with pytest.raises(InputError, match=r"model_max_length must be a number of tokens, 77 for CLIP; got "):
        load_tokenizer(tmp_path)


def test_another_type_of_tokenizer(tmp_path):
    write_tokenizer(tmp_path, tokenizer_class="T5Tokenizer")
    with pytest.raises(InputError, match="the tokenizer must be a CLIPTokenizer; got 'T5Tokenizer'"):
        load_tokenizer(tmp_path)


def test_a_config_without_a_class(tmp_path):
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).max_length == 8


def test_a_folder_without_a_pad_token(tmp_path):
    write_tokenizer(tmp_path, pad_token=None)
    with pytest.raises(InputError, match=r"the tokenizer has no pad_token; tokenizer_config.json must name one"):
        load_tokenizer(tmp_path)


def test_a_prompt_that_is_not_unicode(tmp_path):
    write_tokenizer(tmp_path)
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python reads a command line in Latin-1
    with pytest.raises(InputError, match=r"the prompt 'caf\\udce9' is not Unicode text"):
        load_tokenizer(tmp_path)(["low", prompt])


PROMPTS = ["low! lower", "low ! !wow", "a!!", "", "é 42"]


@pytest.mark.parametrize("pad", [END, "!"])
def test_of_a_vocabulary_alone(pad, tmp_path):
    """It says what the folder of a model says whose files name that padding, whatever this folder names."""
    write_tokenizer(tmp_path / "whole", length=8, pad_token=pad)
    expected = load_tokenizer(tmp_path / "whole")(PROMPTS)
    vocab = write_tokenizer(tmp_path / "other", length=20, pad_token="!" if pad == END else END)
    (tmp_path / "other" / "tokenizer_config.json").unlink()
    fused = {"model": {"vocab": vocab, "merges": ["l o", ["lo", "w</w>"], ["e", "r</w>"]]}}
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "tokenizer.json").write_text(json.dumps(fused))
    for folder in ("whole", "other", "fused"):
        tokenizer = tokenizer_of_vocabulary(tmp_path / folder, pad_token=pad, max_length=8)
        assert (tokenizer.max_length, tokenizer.vocab_size) == (8, len(vocab))
        found = tokenizer(PROMPTS)
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.truncated.tolist() == expected.truncated.tolist()


NO_VOCABULARY = {
    "nothing": ({}, "vocabulary is missing; there must be vocab.json and merges.txt or tokenizer.json"),
    "half of it": ({"vocab.json": "{}"}, "vocabulary is missing"),
    "no words": ({"vocab.json": "{}", "merges.txt": ""}, "has no token '<|startoftext|>'"),
    "merges of three": ({"vocab.json": "{}", "merges.txt": "#version: 0.2\na b c\n"}, "must be a pair"),
    "merges in Latin-1": ({"vocab.json": "{}", "merges.txt": b"\xe9 a\n"}, "merges.txt: cannot read"),
    "a damaged JSON": ({"vocab.json": "{", "merges.txt": ""}, "vocab.json is damaged"),
    "no model": ({"tokenizer.json": '{"model": 3}'}, "it holds no vocabulary and merges"),
}


@pytest.mark.parametrize("case", NO_VOCABULARY)
def test_a_folder_without_a_vocabulary(case, tmp_path):
    files, words = NO_VOCABULARY[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        tokenizer_of_vocabulary(tmp_path, pad_token=END, max_length=8)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
