"""Sampling from a running server that speaks the OpenAI completions protocol with token ids: vLLM, SGLang.

One request a sample, each with its own seed, many in flight. The server must return token ids (`token_ids`, as vLLM
does for `return_token_ids`, or tokens written `token_id:17`) and log-probabilities of the processed distribution.
"""

import json
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from components.common.errors import DigestMismatch, SettingsError, StageError
from components.common.manifest import Manifest
from components.rollout.config import RolloutSettings
from components.rollout.sampler import Completion, Load, SampleRequest, Sampling, checked

log = logging.getLogger("grpo")

_SHORTEST_DIGEST = 12
"""Hex digits a model's name must share with the policy's digest to count as proof."""
_PROTOCOL = "rollout.openai.base_url must lead to an OpenAI-compatible completions API, up to and including /v1"
_RETRIED = (408, 409, 429, 500, 502, 503, 504)


class OpenaiSampler:
    """Asks a server for completions of the policy in `manifest`."""

    def __init__(self, settings: RolloutSettings, manifest: Manifest) -> None:
        import urllib3

        self.settings = settings.openai
        if self.settings.base_url is None:
            raise SettingsError(
                'rollout.engine = "openai" needs rollout.openai.base_url, as in "http://vllm.models:8000/v1"'
            )
        self.load = Load()
        retries = urllib3.Retry(
            total=self.settings.retries, backoff_factor=0.5, status_forcelist=_RETRIED,
            allowed_methods=None, raise_on_status=False,
        )  # fmt: skip
        key = os.environ.get(self.settings.api_key_env)
        self._http = urllib3.PoolManager(
            maxsize=self.settings.concurrency, block=True, retries=retries,
            timeout=urllib3.Timeout(connect=10, read=self.settings.timeout_seconds),
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        )  # fmt: skip
        self.model, self.proof = self._choose_model(manifest)

    def held_digest(self, manifest: Manifest, policy: Path) -> str:
        """The policy's digest, where the served model's name proves it or proof was waived."""
        if self.proof == "none":
            log.warning("the server does not say which weights it serves; they are taken for those asked for")
        return manifest.digest

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[list[Completion]]:
        """Sends every request, `concurrency` at a time, and yields answers as they come."""
        for sampling in dict.fromkeys(request.sampling for request in requests):
            self._check_processed(next(request for request in requests if request.sampling == sampling))
        answers: SimpleQueue[Completion | Exception] = SimpleQueue()
        unasked, seats = deque(requests), self.settings.concurrency
        try:
            for _ in range(min(seats, len(requests))):  # daemons: whoever stops does not wait for a slow server
                threading.Thread(target=self._ask, args=(unasked, answers), daemon=True).start()
            for done in range(len(requests)):
                left = len(requests) - done
                self.load = Load(running=min(seats, left), waiting=max(0, left - seats))
                while (answer := _next(answers)) is None:
                    yield []
                if isinstance(answer, Exception):
                    raise answer
                yield [answer]
        finally:
            unasked.clear()
            self.load = Load()

    def tokens_in_flight(self) -> int:
        """A server tells of an answer when it is whole."""
        return 0

    def close(self) -> None:
        """Closes the connections."""
        self._http.clear()

    def _ask(self, unasked: "deque[SampleRequest]", answers: "SimpleQueue[Completion | Exception]") -> None:
        """One seat: asks what nobody has asked yet, until there is nothing left."""
        while True:
            try:
                request = unasked.popleft()
            except IndexError:
                return
            try:
                answers.put(self._complete(request))
            except Exception as error:  # a thread's error must reach the caller, whatever it is, or it waits forever
                answers.put(error)

    def _complete(self, request: SampleRequest) -> Completion:
        import urllib3

        try:
            status, data = self._call("POST", "/completions", self._body(request))
        except urllib3.exceptions.HTTPError as error:
            return Completion.failed(request, f"the server did not answer: {error}")
        if status != 200:
            return Completion.failed(request, f"the server answered {status}: {_message(data)}")
        choice = _choice(data)
        if choice.get("finish_reason") not in ("stop", "length"):
            return Completion.failed(request, f"the server ended the request with {choice.get('finish_reason')!r}")
        ids, logprobs = parse_choice(choice)
        return checked(Completion(request, ids, logprobs, choice["finish_reason"]))

    def _body(self, request: SampleRequest, *, logprobs: int = 0) -> dict[str, Any]:
        sampling = request.sampling
        body = {
            "model": self.model, "prompt": list(request.prompt_ids), "seed": request.seed, "logprobs": logprobs,
            "max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "stop_token_ids": list(sampling.stop_token_ids), "return_token_ids": True,
            "return_tokens_as_token_ids": True, "skip_special_tokens": False, "add_special_tokens": False,
        }  # fmt: skip
        body |= {"top_k": sampling.top_k} if sampling.top_k is not None else {"top_k": -1}
        return body | ({"stop": list(sampling.stop)} if sampling.stop else {})

    def _check_processed(self, request: SampleRequest) -> None:
        """Asks one question at two temperatures: raw log-probabilities answer it alike, processed ones do not.

        Raises:
            StageError: the server reports raw log-probabilities where the sampling needs processed ones.
        """
        sampling = request.sampling
        if sampling.temperature in (0.0, 1.0) and sampling.top_p == 1 and sampling.top_k is None:
            return  # raw and processed are the same
        tops = []
        for temperature in (1.0, 0.5):
            plain = Sampling(temperature=temperature, max_tokens=1)
            tops.append(self._top_logprobs(replace(request, sampling=plain)))
        if tops[0] == tops[1]:
            raise StageError(
                "the server's log-probabilities do not follow the temperature, so they are not those of the sampling "
                "distribution: start it with --logprobs-mode processed_logprobs, or sample at temperature 1 with "
                "neither top_p nor top_k"
            )

    def _top_logprobs(self, request: SampleRequest) -> dict[str, float]:
        """Log-probabilities of the likeliest first tokens. Raises StageError when the server does not give them."""
        import urllib3

        try:
            status, data = self._call("POST", "/completions", self._body(request, logprobs=2))
        except urllib3.exceptions.HTTPError as error:
            raise StageError(f"the server did not answer a first question: {error}") from None
        if status != 200:
            raise StageError(f"the server answered {status} to a first question: {_message(data)}")
        match _logprobs(_choice(data)).get("top_logprobs"):
            case [{**top}, *_] if top:
                return top
        raise StageError(
            "the server gives no top_logprobs, so nothing shows whether its log-probabilities follow the temperature: "
            "sample at temperature 1 with neither top_p nor top_k, or from another server"
        )

    def _choose_model(self, manifest: Manifest) -> tuple[str, str]:
        """Name of the model to ask for, and how it is known to be the policy: by its `name`, or not (`none`)."""
        import urllib3

        try:
            status, data = self._call("GET", "/models")
        except urllib3.exceptions.HTTPError as error:
            raise StageError(f"no server at rollout.openai.base_url = {self.settings.base_url}: {error}") from None
        if status != 200:
            raise StageError(f"{self.settings.base_url}/models answered {status}: {_message(data)}")
        try:
            names = {model["id"]: f"{model['id']} {model.get('root', '')}" for model in data["data"]}
        except (KeyError, TypeError, AttributeError):
            raise StageError(
                f"{self.settings.base_url}/models lists no models but {_message(data)}: {_PROTOCOL}"
            ) from None
        return choose_model(names, self.settings.model, manifest.digest, self.settings.allow_unproven)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        encoded = None if body is None else json.dumps(body).encode()
        answer = self._http.request(method, self.settings.base_url.rstrip("/") + path, body=encoded)
        try:
            return answer.status, answer.json()
        except ValueError:
            return answer.status, {"message": answer.data[:200].decode(errors="replace")}


