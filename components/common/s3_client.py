"""The connection to an S3 server: where it is, who we are, which failures pass and which are the user's to mend."""

import difflib
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from components.common.errors import SettingsError, StoreError
from components.common.integrity import Damaged

T = TypeVar("T")
MIB = 1 << 20

TRANSIENT_CODES = {
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling", "ThrottlingException",
    "TooManyRequests", "OperationAborted", "ConditionalRequestConflict", "BadDigest", "IncompleteBody", "MalformedXML",
    "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
}  # fmt: skip
"""Codes that a second attempt mends: load, races, and bodies damaged on their way."""


@dataclass(frozen=True)
class Options:
    """What the URL of an S3 store may say after `?`; credentials never stand there."""

    endpoint: str = ""
    """Address of a server that is not AWS, such as `http://seaweedfs.kubeflow:9000`; it is spoken to path-style."""
    region: str = ""
    """Region; else the environment's or the profile's, else us-east-1."""
    profile: str = ""
    """Profile of the AWS configuration file."""
    addressing: str = ""
    """`path` or `virtual`; else path-style with an endpoint and virtual-host style without."""
    connections: int = 8
    """Requests in flight at once."""
    part_mib: int = 24
    """Size of a part of an upload and of a range of a download. Below 32 MiB the C library uses a part's memory again
    for the next; above, each is new, and touching new memory costs five times the copy into it (measured)."""
    timeout: float = 60.0
    """Seconds without a byte, or with less than 1 KiB a second of a body, after which a request counts as stalled."""
    deadline: float = 300.0
    """Seconds after which a request that keeps failing is given up."""


@dataclass(frozen=True)
class Location:
    """Bucket and prefix of a store and how to reach them."""

    bucket: str
    prefix: str
    options: Options

    @classmethod
    def parse(cls, url: str) -> "Location":
        """Reads `s3://bucket/prefix?endpoint=...`.

        Raises:
            SettingsError: no bucket, credentials in the URL, or an unknown option.
        """
        parts = urlsplit(url)
        if not parts.netloc or "@" in parts.netloc:
            raise SettingsError(f"store: want s3://bucket/prefix without credentials, got {url!r}")
        kinds = {field.name: type(field.default) for field in fields(Options)}
        values: dict[str, Any] = {}
        for name, text in parse_qsl(parts.query, keep_blank_values=True):
            if name not in kinds:
                near = difflib.get_close_matches(name, kinds, n=1)
                raise SettingsError(
                    f"store: {name} is no option of an s3 URL; want {near[0] if near else sorted(kinds)}"
                )
            try:
                values[name] = kinds[name](text)
            except ValueError:
                raise SettingsError(f"store: {name} wants a number, got {text!r}") from None
        return cls(parts.netloc, parts.path.strip("/"), Options(**values))

    @property
    def url(self) -> str:
        """The same location always gives the same text."""
        given = {field.name: getattr(self.options, field.name) for field in fields(Options)}
        said = {name: value for name, value in given.items() if value != getattr(Options, name)}
        query = "?" + urlencode(said, safe="/:", quote_via=quote) if said else ""
        return f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "") + query


