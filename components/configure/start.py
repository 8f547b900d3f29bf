"""The policy a run starts from: base model, last checkpoint or champion, and what belongs to it."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.champion import read as read_champion
from components.common.errors import ArtifactNotFound, DataError
from components.common.manifest import SCORED_BEFORE, Manifest, manifest_key
from components.common.store import Store
from components.configure.config import RunSettings

log = logging.getLogger("grpo")

POLICY_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""Files of a model folder that make a policy; nothing executable among them."""
INDEX = "model.safetensors.index.json"
"""File of a model in several shards that says which tensor lies in which."""
RESTS_ON = ("model", "start_from", "start_run")
"""Settings that the start policy depends on; a run may be resumed with others mended."""


@dataclass(frozen=True)
class Start:
    """Where a run takes up: the policy, and the optimizer state and history that go with it."""

    policy: Manifest
    optimizer: Manifest | None
    history: Manifest | None
    reference: Manifest | None
    """Start policy of the whole fine-tune."""


def model_files(model: str, work_dir: Path) -> dict[str, Path]:
    """Files of a base model given as local folder, `s3://` prefix or hub id.

    Raises:
        DataError: no such model, or weights, config or tokenizer missing.
    """
    folder = Path(model)
    if model.startswith("s3://"):
        folder = _from_s3(model, work_dir / "model")
    elif not folder.is_dir():
        if model.startswith((".", "/")):
            raise DataError(f"model: no folder {model}; give a local folder, s3://bucket/prefix or a hub id")
        folder = _from_hub(model)
    files = {path.name: path for pattern in POLICY_PATTERNS for path in sorted(folder.glob(pattern))}
    files.pop("model_index.json", None)
    _check(files, model)
    return files


def _check(files: dict[str, Path], model: str) -> None:
    if "config.json" not in files:
        raise DataError(f"model {model}: no config.json; want a folder as `save_pretrained` writes it")
    if not any(name.endswith(".safetensors") for name in files):
        raise DataError(
            f"model {model}: no weights (*.safetensors); pickled weights are refused: load the model and save it again "
            "with `save_pretrained`"
        )
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(files):
        raise DataError(f"model {model}: no tokenizer (tokenizer.json); save it there too with `save_pretrained`")
    if INDEX in files:
        shards = _json(files[INDEX]).get("weight_map", {}).values()
        missing = sorted({str(shard) for shard in shards} - set(files))
        if missing:
            raise DataError(
                f"model {model}: {INDEX} names {', '.join(missing)}, and the folder has no such file; "
                "fetch or save the model anew"
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{path} is not JSON ({error}); save the model anew with `save_pretrained`") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds a {type(values).__name__}, want a JSON object; save the model anew")
    return values


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(POLICY_PATTERNS)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"model {model}: neither a local folder nor to be had from the hub ({type(error).__name__}); "
            "check the name, the network and HF_TOKEN"
        ) from error


def _from_s3(url: str, folder: Path) -> Path:
    from components.common.store import open_store

    store = open_store(url)
    folder.mkdir(parents=True)
    for stat in store.list(""):
        name = stat.key.rpartition("/")[2]
        if "/" not in stat.key and any(Path(name).match(pattern) for pattern in POLICY_PATTERNS):
            store.get_file(stat.key, folder / name)
    return folder


def describe(files: dict[str, Path]) -> dict[str, Any]:
    """What later stages and checks want to know of a model: architecture, context length, vocabulary."""
    config = _json(files["config.json"])
    text = config.get("text_config", config)
    return {
        "architecture": (config.get("architectures") or ["unknown"])[0],
        "max_position_embeddings": text.get("max_position_embeddings"),
        "vocab_size": text.get("vocab_size"),
    }


def taken_up(store: Store, settings: RunSettings, run: str) -> Start | None:
    """What this run itself took up before: a run that is resumed keeps its start, whatever was published since."""
    wanted = settings.model_dump(mode="json", include=set(RESTS_ON))
    listed = store.list(f"manifests/{settings.fine_tune}/{run}/")
    for key in [stat.key for stat in listed if stat.key.endswith("/history.json")]:
        history, here = _manifest(store, key), key.rpartition("/")[0]
        policy = _manifest(store, f"{here}/policy.json")
        if policy and history and wanted.items() <= history.metadata["settings"].items():
            optimizer, reference = (_manifest(store, f"{here}/{name}.json") for name in ("optimizer", "reference"))
            return Start(policy, optimizer, history, reference)
    return None


