"""What a displacement that stays adds to the quadratic of one that moves.

With P the displacement that stays and D = L R the one that moves, F = G (x) S:

    0.5 <P + D, F (P + D)> = 0.5 <P, F P> + <D, F P> + 0.5 <D, F D> ,   F P = (G L_P) (R_P S) .

F P is made once, so a step costs what the rank of D does, however much stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.curvature import Curvature, Pull
from retain.errors import ConfigError
from retain.models.sites import LinearSite, Site

__all__ = ["Beside"]


class Beside:
    """The first two terms.

    Args:
        curvature: of Kronecker factors, in weight space, around the base model.
        stays: a layer's name -> ``(left [d_out, r], right [r, d_in])``.

    Raises:
        ConfigError: another curvature.
    """

    def __init__(self, curvature: Curvature, stays: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        if curvature.info.space != "weight" or curvature.anchor:
            raise ConfigError(
                "what stays can be read around the base model alone",
                got=f"a curvature in {curvature.info.space} space, "
                + ("around a later anchor" if curvature.anchor else "around the base model"),
                allowed="weight space, around the base model",
                fix="the curvature as it was fitted, with space='weight'",
            )
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.nats = 0.0
        with torch.no_grad():
            for name, (left, right) in stays.items():
                block = curvature.blocks[name]
                if not isinstance(block, KroneckerBlock) or curvature.links:
                    raise ConfigError(
                        "what stays has no Kronecker factors to be read by",
                        got=f"a curvature of structure {curvature.info.structure}",
                        allowed="kfac or shampoo in weight space",
                        fix="structure='kfac'",
                    )
                left, right = (m.to(next(iter(block.tensors().values()))) for m in (left, right))
                u, v = block.outputs.matmul(left), block.inputs.matmul(right.T).T
                self.nats += 0.5 * float(((left.T @ u) * (v @ right.T).T).sum())
                self._kept[name] = (u, v)

    def pulls(self, sites: Sequence[Site]) -> tuple[float, list[Pull]]:
        """Nats and the gradients in each layer's B and A, in the order of `Curvature.pulls`."""
        found: list[Pull] = []
        values: list[Tensor] = []
        with torch.no_grad():
            for site in sites:
                assert not isinstance(site, LinearSite)  # it has no left and right
                u, v = self._kept[site.name]
                left, right = site.scaling * site.b.detach().to(u), site.a.detach().to(v)
                across, along = v @ right.T, left.T @ u
                values.append((along * across.T).sum())
                found.append(Pull(site.b, site.scaling * (u @ across)))
                found.append(Pull(site.a, along @ v))
        return self.nats + float(torch.stack(values).sum()), found
