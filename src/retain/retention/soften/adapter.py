"""Softening: the trade-off between learning and forgetting of a finished adapter, with no training.

Each layer's finished update D* = s B A is pulled towards the base model along what forgets most:

    D(mu) = argmin  0.5 <D - D*, F_t (D - D*)> + mu 0.5 <D, F_s D>,    mu from 0 to infinity,

with F_s the curvature of the source text and F_t that of the task (the identity without one). This
is a Fisher-weighted average of the base and the tuned model (Matena and Raffel, arXiv 2111.09832)
with one weight, mu, for all layers; with F_t = F_s it is the interpolation of the two (arXiv
2109.01903). The predicted nats, ``sum 0.5 <D, F_s D>``, fall as mu grows, so a budget of nats fixes
mu. Each layer is solved in a small subspace, see `retain.retention.soften.subspace`. What comes out
may have a higher rank there than the adapter, and is cut to it. All numbers are those of what is
left then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retain.curvature.curvature import Curvature
from retain.errors import ConfigError, CurvatureError, MismatchError, ModelError, check_number
from retain.models.forward import no_autocast
from retain.models.names import of_head, unwrap
from retain.models.off import left_on
from retain.models.sites import LoraSite, lora_sites
from retain.retention.soften.curve import Softening
from retain.retention.soften.subspace import AdapterSubspace, KroneckerSubspace, Subspace, sides

__all__ = ["soften"]

WIDEST = 32
"""Largest rank where a layer is one matrix of rank^2 rows."""


@no_autocast()
def soften(
    model: nn.Module,
    curvature: Curvature,
    *,
    target: Curvature | None = None,
    depth: int | None = None,
    epsilon: float = 1e-3,
) -> Softening:
    """Prepares all softened versions of a model's LoRA adapter; changes nothing.

    Args:
        model: a PEFT model with its finished adapter.
        curvature: of the source text, in weight space, around the base model.
        target: of the task's rows, in weight space; best around the finished adapter itself (or
            around the base). Without one, an update's distance from the finished one counts.
        depth: of the subspaces, 0 or more. By default 2, and 1 with a target, where each step adds
            twice as much; 0 where a curvature is no Kronecker product (or identity), which then is
            all there is.
        epsilon: what is added to the target's sides (or its diagonal), relative to their mean
            diagonal, since what its text never reads would cost nothing to lose.

    Raises:
        MismatchError: a curvature of another model, of adapter space, or around another point.
        ModelError: an adapter that is more than plain LoRA, or not finite.
        CurvatureError: a structure that ties layers to each other.
        ConfigError: a depth or an epsilon out of range.
    """
    check_number("epsilon is out of range", epsilon, "1e-3", positive=True)
    sites = lora_sites(model)
    _check_adapter(model, sites)
    for given in [curvature] if target is None else [curvature, target]:
        _check_curvature(given, model)
    if curvature.anchor:
        raise MismatchError(
            "the curvature stands around an adapter, and softening leads to the base model",
            got=f"an anchor at {len(curvature.anchor)} layers",
            allowed="a curvature around the base model",
            fix="fit it on the source text without --adapter",
        )
    if target is not None:
        _check_target(target, sites)
    whole = all(
        sides(block) for c in (curvature, target) if c is not None for block in c.blocks.values()
    )
    _check_depth(depth, whole, sites)
    usual = 0 if not whole else 2 if target is None else 1
    deep = usual if depth is None else depth
    spans: dict[str, Subspace] = {}
    for site in sites:
        left = site.scaling * site.b.detach().double()
        right = site.a.detach().double()
        if not (bool(left.any()) and bool(right.any())):
            continue
        far = curvature.blocks[site.name]
        near = None if target is None else target.blocks[site.name]
        pair, other = sides(far), None if near is None else sides(near)
        if pair is not None and whole:
            spans[site.name] = KroneckerSubspace(left, right, pair, other, deep, epsilon)
        else:
            spans[site.name] = AdapterSubspace(left, right, far, near, epsilon)
    return Softening(sites, spans, deep)


def _check_depth(depth: int | None, whole: bool, sites: list[LoraSite]) -> None:
    if depth is not None and (depth < 0 or (depth > 0 and not whole)):
        raise ConfigError(
            "the depth is out of range",
            got=depth,
            allowed="0 or more" if whole else "0, the adapter's own span, for these structures",
            fix="leave it out" if whole else "--depth 0, or fit shampoo, kfac or activation",
        )
    widest = max(site.rank for site in sites)
    if not whole and widest > WIDEST:
        raise ConfigError(
            "the adapter's rank is too large for a curvature that is no Kronecker product",
            got=widest,
            allowed=f"up to {WIDEST}",
            fix="fit shampoo, kfac or activation, which soften any rank",
        )


def _check_curvature(curvature: Curvature, model: nn.Module) -> None:
    if curvature.info.space != "weight":
        raise MismatchError(
            "the curvature is one of A and B, and softening needs one of their product",
            got=f"space={curvature.info.space!r}",
            allowed="space='weight'",
            fix="fit it with --space weight",
        )
    if curvature.links:
        raise CurvatureError(
            "the curvature ties layers to each other, and each layer is softened by itself",
            got=curvature.info.structure,
            allowed="shampoo, kfac, activation, identity, diagonal, ekfac",
            fix="fit it with --structure kfac",
        )
    curvature.bind(model)


def _check_target(target: Curvature, sites: list[LoraSite]) -> None:
    """Refuses a target around another adapter; around this one or the base it may stand."""
    for site in sites:
        if site.name not in target.anchor:
            continue
        b0, a0 = (t.double() for t in target.anchor[site.name])
        b, a = site.scaling * site.b.detach().double(), site.a.detach().double()
        # |B A - B_0 A_0|^2 from thin products
        left, right = torch.cat([b, -b0], 1), torch.cat([a, a0], 0)
        size, far = _square(b, a), _square(left, right)
        if far > 1e-4 * max(size, _square(b0, a0)):
            raise MismatchError(
                "the target's curvature stands around another adapter",
                got=f"another update of {site.name}",
                allowed="a curvature around the adapter that is softened, or around the base",
                fix="fit it on the task's rows with --adapter and this adapter's folder",
            )


def _check_adapter(model: nn.Module, sites: list[LoraSite]) -> None:
    """Refuses an adapter that is more than s B A (but for a new head), or not finite."""
    inner: Any = unwrap(model)
    config = inner.peft_config[sites[0].adapter]
    saved = [n for n in config.modules_to_save or [] if not of_head(n)]
    more = [
        what
        for what, there in (
            ("DoRA", any(site.dora for site in sites)),
            (f"whole modules ({', '.join(saved)})", bool(saved)),
            (f"biases ({config.bias})", config.bias != "none"),
            ("biases of B", any(site.lora_b.bias is not None for site in sites)),
        )
        if there
    ]
    left = None if more else left_on(inner)
    more += [left[0]] if left is not None else []
    if more:
        raise ModelError(
            "the adapter is more than an update B A of linear layers, so it cannot be softened",
            got=", ".join(more),
            allowed="plain LoRA",
            fix="train plain LoRA: init_lora_weights=True, no use_dora, modules_to_save or bias",
        )
    odd = [s.name for s in sites if not bool(s.a.isfinite().all() and s.b.isfinite().all())]
    if odd:
        raise ModelError(
            "the adapter's weights are not finite",
            got=odd[0],
            allowed="finite numbers",
            fix="train it again with a smaller learning rate",
        )


def _square(left: Tensor, right: Tensor) -> float:
    """``|L R|^2``, Frobenius."""
    return float(((left.T @ left) * (right @ right.T)).sum())
