"""The doctor's checks of Kubernetes: rights, custom resources, accounts, secrets, pools, quotas."""

from collections.abc import Callable, Iterator
from typing import Any

from components.common.kube import TRAIN_JOBS, WORKFLOWS, ClusterError, call, status_of
from pipeline.connection import KUBEFLOW
from pipeline.doctor import Finding
from pipeline.following import Pods
from pipeline.resources import STAGES, ClusterSettings, StageResources, Toleration, node_selector, quantity, tolerations
from pipeline.settings import PipelineSettings

SERVER = "ml-pipeline"
Right = tuple[str, str, str, str | None]
RIGHTS: tuple[Right, ...] = (
    ("list", "", "pods", None),
    ("get", "", "pods", "log"),
    ("list", TRAIN_JOBS["group"], "trainjobs", None),
    ("delete", TRAIN_JOBS["group"], "trainjobs", None),
)
"""What `grpo logs` and `grpo cancel` do: verb, group, resource, part of it."""
ACCOUNT_RIGHTS: tuple[Right, ...] = (
    ("create", TRAIN_JOBS["group"], "trainjobs", None),
    ("get", TRAIN_JOBS["group"], "trainjobs", None),
    ("delete", TRAIN_JOBS["group"], "trainjobs", None),
    ("get", WORKFLOWS["group"], "workflows", None),
    ("list", "", "pods", None),
    ("get", "", "pods", "log"),
    ("list", "", "events", None),
)
"""What an update on several nodes does, as the run's service account."""


def examine_cluster(settings: PipelineSettings | None, namespace: str) -> Iterator[Finding]:
    """Everything that Kubernetes can tell."""
    from kubernetes import client

    try:
        Pods.connect(namespace)
        core = client.CoreV1Api()
        found = read("namespace", lambda: core.read_namespace(namespace))
    except ClusterError as error:
        mend = "" if status_of(error) else "KUBECONFIG, or run this in a pod"
        yield Finding("failure", "Kubernetes", f"{error}; what it would tell was not checked", mend)
        return
    if isinstance(found, Finding):
        yield found
    else:
        yield _presence(found, f"namespace {namespace}", f"kubectl create namespace {namespace}")
    nodes = settings.update.nodes if settings else 1
    cluster = settings.cluster if settings else ClusterSettings()
    yield version()
    yield from rights(namespace, nodes)
    if nodes > 1:
        yield account_rights(namespace, cluster)
    yield from definitions(nodes, cluster.queue)
    yield from named_objects(core, namespace, cluster, nodes)
    if settings:
        yield from pools(core, cluster)
        yield from quotas(core, namespace, settings)


def apply(namespace: str, cluster: ClusterSettings) -> str:
    """The command that applies what the runs' namespace lacks."""
    overlay = "standalone" if namespace == KUBEFLOW else "gpu" if cluster.queue else "profile"
    return f"kubectl apply -k k8s/overlays/{overlay}"


def read(what: str, request: Callable[[], Any]) -> Any:
    """The object; None when it is not there; a warning when this account may not look."""
    try:
        return call(f"read {what}", request)
    except ClusterError as error:
        status = status_of(error)
        if status == 404:
            return None
        if status == 403:
            return Finding("warning", what, "this account may not look")
        raise


def _presence(found: Any, what: str, mend: str, *, needed: bool = True) -> Finding:
    if isinstance(found, Finding):
        return found
    if found is not None:
        return Finding("ok", what)
    return Finding("failure" if needed else "warning", what, "is not there", mend)


def version() -> Finding:
    """Kubeflow Pipelines' release, by its server's image, against the client's here."""
    from importlib.metadata import version as installed

    from kubernetes import client

    found = read("deployment ml-pipeline", lambda: client.AppsV1Api().read_namespaced_deployment(SERVER, KUBEFLOW))
    if found is None or isinstance(found, Finding):
        return found or Finding("warning", "Kubeflow's version", "no deployment ml-pipeline in kubeflow")
    server = found.spec.template.spec.containers[0].image.rpartition(":")[2]
    ours = installed("kfp")
    if server.split(".")[:2] == ours.split(".")[:2]:
        return Finding("ok", "Kubeflow's version", server)
    return Finding("warning", "Kubeflow's version", f"the server is {server}, the client {ours}",
                   f"pip install 'kfp=={server}'")  # fmt: skip


def rights(namespace: str, nodes: int) -> Iterator[Finding]:
    """What this account may do, asked of the API server itself."""
    from kubernetes import client

    api = client.AuthorizationV1Api()
    for right in RIGHTS:
        review = client.V1SelfSubjectAccessReview(
            spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=_attributes(namespace, right))
        )
        name, needed = _described(right), nodes > 1 or right[2] != "trainjobs"
        answer = call("ask for a right", lambda review=review: api.create_self_subject_access_review(review))
        if answer.status.allowed:
            yield Finding("ok", f"right to {name}")
        else:
            command = f"kubectl create rolebinding grpo-users -n {namespace} --clusterrole=edit --user=..."
            yield Finding("failure" if needed else "warning", f"right to {name}", "denied", command)


