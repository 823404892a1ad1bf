"""A LoRA adapter as its files hold it, without a base model: read, and written at one rank.

What is written has one rank and one alpha for all layers: PEFT's ``rank_pattern``,
``alpha_pattern`` and ``use_rslora`` are put into B and the alpha, since servers read ``r`` and
``lora_alpha`` alone. Each layer's update ``s B A`` is what it was; ``init_lora_weights`` is PEFT's
default, since the weights are there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from retain.errors import ModelError, shown
from retain.models.cards import CARD
from retain.models.off import BESIDE
from retain.models.saved import HEAD, check_adapter, misfit, read_tensors, write_tensors

__all__ = ["StoredLayer", "StoredLora"]

_VARIANTS = (
    "use_dora", "lora_bias", "target_parameters", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config", "velora_config", "alora_invocation_tokens",
    "layer_replication",
)  # fmt: skip
"""Settings of PEFT's whose update is not ``s B A`` of one linear layer, at every token."""


@dataclass(frozen=True)
class StoredLayer:
    """One layer of an adapter in a file, as `retain.models.sites.LoraSite` has it in a model.

    Attributes:
        name: of the layer in the base model.
        a: A, [r, d_in].
        b: B, [d_out, r], times what its own scaling is of the adapter's.
        scaling: s of the adapter, the same for all layers.
        kinds: the precision of B and of A in the file.
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float
    kinds: tuple[torch.dtype, torch.dtype]

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class StoredLora:
    """An adapter's files.

    Attributes:
        folder: where they lie.
        config: PEFT's.
        layers: with A and B.
        others: tensors beside them, such as a new head.
    """

    folder: Path
    config: dict[str, Any]
    layers: list[StoredLayer]
    others: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(layer.rank for layer in self.layers)

    @classmethod
    def read(cls, folder: Path) -> StoredLora:
        """Reads a folder.

        Raises:
            ModelError: it is missing or damaged, not finite, or more than plain LoRA.
        """
        config = check_adapter(folder)
        more = [key for key in _VARIANTS if config.get(key)]
        started = config.get("init_lora_weights", True)
        if str(started).lower() not in BESIDE:
            more.append(f"init_lora_weights={shown(started)}, which depends on the rank")
        others = read_tensors(folder, "LORA")
        pairs: dict[str, dict[str, Tensor]] = {}
        for key in [key for key in others if re.search(r"(^|\.)lora_", key)]:
            found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
            if found is None or others[key].dim() != 2:
                more.append(f"{shown(key, plain=True)}, {list(others[key].shape)}")
            else:
                pairs.setdefault(found[1], {})[found[2]] = others.pop(key)
        if more:
            raise ModelError(
                "the adapter is more than an update B A of linear layers, so it cannot be cut",
                got=more[0], allowed="plain LoRA and rsLoRA, with rank_pattern and alpha_pattern",
                fix="merge it into the model, or train plain LoRA",
            )  # fmt: skip
        return cls(folder, config, _layers(folder, config, pairs), others)

    def write(self, folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Path:
        """Writes the adapter with other factors, a plain one of PEFT's.

        Args:
            folder: where it is to be; an older one stays until the new one is whole.
            factors: (B, A) by layer, of `layers`' scaling; narrower ones are filled up with zeros.

        Raises:
            OutputError: the place cannot be written.
        """
        rank = max(a.shape[0] for _, a in factors.values())
        alpha = self.layers[0].scaling * rank
        plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
        # The weights are whole, whatever they began as; PEFT would refuse "orthogonal" of odd rank.
        plain |= {"init_lora_weights": True}
        near = abs(alpha - round(alpha)) < 1e-9 * alpha
        config = self.config | plain | {"r": rank, "lora_alpha": round(alpha) if near else alpha}
        config.pop("eva_config", None)  # of a start that is not named any more
        tensors = dict(self.others)
        for name, (b, a) in factors.items():
            room = rank - a.shape[0]
            tensors[f"{name}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, room))
            tensors[f"{name}.lora_B.weight"] = torch.nn.functional.pad(b, (0, room))
        kept = [CARD, *([HEAD] if config.get("task_type") == "SEQ_CLS" else [])]
        beside = [p for n in kept if (p := self.folder.expanduser() / n).is_file()]
        return write_tensors(folder, config, tensors, beside)


def _layers(
    folder: Path, config: Mapping[str, Any], pairs: Mapping[str, Mapping[str, Tensor]]
) -> list[StoredLayer]:
    """The layers, with one scaling: that of most of them."""
    scalings: dict[str, float] = {}
    for name, pair in pairs.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise misfit(f"{folder} with A and B of {shown(name, plain=True)} that do not match")
        if not bool(a.isfinite().all() and b.isfinite().all()):
            raise ModelError(
                "the adapter's weights are not finite", got=shown(name, plain=True),
                allowed="finite numbers", fix="train it again with a smaller learning rate",
            )  # fmt: skip
        rank, alpha = a.shape[0], _alpha(config, name)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e30:
            raise misfit(f"{folder} with an alpha of {shown(alpha)} at {shown(name, plain=True)}")
        scalings[name] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    if not scalings:
        raise misfit(f"{folder} without A and B of any layer")
    common = Counter(scalings.values()).most_common(1)[0][0]
    found = []
    for name, own in scalings.items():
        a, b = pairs[name]["A"], pairs[name]["B"]
        wide = b if own == common else b.double() * (own / common)
        found.append(StoredLayer(name, a, wide, common, (b.dtype, a.dtype)))
    return found


def _alpha(config: Mapping[str, Any], name: str) -> Any:
    """What PEFT takes for a layer's alpha; None where it would fail."""
    alphas = config.get("alpha_pattern") or {}
    try:
        return alphas.get(get_pattern_key(list(alphas), name), config.get("lora_alpha"))
    except (re.error, AttributeError, TypeError):
        return None
