"""The weights of a model that a curvature can be about: LoRA layers, or plain linear ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from retain.errors import ModelError
from retain.models.heads import text_part
from retain.models.names import canonical, head_of, inner_model, unwrap
from retain.models.shards import gather, is_sharded, reshard, shard_made, whole

__all__ = [
    "LinearSite",
    "LoraSite",
    "Site",
    "base_layers",
    "bypassed",
    "check_active",
    "check_held",
    "disabled",
    "find_sites",
    "is_idle",
    "lora_sites",
    "output_head",
    "plain_weight",
    "row_norms",
    "row_scales",
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
        lora_a: the module of A; `lora_b` is that of B.
        a: A, [r, d_in].
        b: B, [d_out, r].
        shape: (d_out, d_in) of the frozen weight.
        rank: r.
        dora: whether the layer is DoRA: ``W' = m (W + s B A) / ||W + s B A||``, row by row.
    """

    name: str
    layer: LoraLayer
    adapter: str
    scaling: float

    @property
    def lora_a(self) -> nn.Linear:
        return self.layer.lora_A[self.adapter]  # type: ignore[return-value]

    @property
    def lora_b(self) -> nn.Linear:
        return self.layer.lora_B[self.adapter]  # type: ignore[return-value]

    @property
    def a(self) -> nn.Parameter:
        return _weight(self.layer, "lora_A", self.adapter)

    @property
    def b(self) -> nn.Parameter:
        return _weight(self.layer, "lora_B", self.adapter)

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def dora(self) -> bool:
        return bool(getattr(self.layer, "use_dora", {}).get(self.adapter))


@dataclass(frozen=True)
class ShardedSite(LoraSite):
    """One whose A and B are divided among processes: here they are whole copies.

    See `retain.models.shards`: who changes them, or wants what training made of them, says so.
    """

    @property
    def a(self) -> nn.Parameter:
        return self.lora_a._retain_shard.whole  # type: ignore[return-value, union-attr]

    @property
    def b(self) -> nn.Parameter:
        return self.lora_b._retain_shard.whole  # type: ignore[return-value, union-attr]


def _weight(layer: Any, side: str, adapter: str) -> nn.Parameter:
    """A module's weight, past the modules' slow look-ups: a step asks for it some thousand times.

    A weight that is computed (`torch.nn.utils.parametrize`) is in no dictionary.
    """
    module: Any = layer._modules[side]._modules[adapter]
    found = module._parameters.get("weight")
    return found if found is not None else module.weight  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LinearSite:
    """One linear layer whose own weight W, [d_out, d_in], is trained (full fine-tuning)."""

    name: str
    layer: nn.Linear

    rank = 0
    scaling = 1.0

    @property
    def weight(self) -> nn.Parameter:
        return self.layer.weight  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]


Site = LoraSite | LinearSite


_VARIANTS = ("NoneType", "DoraLinearVariant", "MiCALinearVariant")
"""Ways of PEFT to apply a LoRA whose update is ``s B A`` at every token (DoRA: times its rows'
factors). Activated LoRA is silent before its invocation, and others change A, B or the input."""


