"""Optimizer state as every rank's own safetensors file and one JSON: no code in it, and fit for any number of ranks.

A parameter's state lies scattered over ranks differently for each ZeRO stage and number of processes. What is stored
does not depend on that: a piece is a run of elements of one named, flattened parameter. Whoever loads takes from all
pieces the elements its own layout wants.

    optimizer.json                          Adam's step (of the critic too), number of ranks
    optimizer-00000-of-00002.safetensors    tensors `<kind>/<parameter>@<first element>`;
                                            kinds exp_avg, exp_avg_sq, master
    critic-00000-of-00002.safetensors       the same of PPO's critic
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from components.common.errors import DataError

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
INDEX = "optimizer.json"
CRITIC = "critic."
"""Names of the critic's parameters begin so."""

Masters = Callable[[str], bool]
"""Of which parameters the float32 weights are stored or taken, by name."""


@dataclass(frozen=True)
class Fragment:
    """A run of elements of one parameter, and where this rank's optimizer keeps them."""

    name: str
    start: int
    """First element, counted in the flattened parameter."""
    numel: int
    size: int
    """Elements of the whole parameter."""
    flat: Tensor
    """Float32 tensor the optimizer steps on; its state is under this key."""
    offset: int
    """First element, counted in `flat`."""

    def of(self, tensor: Tensor) -> Tensor:
        """This run's view of `flat` or of a state tensor of its shape."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def save(
    folder: Path,
    fragments: Iterable[Fragment],
    optimizer: torch.optim.Optimizer,
    *,
    rank: int,
    world_size: int,
    masters: Masters,
    shared: bool,
) -> None:
    """Writes this rank's pieces; rank 0 writes the index too.

    `masters`: of which parameters also the float32 weights. `shared`: every rank has the same fragments (ZeRO 0), so
    they take turns. Moments of an optimizer whose every step was skipped are zeros.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Tensor]] = {"optimizer": {}}
    steps = {"optimizer": 0, "critic": 0}
    for number, fragment in enumerate(fragments):
        state = optimizer.state.get(fragment.flat, {})
        owner = _owner(fragment.name)
        steps[owner] = int(state.get("step", steps[owner]))
        if shared and number % world_size != rank:
            continue
        kinds = {kind: state[kind] if state else torch.zeros_like(fragment.flat) for kind in MOMENTS}
        kinds |= {MASTER: fragment.flat} if masters(fragment.name) else {}
        tensors = files.setdefault(owner, {})
        for kind, tensor in kinds.items():
            tensors[f"{kind}/{fragment.name}@{fragment.start}"] = fragment.of(tensor).cpu().contiguous()
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}-{rank:05d}-of-{world_size:05d}.safetensors")
    if rank == 0:
        index = {"format": 1, "step": steps["optimizer"], "critic_step": steps["critic"], "num_ranks": world_size}
        (folder / INDEX).write_text(json.dumps(index))


def load_masters(folder: Path, names: dict[Tensor, str], *, divided: bool) -> None:
    """Puts stored float32 weights into the parameters of a float32 model that no engine has yet.

    `divided`: over the ranks (ZeRO 3); each parameter is put together for a moment.
    """
    import deepspeed

    with Pieces(folder) as pieces, torch.no_grad():
        for parameter, name in names.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=divided):
                whole = Fragment(name, 0, parameter.numel(), parameter.numel(), parameter, 0)
                pieces.read(MASTER, whole, parameter.view(-1))


def restore(folder: Path, fragments: Iterable[Fragment], optimizer: torch.optim.Optimizer, masters: Masters) -> None:
    """Fills the state of this rank's fragments from the pieces of however many ranks wrote them.

    Raises:
        DataError: the state is of another model, or masters are wanted and there are none.
    """
    with Pieces(folder) as pieces:
        for fragment in fragments:
            state = optimizer.state[fragment.flat]
            if "step" not in state:
                step = pieces.steps[_owner(fragment.name)]
                state["step"] = torch.tensor(float(step), device=_step_device(optimizer, fragment.flat))
                state |= {kind: torch.zeros_like(fragment.flat, requires_grad=False) for kind in MOMENTS}
            for kind in MOMENTS:
                pieces.read(kind, fragment, fragment.of(state[kind]))
            if masters(fragment.name):
                pieces.read(MASTER, fragment, fragment.of(fragment.flat))


