"""What an address means, with which credentials and patience, before anything is asked."""

from __future__ import annotations

import json
import pickle
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote, unquote

import pytest
from obstore.exceptions import GenericError
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from tomocpt_stream.errors import SourceError
from tomocpt_stream.files import RemoteFile
from tomocpt_stream.remote import (
    _SIGNS,
    PORTAL_BUCKET,
    ForbiddenError,
    NoRangesError,
    ReplacedError,
    canonical,
    connect,
    is_remote,
    parent,
    shown,
)
from tomocpt_stream.spool import SpooledStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.buckets import S3, Way
    from tomocpt_stream.remote import RemoteStore

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
    *_SIGNS["aws"],
    *_SIGNS["azure"],
    *_SIGNS["google"],
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


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("s3://Box/TS 1.zarr", "s3://Box/TS%201.zarr"),
        ("s3://Box/TS%201.zarr/", "s3://Box/TS%201.zarr"),
        ("S3A://Box/%54S%201.zarr", "s3://Box/TS%201.zarr"),
        ("s3://box/a+b(c)%2Bé", "s3://box/a+b(c)+%C3%A9"),
        ("s3://box/a%2520%231%3Fb", "s3://box/a%2520%231%3Fb"),
        ("s3://box/100%.mrc", "s3://box/100%25.mrc"),
        ("s3://box/a%2Fb", "s3://box/a/b"),
        ("HTTPS://Host:8080/A", "https://host:8080/A"),
        ("gs://box", "gs://box"),
    ],
)
def test_an_object_has_one_address(text: str, one: str) -> None:
    assert canonical(text) == canonical(one) == connect(text).address == one


def test_the_names_of_azure_are_one_unless_they_name_an_account() -> None:
    assert canonical("ABFSS://box/a") == canonical("abfs://box/a") == "az://box/a"
    address = "abfss://box@mine.dfs.core.windows.net/a"
    assert canonical(address) == address
    assert connect(address, {"skip_signature": True}).address == address


def test_an_address_of_no_letters_is_refused() -> None:
    for path in ("\ud800", "%ff"):
        with pytest.raises(SourceError, match="s3://box/"):
            connect(f"s3://box/{path}")


@pytest.mark.parametrize("path", ["a/../b", "..", "a/%2e%2E/b", "a/..%2Fb", "./a", "a//b"])
def test_an_address_that_means_another_place_is_refused(path: str) -> None:
    for scheme in ("s3", "https"):
        with pytest.raises(SourceError, match=r"between two slashes.*write the address without"):
            connect(f"{scheme}://box/{path}")


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


@pytest.mark.parametrize("profile", ["default", "lab"])
@pytest.mark.parametrize(
    "way", ["sso_session = lab", "sso_start_url = https://there", "credential_process = /bin/true"]
)
def test_a_login_that_is_not_followed_is_said_where_it_matters(
    profile: str, way: str, s3: S3, nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.bucket.put("private/k", b"x", private=True)
    (nobody / ".aws").mkdir()
    section = "default" if profile == "default" else f"profile {profile}"
    (nobody / ".aws" / "config").write_text(f"[{section}]\n{way}\nregion = us-west-2\n")
    monkeypatch.setenv("AWS_PROFILE", profile)
    address = s3.address("private")
    store = pickle.loads(pickle.dumps(connect(address, s3.options())))
    said = (
        rf"{profile}' signs in by {way.split()[0]}, .*aws configure export-credentials --profile {profile} "
    )
    with pytest.raises(ForbiddenError, match=said):
        sync(store.get("k", PROTOTYPE))
    # Not where it would help nobody: unsigned on purpose, or signed in another way.
    for more in ({"anon": True}, {"key": "a", "secret": "b"}):
        assert not connect(address, s3.options(**more)).hint
    assert not connect(f"s3://{PORTAL_BUCKET}/a").hint
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    assert not connect(address, s3.options()).hint


def test_keys_beside_a_login_are_taken(nobody: Path) -> None:
    (nobody / ".aws").mkdir()
    (nobody / ".aws" / "config").write_text("[default]\nsso_session = lab\n")
    (nobody / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"
    )
    assert config("s3://bucket/a")["access_key_id"] == "a"
    assert not connect("s3://bucket/a").hint


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
        ("s3://bucket/a.zarr", {"token": "from a file\n"}),
        ("s3://bucket/a.zarr", {"key": "me", "secret": "hush☃"}),
        ("s3://bucket/a.zarr", {"max_retries": -1}),
        ("s3://bucket/a.zarr", {"retry_timeout": float("inf")}),
        ("https://host/a.mrc?X-Amz-Signature=1", {}),
        ("https://[::1/a.mrc", {}),
    ],
)
def test_what_means_nothing_is_refused(address: str, options: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="expected") as caught:
        connect(address, options)
    assert address.partition("?")[0] in caught.value.found
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "https://me:hush@host/a.mrc",
        "https://hush@host/a.mrc",
        "s3://me:hush@bucket/a",
        "s3://b/a?sig=hush",
        "https://host?sig=hush",
        "s3://me:hu/hush+/@bucket/a",
        "s3://b/a#hush",
        "https://me:hu/hush@host/a",
        "https://host?hush@there",
    ],
)
def test_secrets_in_addresses_are_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(SourceError, match="storage_options") as caught:
        connect(address)
    assert "hush" not in str(caught.value)
    assert "hush" not in shown(address)
    assert shown(address) in caught.value.found