def lora_sites(model: nn.Module, *, sharded: bool = False) -> list[LoraSite]:
    """The LoRA layers of a model, in the order of its modules.

    Args:
        model: with its adapter.
        sharded: weights that FSDP2 has divided among processes are allowed, and gathered; all
            processes must ask.

    Raises:
        ModelError: no LoRA layer, a kind that is not linear, or sharded weights.
    """
    inner, sites = unwrap(model), []
    reshard(inner)
    head = output_head(inner)
    for name, layer in inner.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        active = [a for a in layer.active_adapters if a in layer.lora_A]
        if len(active) > 1:
            raise ModelError(
                "several adapters are active",
                got=active,
                allowed="one",
                fix="model.set_adapter(name)",
            )
        if not active:
            if any(a in layer.lora_embedding_A for a in layer.active_adapters):
                raise _unsupported(inner, name, "an embedding")
            continue
        site = LoraSite(canonical(name), layer, active[0], float(layer.scaling[active[0]]))
        if layer is head:
            raise _unsupported(inner, name, "the output head")
        variant = type(getattr(layer, "lora_variant", {}).get(active[0])).__name__
        if variant not in _VARIANTS:
            raise ModelError(
                "a LoRA layer works in a way that no curvature knows",
                got=f"{variant.removesuffix('LinearVariant')} at {canonical(name)}",
                allowed="LoRA, rsLoRA, DoRA and MiCA, whose update is the same at every token",
                fix="peft.LoraConfig without that option",
            )
        if isinstance(layer, ParamWrapper):
            raise _unsupported(inner, name, f"a bare parameter ({layer.parameter_name})")
        if not isinstance(site.lora_a, nn.Linear):
            if _other_kinds(inner):
                raise _no_lora(inner)
            raise _unsupported(inner, name, type(site.lora_a).__name__)
        if any(_sharded(weight) for weight in (site.a, site.b)):
            if not (sharded and is_sharded(site.a) and is_sharded(site.b)):
                raise _no_shards(site.name)
            site = ShardedSite(site.name, layer, site.adapter, site.scaling)
            for module in (site.lora_a, site.lora_b):
                shard_made(inner, module)
        sites.append(site)
    if not sites:
        raise _no_lora(inner)
    _check_towers(inner, sites)
    gather(weight for site in sites for weight in (site.a, site.b))
    return sites


def _check_towers(model: nn.Module, sites: Sequence[LoraSite]) -> None:
    """Refuses layers of a tower for images or sound, which no text goes through."""
    whole, text = inner_model(model), text_part(model)
    if text is whole:
        return
    found = {id(module) for module in text.modules()}
    odd = [site.name for site in sites if id(site.layer) not in found]
    if not odd:
        return
    part, tower = whole, ""
    for tower in odd[0].split("."):
        part = getattr(part, tower)
        if all(module is not text for module in part.modules()):
            break
    raise ModelError(
        "LoRA is on layers that no text goes through",
        got=f"{len(odd)} of them, such as {odd[0]}",
        allowed="layers of the part that reads text",
        fix=f'LoraConfig(exclude_modules=r".*{tower}.*", ...)',
    )


def _no_shards(name: str) -> ModelError:
    return ModelError(
        "the trained weights are sharded (ZeRO-3 or FSDP)",
        got=name,
        allowed="whole weights on each process; or FSDP2 around a LoRA that the recipe holds",
        fix="fit and measure before fully_shard, use DDP, or exclude the LoRA weights",
    )


def check_active(sites: Sequence[Site]) -> None:
    """Refuses a model whose active adapters are others than when its layers were found.

    Raises:
        ModelError: they are.
    """
    site = sites[0] if sites else None  # PEFT switches all of them
    if isinstance(site, LoraSite) and list(site.layer.active_adapters) != [site.adapter]:
        there = site.adapter in site.layer.lora_A
        raise ModelError(
            "another adapter is active than the one that is held",
            got=", ".join(site.layer.active_adapters) or "none",
            allowed=f"{site.adapter} alone" + ("" if there else ", which was deleted"),
            fix=f"model.set_adapter({site.adapter!r}), and finish before another is made active"
            if there else "begin anew with the other",
        )  # fmt: skip


