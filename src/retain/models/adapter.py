"""LoRA adapters through PEFT: attach one, and see its layers as plain matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from retain.errors import ConfigError, ModelError
from retain.models.names import of_head
from retain.models.off import adapter_off
from retain.models.wrappers import canonical, unwrap

__all__ = [
    "LoraSite",
    "adapter_off",
    "attach_lora",
    "canonical",
    "drawn",
    "lora_sites",
    "row_scales",
    "share_trainable",
    "unwrap",
]


@dataclass(frozen=True)
class LoraSite:
    """One linear layer that carries a LoRA update ``dW = scaling * B @ A``.

    Attributes:
        name: the layer's name in the base model.
        layer: PEFT's layer around the frozen weight, whose input is x and whose output is
            ``W x + scaling * B A x``.
        adapter: PEFT's name of the adapter.
        scaling: PEFT's factor, ``alpha / r`` (or ``alpha / sqrt(r)`` for rsLoRA).
    """

    name: str
    layer: LoraLayer
    adapter: str
    scaling: float

    @property
    def lora_a(self) -> nn.Linear:
        """The module of A, whose weight has the shape [r, d_in]."""
        module: nn.Linear = self.layer.lora_A[self.adapter]  # type: ignore[assignment]
        return module

    @property
    def lora_b(self) -> nn.Linear:
        """The module of B, whose weight has the shape [d_out, r]."""
        module: nn.Linear = self.layer.lora_B[self.adapter]  # type: ignore[assignment]
        return module

    @property
    def a(self) -> nn.Parameter:
        """A, of the shape [r, d_in]."""
        weight: nn.Parameter = self.lora_a.weight  # type: ignore[assignment]
        return weight

    @property
    def b(self) -> nn.Parameter:
        """B, of the shape [d_out, r]."""
        weight: nn.Parameter = self.lora_b.weight  # type: ignore[assignment]
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the frozen weight."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """The rank of B A."""
        return self.a.shape[0]

    @property
    def dora(self) -> bool:
        """Whether the layer is DoRA: ``W' = m (W + s B A) / ||W + s B A||``, row by row."""
        return bool(getattr(self.layer, "use_dora", {}).get(self.adapter))


def attach_lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> PeftModel:
    """Puts a fresh LoRA adapter (B = 0) on a model; A is drawn from `seed`.

    Args:
        model: a base model of transformers.
        rank: r.
        alpha: numerator of the scaling, ``2 * rank`` by default.
        dropout: on the adapter's input.
        targets: PEFT's ``target_modules``: names, or ``all-linear``.
        seed: of the draw of A. The global random state is left as it was.

    Raises:
        ConfigError: a rank below 1, a dropout that is no probability, or targets that the model
            does not have or PEFT cannot wrap.
    """
    if not 0 <= dropout < 1:
        raise ConfigError(
            "the dropout is no probability", got=dropout, allowed="0 to below 1", fix="dropout=0.05"
        )
    if rank < 1:
        raise ConfigError(
            "the LoRA rank is too small", got=rank, allowed="1 or more", fix="--rank 16"
        )
    kind = {True: "SEQ_CLS", False: None}["SequenceClassification" in type(model).__name__]
    if "CausalLM" in type(model).__name__:
        kind = "CAUSAL_LM"
    if isinstance(targets, str) and targets.isidentifier():
        targets = [targets]  # a name; PEFT would read it as a pattern of whole paths
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=_heads(model) if kind == "SEQ_CLS" and targets == "all-linear" else None,
        task_type=kind,
    )
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    try:
        for target in [] if isinstance(targets, str) else targets:  # PEFT lets some be unknown
            if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
                raise ValueError(target)
        return drawn(model, config, seed)
    except (ValueError, TypeError) as error:
        known = isinstance(error, ValueError)
        raise ConfigError(
            f"the adapter's targets are {'not in the model' if known else 'not for LoRA'}",
            got=targets if known else f"{targets}: {error}",
            allowed=", ".join(["all-linear", *sorted(linear)]),
            fix="name linear layers of this model",
        ) from error


