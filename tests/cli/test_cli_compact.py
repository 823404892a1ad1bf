"""``retain compact``: what it writes with a curvature, of a run, and measured; what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_parts import Run, told, write_lines

from retain.curvature.curvature import load_curvature, reanchored
from retain.models.cards import with_section
from retain.models.load import load_model
from retain.models.saved import load_adapter
from retain.models.sites import lora_sites
from retain.retention.soften.truncate import truncated


def tuned(model: Path, adapter: Path) -> Any:
    return load_adapter(load_model(str(model), dtype="float32").model, adapter)


def check_cut(model: Path, before: Path, after: Path, curvature: Any, rank: int) -> None:
    """The written adapter is the cut of the loaded one, which its own tests hold to be the best."""
    wide = tuned(model, before)
    found, _ = truncated(lora_sites(wide), curvature(wide), rank)
    for site in lora_sites(tuned(model, after)):
        assert site.rank == rank
        b, a = found[site.name]
        dense = (site.scaling * (site.b @ site.a)).detach()
        torch.testing.assert_close(dense, 2.0 * (b @ a).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("unloaded")
def test_without_a_curvature_no_base_is_loaded(retain: Run, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = retain("compact", trained / "adapter", "--rank", 2, "--out", out, "--json").json
    assert found == {"adapter": str(out / "adapter"), "record": str(out / "compact.json"),
                     **told(out / "compact.json")}  # fmt: skip
    assert found["schema"] == "retain.compact/1"
    assert {"seed", "versions", "commit", "hardware", "created"} <= found.keys()
    assert 0 < found["lost"]["share"] < found["lost"]["worst"]["share"] < 1
    assert (found["nats"], found["kl"], found["notes"]) == (None, None, [])
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = (out / "adapter" / "README.md").read_text()
    assert "How it was narrowed" in card
    assert "How it was made" in card
    assert sorted(p.name for p in (out / "adapter").iterdir()) == names
    said = retain("compact", trained, "--rank", 2, "--out", out).done().out  # again, and of a run
    for part in (f"{found['lost']['share']:.2%}", "most is lost at", "next: retain eval"):
        assert part in said
    assert "nats" not in said
    assert "no layer is wider than 16" in retain("compact", trained, "-o", out).done().out


def test_a_certificate_of_the_wider_adapter_is_left_out(
    retain: Run, trained: Path, tmp_path: Path
) -> None:
    certified, out = tmp_path / "certified", tmp_path / "out"
    shutil.copytree(trained / "adapter", certified)
    card = certified / "README.md"
    before = card.read_text()
    told = with_section(before, "## What was kept", "retain certify") + "\nMy own words.\n"
    card.write_text(told)
    retain("compact", certified, "--rank", 2, "--out", out).done()
    text = (out / "adapter" / "README.md").read_text()
    assert text.startswith(f"{before.rstrip()}\n\n\nMy own words.\n\n<!-- retain compact:")
    assert "certify" not in text and card.read_text() == told


def test_a_damaged_card_loses_no_adapter(retain: Run, trained: Path, tmp_path: Path) -> None:
    damaged, out = tmp_path / "damaged", tmp_path / "out"
    shutil.copytree(trained / "adapter", damaged)
    (damaged / "README.md").write_bytes(b"\xff\xfe no text")
    said = retain("compact", damaged, "--rank", 2, "--out", out).done()
    assert "the model card is not written" in said.out + said.err
    assert (out / "compact.json").is_file()
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_a_curvature_and_a_measurement(
    retain: Run, model: Path, trained: Path, curvature: Path, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    more = ("--curvature", curvature, "--measure", "--source", source)
    found = retain("compact", trained / "adapter", "--rank", 1, *more, "-o", out, "--json").json
    held = load_curvature(curvature)
    check_cut(model, trained / "adapter", out / "adapter", lambda _: held, 1)
    nats = [held.quadratic(tuned(model, folder / "adapter")) for folder in (trained, out)]
    assert [found["nats"]["before"], found["nats"]["after"]] == pytest.approx(nats, rel=1e-4)
    assert 0 < found["nats"]["cut"] == pytest.approx(found["lost"]["felt"] * nats[0], rel=1e-3)
    for part, folder in (("before", trained), ("after", out)):
        argv = ("--adapter", folder / "adapter", "--model", model, "--source", source)
        scores = retain("eval", *argv, "--rows", 16, "--json").json["scores"]
        kl = scores["source.kl"]["tuned"][0]["value"]
        assert found["kl"][part]["kl"] == pytest.approx(kl, rel=1e-4)
    assert 0 < found["kl"]["cut"]["kl"] != found["kl"]["after"]["kl"]
    same = retain("compact", trained / "adapter", "--rank", 4, *more, "-o", out, "--json").json
    assert same["nats"]["cut"] == same["kl"]["cut"]["kl"] == same["lost"]["share"] == 0
    assert same["kl"]["after"] == same["kl"]["before"]


def test_a_run_with_its_state(retain: Run, train: Run, model: Path, tmp_path: Path) -> None:
    """It is cut as the next month would cut it; a rank beyond the servers' is said, and kept."""
    run, out = tmp_path / "run", tmp_path / "out"
    train(run, "--rank", 18, "--max-steps", 2, "--keep-state", "-q").done()
    (said,) = [note for note in told(run / "train.json")["notes"] if "vLLM" in note]
    assert said.startswith("rank 18: vLLM serves up to 16 by default; give it --max-lora-rank 32")
    soft = ("--curvature", run / "state" / "source.safetensors", "--budget", 1, "--points", 2)
    assert "rank 18: vLLM" in retain("soften", run / "adapter", *soft, "-o", out).done().out
    found = retain("compact", run, "--out", tmp_path / "narrow", "--json").json
    parts = [run / "state" / f"{name}.safetensors" for name in ("source", "past")]
    assert (found["rank"], found["notes"]) == ({"before": 18, "after": 16}, [])
    assert found["curvature"] == [str(part) for part in parts]

    def both(wide: Any) -> Any:
        one, other = (reanchored(load_curvature(part), wide) for part in parts)
        return one + other

    check_cut(model, run / "adapter", tmp_path / "narrow" / "adapter", both, 16)
    assert found["nats"]["before"] == pytest.approx(
        load_curvature(parts[0]).quadratic(tuned(model, run / "adapter")), rel=1e-4
    )
    parts[1].write_bytes(parts[1].read_bytes()[:-9])
    retain("compact", run, "--out", tmp_path / "no").refused("has changed")