def find_sites(model: nn.Module, *, sharded: bool = False) -> list[LoraSite] | list[LinearSite]:
    """The LoRA layers of a PEFT model, or the trainable linear layers of a plain one.

    A plain model's output head and classification head are left out, as PEFT's ``all-linear``
    does; embeddings, norms and biases have no curvature here. `sharded` is for `lora_sites`.

    Raises:
        ModelError: neither; layers that keep their weights transposed (GPT-2) in full fine-tuning;
            an adapter that is merged, or repeats layers; or what `lora_sites` refuses.
    """
    inner: Any = unwrap(model)
    if any(isinstance(m, LoraLayer) for m in inner.modules()) or hasattr(inner, "peft_config"):
        found = lora_sites(inner, sharded=sharded)
        _check_apart(inner, found)
        return found
    head, of_head = output_head(inner), head_of(inner)
    sites = [
        LinearSite(canonical(name), layer)
        for name, layer in inner.named_modules()
        if isinstance(layer, nn.Linear)
        and layer is not head
        and not of_head(name)
        and layer.weight.requires_grad
    ]
    for site in sites:
        if _sharded(site.weight):
            raise _no_shards(site.name)
    if not sites and (kept := _transposed(inner)):
        raise ModelError(
            "no layer of the model can be held in full fine-tuning",
            got=f"{len(kept)} layers of the kind Conv1D, such as {kept[0]}",
            allowed="torch.nn.Linear",
            fix="train it with LoRA: peft.get_peft_model(model, LoraConfig(...))",
        )
    return sites or lora_sites(inner)  # which says what is missing


def _check_apart(model: Any, sites: Sequence[LoraSite]) -> None:
    """Refuses an adapter that is merged into the base, or makes several layers of one."""
    if any(site.layer.merged for site in sites):
        raise ModelError(
            "the adapter is merged into the base's weights",
            got=f"merged layers, such as {sites[0].name}",
            allowed="an adapter beside its base",
            fix="model.unmerge_adapter()",
        )
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    if any(getattr(config, "layer_replication", None) for config in configs.values()):
        raise ModelError(
            "the adapter repeats layers of the base, which is another model without it",
            got="layer_replication",
            allowed="an adapter on the base's own layers",
            fix="leave layer_replication out",
        )


def _transposed(model: nn.Module) -> list[str]:
    """The layers of a plain model that train and keep W as [d_in, d_out], as GPT-2's do."""
    return [
        canonical(name)
        for name, layer in model.named_modules()
        if type(layer).__name__ == "Conv1D" and any(p.requires_grad for p in layer.parameters())
    ]


def output_head(model: nn.Module) -> Any:
    """The language-model head of a model; None without one."""
    find: Any = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def _other_kinds(model: nn.Module) -> list[str]:
    """PEFT's kinds of a model's adapters that are not LoRA."""
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in configs.values()}
    return sorted(kinds - {"LORA"})


def _no_lora(model: nn.Module) -> ModelError:
    others = _other_kinds(model)
    return ModelError(
        "the model carries no LoRA adapter",
        got=f"an adapter of the kind {', '.join(others)}" if others else type(model).__name__,
        allowed="a peft.PeftModel with LoRA on linear layers",
        fix="peft_config=LoraConfig(...) for a trainer of TRL's; "
        "or peft.get_peft_model(model, LoraConfig(...))",
    )


def _unsupported(model: nn.Module, name: str, kind: str) -> ModelError:
    """The error for a LoRA layer that is not linear, with the names of those that are.

    PEFT makes bare parameters of a mixture's experts and router of the names of its other layers
    too, whatever is excluded, so of one only what lies outside its block is named.
    """
    bare = isinstance(model.get_submodule(name), ParamWrapper)
    block = f".{canonical(name).split('.')[-2]}." if bare else None
    linear = {
        canonical(other).rpartition(".")[2]: None for other, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and layer is not output_head(model)
        and all(isinstance(a, nn.Linear) for a in layer.lora_A.values()) and layer.lora_A
        and not isinstance(layer, ParamWrapper)
        and (block is None or block not in f".{canonical(other)}.")
    }  # fmt: skip
    names = list(linear) or ["q_proj", "v_proj"]
    return ModelError(
        "a LoRA layer is of a kind that has no curvature here",
        got=f"{kind} at {canonical(name)}",
        allowed="plain LoRA on linear layers",
        fix=f"leave it out: target_modules={json.dumps(names)}, or --targets {','.join(names)}",
    )


