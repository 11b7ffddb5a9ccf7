"""Fetching a file whose content is known beforehand: resumed where it was cut off, checked, then put in place."""

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from ldm_jax.data.idx import gunzip
from ldm_jax.errors import InputError

ATTEMPTS = 4
TIMEOUT_S = 30
BLOCK = 1 << 18


def content_sha256(path: Path) -> str:
    """The SHA-256 of what a file holds; of a .gz file that is the unzipped content, which re-zipping leaves as it is.

    Raises:
        InputError: the file is unreadable or, if it is a .gz file, damaged.
    """
    return hashlib.sha256(gunzip(path) if path.suffix == ".gz" else path.read_bytes()).hexdigest()


def download(url: str, path: Path, *, sha256: str, pause_s: float = 2.0) -> Path:
    """Brings `url` to `path`; what is there under that name is complete and has the right content, always.

    The bytes go to a file part.NAME beside it, which a later call takes up where it ends (if the server knows
    ranges), and which gets its name once its content has been checked.

    Args:
        url: http://, https:// or file://.
        path: where it shall lie; its folder is made.
        sha256: of the content, see `content_sha256`.
        pause_s: the rest between two attempts.

    Raises:
        InputError: the address cannot be reached, or what lies there is something else.
    """
    part = path.with_name(f"part.{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(pause_s)
        resumed = part.exists()
        try:
            _append(url, part)
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink()  # as long as the file, or longer: not a beginning of it
            elif error.code < http.client.INTERNAL_SERVER_ERROR:
                break  # the server has understood, and says no
            continue
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", "") or error)
            continue
        reason = _wrong_content(part, sha256)
        if not reason:
            part.replace(path)
            return path
        part.unlink()
        if not resumed:
            break  # a copy made in one go is wrong too: the address has something else
    raise InputError(f"cannot download {url}: {reason}")


def _append(url: str, part: Path) -> None:
    """Adds to `part` what it lacks of `url`; raises OSError if the connection ends before the file does."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        if response.status != http.client.PARTIAL_CONTENT:  # the whole file comes again
            have = 0
        total = have + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        bar = tqdm(desc=part.name, total=total, initial=have, unit="B", unit_scale=True, leave=False, disable=None)
        with part.open("ab" if have else "wb") as file, bar:
            while block := response.read(BLOCK):
                have += file.write(block)
                bar.update(len(block))
    if total not in (None, have):
        raise OSError(f"the connection ended after {have} of {total} bytes")


def _wrong_content(path: Path, sha256: str) -> str:
    """What is wrong with the file at `path`, in words; empty if its content is the one expected."""
    try:
        found = content_sha256(path)
    except InputError as error:
        return f"what came is damaged: {error}"
    return "" if found == sha256 else f"what came has sha256 {found}, not {sha256}"