def latest(store: Store, fine_tune: str, *, but_run: str, run: str | None = None) -> Start:
    """The last checkpoint of a run of a fine-tune, or of the newest run but `but_run`.

    Raises:
        ArtifactNotFound: there is none.
    """
    keys = [(key.split("/")[2], key) for key in _policy_keys(store, fine_tune)]
    found = [key for name, key in keys if (name == run if run else name != but_run)]
    policies = [Manifest.parse(store.get_bytes(key), where=key) for key in found]
    if not policies:
        whose = f"run {run} of fine-tune {fine_tune}" if run else f"fine-tune {fine_tune}"
        raise ArtifactNotFound(f'{whose} has no checkpoint to go on from; use start_from = "base"')
    newest = max(policies, key=lambda manifest: (manifest.created, manifest.iteration or 0))
    return start_at(store, newest)


def policy_iterations(store: Store, fine_tune: str, run: str) -> list[int]:
    """Iterations of the policies that a run has published."""
    return [int(key.split("/")[3]) for key in _policy_keys(store, fine_tune) if key.split("/")[2] == run]


def champion(store: Store, fine_tune: str) -> Start | None:
    """The accepted policy of a fine-tune, with a fresh optimizer; None before the first, which starts from the base."""
    present = read_champion(store, fine_tune)
    if present is None:
        log.info("fine-tune %s has no champion yet: starting from the base model", fine_tune)
        return None
    policy = Manifest.parse(store.get_bytes(present.manifest), where=present.manifest)
    return start_at(store, policy, with_optimizer=False)


def start_at(store: Store, policy: Manifest, *, with_optimizer: bool = True) -> Start:
    """What lies beside a policy in the store."""
    folder = f"manifests/{policy.fine_tune}/{policy.run}"
    here = f"{folder}/{policy.iteration or 0:04d}"
    optimizer = _manifest(store, f"{here}/optimizer.json") if with_optimizer else None
    history = _manifest(store, f"{here}/evaluation.json") or _newest(store, folder, "evaluation")
    history = history or _newest(store, folder, "history")  # what the run itself began with
    return Start(policy, optimizer, history, _newest(store, folder, "reference"))


def scored_before(store: Store, policy: Manifest, *, keep: int = 2) -> list[dict[str, Any]]:
    """The scored rollouts of the iterations before a policy, the newest first; what chooses prompts goes on from them.

    With staleness 1 two chains of rollouts take turns, so there are two. They may be of several runs: those of a run
    before are in the metadata that its successor's policies carry.
    """
    carried = {entry["iteration"]: entry for entry in policy.metadata.get(SCORED_BEFORE, ())}
    found = []
    for iteration in range((policy.iteration or 0) - 1, (policy.iteration or 0) - 1 - keep, -1):
        key = manifest_key(policy.fine_tune, policy.run, iteration, "scored")
        scored = _manifest(store, key) if iteration >= 0 else None
        if scored is not None:
            found.append({"iteration": iteration, "manifest": key, "digest": scored.digest})
        elif iteration in carried:
            found.append(carried[iteration])
    return found


def _newest(store: Store, folder: str, name: str) -> Manifest | None:
    keys = [stat.key for stat in store.list(folder + "/") if stat.key.endswith(f"/{name}.json")]
    return _manifest(store, max(keys)) if keys else None


def _policy_keys(store: Store, fine_tune: str) -> Iterator[str]:
    pattern = re.compile(r"manifests/[^/]+/[^/]+/\d{4,}/policy\.json")
    return (stat.key for stat in store.list(f"manifests/{fine_tune}/") if pattern.fullmatch(stat.key))


def _manifest(store: Store, key: str) -> Manifest | None:
    try:
        return Manifest.parse(store.get_bytes(key), where=key)
    except ArtifactNotFound:
        return None
