"""The page, in gradio: its fields, its results, and what its buttons do."""

import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ldm_jax.demo import fields
from ldm_jax.demo.background import Stopped, reports
from ldm_jax.demo.form import Form, save_edit
from ldm_jax.demo.loaded_model import LoadedModel, Preview
from ldm_jax.demo.results import Result, Results, as_markdown, captions_of, enlarged, recipe_text
from ldm_jax.errors import InputError, RunError

SHOW_SAMPLES = "() => document.querySelector('#gallery').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
READY = "Samples appear here."
STARTING = "Starting. The first images of a size take longer: the sampler is compiled."
UNKNOWN = "Something went wrong; the server's log has the details. Other settings may work."
MEMORY = "There is not enough memory for this; try fewer or smaller images."


class Outputs(NamedTuple):
    """What a run shows; the components, or their new values."""

    gallery: Any
    status: Any
    recipe: Any
    grid: Any
    edit_files: Any
    result: Any  # the name of the result, in the browser's storage


class Stops:
    """The visitors' runs, by session, so that each can stop its own."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}

    def new(self, session: str | None) -> threading.Event:
        """The event that stops the next run of a session."""
        self._events[session or ""] = event = threading.Event()
        return event

    def stop(self, request: gr.Request) -> None:
        """Stops the run of the session of a request, if there is one."""
        event = self._events.pop(request.session_hash or "", None)
        if event is not None:
            event.set()


def make_page(loaded: LoadedModel, results: Results, name: str) -> gr.Blocks:
    """The page of a model; `name` is how it is called there."""
    stops = Stops()
    with gr.Blocks(title=f"ldm_jax: {name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# ldm_jax\n{fields.describe(loaded.model, name)}", elem_id="heading")
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                inputs = fields.make_fields(loaded)
                editor, lora = fields.make_uploads(loaded, inputs)
                with gr.Row(elem_id="buttons"):
                    sample = gr.Button("Sample", variant="primary", elem_id="sample", scale=3)
                    stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
            with gr.Column(scale=8, min_width=320):
                outputs = _make_outputs()
        names = tuple(inputs)
        components = [inputs[each] for each in names]
        storage = gr.BrowserState(None, storage_key="ldm_jax")
        remembered = [*components, outputs.result]
        gr.on([each.change for each in remembered], None, remembered, storage, js=_remember(names))

        def run(request: gr.Request, *values: Any) -> Iterator[Outputs]:
            yield from _run(loaded, results, stops.new(request.session_hash), names, *values)

        gr.on(
            [sample.click, *(inputs[each].submit for each in ("prompt", "negative_prompt") if each in inputs)],
            run, [*components, editor, lora], [*outputs],
            concurrency_limit=1, concurrency_id="model", trigger_mode="once", show_progress="full",
            show_progress_on=outputs.status, api_name=False,
        )  # fmt: skip
        sample.click(None, js=SHOW_SAMPLES)
        stop.click(stops.stop, queue=False, api_name=False)
        page.load(partial(_restore, results, names), storage, [*components, *outputs], api_name=False)
        page.unload(stops.stop)
    return page.queue(default_concurrency_limit=1, max_size=64, api_open=False)


def _make_outputs() -> Outputs:
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            gallery = gr.Gallery(
                label="Samples", elem_id="gallery", columns=2, height="auto", object_fit="contain", format="png",
                buttons=["download", "fullscreen"], interactive=False,
            )  # fmt: skip
            with gr.Row(equal_height=True):
                status = gr.Markdown(READY, elem_id="status")
                grid = gr.DownloadButton("Download samples.png", size="sm", elem_id="grid", interactive=False, scale=0)
            edit_files = gr.File(
                label="The image and the mask that the recipe names", elem_id="edit_files", file_count="multiple",
                interactive=False, visible=False,
            )  # fmt: skip
        with gr.Column(scale=3, min_width=260):
            recipe = gr.Code(
                label="Recipe", elem_id="recipe", language="json", interactive=False, show_line_numbers=False,
                wrap_lines=True, lines=10, max_lines=36,
            )  # fmt: skip
    return Outputs(gallery, status, recipe, grid, edit_files, gr.Textbox(visible=False, elem_id="result"))


def _remember(names: tuple[str, ...]) -> str:
    """JavaScript: the values of the fields and the result's name as one object."""
    keys = [*names, "result"]
    return f"(...values) => [Object.fromEntries({keys!r}.map((key, i) => [key, values[i]]))]"


