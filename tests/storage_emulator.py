"""Google Cloud Storage on this machine, for tests: a real server on the loopback address, found by real clients."""

import contextlib
import dataclasses
import functools
import http
import importlib.util
import json
import logging
import os
import pathlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

BUCKET = "bucket"


@dataclasses.dataclass(frozen=True)
class Storage:
    """Looks into the one bucket, and writes to it, by plain HTTP: another way than the code under test."""

    url: str
    requests: list[str] = dataclasses.field(default_factory=list)

    def put(self, name: str, data: bytes) -> None:
        """Stores an object."""
        self._ask(f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={_quoted(name)}", data)

    def put_folder(self, name: str, folder: pathlib.Path) -> None:
        """Stores every file of a folder."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{name}/{file.relative_to(folder)}", file.read_bytes())

    def get(self, name: str) -> bytes:
        """What an object holds."""
        return self._ask(f"/storage/v1/b/{BUCKET}/o/{_quoted(name)}?alt=media")

    def names(self, prefix: str) -> dict[str, str]:
        """Objects below `prefix`, and the number that changes with each write of them."""
        found = json.loads(self._ask(f"/storage/v1/b/{BUCKET}/o?prefix={_quoted(prefix)}%2F"))
        return {item["name"].removeprefix(f"{prefix}/"): item["generation"] for item in found.get("items", [])}

    def reads(self, name: str) -> int:
        """How often an object's bytes were asked for."""
        return sum(f"/o/{_quoted(name)}?alt=media" in line for line in self.requests)

    def _ask(self, path: str, data: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/octet-stream"})
        with urllib.request.urlopen(request) as answer:
            return bytes(answer.read())


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


@functools.cache
def storage() -> Storage:
    """The server, started at the first call; skips the test where its package is missing."""
    for package, distribution in (("gcsfs", "gcsfs"), ("gcp_storage_emulator", "gcp-storage-emulator")):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{distribution} is not installed: pip install {distribution}")
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import create_server

    objects.download = _with_generation(objects.download)
    objects._multipart_upload = _with_precondition(objects._multipart_upload)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server._api.daemon = True
    server.start()
    found = Storage(f"http://127.0.0.1:{port}")
    os.environ.update(
        STORAGE_EMULATOR_HOST=found.url,  # for Google's Python libraries
        TENSORSTORE_GCS_HTTP_URL=found.url,
        GOOGLE_CLOUD_PROJECT="test",
        GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",  # asks for the kind of bucket at an address of its own
    )
    log = logging.getLogger("gcp_storage_emulator")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(_Requests(found.requests))
    return found


def _with_generation(download: Callable[..., None]) -> Callable[..., None]:
    """Adds the header that Google's server sends with an object's bytes and TensorStore needs to write it again."""

    def with_generation(request: Any, response: Any, files: Any, *others: Any, **more: Any) -> None:
        download(request, response, files, *others, **more)
        if response.status.value < 300:
            found = files.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    return with_generation


def _with_precondition(upload: Callable[..., None]) -> Callable[..., None]:
    """Refuses, as Google's server does, to write over an object where a request wants a new one."""
    from gcp_storage_emulator.exceptions import NotFound

    def with_precondition(request: Any, response: Any, files: Any) -> None:
        if request.query.get("ifGenerationMatch") == ["0"]:
            with contextlib.suppress(NotFound):
                files.get_file_obj(request.params["bucket_name"], request.data["meta"]["name"])
                response.status = http.HTTPStatus.PRECONDITION_FAILED
                return
        upload(request, response, files)

    return with_precondition


class _Requests(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())
