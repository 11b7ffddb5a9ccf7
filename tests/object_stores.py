"""Servers of the protocols of S3 and Google Cloud Storage on the loopback, and the settings of their clients.

Packages of requirements-dev.txt; the servers keep their objects in the memory of the test process.
"""

import socket
import threading
from importlib.util import find_spec

PACKAGES = {"s3": ("s3fs", "moto", "flask"), "gs": ("gcsfs", "gcp_storage_emulator")}
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
        import fsspec

        fsspec.filesystem("s3").mkdir(BUCKET)

    def close(self):
        self._server.shutdown()


class GCS:
    """gcp-storage-emulator, with one bucket; `read_only` as of S3."""

    def __init__(self):
        import logging

        from gcp_storage_emulator import server

        class Handler(server.RequestHandler):
            def do_POST(request):  # noqa: N805
                if self.read_only:
                    request.send_error(403, "Access Denied")
                else:
                    super().do_POST()

        port, self.read_only = free_port(), False
        server.RequestHandler = Handler
        for name in ("gcp_storage_emulator", "api", "api.object"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._server = server.create_server("localhost", port, in_memory=True, default_bucket=BUCKET)
        self._server.start()
        self.environment = {
            "STORAGE_EMULATOR_HOST": f"http://localhost:{port}",
            "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        nowhere = f"http://localhost:{free_port()}"
        self.unreachable = {"STORAGE_EMULATOR_HOST": nowhere, "TENSORSTORE_GCS_HTTP_URL": nowhere}

    def make_bucket(self):
        pass

    def close(self):
        self._server.stop()


SERVERS = {"s3": S3, "gs": GCS}
