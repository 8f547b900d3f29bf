"""A small HTTP server that speaks the Kubeflow Pipelines v2beta1 and Kubernetes calls the client makes, with faults."""

import json
import re
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml
from kubernetes import client as kubernetes_client

KFP = "/apis/v2beta1"


class Cluster:
    """A pretended cluster. `faults`: path part, or method and path part → statuses (or "drop") answered instead of
    doing what was asked; `lost`: the same, answered after it was done."""

    def __init__(self):
        self.pipelines, self.versions, self.experiments, self.runs, self.recurring = {}, {}, {}, {}, {}
        self.pods, self.logs, self.train_jobs = [], {}, {}
        self.events, self.workflows, self.objects, self.denied = [], {}, {}, set()
        self.cuts = {}  # pod → characters after which a followed log breaks off, a connection each
        self.on_train_job = lambda job: None  # what Kubeflow Trainer would do
        self.faults, self.lost, self.requests, self.token, self.cookie = {}, {}, [], None, None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def counted(self, method, part):
        return sum(1 for verb, path in self.requests if verb == method and part in path)


def task_details(**states):
    """Tasks of a run as Kubeflow 2.17 reports them: Argo's nodes by their own names, in no order, without errors.

    states: key of a task in the IR, `_` for `-`, and its state.
    """
    nodes = [("root", "RUNNING", 0), ("root-driver", "SUCCEEDED", 0), ("grpo-f-x7k2p", "RUNNING", 0)]
    for number, (key, state) in enumerate(states.items(), 1):
        name = key.replace("_", "-")
        nodes += [(f"{name}-driver", "SUCCEEDED", number), (name, state, number), ("executor", state, number)]
        nodes.append(("executor(0)", state, number))
    return {"task_details": [
        {"display_name": name, "state": state, "start_time": f"2026-01-01T00:00:{second:02d}Z",
         "create_time": "2026-01-01T00:00:00Z", "end_time": f"2026-01-01T00:00:{second + 2:02d}Z"}
        for name, state, second in sorted(nodes)
    ]}  # fmt: skip


def write_kubeconfig(cluster, folder, monkeypatch):
    """Makes a kubeconfig of this cluster the one that clients find."""
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": cluster.url}}], "users": [{"name": "u", "user": {}}],
    }))  # fmt: skip
    for module in ("kubernetes.config", "kubernetes.config.kube_config"):
        monkeypatch.setattr(f"{module}.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    monkeypatch.setattr(kubernetes_client.Configuration, "_default", None)


def _now():
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _handler(cluster):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _answer(self, value, status=200):
            body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _stream(self, parts):
            """Pieces of a text as they come; None breaks the connection."""
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in [*parts, ""] if isinstance(parts, list) else parts:
                if part is None:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                data = part.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

        def _body(self):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _fails(self, faults, path):
            """Whether a fault was answered."""
            for where, statuses in faults.items():
                method, part = where if isinstance(where, tuple) else (self.command, where)
                if method == self.command and part in path and statuses:
                    status = statuses.pop(0)
                    if status == "drop":
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return True
                    status, answer = status if isinstance(status, tuple) else (status, {"error": f"pretended {status}"})
                    self._answer(answer, status)
                    return True
            return False

        def _serve(self):
            parts = urlsplit(re.sub(r"^/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy/?", "", self.path))
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            cluster.requests.append((self.command, parts.path))
            body = self._body()
            if self._fails(cluster.faults, parts.path):
                return
            if cluster.cookie and self.headers.get("Cookie") != cluster.cookie:
                self._answer({"error": "no session"}, 401)
                return
            if cluster.token and self.headers.get("Authorization") != f"Bearer {cluster.token}":
                self._answer({"error": "token expired"}, 401)
                return
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and method == self.command:
                    answer = action(cluster, query, body, *match.groups())
                    if self._fails(cluster.lost, parts.path):
                        return
                    if isinstance(answer, tuple):
                        self._answer(*answer)
                    elif isinstance(answer, Stream):
                        self._stream(answer.parts)
                    else:
                        self._answer(answer)
                    return
            self._answer({"error": f"no {self.command} {parts.path} here"}, 404)

        do_GET = do_POST = do_DELETE = do_PATCH = _serve

    return Handler


class Stream:
    """An answer that comes in pieces."""

    def __init__(self, parts):
        self.parts = parts


def _name_in(query):
    predicates = json.loads(query.get("filter", "{}")).get("predicates", [])
    return next((p["stringValue"] for p in predicates if p["key"] == "display_name"), None)


def _ir(body):
    text = body.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0].decode()
    pipeline, *platform = list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    return {"pipeline_spec": pipeline, "platform_spec": platform[0]} if platform else pipeline


