"""OSF: train each weight in its small singular directions (arXiv 2504.07097), through PEFT.

``W = U_high S_high V_high + U_low S_low V_low``; the first part is frozen, the second is trained,
and PEFT projects the gradients of U_low and V_low to be orthogonal to U_high and V_high. (Gradients
only: the steps of an optimiser that scales each entry, as Adam does, are not exactly orthogonal.)

Between tasks `OSF.decompose` writes what was learned into the weights and decomposes them anew.
PEFT's documentation does so with ``model.unload()``; as of PEFT 0.21 that would drop what was
learned, because the update is added in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from retain.compat import osf_config
from retain.errors import ConfigError
from retain.models.adapters.base import Adapter, Options, check_state
from retain.models.lora import drawn, task_of
from retain.models.names import canonical, drawn_layers, head_of

__all__ = ["OSF", "OSFOptions"]

_NAME, _PARTS = "default", ("U_low", "S_low", "V_low")


class OSFOptions(Options):
    """Options of OSF.

    Attributes:
        preserve: the share of each weight's singular directions that is frozen.
        targets: names of linear layers, or ``all-linear``.
    """

    preserve: float = Field(0.5, gt=0, lt=1)
    targets: str | list[str] = "all-linear"


class OSF(Adapter):
    """PEFT's OSF, with a copy of the weights that it came with. Nothing is random.

    What it has learned is a change of whole weights, so it is saved as these weights. PEFT adds the
    update as a difference of two products, so a fresh one is the base model but for rounding.
    """

    kind: ClassVar[str] = "osf"
    schema: ClassVar[type[Options]] = OSFOptions
    peft_type: ClassVar[str | None] = "RETAIN_OSF"

    @classmethod
    def put_on(cls, base: nn.Module, options: OSFOptions, seed: int) -> nn.Module:
        """See `Adapter.put_on`; ConfigError for weights too small to split."""
        targets, training, task = options.targets, base.training, task_of(base)
        if isinstance(targets, str) and targets.isidentifier():
            targets = [targets]  # a name; PEFT would read it as a pattern of whole paths
        elif targets == "all-linear" and task == "SEQ_CLS":  # PEFT would have some heads in it
            new, linear = head_of(base), (nn.Linear, Conv1D)
            layers = [n for n, m in base.named_modules() if isinstance(m, linear) and not new(n)]
            targets = layers or targets
        config = osf_config()(
            effective_rank=options.preserve,
            target_modules=targets,
            task_type=task or "CAUSAL_LM",
            modules_to_save=sorted(drawn_layers(base)) or None,
        )
        try:
            return drawn(base, config, seed, _NAME).train(training)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                "OSF cannot split these layers",
                got=f"targets {options.targets} with preserve {options.preserve:g}: {error}",
                allowed="linear layers of the model, of at least 1 / preserve rows and columns",
                fix="targets: all-linear, preserve: 0.5",
            ) from error

    def __init__(
        self, model: nn.Module, options: dict[str, Any], size: int = 0, base: str = ""
    ) -> None:
        super().__init__(model, options, size, base)
        self.preserve = float(options["preserve"])

    def changed(self) -> Iterable[nn.Parameter]:
        """The weights of the layers, into which `decompose` writes."""
        return [layer.get_base_layer().weight for layer in self.layers().values()]

    def layers(self) -> dict[str, Any]:
        """PEFT's layers by their names in the model."""
        from peft.tuners.osf import OSFLayer

        return {n: m for n, m in self.model.named_modules() if isinstance(m, OSFLayer)}

    def decompose(self, preserve: float) -> None:
        """Writes what was learned into the weights, and splits them anew; the function stays.

        `preserve` is the share of singular directions that is frozen from now on. The trainable
        parameters are new ones afterwards.
        """
        self.preserve = preserve
        model: Any = self.model
        config = model.peft_config[_NAME]
        for layer in self.layers().values():
            base = layer.get_base_layer()
            least = min(base.weight.shape)
            rank = max(1, min(least - 1, int(least * preserve)))
            if rank == layer.effective_rank[_NAME] and not self._moved(layer):
                continue
            base.weight.data = self._merged(layer)
            layer._detach_hooks()
            for kept in (layer._osf_U_high, layer._osf_V_high):
                if _NAME in kept:
                    del kept[_NAME]
            layer.update_layer(_NAME, rank, config=config)

    def state(self) -> dict[str, Tensor]:
        """The whole weights of the layers, a new head, and the share that is frozen."""
        found = {f"{canonical(n)}.weight": self._merged(m) for n, m in self.layers().items()}
        heads = {n: p for n, p in self.parameters().items() if ".osf_svd_params." not in n}
        found |= {_plain(n): p.detach().clone() for n, p in heads.items()}
        return {**found, "preserve": torch.tensor(self.preserve, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts a `state` back: the same weights, split anew: the same function but for rounding."""
        check_state(self.state(), state)
        for name, layer in self.layers().items():
            weight = layer.get_base_layer().weight
            weight.data = state[f"{canonical(name)}.weight"].to(weight, copy=True)
            layer.effective_rank[_NAME] = 0  # of other weights: to be split anew
            for part in _PARTS:  # nothing has been learned beyond the weights
                init = getattr(layer, f"_osf_{part}_init")[_NAME]
                layer.osf_svd_params[_NAME][part].data.copy_(init)
        self.decompose(float(state["preserve"]))
        for name, parameter in self.parameters().items():
            if ".osf_svd_params." not in name:
                parameter.data.copy_(state[_plain(name)])

    def stored(self) -> dict[str, Tensor]:
        """All changed weights, whole."""
        return self.state()

    @staticmethod
    def _moved(layer: Any) -> bool:
        """Whether anything has been learned since the last split."""
        now = layer.osf_svd_params[_NAME]
        return not all(torch.equal(now[p], getattr(layer, f"_osf_{p}_init")[_NAME]) for p in _PARTS)

    @classmethod
    def _merged(cls, layer: Any) -> Tensor:
        """The layer's whole weight, a copy."""
        weight: Tensor = layer.get_base_layer().weight.detach()
        if not cls._moved(layer):
            return weight.clone()
        delta: Tensor = layer.get_delta_weight(_NAME).detach()
        return (weight + delta).to(weight.dtype)


def _plain(name: str) -> str:
    """A parameter's name in the base model."""
    return canonical(name).replace(f".modules_to_save.{_NAME}", "")
