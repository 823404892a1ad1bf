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

import torch
from torch import Tensor, nn

from retain.curvature.curvature import Curvature
from retain.curvature.merge import square
from retain.errors import ConfigError, CurvatureError, MismatchError, ModelError, check_number
from retain.models.forward import no_autocast
from retain.models.names import head_of
from retain.models.off import left_on
from retain.models.sites import LoraSite
from retain.models.view import ModelView
from retain.retention.given import check_curvature
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
        ConfigError: a depth or an epsilon out of range, or what is no curvature.
    """
    check_number("epsilon is out of range", epsilon, "1e-3", positive=True)
    check_curvature(curvature)
    if target is not None:
        check_curvature(target, "target")
    view = ModelView.of(model)
    _check_adapter(view)
    given = [curvature] if target is None else [curvature, target]
    for one in given:
        _check_curvature(one, model)
    if curvature.around_adapter:
        raise MismatchError(
            "the curvature stands around an adapter, and softening leads to the base model",
            got=f"an anchor at {len(curvature.anchor)} layers",
            allowed="one around the base model", fix="fit it on the source text without --adapter",
        )  # fmt: skip
    whole = all(sides(block) for one in given for block in one.blocks.values())
    _check_depth(depth, whole, view.lora)
    if depth is None:
        depth = 0 if not whole else 2 if target is None else 1
    spaces: dict[str, Subspace] = {}
    for site in view.lora:
        left, right = _product(site)
        if target is not None and len(target.anchor.get(site.name, ())) == 2:
            _check_around(target, site)
        if not (bool(left.any()) and bool(right.any())):
            continue
        far = curvature.blocks[site.name]
        near = None if target is None else target.blocks[site.name]
        pair = sides(far)
        if whole and pair is not None:
            other = None if near is None else sides(near)
            spaces[site.name] = KroneckerSubspace(left, right, pair, other, depth, epsilon)
        else:
            spaces[site.name] = AdapterSubspace(left, right, far, near, epsilon)
    return Softening(view.lora, spaces, depth)


def _product(site: LoraSite) -> tuple[Tensor, Tensor]:
    """(L, R) in float64 with ``L R = s B A``."""
    return site.scaling * site.b.detach().double(), site.a.detach().double()


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
            got=widest, allowed=f"up to {WIDEST}",
            fix="fit shampoo, kfac or activation, which soften any rank",
        )  # fmt: skip


def _check_curvature(curvature: Curvature, model: nn.Module) -> None:
    if curvature.info.space != "weight":
        raise MismatchError(
            "the curvature is one of A and B, and softening needs one of their product",
            got=f"space={curvature.info.space!r}", allowed="space='weight'",
            fix="fit it with --space weight",
        )  # fmt: skip
    if curvature.links:
        raise CurvatureError(
            "the curvature ties layers to each other, and each layer is softened by itself",
            got=curvature.info.structure, fix="fit it with --structure kfac",
            allowed="shampoo, kfac, activation, identity, diagonal, ekfac",
        )  # fmt: skip
    curvature.bind(model)


def _check_around(target: Curvature, site: LoraSite) -> None:
    """Refuses a target that stands around another adapter than this one."""
    b, a = _product(site)
    b0, a0 = (t.double() for t in target.anchor[site.name])
    apart = square(torch.cat([b, -b0], 1), torch.cat([a, a0], 0))  # |B A - B_0 A_0|^2
    if apart > 1e-4 * max(square(b, a), square(b0, a0)):
        raise MismatchError(
            "the target's curvature stands around another adapter",
            got=f"another update of {site.name}",
            allowed="a curvature around the adapter that is softened, or around the base",
            fix="fit it on the task's rows with --adapter and this adapter's folder",
        )


def _check_adapter(view: ModelView) -> None:
    """Refuses an adapter that is more than s B A (but for a new head), or not finite."""
    sites = view.lora
    config = view.model.peft_config[sites[0].adapter]
    of_head = head_of(view.model)
    saved = [n for n in config.modules_to_save or [] if not of_head(n)]
    extra = {
        "DoRA": any(site.dora for site in sites),
        f"whole modules ({', '.join(saved)})": bool(saved),
        f"biases ({config.bias})": config.bias != "none",
        "biases of B": any(site.lora_b.bias is not None for site in sites),
        "rows of tokens": bool(getattr(config, "trainable_token_indices", None)),
    }
    more = [what for what, there in extra.items() if there]
    left = None if more else left_on(view.model)
    if left is not None:
        more = [left[0]]
    if more:
        raise ModelError(
            "the adapter is more than an update B A of linear layers, so it cannot be softened",
            got=", ".join(more),
            allowed="plain LoRA",
            fix="train plain LoRA: init_lora_weights=True, no use_dora, modules_to_save, bias or "
            "trainable_token_indices",
        )
    odd = [s.name for s in sites if not bool(s.a.isfinite().all() and s.b.isfinite().all())]
    if odd:
        raise ModelError(
            "the adapter's weights are not finite", got=odd[0], allowed="finite numbers",
            fix="train it again with a smaller learning rate",
        )  # fmt: skip
