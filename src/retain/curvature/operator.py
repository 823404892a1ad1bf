"""A curvature as a linear operator on displacements of its blocks, without a model.

``F d`` is made of one block a weight and, in a tri-diagonal chain, of what ties neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block, Reader
from retain.curvature.blocks.tridiagonal import OffDiagonal
from retain.curvature.info import CurvatureInfo
from retain.curvature.stack import Stack
from retain.errors import ConfigError, MismatchError
from retain.models.forward import no_autocast

__all__ = ["Anchor", "BlockOperator"]

Anchor = Mapping[str, tuple[Tensor, ...]]
"""Layer -> (B_0 with the scaling in it, A_0), or (W_0,) where the weight itself is trained."""


class BlockOperator:
    """Blocks, what ties them, where they stand and where they came from.

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
        links: Mapping[tuple[str, str], OffDiagonal] | None = None,
    ) -> None:
        self.blocks, self.anchor, self.info = dict(blocks), dict(anchor), info
        self.links = dict(links or {})
        self._stacks: dict[bool, list[Stack]] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    @property
    def around_adapter(self) -> bool:
        """Whether it is around an adapter's A and B. One of a plain model is around the base."""
        return any(len(kept) == 2 for kept in self.anchor.values())

    def dtype_of(self, block: str) -> torch.dtype:
        """The precision of a block, looked up once."""
        if block not in self._dtypes:
            self._dtypes[block] = next(iter(self.blocks[block].tensors().values())).dtype
        return self._dtypes[block]

    @no_autocast()
    def matvec(self, d: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F d, for displacements by block name: each of its block's shape, in any precision."""
        self._check_names(d)
        d = {name: d[name].to(self.dtype_of(name)) for name in self.blocks}
        out = {name: block.matvec(d[name]) for name, block in self.blocks.items()}
        for i, j, link in self.off_diagonal():
            out[i] = out[i] + link.matvec(d[j]).to(out[i].device)
        return out

    def off_diagonal(self) -> Iterator[tuple[str, str, OffDiagonal]]:
        """(i, j, F_ij) of each link and of its transpose."""
        for (i, j), link in self.links.items():
            yield i, j, link
            yield j, i, link.T

    def to_dense(self) -> Tensor:
        """F as one matrix on the row-major vectors of all blocks in order; for small ones."""
        dense: Tensor = torch.block_diag(*(b.to_dense() for b in self.blocks.values()))
        spans, start = {}, 0
        for name, block in self.blocks.items():
            size = block.shape[0] * block.shape[1]
            spans[name], start = slice(start, start + size), start + size
        for i, j, link in self.off_diagonal():
            dense[spans[i], spans[j]] = link.to_dense()
        return dense

    def __mul__(self, c: float) -> Self:
        if not isinstance(c, int | float):
            return NotImplemented
        if not (math.isfinite(c) and c >= 0):
            raise ConfigError(
                "a curvature cannot be multiplied by this",
                got=c,
                allowed="a finite number, 0 or above: a penalty must not pay for drift",
                fix="multiply by a weight of at least 0",
            )
        made: dict[int, Tensor] = {}
        blocks = {name: block.scaled(c, made) for name, block in self.blocks.items()}
        links = {pair: link.scaled(c) for pair, link in self.links.items()}
        return type(self)(blocks, self.anchor, self.info, links)

    __rmul__ = __mul__

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the blocks and links by the names that they have in a file."""
        named = {
            f"blocks/{layer}/{short}": t
            for layer, block in self.blocks.items()
            for short, t in block.tensors().items()
        }
        for number, link in enumerate(self.links.values()):
            named |= {
                f"links/{number}/inputs": link.inputs,
                f"links/{number}/outputs": link.outputs,
            }
        return named

    def to(self, device: torch.device) -> Self:
        """Moves the tensors to a device, in place; what was shared stays shared."""
        return self.place(dict.fromkeys([*self.blocks, *self.anchor], device))

    def place(self, devices: Mapping[str, torch.device]) -> Self:
        """Moves each block, and its anchor, to its device, in place.

        What blocks on one device share stays shared; on several, each has a copy. A link lies
        with the first of its two blocks.

        Args:
            devices: by the names of the blocks and of the layers in the anchor.
        """
        named, wanted = self.tensors(), self._wanted(devices)
        if all(t.device == wanted[n] for n, t in named.items()):
            return self
        moved: dict[tuple[int, torch.device], Tensor] = {}
        for n, t in named.items():
            key = (id(t), wanted[n])
            if key not in moved:
                moved[key] = t.to(wanted[n])
        kinds = {name: (type(block), block.shape) for name, block in self.blocks.items()}
        ties = [(pair, link.weight) for pair, link in self.links.items()]
        placed = {n: moved[id(t), wanted[n]] for n, t in named.items()}
        self.blocks, self.links = unpack(kinds, ties, placed)
        self.anchor = {n: tuple(t.to(devices[n]) for t in k) for n, k in self.anchor.items()}
        self._stacks = {}
        return self

    def _wanted(self, devices: Mapping[str, torch.device]) -> dict[str, torch.device]:
        """The device of each of `tensors`."""
        found = {f"blocks/{n}/{k}": devices[n] for n, b in self.blocks.items() for k in b.tensors()}
        for number, (first, _) in enumerate(self.links):
            found |= {f"links/{number}/{k}": devices[first] for k in ("inputs", "outputs")}
        return found

    def memory(self) -> int:
        """Bytes that the blocks, links and the anchor take; shared tensors count once.

        Copies in bfloat16 that a force has made, see `Curvature.pulls`, count too.
        """
        tensors = [*self.tensors().values(), *(t for kept in self.anchor.values() for t in kept)]
        tensors += [t for stack in self._stacks.get(True, []) for t in stack.copies()]
        unique = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        return sum(unique.values())

    def groups(self) -> list[list[str]]:
        """Names of the blocks that share a part, such as the factor of a common input."""
        groups: dict[int, list[str]] = {}
        for name, block in self.blocks.items():
            groups.setdefault(id(block.shared), []).append(name)
        return list(groups.values())

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


def unpack(
    kinds: Mapping[str, tuple[type[Block], tuple[int, int]]],
    ties: Iterable[tuple[tuple[str, str], float]],
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Block], dict[tuple[str, str], OffDiagonal]]:
    """Blocks and links from what `BlockOperator.tensors` gives.

    Args:
        kinds: block -> its class and shape.
        ties: the pairs of the links, and their weights, in order.
        tensors: by name; what several blocks read is one and the same.

    Raises:
        KeyError, ValueError: one is missing, or of another shape; the message names it.
    """
    factors: dict[Any, Any] = {}
    blocks = {
        name: kind.unpack(Reader(tensors, f"blocks/{name}/", factors), shape)
        for name, (kind, shape) in kinds.items()
    }
    links = {
        pair: OffDiagonal(tensors[f"links/{n}/inputs"], tensors[f"links/{n}/outputs"], weight)
        for n, (pair, weight) in enumerate(ties)
    }
    return blocks, links
