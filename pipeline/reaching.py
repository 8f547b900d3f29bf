"""The object store as it is reached from here, which may be another way than the pods'."""

import re
import socket
from dataclasses import replace
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from components.common.errors import StoreError
from components.common.store import Store, open_store

CONNECT_SECONDS = 3.0
DEADLINE_SECONDS = 10.0
"""A pod may wait five minutes for a store that fails; whoever looks at it from here does not."""
INSIDE = re.compile(r"([a-z0-9-]+)\.([a-z0-9-]+)(?:\.svc(?:\..+)?)?")
"""Name of a Kubernetes service: service and namespace, and what the cluster's domain adds."""


class OutOfReach(StoreError):
    """Nothing answers at the store's address from here."""


def open_from_here(url: str, endpoint: str | None) -> Store:
    """The store of a run; `endpoint` stands for the URL's own.

    Raises:
        OutOfReach: at once, with the way to reach it; a store that answers is left to say itself what is wrong.
        SettingsError: not a store's URL.
    """
    if url.startswith("s3://"):
        from components.common.s3_client import Location

        location = Location.parse(url)
        options = replace(location.options, endpoint=endpoint or location.options.endpoint, deadline=DEADLINE_SECONDS)
        _knock(options.endpoint)
        url = replace(location, options=options).url
    return open_store(url)


def _knock(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if not host or (parts.scheme in getproxies() and not proxy_bypass(host)):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutOfReach(f"{endpoint} is not to be reached from here ({reason}){_way(host, port)}") from None


def _way(host: str, port: int) -> str:
    inside = INSIDE.fullmatch(host)
    if not inside:
        return "; --store-endpoint (GRPO_STORE_ENDPOINT) names another address of it"
    service, namespace = inside.groups()
    return (
        f"; it is an address inside the cluster: kubectl -n {namespace} port-forward svc/{service} 9000:{port}, then "
        "--store-endpoint http://localhost:9000 (GRPO_STORE_ENDPOINT)"
    )
