"""A folder of images of one concept, with captions or not: --config.data.name=concept --config.data.path=DIR

As `captioned_folder`, but images without a caption have an empty one, for which textual inversion has prompts of its
own (see `prompt_templates`).
"""

from pathlib import Path

from ldm_jax.data import captioned_folder


def prepare(data_dir: Path, manual_dir: Path | None) -> Path:
    """The folder of the data set prepared from the images of `manual_dir`, below `data_dir`; one for each content.

    Raises InputError without images or for damaged metadata, RunError if it cannot be written.
    """
    return captioned_folder.prepare(data_dir, manual_dir, name="concept", without_captions=True)
