"""Whether a curvature belongs to a model: the base, the layers, and in adapter space the rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from retain.curvature.info import CurvatureInfo, describe
from retain.errors import MismatchError
from retain.models.fingerprint import fingerprint
from retain.models.sites import LinearSite, Site

__all__ = ["Anchor", "check_sites"]

Anchor = Mapping[str, tuple[Tensor, ...]]
"""Layer -> (B_0 with the scaling in it, A_0), or (W_0,) where the weight itself is trained."""


def check_sites(
    model: nn.Module, sites: Sequence[Site], info: CurvatureInfo, anchor: Anchor
) -> None:
    """Checks that a curvature belongs to a model.

    Args:
        model: the model.
        sites: its layers.
        info: of the curvature.
        anchor: of the curvature.

    Raises:
        MismatchError: another base model, other layers, or (adapter space) another rank.
    """
    found, want = describe(sites), info.sites
    whole = isinstance(sites[0], LinearSite)  # whose base weights are those that train
    mine, theirs = fingerprint(model), info.model
    if mine != theirs and not whole:
        raise MismatchError(
            "the curvature belongs to another base model",
            got=f"a model with fingerprint {mine}",
            allowed=theirs,
            fix="fit the curvature on this model",
        )
    if set(found) != set(want) or any(found[n][:2] != want[n][:2] for n in want):
        odd = sorted(set(found) ^ set(want)) or [n for n in want if found[n][:2] != want[n][:2]]
        raise MismatchError(
            "the curvature belongs to an adapter on other layers",
            got=f"{len(found)} layers, the first that differs is {odd[0]}",
            allowed=f"the {len(want)} layers it was fitted on",
            fix="use the same target_modules, or fit the curvature again",
        )
    if whole and any(len(anchor.get(name, ())) != 1 for name in want):
        raise MismatchError(
            "the curvature knows no weights to hold a fully trained model at",
            got="one that was fitted on a LoRA model",
            allowed="one that was fitted on the plain model",
            fix="fit the curvature on this model",
        )
    if info.space == "adapter":
        for name, shape in want.items():
            if found[name][2:] != shape[2:]:
                raise MismatchError(
                    "an adapter-space curvature belongs to one rank and scaling",
                    got=f"r={found[name][2]:g}, scaling={found[name][3]:g} at {name}",
                    allowed=f"r={shape[2]:g}, scaling={shape[3]:g}",
                    fix="use that rank, or fit with space='weight', which fits any rank",
                )
