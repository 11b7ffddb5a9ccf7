"""The page in a browser, Debian's Chromium driven by playwright; skipped where gradio, playwright or it are missing."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import ldm_files
import numpy as np
import pytest
import random_runs
from PIL import Image

from ldm_jax.sampling.image_grids import read_recipe

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ([] if CHROMIUM else ["chromium"])
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}")]

ROOT = Path(__file__).parents[2]
SECONDS = 120  # for a run, its compilation included
MS = 1000 * SECONDS


@contextmanager
def served(model, folder, *flags):
    """The address of the command's page of a model, and its output so far as a function."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "ldm_jax.demo", f"--model={model}", f"--port={port}", *flags]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SECONDS
        while "The page: " not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", log.read_text
        assert process.poll() is None and "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """The page of a tiny model with classes."""
    folder = tmp_path_factory.mktemp("classes")
    with served(random_runs.random_run(folder / "run"), folder, "--max_num=4") as (url, _):
        yield url


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The page of a tiny text-to-image model."""
    folder = tmp_path_factory.mktemp("texts")
    with served(ldm_files.write_folder(folder / "model", "Stable Diffusion 1", size=16), folder) as (url, _):
        yield url


@pytest.fixture
def visit(browser):
    """Opens a page as a new visitor; fails if it asks another host for anything."""
    contexts, elsewhere = [], []

    def visit(url, **options):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(url)
        ready(page)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not [url for url in elsewhere if not re.match(r"http://127\.0\.0\.1|data:|blob:", url)]


def ready(page):
    page.wait_for_selector("#sample")
    page.wait_for_timeout(1000)  # what the browser remembers is filled in


def wait_for_status(page, pattern):
    page.wait_for_function(f"/{pattern}/.test(document.querySelector('#status')?.innerText)", timeout=MS)
    return page.inner_text("#status")


def sample(page, num, start=True):
    """Samples; waits for the images, and returns their sources."""
    before = page.inner_text("#recipe")
    if start:
        page.click("#sample")
    page.wait_for_function("before => document.querySelector('#recipe').innerText != before", arg=before, timeout=MS)
    wait_for_status(page, rf"{num} images? in [\d.]+ s")
    page.wait_for_function(f"document.querySelectorAll('#gallery .grid-wrap img').length == {num}", timeout=MS)
    return page.locator("#gallery .grid-wrap img").evaluate_all("images => images.map(image => image.src)")


def number(page, name, value):
    page.fill(f"#{name} input[type=number]", str(value))
    page.keyboard.press("Tab")
    page.wait_for_timeout(300)


def recipe_of(page, folder):
    """The recipe in the samples.png that the page offers."""
    with page.expect_download() as download:
        page.click("#grid")
    assert download.value.suggested_filename == "samples.png"
    download.value.save_as(folder / "samples.png")
    return read_recipe(folder / "samples.png")


def test_a_page_samples_and_survives_a_reload(classes, visit, tmp_path):
    page = visit(classes)
    number(page, "seed", 11)
    number(page, "steps", 5)
    page.click("#label input")
    page.click("[role=option]:has-text('bright')")
    images = sample(page, 4)
    recipe = recipe_of(page, tmp_path)
    assert (recipe["seed"], recipe["labels"], recipe["solving"]["steps"]) == (11, [2], 5)
    assert "bright" in page.inner_text("#gallery") and '"seed": 11' in page.inner_text("#recipe")
    page.reload()
    ready(page)
    wait_for_status(page, "4 images in")
    assert page.input_value("#seed input") == "11" and page.input_value("#label input") == "bright"
    assert page.locator("#gallery .grid-wrap img").count() == 4 and '"seed": 11' in page.inner_text("#recipe")
    page.click("#random")
    page.wait_for_function("document.querySelector('#seed input').value != '11'")
    assert sample(page, 4) != images