def _attributes(namespace: str, right: Right) -> Any:
    from kubernetes import client

    verb, group, resource, part = right
    return client.V1ResourceAttributes(namespace=namespace, verb=verb, group=group, resource=resource, subresource=part)


def _described(right: Right) -> str:
    verb, _, resource, part = right
    return f"{verb} {resource}" + (f"/{part}" if part else "")


def account_of(namespace: str, cluster: ClusterSettings) -> str:
    """The service account that the stages run as."""
    return cluster.service_account or ("pipeline-runner" if namespace == KUBEFLOW else "default-editor")


def account_rights(namespace: str, cluster: ClusterSettings) -> Finding:
    """What the run's service account may do: asked of the API server, else read off the binding that grants it."""
    from kubernetes import client

    account, api = account_of(namespace, cluster), client.AuthorizationV1Api()
    what, mend = f"rights of service account {account}", apply(namespace, cluster)
    denied = []
    for right in ACCOUNT_RIGHTS:
        spec = client.V1SubjectAccessReviewSpec(
            user=f"system:serviceaccount:{namespace}:{account}", resource_attributes=_attributes(namespace, right)
        )
        review = client.V1LocalSubjectAccessReview(metadata={"namespace": namespace}, spec=spec)
        ask = lambda review=review: api.create_namespaced_local_subject_access_review(namespace, review)  # noqa: E731
        answer = read(what, ask)
        if answer is None or isinstance(answer, Finding):  # only some accounts may ask about others
            return _binding(namespace, account, what, mend)
        if not answer.status.allowed:
            denied.append(_described(right))
    if denied:
        return Finding("failure", what, f"may not {', '.join(denied)}", mend)
    return Finding("ok", what)


def _binding(namespace: str, account: str, what: str, mend: str) -> Finding:
    from kubernetes import client

    api = client.RbacAuthorizationV1Api()
    found = read("role binding grpo-stages", lambda: api.read_namespaced_role_binding("grpo-stages", namespace))
    if isinstance(found, Finding):
        return Finding("warning", what, "this account may not look")
    if found is None or account not in [subject.name for subject in found.subjects or []]:
        return Finding("failure", what, "the role binding grpo-stages does not name it", mend)
    return Finding("ok", what, "bound to the role grpo-stages")


def definitions(nodes: int, queue: str | None) -> Iterator[Finding]:
    """Custom resources of Argo, Trainer and Kueue, as far as the run needs them."""
    from kubernetes import client

    api = client.ApiextensionsV1Api()
    wanted = [
        ("workflows.argoproj.io", True, "install Kubeflow Pipelines: docs/cluster.md"),
        ("trainjobs.trainer.kubeflow.org", nodes > 1, "kubectl apply --server-side -k k8s/third-party/trainer"),
    ]
    if queue:
        wanted.append(("localqueues.kueue.x-k8s.io", True, "kubectl apply --server-side -k k8s/third-party/kueue"))
    for name, needed, mend in wanted:
        found = read(f"definition {name}", lambda name=name: api.read_custom_resource_definition(name))
        yield _presence(found, f"definition {name}", mend, needed=needed)


def named_objects(core: Any, namespace: str, cluster: ClusterSettings, nodes: int) -> Iterator[Finding]:
    """Accounts, secrets, configuration and roles that pods name."""
    from kubernetes import client

    mend = apply(namespace, cluster)
    accounts = [account_of(namespace, cluster), "grpo-janitor", *(["grpo-trainjob"] if nodes > 1 else [])]
    for name in accounts:
        request = lambda name=name: core.read_namespaced_service_account(name, namespace)  # noqa: E731
        yield _presence(read(f"service account {name}", request), f"service account {name}", mend)
    role = client.RbacAuthorizationV1Api()
    found = read("role grpo-stages", lambda: role.read_namespaced_role("grpo-stages", namespace))
    yield _presence(found, "role grpo-stages", mend, needed=nodes > 1)
    secrets = [name for name in (cluster.storage_secret, cluster.hub_secret, *cluster.image_pull_secrets) if name]
    for name in secrets:
        request = lambda name=name: core.read_namespaced_secret(name, namespace)  # noqa: E731
        yield _presence(read(f"secret {name}", request), f"secret {name}", f"k8s/secrets.sh {namespace}")
    if cluster.config_map:
        found = read("config map", lambda: core.read_namespaced_config_map(cluster.config_map, namespace))
        yield _presence(found, f"config map {cluster.config_map}", mend, needed=False)
    if nodes > 1:
        runtime = TRAIN_JOBS | {"plural": "trainingruntimes", "namespace": namespace, "name": "grpo-update"}
        custom = client.CustomObjectsApi()
        found = read("training runtime", lambda: custom.get_namespaced_custom_object(**runtime))
        yield _presence(found, "training runtime grpo-update", mend)


