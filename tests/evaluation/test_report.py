"""report.html from run folders whole, partial, empty and hostile."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.evaluation.mixed_sheet import write_mixed_sheet
from ldm_jax.evaluation.report import cards, duration, write_report
from ldm_jax.sampling.image_grids import comparison, sample_grid, save_denoising_gif, save_png
from ldm_jax.sampling.recipe import Guidance, Recipe, Solving, to_json

CARD = {
    "score": "FD-VGG16",
    "value": 3.21,
    "better": "lower",
    "n": 10000,
    "reference": "test",
    "reference_n": 9000,
    "method": "Frechet distance",
    "resize": 32,
    "weights_sha256": "2ecbe4ce01168921",
    "std": None,
    "floor": 0.41,
    "autoencoder": 2.13,
}


class Page(HTMLParser):
    """The parts of a page that the tests ask about; notices tags that do not match."""

    VOID = ("meta", "img", "input", "link", "br")

    def __init__(self, html):
        super().__init__()
        self.stack, self.tags, self.headings, self.text = [], [], [], ""
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "h2":
            self.headings.append(data)
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.text += data

    def attributes(self, tag, name):
        return [attrs[name] for t, attrs in self.tags if t == tag and name in attrs]


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)


def metrics():
    lines = []
    for step in range(50, 1050, 50):
        speed = {"examples_per_second": 900.0}
        lines.append(
            {"stage": "autoencoder", "step": step, "time": step / 10, "l1": 1 / step, "perceptual": 0.1} | speed
        )
    for step in range(50, 1050, 50):
        lines.append({"stage": "diffusion", "step": step, "time": 100 + step / 5, "loss": 0.2 + 1 / step} | speed)
        if step % 500 == 0:
            buckets = {f"validation_loss_{k}": 1 / (k + 1) for k in range(10)}
            lines.append({"stage": "diffusion", "step": step, "time": 100 + step / 5, "validation_loss": 0.3} | buckets)
    for part, seconds in (("autoencoder", 100.0), ("diffusion", 120.0), ("diffusion", 80.0), ("scoring", 30.0)):
        values = {f"{part}_seconds": seconds, f"{part}_compile_seconds": 10.0, f"{part}_compilations": 2}
        lines.append({"stage": "timing", "step": 0, "time": 330.0} | values)
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def workdir(tmp_path):
    """A run folder with everything in it."""
    labels = np.arange(20) % 2
    recipe = Recipe(20, 0, [0, 1], [], [8, 8], "float32", Solving("ddim", 50, "trailing"), Guidance(1.5, [0, 1]))
    save_png(sample_grid(images(20), labels, ["boot", "bag"]), tmp_path / "samples.png", to_json(recipe))
    save_denoising_gif(np.stack([images(4, 1), images(4, 2)]), tmp_path / "denoising.gif")
    for step in range(100, 2100, 100):
        save_png(sample_grid(images(4, step)), tmp_path / "progress" / f"diffusion_{step:06d}.png")
    write_mixed_sheet(tmp_path, images(20), images(9, 3), seed=0)
    pairs = comparison({"original": images(4), "decoded": images(4)})
    save_png(pairs, tmp_path / "progress" / "autoencoder_001000.png")
    (tmp_path / "progress" / "diffusion_notes.png").write_text("not ours")
    (tmp_path / "metrics.jsonl").write_text(metrics())
    scores = {"images": {"FD-VGG16": CARD}, "reconstructions": {"PSNR": CARD | {"score": "PSNR", "value": 24.5}}}
    (tmp_path / "evaluation.json").write_text(json.dumps(scores))
    (tmp_path / "config.json").write_text(
        json.dumps({"data": {"name": "fashion_mnist"}, "autoencoder": {"type": "kl"}})
    )
    about = {"train": 60000, "device": "1 x cpu", "command": "python -m ldm_jax.train --config=configs/x.py"}
    (tmp_path / "data.json").write_text(json.dumps(about))
    return tmp_path


def test_a_whole_run(workdir):
    path = write_report(workdir)
    assert path == workdir / "report.html"
    page = read(path)
    assert page.headings == [
        "Samples",
        "Samples among test images",
        "Scores",
        "Samples during training",
        "Reconstructions of the autoencoder",
        "Curves",
        "Where the time went",
        "Reproduce",
    ]
    for words in (
        "Latent diffusion on fashion mnist",
        "Trained on 60,000 images on 1 x cpu in 5 min 30 s",
        "ddim, 50 steps, guidance 1.5, seed 0",
        "10,000 images against 9,000 of “test”; Frechet distance; at 32 pixels; weights 2ecbe4ce0116",
        "python -m ldm_jax.train --config=configs/x.py",
        "Validation loss by timestep",
        "Perceptual: LPIPS",
        '"type": "kl"',
    ):
        assert words in page.text
    assert "Discriminator" not in page.text  # this run had none
    assert page.text.count("floor") >= 2 and "24.5" in page.text


def test_the_page_asks_nobody_for_anything(workdir):
    page = read(write_report(workdir))
    sources = page.attributes("img", "src")
    assert len(sources) == 2 + 2 + 12 + 1 and all(
        re.match(r"data:image/(png|gif);base64,", source) for source in sources
    )
    assert not page.attributes("script", "src") and not page.attributes("link", "href")
    assert "default-src 'none'" in page.attributes("meta", "content")[1]
    html = (workdir / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\((?!#)|@import", html)
    alts = page.attributes("img", "alt")
    assert len(alts) == len(sources) and all(alts)


def test_the_slider_holds_twelve_moments_first_and_last_among_them(workdir):
    page = read(write_report(workdir))
    captions = page.attributes("img", "data-caption")
    assert len(captions) == 12 and captions[0] == "step 100" and captions[-1] == "step 2,000"
    hidden = [("hidden" in attrs) for tag, attrs in page.tags if tag == "img" and "data-caption" in attrs]
    assert hidden == [True] * 11 + [False]
    assert page.attributes("input", "max") == ["11"]


def test_timings_are_summed_over_restarts_with_the_speed_beside_them(workdir):
    text = read(write_report(workdir)).text
    assert "Stage 2: diffusion model3 min 20 s61%20 s900 / s" in text
    assert "Scores30 s9%10 s" in text
    assert "The whole run5 min 30 s" in text


@pytest.mark.parametrize(
    ("missing", "heading"),
    [
        ("evaluation.json", "Scores"),
        ("metrics.jsonl", "Curves"),
        ("metrics.jsonl", "Where the time went"),
    ],
)
def test_missing_pieces_are_left_out(workdir, missing, heading):
    (workdir / missing).unlink()
    page = read(write_report(workdir))
    assert heading not in page.headings and "Samples" in page.headings


def test_an_empty_folder_makes_an_empty_report(tmp_path):
    page = read(write_report(tmp_path))
    assert page.headings == []
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_samples_without_recipe_and_pixel_diffusion(workdir):
    save_png(sample_grid(images(4)), workdir / "samples.png")
    (workdir / "config.json").write_text(json.dumps({"data": {"name": "toy"}, "autoencoder": {"type": "none"}}))
    text = read(write_report(workdir)).text
    assert "Pixel diffusion on toy" in text and "ddim" not in text


def test_names_from_outside_stay_text(workdir):
    attack = '<script>alert(1)</script>"><img src=x>'
    (workdir / "config.json").write_text(json.dumps({"data": {"name": attack}}))
    (workdir / "evaluation.json").write_text(
        json.dumps([CARD | {"score": attack, "method": attack, "reference": attack}])
    )
    (workdir / "data.json").write_text(json.dumps({"train": 1, "device": attack, "command": attack}))
    html = write_report(workdir).read_text()
    assert "<script>alert" not in html and "<img src=x>" not in html
    assert len(re.findall("<script>", html)) == 1


def test_cards_are_found_however_they_are_grouped():
    assert list(cards({"a": {"b": CARD}, "c": [CARD], "n": 3})) == [CARD, CARD]
    assert list(cards({})) == []


def test_cards_stand_under_the_name_of_their_group(workdir):
    (workdir / "evaluation.json").write_text(json.dumps({"restored": {"PSNR": CARD}, "baseline": {"PSNR": CARD}}))
    html = write_report(workdir).read_text()
    places = [html.index(text) for text in ("Restored test images", 'class="card"', "The same by interpolation")]
    assert places == sorted(places)


def test_a_card_below_zero_and_without_companions(workdir):
    bare = {key: value for key, value in CARD.items() if key in ("score", "n", "reference", "reference_n")}
    kid = CARD | {"score": "KID", "value": -0.001, "std": 0.002, "floor": -0.002, "autoencoder": None}
    (workdir / "evaluation.json").write_text(json.dumps([kid, bare | {"value": 0.5}]))
    html = write_report(workdir).read_text()
    assert "± 0.002" in html and html.count('class="meter"') == 1
    assert "width:-" not in html


def test_damage_is_told_in_one_line(workdir):
    (workdir / "evaluation.json").write_text('{"FD')
    with pytest.raises(InputError, match=r"evaluation\.json is damaged"):
        write_report(workdir)
    with pytest.raises(InputError, match="no run folder"):
        write_report(workdir / "absent")


def test_durations():
    assert [duration(s) for s in (0.4, 59.4, 59.6, 320, 3599.7, 11050)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "5 min 20 s",
        "1 h 00 min",
        "3 h 04 min",
    ]