def test_an_image_is_edited_and_inpainted_by_brush(classes, visit, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    page = visit(classes)
    page.click("#image_box button")
    page.wait_for_selector("#editor >> text=Upload an image", timeout=MS)
    page.wait_for_timeout(2000)  # until the canvas takes images
    page.set_input_files("#editor input[type=file]", tmp_path / "photo.png")
    page.wait_for_selector("#editor button[aria-label='Brush Size']", timeout=MS)
    page.wait_for_timeout(1000)
    number(page, "strength", 0.5)
    sample(page, 4)
    recipe = recipe_of(page, tmp_path)["edit"]
    assert recipe["init_image"].endswith("init_image.png") and recipe["mask"] is None and recipe["strength"] == 0.5
    canvas = page.locator("#editor canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 20, y, steps=5)
    page.mouse.up()
    page.wait_for_timeout(1000)
    sample(page, 4)
    recipe = recipe_of(page, tmp_path)["edit"]
    mask = np.asarray(Image.open(recipe["mask"]))
    assert mask.shape == (8, 8) and 0 < (mask == 255).sum() < 64
    assert "mask.png" in re.sub(r"\s", "", page.inner_text("#edit_files"))


def test_a_prompt_is_needed_and_sampled(texts, visit, tmp_path):
    page = visit(texts)
    page.click("#sample")
    words = "The prompt is empty; it must be a text, e.g. a photo of a cat."
    assert wait_for_status(page, "The prompt") == words
    assert words in page.inner_text(".toast-body")
    page.fill("#prompt textarea", "low lower")
    page.fill("#negative_prompt textarea, #negative_prompt input", "new")
    number(page, "steps", 3)
    sample(page, 1)
    recipe = recipe_of(page, tmp_path)
    assert (recipe["prompts"], recipe["guidance"]["negative_prompt"]) == (["low lower"], "new")
    page.reload()
    ready(page)
    assert page.input_value("#prompt textarea") == "low lower"


def test_warnings_are_shown_with_the_samples(texts, visit):
    page = visit(texts)
    page.fill("#prompt textarea", "low (lower:1.2)")
    number(page, "steps", 3)
    sample(page, 1)
    status = page.inner_text("#status")
    assert "Note: (lower:1.2) is part of the text, as in diffusers" in status
    page.reload()
    ready(page)
    assert "(lower:1.2)" in page.inner_text("#status")


def test_a_lora_that_does_not_fit_is_refused_in_words(texts, visit, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(b"nothing")
    page = visit(texts)
    page.fill("#prompt textarea", "low")
    page.click("#lora_box button")
    page.set_input_files("#lora input[type=file]", tmp_path / "style.safetensors")
    page.wait_for_timeout(1500)
    page.click("#sample")
    message = wait_for_status(page, "safetensors")
    assert "style.safetensors" in message and "/" not in message and "Traceback" not in message


def test_two_visitors_wait_in_turn_and_see_their_own_samples(texts, visit):
    visitors = [visit(texts) for _ in range(2)]
    for seed, page in enumerate(visitors):
        page.fill("#prompt textarea", "low")
        number(page, "steps", 20)
        number(page, "seed", 20 + seed)
    for page in visitors:
        page.click("#sample")
    images = [sample(page, 1, start=False) for page in visitors]
    assert images[0] != images[1]
    for seed, page in enumerate(visitors):
        assert f'"seed": {20 + seed}' in page.inner_text("#recipe")


def test_a_run_can_be_stopped_or_left_and_the_model_is_free(texts, visit):
    page = visit(texts)
    page.fill("#prompt textarea", "low")
    number(page, "num", 16)
    number(page, "steps", 250)
    page.click("#sample")
    wait_for_status(page, "Sampling")
    page.click("#stop")
    assert wait_for_status(page, "Stopped") == "Stopped."
    page.click("#sample")
    wait_for_status(page, "Sampling")
    page.reload()  # in the midst of a run
    ready(page)
    number(page, "num", 1)
    number(page, "steps", 3)
    started = time.monotonic()
    sample(page, 1)
    assert time.monotonic() - started < SECONDS / 4


def test_a_page_fits_a_phone(classes, visit):
    page = visit(classes)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    box = page.locator("#sample").bounding_box()
    assert box["y"] + box["height"] <= 844  # in view without scrolling


def test_a_password_is_asked_for(tmp_path, browser):
    (tmp_path / "served").mkdir()
    model = random_runs.random_run(tmp_path / "run")
    with served(model, tmp_path / "served", "--password=open sesame") as (url, _):
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("input[type=password]")
        assert page.locator("#sample").count() == 0
        for password, seen in (("wrong", "text=Incorrect"), ("open sesame", "#sample")):
            page.locator("input").first.fill("ldm_jax")
            page.fill("input[type=password]", password)
            page.click("button")
            page.wait_for_selector(seen, timeout=MS)
        page.close()
