"""Runs in the environment that has vLLM: samples each policy of a plan and writes what came out.

python vllm_probe.py plan.json out.json; the plan is {"policies": [{"folder", "rounds": [{"settings", "requests"}]}]}.
"""

import json
import sys
import time
from pathlib import Path

from components.rollout.config import RolloutSettings
from components.rollout.engines import start_engine
from components.rollout.sampler import SampleRequest, Sampling


def requests_of(entries: list[dict]) -> list[SampleRequest]:
    """Requests as the plan has them."""
    samplings: dict[str, Sampling] = {}
    found = []
    for entry in entries:
        key = json.dumps(entry["sampling"], sort_keys=True)
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in entry["sampling"].items()}
        sampling = samplings.setdefault(key, Sampling(**values))
        found.append(
            SampleRequest(entry["prompt_id"], entry["sample_index"], entry["prompt_ids"], entry["seed"], sampling)
        )
    return found


def probe(policy: dict) -> dict:
    """Starts an engine for one policy and draws each of its rounds."""
    started = time.monotonic()
    rounds = [requests_of(entries) for entries in policy["rounds"]]
    settings = RolloutSettings.model_validate(policy.get("settings", {}))
    engine = start_engine(
        "vllm", settings, Path(policy["folder"]), None, lambda ids: [""], longest=64, num_requests=256
    )
    outcome = {"start_seconds": time.monotonic() - started, "digests": engine._digests, "rounds": []}
    if "swapped_adapter" in policy:  # after the start: the requests must still get the one that was there
        Path(policy["folder"], "adapter/adapter_model.safetensors").write_bytes(
            Path(policy["swapped_adapter"]).read_bytes()
        )
    outcome["compile_key"] = engine.llm.llm_engine.vllm_config.compute_hash()
    for requests in rounds:
        found, in_flight = {}, []
        for batch in engine.sample(requests):
            found |= {id(c.request): c for c in batch}
            in_flight.append(engine.tokens_in_flight())
        outcome.setdefault("in_flight", []).append(in_flight)
        completions = [found[id(request)] for request in requests]
        outcome["rounds"].append([[c.completion_ids, c.logprobs, c.finish_reason, c.error] for c in completions])
    engine.close()
    return outcome


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    results = []
    for policy in plan["policies"]:
        try:
            results.append(probe(policy))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    Path(sys.argv[2]).write_text(json.dumps(results))
