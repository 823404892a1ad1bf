"""A fitted curvature: one block a weight, the anchor, and where it all came from.

Two spaces. In **weight** space a block acts on the update of a layer's weight,
``D = s B A - D_0``, where ``D_0`` is the update at the anchor; nothing depends on how the
product is split, nor on the rank. In **adapter** space there is a block for A and one for B, at
the anchor (A_0, B_0), as in arXiv 2512.17720: at the usual start, B_0 = 0, the block of A is
exactly zero (the output does not move with A there), so only B is held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retain.curvature.block import Block
from retain.errors import MismatchError
from retain.models.adapter import LoraSite, lora_sites
from retain.models.fingerprint import fingerprint
from retain.types import Fisher, Space, Structure

__all__ = ["Curvature", "CurvatureInfo", "Pull", "part"]


def part(site: str, which: str) -> str:
    """Name of a block in adapter space; `which` is ``lora_A`` or ``lora_B``."""
    return f"{site}.{which}"


@dataclass(frozen=True)
class CurvatureInfo:
    """Where a curvature came from.

    Attributes:
        structure: identity, diagonal, kfac or shampoo.
        space: weight or adapter.
        fisher: mc, empirical or exact.
        tokens: source tokens that were read.
        predictions: predictions among them; the curvature is a mean over these.
        sequences: source rows.
        samples: label draws for each prediction (mc).
        max_length: longest row, in tokens.
        seed: of the label draws.
        error: relative standard error of the whole trace, from text and label draws.
        model: fingerprint of the base model.
        sites: layer -> [d_out, d_in, r, scaling].
        versions: of the libraries.
        note: free text, such as the source's name.
    """

    structure: Structure
    space: Space
    fisher: Fisher
    tokens: int
    predictions: int
    sequences: int
    samples: int
    max_length: int
    seed: int
    error: float
    model: str
    sites: dict[str, list[float]]
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


class Pull(NamedTuple):
    """One parameter and the gradient of the quadratic in it."""

    parameter: nn.Parameter
    gradient: Tensor


class Curvature:
    """``quadratic(model)``: how many nats per token the model is predicted to have moved.

    Args:
        blocks: layer (weight space) or `part` (adapter space) -> block.
        anchor: layer -> (B_0 with the scaling in it, A_0). In weight space a layer without an
            entry is anchored at the base weight. In adapter space each layer has one.
        info: where the curvature came from.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        anchor: Mapping[str, tuple[Tensor, Tensor]],
        info: CurvatureInfo,
    ) -> None:
        self.blocks, self.anchor, self.info = dict(blocks), dict(anchor), info

    def __repr__(self) -> str:
        i = self.info
        return (
            f"Curvature({i.structure}, {i.space} space, {i.fisher} Fisher, {len(i.sites)} layers, "
            f"{i.tokens} tokens, {self.memory() / 2**20:.1f} MiB)"
        )

    def quadratic(self, model: nn.Module) -> float:
        """Predicted ``KL(anchor || model)`` in nats per source token.

        Raises:
            MismatchError: the curvature belongs to another base model or adapter.
        """
        return self.pulls(self.bind(model))[0]

    def bind(self, model: nn.Module) -> list[LoraSite]:
        """The model's LoRA layers, checked to be those of this curvature.

        The curvature moves to the device of the layers.

        Raises:
            MismatchError: another base model, other layers, or (adapter space) another rank.
        """
        sites = lora_sites(model)
        found = describe(sites)
        want = self.info.sites
        mine, theirs = fingerprint(model), self.info.model
        if mine != theirs:
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
        if self.info.space == "adapter":
            for name, shape in want.items():
                if found[name][2:] != shape[2:]:
                    raise MismatchError(
                        "an adapter-space curvature belongs to one rank and scaling",
                        got=f"r={found[name][2]:g}, scaling={found[name][3]:g} at {name}",
                        allowed=f"r={shape[2]:g}, scaling={shape[3]:g}",
                        fix="use that rank, or fit with space='weight', which fits any rank",
                    )
        self.to(sites[0].a.device)
        return sites

    def to(self, device: torch.device) -> Curvature:
        """Moves the tensors to a device, in place."""
        held = next(iter(next(iter(self.blocks.values())).tensors().values())).device
        if held != device:
            self.blocks = {n: b.to(device) for n, b in self.blocks.items()}
            self.anchor = {n: (b.to(device), a.to(device)) for n, (b, a) in self.anchor.items()}
        return self

    def pulls(self, sites: list[LoraSite]) -> tuple[float, list[Pull]]:
        """The quadratic and its gradient in each LoRA parameter, in closed form.

        In weight space, with ``F`` a layer's block: ``dB = s F(D) A^T`` and ``dA = s B^T F(D)``.
        """
        values: list[Tensor] = []
        pulls: list[Pull] = []
        with torch.no_grad():
            for site in sites:
                dtype = self._dtype(site)
                a, b = site.a.detach().to(dtype), site.b.detach().to(dtype)
                if self.info.space == "adapter":
                    b0, a0 = self.anchor[site.name]
                    for which, p, d in (("lora_A", site.a, a - a0), ("lora_B", site.b, b - b0)):
                        fd = self.blocks[part(site.name, which)].matvec(d)
                        values.append(0.5 * (d * fd).sum())
                        pulls.append(Pull(p, fd))
                    continue
                s, r = site.scaling, site.rank
                left, right = s * b, a
                if site.name in self.anchor:
                    b0, a0 = self.anchor[site.name]
                    left, right = torch.cat([left, -b0], 1), torch.cat([right, a0], 0)
                thin = self.blocks[site.name].thin(left, right)
                values.append(thin.value)
                pulls.append(Pull(site.b, s * thin.left[:, :r]))
                pulls.append(Pull(site.a, thin.right[:r]))
        return float(torch.stack(values).sum()), pulls

    def proximal(self, site: LoraSite, tau_b: float, tau_a: float) -> None:
        """One implicit step of the quadratic on a layer, in place: first B, then A.

        Each half solves its own convex problem exactly, so the quadratic never grows, whatever
        the steps: ``X = argmin 0.5 ||X - X'||^2 + tau q(X)``.

        Args:
            site: the layer.
            tau_b: step times strength for B.
            tau_a: the same for A.
        """
        dtype = self._dtype(site)
        with torch.no_grad():
            a, b = site.a.detach().to(dtype), site.b.detach().to(dtype)
            if self.info.space == "adapter":
                b0, a0 = self.anchor[site.name]
                block_a = self.blocks[part(site.name, "lora_A")]
                block_b = self.blocks[part(site.name, "lora_B")]
                new_b, new_a = b0 + block_b.prox(b - b0, tau_b), a0 + block_a.prox(a - a0, tau_a)
            else:
                block, s = self.blocks[site.name], site.scaling
                b0, a0 = self.anchor.get(site.name, (b[:, :0], a[:0]))
                new_b = block.prox_left(b, s * a, b0, a0, tau_b)
                new_a = block.prox_right(a, s * new_b, b0, a0, tau_a)
            if site.b.requires_grad:
                site.b.copy_(new_b)
            if site.a.requires_grad:
                site.a.copy_(new_a)

    def memory(self) -> int:
        """Bytes that the blocks and the anchor take; shared tensors count once."""
        tensors = [t for b in self.blocks.values() for t in b.tensors().values()]
        tensors += [t for pair in self.anchor.values() for t in pair]
        unique = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        return sum(unique.values())

    def load_anchor(self, model: nn.Module) -> None:
        """Sets the model's adapter to the anchor (adapter space, where its A matters).

        Raises:
            MismatchError: a curvature of weight space, whose anchor is an update, not factors.
        """
        sites = self.bind(model)
        if self.info.space != "adapter":
            raise MismatchError(
                "only an adapter-space curvature has factors to start from",
                got="space='weight'",
                allowed="space='adapter'",
                fix="start from any adapter with the anchor's update",
            )
        with torch.no_grad():
            for site in sites:
                b0, a0 = self.anchor[site.name]
                site.a.copy_(a0)
                site.b.copy_(b0)

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all; see `retain.curvature.artifact`."""
        from retain.curvature.artifact import save_curvature

        return save_curvature(self, path)

    def at_anchor(self, sites: list[LoraSite]) -> bool:
        """Whether the adapter's present weights are the anchor's (adapter space)."""
        return all(
            torch.equal(site.a.detach(), a0.to(site.a.dtype))
            and torch.equal(site.b.detach(), b0.to(site.b.dtype))
            for site in sites
            for b0, a0 in [self.anchor[site.name]]
        )

    def _dtype(self, site: LoraSite) -> torch.dtype:
        name = site.name if self.info.space == "weight" else part(site.name, "lora_B")
        return next(iter(self.blocks[name].tensors().values())).dtype


def describe(sites: list[LoraSite]) -> dict[str, list[float]]:
    """Layer -> [d_out, d_in, r, scaling]."""
    return {s.name: [*s.shape, s.rank, s.scaling] for s in sites}
