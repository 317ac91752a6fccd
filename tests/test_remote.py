"""What an address means, with which credentials and patience, before anything is asked."""

from __future__ import annotations

import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from obstore.exceptions import GenericError
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from tomocpt_stream.errors import SourceError
from tomocpt_stream.files import RemoteFile
from tomocpt_stream.remote import (
    PORTAL_BUCKET,
    NoRangesError,
    ReplacedError,
    connect,
    is_remote,
    parent,
)
from tomocpt_stream.spool import SpooledStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.buckets import S3, Way

PROTOTYPE = default_buffer_prototype()

VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
)


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without credentials."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def config(address: str, **options: Any) -> dict[str, Any]:
    return dict(connect(address, options)._store.store.config or {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/a.zarr", True),
        ("GS://bucket/a.mrc", True),
        ("https://host/a", True),
        ("ftp://host/a", True),
        ("file:///a/b.mrc", False),
        ("/a/b.mrc", False),
        ("a:b.mrc", False),
    ],
)
def test_an_address_has_a_scheme(text: str, expected: bool) -> None:
    assert is_remote(text) is expected


def test_the_folder_of_an_address() -> None:
    assert parent("s3://bucket/a/b%20c.mrc") == ("s3://bucket/a", "b c.mrc")
    assert parent("s3://bucket/a/b/") == ("s3://bucket/a", "b")


def test_without_credentials_requests_are_not_signed() -> None:
    assert config("s3://bucket/a")["skip_signature"] == "true"
    assert config("s3://bucket/a", skip_signature=False)["skip_signature"] == "false"


def test_credentials_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "skip_signature" not in config("s3://bucket/a")
    # The portal's bucket gets nobody's keys.
    portal = config(f"s3://{PORTAL_BUCKET}/a")
    assert portal["skip_signature"] == "true"
    assert portal["region"] == "us-west-2"


def test_credentials_come_from_the_files_of_aws_configure(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nobody / ".aws").mkdir()
    (nobody / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"
        "[lab]\naws_access_key_id = c\naws_secret_access_key = d\n"
    )
    (nobody / ".aws" / "config").write_text("[profile lab]\nregion = eu-central-1\n")
    assert config("s3://bucket/a")["access_key_id"] == "a"
    monkeypatch.setenv("AWS_PROFILE", "lab")
    found = config("s3://bucket/a")
    assert (found["access_key_id"], found["secret_access_key"]) == ("c", "d")
    assert found["region"] == "eu-central-1"
    assert "skip_signature" not in found
    assert config("s3://bucket/a", key="e", secret="f")["access_key_id"] == "e"


def test_credentials_that_are_given_sign_requests() -> None:
    assert "skip_signature" not in config("s3://bucket/a", key="e", secret="f")
    assert "skip_signature" not in config("s3://bucket/a", aws_access_key_id="e", aws_secret_access_key="f")
    assert "skip_signature" not in config("az://box/a", account_name="me", sas_key="sv=1&sig=f")
    assert config("az://box/a", account_name="me")["skip_signature"] == "true"
    assert config("s3://bucket/a", key="e", secret="f", anon=True)["skip_signature"] == "true"


def test_given_keys_do_not_mix_with_those_of_a_profile(nobody: Path) -> None:
    (nobody / ".aws").mkdir()
    (nobody / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = a\naws_secret_access_key = b\naws_session_token = c\n"
    )
    (nobody / ".aws" / "config").write_text("[default]\nregion = eu-central-1\n")
    found = config("s3://bucket/a", key="e", secret="f")
    assert (found["access_key_id"], found["region"]) == ("e", "eu-central-1")
    assert "session_token" not in found


def test_the_region_of_the_environment_wins_but_not_for_the_portal(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nobody / ".aws").mkdir()
    (nobody / ".aws" / "config").write_text("[default]\nregion = eu-central-1\n")
    assert config("s3://bucket/a")["region"] == "eu-central-1"
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "us-east-2")
            assert config("s3://bucket/a").get("region", "us-east-2") == "us-east-2"
            assert config(f"s3://{PORTAL_BUCKET}/a")["region"] == "us-west-2"


