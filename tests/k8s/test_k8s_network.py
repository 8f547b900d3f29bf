"""Who may talk to whom, by evaluating the NetworkPolicies as the Kubernetes API documents them.

https://kubernetes.io/docs/concepts/services-networking/network-policies/: a pod that no policy selects in a direction
is open in it; one that is selected may do what the union of the policies' rules allows; a connection needs the
sender's egress and the receiver's ingress. Ports are those of the pod, after the Service's translation.
"""

import ipaddress
from dataclasses import dataclass, field

import pytest


@dataclass(frozen=True)
class Peer:
    """A pod (namespace and labels) or an address outside the cluster's pods."""

    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    address: str = ""


def matches(selector: dict | None, labels: dict[str, str]) -> bool:
    """A label selector; an empty one matches everything."""
    selector = selector or {}
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions", []):
        present, value = rule["key"] in labels, labels.get(rule["key"])
        fits = {
            "Exists": present,
            "DoesNotExist": not present,
            "In": present and value in rule.get("values", []),
            "NotIn": not present or value not in rule.get("values", []),
        }[rule["operator"]]
        if not fits:
            return False
    return True


def in_block(block: dict, address: str) -> bool:
    host = ipaddress.ip_address(address)
    inside = host in ipaddress.ip_network(block["cidr"])
    return inside and not any(host in ipaddress.ip_network(hole) for hole in block.get("except", []))


def admits(rule: dict, side: str, policy_namespace: str, other: Peer, protocol: str, port: int) -> bool:
    """One ingress or egress rule: does it cover this peer and this port?"""
    ports = rule.get("ports")
    if ports is not None and not any(
        item.get("protocol", "TCP") == protocol and item["port"] == port for item in ports
    ):
        return False
    peers = rule.get(side)
    if peers is None:
        return True
    for peer in peers:
        if "ipBlock" in peer:
            if other.address and in_block(peer["ipBlock"], other.address):
                return True
        elif not other.address:
            if "namespaceSelector" in peer:
                here = matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
            else:
                here = other.namespace == policy_namespace
            if here and matches(peer.get("podSelector"), other.labels):
                return True
    return False


def direction_open(policies: list[dict], direction: str, pod: Peer, other: Peer, protocol: str, port: int) -> bool:
    if pod.address:
        return True
    side = {"Egress": "to", "Ingress": "from"}[direction]
    selecting = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and direction in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], pod.labels)
    ]
    if not selecting:
        return True
    return any(
        admits(rule, side, pod.namespace, other, protocol, port)
        for policy in selecting
        for rule in policy["spec"].get(direction.lower(), [])
    )