def has_critic(folder: Path) -> bool:
    """Whether a critic was trained beside the policy."""
    return any(folder.glob("critic-*.safetensors"))


class Pieces:
    """All ranks' files of a stored state, opened together."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        try:
            index = json.loads((folder / INDEX).read_text())
            self.steps = {"optimizer": int(index["step"]), "critic": int(index.get("critic_step", index["step"]))}
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"optimizer state has no usable {INDEX} ({error}); set carry_optimizer = false") from None
        self.files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self.places: dict[str, list[tuple[int, int, int]]] = {}
        for number, file in enumerate(self.files):
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                name, _, start = key.rpartition("@")
                self.places.setdefault(name, []).append((int(start), file.get_slice(key).get_shape()[0], number))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.clear()

    def read(self, kind: str, fragment: Fragment, target: Tensor) -> None:
        """Copies the elements of `fragment` into `target`, a view of as many."""
        name = f"{kind}/{fragment.name}"
        end, copied = fragment.start + fragment.numel, 0
        for start, numel, number in self.places.get(name, []):
            first, last = max(start, fragment.start), min(start + numel, end)
            if first < last:
                piece = self.files[number].get_slice(f"{name}@{start}")[first - start : last - start]
                target[first - fragment.start : last - fragment.start].copy_(piece)
                copied += last - first
        if copied != fragment.numel or self.size(name) != fragment.size:
            raise DataError(
                f"optimizer state: {name} has {self.size(name)} elements, the policy's parameter has {fragment.size}; "
                "it belongs to another model: set carry_optimizer = false to start afresh"
            )

    def size(self, name: str) -> int:
        """Elements stored of a parameter."""
        return sum(numel for _, numel, _ in self.places.get(name, []))


def fragments(engine: Any, names: dict[Tensor, str], *, rank: int) -> list[Fragment]:
    """What this rank's optimizer keeps of the named parameters, however the DeepSpeed `engine` has divided it."""
    found: list[Fragment] = []
    for parameter, name in names.items():
        if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
            found += _of_stage3(engine.optimizer, parameter, name, rank)
        elif not hasattr(parameter, "_hp_mapping"):  # ZeRO 0: whole, on every rank
            found.append(Fragment(name, 0, parameter.numel(), parameter.numel(), parameter, 0))
        elif parameter._hp_mapping is not None:
            found.append(_of_partition(engine.optimizer, parameter, name))
    return found


def _owner(name: str) -> str:
    """Whose state a parameter's is: its files' name begins so."""
    return "critic" if name.startswith(CRITIC) else "optimizer"


def _of_partition(optimizer: Any, parameter: Tensor, name: str) -> Fragment:
    """ZeRO 1 and 2: one flat tensor a parameter group, a run of which is part of this parameter."""
    mapping = parameter._hp_mapping
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    (flat,) = optimizer.optimizer.param_groups[mapping.param_group_index]["params"]
    return Fragment(name, here.start, here.numel, parameter.numel(), flat, there.start)


def _of_stage3(optimizer: Any, parameter: Tensor, name: str, rank: int) -> Iterator[Fragment]:
    """ZeRO 3: every rank has an equal run of every parameter; the last ones may be short or empty."""
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    length = parameter.partition_numel()
    start = min(rank * length, parameter.ds_numel)
    numel = min(length, parameter.ds_numel - start)
    if numel:
        yield Fragment(name, start, numel, parameter.ds_numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def _step_device(optimizer: torch.optim.Optimizer, flat: Tensor) -> torch.device:
    """Fused and capturable AdamW keep the step beside the parameter, plain AdamW on the host."""
    group = optimizer.param_groups[0]
    return flat.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