class TestRefusals:
    @pytest.fixture
    def refuse(self, retain: Run, trained: Path, tmp_path: Path) -> Any:
        def run(*argv: object, adapter: Path = trained / "adapter") -> Any:
            found = retain("compact", adapter, "--rank", 2, "--out", tmp_path / "out", *argv)
            assert not (tmp_path / "out").exists()
            return found

        return run

    def test_values_and_files(self, refuse: Any, source: Path, tmp_path: Path) -> None:
        refuse("--rank", 0).refused("--rank")
        refuse("--source", source).refused("--source without --measure")
        refuse("--curvature", tmp_path / "none").refused("no such curvature")
        refuse(adapter=tmp_path / "none").refused("no such adapter folder")
        refuse("--measure", "--source", tmp_path / "none.jsonl").refused("no such source")
        write_lines(tmp_path / "ia3" / "adapter_config.json", [{"peft_type": "IA3"}])
        (tmp_path / "ia3" / "adapter_model.safetensors").touch()
        refuse(adapter=tmp_path / "ia3").refused("of another kind")

    def test_curvatures(
        self, refuse: Any, retain: Run, model: Path, other_model: Path, source: Path,
        curvature: Path, tmp_path: Path,
    ) -> None:  # fmt: skip
        refuse("--curvature", curvature, "--model", other_model).refused("another base model")
        odd = tmp_path / "odd.safetensors"
        for more in (("--structure", "diagonal"), ("--space", "adapter")):
            retain("fit", model, source, *more, "--rank", 4, "-q", "-o", odd).done()
            refuse("--curvature", odd).refused("no two sides to cut by", more[1])

    def test_over_the_adapter_itself(self, retain: Run, trained: Path, tmp_path: Path) -> None:
        adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "run" / "adapter"))
        before = {p.name: p.read_bytes() for p in adapter.iterdir()}
        for given in (adapter, tmp_path / "run"):
            argv = ("compact", given, "--rank", 2, "--out", tmp_path / "run")
            retain(*argv).refused("take the place of the adapter")
        assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["adapter"]
