"""Curvature files with a right digest and wrong contents: each is refused, by the tensor's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from retain import fit_curvature, load_curvature
from retain.curvature.artifact import digest_of
from retain.curvature.blocks.linalg import EXACT, check_dense
from retain.data.tensors import read_tensors
from retain.errors import ArtifactError
from tiny import ROWS, tiny

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file for each way to store a curvature."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for name, structure, space, rank in (
        ("identity", "identity", "weight", None),
        ("diagonal", "diagonal", "weight", None),
        ("kfac", "kfac", "weight", None),
        ("sketch", "kfac", "weight", 2),
        ("ekfac", "ekfac", "weight", None),
        ("activation", "activation", "weight", None),
        ("tridiagonal", "tridiagonal", "weight", None),
        ("adapter", "kfac", "adapter", None),
    ):
        model = tiny("llama", moved=True)
        fitted = fit_curvature(
            model, ROWS["llama"], structure, space=space, rank=rank, batch_size=2, progress=False
        )
        found[name] = fitted.save(folder / name)
    return found


def rewritten(source: Path, path: Path, change: Change) -> Path:
    """The same file, changed, with a digest that is right."""
    tensors, metadata = read_tensors(source)
    described = json.loads(metadata["retain"])
    del described["digest"]
    change(described, tensors)
    described["digest"] = digest_of(json.dumps(described), tensors)
    save_file(
        {k: t.contiguous() for k, t in tensors.items()}, path, {"retain": json.dumps(described)}
    )
    return path


def at(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    """Changes the first tensor whose name ends so."""

    def change(described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        key = next(k for k in sorted(tensors) if k.endswith(name))
        tensors[key] = make(tensors[key])

    return change


def spoiled(value: float) -> Callable[[Tensor], Tensor]:
    """One entry is this."""

    def make(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[t.numel() // 2] = value
        return t

    return make


def dropped(name: str) -> Change:
    return lambda d, t: t.pop(next(k for k in sorted(t) if k.endswith(name)))


def info(**values: Any) -> Change:
    return lambda d, t: d["info"].update(values)


def site(place: int, value: Any) -> Change:
    return lambda d, t: next(iter(d["info"]["sites"].values())).__setitem__(place, value)


def antisymmetric(t: Tensor) -> Tensor:
    t = t.clone()
    t[0, 1] += t.abs().max()
    return t


def indefinite(t: Tensor) -> Tensor:
    """A diagonal of nothing below zero, and an eigenvalue far below."""
    t = t.clone()
    t[0, 1] = t[1, 0] = 3 * t.diagonal().max()
    return t


ANY: dict[str, Change] = {
    "no info": lambda d, t: d.pop("info"),
    "info a list": lambda d, t: d.update(info=[]),
    "no shapes": lambda d, t: d.pop("shapes"),
    "shapes a list": lambda d, t: d.update(shapes=[1]),
    "no alias": lambda d, t: d.pop("alias"),
    "links a text": lambda d, t: d.update(links="x"),
    "links of one number": lambda d, t: d.update(links=[1]),
    "links of nothing": lambda d, t: d.update(links=[["a", "b", 0.5]]),
    "links of two": lambda d, t: d.update(links=[["a", "b"]]),
    "another format": lambda d, t: d.update(format=["x"] * 99),
    "another structure": info(structure="none"),
    "a structure of another kind": info(structure=3),
    "another space": info(space="time"),
    "another fisher": info(fisher="king"),
    "tokens a text": info(tokens="7"),
    "tokens below zero": info(tokens=-1),
    "tokens a half": info(tokens=1.5),
    "no finite error": info(error=-1.0),
    "rank a list": info(rank=[1]),
    "a new key": info(surprise=1),
    "versions of numbers": info(versions={"torch": 2}),
    "no sites": info(sites={}),
    "sites a list": info(sites=[]),
    "a site of three": lambda d, t: next(iter(d["info"]["sites"].values())).pop(),
    "a site that is huge": site(0, 2**60),
    "a site below zero": site(1, -4),
    "a site of half a row": site(0, 1.5),
    "a site of texts": site(2, "4"),
    "a block too many": lambda d, t: d["shapes"].update(x=[2, 2]),
    "a block too few": lambda d, t: d["shapes"].pop(next(reversed(d["shapes"]))),
    "a block of another shape": lambda d, t: next(iter(d["shapes"].values())).__setitem__(0, 3),
    "a huge block": lambda d, t: d["shapes"].update({next(iter(d["shapes"])): [2**40, 2**40]}),
    "a tensor too many": lambda d, t: t.update({"blocks/x/inputs": torch.eye(2).double()}),
    "a tensor of nothing": lambda d, t: t.update({"": torch.zeros(0)}),
    "an anchor too many": lambda d, t: t.update({"anchor/x/B": torch.ones(2, 2).double(),
                                                 "anchor/x/A": torch.ones(2, 2).double()}),
    "half an anchor": lambda d, t: t.update({"anchor/x/B": torch.ones(2, 2).double()}),
    "an anchor without a layer": lambda d, t: t.update({"anchor/": torch.ones(2, 2).double()}),
    "an alias of nothing": lambda d, t: d["alias"].update({"blocks/x/inputs": "none"}),
    "an alias of an alias": lambda d, t: d["alias"].update({"a": "a"}),
    "no tensors": lambda d, t: t.clear(),
    "no blocks": lambda d, t: (t.clear(), d["shapes"].clear()),
}  # fmt: skip
"""Changes of any file."""


def of(name: str, *, square: bool) -> dict[str, Change]:
    """Changes of a tensor."""
    found: dict[str, Change] = {
        "gone": dropped(name),
        "integer": at(name, lambda t: t.to(torch.int64)),
        "truth": at(name, lambda t: t.bool()),
        "complex": at(name, lambda t: t.to(torch.complex64)),
        "another precision": at(name, lambda t: t.float()),
        "NaN": at(name, spoiled(float("nan"))),
        "infinite": at(name, spoiled(float("inf"))),
        "empty": at(name, lambda t: t.new_zeros(0)),
        "a row more": at(name, lambda t: torch.cat([t, t[:1]]) if t.dim() else t.new_zeros(2)),
        "one more dimension": at(name, lambda t: t[None]),
    }
    if square:
        found |= {
            "negative": at(name, lambda t: -t),
            "not symmetric": at(name, antisymmetric),
            "indefinite": at(name, indefinite),
            "negative in one place": at(
                name, lambda t: t - 2 * t.diagonal().max() * torch.eye(len(t), dtype=t.dtype)
            ),
        }
    return {f"{name}: {key}": change for key, change in found.items()}


def below(name: str) -> dict[str, Change]:
    return {f"{name}: below zero": at(name, lambda t: -t.abs() - 1)}


OWN: dict[str, dict[str, Change]] = {
    "identity": {f"scale: {k}": at("scale", m) for k, m in {
        "negative": lambda t: -t, "NaN": lambda t: t * float("nan"), "two": lambda t: t.repeat(2),
        "integer": lambda t: t.long(), "one more dimension": lambda t: t[None],
    }.items()},
    "diagonal": of("/values", square=False) | below("/values"),
    "kfac": of("/inputs", square=True) | of("/outputs", square=True) | {
        f"a smaller square of {side}": at(side, lambda t: t[:-1, :-1])
        for side in ("/inputs", "/outputs")
    },
    "sketch": {
        k: v for end in (".vectors", ".diagonal") for k, v in of(end, square=False).items()
    } | below(".diagonal") | below(".bound") | {
        "a wider sketch": at(".vectors", lambda t: torch.cat([t] * 9, 1)),
    },
    "ekfac": of("/values", square=False) | below("/values") | {
        "no basis": at("/inputs", lambda t: 2 * t),
        "no basis at all": at("/outputs", lambda t: torch.zeros_like(t)),
        "a basis with a turn": at("/outputs", lambda t: t + 0.3 * torch.roll(t, 1, 0)),
    },
    "activation": of("/inputs", square=True) | below(".scale") | {
        "two scales": at(".scale", lambda t: t.repeat(2)),
    },
    "tridiagonal": {
        "a larger link": at("links/0/outputs", lambda t: 30 * t),
        "larger inputs": at("links/2/inputs", lambda t: -30 * t - 5),
        "a link turned": at("links/1/outputs", lambda t: t[:-1]),
        "a weight": lambda d, t: d["links"][1].__setitem__(2, 0.9),
        "a weight below zero": lambda d, t: d["links"][1].__setitem__(2, -0.5),
        "a weight of text": lambda d, t: d["links"][1].__setitem__(2, "x"),
        "no neighbours": lambda d, t: d["links"][0].__setitem__(1, d["links"][3][1]),
        "a link twice": lambda d, t: d["links"].append(d["links"][0]),
        "NaN": at("links/0/outputs", spoiled(float("nan"))),
    },
    "adapter": of("lora_B/inputs", square=True) | {
        "another anchor": at("/A", lambda t: t[:, :-1]),
        "no anchor": dropped("/A"),
        "an anchor of another rank": lambda d, t: t.update(
            {k: (v[:, :1] if k.endswith("/B") else v[:1]) for k, v in t.items() if "anchor" in k}
        ),
        "an integer anchor": at("/B", lambda t: t.long()),
    },
}  # fmt: skip


def refused(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_curvature(path)
    said = str(caught.value)
    assert "\n" not in said and path.name in said and len(said) < 1200
    return said


KINDS = ["identity", "diagonal", "kfac", "sketch", "ekfac", "activation", "tridiagonal", "adapter"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_itself_is_read(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    again = rewritten(files[kind], tmp_path / "same", lambda d, t: None)
    assert load_curvature(again).info == load_curvature(files[kind]).info


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", sorted(ANY))
def test_a_wrong_description(
    kind: str, change: str, files: dict[str, Path], tmp_path: Path
) -> None:
    refused(rewritten(files[kind], tmp_path / "c", ANY[change]))


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind in KINDS for change in OWN[kind]]
)
def test_a_wrong_tensor_is_named(
    kind: str, change: str, files: dict[str, Path], tmp_path: Path
) -> None:
    said = refused(rewritten(files[kind], tmp_path / "c", OWN[kind][change]))
    assert any(part in said for part in ("blocks/", "anchor/", "links", "scale")), said


def spread(size: int, dtype: torch.dtype) -> Tensor:
    """A second moment with eigenvalues over eight orders, and one coordinate that is huge."""
    random = torch.Generator().manual_seed(size)
    x = torch.randn(size // 3, size, generator=random) * torch.logspace(0, -4, size)
    x[:, 3] *= 300
    return (x.T @ x).to(dtype)


@pytest.mark.parametrize("size", [7, EXACT, EXACT + 1, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_is_no_negative_curvature(size: int, dtype: torch.dtype) -> None:
    check_dense("it", spread(size, dtype))


@pytest.mark.parametrize("size", [7, EXACT, EXACT + 1, 1500])
@pytest.mark.parametrize("share", [0.001, 0.1, 1.0])
def test_a_negative_direction_is_found(size: int, share: float) -> None:
    s = spread(size, torch.float32)
    v = torch.randn(size, generator=torch.Generator().manual_seed(1))
    v /= v.norm()
    bad = s - share * s.trace() * torch.outer(v, v)
    with pytest.raises(ValueError, match="negative"):
        check_dense("it", (bad + bad.T) / 2)


def test_a_negative_direction_beside_the_axes_is_found() -> None:
    s = torch.eye(1000)
    s[0, 1] = s[1, 0] = s[1, 2] = s[2, 1] = 0.9  # each 2 x 2 minor is above zero
    with pytest.raises(ValueError, match="negative"):
        check_dense("it", s)
