"""What a recipe says when training begins: what it holds to, and what trains without being held."""

from __future__ import annotations

import torch
from torch import nn

from retain.curvature.anchor import has_update
from retain.errors import warn
from retain.models.heads import has_fitted_head
from retain.models.names import canonical, drawn_layers, head_of, unwrap
from retain.models.off import start_of, taken_out
from retain.models.sites import LinearSite, lora_sites
from retain.retention.force import Force
from retain.retention.named import Curvatures, by_name

__all__ = ["tell_begun_from", "tell_drawn", "tell_head", "tell_unheld"]


def tell_begun_from(model: nn.Module, curvature: Curvatures | None, *, told: bool) -> bool:
    """Whether a curvature is around an adapter that had learned, to which the model is held.

    An initialisation that takes its start out of the base's weights is the base, and one whose B A
    is 0.

    Args:
        model: with its adapter.
        curvature: of the source, or several by name.
        told: say so.
    """
    rounding = torch.finfo(torch.bfloat16).eps
    learned = any(
        each.around_adapter
        and any(has_update(kept[0], kept[1], rounding) for kept in each.anchor.values())
        for each in by_name(curvature).values()
    )
    found = learned and start_of(model) is None and _start_at(model, curvature) is None
    if found and told:
        half = " (or, kept in half precision, cannot be told from one that had)"
        warn(
            "the adapter had learned before its curvature was fitted"
            f"{'' if taken_out(model) is None else half}: the model is held to "
            "what it was then and not to its base, and a budget and kl count from there; a "
            "curvature that was fitted on the plain model holds to the base"
        )
    return found


def _start_at(model: nn.Module, curvature: Curvatures | None) -> object:
    """The start of an adapter that has learned since, where its curvature was fitted fresh."""
    if taken_out(model) is None:
        return None
    first = next(iter(by_name(curvature).values()))
    first.bind(model)  # it is of this model
    scales = {site.name: site.scaling for site in lora_sites(model, sharded=True)}
    whole = first.info.space == "weight"  # where the anchor has the update's own size
    anchor = {
        name: (kept[0] / (scales[name] if whole else 1.0), kept[1])
        for name, kept in first.anchor.items() if len(kept) == 2
    }  # fmt: skip
    return start_of(model, anchor)


def tell_drawn(model: nn.Module) -> None:
    """Says what was drawn when a classifier was loaded, and does not train as its head does."""
    parameters = unwrap(model).named_parameters()
    trained = [canonical(n) for n, p in parameters if p.requires_grad and ".lora_" not in n]
    layers = [
        layer for layer in sorted(drawn_layers(model))
        if not any(name.startswith(f"{layer}.") for name in trained)
    ]  # fmt: skip
    if layers:
        warn(
            f"no checkpoint has the weights of {', '.join(layers)}: each loading draws them "
            "anew, and the adapter is saved without them, so that it will not be this model; "
            f"train them with the head: LoraConfig(modules_to_save={layers}, ...)"
        )


def tell_head(model: nn.Module, curvature: Curvatures | None) -> None:
    """Says of a model that a trainer's ``model_init`` has made, where a fitted head was lost."""
    if any(c.fitted_head for c in by_name(curvature).values()) and not has_fitted_head(model):
        warn(
            "the trainer's model_init has made the model anew, and its head may not be the one "
            "that fit_head fitted and the curvature is around: call fit_head inside of model_init"
        )


def tell_unheld(model: nn.Module, force: Force) -> list[str]:
    """What trains and is held by nothing, but for a new head: of full fine-tuning, and tokens.

    Whether a token is new cannot be told from its number.

    Returns:
        The names of those weights.
    """
    whole, of_head = isinstance(force.sites[0], LinearSite), head_of(model)
    unheld = [
        canonical(name) for name in force.unheld(model)
        if not of_head(name) and (whole or "trainable_tokens" in name)
    ]  # fmt: skip
    if unheld and whole:
        warn(
            f"{len(unheld)} weights train, and are held by nothing, such as "
            f"{', '.join(unheld[:3])}: the force knows the weights of linear layers, and "
            "no embeddings, output head, norms, biases or bare parameters of a mixture's "
            "experts; requires_grad_(False) for them, or LoRA"
        )
    elif unheld:
        warn(
            "the tokens of trainable_token_indices are held by nothing, and no budget counts "
            "them: new ones have nothing to keep, but leave out those that the base knows"
        )
    return unheld