def _restore(results: Results, names: tuple[str, ...], stored: Any) -> list[Any]:
    """The values of the page as the browser remembers them: of a page that is loaded again."""
    stored = stored if isinstance(stored, dict) else {}
    values = [gr.update(value=stored[name]) if stored.get(name) is not None else gr.skip() for name in names]
    result = results.read(stored.get("result"))
    return values + ([gr.skip()] * len(Outputs._fields) if result is None else [*_shown(result, stored["result"])])


def _shown(result: Result, name: str) -> Outputs:
    gallery = gr.update(value=result.images, columns=_columns(len(result.images)))
    grid = gr.update(value=result.grid, interactive=True)
    edit_files = gr.update(value=result.edit_files, visible=bool(result.edit_files))
    return Outputs(gallery, result.summary, recipe_text(result.recipe), grid, edit_files, name)


def _columns(num: int) -> int:
    return 1 if num == 1 else 2 if num <= 4 else 3 if num <= 9 else 4


def _run(
    loaded: LoadedModel, results: Results, stop: threading.Event, names: tuple[str, ...], *values: Any
) -> Iterator[Outputs]:
    """Samples, with previews; raises gr.Error with one line in words."""
    *values, edit, lora = values
    skip, started = gr.skip(), time.monotonic()
    yield Outputs(skip, STARTING, skip, skip, skip, skip)
    folder = results.new()
    try:
        uploads = save_edit(folder, edit["background"], edit["layers"] or []) if edit else {}
        form = Form(**dict(zip(names, values)), **uploads, lora=lora or None)
        for event, value in reports(partial(loaded.sample, form), stop):
            if event == "report":
                yield _previewed(value)
            else:
                (samples, warnings), seconds = value, time.monotonic() - started
                num = len(samples.images)
                summary = f"{num} {'image' if num == 1 else 'images'} in {seconds:.1f} s"
                summary = "\n\n".join([summary, *map(as_markdown, warnings)])
                result = results.save(folder, samples, captions_of(loaded.model, samples), summary)
                yield _shown(result, folder.name)
    except Stopped:
        yield Outputs(skip, "Stopped.", skip, skip, skip, skip)
    except Exception as error:
        message = _in_words(error)
        yield Outputs(skip, f"**{message}**", skip, skip, skip, skip)
        raise gr.Error(message, duration=10, print_exception=False) from error


def _previewed(preview: Preview) -> Outputs:
    """A preview, without the recipe and the files of the samples before."""
    images = [enlarged(image) for image in preview.images]
    gallery, off = gr.update(value=images, columns=_columns(len(images))), gr.update(interactive=False)
    return Outputs(gallery, f"Sampling: {preview.fraction:.0%}", "", off, gr.update(visible=False), gr.skip())


def _in_words(error: Exception) -> str:
    """One line about an error for the page; the log of the server has the traceback of one that is no input's."""
    if isinstance(error, InputError | RunError):
        message = " ".join(str(error).split())
        word = message.split(" ")[0]
        return f"{word.capitalize() if word.isalpha() and word.islower() else word}{message[len(word) :]}."
    traceback.print_exception(error, file=sys.stderr)
    return MEMORY if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError) else UNKNOWN


def serve(page: gr.Blocks, *, host: str, port: int, password: str | None) -> None:
    """Serves the page until Ctrl-C or SIGTERM; with a password, to the user "ldm_jax" alone."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the uploads are removed
    local = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # no fonts from elsewhere
    theme = gr.themes.Default(font=local, font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"])
    _, url, _ = page.launch(
        server_name=host, server_port=port, auth=("ldm_jax", password) if password else None, theme=theme,
        css_paths=Path(__file__).with_name("page.css"), footer_links=[], share=False, quiet=True, inbrowser=False,
        prevent_thread_lock=True, max_file_size="4gb", ssr_mode=False, enable_monitoring=False, pwa=False,
    )  # fmt: skip
    print(f"The page: {url}  (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
