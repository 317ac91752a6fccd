"""What an address means, with which credentials and patience, before anything is asked."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest

from tomocpt_stream.errors import SourceError
from tomocpt_stream.remote import PORTAL_BUCKET, connect, is_remote, parent

if TYPE_CHECKING:
    from pathlib import Path

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
        ("https://host/a.mrc?X-Amz-Signature=1", {}),
    ],
)
def test_what_means_nothing_is_refused(address: str, options: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="expected") as caught:
        connect(address, options)
    assert address.partition("?")[0] in caught.value.found


def test_secrets_are_not_printed() -> None:
    store = connect("s3://bucket/a", {"key": "me", "secret": "hush"})
    assert str(store) == "s3://bucket/a"
    assert "hush" not in repr(store)
    there = pickle.loads(pickle.dumps(store))
    assert (there.address, there._store.store.config["secret_access_key"]) == ("s3://bucket/a", "hush")
