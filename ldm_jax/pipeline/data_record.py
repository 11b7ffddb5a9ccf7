"""The record of a run's data sets, data.json, and the check that they have not changed since."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError

INIT_FROM = "init_from_fingerprint"  # of the pretrained model that a run fine-tunes


def data_record(train_set: Dataset, test_set: Dataset, init_from: str = "") -> dict[str, Any]:
    """The data sets in data.json: class names, sizes and fingerprints; `init_from` is the pretrained model's."""
    record: dict[str, Any] = {"class_names": list(train_set.class_names)}
    for name, dataset in (("train", train_set), ("test", test_set)):
        record |= {
            name: len(dataset),
            f"{name}_fingerprint": dataset.fingerprint,
            f"{name}_in_memory": dataset.arrays is not None,
        }
    return record | ({INIT_FROM: init_from} if init_from else {})


def check_unchanged(recorded: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raises InputError, which names the run `where`, if data sets or pretrained model are not those `recorded`.

    Both arguments are from `data_record`. Data sets on the disk have other fingerprints than those in memory: between
    the two only the number of images and the class names are compared.
    """
    undo = "; put it back as it was, or train in another --workdir"
    if recorded.get(INIT_FROM) != now.get(INIT_FROM):
        raise InputError(f"{where} was fine-tuned from another model than config.init_from is now{undo}")
    classes = recorded.get("class_names", now["class_names"])
    if classes != now["class_names"]:
        raise InputError(f"{where}: its data set has changed: {_renamed(classes, now['class_names'])}{undo}")
    for name in ("train", "test"):
        old, new = (record.get(name, now[name]) for record in (recorded, now))
        what = f"{where}: its {'training' if name == 'train' else 'test'} split has changed: "
        if old != new:
            raise InputError(f"{what}it had {old:,} images, and has {new:,} now{undo}")
        key, place = f"{name}_fingerprint", f"{name}_in_memory"
        if recorded.get(place, now[place]) == now[place] and recorded.get(key, now[key]) != now[key]:
            raise InputError(f"{what}as many images as before, but their pixels, labels or order differ{undo}")


def _renamed(old: Sequence[str], new: Sequence[str]) -> str:
    if len(old) != len(new):
        return f"it had {len(old):,} classes, and has {len(new):,} now"
    label = next(i for i, (before, after) in enumerate(zip(old, new)) if before != after)
    return f"class {label} was {old[label]!r}, and is {new[label]!r} now"
