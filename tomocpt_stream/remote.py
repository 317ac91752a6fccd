"""Addresses of object stores and web servers: which store they mean, and how it is asked.

Stores are those of obstore (https://developmentseed.org/obstore), which repeats a request by itself:
after a time-out, a dropped connection, a 5xx or a "slow down", with growing random pauses.
"""

from __future__ import annotations

import atexit
import configparser
import os
import re
import sys
import time
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

import obstore
from obstore.exceptions import (
    BaseError,
    GenericError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url
from zarr.storage import ObjectStore, WrapperStore

from tomocpt_stream.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping
    from typing import TypeVar

    from obstore import GetOptions
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    Result = TypeVar("Result")

PORTAL_BUCKET = "cryoet-data-portal-public"
"""The bucket of the CZ CryoET Data Portal, which anybody may read."""

PORTAL_REGION = "us-west-2"

SCHEMES = {
    "s3": "aws",
    "s3a": "aws",
    "gs": "google",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "https": "web",
    "http": "web",
}

_SAME = {"s3a": "s3", "abfs": "az", "abfss": "az"}

# Seconds that one request may be repeated for, and how often; then it is an error that names the object.
RETRY_TIMEOUT, MAX_RETRIES = 180.0, 10
CONNECT_TIMEOUT, TIMEOUT = 10.0, 120.0

# Other words for options: those of fsspec and boto3.
_ALIASES = {
    "anon": "skip_signature",
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "endpoint_url": "endpoint",
    "region_name": "region",
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}
_ARCHIVED = "InvalidObjectState"
_UNSATISFIED = "416 Range Not Satisfiable"
_TIMES = ("retry_timeout", "max_retries", "connect_timeout", "timeout")
# Whichever of these is set, the environment has something to sign requests with. obstore reads them.
_SIGNS = {
    "aws": (
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ),
    "google": (
        "GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_SERVICE_ACCOUNT_PATH",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ),
    "azure": (
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_MASTER_KEY",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_STORAGE_TOKEN",
        "AZURE_STORAGE_CLIENT_ID",
        "AZURE_CLIENT_ID",
        "AZURE_FEDERATED_TOKEN_FILE",
        "AZURE_IDENTITY_ENDPOINT",
        "AZURE_MSI_ENDPOINT",
        "IDENTITY_ENDPOINT",
        "AZURE_USE_AZURE_CLI",
        "AZURE_STORAGE_USE_EMULATOR",
    ),
}
# Ways to sign in that a profile of the AWS command line may name and that only that program follows.
_LOGINS = ("sso_session", "sso_start_url", "credential_process", "role_arn", "login_session")
# What need not be written as %XX in the path of an address (RFC 3986, section 3.3).
_PLAIN = "/!$&'()*+,;=:@~"
# So are options called that have something to sign requests with.
_CREDENTIAL = re.compile("key|secret|token|credential|service_account|client_id|azure_cli|emulator")
# How a user and a password begin, but no host and port; a password may have slashes, as those of AWS do.
_PASSWORD = re.compile(r"[^/?#@]*:(?!\d*([/?#]|$))")
# Options that become parts of requests as they are, and what no request may have.
_HEADERS = ("access_key_id", "secret_access_key", "session_token", "region", "endpoint")
_CROOKED = re.compile(r"[^\x21-\x7e]")
_GOOGLE_LOGIN = Path(".config", "gcloud", "application_default_credentials.json")


class ForbiddenError(SourceError):
    """A store that refuses an object, or does not want to say that it has none."""

    final = True


class NoRangesError(SourceError):
    """A web server that sends whole objects only."""

    final = True


class ReplacedError(OSError):
    """An object that is another one than when its first bytes were read."""


class RemoteStore(WrapperStore[ObjectStore[Any]]):
    """An object store whose refusals say what to do; `hint` is a remedy that they begin with.

    Pickled, its credentials go along, to other processes and never onto a disk.
    """

    def __init__(self, store: ObjectStore[Any], address: str, hint: str = "") -> None:
        super().__init__(store)
        self.address = address
        self.hint = hint

    def __str__(self) -> str:
        return self.address

    def _with_store(self, store: Any) -> RemoteStore:
        return RemoteStore(store, self.address, self.hint)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of an object, None where there is none; a refusal is a ForbiddenError."""
        return await self._asked(key, self._store.get(key, prototype, byte_range))

    async def part(
        self, key: str, start: int, stop: int, etag: str | None = None
    ) -> tuple[bytes, int, str | None] | None:
        """Return bytes `start` to `stop` of an object, its size and its tag; None where there is none.

        With `etag` an object that was replaced since is a ReplacedError.
        """
        options: GetOptions = {"range": (start, stop)}
        if etag is not None and not etag.startswith("W/"):  # no object matches a weak tag
            options["if_match"] = etag
        found = await self._part(key, options)
        if found is None:
            return None
        data, size, there = found
        if etag is not None and there != etag:
            raise ReplacedError(f"{key} was replaced while it was read")
        if len(data) != max(0, min(stop, size) - start):
            raise OSError(f"{len(data)} bytes where {min(stop, size) - start} were to come")
        return found

    async def end(self, key: str, count: int) -> tuple[bytes, int, str | None] | None:
        """Return the last bytes of an object, its size and its tag; None where there is none.

        NoRangesError where the store answers no such requests: then `getsize` and `part` may.
        """
        found = await self._part(key, {"range": {"suffix": count}})
        if found is not None and len(found[0]) != min(count, found[1]):
            raise OSError(f"{len(found[0])} bytes where {min(count, found[1])} were to come")
        return found

    async def _part(self, key: str, options: GetOptions) -> tuple[bytes, int, str | None] | None:
        try:
            found = await self._asked(key, obstore.get_async(self._store.store, key, options=options))
            data = (await self._asked(key, found.bytes_async())).to_bytes()
        except FileNotFoundError:
            return None
        except PreconditionError as error:
            raise ReplacedError(f"{key} was replaced while it was read") from error
        except NotSupportedError as error:
            raise NoRangesError(
                f"the server of {self.address} sends {key!r} whole, or not at all",
                expected="one that answers requests for ranges of bytes",
                remedy="check the address, or copy the file to a disk",
            ) from error
        except GenericError as error:
            # A range of an empty object cannot be satisfied.
            if _UNSATISFIED in str(error) and await self._asked(key, self._store.getsize(key)) == 0:
                return b"", 0, None
            raise
        return data, int(found.meta["size"]), found.meta["e_tag"]

    async def exists(self, key: str) -> bool:
        """Return whether an object is there."""
        return await self._asked(key, self._store.exists(key))

    async def getsize(self, key: str) -> int:
        """Return the bytes of an object."""
        return await self._asked(key, self._store.getsize(key))

    async def set(self, key: str, value: Buffer) -> None:
        """Store an object."""
        await self._asked(key, self._store.set(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Store an object unless it is there."""
        await self._asked(key, self._store.set_if_not_exists(key, value))

    async def _asked(self, key: str, request: Awaitable[Result]) -> Result:
        try:
            return await request
        except (PermissionDeniedError, UnauthenticatedError) as error:
            if _ARCHIVED in str(error):  # also a 403, of an object that is there
                raise SourceError(
                    f"{self.address} has archived its object {key!r} ({_ARCHIVED})",
                    expected="an object that can be read at once",
                    remedy="restore it, with all others of this tomogram, and run again",
                ) from error
            raise self.forbidden(key) from error

    def forbidden(self, key: str) -> ForbiddenError:
        """Return the error for an object that the store refuses."""
        return ForbiddenError(
            f"{self.address} refuses its object {key!r} (403 or 401)",
            expected="an object that may be read with the credentials at hand; a store that may not be "
            "listed also answers so where there is no such object",
            remedy=f"{self.hint}check the address; then set the credentials in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or those of the other clouds) or in storage_options, "
            "skip_signature=True for a public bucket, skip_signature=False for the role of the machine",
        )


def is_remote(text: str) -> bool:
    """Return whether a text is an address with a scheme, other than file://."""
    scheme, found, _ = text.lstrip().partition("://")
    return bool(found) and scheme.lower() != "file"


def shown(text: str) -> str:
    """Return a path or an address for a message, without what may be secret in it."""
    if not is_remote(text):
        return text
    scheme, _, rest = text.partition("://")
    web = SCHEMES.get(scheme.strip().lower()) == "web"
    if _PASSWORD.match(rest) or (web and "@" in re.split("[/?#]", rest)[0]):
        rest = rest.rpartition("@")[2]
    return f"{scheme}://{re.split('[?#]', rest)[0]}"


def canonical(address: str) -> str:
    """Return the one way to write an address: `TS%201.zarr` and `TS 1.zarr` are one object.

    Raises
    ------
    SourceError
        An unknown scheme, no bucket or host, a password or a query, or .. in the path.
    """
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise SourceError(
            f"the address {shown(address)} ({error})",
            expected="a host or a bucket after the ://",
            remedy="check its spelling",
        ) from None
    scheme = parts.scheme.lower()
    if "@" not in parts.netloc:  # which abfs and abfss have where they name an account
        scheme = _SAME.get(scheme, scheme)
    if scheme not in SCHEMES or not parts.netloc:
        raise SourceError(
            f"the address {shown(address)}",
            expected=f"a path, or an address that starts with {', '.join(f'{name}://' for name in SCHEMES)}",
            remedy="check its spelling",
        )
    _refuse_secrets(address)
    try:
        path = quote(unquote(parts.path, errors="surrogateescape"), _PLAIN, errors="surrogateescape").rstrip(
            "/"
        )
    except UnicodeError as error:
        raise SourceError(
            f"the address {address!r} ({error})", expected="letters", remedy="check its spelling"
        ) from error
    if not {"", ".", ".."}.isdisjoint(path.split("/")[1:]):
        raise SourceError(
            f"the address {address} has nothing, a . or a .. between two slashes",
            expected="the place itself: some stores take these for names, others for another folder",
            remedy="write the address without them",
        )
    place = parts.netloc.lower() if SCHEMES[scheme] == "web" else parts.netloc
    return f"{scheme}://{place}{path}"


def provider(address: str) -> str:
    """Return whose options an address takes: "aws", "google", "azure", "web", or "portal" for its bucket."""
    parts = urlsplit(address)
    return "portal" if parts.netloc == PORTAL_BUCKET else SCHEMES.get(parts.scheme.lower(), "")


def without_credentials(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options that mean the same for every store: times, retries, room for what is fetched."""
    return {name: value for name, value in options.items() if name in (*_TIMES, "cache_bytes")}


def connect(address: str, options: Mapping[str, Any] | None = None, *, read_only: bool = True) -> RemoteStore:
    """Return the store whose root is at an address (s3://, gs://, az://, https://); nothing is asked yet.

    It may be passed wherever a store is written or read, and takes its options along.

    `options` are those of obstore's stores (`region`, `endpoint`, `access_key_id`,
    `secret_access_key`, `session_token`, `skip_signature` and the like), their names in fsspec
    (`anon`, `key`, `secret`, `token`, `endpoint_url`), and `timeout`, `connect_timeout`,
    `retry_timeout` (s) and `max_retries`. What they leave open comes from the environment
    (AWS_REGION, AWS_ENDPOINT_URL, AWS_PROFILE and so on). Without any credentials requests are not
    signed, as those to the portal's bucket never are.

    Raises
    ------
    SourceError
        An unknown option, or an address that `canonical` refuses.
    """
    root = canonical(address)
    parts = urlsplit(root)
    cloud = SCHEMES[parts.scheme]
    given = {_ALIASES.get(name, name): value for name, value in (options or {}).items()}
    given.pop("cache_bytes", None)  # of those who read tomograms
    if cloud == "google" and "endpoint" in given:
        given["base_url"] = given.pop("endpoint")
    if crooked := [name for name, value in given.items() if _CROOKED.search(str(value)) and name in _HEADERS]:
        raise SourceError(
            f"the option {crooked[0]} for {root} has an end of a line, or another character of no key",
            expected="the text alone",
            remedy="take off what surrounds it, such as the end of the line of a file that it was read from",
        )
    try:
        times = {name: float(given.pop(name)) for name in _TIMES if name in given}
        config = {**_defaults(cloud, parts.netloc, given), **given}
        make: Any = from_url  # which options there are depends on the scheme
        store = make(
            root,
            **({} if cloud == "web" else {"config": config}),
            client_options=_client(config, times, plain=parts.scheme == "http"),
            retry_config={
                "max_retries": int(times.get("max_retries", MAX_RETRIES)),
                "retry_timeout": timedelta(seconds=times.get("retry_timeout", RETRY_TIMEOUT)),
                "backoff": {
                    "init_backoff": timedelta(seconds=0.2),
                    "max_backoff": timedelta(seconds=15),
                    "base": 2,
                },
            },
        )
    except (BaseError, TypeError, ValueError, OverflowError) as error:
        raise SourceError(
            f"there is no way to {address} with these options ({first_line(error)})",
            expected="options of obstore's stores, such as region, endpoint, access_key_id, skip_signature",
            remedy="check the address and storage_options",
        ) from error
    _pause_at_exit()
    unsigned = config.get("skip_signature") is True and "skip_signature" not in given
    hint = _unread_login() if cloud == "aws" and unsigned and parts.netloc != PORTAL_BUCKET else ""
    return RemoteStore(ObjectStore(store, read_only=read_only), root, hint)


@cache
def _pause_at_exit() -> None:
    # A thread of obstore that lets go of its last answer while Python ends aborts the process, which is
    # then taken for one that failed.
    atexit.register(time.sleep, 0.1)


def parent(address: str) -> tuple[str, str]:
    """Return the address of the folder that an object lies in, and its name there."""
    folder, _, name = address.rstrip("/").rpartition("/")
    return folder, unquote(name)


def first_line(error: Exception) -> str:
    """Return what an error says, without the pages that obstore adds."""
    return str(error).strip().partition("\n")[0][:300]


def _refuse_secrets(address: str) -> None:
    """Refuse what would be a part of the address in messages and receipts; do not repeat it."""
    if shown(address) != re.split("[?#]", address)[0]:
        raise SourceError(
            f"the address {shown(address)} has a user or a password before its host",
            expected="a plain address",
            remedy="leave them out; pass credentials in storage_options",
        )
    if shown(address) != address:
        raise SourceError(
            f"the address {shown(address)} has a query or a fragment",
            expected="a plain address, below which objects have addresses of their own",
            remedy="leave out what follows the ? or #, or write %3F or %23 where that is in a name; pass "
            "credentials in storage_options",
        )


def _defaults(cloud: str, place: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a cloud that follow from place, options and what the environment says."""
    if cloud == "web":
        return {}
    if cloud == "aws" and place == PORTAL_BUCKET:
        return {"skip_signature": True, "region": PORTAL_REGION}  # wherever the others of AWS_REGION are
    found: dict[str, Any] = _profile() if cloud == "aws" else {}
    if _signs(cloud) or any(_CREDENTIAL.search(name) for name in given):
        return {name: found[name] for name in ("region",) if name in found}
    if "access_key_id" not in found:
        found["skip_signature"] = True
    return found


def _signs(cloud: str) -> bool:
    if cloud == "google" and Path.home().joinpath(_GOOGLE_LOGIN).exists():
        return True
    return any(os.environ.get(name) for name in _SIGNS[cloud])


def _profile() -> dict[str, str]:
    """Return keys and region of the profile AWS_PROFILE, or "default", from the files of `aws configure`."""
    found = _profile_settings(os.environ.get("AWS_PROFILE") or "default")
    wanted = ["aws_access_key_id", "aws_secret_access_key", "aws_session_token"]
    if not any(os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION")):
        wanted.append("region")
    return {_ALIASES.get(key, key): found[key] for key in wanted if key in found}


def _unread_login() -> str:
    """Return what to do where the profile signs in by another program, "" where it does not."""
    name = os.environ.get("AWS_PROFILE") or "default"
    ways = [way for way in _LOGINS if way in _profile_settings(name)]
    if not ways:
        return ""
    return (
        f"the AWS profile {name!r} signs in by {ways[0]}, which only the AWS command line follows, so that "
        f'the request was not signed: run eval "$(aws configure export-credentials --profile {name} '
        '--format env)" in the shell and try again; or '
    )


def _profile_settings(name: str) -> dict[str, str]:
    home = Path.home() / ".aws"
    files = {
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials": name,
        os.environ.get("AWS_CONFIG_FILE") or home / "config": name
        if name == "default"
        else f"profile {name}",
    }
    found: dict[str, str] = {}
    for path, section in files.items():
        parser = configparser.RawConfigParser()
        try:
            parser.read(path)
        except (configparser.Error, UnicodeError):
            continue
        if parser.has_section(section):
            found = {**dict(parser.items(section)), **found}
    return found


def _client(config: Mapping[str, Any], times: Mapping[str, float], *, plain: bool) -> dict[str, Any]:
    """Return how connections are made; without encryption only where an address asks for that."""
    endpoints = [config.get(name) for name in ("endpoint", "base_url", "google_base_url")]
    endpoints += map(os.environ.get, ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT"))
    version = getattr(sys.modules.get("tomocpt_stream"), "__version__", "")
    return {
        "allow_http": plain or any(re.match("http://", str(one)) for one in endpoints if one),
        "connect_timeout": timedelta(seconds=times.get("connect_timeout", CONNECT_TIMEOUT)),
        "timeout": timedelta(seconds=times.get("timeout", TIMEOUT)),
        "user_agent": f"tomocpt-stream/{version}".rstrip("/"),
    }