def connects(policies: list[dict], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection gets through."""
    return direction_open(policies, "Egress", source, target, protocol, port) and direction_open(
        policies, "Ingress", target, source, protocol, port
    )


@pytest.fixture(scope="session")
def policies(objects: list[dict]) -> list[dict]:
    return [item for item in objects if item["kind"] == "NetworkPolicy"]


@pytest.fixture(scope="session")
def runs(overlay: str) -> str:
    """Namespace of the stages."""
    return "grpo" if overlay in ("profile", "gpu") else "kubeflow"


def stage(namespace: str, name: str) -> Peer:
    return Peer(namespace, {"app.kubernetes.io/part-of": "grpo-pipeline", "app.kubernetes.io/component": name})


STAGES = ["configure", "dataset", "rollout", "reward", "update", "evaluate", "publish"]
DNS = Peer("kube-system", {"k8s-app": "kube-dns"})
STORAGE = Peer("kubeflow", {"app": "seaweedfs"})
API_SERVER = Peer(address="10.96.0.1")
KFP = Peer("kubeflow", {"app": "ml-pipeline"})
MLFLOW = Peer("grpo-tracking", {"app.kubernetes.io/name": "mlflow", "app.kubernetes.io/part-of": "grpo-tracking"})
POSTGRES = Peer("grpo-tracking", {"app.kubernetes.io/name": "postgres", "app.kubernetes.io/part-of": "grpo-tracking"})
INTERNET = Peer(address="198.51.100.7")
CLOUD_METADATA = Peer(address="169.254.169.254")
OTHER = Peer("default", {"app": "anything"})


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_reaches_what_it_needs(policies: list[dict], runs: str, name: str) -> None:
    source = stage(runs, name)
    assert connects(policies, source, DNS, 53, "UDP") and connects(policies, source, DNS, 53)
    assert connects(policies, source, STORAGE, 8333)
    assert connects(policies, source, KFP, 8887)
    assert connects(policies, source, API_SERVER, 443)


@pytest.mark.parametrize("name", STAGES)
def test_no_stage_reaches_what_it_does_not_need(policies: list[dict], runs: str, overlay: str, name: str) -> None:
    source = stage(runs, name)
    hub = overlay == "kind" and name in ("configure", "dataset")
    assert connects(policies, source, INTERNET, 443) is hub
    assert not connects(policies, source, INTERNET, 80)
    assert not connects(policies, source, CLOUD_METADATA, 80)
    assert not connects(policies, source, CLOUD_METADATA, 443)
    assert not connects(policies, source, OTHER, 8080)
    assert not connects(policies, source, STORAGE, 9333), "SeaweedFS's master gives out every bucket"
    assert not connects(policies, source, POSTGRES, 5432)
    assert connects(policies, source, MLFLOW, 5000) is (name in ("evaluate", "publish"))


def test_nothing_reaches_a_stage(policies: list[dict], runs: str) -> None:
    for source in [OTHER, INTERNET, KFP, stage(runs, "reward"), MLFLOW]:
        assert not connects(policies, source, stage(runs, "rollout"), 8000)


def test_nodes_of_an_update_reach_each_other_and_storage_only(policies: list[dict], runs: str) -> None:
    node = stage(runs, "update-node")
    assert connects(policies, node, node, 29400) and connects(policies, node, node, 51234)
    assert connects(policies, node, STORAGE, 8333) and connects(policies, node, DNS, 53, "UDP")
    for target, port in [
        (API_SERVER, 443),
        (KFP, 8887),
        (MLFLOW, 5000),
        (INTERNET, 443),
        (stage(runs, "rollout"), 29400),
    ]:
        assert not connects(policies, node, target, port)
    assert not connects(policies, stage(runs, "reward"), node, 29400)


def test_the_janitor_reaches_the_api_server_only(policies: list[dict], runs: str) -> None:
    janitor = Peer(runs, {"app.kubernetes.io/part-of": "grpo-pipeline", "app.kubernetes.io/name": "grpo-janitor"})
    assert connects(policies, janitor, API_SERVER, 443) and connects(policies, janitor, DNS, 53, "UDP")
    for target, port in [(STORAGE, 8333), (KFP, 8887), (MLFLOW, 5000), (INTERNET, 443)]:
        assert not connects(policies, janitor, target, port)


def test_tracking_is_closed_but_for_its_clients(policies: list[dict], runs: str) -> None:
    assert connects(policies, MLFLOW, POSTGRES, 5432) and connects(policies, MLFLOW, STORAGE, 8333)
    assert connects(policies, KFP, MLFLOW, 5000), "KFP's MLflow plugin"
    assert not connects(policies, OTHER, MLFLOW, 5000) and not connects(policies, OTHER, POSTGRES, 5432)
    assert not connects(policies, MLFLOW, INTERNET, 443) and not connects(policies, POSTGRES, INTERNET, 443)
    impostor = Peer("default", stage(runs, "evaluate").labels)
    assert not connects(policies, impostor, MLFLOW, 5000), "the label alone, in another namespace, is not enough"


def test_pods_of_others_are_left_alone(policies: list[dict], runs: str) -> None:
    """A standalone KFP shares the namespace: its own pods must keep every connection, but to our stages."""
    driver = Peer(runs, {"pipelines.kubeflow.org/v2_component": "true"})
    assert connects(policies, driver, INTERNET, 443) and connects(policies, driver, API_SERVER, 443)


def test_the_evaluator_knows_the_documented_corner_cases() -> None:
    """Each by hand from the API reference: no `ports` is any port, no `to` is any peer, no rules is nothing."""
    a, b = Peer("n", {"app": "a"}), Peer("n", {"app": "b"})

    def policy(**spec: object) -> dict:
        return {"metadata": {"namespace": "n"}, "spec": {"podSelector": {}, **spec}}

    assert connects([], a, b, 1)
    assert not connects([policy(policyTypes=["Egress"])], a, b, 1)
    assert connects([policy(policyTypes=["Egress"], egress=[{}])], a, b, 1)
    assert connects(
        [policy(policyTypes=["Egress"], egress=[{"to": [{"podSelector": {"matchLabels": {"app": "b"}}}]}])], a, b, 7
    )
    assert not connects(
        [policy(policyTypes=["Egress"], egress=[{"to": [{"podSelector": {"matchLabels": {"app": "c"}}}]}])], a, b, 7
    )
    assert not connects([policy(policyTypes=["Egress"], egress=[{"ports": [{"protocol": "TCP", "port": 2}]}])], a, b, 7)
    assert not connects([policy(policyTypes=["Ingress"])], a, b, 1)
    outside = {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}}]}
    only_outside = [policy(policyTypes=["Egress"], egress=[outside])]
    assert connects(only_outside, a, INTERNET, 443) and not connects(only_outside, a, Peer(address="10.1.2.3"), 443)
