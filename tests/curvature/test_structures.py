"""The structures by name, and one that somebody else adds as docs/extending.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fits import dense, fit, known, same
from retain import fit_curvature, load_curvature
from retain.curvature.blocks import registry
from retain.curvature.blocks.registry import names, register, structure_of
from retain.curvature.plan import cost, kept_bytes
from retain.errors import ArtifactError, ConfigError
from retain.models.skeleton import Outline
from tiny import ROWS, move, tiny

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_each_structure_of_the_documentation_is_there_and_no_other() -> None:
    table = (DOCS / "curvature.md").read_text("utf-8").partition("## The structures")[2]
    documented = re.findall(r"^\| `(\w+)` \|", table.partition("\n\n**")[0], re.MULTILINE)
    assert sorted(documented) == sorted(names())
    for name in names():
        assert structure_of(name) is structure_of(name)


def test_names_cost_no_import_of_torch() -> None:
    code = "import sys; from retain.curvature.plan import names; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_a_name_that_is_taken_or_unknown_is_refused() -> None:
    for name in names():
        with pytest.raises(ConfigError, match=f"exists already; got: '{name}'; .*fix: register"):
            register(name, structure_of("kfac"))
    for name in ("kfca", 3, None, ["kfac"]):
        with pytest.raises(ConfigError, match="unknown structure"):
            structure_of(name)  # type: ignore[arg-type]


def test_the_documents_own_structure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = (DOCS / "extending.md").read_text("utf-8").partition("layer_identity.py`:")[2]
    space: dict[str, Any] = {"__name__": "layer_identity"}
    exec(page.partition("```python\n")[2].partition("```")[0], space)
    monkeypatch.setattr(registry, "_STRUCTURES", dict(registry._STRUCTURES))
    with pytest.raises(ConfigError, match="unknown structure"):
        fit_curvature(tiny("llama"), ROWS["llama"], "layer-identity", progress=False)
    register("layer-identity", space["STRUCTURE"])
    assert names()[-1] == "layer-identity"

    model = tiny("llama", moved=True)
    curvature, diagonal = (
        fit(model, "llama", "layer-identity"),
        known("llama", structure="diagonal"),
    )
    for name, block in dense(curvature).items():
        assert block.trace() == pytest.approx(diagonal.blocks[name].trace(), rel=1e-9)
    path = curvature.save(tmp_path / "c")
    again = load_curvature(path)
    same(again, curvature, 1e-15)
    same(again + curvature, 2.0 * curvature, 1e-12)
    move(model, 3)
    assert again.quadratic(model) == curvature.quadratic(model) > 0
    sites = {name: tuple(map(int, site[:2])) for name, site in curvature.info.sites.items()}
    shared = {name: name for name in sites}
    assert kept_bytes("layer-identity", sites, shared) == 4 * len(sites)
    assert cost("layer-identity", Outline("Small", 0, 10**4, 0, sites, shared)) is not None

    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="structure: 'layer-identity': not one of identity"):
        load_curvature(path)