def test_names_of_other_libraries_are_understood() -> None:
    found = config(
        "s3://bucket/a", anon=True, endpoint_url="http://127.0.0.1:1", region_name="here", timeout=5
    )
    assert found["skip_signature"] == "true"
    assert found["endpoint"] == "http://127.0.0.1:1"
    assert found["region"] == "here"


@pytest.mark.parametrize(
    ("address", "options"),
    [
        ("ftp://host/a.mrc", {}),
        ("s3:///a.mrc", {}),
        ("s3://bucket/a.zarr", {"colour": "red"}),
        ("s3://bucket/a.zarr", {"timeout": "soon"}),
        ("s3://bucket/a.zarr", {"max_retries": -1}),
        ("s3://bucket/a.zarr", {"retry_timeout": float("inf")}),
        ("https://host/a.mrc?X-Amz-Signature=1", {}),
    ],
)
def test_what_means_nothing_is_refused(address: str, options: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="expected") as caught:
        connect(address, options)
    assert address.partition("?")[0] in caught.value.found


@pytest.mark.parametrize(
    "address",
    ["https://me:hush@host/a.mrc", "https://hush@host/a.mrc", "s3://me:hush@bucket/a", "s3://b/a?sig=hush"],
)
def test_secrets_in_addresses_are_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(SourceError, match="storage_options") as caught:
        connect(address)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["a b", "a#1", "a?1", "a%20b", "a+b", "é"])
def test_names_are_written_as_in_a_browser(name: str, s3: S3, way: Way) -> None:
    s3.bucket.put(f"names/{name}/k", name.encode())
    s3.bucket.put("names/a/k", b"another")
    for root in ("s3://tomograms", f"{way.url}/tomograms"):
        store = connect(f"{root}/names/{quote(name)}", s3.options() if root.startswith("s3") else {})
        found = sync(store.get("k", PROTOTYPE))
        assert found is not None
        assert found.to_bytes() == name.encode()


class Plain(BaseHTTPRequestHandler):
    """A web server with one file, and habits of its own."""

    protocol_version = "HTTP/1.1"
    data, tag, ranges = bytes(range(200)), 'W/"1"', True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        start, stop = 0, len(self.data)
        asked = self.headers.get("Range") if self.ranges else None
        if "If-Match" in self.headers:  # a weak tag matches nothing (RFC 9110, section 13.1.1)
            self.send_response(412)
            stop = 0
        elif asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(stop, int(last) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(self.data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", self.tag)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(self.data[start:stop])


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of such a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/a"
        server.shutdown()
        thread.join()


def test_a_weak_tag_is_compared_here(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = connect(web)
    assert sync(store.part("k", 0, 50)) == (Plain.data[:50], 200, 'W/"1"')
    assert sync(store.part("k", 50, 300, 'W/"1"')) == (Plain.data[50:], 200, 'W/"1"')
    monkeypatch.setattr(Plain, "tag", 'W/"2"')
    with pytest.raises(ReplacedError, match="k was replaced"):
        sync(store.part("k", 50, 300, 'W/"1"'))


def test_a_server_that_gives_no_parts_gives_whole_chunks(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plain, "ranges", False)
    monkeypatch.setattr("tomocpt_stream.spool.PART", 64)
    store = SpooledStore(connect(web))
    for name in ("k", "l"):
        found = sync(store.get(name, PROTOTYPE))
        assert found is not None
        assert found.to_bytes() == Plain.data
    assert (store.traffic.requests, store.traffic.bytes) == (2, 400)
    with pytest.raises(NoRangesError, match=r"whole, or not at all.*copy the file"):
        RemoteFile(connect(web), "k")


def test_a_failing_store_is_not_asked_for_the_size_too(s3: S3, way: Way) -> None:
    way.fault = lambda *_: "503"
    store = connect(s3.address("a"), s3.options(max_retries=1))
    with pytest.raises(GenericError, match="503"):
        sync(store.part("k", 0, 10))
    assert [one.method for one in way.asked] == ["GET", "GET"]


def test_secrets_are_not_printed() -> None:
    store = connect("s3://bucket/a", {"key": "me", "secret": "hush"})
    assert str(store) == "s3://bucket/a"
    assert "hush" not in repr(store)
    there = pickle.loads(pickle.dumps(store))
    assert (there.address, there._store.store.config["secret_access_key"]) == ("s3://bucket/a", "hush")
