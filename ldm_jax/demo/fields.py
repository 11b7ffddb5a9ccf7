"""The fields of the page's form, in gradio: those that the model has, with its defaults."""

import random
from typing import Any

import gradio as gr

from ldm_jax.demo.form import ALL_CLASSES, MAX_GUIDANCE, MAX_LORA_SCALE, class_choices, controls_of
from ldm_jax.demo.loaded_model import LoadedModel
from ldm_jax.pipeline.model import LatentDiffusion

IMAGES = 4  # by default


def describe(model: LatentDiffusion, name: str) -> str:
    """A line about a model."""
    controls, (height, width, channels) = controls_of(model), model.image_shape
    what = "text to image" if controls.texts else "images of classes" if controls.class_names else "unconditional"
    colour = "grey" if channels == 1 else "colour"
    return f"`{name}`: {what}, {width}x{height} pixels, {colour}. The same recipe gives the same samples."


def make_fields(loaded: LoadedModel) -> dict[str, Any]:
    """The components of the form's fields but for uploads, by the names of `form.Form`."""
    model, bounds, fields = loaded.model, loaded.bounds, {}
    controls, defaults = controls_of(model), model.defaults
    if controls.texts:
        fields["prompt"] = gr.Textbox(
            label="Prompt",
            placeholder="a photo of a cat",
            info="For several, one on each line.",
            lines=2,
            max_lines=6,
            elem_id="prompt",
        )
        fields["negative_prompt"] = gr.Textbox(
            label="Negative prompt", placeholder="what the samples should not show", lines=1, elem_id="negative_prompt"
        )
    elif controls.class_names:
        fields["label"] = gr.Dropdown(
            [ALL_CLASSES, *class_choices(controls.class_names)], value=ALL_CLASSES, label="Class", elem_id="label"
        )
    with gr.Row():
        num = min(1 if controls.texts else IMAGES, bounds.num)
        fields["num"] = gr.Slider(1, bounds.num, value=num, step=1, label="Images", elem_id="num")
    with gr.Row(equal_height=True):
        fields["seed"] = gr.Number(value=0, label="Seed", elem_id="seed", scale=3)
        dice = gr.Button("Random", size="sm", elem_id="random", scale=1, min_width=80)
        dice.click(lambda: random.randrange(2**32), None, fields["seed"], queue=False, api_name=False)
    with gr.Row():
        fields["sampler"] = gr.Dropdown(
            [*controls.samplers], value=defaults.sampler, label="Sampler", elem_id="sampler", min_width=140
        )
        fields["steps"] = gr.Slider(
            1, bounds.steps, value=min(defaults.steps, bounds.steps), step=1, label="Steps", elem_id="steps",
            min_width=140,
        )  # fmt: skip
    if controls.guided:
        fields["guidance"] = gr.Slider(
            0, min(MAX_GUIDANCE, 15), value=defaults.guidance, step=0.1, label="Guidance", elem_id="guidance",
            info="How strictly the samples follow the prompt or class; 1: no guidance.",
        )  # fmt: skip
    if controls.size_step:
        step, (height, width) = controls.size_step, model.image_shape[:2]
        least, most = max(step, min(height, width) // 4 // step * step), bounds.size // step * step
        with gr.Accordion("Size", open=False):
            with gr.Row():
                for name, own in (("width", width), ("height", height)):
                    fields[name] = gr.Slider(
                        least, most, value=own, step=step, label=name.capitalize(), elem_id=name, min_width=140
                    )
            gr.Markdown(f"The model's own: {width}x{height}. Left so, an uploaded image keeps its proportions.")
    return fields


def make_uploads(loaded: LoadedModel, fields: dict[str, Any]) -> tuple[gr.ImageEditor, gr.File]:
    """The editor of an image, and the LoRA file; adds their numbers to the form's fields."""
    controls = controls_of(loaded.model)
    side = min(loaded.model.image_shape[:2])
    size = "auto" if side >= 256 else max(1, side // 14)  # of the brush: gradio's own covers small images whole
    title = "An image to use" if controls.needs_image else "Start from an image"
    with gr.Accordion(title, open=controls.needs_image, elem_id="image_box"):
        paint = "Upload an image. Paint over a part of it to sample that part alone (inpainting)."
        gr.Markdown(paint if controls.paint else "Upload the image that the model works from.")
        editor = gr.ImageEditor(
            type="pil", image_mode="RGBA", label="Image", show_label=False, elem_id="editor",
            sources=["upload", "clipboard"], transforms=(), layers=False, format="png", height=340,
            canvas_size=(512, 512),
            brush=gr.Brush(colors=["#ff3b6b"], color_mode="fixed", default_size=size) if controls.paint else False,
            eraser=None if controls.paint else False, buttons=[],
        )  # fmt: skip
        if controls.strength:
            fields["strength"] = gr.Slider(
                0.01, 1, value=0.7, step=0.01, label="Strength", elem_id="strength",
                info="How much of the image, or of its painted part, is new; 1: all of it.",
            )  # fmt: skip
    with gr.Accordion("LoRA", open=False, elem_id="lora_box"):
        lora = gr.File(
            label="A LoRA of this model (.safetensors)", file_types=[".safetensors"], elem_id="lora", height=120
        )
        fields["lora_scale"] = gr.Slider(
            -MAX_LORA_SCALE, MAX_LORA_SCALE, value=1, step=0.05, label="LoRA scale", elem_id="lora_scale"
        )
    return editor, lora