def _sharded(weight: nn.Parameter) -> bool:
    return hasattr(weight, "ds_id") or is_sharded(weight) or weight.numel() == 0


def check_held(model: nn.Module) -> None:
    """Refuses a LoRA model that also trains pre-trained weights which nothing would hold.

    A new classification head, new tokens and DoRA's magnitudes are free to learn.

    Raises:
        ModelError: such weights, as PEFT's ``modules_to_save``, ``bias`` and ``lora_bias`` make.
    """
    of_head = head_of(model)
    odd = [
        canonical(name)
        for name, p in unwrap(model).named_parameters()
        if p.requires_grad
        and not of_head(name)
        and (
            not any(part in f".{name}" for part in (".lora_", "trainable_tokens"))
            or (".lora_B." in name and name.endswith(".bias"))
        )
    ]
    if odd:
        raise ModelError(
            "pre-trained weights are trained that no curvature holds",
            got=f"{len(odd)} of them, such as {odd[0]}",
            allowed="LoRA weights, new tokens and a new classification head",
            fix="leave them out of modules_to_save, and keep bias='none', lora_bias=False",
        )


def row_scales(sites: Sequence[Any]) -> dict[str, Tensor]:
    """The rows' factors ``m / ||W + s B A||`` of DoRA layers, [d_out] each.

    PEFT takes the norm for a constant, so a row of the update acts on the output times its factor.
    """
    scales = {}
    for site in sites:
        if getattr(site, "dora", False):
            magnitude = whole(site.layer.lora_magnitude_vector[site.adapter].weight.detach())
            scales[site.name] = magnitude / row_norms(site)
    return scales


def row_norms(site: Any) -> Tensor:
    """``||W + s B A||`` of a LoRA layer's rows, [d_out]."""
    weight = plain_weight(site.layer.get_base_layer())
    weight = weight.T if site.layer.fan_in_fan_out else weight  # GPT-2 keeps W transposed
    norms: Tensor = (weight + site.scaling * (site.b @ site.a).detach()).norm(dim=1)
    return norms


def base_layers(sites: Sequence[Site]) -> dict[str, nn.Module]:
    """The layers by name, without the adapters around them."""
    return {s.name: s.layer.get_base_layer() if isinstance(s, LoraSite) else s.layer for s in sites}


def plain_weight(layer: nn.Module) -> Tensor:
    """What a linear layer's weights stand for, whole; the layer stays as it is.

    On a CPU PEFT leaves a copy in the place of quantised weights, and that of 8-bit ones has lost
    its scales.
    """
    stored = layer._parameters.get("weight")
    try:
        return whole(dequantize_module_weight(layer).detach())
    finally:
        if stored is not None and layer._parameters["weight"] is not stored:
            layer._parameters["weight"] = stored


def is_idle(sites: Sequence[Site]) -> bool:
    """Whether all layers carry plain LoRA whose B is zero, as a fresh adapter's is.

    The model's outputs and the gradients at its layers' outputs are then those of the base model.
    """
    return all(
        isinstance(site, LoraSite)
        and not site.layer.merged
        and not getattr(site.layer, "lora_variant", {})
        and not bool(site.b.any())
        and site.lora_b.bias is None
        for site in sites
    )


def bypassed(sites: Sequence[Site]) -> AbstractContextManager[None]:
    """Runs the layers without their adapters. What is trainable stays so, unlike in PEFT's own."""
    return disabled(site.layer for site in sites if isinstance(site, LoraSite))


@contextmanager
def disabled(layers: Iterable[Any]) -> Iterator[None]:
    """Sets the switches of PEFT's layers to off, and nothing else; it may be nested."""
    before = [(layer, layer._disable_adapters) for layer in layers]
    try:
        for layer, _ in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in before:
            layer._disable_adapters = was
