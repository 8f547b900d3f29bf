"""The engine for running servers: against a real vLLM server, and against servers that misbehave."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from components.common.errors import DigestMismatch, HealthError, SettingsError, StageError
from components.common.manifest import Manifest
from components.common.store import open_store
from components.rollout.config import RolloutSettings
from components.rollout.draw import processed_logprobs
from components.rollout.openai_sampler import OpenaiSampler, choose_model
from components.rollout.sampler import SampleRequest, Sampling, sample_seed
from components.rollout.transformers_sampler import TransformersSampler
from tests.ports import held_port

END = 1
DIGEST = "blake3:" + "0123456789abcdef" * 4


def requests(sampling: Sampling, num_prompts: int = 10) -> list[SampleRequest]:
    """Four samples a prompt."""
    return [
        SampleRequest(
            str(number), index, tuple(random.Random(number).choices(range(2, 32), k=2 + number % 5)),
            sample_seed(0, "train", 0, str(number), index), sampling,
        )
        for number in range(num_prompts) for index in range(4)
    ]  # fmt: skip


def settings(port: int, **changes) -> RolloutSettings:
    values = {"base_url": f"http://127.0.0.1:{port}/v1", "concurrency": 8} | changes
    return RolloutSettings.model_validate({"engine": "openai", "openai": values})


def manifest(job) -> Manifest:
    return Manifest.load(job.policy)


def serve(python: str, policy: Path, name: str, folder: Path, port: int, *options: str) -> subprocess.Popen:
    """Starts vLLM's own server; the caller waits for it."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(policy), "--served-model-name", name,
        "--port", str(port), "--host", "127.0.0.1", "--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32",
        "--max-model-len", "64", "--generation-config", "vllm", "--no-enable-chunked-prefill",
        "--max-num-batched-tokens", "4096", *options,
    ]  # fmt: skip
    log = (folder / f"{name}.log").open("w")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def wait_until_up(server: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def policy_digest(policy_dir, tmp_path_factory) -> str:
    """Digest the policy has once it is published."""
    from components.common.artifacts import upload
    from components.common.manifest import content_digest
    from components.common.store import open_store

    store = open_store(f"file://{tmp_path_factory.mktemp('store')}")
    return content_digest("policy", upload(store, {path.name: path for path in policy_dir.iterdir()}))


@pytest.fixture(scope="module")
def real_server(vllm_python, policy_dir, policy_digest, tmp_path_factory):
    """Port of a vLLM server that serves the policy under a name that holds its digest."""
    folder = tmp_path_factory.mktemp("server")
    name = "policy-" + policy_digest.removeprefix("blake3:")[:16]
    with held_port() as port:
        server = serve(vllm_python, policy_dir, name, folder, port, "--logprobs-mode", "processed_logprobs")
        try:
            wait_until_up(server, port, folder / f"{name}.log")
            yield port
        finally:
            server.terminate()
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=1.0, max_tokens=12, stop_token_ids=(END,)),
    Sampling(temperature=0.7, max_tokens=12, stop_token_ids=(END,), top_p=0.9, top_k=12),
], ids=str)  # fmt: skip
def test_a_real_server_samples_the_policy(real_server, make_job, policy_dir, sampling):
    sampler = OpenaiSampler(settings(real_server), manifest(make_job()))
    assert sampler.proof == "name"
    wanted = requests(sampling)
    completions = [c for batch in sampler.sample(wanted) for c in batch]
    assert {id(c.request) for c in completions} == {id(request) for request in wanted}
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    model = TransformersSampler(policy_dir, RolloutSettings(), str).model
    for c in completions:
        ids = torch.tensor([list(c.request.prompt_ids) + c.completion_ids])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(c.request.prompt_ids) - 1 : -1]
        expected = processed_logprobs(logits, sampling).gather(1, torch.tensor(c.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=1e-4, rtol=0)
        assert (c.completion_ids[-1] == END) == (c.finish_reason == "stop")
    again = [c for batch in sampler.sample(wanted) for c in batch]
    by_request = {id(c.request): c.completion_ids for c in completions}
    assert all(by_request[id(c.request)] == c.completion_ids for c in again)
    sampler.close()


def test_the_stage_samples_from_a_real_server(real_server, make_job):
    job = make_job()
    result = job.run(engine="openai", openai={"base_url": f"http://127.0.0.1:{real_server}/v1"})
    assert result.metadata["engine"] == "openai"
    assert result.metadata["proof"] == "name"
    rows = job.table(result, "train").to_pylist()
    assert len(rows) == 36
    assert all(len(row["completion_ids"]) == len(row["logprobs"]) > 0 for row in rows)


def test_a_request_the_real_server_refuses_is_a_failed_sample(real_server, make_job):
    sampler = OpenaiSampler(settings(real_server), manifest(make_job()))
    too_long = Sampling(temperature=1.0, max_tokens=1000, stop_token_ids=(END,))
    ((completion,),) = list(sampler.sample(requests(too_long)[:1]))
    assert completion.finish_reason == "error"
    assert re.match(r"the server answered 400: .*64", completion.error)


class Answers(BaseHTTPRequestHandler):
    """A server that answers as its class attributes say."""

    protocol_version = "HTTP/1.1"
    choice: dict = {}
    refusals = 0
    refused_token = None
    slow_from = None
    served = "policy-" + DIGEST.removeprefix("blake3:")[:16]

    def do_GET(self):
        self.answer(200, {"data": [{"id": self.served, "root": "/models/x"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            count = len(server.bodies)
        refuse = count <= self.refusals or self.refused_token in body["prompt"]
        server.closing.wait(0.01 if self.slow_from is None or count < self.slow_from else 600)
        with server.lock:
            server.running -= 1
        self.answer(503, {"error": {"message": "busy"}}) if refuse else self.answer(200, {"choices": [self.choice]})

    def answer(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """Holds as many connections as the tests open at once; five, as usual, are reset now and then on a busy machine."""

    request_queue_size = 128


GOOD = {
    "finish_reason": "stop", "token_ids": [5, 1],
    "logprobs": {"tokens": ["token_id:5", "token_id:1"], "token_logprobs": [-0.5, -0.25], "top_logprobs": [{"5": -1}]},
}  # fmt: skip


@pytest.fixture
def misbehaving():
    """Starts servers of given answers; gives the server, whose requests it keeps."""
    servers = []

    def start(**attributes):
        server = Server(("127.0.0.1", 0), type("Handler", (Answers,), attributes))
        server.lock, server.bodies, server.running, server.most_running = threading.Lock(), [], 0, 0
        server.closing = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()


class Served:
    """What the sampler looks at in a manifest."""

    digest = DIGEST


PLAIN = Sampling(temperature=1.0, max_tokens=4, stop_token_ids=(END,))


def collected(server, sampling=PLAIN, **changes):
    sampler = OpenaiSampler(settings(server.server_port, **changes), Served())
    return [c for batch in sampler.sample(requests(sampling)) for c in batch]


def test_every_sample_is_one_request_with_its_seed_and_no_more_run_than_allowed(misbehaving):
    server = misbehaving(choice=GOOD)
    completions = collected(server, concurrency=3)
    assert len(completions) == 40
    assert sorted(body["seed"] for body in server.bodies) == sorted(request.seed for request in requests(PLAIN))
    assert 1 < server.most_running <= 3
    assert (completions[0].completion_ids, completions[0].logprobs) == ([5, 1], [-0.5, -0.25])


def test_a_busy_server_is_asked_again(misbehaving):
    server = misbehaving(choice=GOOD, refusals=3)
    assert {c.finish_reason for c in collected(server)} == {"stop"}
    assert len(server.bodies) == 43


def test_a_server_that_stays_busy_gives_failed_samples(misbehaving):
    server = misbehaving(choice=GOOD, refusals=10_000)
    completions = collected(server, retries=1, concurrency=40)
    assert {c.error for c in completions} == {"the server answered 503: busy"}


def asked_of(server, **changes) -> dict:
    """Settings of a stage that samples from the server."""
    values = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "retries": 0, "allow_unproven": True}
    return {"engine": "openai", "openai": values | changes, "save_every_seconds": 0}


def test_samples_of_a_server_that_was_down_are_drawn_once_it_is_up(misbehaving, make_job):
    server, job = misbehaving(choice=GOOD, refusals=10_000, served="m"), make_job()
    for _ in range(2):  # the second start finds nothing that would let it pass
        with pytest.raises(
            HealthError, match="50 of 50 samples could not be drawn; the first: the server answered 503"
        ):
            job.run(**asked_of(server))
    server.RequestHandlerClass.refusals = 0
    asked = len(server.bodies)
    result = job.run(**asked_of(server))
    assert len(server.bodies) - asked == 50
    assert result.metrics["rollout/num_failed"] == result.metrics["rollout/eval_num_failed"] == 0


@pytest.mark.parametrize("seconds", [0, 3600])
def test_a_restart_draws_failed_groups_again_and_keeps_the_others(misbehaving, make_job, seconds):
    server, job = misbehaving(choice=GOOD, refused_token=20, served="m"), make_job()
    changes = asked_of(server) | {"save_every_seconds": seconds, "max_failed_share": 0}
    with pytest.raises(HealthError, match="of 50 samples could not be drawn"):
        job.run(**changes)
    refused = [body["seed"] for body in server.bodies if 20 in body["prompt"]]
    assert 0 < len(refused) < 50
    server.RequestHandlerClass.refused_token = None
    server.bodies.clear()
    assert job.run(**changes).metrics["rollout/num_failed"] == 0
    assert sorted(body["seed"] for body in server.bodies) == sorted(refused)


def test_sigterm_does_not_wait_for_a_slow_server(misbehaving, make_job):
    """Eight answers come at once, the others after ten minutes: what is there is saved, and the process ends before.

    One question at a time: of two that are under way the later may come first, and one of the eight would be slow.
    """
    server, job = misbehaving(choice=GOOD, slow_from=9, served="m"), make_job()
    command = [sys.executable, "-m", "components.rollout"]
    changes = asked_of(server, concurrency=1)
    changes |= {"group_size": 2, "save_every_seconds": 3600, "progress_every_seconds": 1e-6}
    for name, value in job.arguments(**changes).items():
        command += ["--" + name, str(value)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in child.stdout:
        if ": 8 of 38 " in line:
            break
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=240)
    assert (child.returncode, "told to end (SIGTERM)" in errors) == (2, True)
    store = open_store(job.context.store)
    (part,) = store.list("partial/")
    assert pq.read_table(io.BytesIO(store.get_bytes(part.key))).num_rows == 8


def test_a_server_without_logprobs_is_refused(misbehaving):
    with pytest.raises(StageError, match="answers without log-probabilities"):
        collected(misbehaving(choice=GOOD | {"logprobs": None}))


def test_token_ids_are_read_from_tokens_written_as_ids(misbehaving):
    choice = {key: value for key, value in GOOD.items() if key != "token_ids"}
    assert collected(misbehaving(choice=choice))[0].completion_ids == [5, 1]


def test_an_empty_answer_is_an_empty_completion(misbehaving, make_job):
    empty = {"finish_reason": "stop", "logprobs": {"tokens": [], "token_logprobs": [], "top_logprobs": []}}
    server = misbehaving(choice=empty, served="m")
    assert {(c.finish_reason, len(c.completion_ids)) for c in collected(server, allow_unproven=True)} == {("stop", 0)}
    metrics = make_job().run(**asked_of(server)).metrics
    assert (metrics["rollout/num_failed"], metrics["rollout/eval_num_failed"]) == (0, 0)


@pytest.mark.parametrize("tokens", [["a", "b"], None])
def test_a_server_without_token_ids_is_refused(misbehaving, tokens):
    choice = GOOD | {"token_ids": None, "logprobs": GOOD["logprobs"] | {"tokens": tokens}}
    with pytest.raises(StageError, match="have no token ids"):
        collected(misbehaving(choice=choice))


def test_raw_logprobs_are_told_from_processed_ones(misbehaving):
    """This server answers alike at every temperature, as one with raw log-probabilities does."""
    with pytest.raises(StageError, match="--logprobs-mode processed_logprobs"):
        collected(misbehaving(choice=GOOD), Sampling(temperature=0.7, max_tokens=4))


def test_nan_from_a_server_is_a_failed_sample(misbehaving):
    choice = GOOD | {"logprobs": GOOD["logprobs"] | {"token_logprobs": [-0.5, None]}}
    assert {c.error for c in collected(misbehaving(choice=choice))} == {"the policy's logits are NaN or infinite"}


def test_no_server_is_told_with_the_setting():
    with pytest.raises(StageError, match=r"no server at rollout\.openai\.base_url = http://127\.0\.0\.1:9/v1"):
        OpenaiSampler(settings(9, retries=0), Served())
    with pytest.raises(SettingsError, match=r"needs rollout\.openai\.base_url"):
        OpenaiSampler(RolloutSettings(engine="openai"), Served())


def test_the_served_name_is_the_proof():
    mine, other = "policy-0123456789abcdef", "policy-fedcba9876543210"
    assert choose_model({mine: mine, "b": "b"}, None, DIGEST, False) == (mine, "name")
    assert choose_model({"a": f"a /cache/{DIGEST[7:]}"}, None, DIGEST, False) == ("a", "name")
    assert choose_model({"a": "a"}, None, DIGEST, True) == ("a", "none")
    with pytest.raises(DigestMismatch, match="serves policy fedcba9876543210"):
        choose_model({other: other}, None, DIGEST, True)
    with pytest.raises(StageError, match="--served-model-name policy-0123456789abcdef, or set"):
        choose_model({"a": "a"}, None, DIGEST, False)
    with pytest.raises(SettingsError, match="the server has a"):
        choose_model({"a": "a"}, "b", DIGEST, False)
    with pytest.raises(SettingsError, match=r"several models \(a, b\)"):
        choose_model({"a": "a", "b": "b"}, None, DIGEST, False)


class Odd(Answers):
    """Answers every question with `value`."""

    value: object = None

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, self.value)


WARM = Sampling(temperature=0.7, max_tokens=4)
WITHOUT_TOPS = {"choices": [GOOD | {"logprobs": GOOD["logprobs"] | {"top_logprobs": None}}]}


@pytest.mark.parametrize(("value", "sampling", "message"), [
    ({"result": 1}, PLAIN, r"answer has no choices but \{'result': 1\}: rollout.openai.base_url must lead to"),
    ({"choices": []}, PLAIN, "answer has no choices"),
    ([], WARM, "answer has no choices"),
    ({"choices": [GOOD | {"logprobs": {"content": []}}]}, PLAIN, "answers without log-probabilities"),
    (WITHOUT_TOPS, WARM, "gives no top_logprobs, so nothing shows"),
    ({"choices": [GOOD | {"logprobs": {"token_logprobs": [-0.5, -0.2]}}]}, WARM, "gives no top_logprobs"),
    ({"choices": [{"finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0]}}]}, PLAIN, "have no token ids"),
])  # fmt: skip
def test_a_server_of_another_protocol_is_told_in_words(misbehaving, monkeypatch, value, sampling, message):
    server = misbehaving()
    server.RequestHandlerClass = type("Handler", (Odd,), {"value": value})
    with pytest.raises(StageError, match=message):
        collected(server, sampling)


def test_a_server_that_is_gone_at_the_first_question_is_told_in_words(misbehaving):
    server = misbehaving()
    sampler = OpenaiSampler(settings(server.server_port, retries=0), Served())
    server.shutdown()
    server.server_close()
    sampler.close()  # the connection that is open would still be answered
    with pytest.raises(StageError, match="the server did not answer a first question"):
        list(sampler.sample(requests(WARM)))


def test_a_list_of_models_of_another_kind_is_told_in_words(misbehaving):
    server = misbehaving()
    server.RequestHandlerClass = type("Handler", (Odd,), {"do_GET": lambda self: self.answer(200, {"models": []})})
    with pytest.raises(StageError, match="lists no models but"):
        OpenaiSampler(settings(server.server_port), Served())
