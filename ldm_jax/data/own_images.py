"""A folder of images as a data set with the splits "train" and "test": --config.data.name=images --config.data.path=DIR

Images may lie in DIR itself, in one folder per class, or so in folders of splits: see `image_folder`. Without a folder
"test" the folder "validation", "valid", "val" or "dev" is the test split; without any of them a tenth of the images
is, though at least 4, for the scores, and at most a quarter. Images that cannot be read are left out, counted on the
screen, and listed in left_out.txt in the folder of the data set.
"""

import hashlib
from collections import Counter
from pathlib import Path

from ldm_jax.data.folder_builder import check_path, describe, prepare_content, say_once
from ldm_jax.data.image_files import Splits, show
from ldm_jax.data.image_folder import find_images
from ldm_jax.data.skipped import Skipped, summarize
from ldm_jax.errors import InputError

HELD_OUT = ("test", "validation", "valid", "val", "dev")  # the first that is there is the test split
SCORED = 4  # test images that the scores of samples need


def prepare(data_dir: Path, manual_dir: Path | None) -> Path:
    """The folder of the data set prepared from the images of `manual_dir`, below `data_dir`; one for each content.

    Prints the numbers of images and what is left out. Raises InputError with less than two readable images, RunError
    if it cannot be written.
    """
    source = check_path("images", manual_dir, "images")
    images = find_images(source)

    def check(splits: Splits, skipped: Skipped) -> None:
        if len(splits.get("train", ())) < (1 if any(splits.get(name) for name in HELD_OUT) else 2):
            left_out = f"; left out are {'; '.join(summarize(skipped))}" if skipped else ""
            raise InputError(
                f"config.data.path={show(source)} has too few images that can be read: it needs at least two, one to "
                f"train on and one to test{left_out}"
            )

    check(images.splits, images.left_out)
    for line in [*describe(images.splits), *images.notes]:
        say_once(line)
    return prepare_content(
        data_dir, "images", images.splits, images.left_out, target="label", check=check, arrange=with_test_split
    )


def with_test_split(splits: Splits) -> Splits:
    """The splits "train" and "test", and others that there are; see above. A class keeps an image in "train".

    Which images are held out depends on their names alone.
    """
    if held_out := [name for name in HELD_OUT if name in splits]:
        return {"test" if split == held_out[0] else split: images for split, images in splits.items()}
    images = splits["train"]
    num = num_held_out(len(images))
    left, chosen = Counter(label for _, label in images), set()
    for path, label in sorted(images, key=lambda image: hashlib.sha256(show(image[0].name).encode()).digest()):
        if len(chosen) < num and left[label] > 1:
            chosen.add(path)
            left[label] -= 1
    if not chosen:  # each image has a class of its own
        raise InputError("no class has two images, one to train on and one to test: put test images in a folder 'test'")
    parts = {"train": False, "test": True}
    return splits | {
        split: [image for image in images if (image[0] in chosen) == held] for split, held in parts.items()
    }


def num_held_out(num: int) -> int:
    """The number of test images of `num` images without a test split; 0 of a single one."""
    return min(max(1, min(max(SCORED, num // 10), num // 4)), num - 1)
