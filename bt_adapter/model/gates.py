"""Find the two gates between tower and branch in published checkpoints, and their values."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bt_adapter.errors import CheckpointError
from bt_adapter.model.checkpoint import read_safetensors, read_settings
from bt_adapter.model.published_files import read_tensors, strip_prefixes

Source = str | os.PathLike | Mapping[str, Tensor]
# Published name: name in our folders, and the field of BTAdapterConfig that is None without the gate.
GATES = {
    "balance1": ("branch.output_gate", "output_gate_slope"),
    "balance2": ("branch.merge_gate", "merge_gate_slope"),
}


def find_gates(
    state: Mapping[str, Tensor], holds_tower: bool, eva: bool, source: Source | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Add the gates of ``source`` to a checkpoint's tensors, and find the gates it was trained without.

    Args:
        state: tensors of the checkpoint under published names without prefixes.
        holds_tower: whether they include the tower. eva: whether it is an EVA-CLIP's, which has no gates.
        source: the file or tensors with the gates of a file that holds only the branch.

    Returns:
        The tensors, and the names of the fields of ``BTAdapterConfig`` that must be None.

    Raises:
        ValueError: ``source`` is given, but the checkpoint itself determines its gates.
        CheckpointError: ``source`` has neither gates nor a tower, so it does not determine the gates.
    """
    lacking = [name for name in GATES if name not in state]
    if source is not None and (eva or holds_tower or not lacking):
        reason = "an EVA-CLIP's branch has none" if eva else "the checkpoint itself says which gates it has"
        raise ValueError(f"gates_from must be left out: {reason}")
    if eva:
        return dict(state), []
    if source is None:
        return dict(state), [GATES[name][1] for name in lacking] if holds_tower else []
    found = _read_gates(source)
    return {**state, **{name: found[name] for name in lacking if name in found}}, [
        GATES[name][1] for name in lacking if name not in found
    ]


def fill_gates(own: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Add half-open gates that the model has and the file lacks; remove those that the model does not have.

    Args:
        own: tensors of the file under the model's names; changed in place.
        expected: ``state_dict()`` of the new model, whose gates are half open.
    """
    for gate, _ in GATES.values():
        if gate in own and gate not in expected:
            del own[gate]
        elif gate in expected and gate not in own:
            warnings.warn(
                f"the checkpoint holds only the branch and has no gates (balance1, balance2): {gate} is half open. "
                "Its trained values are in the pretraining file: give it as gates_from (bt-adapter convert --gates)",
                stacklevel=3,
            )
            own[gate] = expected[gate]


def _read_gates(source: Source) -> dict[str, Tensor]:
    """Read gates by their published names; a missing gate was not used in training."""
    if not isinstance(source, Mapping) and Path(source).is_dir():
        read_settings(Path(source))
        state = read_safetensors(Path(source) / "model.safetensors")
        return {name: state[own] for name, (own, _) in GATES.items() if own in state}
    tensors = strip_prefixes(read_tensors(source))
    found = {name: tensors[name] for name in GATES if name in tensors}
    if not found and "class_embedding" not in tensors:
        place = "it" if isinstance(source, Mapping) else os.fspath(source)
        raise CheckpointError(
            f"gates_from must be the pretraining file, which holds the tower and the gates it was trained with, but "
            f"{place} has neither"
        )
    return found
