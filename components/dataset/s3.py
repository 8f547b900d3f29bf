"""Brings a data set from object storage into the work directory: one object, or all below a folder."""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from components.common.errors import DataError


def download(url: str, folder: Path) -> Path:
    """Downloads `s3://bucket/key` to a file, or all of `s3://bucket/folder/` to a folder, and gives its path.

    `?endpoint=...&region=...` behind the key names a server other than AWS; credentials come as boto3 finds them.

    Raises:
        DataError: nothing there, no access, or no connection.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    parts = urlsplit(url)
    bucket, key = parts.netloc, parts.path.lstrip("/")
    if not bucket or not key:
        raise DataError(f"dataset.source: want s3://bucket/key or s3://bucket/folder/, got {url!r}")
    client = _client(parse_qs(parts.query))
    try:
        keys = _keys(client, bucket, key) if key.endswith("/") else [key]
        for found in keys:
            _download(client, bucket, found, folder / _relative(found, key))
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise DataError(f"cannot read {url}: {error}; check the name, the credentials and the endpoint") from None
    if not keys:
        raise DataError(f"{url}: no objects below that folder")
    return folder if key.endswith("/") else folder / _relative(key, key)


def _client(query: dict[str, list[str]]) -> Any:
    import boto3

    options = {"endpoint_url": query.get("endpoint"), "region_name": query.get("region")}
    return boto3.client("s3", **{name: values[0] for name, values in options.items() if values})


def _keys(client: Any, bucket: str, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]


def _relative(key: str, prefix: str) -> str:
    """Path below the download folder; a key cannot lead out of it."""
    name = key[len(prefix) :] if prefix.endswith("/") else key.rpartition("/")[2]
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise DataError(f"an object's key is no file name: {key!r}; rename or remove that object")
    return name


def _download(client: Any, bucket: str, key: str, path: Path) -> None:
    from boto3.s3.transfer import TransferConfig

    path.parent.mkdir(parents=True, exist_ok=True)
    client.download_file(bucket, key, str(path), Config=TransferConfig(preferred_transfer_client="classic"))
