"""L2 to the anchor: ``0.5 ||D||^2`` of each layer's update, the identity for a curvature.

For LoRA, D is the update ``s B A - s B_0 A_0`` of the weight, not A or B; for full fine-tuning and
for the modules of a bottleneck it is the move of the weight itself. Nothing is measured, so its
unit is no nat. After a task the anchor moves and the strength stays.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from retain.curvature.anchor import anchor_of, site_tensor
from retain.curvature.blocks.identity import IdentityBlock
from retain.curvature.curvature import Curvature, reanchored
from retain.curvature.info import CurvatureInfo, describe
from retain.models.sites import Site
from retain.provenance import versions
from retain.retention.method import Context, Task
from retain.retention.methods.penalty import Penalty

__all__ = ["L2"]


class L2(Penalty):
    """Plain L2 to the anchor; see `Penalty` for the arguments."""

    name = "l2"
    adapters: ClassVar[frozenset[str]] = frozenset({"lora", "full", "bottleneck"})
    why_not: ClassVar[dict[str, str]] = {"prefix": Penalty.why_not["prefix"]}

    def at_begin(self, context: Context) -> Curvature:
        sites: list[Site] = list(context.adapter.view.sites)
        like = site_tensor(sites[0])
        wide = torch.promote_types(like.dtype, torch.float32)
        one = torch.ones((), dtype=wide, device=like.device)
        info = CurvatureInfo(
            structure="identity", space="weight", fisher="mc", tokens=0, predictions=0,
            sequences=0, samples=0, max_length=0, seed=context.seed, error=0.0,
            model=context.adapter.view.fingerprint, sites=describe(sites), versions=versions(),
            note="L2, not measured",
        )  # fmt: skip
        curvature = Curvature({s.name: IdentityBlock(one, s.shape) for s in sites}, {}, info)
        curvature.anchor = anchor_of(curvature, sites)
        return curvature

    def joined(self, curvature: Curvature | None, task: Task) -> Curvature | None:
        assert curvature is not None
        return reanchored(curvature, self.context.adapter.model)
