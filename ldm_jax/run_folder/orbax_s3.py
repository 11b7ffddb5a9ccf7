"""Checkpoints on S3: Orbax writes to gs:// by the driver of TensorStore for GCS; s3:// it does not know (orbax#2739).

Its functions that make that distinction are extended, until it has one of its own. Like GCS, S3 has no atomic renames:
a finished checkpoint is marked by an object that is written last.
"""

from functools import cache

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from ldm_jax.runtime.object_store import kvstore


@cache
def support_s3() -> None:
    """Makes Orbax treat s3:// as it treats gs://, with TensorStore's driver for S3."""
    for_gcs = gcs_utils.get_kvstore_for_gcs
    gcs_utils._GCS_PATH_PREFIX = ("gs://", "s3://")
    tensorstore_utils._use_gcs_driver = lambda folder: folder.startswith(("gs://", "s3:/"))  # s3:/ once normalized
    gcs_utils.get_kvstore_for_gcs = lambda path: kvstore(path) if path.startswith("s3:/") else for_gcs(path)