@pytest.mark.parametrize(
    "text",
    [
        "/a/me:x@b.mrc",
        "s3://b/c@d:e.mrc",
        "https://host:80/a@b",
        "https://[::1]:80/a",
        "abfss://box@mine.host/a",
        "a?b#c.mrc",
    ],
)
def test_what_has_no_secrets_is_shown_as_it_is(text: str) -> None:
    assert shown(text) == text


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


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on loopback; the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def web() -> Iterator[str]:
    """The address of such a server."""
    with serving(Plain) as address:
        yield f"{address}/a"


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


class Cloud(BaseHTTPRequestHandler):
    """A store with one object, that of the asked path; it notes what requests were signed with."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[tuple[str, str]]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.asked.append((path, self.headers.get("Authorization", query)))
        data = unquote(path).encode()
        self.send_response(200)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of such a store, of which nothing was asked yet."""
    monkeypatch.setattr(Cloud, "asked", [])
    with serving(Cloud) as address:
        yield address


def get(store: RemoteStore) -> bytes:
    found = sync(store.get("k", PROTOTYPE))
    assert found is not None
    return bytes(found.to_bytes())


@pytest.mark.parametrize(
    ("options", "environment", "signed"),
    [
        ({}, {}, "$"),
        ({"account_key": "aHVzaA=="}, {}, "SharedKey me:"),
        ({"sas_key": "sv=1&sig=f"}, {}, "sv=1&sig=f$"),
        ({}, {"AZURE_STORAGE_ACCOUNT_KEY": "aHVzaA=="}, "SharedKey me:"),
        ({}, {"AZURE_STORAGE_ACCESS_KEY": "aHVzaA=="}, "SharedKey me:"),
        ({}, {"AZURE_STORAGE_MASTER_KEY": "aHVzaA=="}, "SharedKey me:"),
        ({}, {"AZURE_STORAGE_SAS_KEY": "sv=1&sig=f"}, "sv=1&sig=f$"),
        ({}, {"AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=f"}, "sv=1&sig=f$"),
        ({}, {"AZURE_STORAGE_TOKEN": "hush"}, "Bearer hush$"),
        ({"skip_signature": True}, {"AZURE_STORAGE_TOKEN": "hush"}, "$"),
    ],
)
def test_objects_of_azure_are_read(
    options: dict[str, Any],
    environment: dict[str, str],
    signed: str,
    cloud: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = connect("az://box/a b", {"account_name": "me", "endpoint_url": cloud, **options})
    assert get(store) == b"/box/a b/k"
    ((_, found),) = Cloud.asked
    assert re.match(signed, found)


def test_objects_of_google_are_read(cloud: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert get(connect("gs://box/a b", {"endpoint": cloud})) == b"/box/a b/k"
    # An account of an emulator, which wants no signature and lies elsewhere.
    account = {
        "type": "service_account",
        "gcs_base_url": cloud,
        "disable_oauth": True,
        "client_email": "me@there",
        "private_key": "",
        "private_key_id": "",
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    store = connect("gs://box/a", {"service_account": str(tmp_path / "account.json"), "endpoint": cloud})
    assert "skip_signature" not in store._store.store.config
    assert get(store) == b"/box/a/k"
    for name in _SIGNS["google"]:
        with monkeypatch.context() as patched:
            value = json.dumps(account) if name.endswith("_KEY") else str(tmp_path / "account.json")
            patched.setenv(name, value)
            if name != "GOOGLE_APPLICATION_CREDENTIALS":  # which must be a file of another kind
                assert "skip_signature" not in config("gs://box/a")


def test_secrets_are_not_printed() -> None:
    store = connect("s3://bucket/a", {"key": "me", "secret": "hush"})
    assert str(store) == "s3://bucket/a"
    assert "hush" not in repr(store)
    there = pickle.loads(pickle.dumps(store))
    assert (there.address, there._store.store.config["secret_access_key"]) == ("s3://bucket/a", "hush")
