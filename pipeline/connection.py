"""Reaching Kubeflow Pipelines: a host with a token or cookie, from inside the cluster, or through the kubeconfig."""

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from components.common.errors import GrpoError

ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.5
TIMEOUT_SECONDS = 60.0
"""Of one request."""

T = TypeVar("T")


class ClusterError(GrpoError):
    """Kubeflow Pipelines or Kubernetes refused or cannot be reached."""


@dataclass(frozen=True)
class Connection:
    """How to reach a Kubeflow installation. Without a host: in-cluster, or the kubeconfig's API server as proxy."""

    host: str | None = None
    namespace: str | None = None
    token: str | None = None
    cookie: str | None = None
    ca_cert: str | None = None

    def open(self) -> Any:
        """A `kfp.Client`.

        Raises:
            ClusterError: nothing answers there, or it is not Kubeflow Pipelines.
        """
        from kubernetes.config import ConfigException

        warnings.filterwarnings("ignore", category=FutureWarning, module="kfp")
        try:
            client = _client_class()(
                host=self.host, existing_token=self.token, cookies=self.cookie, ssl_ca_cert=self.ca_cert,
                namespace=self.namespace or "kubeflow", credentials=self._in_cluster_token(),
            )  # fmt: skip
        except ConfigException:
            raise ClusterError(
                "no cluster: neither --host (GRPO_HOST) nor a kubeconfig nor a pod's identity; for a port-forward: "
                "kubectl -n kubeflow port-forward svc/ml-pipeline-ui 8080:80, then --host http://localhost:8080"
            ) from None
        except Exception as error:  # the client asks the server for its mode when it is made
            raise explain(error, "connect") from error
        if self.namespace:
            client._context_setting["namespace"] = self.namespace if multi_user(client) else ""
        return client

    def _in_cluster_token(self) -> Any:
        import os

        from kfp.client import set_volume_credentials

        if self.token or self.cookie or "KF_PIPELINES_SA_TOKEN_PATH" not in os.environ:
            return None
        return set_volume_credentials.ServiceAccountTokenVolumeCredentials()


def _client_class() -> Any:
    import kfp

    class Client(kfp.Client):
        """Asks the server for its mode once; the SDK's own asks five times with pauses, whatever the answer was."""

        def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
            return call("ask the server for its mode", self._healthz_api.healthz_service_get_healthz)

    return Client


def multi_user(client: Any) -> bool:
    """Whether the installation separates users by namespace."""
    return bool(client.get_kfp_healthz().multi_user)


def call(what: str, request: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Makes a request; busy and broken servers are asked again, with growing pauses.

    Raises:
        ClusterError: refused, or still failing after some attempts; the message says how to mend it.
    """
    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request(*arguments, **options)
        except Exception as error:  # kfp, kubernetes and urllib3 have no common base
            if attempt == ATTEMPTS or not _passing(error):
                raise explain(error, what) from error
        time.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


def status_of(error: BaseException) -> int | None:
    """HTTP status of a client's exception, if it has one."""
    status = getattr(error, "status", None)
    return status if isinstance(status, int) and status > 0 else None


def _passing(error: BaseException) -> bool:
    status = status_of(error)
    return status == 429 or (status is not None and status >= 500) or (status is None and _is_network(error))


def _is_network(error: BaseException) -> bool:
    import urllib3

    return isinstance(error, urllib3.exceptions.HTTPError | ConnectionError | TimeoutError)


def explain(error: BaseException, what: str) -> GrpoError:
    """The error a user gets for a client's exception."""
    if isinstance(error, GrpoError):
        return error
    status, told = status_of(error), _told(error)
    mends = {
        401: "the token or cookie is missing or expired: log in again and pass --token or --cookie",
        403: "forbidden: the account lacks a right; `grpo doctor` names it, `kubectl apply -k k8s/base` grants it",
        404: "not found: check the name and --namespace",
        409: "it is there already: choose another name, or wait until the other is gone",
        429: "the server is busy: try again in a minute",
    }
    if status is None:
        return ClusterError(
            f"cannot {what}: {told}; check --host and the network (`grpo doctor` tells what is reachable)"
        )
    mend = mends.get(status, "the server failed: look at the logs of ml-pipeline in the kubeflow namespace")
    return ClusterError(f"cannot {what}: HTTP {status}, {mend} ({told})")


def _told(error: BaseException) -> str:
    body = getattr(error, "body", None)
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    try:
        values = json.loads(text or "")
        found = values.get("error_message") or values.get("message") or values.get("error") or text
    except (json.JSONDecodeError, AttributeError):
        found = text or str(error) or type(error).__name__
    return " ".join(str(found).split())[:300]