def _list_pipelines(cluster, query, _):
    wanted = _name_in(query)
    return {"pipelines": [p for p in cluster.pipelines.values() if wanted in (None, p["display_name"])]}


def _upload(cluster, query, body):
    if query["name"] in [pipeline["display_name"] for pipeline in cluster.pipelines.values()]:
        return {"error": "exists"}, 409
    pipeline = {"pipeline_id": str(uuid.uuid4()), "display_name": query["name"], "created_at": _now()}
    cluster.pipelines[pipeline["pipeline_id"]] = pipeline
    _add_version(cluster, pipeline["pipeline_id"], query["name"], body)
    return pipeline


def _add_version(cluster, pipeline_id, name, body):
    version = {
        "pipeline_id": pipeline_id, "pipeline_version_id": str(uuid.uuid4()), "display_name": name,
        "created_at": _now(), "pipeline_spec": _ir(body),
    }  # fmt: skip
    cluster.versions[version["pipeline_version_id"]] = version
    return version


def _upload_version(cluster, query, body):
    taken = [v for v in cluster.versions.values() if v["display_name"] == query["name"]]
    return ({"error": "exists"}, 409) if taken else _add_version(cluster, query["pipelineid"], query["name"], body)


def _list_versions(cluster, query, _, pipeline_id):
    """One version a page, so that paging is really used."""
    found = [v for v in cluster.versions.values() if v["pipeline_id"] == pipeline_id]
    start = int(query.get("page_token") or 0)
    more = {"next_page_token": str(start + 1)} if start + 1 < len(found) else {}
    return {"pipeline_versions": found[start : start + 1], **more}


def _create_experiment(cluster, _, body):
    values = json.loads(body)
    experiment = {"experiment_id": str(uuid.uuid4()), "display_name": values["display_name"]}
    cluster.experiments[experiment["experiment_id"]] = experiment
    return experiment


def _list_experiments(cluster, query, _):
    wanted = _name_in(query)
    return {"experiments": [e for e in cluster.experiments.values() if wanted in (None, e["display_name"])]}


def _create_run(cluster, _, body):
    run = json.loads(body) | {"run_id": str(uuid.uuid4()), "state": "RUNNING", "created_at": _now()}
    cluster.runs[run["run_id"]] = run
    return run


def _list_runs(cluster, query, _):
    found = [r for r in cluster.runs.values() if r.get("experiment_id") == query.get("experiment_id")]
    return {"runs": list(reversed(found))}


def _get_run(cluster, _query, _body, run_id):
    return cluster.runs.get(run_id, ({"error": "no such run"}, 404))


def _terminate(cluster, _query, _body, run_id):
    cluster.runs[run_id]["state"] = "CANCELED"
    return {}


def _create_recurring(cluster, _, body):
    made = json.loads(body) | {"recurring_run_id": str(uuid.uuid4()), "status": "ENABLED"}
    cluster.recurring[made["recurring_run_id"]] = made
    return made


def _delete_recurring(cluster, _query, _body, recurring_id):
    del cluster.recurring[recurring_id]
    return {}


def _selected(items, query):
    wanted = dict(part.split("=") for part in query.get("labelSelector", "").split(",") if part)
    found = [item for item in items if wanted.items() <= item["metadata"].get("labels", {}).items()]
    name = dict(part.split("=") for part in query.get("fieldSelector", "").split(",") if part).get("metadata.name")
    return [item for item in found if name in (None, item["metadata"]["name"])]


def _list_pods(cluster, query, _, namespace):
    found = [pod for pod in _selected(cluster.pods, query) if pod["metadata"]["namespace"] == namespace]
    return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": found}


def _pod_log(cluster, query, _, _namespace, name):
    """`logs[name]`: the whole text, or a function that gives what there is so far and whether more comes."""
    if name not in cluster.logs:
        return {"message": f'container "main" in pod "{name}" is waiting to start'}, 400
    source = cluster.logs[name]
    if query.get("follow", "").lower() == "true":
        return Stream(_followed(cluster, name, source))
    text = source()[0] if callable(source) else source
    lines = _stamped(text) if "timestamps" in query else text.splitlines()
    return "\n".join(lines[-int(query["tailLines"]) :] if "tailLines" in query else lines)


def _stamped(text):
    """Each line with a time stamp that grows, as Kubernetes writes them."""
    return [f"2026-01-01T00:{n // 60:02d}:{n % 60:02d}.000000000Z {line}" for n, line in enumerate(text.splitlines())]


def _followed(cluster, name, source):
    cut, sent = (cluster.cuts.get(name) or [None]).pop(0), 0
    while True:
        text, more = source() if callable(source) else (source, False)
        new = "".join(line + "\n" for line in _stamped(text))[sent:]
        if cut is not None and sent + len(new) >= cut:
            yield new[: cut - sent] or "\n"
            yield None
            return
        if new:
            yield new
        sent += len(new)
        if not more:
            yield ""
            return
        time.sleep(0.02)


