"""A fitted curvature: one block a weight, the anchor, and where it all came from.

Two spaces. In **weight** space a block acts on the update of a layer's weight,
``D = s B A - D_0``, where ``D_0`` is the update at the anchor; nothing depends on how the
product is split, nor on the rank. In **adapter** space there is a block for A and one for B, at
the anchor (A_0, B_0), as in arXiv 2512.17720: at the usual start, B_0 = 0, the block of A is
exactly zero (the output does not move with A there), so only B is held.

It is a linear operator: ``matvec``, ``quadratic``, ``to_dense``, ``a + b``, ``c * a``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from retain.curvature.anchor import Anchor, check_sites
from retain.curvature.blocks.base import Block
from retain.curvature.blocks.factor import DenseFactor, Factor
from retain.curvature.blocks.identity import IdentityBlock
from retain.curvature.blocks.offdiagonal import Link
from retain.curvature.displacement import Moves, anchor_of, place
from retain.curvature.info import CurvatureInfo, part
from retain.curvature.stack import Stack, stacks
from retain.errors import ConfigError, MismatchError
from retain.models.forward import no_autocast
from retain.models.sites import LinearSite, LoraSite, Site, find_sites

__all__ = ["Anchor", "Curvature", "Pull"]


class Pull(NamedTuple):
    """One parameter and the gradient of the quadratic in it."""

    parameter: nn.Parameter
    gradient: Tensor


class Curvature:
    """``quadratic(model)``: how many nats per token the model is predicted to have moved.

    Args:
        blocks: layer (weight space) or `part` (adapter space) -> block.
        anchor: see `Anchor`. In weight space a LoRA layer without an entry is anchored at the
            base weight. In adapter space, and for full fine-tuning, each layer has one.
        info: where the curvature came from.
        links: (i, j) -> what ties two neighbouring blocks (``tridiagonal``).
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        anchor: Anchor,
        info: CurvatureInfo,
        links: Mapping[tuple[str, str], Link] | None = None,
    ) -> None:
        self.blocks, self.anchor, self.info = dict(blocks), dict(anchor), info
        self.links = dict(links or {})
        self._stacks: dict[bool, list[Stack]] = {}

    def __repr__(self) -> str:
        i = self.info
        return (
            f"Curvature({i.structure}, {i.space} space, {i.fisher} Fisher, {len(i.sites)} layers, "
            f"{i.tokens} tokens, {self.memory() / 2**20:.1f} MiB)"
        )

    @no_autocast()
    def matvec(self, d: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F d, for displacements by block name: each of its block's shape."""
        self._check_names(d)
        out = {name: block.matvec(d[name]) for name, block in self.blocks.items()}
        for (i, j), link in self.links.items():
            out[i] = out[i] + link.matvec(d[j])
            out[j] = out[j] + link.transposed(d[i])
        return out

    @no_autocast()
    def quadratic(self, at: nn.Module | Mapping[str, Tensor]) -> float:
        """Predicted ``KL(anchor || model)`` in nats per source token: ``0.5 d^T F d``.

        Args:
            at: a model, or displacements by block name.

        Raises:
            MismatchError: the curvature belongs to another base model or adapter.
        """
        if isinstance(at, nn.Module):
            return self.pulls(self.bind(at))[0]
        moved = self.matvec(at)
        return 0.5 * sum(float((at[name] * fd).sum()) for name, fd in moved.items())

    def to_dense(self) -> Tensor:
        """F as one matrix on the row-major vectors of all blocks in order; for small ones."""
        sizes = [b.shape[0] * b.shape[1] for b in self.blocks.values()]
        dense: Tensor = torch.block_diag(*(b.to_dense() for b in self.blocks.values()))
        ends = dict(zip(self.blocks, torch.tensor(sizes).cumsum(0).tolist(), strict=True))
        spans = {n: slice(ends[n] - size, ends[n]) for n, size in zip(ends, sizes, strict=True)}
        for (i, j), link in self.links.items():
            dense[spans[i], spans[j]] = link.to_dense()
            dense[spans[j], spans[i]] = dense[spans[i], spans[j]].T
        return dense

    def __add__(self, other: Curvature) -> Curvature:
        """Both quadratics at once, at the memory of one; see `retain.curvature.merge`."""
        from retain.curvature.merge import merge

        return merge(self, other) if isinstance(other, Curvature) else NotImplemented

    def __mul__(self, c: float) -> Curvature:
        if not isinstance(c, int | float):
            return NotImplemented
        if not (math.isfinite(c) and c >= 0):
            raise ConfigError(
                "a curvature cannot be multiplied by this",
                got=c,
                allowed="a finite number, 0 or above: a penalty must not pay for drift",
                fix="multiply by a weight of at least 0",
            )
        scales: dict[int, Tensor] = {}  # the identity has one for all
        blocks = {
            name: block.moved(lambda f: f, lambda t: scales.setdefault(id(t), c * t))
            if isinstance(block, IdentityBlock)
            else block.scaled(c)
            for name, block in self.blocks.items()
        }
        links = {
            pair: Link(link.inputs, c * link.outputs, link.weight)
            for pair, link in self.links.items()
        }
        return Curvature(blocks, self.anchor, self.info, links)

    __rmul__ = __mul__

    def bind(self, model: nn.Module) -> list[Site]:
        """The model's layers, checked to be those of this curvature.

        The curvature moves to the device of the layers.

        Raises:
            MismatchError: another base model, other layers, or (adapter space) another rank.
        """
        sites: list[Site] = list(find_sites(model))
        check_sites(model, sites, self.info, self.anchor)
        self.to(place(sites[0]).device)
        return sites

    def to(self, device: torch.device) -> Curvature:
        """Moves the tensors to a device, in place; what was shared stays shared."""
        held = next(iter(next(iter(self.blocks.values())).tensors().values())).device
        if held == device:
            return self
        factors: dict[int, Factor] = {}
        tensors: dict[int, Tensor] = {}

        def tensor(t: Tensor) -> Tensor:
            return tensors.setdefault(id(t), t.to(device))

        def factor(f: Factor) -> Factor:
            if id(f) not in factors:
                factors[id(f)] = f.to(device)
                if isinstance(f, DenseFactor):
                    tensors[id(f.matrix)] = factors[id(f)].dense()
            return factors[id(f)]

        self.blocks = {n: b.moved(factor, tensor) for n, b in self.blocks.items()}
        self._stacks = {}
        self.links = {
            pair: Link(tensor(link.inputs), tensor(link.outputs), link.weight)
            for pair, link in self.links.items()
        }
        self.anchor = {n: tuple(t.to(device) for t in kept) for n, kept in self.anchor.items()}
        return self

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
        with torch.no_grad():
            moves = Moves.of(self, sites)
            values, thin = self._thin(moves, rounded and not self.anchor)
            full = {n: self.blocks[n].matvec(d) for n, d in moves.full.items()}
            values += [0.5 * (d * full[n]).sum() for n, d in moves.full.items()]
            for (i, j), link in self.links.items():
                if i in full:
                    di, dj = moves.full[i], moves.full[j]
                    forward = link.matvec(dj)
                    values.append((di * forward).sum())
                    full[i], full[j] = full[i] + forward, full[j] + link.transposed(di)
                    continue
                (li, ri), (lj, rj) = moves.thin[i], moves.thin[j]
                p, q = link.forward(lj, rj)
                lp, rq = li.T @ p, ri @ q.T
                values.append((lp * rq).sum())
                thin[i] = (thin[i][0] + p @ rq.T, thin[i][1] + lp @ q)
                p, q = link.backward(li, ri)
                thin[j] = (thin[j][0] + p @ (q @ rj.T), thin[j][1] + (lj.T @ p) @ q)
            pulls: list[Pull] = []
            for site in sites:
                if isinstance(site, LinearSite):
                    pulls.append(Pull(site.weight, full[site.name]))
                elif self.info.space == "adapter":
                    pulls.append(Pull(site.a, full[part(site.name, "lora_A")]))
                    pulls.append(Pull(site.b, full[part(site.name, "lora_B")]))
                else:
                    left, right = thin[site.name]
                    pulls.append(Pull(site.b, site.scaling * left[:, : site.rank]))
                    pulls.append(Pull(site.a, right[: site.rank]))
            return float(torch.stack(values).sum()), pulls

    def drop_rounded(self) -> None:
        """Frees the copies in bfloat16 that `pulls` has made."""
        self._stacks.pop(True, None)

    def _thin(
        self, moves: Moves, rounded: bool
    ) -> tuple[list[Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Values and gradients of the thin moves, like layers together."""
        values: list[Tensor] = []
        out: dict[str, tuple[Tensor, Tensor]] = {}
        if rounded not in self._stacks:
            # A link may share a block's factor, which must stay where it is.
            idle = bool(self.links) or not moves.thin
            self._stacks[rounded] = [] if idle else stacks(self.blocks, rounded=rounded)
        for stack in self._stacks[rounded]:
            if stack.fits(moves.thin):
                value, found = stack.thin(moves.thin)
                values.append(value)
                out |= found
        for name, (left, right) in moves.thin.items():
            if name not in out:
                thin = self.blocks[name].thin(left, right)
                values.append(thin.value)
                out[name] = (thin.left, thin.right)
        return values, out

    def memory(self) -> int:
        """Bytes that the blocks, links and the anchor take; shared tensors count once.

        Copies in bfloat16 that a force has made, see `pulls`, count too.
        """
        tensors = [t for b in self.blocks.values() for t in b.tensors().values()]
        tensors += [t for link in self.links.values() for t in (link.inputs, link.outputs)]
        tensors += [t for kept in self.anchor.values() for t in kept]
        tensors += [t for stack in self._stacks.get(True, []) for t in stack.tensors()]
        unique = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        return sum(unique.values())

    def load_anchor(self, model: nn.Module) -> None:
        """Sets the model to the anchor: the adapter in adapter space, where its A matters, or the
        weights of a fully trained model.

        Raises:
            MismatchError: a curvature of weight space, whose anchor is an update, not factors.
        """
        sites = self.bind(model)
        with torch.no_grad():
            for site in sites:
                if isinstance(site, LinearSite):
                    site.weight.copy_(self.anchor[site.name][0])
                elif self.info.space == "adapter":
                    b0, a0 = self.anchor[site.name]
                    site.a.copy_(a0)
                    site.b.copy_(b0)
                else:
                    raise MismatchError(
                        "only an adapter-space curvature has factors to start from",
                        got="space='weight'",
                        allowed="space='adapter'",
                        fix="start from any adapter with the anchor's update",
                    )

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all; see `retain.curvature.artifact`."""
        from retain.curvature.artifact import save_curvature

        return save_curvature(self, path)

    def at_anchor(self, sites: Sequence[Site]) -> bool:
        """Whether the present weights are the anchor's: LoRA's A and B, or full weights."""
        if self.info.space == "weight" and isinstance(sites[0], LoraSite):
            now = anchor_of(self, sites)
            return now.keys() == self.anchor.keys() and all(
                torch.equal(x, y.to(x))
                for name, pair in now.items()
                for x, y in zip(pair, self.anchor[name], strict=True)
            )
        for site in sites:
            kept = self.anchor[site.name]
            held = (site.b, site.a) if isinstance(site, LoraSite) else (site.weight,)
            if not all(
                torch.equal(p.detach(), t.to(p.dtype)) for p, t in zip(held, kept, strict=True)
            ):
                return False
        return True

    def _check_names(self, d: Mapping[str, Tensor]) -> None:
        odd = [n for n, b in self.blocks.items() if n not in d or tuple(d[n].shape) != b.shape]
        if odd or len(d) != len(self.blocks):
            raise MismatchError(
                "the displacements are not those of the blocks",
                got=f"{len(d)} displacements, the first that is missing or odd is "
                f"{(odd or sorted(set(d) - set(self.blocks)))[0]}",
                allowed=f"{len(self.blocks)} of them by block name, each of its block's shape",
                fix="see curvature.blocks",
            )
