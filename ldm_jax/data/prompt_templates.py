"""Prompts of images without captions, around a token: the texts that textual inversion is trained on (Gal 2022)."""

from dataclasses import replace

from ldm_jax.data.datasets import Dataset

TEMPLATES = {
    "object": (
        "a photo of a {}",
        "a photo of the {}",
        "a photo of my {}",
        "a close-up photo of a {}",
        "a cropped photo of the {}",
        "a bright photo of the {}",
        "a dark photo of a {}",
        "a blurry photo of the {}",
        "a sharp photo of a {}",
        "a good photo of one {}",
        "a picture of a {}",
        "a picture of the {}",
        "an image of my {}",
        "a depiction of a {}",
        "a large {}",
        "a small {}",
    ),
    "style": (
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a picture in the style of {}",
        "an image in the style of {}",
        "a print in the style of {}",
        "a portrait in the style of {}",
        "a landscape in the style of {}",
        "a still life in the style of {}",
        "a close-up in the style of {}",
        "a detail of a painting in the style of {}",
        "a bright painting in the style of {}",
        "a dark painting in the style of {}",
    ),
}


def with_prompts(dataset: Dataset, token: str, learnable_property: str) -> Dataset:
    """The data set with prompts of a token in the place of empty captions.

    `learnable_property` is a key of TEMPLATES: what the token names, "object" or "style".
    """
    prompts = tuple(template.format(token) for template in TEMPLATES[learnable_property])
    captions = tuple(prompts if not any(texts) else texts for texts in dataset.captions)
    return replace(dataset, captions=captions, class_names=tuple(texts[0] for texts in captions))
