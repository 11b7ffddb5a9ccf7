"""Object stores, gs:// and s3://: files through fsspec (gcsfs, s3fs), arrays through drivers of TensorStore."""

import importlib.util
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_jax.errors import InputError

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> its file system of fsspec
TIMEOUT = 15.0  # seconds in which a store must answer at the start; later its clients retry for minutes


def is_url(where: str | Path) -> bool:
    """Whether a run folder is given as a URL."""
    return re.match(r"[a-z][a-z0-9+.-]*://", str(where)) is not None


def checked_url(url: str, given: str) -> str:
    """The URL without a / at its end; raises InputError if it has no known scheme, bucket and path, or no package."""
    scheme, _, path = url.partition("://")
    path = path.strip("/")
    if scheme not in PACKAGES:
        raise InputError(f"{given} is not supported; a run folder is a path, gs://BUCKET/RUN or s3://BUCKET/RUN")
    if not re.fullmatch(r"[^/\s]+(/[^/\s]+)+", path):
        raise InputError(f"{given} is no run folder; it must be {scheme}://BUCKET/RUN")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        package = PACKAGES[scheme]
        raise InputError(f"{given} needs {package}: pip install {package}")
    return f"{scheme}://{path}"


def file_system(url: str) -> Any:
    """fsspec's file system of a URL; as epath's it keeps no listings in memory, which TensorStore would outdate."""
    os.environ.setdefault("EPATH_USE_TF", "false")  # else epath takes TensorFlow's, if that is installed
    import fsspec

    scheme = url.partition("://")[0]
    logging.getLogger(PACKAGES[scheme]).setLevel(logging.CRITICAL)  # it logs each retry; the error is raised
    name = {"gs": "gcs"}.get(scheme, scheme)
    fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem(name)


def objects(url: str) -> list[str]:
    """The names of all objects below a URL."""
    bucket_path = url.partition("://")[2]
    return [name.removeprefix(f"{bucket_path}/") for name in file_system(url).find(bucket_path)]


def kvstore(url: str) -> dict[str, Any]:
    """TensorStore's specification of the key-value store below a URL (s3:/ for s3:// is understood, too).

    TensorStore itself reads TENSORSTORE_GCS_HTTP_URL, but not AWS_ENDPOINT_URL.
    """
    scheme, _, path = url.partition(":/")
    bucket, _, key = path.lstrip("/").partition("/")
    spec: dict[str, Any] = {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": key}
    if scheme != "s3":
        return spec
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint} | ({"aws_region": region} if region else {})
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else it prints which other credentials it did not find, for each array
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def probe(url: str) -> None:
    """Writes an object by fsspec and by TensorStore, which have settings of their own, and deletes it."""
    import tensorstore

    files, name = file_system(url), f".probe.{secrets.token_hex(4)}"
    files.pipe_file(f"{url}/{name}", b"fsspec")
    try:
        tensorstore.KvStore.open(kvstore(f"{url}/")).result().write(name, b"TensorStore").result()
    finally:
        files.rm_file(f"{url}/{name}")


def attempt(problem: str, action: Callable[[], Any], timeout: float | None = TIMEOUT) -> Any:
    """The result of `action()`; raises InputError, which begins with `problem`, if it fails or takes too long."""
    results: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            results.append((action(), None))
        except Exception as error:
            results.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if not results:
        raise InputError(
            f"{problem}: no answer within {timeout:.0f} s; check the network, the endpoint and the credentials"
        )
    value, error = results[0]
    if error is not None:
        raise InputError(f"{problem}: {reason(error)}; check the bucket, the credentials and the endpoint") from error
    return value


def reason(error: Exception) -> str:
    """The first line of an error, without the details that TensorStore adds in [...]."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.partition(" [")[0][:200].rstrip(".")