def make_client(options: Options) -> Any:
    """A boto3 client whose only task is to sign and send: retries, digests and parallelism are ours.

    Credentials come from where boto3 looks: environment, profile, web identity (IRSA), container or instance role.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    own = options.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    try:
        session = boto3.Session(profile_name=options.profile or None)
        return session.client(
            "s3",
            endpoint_url=options.endpoint or None,
            region_name=options.region or session.region_name or "us-east-1",
            config=Config(
                s3={
                    "addressing_style": options.addressing or ("path" if own else "auto"),
                    "payload_signing_enabled": False,
                },
                retries={"total_max_attempts": 1},
                connect_timeout=min(options.timeout, 10.0),
                read_timeout=options.timeout,
                max_pool_connections=options.connections + 8,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                tcp_keepalive=True,
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise SettingsError(f"store: {error}") from None


class Requests:
    """Makes requests again when they fail for a passing reason, and says clearly what is wrong when not."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.answered = False

    def __call__(self, what: str, act: Callable[[int], T]) -> T:
        """`act(attempt)` until it succeeds; waits between attempts grow from 0.1 to 10 s, half of each by chance.

        Raises:
            StoreError: a reason that asking again does not mend, or the deadline.
            ClientError: 404, 412, 416 and InvalidPart, whose meaning only the caller knows.
        """
        started = time.monotonic()
        attempt = 0
        while True:
            try:
                result = act(attempt)
                self.answered = True
                return result
            except Exception as error:
                transient, reached = _judge(error)
                self.answered |= reached
                if not transient:
                    self._refuse(what, error)
                limit = self.location.options.deadline if self.answered else min(20.0, self.location.options.deadline)
                pause = min(10.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0)
                attempt += 1
                if time.monotonic() + pause - started > limit:
                    raise StoreError(self._gave_up(what, error, attempt, limit)) from error
                time.sleep(pause)

    def _gave_up(self, what: str, error: Exception, attempts: int, limit: float) -> str:
        mend = "" if self.answered else "; nothing answers there: is the endpoint right and the server up?"
        return f"{self.location.url}: {what} failed {attempts} times within {limit:.0f} s: {error}{mend}"

    def _refuse(self, what: str, error: Exception) -> None:
        from botocore.exceptions import ClientError

        if isinstance(error, ClientError):
            code = code_of(error)
            if code == "InvalidPart" or (status_of(error) in (404, 412, 416) and code != "NoSuchBucket"):
                raise error
        mend = _mend(error, self.location)
        if mend is None:
            raise error
        raise StoreError(f"{self.location.url}: {what}: {mend}") from error


def status_of(error: Any) -> int:
    """HTTP status of a ClientError."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: Any) -> str:
    """S3's own code of a ClientError."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _judge(error: Exception) -> tuple[bool, bool]:
    """Whether asking again may mend it, and whether a server answered at all."""
    from botocore import exceptions as boto
    from botocore.exceptions import ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError, SSLError

    if isinstance(error, ClientError):
        status = status_of(error)
        return status >= 500 or status in (408, 409, 429) or code_of(error) in TRANSIENT_CODES, True
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError):  # refused, reset, timed out
        return not isinstance(error, boto.SSLError), False
    if isinstance(error, HTTPError):
        return not isinstance(error, SSLError), True
    return isinstance(error, Damaged | boto.IncompleteReadError | ResponseParserError | ConnectionError), True


def _mend(error: Exception, location: Location) -> str | None:
    """What is wrong and how to mend it; None: not an error of the store."""
    from botocore import exceptions as boto

    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return (
            "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile (?profile=...), "
            f"or give the pod a role ({error})"
        )
    if isinstance(error, boto.SSLError):
        return f"the server's certificate is not trusted: {error}; give its CA in AWS_CA_BUNDLE"
    if isinstance(error, boto.BotoCoreError):
        return str(error)
    if not isinstance(error, boto.ClientError):
        return None
    code, message = code_of(error), str(error.response.get("Error", {}).get("Message", ""))
    known = {
        "NoSuchBucket": f"there is no bucket {location.bucket}; create it, or correct the store's URL",
        "InvalidAccessKeyId": "the access key is not known there; check AWS_ACCESS_KEY_ID",
        "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
        "InvalidToken": "the session token is not valid; sign in again",
        "ExpiredToken": "the credentials have expired; sign in again",
        "AccessDenied": f"the credentials may not do this in {location.bucket}; they need to list, get, put and delete",
        "RequestTimeTooSkewed": "the clocks of this machine and of the server differ too much; set this one's clock",
        "AuthorizationHeaderMalformed": f"wrong region? set ?region=... ({message})",
        "QuotaExceeded": "the bucket's quota is used up; collect garbage (`grpo artifacts gc`) or raise it",
        "NoSuchUpload": "the upload was aborted by someone else; run it again",
    }
    return known.get(code, f"refused with {code} ({status_of(error)}) {message}".rstrip())