def pools(core: Any, cluster: ClusterSettings) -> Iterator[Finding]:
    """Whether there are nodes that a stage with GPUs fits on; a pool that grows on demand may have none now."""
    listed = read("nodes", core.list_node)
    if listed is None or isinstance(listed, Finding):
        yield listed or Finding("warning", "nodes", "are not there")
        return
    for stage in STAGES:
        pod = cluster.stage(stage)
        if pod.gpus:
            yield _pool(stage, pod, cluster, listed.items)


def _pool(stage: str, pod: StageResources, cluster: ClusterSettings, nodes: list[Any]) -> Finding:
    labels, accepted = node_selector(cluster, pod), tolerations(cluster, pod)
    what = f"nodes for {stage}"
    matching = [node for node in nodes if labels.items() <= (node.metadata.labels or {}).items()]
    if not matching:
        wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
        return Finding("warning", what, f"none has the labels {wanted} (a pool may be scaled to zero)",
                       "kubectl get nodes --show-labels; cluster.preset, gpu_type, node_selector")  # fmt: skip
    open_ones = [node for node in matching if not _closed(node, accepted)]
    if not open_ones:
        taints = ", ".join(sorted({key for node in matching for key in _closed(node, accepted)}))
        return Finding("failure", what, f"all {len(matching)} have taints it does not accept: {taints}",
                       f'cluster.{stage}.tolerations = [{{ key = "{taints.split(", ")[0]}" }}]')  # fmt: skip
    most = max(quantity(str((node.status.allocatable or {}).get(pod.gpu_resource, "0"))) for node in open_ones)
    if most < pod.gpus:
        return Finding("failure", what, f"it wants {pod.gpus} {pod.gpu_resource}, the largest has {most:.0f}",
                       f"lower cluster.{stage}.gpus, or install the GPU operator")  # fmt: skip
    return Finding("ok", what, f"{len(open_ones)} with up to {most:.0f} {pod.gpu_resource}")


def _closed(node: Any, accepted: list[Toleration]) -> list[str]:
    """Keys of the node's taints that keep the pod away."""
    taints = [taint for taint in node.spec.taints or [] if taint.effect in ("NoSchedule", "NoExecute")]
    return [taint.key for taint in taints if not any(_accepts(found, taint) for found in accepted)]


def _accepts(toleration: Toleration, taint: Any) -> bool:
    same_value = toleration.operator == "Exists" or toleration.value == taint.value
    return toleration.key == taint.key and same_value and toleration.effect in (None, taint.effect)


def quotas(core: Any, namespace: str, settings: PipelineSettings) -> Iterator[Finding]:
    """Whether the namespace's quotas leave room for what a run takes at its widest."""
    listed = read("quotas", lambda: core.list_namespaced_resource_quota(namespace))
    if listed is None or isinstance(listed, Finding):
        yield listed or Finding("ok", "quotas", "none")
        return
    wanted = demand(settings)
    for item in listed.items:
        for resource, hard in sorted((item.status.hard or {}).items()):
            if resource not in wanted:
                continue
            left = quantity(hard) - quantity((item.status.used or {}).get(resource, "0"))
            enough, takes = left >= wanted[resource], _shown(wanted[resource])
            yield Finding("ok" if enough else "failure", f"quota {item.metadata.name}, {resource}",
                          f"{_shown(left)} of {hard} are left, a run takes {takes}",
                          "" if enough else "wait for other runs, or raise the quota: docs/operations.md")  # fmt: skip


def _shown(amount: float) -> str:
    return f"{amount / 2**30:.0f}Gi" if amount >= 2**30 else f"{amount:g}"


def demand(settings: PipelineSettings) -> dict[str, float]:
    """What a run takes of a quota's resources while its rollouts or its update go on, whichever is more; both with
    staleness 1. Kubeflow's own containers, which ask for little, are not counted, their pods are."""
    cluster, nodes = settings.cluster, settings.update.nodes

    def widest(amount: Callable[[StageResources], float]) -> float:
        sampling, training = amount(cluster.rollout) * settings.shards, amount(cluster.update) * nodes
        return sampling + training if settings.staleness else max(sampling, training)

    cpu, memory = widest(lambda pod: quantity(pod.cpu)), widest(lambda pod: quantity(pod.memory))
    names = {"cpu": cpu, "requests.cpu": cpu, "memory": memory, "requests.memory": memory, "limits.memory": memory}
    gpus = {pod.gpu_resource for pod in (cluster.rollout, cluster.update)}
    names |= {f"requests.{name}": widest(lambda pod, name=name: pod.gpus * (pod.gpu_resource == name)) for name in gpus}
    return names | {"pods": widest(lambda _: 2)}  # a task is a driver and a stage
