"""A linear probe: logistic or ridge regression on given features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["RIDGES", "Probe", "fit_probe"]

RIDGES = tuple(10 ** (power / 2) for power in range(4, -7, -1))
"""What is tried, from 100, which leaves next to nothing of the features, to 0.001."""

FOLDS = 5

LEAST = 0.01


@dataclass(frozen=True)
class Probe:
    """A fit.

    Attributes:
        weight: [classes, width]; of a regression [1, width].
        bias: [classes].
        mean: of the features, [width].
        ridge: the penalty's weight, for features of unit size.
        loss: in cross-validation: nats, or squared errors of a regression, a row.
        known: the same of the classes' shares, or of the mean value, without any feature.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    ridge: float
    loss: float
    known: float

    @property
    def tells(self) -> bool:
        """Whether the features foretell anything: a hundredth of what is not known without them."""
        return self.loss < (1 - LEAST) * self.known


def fit_probe(features: Tensor, targets: Tensor, classes: int, seed: int = 0) -> Probe:
    """The linear map that predicts targets from features, with the best ridge of `RIDGES`.

    It minimises, with z the features less their mean and over their size (one number, the root of
    the mean variance),

        mean over rows of loss(W z + b, target)  +  ridge / 2 ||W||^2

    where the loss is the cross-entropy, or half the squared error of a regression. The ridge is
    the one that predicts best in five-fold cross-validation, each class dealt out among the parts.

    Args:
        features: [rows, width].
        targets: [rows], classes from 0, or the values of a regression.
        classes: 1 is a regression.
        seed: of the parts.

    Returns:
        The fit, in float64.
    """
    x, wanted = features.double(), targets.double() if classes == 1 else targets.long()
    mean = x.mean(dim=0)
    centred = x - mean
    size = centred.square().mean().sqrt().clamp(min=1e-12)
    z, back = centred / size, None
    if len(z) < z.shape[1]:  # rows span less than the features: the fit lies in their span
        _, _, back = torch.linalg.svd(z, full_matrices=False)
        z = z @ back.T
    ridge, loss = _best_ridge(z, wanted, classes, seed)
    fitted = _fit(z, wanted, classes, ridge)
    weight, bias = fitted[:, :-1], fitted[:, -1]
    weight = (weight if back is None else weight @ back) / size
    return Probe(weight, bias - weight @ mean, mean, ridge, loss, _known(wanted, classes))


def _known(targets: Tensor, classes: int) -> float:
    """The loss of the shares, or of the mean."""
    if classes == 1:
        return float(targets.var(correction=0))
    shares = torch.bincount(targets, minlength=classes) / len(targets)
    return float(torch.special.entr(shares.double()).sum())


def _best_ridge(z: Tensor, targets: Tensor, classes: int, seed: int) -> tuple[float, float]:
    """The best of `RIDGES`, from the largest on until three in a row are worse, and its loss."""
    parts = _parts(targets, classes, seed)
    folds = [(parts != k, parts == k) for k in parts.unique().tolist()]
    begun: list[Tensor | None] = [None] * len(folds)
    best, least, worse = RIDGES[0], float("inf"), 0
    for ridge in RIDGES:
        total = 0.0
        for k, (seen, unseen) in enumerate(folds):
            fitted = _fit(z[seen], targets[seen], classes, ridge, begun[k])
            begun[k] = fitted
            total += float(_losses(fitted, z[unseen], targets[unseen]).sum())
        worse = 0 if total < least else worse + 1
        if total < least:
            best, least = ridge, total
        if worse == 3:
            break
    return best, least / len(z)


def _parts(targets: Tensor, classes: int, seed: int) -> Tensor:
    """The part of each row, [rows]: of a shuffled class one after the other."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    if classes > 1:
        order = order[targets[order].argsort(stable=True)]
    parts = torch.empty(len(targets), dtype=torch.long)
    parts[order] = torch.arange(len(targets)) % min(FOLDS, len(targets))
    return parts


def _losses(fitted: Tensor, z: Tensor, targets: Tensor) -> Tensor:
    """Of each row."""
    outputs = z @ fitted[:, :-1].T + fitted[:, -1]
    if len(fitted) == 1:
        return (outputs[:, 0] - targets).square()
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def _fit(
    z: Tensor, targets: Tensor, classes: int, ridge: float, begin: Tensor | None = None
) -> Tensor:
    """Weights with their bias last, [classes, width + 1]."""
    if classes == 1:
        mean, level = z.mean(dim=0), targets.mean()
        centred = z - mean
        gram = centred.T @ centred / len(z) + ridge * torch.eye(z.shape[1], dtype=z.dtype)
        weight = torch.linalg.solve(gram, centred.T @ (targets - level) / len(z))
        return torch.cat([weight, (level - weight @ mean)[None]])[None]
    fitted = z.new_zeros(classes, z.shape[1] + 1) if begin is None else begin.clone()
    fitted.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [fitted], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _losses(fitted, z, targets).mean() + ridge / 2 * fitted[:, :-1].square().sum()
        # a class that has no row in a part would else have a bias without end
        loss = loss + 1e-6 * fitted[:, -1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return fitted.detach()
