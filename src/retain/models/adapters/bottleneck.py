"""Bottleneck adapters: two small linear layers after a sublayer.

Houlsby et al. (arXiv 1902.00751) put one after the attention and one after the MLP of each
block; Pfeiffer et al. (arXiv 2005.00247) keep the latter alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from retain.errors import ConfigError, ModelError
from retain.models.adapters.base import Adapter, Options, new_heads

__all__ = ["FAMILIES", "Bottleneck", "BottleneckAdapter", "BottleneckOptions"]

FAMILIES: dict[str, tuple[str, str]] = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "bert": ("attention.output.dense", "output.dense"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "opt": ("self_attn.out_proj", "fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
}
"""Family -> the last linear layers of a block's attention and of its MLP.

``llama`` stands for Mistral, Qwen, Gemma, OLMo and others with the same names; ``bert`` for
RoBERTa, ELECTRA and DeBERTa.
"""


class BottleneckOptions(Options):
    """Options of bottleneck adapters.

    Attributes:
        size: width of the bottleneck.
        reduction: instead of a size: hidden width over bottleneck width (16 by default).
        placement: ``houlsby``, after attention and MLP; ``pfeiffer``, after the MLP.
        nonlinearity: between the two layers.
        scaling: of the adapter's output.
    """

    size: int | None = Field(None, ge=1)
    reduction: float | None = Field(None, ge=1)
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    nonlinearity: Literal["gelu", "relu"] = "gelu"
    scaling: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _one_width(self) -> BottleneckOptions:
        if self.size is not None and self.reduction is not None:
            raise ValueError("size or reduction, not both")
        return self

    def width(self, hidden: int) -> int:
        """Width in a model of some hidden width; ConfigError where it is not below that."""
        width = self.size or max(1, int(hidden // (self.reduction or 16)))
        if width >= hidden > 1:
            raise ConfigError(
                "the adapter is no bottleneck",
                got=f"width {width} in a model of width {hidden}",
                allowed=f"1 to {hidden - 1}",
                fix="give a smaller size, or a larger reduction",
            )
        return width


class Bottleneck(nn.Module):
    """``h + s U f(D h + c) + s e`` on the output h of a linear layer, [..., hidden].

    U and e are zero at first, so that it computes h exactly; c is zero; D is drawn as
    `torch.nn.Linear` draws, on the CPU in float32, whatever the model's device and precision.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        hidden: int,
        width: int,
        options: BottleneckOptions,
        random: torch.Generator,
    ) -> None:
        super().__init__()
        weight = next(base_layer.parameters())
        kind = weight.dtype if weight.is_floating_point() else torch.float32
        place: dict[str, Any] = {"device": weight.device, "dtype": kind}
        self.base_layer = base_layer
        self.down: nn.Linear = nn.utils.skip_init(nn.Linear, hidden, width, **place)
        self.up: nn.Linear = nn.utils.skip_init(nn.Linear, width, hidden, **place)
        self.relu, self.scaling = options.nonlinearity == "relu", options.scaling
        self._disable_adapters = False  # by the name of PEFT's switches
        drawn = torch.empty(width, hidden).uniform_(-1, 1, generator=random) / hidden**0.5
        with torch.no_grad():
            self.down.weight.copy_(drawn)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.base_layer(*args, **kwargs)
        if self._disable_adapters:
            return out
        inner = self.down(out.to(self.down.weight.dtype))
        inner = nn.functional.relu(inner) if self.relu else nn.functional.gelu(inner)
        part: Tensor = self.scaling * self.up(inner)
        return out + part.to(out.dtype)


class BottleneckAdapter(Adapter):
    """Bottlenecks after the sublayers of each block, before the residual is added.

    Each follows the sublayer's last linear layer directly, as Houlsby's do; Pfeiffer's comes, in
    the paper, after the MLP's residual and norm. It wraps that layer as PEFT's LoRA does
    (``base_layer``), and is saved in PEFT's layout, though PEFT itself cannot load it.
    """

    kind: ClassVar[str] = "bottleneck"
    schema: ClassVar[type[Options]] = BottleneckOptions
    peft_type: ClassVar[str | None] = "BOTTLENECK"

    @classmethod
    def put_on(cls, base: nn.Module, options: BottleneckOptions, seed: int) -> nn.Module:
        """See `Adapter.put_on`."""
        config: Any = base.config
        layers, width = find_layers(base, options.placement), options.width(config.hidden_size)
        random = torch.Generator().manual_seed(seed)
        base.requires_grad_(False)
        for name in layers:
            parent, leaf = name.rsplit(".", 1)
            layer = Bottleneck(base.get_submodule(name), config.hidden_size, width, options, random)
            layer.train(base.training)
            layer.base_layer.requires_grad_(False)
            setattr(base.get_submodule(parent), leaf, layer)
        for head in new_heads(base).values():
            head.requires_grad_(True)
        return base

    @property
    def layers(self) -> list[str]:
        """Names of the wrapped layers."""
        return [n for n, m in self.model.named_modules() if isinstance(m, Bottleneck)]

    def changed(self) -> Iterable[nn.Parameter]:
        """A new head."""
        return [p for head in new_heads(self.model).values() for p in head.parameters()]


def find_layers(base: nn.Module, placement: str) -> list[str]:
    """Names of the layers that get a bottleneck, block after block; ModelError if not known."""
    blocks: dict[str, list[str]] = {}
    for name, module in base.named_modules():
        for block, child in module.named_children() if isinstance(module, nn.ModuleList) else []:
            for family, paths in FAMILIES.items():
                if all(_has(child, path) for path in paths):
                    blocks.setdefault(family, []).append(f"{name}.{block}")
    config: Any = getattr(base, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    if len(blocks) != 1 or (depth and len(next(iter(blocks.values()))) != depth):
        raise ModelError(
            "bottleneck adapters do not know this architecture",
            got=f"{type(base).__name__} with {sum(map(len, blocks.values()))} known blocks"
            f" of {depth}",
            allowed="blocks that hold "
            + ", or ".join(f"{a} and {m} ({f})" for f, (a, m) in FAMILIES.items()),
            fix="take LoRA, or add the names of its layers to FAMILIES",
        )
    (family, found), *_ = blocks.items()
    attention, mlp = FAMILIES[family]
    chosen = [attention, mlp] if placement == "houlsby" else [mlp]
    return [f"{block}.{path}" for block in found for path in chosen]


def _has(block: nn.Module, path: str) -> bool:
    try:
        return any(True for _ in block.get_submodule(path).parameters())
    except AttributeError:
        return False