def choose_model(names: dict[str, str], wanted: str | None, digest: str, allow_unproven: bool) -> tuple[str, str]:
    """Picks one of the served models (`names`: id → all it is known by) and says what proves that it is the policy.

    Raises:
        SettingsError: the wanted model is not served, or there are several and none is named.
        DigestMismatch: the model's name holds the digest of another policy.
        StageError: the name proves nothing and proof was not waived.
    """
    if wanted is not None and wanted not in names:
        raise SettingsError(f"rollout.openai.model = {wanted!r} is not served; the server has {', '.join(names)}")
    proven = [name for name, known in names.items() if _digest_in(known, digest)]
    if wanted is None and not proven and len(names) != 1:
        raise SettingsError(f"the server has several models ({', '.join(names)}): name one in rollout.openai.model")
    model = wanted or (proven or list(names))[0]
    if model in proven:
        return model, "name"
    if foreign := re.search(rf"(?:blake3:|policy-)([0-9a-f]{{{_SHORTEST_DIGEST},64}})", names[model]):
        raise DigestMismatch(
            f"the server serves policy {foreign[1]}, but {digest} is to be sampled: load that one first"
        )
    if not allow_unproven:
        hexadecimal = digest.rpartition(":")[2]
        raise StageError(
            f"nothing shows that the server's model {model!r} is policy {digest}: serve it under a name that holds its "
            f"digest, as --served-model-name policy-{hexadecimal[:16]}, or set rollout.openai.allow_unproven = true"
        )
    return model, "none"


def parse_choice(choice: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Token ids and log-probabilities of an answer.

    Raises:
        StageError: the server leaves either out; nothing can be learnt from its samples then.
    """
    logprobs = _logprobs(choice)
    ids = choice.get("token_ids")
    if ids is None:
        tokens = logprobs.get("tokens")  # none of an answer that is empty
        marked = [re.fullmatch(r"token_id:(\d+)", str(token)) for token in tokens or ()]
        if tokens is None or not all(marked):
            raise StageError("the server's answers have no token ids: vLLM from 0.10.2 returns them")
        ids = [int(match[1]) for match in marked]
    values = logprobs["token_logprobs"]
    if len(ids) != len(values):
        raise StageError(f"the server gave {len(ids)} token ids and {len(values)} log-probabilities for one completion")
    return list(ids), [float("nan") if value is None else float(value) for value in values]


def _next(answers: "SimpleQueue[Completion | Exception]") -> Completion | Exception | None:
    """The next answer; None when there is none for a second."""
    try:
        return answers.get(timeout=1)
    except Empty:
        return None


def _choice(data: Any) -> dict[str, Any]:
    match data:
        case {"choices": [{**choice}, *_]}:
            return choice
    raise StageError(f"the server's answer has no choices but {_message(data)}: {_PROTOCOL}")


def _logprobs(choice: dict[str, Any]) -> dict[str, Any]:
    found = choice.get("logprobs")
    if not isinstance(found, dict) or not isinstance(found.get("token_logprobs"), list):
        raise StageError("the server answers without log-probabilities, which training needs: serve with them enabled")
    return found


def _digest_in(text: str, digest: str) -> bool:
    hexadecimal = digest.rpartition(":")[2]
    return any(hexadecimal.startswith(run) for run in re.findall(rf"[0-9a-f]{{{_SHORTEST_DIGEST},64}}", text))


def _message(data: Any) -> str:
    error = data.get("error", data) if isinstance(data, dict) else data
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
