"""Reaching Kubeflow Pipelines: a host with a token or cookie, from inside the cluster, or through the kubeconfig."""

import functools
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from components.common.kube import ClusterError, call, explain, make_once, status_of

__all__ = ["ClusterError", "Connection", "call", "explain", "make_once", "multi_user", "status_of"]

KUBEFLOW = "kubeflow"
"""Namespace of Kubeflow Pipelines itself; the runs' may be another."""


@dataclass(frozen=True)
class Connection:
    """How to reach a Kubeflow installation. Without a host: in-cluster, or the kubeconfig's API server as proxy."""

    host: str | None = None
    namespace: str | None = None
    """Of the runs."""
    token: str | None = None
    cookie: str | None = None
    ca_cert: str | None = None
    store_endpoint: str | None = None
    """Where the object store is reached from here, when its own endpoint is an address inside the cluster."""

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
                namespace=KUBEFLOW, credentials=self._in_cluster_token(),
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
        """Prints nothing by itself, and asks the server for its mode once.

        The SDK's own prints a line an upload, and asks five times with pauses, whatever the answer was.
        """

        def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
            return call("ask the server for its mode", self._healthz_api.healthz_service_get_healthz)

    for name in ("upload_pipeline", "upload_pipeline_version", "create_experiment", "run_pipeline"):
        setattr(Client, name, _silent(getattr(kfp.Client, name)))
    return Client


def _silent(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def quiet(*arguments: Any, **options: Any) -> Any:
        with redirect_stdout(io.StringIO()):
            return method(*arguments, **options)

    return quiet


def multi_user(client: Any) -> bool:
    """Whether the installation separates users by namespace."""
    return bool(client.get_kfp_healthz().multi_user)
