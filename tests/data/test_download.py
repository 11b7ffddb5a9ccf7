import gzip
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from ldm_jax.data.download import ATTEMPTS, content_sha256, download
from ldm_jax.errors import InputError

CONTENT = np.random.default_rng(0).bytes(100_000)
ZIPPED = gzip.compress(CONTENT)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Site(ThreadingHTTPServer):
    """A web site on this machine, with one file and some faults; remembers what was asked of it."""

    def __init__(self, body=ZIPPED, *, cut_at=None, ranges=True, status=200, length=True):
        self.body, self.cut_at, self.ranges, self.status, self.length = body, cut_at, ranges, status, length
        self.asked = []  # the Range header of each request
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}/file.gz"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        wanted = self.headers["Range"]
        site.asked.append(wanted)
        if site.status != 200:
            return self.send_error(site.status)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and site.ranges else 0
        if start >= len(site.body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if site.length:
            self.send_header("Content-Length", str(len(site.body) - start))
        self.end_headers()
        self.wfile.write(site.body[start : start + site.cut_at] if site.cut_at else site.body[start:])
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "file.gz"


def fetch(site, path, sha256=SHA256):
    return download(site.url, path, sha256=sha256, pause_s=0)


def folder_of(path):
    return sorted(child.name for child in path.parent.iterdir())


def test_download(path):
    with Site() as site:
        assert fetch(site, path) == path
    assert path.read_bytes() == ZIPPED
    assert folder_of(path) == ["file.gz"]
    assert site.asked == [None]


def test_without_a_stated_length(path):
    with Site(length=False) as site:
        fetch(site, path)
    assert path.read_bytes() == ZIPPED


def test_file_url(path, tmp_path):
    source = tmp_path / "source.gz"
    source.write_bytes(ZIPPED)
    download(source.as_uri(), path, sha256=SHA256)
    assert path.read_bytes() == ZIPPED


def test_checksum_is_of_the_content_however_zipped(path, tmp_path):
    with Site(gzip.compress(CONTENT, compresslevel=1)) as site:
        fetch(site, path)
    assert content_sha256(path) == SHA256
    plain = tmp_path / "plain.bin"
    plain.write_bytes(CONTENT)
    assert content_sha256(plain) == SHA256


def test_cut_off_connection_is_taken_up_where_it_ended(path):
    third = len(ZIPPED) // 3 + 1
    with Site(cut_at=third) as site:
        fetch(site, path)
    assert path.read_bytes() == ZIPPED
    assert site.asked == [None, f"bytes={third}-", f"bytes={2 * third}-"]


def test_later_call_takes_up_what_a_killed_one_left(path):
    path.parent.mkdir()
    (path.parent / "part.file.gz").write_bytes(ZIPPED[:70])
    with Site() as site:
        fetch(site, path)
    assert path.read_bytes() == ZIPPED
    assert site.asked == ["bytes=70-"]


def test_server_without_ranges_starts_over(path):
    path.parent.mkdir()
    (path.parent / "part.file.gz").write_bytes(ZIPPED[:70])
    with Site(ranges=False) as site:
        fetch(site, path)
    assert path.read_bytes() == ZIPPED
    assert len(site.asked) == 1


@pytest.mark.parametrize("left", [b"something else", ZIPPED + b"too much", ZIPPED])
def test_left_over_that_is_no_beginning_is_thrown_away(path, left):
    path.parent.mkdir()
    (path.parent / "part.file.gz").write_bytes(left)
    with Site() as site:
        fetch(site, path)
    assert path.read_bytes() == ZIPPED
    assert len(site.asked) == 2


def test_always_cut_off(path):
    with (
        Site(cut_at=100) as site,
        pytest.raises(InputError, match=r"cannot download http.*ended after 400 of \d+") as e,
    ):
        fetch(site, path)
    assert "\n" not in str(e.value)
    assert len(site.asked) == ATTEMPTS
    assert folder_of(path) == ["part.file.gz"]  # to be taken up later


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (gzip.compress(CONTENT[:-1]), f"what came has sha256 [0-9a-f]{{64}}, not {SHA256}"),
        (b"<html>Please log in</html>", "what came is damaged: .*not an intact gzip file"),
        (ZIPPED[:-9], "what came is damaged: .*truncated"),
    ],
)
def test_wrong_content_never_gets_the_name(path, body, message):
    with Site(body) as site, pytest.raises(InputError, match=message) as error:
        fetch(site, path)
    assert "\n" not in str(error.value)
    assert folder_of(path) == []
    assert len(site.asked) == 1


def test_refusal_is_not_asked_twice(path):
    with Site(status=404) as site, pytest.raises(InputError, match="404 Not Found"):
        fetch(site, path)
    assert len(site.asked) == 1


def test_server_error_is(path):
    with Site(status=503) as site, pytest.raises(InputError, match="503 Service Unavailable"):
        fetch(site, path)
    assert len(site.asked) == ATTEMPTS


def test_nobody_there(path):
    with Site() as site:
        pass
    with pytest.raises(InputError, match=r"cannot download http://127.0.0.1:.*refused"):
        fetch(site, path)
