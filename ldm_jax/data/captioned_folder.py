"""A folder of images with captions, as in Hugging Face's imagefolder: --config.data.name=folder --config.data.path=DIR

The caption of an image is the `text` of the line with its `file_name` in a metadata.jsonl or metadata.csv, in the
image's folder or one above (the name is relative to that file), or else the .txt or .caption file of the image's name:
see `caption_files`. As in `image_folder`, the folders of DIR are the splits if all are named so and one is "train";
otherwise all is "train". Images without a caption or that cannot be read are left out, counted on the screen, and
listed in left_out.txt in the folder of the data set.
"""

from pathlib import Path

from ldm_jax.data.caption_files import caption_files, read_captions
from ldm_jax.data.folder_builder import check_path, prepare_content, say_once
from ldm_jax.data.image_files import Splits, by_type, list_files, show, split_folders
from ldm_jax.data.skipped import Skipped, summarize
from ldm_jax.errors import InputError


def prepare(data_dir: Path, manual_dir: Path | None, *, name: str = "folder", without_captions: bool = False) -> Path:
    """The folder of the data set prepared from the images of `manual_dir`, below `data_dir`; one for each content.

    Args:
        data_dir, manual_dir: see above.
        name: of the data set, before a hash of its content.
        without_captions: images without a caption have an empty one, and are not left out.

    Raises InputError without images with captions or for damaged metadata, RunError if it cannot be written.
    """
    source = check_path(name, manual_dir, "images" if without_captions else "images and captions")
    splits, skipped, note = _find_images(source, without_captions)

    def check(splits: Splits, skipped: Skipped) -> None:
        _check_any(source, splits, skipped, without_captions)

    check(splits, skipped)
    if note:
        say_once(note)
    return prepare_content(data_dir, name, splits, skipped, target="caption", check=check)


def _find_images(source: Path, without_captions: bool) -> tuple[Splits, Skipped, str]:
    """The images with captions, or all, what is left out, and the note of `split_folders`."""
    files = list_files(source)
    captions, (folders, note) = read_captions(files), split_folders(source, files.images)
    splits: Splits = {}
    skipped = list(files.left_out)
    for path in files.images:
        split = next((split for split, root in folders.items() if path.is_relative_to(root)), None)
        if split is None:
            skipped.append(("images outside the folders of splits", show(path)))
        elif caption := captions.of.get(path):
            splits.setdefault(split, []).append((path, caption))
        elif without_captions and path not in captions.why:
            splits.setdefault(split, []).append((path, ""))
        else:
            skipped.append((captions.why.get(path, "without a caption"), show(path)))
    skipped += captions.skipped
    used = caption_files(files)
    skipped += by_type(path for path in files.others if path not in used)
    return splits, skipped, note


def _check_any(source: Path, splits: Splits, skipped: Skipped, without_captions: bool) -> None:
    if splits:
        return
    where, left_out = f"config.data.path={show(source)}", f"left out are {'; '.join(summarize(skipped))}"
    if without_captions:
        raise InputError(f"{where} has no image that can be read{f': {left_out}' if skipped else ''}")
    why = left_out if skipped else "it needs images, and a metadata.jsonl, metadata.csv or .txt"
    more = "images without captions are for configs/own_pictures.py"
    raise InputError(f"{where} has no image with a caption: {why}; {more}")
