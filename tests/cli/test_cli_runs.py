"""What the commands do when all is well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from retain.cli import main
from retain.cli.options import name_list
from retain.config import DTYPES, RunConfig
from retain.errors import ConfigError
from retain.records import StudyRecord, finite
from retain.runs.bases import problem_count


class TestFit:
    def test_json(self, retain: Any, model: Path, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "deep" / "c.safetensors"
        found = retain("fit", model, source, "-o", out, "--structure", "diagonal", "--json").json
        assert found["path"] == str(out)
        assert found["bytes"] == out.stat().st_size
        assert found["seconds"] > 0
        assert found["info"]["structure"] == "diagonal"
        assert found["info"]["sequences"] == 16

    def test_text(self, retain: Any, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "c.safetensors"
        outcome = retain("fit", model, "-o", out, "--rows", 8, "--max-length", 12)
        assert outcome.code == 0
        assert outcome.err == ""
        assert "kfac curvature of 14 layers" in outcome.out
        assert "next: retain train" in outcome.out

    def test_quiet(self, retain: Any, model: Path, source: Path, tmp_path: Path) -> None:
        outcome = retain("fit", model, source, "-o", tmp_path / "c.safetensors", "--quiet")
        assert (outcome.code, outcome.out, outcome.err) == (0, "", "")

    @pytest.mark.parametrize(("targets", "count"), [("q_proj", 2), ("q_proj,v_proj", 4)])
    def test_of_some_layers(
        self, retain: Any, model: Path, source: Path, tmp_path: Path, targets: str, count: int
    ) -> None:
        argv = ("-o", tmp_path / "c.safetensors", "--targets", targets, "--json")
        assert len(retain("fit", model, source, *argv).json["info"]["sites"]) == count

    def test_of_a_classifier(self, retain: Any, model: Path, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "c.safetensors"
        found = retain("fit", model, source, "-o", out, "--num-labels", 3, "--json").json
        assert found["info"]["predictions"] == 16

    def test_around_an_adapter(
        self, retain: Any, model: Path, source: Path, trained: Path, tmp_path: Path
    ) -> None:
        from retain.curvature.curvature import load_curvature

        out = tmp_path / "c.safetensors"
        retain("fit", model, source, "-o", out, "--adapter", trained / "adapter", "--json").json  # noqa: B018
        weights = load_file(trained / "adapter" / "adapter_model.safetensors")
        name, (b0, a0) = next(iter(load_curvature(out).anchor.items()))
        head = f"base_model.model.{name}"
        assert torch.equal(a0, weights[f"{head}.lora_A.weight"])
        assert torch.equal(b0, 2.0 * weights[f"{head}.lora_B.weight"])


class TestTrain:
    def test_record(self, trained: Path, model: Path) -> None:
        record = json.loads((trained / "train.json").read_text())
        assert record["schema"] == "retain.train/1"
        assert record["config"]["training"]["epochs"] == 2.0
        assert {"torch", "peft", "transformers"} <= record["versions"].keys()
        assert record["hardware"]["cores"] >= 1
        assert [entry["step"] for entry in record["history"]] == list(range(1, 13))
        assert record["history"][-1]["loss"] < record["history"][0]["loss"]
        assert record["predicted_nats"] > 0
        assert record["steps"] == 12
        assert record["model"]["name"] == str(model)
        files = {p.name for p in trained.iterdir()}
        assert files == {"adapter", "checkpoints", "run.json", "train.json"}

    def test_a_budget(
        self, retain: Any, model: Path, data: Path, curvature: Path, tmp_path: Path
    ) -> None:
        argv = ("--model", model, "--data", data, "-o", tmp_path / "run", "--budget", 0.0005)
        argv += ("--curvature", curvature, "--max-length", 16)
        argv += ("--learning-rate", 0.05, "--epochs", 4, "--batch-size", 4, "--json")
        record = retain("train", *argv).json
        assert record["config"]["budget"] == 0.0005
        assert len({entry["strength"] for entry in record["history"]}) > 1
        assert 0 < record["predicted_nats"]

    def test_the_gain_of_a_filter(
        self, retain: Any, model: Path, source: Path, data: Path, tmp_path: Path
    ) -> None:
        held = tmp_path / "kfac.safetensors"
        retain("fit", model, source, "-o", held, "--structure", "kfac", "--quiet")
        argv = ("train", "--model", model, "--data", data, "--curvature", held, "--json")
        argv += ("--max-steps", 3, "--max-length", 16, "--batch-size", 4)
        sizes = []
        for gain in (1.0, 3.0):
            out = tmp_path / f"run{gain:g}"
            more = ("-o", out, "--parts", "rows,filter,force", "--set", f"gain={gain}")
            parts = retain(*argv, *more).json["config"]["parts"]
            assert parts == ["rows", "filter", "force"]
            found = load_file(out / "adapter" / "adapter_model.safetensors")
            sizes.append({n: w.float().norm() for n, w in found.items() if "lora_A" in n})
        for name, size in sizes[0].items():
            torch.testing.assert_close(sizes[1][name], 3 * size, rtol=0.02, atol=0)

    def test_the_recipe_is_the_default(
        self, retain: Any, model: Path, source: Path, data: Path, tmp_path: Path
    ) -> None:
        """It filters, and says so where it cannot; laplace never does."""
        argv = ("train", "--model", model, "--data", data, "--max-steps", 3, "--max-length", 16)
        ends = {}
        for structure in ("kfac", "diagonal"):
            held = tmp_path / f"{structure}.safetensors"
            retain("fit", model, source, "-o", held, "--structure", structure, "--quiet")
            for name, more in {
                "auto": (), "laplace": ("--method", "laplace"),
                "wiener": ("--parts", "rows,filter,force"),
            }.items():  # fmt: skip
                if (structure, name) == ("diagonal", "wiener"):
                    continue
                out = tmp_path / f"{structure}-{name}"
                found = retain(*argv, "--curvature", held, "-o", out, "--batch-size", 4, *more)
                assert found.code == 0
                said = "held by the force alone, without a filter: structure diagonal"
                assert (said in found.err + found.out) is (
                    (structure, name) == ("diagonal", "auto")
                )
                weights = load_file(out / "adapter" / "adapter_model.safetensors")
                ends[structure, name] = torch.cat([w.flatten() for w in weights.values()])
        assert torch.equal(ends["kfac", "auto"], ends["kfac", "wiener"])
        assert not torch.equal(ends["kfac", "auto"], ends["kfac", "laplace"])
        assert torch.equal(ends["diagonal", "auto"], ends["diagonal", "laplace"])

    def test_the_adapter_is_plain_peft(self, trained: Path, model: Path) -> None:
        folder = trained / "adapter"
        assert {p.name for p in folder.iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors"
        }  # fmt: skip
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(model)
        base = AutoModelForCausalLM.from_pretrained(model)
        tuned = PeftModel.from_pretrained(base, str(folder))
        weights = load_file(folder / "adapter_model.safetensors")
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                assert torch.equal(parameter, weights[name.replace(".default", "")])
                assert bool(parameter.any())

    def test_fits_a_curvature_first_and_keeps_it(
        self, retain: Any, model: Path, data: Path, short: Any, tmp_path: Path
    ) -> None:
        argv = (
            "train",
            "--model",
            model,
            "--data",
            data,
            *short,
            "--out",
            tmp_path,
            "--max-steps",
            2,
        )
        first = retain(*argv)
        assert first.code == 0, first.err
        assert "measuring one on text that the model writes" in first.out
        stamp = (tmp_path / "curvature.safetensors").stat().st_mtime_ns
        second = retain(*argv, "--json").json
        assert second["curvature"]["seconds"] is None
        assert (tmp_path / "curvature.safetensors").stat().st_mtime_ns == stamp
        assert {p.name for p in tmp_path.iterdir()} == {
            "adapter", "curvature.safetensors", "run.json", "train.json"
        }  # fmt: skip

    def test_a_kept_curvature_that_does_not_fit_is_made_again(
        self, retain: Any, model: Path, data: Path, short: Any, tmp_path: Path
    ) -> None:
        kept = tmp_path / "curvature.safetensors"
        retain("fit", model, "-o", kept, "--rows", 8, "--max-length", 12, "--quiet")
        kept.write_bytes(kept.read_bytes()[:-40] + bytes(40))
        outcome = retain(
            "train", "--model", model, "--data", data, *short, "--out", tmp_path, "--max-steps", 1
        )
        assert outcome.code == 0, outcome.err
        assert "curvature.safetensors is not used" in outcome.out

    def test_from_a_file_with_changes(
        self, retain: Any, model: Path, data: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        (tmp_path / "run.yaml").write_text(
            f"model: {model}\ndata: {data}\nout: {out}\nmethod: none\n"
            "adapter: {rank: 3}\ntraining: {batch_size: 8, learning_rate: 1e-3}\n"
        )
        argv = ("--set", "training.max_steps=2", "--set", "adapter.targets=[q_proj]")
        found = retain("train", "--config", tmp_path / "run.yaml", *argv, "--json").json
        assert found["steps"] == 2
        assert found["config"]["adapter"] == {
            "rank": 3, "alpha": None, "dropout": 0.0, "targets": ["q_proj"], "seed": 0
        }  # fmt: skip
        assert found["curvature"] is None
        assert found["predicted_nats"] is None

    def test_word_problems(self, retain: Any, model: Path, short: Any, tmp_path: Path) -> None:
        found = retain(
            "train", "--model", model, "--data", "word-problems:8", *short, "--method", "none",
            "--out", tmp_path, "--json",
        ).json  # fmt: skip
        assert found["examples"] == 8

    def test_leftovers_are_not_mixed_up(
        self, retain: Any, trained: Path, model: Path, data: Path, short: Any, tmp_path: Path
    ) -> None:
        out = shutil.copytree(trained, tmp_path / "run")
        argv = ("train", "--model", model, "--data", data, *short, "--method", "none", "--out", out)
        retain(*argv).refused("checkpoints of an earlier run", "--resume", "--overwrite")
        assert retain(*argv, "--overwrite", "--quiet").code == 0
        assert not (out / "checkpoints").exists()


class TestResume:
    @pytest.fixture
    def stopped(self, trained: Path, tmp_path: Path) -> Path:
        """The run as it was after step 9."""
        out = shutil.copytree(trained, tmp_path / "run")
        shutil.rmtree(out / "adapter")
        shutil.rmtree(out / "checkpoints" / "checkpoint-12")
        (out / "train.json").unlink()
        return Path(out)

    def same(self, out: Path, trained: Path) -> None:
        mine = load_file(out / "adapter" / "adapter_model.safetensors")
        theirs = load_file(trained / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        records = [json.loads((p / "train.json").read_text()) for p in (out, trained)]
        assert records[0]["history"] == records[1]["history"]

    def test_ends_where_the_whole_run_ends(self, retain: Any, stopped: Path, trained: Path) -> None:
        found = retain("train", "--resume", "--out", stopped, "--json").json
        assert found["resumed_from"] == "checkpoint-9"
        self.same(stopped, trained)

    @pytest.mark.parametrize("missing", ["trainer_state.json", "digests.json", "optimizer.pt"])
    def test_passes_over_a_broken_checkpoint(
        self, retain: Any, stopped: Path, trained: Path, missing: str
    ) -> None:
        kept = stopped / "checkpoints"
        shutil.copytree(kept / "checkpoint-9", kept / "checkpoint-11")
        (kept / "checkpoint-11" / missing).unlink()
        found = retain("train", "--resume", "--out", stopped, "--json").json
        assert found["resumed_from"] == "checkpoint-9"
        self.same(stopped, trained)

    def test_refuses_other_settings(self, retain: Any, stopped: Path) -> None:
        retain("train", "--resume", "--out", stopped, "--set", "training.seed=4").refused(
            "training.seed", "got: 4", "allowed: 0"
        )

    def test_refuses_where_nothing_began(self, retain: Any, tmp_path: Path) -> None:
        retain("train", "--resume", "--out", tmp_path / "none").refused("no run to resume")
        retain("train", "--resume").refused("which run to resume")


class TestEval:
    def test_measures_all_and_feeds_the_report(
        self, retain: Any, trained: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "result.json"
        argv = (
            "--probe",
            "--task",
            "word-problems:2",
            "--rows",
            8,
            "--max-length",
            16,
            "--out",
            out,
        )
        found = retain("eval", "--adapter", trained / "adapter", *argv, "--json").json
        assert found == json.loads(out.read_text())
        assert found["forgetting"]["kl"] > 0
        assert found["forgetting"]["kl_interval"][0] <= found["forgetting"]["kl"]
        assert found["knowledge"].keys() == found["exact_match"].keys() == {"base", "tuned"}
        assert 0 <= found["knowledge"]["base"]["accuracy"] <= 1
        assert found["exact_match"]["tuned"]["items"] == 2
        assert [row["method"] for row in found["rows"]] == [None, "laplace"]
        made = retain("report", out, "--json").json
        assert [Path(p).name for p in made["written"]] == [
            "report.html", "tradeoff.png", "training.png"
        ]  # fmt: skip

    def test_on_a_file(self, retain: Any, trained: Path, source: Path) -> None:
        outcome = retain("eval", "--adapter", trained / "adapter", "--source", source)
        assert outcome.code == 0
        assert "KL to the base" in outcome.out
        assert outcome.err == ""


class TestDemo:
    def test_prints_the_claims_and_the_report(
        self, retain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        seen: dict[str, Any] = {}

        def run_demo(**given: Any) -> StudyRecord:
            seen.update(given)
            claim = {"claim": "forgets less", "value": 0.1, "bound": 0.5, "holds": True}
            return StudyRecord.model_validate({"name": "demo", "runs": [], "claims": [claim]})

        monkeypatch.setattr("retain.study.demo.run_demo", run_demo)
        monkeypatch.setattr("retain.report.studies.page.write_study_report", lambda _, page: [page])
        outcome = retain("demo", "--out", tmp_path, "--seed", 3, "--quick")
        said = seen.pop("say")
        assert callable(said)
        assert seen == {"out": tmp_path, "seed": 3, "quick": True, "progress": False}
        assert "forgets less" in outcome.out
        assert "holds" in outcome.out
        assert f"report: {tmp_path / 'report.html'}" in outcome.out
        assert retain("demo", "--out", tmp_path, "--json").json["summary"][0]["holds"] is True


class TestHelp:
    @pytest.mark.parametrize("command", ["fit", "train", "eval", "report", "demo"])
    def test_has_an_example(self, retain: Any, command: str) -> None:
        outcome = retain(command, "--help")
        assert outcome.code == 0
        assert f"Example: retain {command} " in outcome.out

    def test_without_a_command(self, retain: Any) -> None:
        assert "Commands" in retain().out

    def test_version(self, retain: Any) -> None:
        from retain import __version__

        assert retain("--version").out == f"retain {__version__}\n"


class TestSmallThings:
    def test_dtypes_are_the_library_s(self) -> None:
        from retain.models.load import DTYPES as KNOWN

        assert set(DTYPES) == set(KNOWN)
        assert set(get_args(RunConfig.model_fields["dtype"].annotation)) <= set(DTYPES)

    def test_finite(self) -> None:
        nan = float("nan")
        assert finite({"a": [1.0, nan], "b": (Path("x"), float("inf"))}) == {
            "a": [1.0, None], "b": ["x", None]
        }  # fmt: skip

    def test_name_list(self) -> None:
        assert name_list("all-linear") == "all-linear"
        assert name_list("q_proj, v_proj") == ["q_proj", "v_proj"]

    def test_problem_count(self) -> None:
        assert problem_count("rows.jsonl", "train") is None
        assert problem_count("word-problems", "test") == 100
        assert problem_count("word-problems:7", "train") == 7
        with pytest.raises(ConfigError):
            problem_count("word-problems:", "train")

    def test_a_closed_pipe_is_quiet(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        def gone(*_: object) -> None:
            raise BrokenPipeError

        monkeypatch.setattr("retain.cli.report.check_file", gone)
        assert main(["report", "r.json"]) == 1
        assert capsys.readouterr().err == ""
