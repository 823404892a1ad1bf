"""A fitted curvature: one block a weight, the anchor, and where it all came from.

Two spaces. In **weight** space a block acts on the update of a layer's weight,
``D = s B A - D_0``, where ``D_0`` is the update at the anchor; nothing depends on how the
product is split, nor on the rank. In **adapter** space there is a block for A and one for B, at
the anchor (A_0, B_0), as in arXiv 2512.17720: at the usual start, B_0 = 0, the block of A is
exactly zero (the output does not move with A there), so only B is held.

It is a linear operator: ``matvec``, ``quadratic``, ``to_dense``, ``a + b``, ``c * a``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from retain.curvature.anchor import (
    Displacements,
    anchor_of,
    check_sites,
    constants,
    site_tensor,
    whole_weights,
)
from retain.curvature.artifact import read_curvature, save_curvature
from retain.curvature.info import part
from retain.curvature.merge import merge
from retain.curvature.operator import Anchor, BlockOperator
from retain.curvature.stack import Image, Stack, stacks, total
from retain.errors import MismatchError
from retain.models.fingerprint import fingerprint
from retain.models.forward import no_autocast
from retain.models.shards import scatter
from retain.models.sites import LoraSite, Site, find_sites

__all__ = ["Anchor", "Curvature", "Pull", "load_curvature", "reanchored"]


class Pull(NamedTuple):
    """One parameter and the gradient of the quadratic in it."""

    parameter: nn.Parameter
    gradient: Tensor


class Still(NamedTuple):
    """What a curvature makes of the part of the displacements that does not move (`still`).

    Attributes:
        rows: of A, and columns of B, that train.
        images: of each stack of layers.
        value: the quadratic of that part.
    """

    rows: slice
    images: list[list[Image]]
    value: Tensor | None


class Curvature(BlockOperator):
    """``quadratic(model)``: how many nats a prediction the model is predicted to have moved.

    See `BlockOperator` for the arguments.

    Attributes:
        fitted_head: whether it was fitted, in this process, around a head of `retain.fit_head`.
    """

    fitted_head: bool = False

    def __repr__(self) -> str:
        i = self.info
        return (
            f"Curvature({i.structure}, {i.space} space, {i.fisher} Fisher, {len(i.sites)} layers, "
            f"{i.tokens} tokens, {self.memory() / 2**20:.1f} MiB)"
        )

    @no_autocast()
    def quadratic(self, at: nn.Module | Mapping[str, Tensor]) -> float:
        """Predicted ``KL(anchor || model)`` in nats a prediction: ``0.5 d^T F d``.

        Args:
            at: a model, or displacements by block name, in any precision.

        Raises:
            MismatchError: the curvature belongs to another base model or adapter.
        """
        if isinstance(at, nn.Module):
            return self.pulls(self.bind(at))[0]
        moved = self.matvec(at)
        return 0.5 * sum(float((at[name] * fd).sum()) for name, fd in moved.items())

    def __add__(self, other: Curvature) -> Curvature:
        """Both quadratics at once, at the memory of one; see `retain.curvature.merge`."""
        return merge(self, other) if isinstance(other, Curvature) else NotImplemented

    def bind(self, model: nn.Module) -> list[Site]:
        """The model's layers, checked to be those of this curvature.

        Each block moves to the device of its layer.

        Raises:
            MismatchError: another base model, other layers, or (adapter space) another rank.
        """
        sites: list[Site] = list(find_sites(model, sharded=True))
        check_sites(self, model, sites)
        devices: dict[str, torch.device] = {}
        for site in sites:
            names = (site.name, part(site.name, "lora_A"), part(site.name, "lora_B"))
            devices |= dict.fromkeys(names, site_tensor(site).device)
        self.place(devices)
        return sites

    @no_autocast()
    def pulls(self, sites: Sequence[Site], *, rounded: bool = False) -> tuple[float, list[Pull]]:
        """The quadratic and its gradient in each trained parameter, in closed form.

        In weight space, with ``F`` a layer's block: ``dB = s F(D) A^T`` and ``dA = s B^T F(D)``.

        Args:
            sites: the layers, as `bind` gives them.
            rounded: read float32 Kronecker factors in bfloat16 (a copy of theirs, made once), which
                takes less than half the time where the hardware has such products; the gradient
                then errs by about 0.3 %. Ignored around a later anchor, where
                what is left of two near products would be rounding.
        """
        value, pulls = self.felt(sites, rounded=rounded)
        return float(value), pulls

    @no_autocast()
    def still(self, sites: Sequence[Site], rows: slice) -> Still | None:
        """For `felt` while only some rows train: the pull of all that stays, made once.

        Then a step reads the factors for the rows that train alone, however many tasks came before
        and wherever the anchor is. It holds while the other rows and the anchor stay.

        Args:
            sites: the layers, as `bind` gives them.
            rows: of A, and columns of B, that train.

        Returns:
            None where it would save nothing, or where nothing of the kind is: full weights,
            adapter space, and links.
        """
        lora = [site for site in sites if isinstance(site, LoraSite)]
        whole = rows == slice(None) and not self.anchor
        if whole or self.info.space != "weight" or len(lora) < len(sites):
            return None
        with torch.no_grad():
            parts = constants(self, lora, rows)
            found = [stack.images(parts) for stack in self._of_stacks(False)]
        values = [value for own, _ in found for value in own]
        value = total(values) if values else None
        return Still(rows, [images for _, images in found], value) if found else None

    @no_autocast()
    def felt(
        self, sites: Sequence[Site], *, rounded: bool = False, still: Still | None = None
    ) -> tuple[Tensor, list[Pull]]:
        """`pulls`, whose value stays on its device.

        Args:
            sites: the layers.
            rounded: see `pulls`.
            still: what `still` gave: the pulls are then in its rows alone.
        """
        with torch.no_grad():
            moved = Displacements.of(self, sites)
            values, out = self._stacked(moved, rounded and not self.anchor, still)
            pairs = {n: m.pair() for n, m in moved.thin.items() if n not in out}
            thin = {n: self.blocks[n].thin(*pair) for n, pair in pairs.items()}
            values += [found.value for found in thin.values()]
            lefts = {n: found.left for n, found in thin.items()}
            rights = {n: found.right for n, found in thin.items()}
            full = {n: self.blocks[n].matvec(d) for n, d in moved.full.items()}
            for i, j, link in self.off_diagonal():
                if i in full:
                    full[i] = full[i] + link.matvec(moved.full[j]).to(full[i].device)
                    continue
                left, right = pairs[i]
                p, q = (t.to(left.device) for t in link.thin(*pairs[j]))
                lp, rq = left.T @ p, right @ q.T
                values.append(0.5 * (lp * rq).sum())
                lefts[i], rights[i] = lefts[i] + p @ rq.T, rights[i] + lp @ q
            values += [0.5 * (d * full[n]).sum() for n, d in moved.full.items()]
            for name, left in lefts.items():
                move = moved.thin[name]
                of_b, of_a = move.scaling * left[:, : len(move.a)], rights[name][: len(move.a)]
                out[name] = (
                    (of_b, of_a) if still is None else (of_b[:, still.rows], of_a[still.rows])
                )
            pulls: list[Pull] = []
            for site in sites:
                whole = whole_weights(self, site)
                pulls += [Pull(weight, full[name]) for name, weight, _ in whole]
                if not whole and isinstance(site, LoraSite):
                    of_b, of_a = out[site.name]
                    pulls += [Pull(site.b, of_b), Pull(site.a, of_a)]
            return total(values), pulls

    def drop_rounded(self) -> None:
        """Frees the copies in bfloat16 that `pulls` has made."""
        self._stacks.pop(True, None)

    def _of_stacks(self, rounded: bool) -> list[Stack]:
        """Like layers that lie together."""
        if False not in self._stacks:
            # A link may share a block's factor, which must stay where it is.
            self._stacks[False] = [] if self.links else stacks(self.blocks)
        if rounded and True not in self._stacks:
            self._stacks[True] = [stack.rounded() for stack in self._stacks[False]]
        return self._stacks[rounded]

    def _stacked(
        self, moved: Displacements, rounded: bool, still: Still | None
    ) -> tuple[list[Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Values of the thin moves and gradients in B and A, of like layers that lie together."""
        values: list[Tensor] = []
        out: dict[str, tuple[Tensor, Tensor]] = {}
        if not moved.thin:
            return values, out
        if still is not None:
            moving = {name: move.of(still.rows) for name, move in moved.thin.items()}
            for stack, images in zip(self._of_stacks(rounded), still.images, strict=True):
                found, pulled = stack.pull(moving, images)
                values += found
                out |= pulled
            return values if still.value is None else [*values, still.value], out
        for stack in self._of_stacks(rounded):
            if stack.fits(moved.thin):
                found, pulled = stack.pull(moved.thin)
                values += found
                out |= pulled
        return values, out

    def load_anchor(self, model: nn.Module) -> None:
        """Sets the model to the anchor: the adapter in adapter space, where its A matters, or the
        weights of a fully trained model.

        Raises:
            MismatchError: a curvature of weight space, whose anchor is an update, not factors.
        """
        parts = [part for site in self.bind(model) for part in whole_weights(self, site)]
        if not parts:
            raise MismatchError(
                "only an adapter-space curvature has factors to start from",
                got="space='weight'",
                allowed="space='adapter'",
                fix="start from any adapter with the anchor's update",
            )
        with torch.no_grad():
            for _, weight, start in parts:
                weight.copy_(start)
            scatter(weight for _, weight, _ in parts)

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all; see `retain.curvature.artifact`."""
        return save_curvature(self, path)

    def at_anchor(self, sites: Sequence[Site]) -> bool:
        """Whether the present weights are the anchor's: LoRA's A and B, or full weights."""
        parts = [part for site in sites for part in whole_weights(self, site)]
        if parts:  # compared as the model can hold them
            return all(torch.equal(w.detach(), start.to(w.dtype)) for _, w, start in parts)
        now = anchor_of(self, sites)
        return now.keys() == self.anchor.keys() and all(
            torch.equal(x, kept.to(x))
            for name, pair in now.items()
            for x, kept in zip(pair, self.anchor[name], strict=True)
        )


def load_curvature(path: str | Path) -> Curvature:
    """Reads a curvature file; checks its digest, and that it can be a curvature.

    Raises:
        ArtifactError: no such file, not a curvature file, truncated, altered, or with contents
            that no fit has: see `retain.curvature.artifact`.
    """
    found = read_curvature(path)
    return Curvature(found.blocks, found.anchor, found.info, found.links)


@no_autocast()
def reanchored(curvature: Curvature, model: nn.Module) -> Curvature:
    """The same blocks around the model's present weights: the online Laplace step.

    Args:
        curvature: of weight space, or of adapter space at the model's rank.
        model: the model that carries the adapter, after training.

    Raises:
        MismatchError: the curvature is of another model, or of other layers.
    """
    sites = curvature.bind(model)
    info = replace(curvature.info, model=fingerprint(model))  # a full model's base has moved too
    moved = Curvature(curvature.blocks, {}, info, curvature.links)
    moved.anchor = anchor_of(moved, sites)
    return moved
