"""Bottleneck adapters: two small linear layers after a sublayer.

Houlsby et al. (arXiv 1902.00751) put one after the attention and one after the MLP of each
block; Pfeiffer et al. (arXiv 2005.00247) keep the latter alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from retain.errors import ConfigError, ModelError
from retain.models.adapters.base import Adapter, Options, check_plain, new_heads, size_of
from retain.models.adapters.folder import (
    check_base,
    read_config,
    read_options,
    read_tensors,
    same_base,
    write_adapter,
)
from retain.models.adapters.originals import Originals

__all__ = ["FAMILIES", "Bottleneck", "BottleneckAdapter", "BottleneckOptions"]

_TYPE = "BOTTLENECK"

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
        scaling: factor of the adapter's output.
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
        """Width of the bottleneck of a model of some hidden width.

        Raises:
            ConfigError: it is not below the hidden width.
        """
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

    U and e are zero at first, so that it computes h exactly; D is drawn as `torch.nn.Linear`
    draws, c is zero.

    Args:
        base_layer: the frozen linear layer.
        hidden: width of its output.
        width: of the bottleneck.
        options: nonlinearity f and scaling s.
        random: draws D, on the CPU in float32, whatever the model's device and precision.
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
        self.enabled = True
        drawn = torch.empty(width, hidden).uniform_(-1, 1, generator=random) / hidden**0.5
        with torch.no_grad():
            self.down.weight.copy_(drawn)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, and the adapter's part where it is switched on."""
        out: Tensor = self.base_layer(*args, **kwargs)
        if not self.enabled:
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

    @classmethod
    def attach(cls, base: nn.Module, *, seed: int = 0, **options: Any) -> Self:
        """See `Adapter.attach`; options as in `BottleneckOptions`."""
        chosen = cls.check(options)
        check_plain(base)
        find_layers(base, chosen.placement)
        size, name = size_of(base), same_base(base)
        _wrap(base, chosen, seed)
        return cls(base, chosen.model_dump(), size, name)

    def __init__(
        self, model: nn.Module, options: dict[str, Any], size: int = 0, base: str = ""
    ) -> None:
        super().__init__(model, options, size)
        self.base = base
        self.layers = [n for n, m in model.named_modules() if isinstance(m, Bottleneck)]
        heads = [f"{h}.{n}" for h, m in new_heads(model).items() for n, _ in m.named_parameters()]
        self.originals = Originals(model, heads)

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        """See `Adapter.off`. A head is the one that the base model came with."""
        layers = [m for m in self.model.modules() if isinstance(m, Bottleneck)]
        before = [m.enabled for m in layers]
        try:
            for layer in layers:
                layer.enabled = False
            with self.originals.swapped(self.model):
                yield self.model
        finally:
            for layer, enabled in zip(layers, before, strict=True):
                layer.enabled = enabled

    def save(self, folder: Path, base: str) -> Path:
        """See `Adapter.save`."""
        config = {"peft_type": _TYPE, "base_model_name_or_path": base, **self.options}
        config |= {"target_modules": self.layers, "base_fingerprint": self.base}
        return write_adapter(folder, config, self.parameters())

    @classmethod
    def load(cls, base: nn.Module, folder: Path) -> Self:
        """See `Adapter.load`."""
        check_plain(base)
        config = read_config(folder, _TYPE)
        chosen = read_options(config, BottleneckOptions, folder)
        check_base(base, config, folder)
        shapes = _shapes(base, chosen)
        tensors = read_tensors(folder, _TYPE, shapes)
        adapter = cls.attach(base, **chosen.model_dump())
        adapter.restore(tensors)
        return adapter


def find_layers(base: nn.Module, placement: str) -> list[str]:
    """Names of the layers that get a bottleneck, block after block.

    Raises:
        ModelError: a model of a family that is not known, or with blocks of several kinds.
    """
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


def _wrap(base: Any, options: BottleneckOptions, seed: int) -> None:
    width, random = options.width(base.config.hidden_size), torch.Generator().manual_seed(seed)
    layers = find_layers(base, options.placement)
    base.requires_grad_(False)
    for name in layers:
        parent, leaf = name.rsplit(".", 1)
        layer = Bottleneck(
            base.get_submodule(name), base.config.hidden_size, width, options, random
        )
        layer.train(base.training)
        layer.base_layer.requires_grad_(False)
        setattr(base.get_submodule(parent), leaf, layer)
    for head in new_heads(base).values():
        head.requires_grad_(True)


def _shapes(base: Any, options: BottleneckOptions) -> dict[str, Tensor]:
    """What `_wrap` would make trainable, on the meta device."""
    hidden = base.config.hidden_size
    width = options.width(hidden)
    parts = {
        "down.weight": (width, hidden),
        "down.bias": (width,),
        "up.weight": (hidden, width),
        "up.bias": (hidden,),
    }
    shapes = {
        f"{layer}.{part}": torch.empty(shape, device="meta")
        for layer in find_layers(base, options.placement)
        for part, shape in parts.items()
    }
    for name, head in new_heads(base).items():
        shapes |= {f"{name}.{n}": p for n, p in head.named_parameters()}
    return shapes
