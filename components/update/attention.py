"""Attention over packed sequences: they lie one after another in one row, and none sees another.

    B sequences      L longest of them      T tokens in all      H, K query and key heads      D head size

Every other layer of the model works on T tokens without padding. Here, on a GPU in half precision, torch's
variable-length flash attention takes the boundaries as they are. Elsewhere the sequences are laid out as B rows of L
for a moment: what follows a row's end is hidden from it by causality alone, so no mask is needed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from components.common.errors import DataError

IMPLEMENTATION = "grpo_packed"
PLAIN = "eager"
"""What every model can do; packed attention is compared with it once."""
PACKABLE = {"full_attention", "sliding_attention"}
"""Kinds of layers (`layer_types` of a configuration) that keep nothing from one sequence to the next."""


@dataclass(frozen=True)
class Packing:
    """Where sequences lie: in the row of T tokens, and in the B x L layout."""

    num_sequences: int
    longest: int
    boundaries: Tensor
    """int32 (B + 1,): start of each sequence, and the end."""
    cells_T: Tensor
    """int64: cell of each token in the B x L layout."""

    @classmethod
    def of(cls, lengths_B: np.ndarray, device: torch.device) -> "Packing":
        """The packing of sequences of these lengths, in their order."""
        longest = int(lengths_B.max())
        boundaries = np.concatenate([[0], np.cumsum(lengths_B)])
        shift_B = np.arange(len(lengths_B)) * longest - boundaries[:-1]
        cells_T = np.arange(boundaries[-1]) + np.repeat(shift_B, lengths_B)
        return cls(
            len(lengths_B), longest, torch.tensor(boundaries, dtype=torch.int32, device=device),
            torch.tensor(cells_T, device=device),
        )  # fmt: skip


def register() -> None:
    """Makes `attn_implementation="grpo_packed"` known to transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, packed_attention)


def check_layers(config: Any) -> None:
    """Raises DataError for a model with layers that would carry one packed sequence over into the next."""
    strange = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - PACKABLE)
    if strange:
        raise DataError(
            f"the policy has layers of type {', '.join(strange)}, which know no boundaries of packed sequences; "
            'set layout = "padded"'
        )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, K, T, D)
    value: Tensor,  # (1, K, T, D)
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence; gives (1, T, H, D), as transformers' attention functions do."""
    for what, given in (("attention sinks", s_aux), ("soft-capped attention", softcap), ("own masks", attention_mask)):
        if given is not None:
            raise DataError(f'the policy has {what}, which packed attention leaves out; set layout = "padded"')
    if sliding_window is not None and sliding_window < packing.longest:
        raise DataError(
            f"packed sequences of {packing.longest} tokens exceed the model's sliding window of {sliding_window}; "
            'set layout = "padded"'
        )
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _variable_length(query, key, value, packing, scaling), None
    rows = [_to_rows(states, packing) for states in (query, key, value)]
    grouped = query.shape[1] != key.shape[1]
    out_BHLD = functional.scaled_dot_product_attention(*rows, is_causal=True, scale=scaling, enable_gqa=grouped)
    out_TOD = out_BHLD.transpose(1, 2).flatten(0, 1).index_select(0, packing.cells_T)
    return out_TOD.unsqueeze(0), None


def _to_rows(states: Tensor, packing: Packing) -> Tensor:
    """(1, H, T, D) to (B, H, L, D), with zeros after each sequence's end."""
    states_THD = states[0].transpose(0, 1)
    cells = packing.num_sequences * packing.longest
    if cells == len(states_THD):  # all of one length
        rows = states_THD.reshape(cells, *states_THD.shape[1:])
    else:
        rows = states_THD.new_zeros(cells, *states_THD.shape[1:]).index_copy(0, packing.cells_T, states_THD)
    return rows.view(packing.num_sequences, packing.longest, *states_THD.shape[1:]).transpose(1, 2)


def _variable_length(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    tokens_first = [states[0].transpose(0, 1).contiguous() for states in (query, key, value)]
    out_THD = varlen_attn(
        *tokens_first, packing.boundaries, packing.boundaries, packing.longest, packing.longest,
        scale=scaling, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out_THD.unsqueeze(0)