def _heads(model: nn.Module) -> list[str]:
    """Layers that PEFT trains whole in a classifier, by the ends of their names: no LoRA on them.

    DistilBERT's ``pre_classifier`` is one of them, though it is not the last layer.
    """
    return [n for n, _ in model.named_modules() if of_head(n.rsplit(".", 1)[-1])]


def drawn(model: nn.Module, config: LoraConfig, seed: int, name: str = "default") -> PeftModel:
    """The model with a LoRA that is drawn from a seed; the global random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft: PeftModel = get_peft_model(
            model,
            config,
            adapter_name=name,
            autocast_adapter_dtype=False,
        )
    return peft


def lora_sites(model: nn.Module, adapter: str | None = None) -> list[LoraSite]:
    """The LoRA layers of a model, in the order of its modules.

    Raises:
        ModelError: no LoRA layer, a kind that is not linear, or sharded weights.
    """
    model = unwrap(model)
    sites = []
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        active = [adapter] if adapter else [a for a in layer.active_adapters if a in layer.lora_A]
        if len(active) > 1:
            raise ModelError(
                "several adapters are active",
                got=active,
                allowed="one",
                fix="model.set_adapter(name)",
            )
        if not active or active[0] not in layer.lora_A:
            if any(a in layer.lora_embedding_A for a in layer.active_adapters):
                raise _unsupported(name, "an embedding")
            continue
        site = LoraSite(canonical(name), layer, active[0], float(layer.scaling[active[0]]))
        if layer is head:
            raise _unsupported(name, "the output head")
        if isinstance(layer, ParamWrapper):
            raise _unsupported(name, f"a bare parameter ({layer.parameter_name})")
        if not isinstance(site.lora_a, nn.Linear):
            if _others(model):
                raise _no_lora(model)
            raise _unsupported(name, type(site.lora_a).__name__)
        _refuse_sharded(site)
        sites.append(site)
    if not sites:
        raise _no_lora(model)
    return sites


def row_scales(sites: Sequence[Any]) -> dict[str, Tensor]:
    """The rows' factors ``m / ||W + s B A||`` of DoRA layers, [d_out] each.

    PEFT takes the norm for a constant, so a row of the update acts on the output times its factor.
    """
    scales = {}
    for site in sites:
        if getattr(site, "dora", False):
            magnitude = site.layer.lora_magnitude_vector[site.adapter].weight.detach()
            weight = dequantize_module_weight(site.layer.get_base_layer()).detach()
            weight = weight.T if site.layer.fan_in_fan_out else weight  # GPT-2 keeps W transposed
            whole = weight + site.scaling * (site.b @ site.a).detach()
            scales[site.name] = magnitude / whole.norm(dim=1)
    return scales


def _others(model: nn.Module) -> list[str]:
    """PEFT's kinds of a model's adapters that are not LoRA."""
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in configs.values()}
    return sorted(kinds - {"LORA"})


def _no_lora(model: nn.Module) -> ModelError:
    others = _others(model)
    return ModelError(
        "the model carries no LoRA adapter",
        got=f"an adapter of the kind {', '.join(others)}" if others else type(model).__name__,
        allowed="a peft.PeftModel with LoRA on linear layers",
        fix="peft_config=LoraConfig(...) for a trainer of TRL's; "
        "or peft.get_peft_model(model, LoraConfig(...))",
    )


def _unsupported(name: str, kind: str) -> ModelError:
    return ModelError(
        "a LoRA layer is of a kind that has no curvature here",
        got=f"{kind} at {canonical(name)}",
        allowed="plain LoRA on linear layers",
        fix='leave it out: target_modules=["q_proj", "v_proj"], or --targets q_proj,v_proj',
    )


def _refuse_sharded(site: LoraSite) -> None:
    for weight in (site.a, site.b):
        if (
            hasattr(weight, "ds_id")
            or weight.numel() == 0
            or type(weight.data).__name__ == "DTensor"
        ):
            raise ModelError(
                "the adapter's weights are sharded (ZeRO-3 or FSDP)",
                got=site.name,
                allowed="whole LoRA weights on each process",
                fix="use DDP, or exclude the LoRA weights from sharding",
            )


def share_trainable(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters, all parameters)."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, g in counts if g), sum(n for n, _ in counts)