def _list_train_jobs(cluster, query, _, _namespace):
    return {"items": _selected(list(cluster.train_jobs.values()), query)}


def _create_train_job(cluster, _, body, _namespace):
    job = json.loads(body)
    name = job["metadata"]["name"]
    if name in cluster.train_jobs:
        return {"message": f'trainjobs "{name}" already exists'}, 409
    job["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": _now()}
    cluster.train_jobs[name] = job
    cluster.on_train_job(job)
    return job


def _get_train_job(cluster, _query, _body, _namespace, name):
    return cluster.train_jobs.get(name, ({"message": "not found"}, 404))


def _delete_train_job(cluster, _query, _body, _namespace, name):
    return {} if cluster.train_jobs.pop(name, None) else ({"message": "not found"}, 404)


def _get_workflow(cluster, _query, _body, _namespace, name):
    return cluster.workflows.get(name, ({"message": "not found"}, 404))


def _list_events(cluster, *_):
    return {"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": cluster.events}


def _may(cluster, _query, body):
    """Everything is allowed but what `denied` holds: (verb, resource)."""
    review = json.loads(body)
    asked = review["spec"]["resourceAttributes"]
    resource = "/".join(part for part in (asked["resource"], asked.get("subresource")) if part)
    return review | {"status": {"allowed": (asked["verb"], resource) not in cluster.denied}}


def _object(cluster, _query, _body, *path):
    """`objects`: the end of an address → object or list."""
    return cluster.objects.get("/".join(path), ({"message": f"no {path}"}, 404))


def _account_may(cluster, _query, body, namespace):
    """The same of a service account: (account, verb, resource)."""
    review = json.loads(body)
    asked = review["spec"]["resourceAttributes"]
    resource = "/".join(part for part in (asked["resource"], asked.get("subresource")) if part)
    account = review["spec"]["user"].removeprefix(f"system:serviceaccount:{namespace}:")
    return review | {"status": {"allowed": (account, asked["verb"], resource) not in cluster.denied}}


JOBS = r"/apis/trainer\.kubeflow\.org/v1alpha1/namespaces/([^/]+)/trainjobs"
ROUTES = [
    ("GET", f"{KFP}/healthz", lambda *_: {"multi_user": False}),
    ("GET", f"{KFP}/pipelines", _list_pipelines),
    ("POST", f"{KFP}/pipelines/upload", _upload),
    ("POST", f"{KFP}/pipelines/upload_version", _upload_version),
    ("GET", f"{KFP}/pipelines/([^/]+)/versions", _list_versions),
    ("GET", f"{KFP}/pipelines/[^/]+/versions/([^/]+)", lambda cluster, _q, _b, version: cluster.versions[version]),
    ("GET", f"{KFP}/experiments", _list_experiments),
    ("POST", f"{KFP}/experiments", _create_experiment),
    ("GET", f"{KFP}/runs", _list_runs),
    ("POST", f"{KFP}/runs", _create_run),
    ("GET", f"{KFP}/runs/([^/:]+)", _get_run),
    ("POST", f"{KFP}/runs/([^/:]+):terminate", _terminate),
    ("GET", f"{KFP}/recurringruns", lambda cluster, *_: {"recurringRuns": list(cluster.recurring.values())}),
    ("POST", f"{KFP}/recurringruns", _create_recurring),
    ("DELETE", f"{KFP}/recurringruns/([^/]+)", _delete_recurring),
    ("GET", r"/api/v1/namespaces/([^/]+)/pods", _list_pods),
    ("GET", r"/api/v1/namespaces/([^/]+)/pods/([^/]+)/log", _pod_log),
    ("GET", JOBS, _list_train_jobs),
    ("POST", JOBS, _create_train_job),
    ("GET", JOBS + r"/([^/]+)", _get_train_job),
    ("DELETE", JOBS + r"/([^/]+)", _delete_train_job),
    ("GET", r"/apis/argoproj\.io/v1alpha1/namespaces/([^/]+)/workflows/([^/]+)", _get_workflow),
    ("GET", r"/api/v1/namespaces/([^/]+)/events", _list_events),
    ("POST", r"/apis/authorization\.k8s\.io/v1/selfsubjectaccessreviews", _may),
    ("POST", r"/apis/authorization\.k8s\.io/v1/namespaces/([^/]+)/localsubjectaccessreviews", _account_may),
    ("GET", r"/(?:api/v1|apis/[^/]+/v[^/]+)/(?:namespaces/[^/]+/)?([^/]+)", _object),
    ("GET", r"/(?:api/v1|apis/[^/]+/v[^/]+)/(?:namespaces/[^/]+/)?([^/]+)/([^/]+)", _object),
]
