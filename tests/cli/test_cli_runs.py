"""What the commands do when all is well."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cli_parts import SHORT, Run, adapter, told, write_lines
from peft import PeftModel
from transformers import AutoModelForCausalLM

from retain.cli.options import name_list
from retain.config import DTYPES, RunConfig
from retain.curvature.curvature import load_curvature
from retain.data import sources
from retain.data.draws import HELD_OUT, draw
from retain.errors import ConfigError
from retain.models.load import load_model
from retain.records import AnswersRecord, StudyRecord, finite
from retain.runs.bases import problem_count


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class TestFit:
    @pytest.fixture
    def fit(self, retain: Run, model: Path, source: Path, out: Path) -> Run:
        return lambda *argv: retain("fit", model, source, "-o", out / "c.safetensors", *argv)

    def test_json(self, fit: Run, out: Path) -> None:
        found = fit("--structure", "diagonal", "--json").json
        assert found["path"] == str(out / "c.safetensors")
        assert found["bytes"] == (out / "c.safetensors").stat().st_size
        assert found["seconds"] > 0
        assert found["info"]["structure"] == "diagonal"
        assert found["info"]["sequences"] == 16

    def test_text(self, retain: Run, model: Path, out: Path) -> None:
        outcome = retain("fit", model, "-o", out / "c", "--rows", 8, "--max-length", 12)
        assert (outcome.code, outcome.err) == (0, "")
        assert "kfac curvature of 14 layers" in outcome.out
        assert "next: retain train" in outcome.out

    @pytest.mark.parametrize("given", [
        ["--targets", "q_proj,v_proj"], ["--space", "adapter", "--rank", 4, "--alpha", 4],
    ])  # fmt: skip
    def test_what_comes_next_is_accepted(
        self, retain: Run, fit: Run, tmp_path: Path, given: list[Any]
    ) -> None:
        _, line = fit(*given).done().out.split("next: retain ")
        here = {"word-problems": "word-problems:16", "runs/held": str(tmp_path / "held")}
        retain(*(here.get(word, word) for word in shlex.split(line))).done()

    def test_nothing_comes_next_that_would_be_refused(self, fit: Run, trained: Path) -> None:
        for given in (["--num-labels", 3], ["--adapter", trained / "adapter"]):
            assert "next:" not in fit(*given).done().out

    def test_quiet(self, fit: Run) -> None:
        outcome = fit("--quiet")
        assert (outcome.code, outcome.out, outcome.err) == (0, "", "")

    @pytest.mark.parametrize(("targets", "count"), [("q_proj", 2), ("q_proj,v_proj", 4)])
    def test_of_some_layers(self, fit: Run, targets: str, count: int) -> None:
        assert len(fit("--targets", targets, "--json").json["info"]["sites"]) == count

    def test_of_a_classifier(self, fit: Run) -> None:
        assert fit("--num-labels", 3, "--json").json["info"]["predictions"] == 16

    def test_around_an_adapter(self, fit: Run, trained: Path, out: Path) -> None:
        fit("--adapter", trained / "adapter").done()
        weights = adapter(trained)
        name, (b0, a0) = next(iter(load_curvature(out / "c.safetensors").anchor.items()))
        head = f"base_model.model.{name}"
        assert torch.equal(a0, weights[f"{head}.lora_A.weight"])
        assert torch.equal(b0, 2.0 * weights[f"{head}.lora_B.weight"])

    def test_around_an_adapter_of_another_base(
        self, retain: Run, other_model: Path, source: Path, trained: Path, out: Path
    ) -> None:
        argv = ("fit", other_model, source, "--adapter", trained / "adapter", "-o", out / "c")
        retain(*argv).refused("another base model", "the first argument")
        assert not (out / "c").exists()


class TestTrain:
    def test_record(self, trained: Path, model: Path) -> None:
        record = told(trained / "train.json")
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

    def test_a_budget(self, train: Run, out: Path) -> None:
        argv = ("--budget", 0.0005, "--max-length", 16, "--learning-rate", 0.05, "--epochs", 4)
        done = train(out, *argv).done()
        record = told(out / "train.json")
        assert record["config"]["budget"] == 0.0005
        assert len({entry["strength"] for entry in record["history"]}) > 1
        assert 0 < record["predicted_nats"]
        assert 0 < record["measured_nats"] <= 0.0005
        said = rf"measured KL\D+{record['measured_nats']:.3g} nats per token, of a budget of 0.0005"
        assert re.search(said, done.out)
        card = (out / "adapter" / "README.md").read_text()
        assert f"KL divergence: {record['measured_nats']:.3g} nats" in card

    @pytest.mark.parametrize("own", [False, True])
    def test_a_budget_and_a_kl_beside_a_curvature_without_its_text(
        self, train: Run, curvature: Path, out: Path, own: bool
    ) -> None:
        """They are on the model's own text; where the curvature is of other text, that is said."""
        given, fitted = out.parent / "given", load_curvature(curvature)
        fitted.info = replace(fitted.info, note="self" if own else fitted.info.note)
        fitted.save(given)
        argv = ("--budget", 0.01, "--kl", 1, "--max-steps", 2)
        train(out, *argv, "--curvature", given).done()
        record, card = told(out / "train.json"), (out / "adapter" / "README.md").read_text()
        assert record["measured_nats"] is not None
        assert ("on a few rows of source text" in card) == own
        assert ("on a few rows that the base model wrote" in card) != own
        assert ("- KL on source rows: " in card) == own
        assert ("- KL on rows that the base model wrote: " in card) != own
        for said in (
            "the budget is measured on text that the ",
            "the KL is taken on text that the ",
        ):
            notes = [note for note in record["notes"] if note.startswith(said)]
            assert len(notes) == (not own)
            assert all("(source.jsonl)" in n and "--source FILE" in n for n in notes)

    def test_the_gain_of_a_filter(self, train: Run, tmp_path: Path) -> None:
        sizes, parts = [], "rows,filter,force"
        for gain in (1.0, 3.0, "matched"):
            argv = ("--max-steps", 3, "--learning-rate", 5e-4, "--parts", parts)
            found = train(tmp_path / f"{gain}", *argv, "--set", f"gain={gain}", "--json").json
            assert found["config"]["parts"] == parts.split(",")
            weights = adapter(tmp_path / f"{gain}")
            sizes.append({n: w.float().norm() for n, w in weights.items() if "lora_A" in n})
        for name, size in sizes[0].items():
            torch.testing.assert_close(sizes[1][name], 3 * size, rtol=0.02, atol=0)
        ratios = torch.stack([sizes[2][name] / size for name, size in sizes[0].items()])
        assert (ratios > 0.99).all() and (ratios <= 3.02).all() and ratios.max() > 1.02
        train(tmp_path / "none", "--set", "gain=most").refused("gain", "'most'")
        one = train(tmp_path / "one", "--max-steps", 1, "--parts", "force", "--json").json
        assert one["config"]["parts"] == ["force"]

    def test_the_recipe_is_the_default(
        self, retain: Run, train: Run, model: Path, source: Path, tmp_path: Path
    ) -> None:
        """It filters, and says so where it cannot; laplace never does."""
        ends, parts = {}, ("--parts", "rows,filter,force")
        for structure in ("kfac", "diagonal"):
            held = tmp_path / f"{structure}.safetensors"
            retain("fit", model, source, "-o", held, "--structure", structure, "-q").done()
            for name, more in {
                "auto": (), "laplace": ("--method", "laplace"), "named": parts
            }.items():  # fmt: skip
                if (structure, name) == ("diagonal", "named"):
                    continue
                out = tmp_path / f"{structure}-{name}"
                argv = ("--curvature", held, "--max-steps", 3, "--max-length", 16)
                said = "held by the force alone, without a filter: structure diagonal"
                found = train(out, *argv, *more).done()
                assert (said in found.out) is ((structure, name) == ("diagonal", "auto"))
                ends[structure, name] = torch.cat([w.flatten() for w in adapter(out).values()])
        assert torch.equal(ends["kfac", "auto"], ends["kfac", "named"])
        assert not torch.equal(ends["kfac", "auto"], ends["kfac", "laplace"])
        assert torch.equal(ends["diagonal", "auto"], ends["diagonal", "laplace"])

    def test_the_adapter_is_plain_peft(self, trained: Path, model: Path) -> None:
        folder = trained / "adapter"
        files = {p.name for p in folder.iterdir()}
        assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert told(folder / "adapter_config.json")["base_model_name_or_path"] == str(model)
        base = AutoModelForCausalLM.from_pretrained(model)
        tuned, weights = PeftModel.from_pretrained(base, str(folder)), adapter(trained)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                assert torch.equal(parameter, weights[name.replace(".default", "")])
                assert bool(parameter.any())

    def test_a_source_that_is_told_to_be_the_model_s_own_needs_no_warning(
        self, train: Run, curvature: Path, out: Path
    ) -> None:
        argv = ("--budget", 0.01, "--kl", 1, "--max-steps", 2, "--source", "self")
        train(out, *argv, "--curvature", curvature).done()
        card = (out / "adapter" / "README.md").read_text()
        assert "on a few rows that the base model wrote" in card
        assert "- KL on rows that the base model wrote: " in card
        assert not [n for n in told(out / "train.json")["notes"] if "the model writes" in n]

    def test_a_curvature_of_its_own_is_kept_while_it_fits(
        self, retain: Run, model: Path, data: Path, source: Path, out: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        argv = ("train", "--model", model, "--data", data, "--rank", 4, "--batch-size", 4)
        argv = (*argv, "--dtype", "float32", "--out", out, "--max-steps", 1)
        first, kept = retain(*argv).done(), out / "curvature.safetensors"
        assert "measuring one on text that the model writes" in first.out
        stamp = kept.stat().st_mtime_ns
        second = retain(*argv, "--json").json
        assert second["curvature"]["seconds"] is None
        assert kept.stat().st_mtime_ns == stamp
        names = ["adapter", "curvature.safetensors", "run.json", "train.json"]
        assert sorted(p.name for p in out.iterdir()) == names
        kept.write_bytes(kept.read_bytes()[:-40] + bytes(40))
        assert "curvature.safetensors is not used" in retain(*argv).done().out
        found = retain(*argv, "--source", source, "--json").json
        assert found["curvature"]["info"]["note"] == str(source)
        again = retain(*argv, "--json").json  # and its own text without one
        assert again["curvature"]["info"]["note"] == "self"
        other = retain(*argv, "--seed", 1).done()  # of which another seed is another text
        assert "its text was sampled with seed 0" in other.out
        monkeypatch.setattr("retain.provenance.versions", lambda *_: {"retain": "9"})
        assert "its text was sampled by retain" in retain(*argv, "--seed", 1).done().out

    def test_a_curvature_that_was_fitted_in_another_way_is_made_anew(
        self, retain: Run, model: Path, data: Path, out: Path
    ) -> None:
        argv = ("train", "--model", model, "--data", data, "--rank", 4, "--batch-size", 4)
        argv = (*argv, "--dtype", "float32", "--out", out, "--max-steps", 1, "--json")
        kept = out / "curvature.safetensors"

        def note(*more: object) -> str:
            found = retain(*argv, *more).json
            assert found["curvature"]["seconds"] is not None
            return " ".join(found["notes"])

        retain(*argv).done()
        assert "its factors are whole, and factor_rank is 4 now" in note("--factor-rank", 4)
        again = retain(*argv, "--factor-rank", 4).json
        assert again["curvature"]["seconds"] is None
        assert "its factors are of rank 4, and factor_rank is auto now" in note()
        for option, value in (("--structure", "diagonal"), ("--rows", 16), ("--max-length", 32)):
            retain("fit", model, "self", "--rank", 4, "-o", kept, option, value, "-q").done()
            assert f"{option[2:].replace('-', '_')} {value}, and this run would" in note()

    def test_from_a_file_with_changes(
        self, retain: Run, model: Path, data: Path, out: Path, tmp_path: Path
    ) -> None:
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
        assert found["curvature"] is found["predicted_nats"] is None

    def test_leftovers_are_not_mixed_up(self, train: Run, trained: Path, out: Path) -> None:
        shutil.copytree(trained, out)
        train(out, "--method", "none").refused(
            "checkpoints of an earlier run", "--resume", "--overwrite"
        )
        argv = ("--data", "word-problems:8", "--method", "none", "--overwrite", "--json")
        assert train(out, *argv).json["examples"] == 8
        assert not (out / "checkpoints").exists()


class TestResume:
    @pytest.fixture
    def stopped(self, trained: Path, out: Path) -> Path:
        """The run as it was after step 9."""
        shutil.copytree(trained, out)
        shutil.rmtree(out / "adapter")
        shutil.rmtree(out / "checkpoints" / "checkpoint-12")
        (out / "train.json").unlink()
        return out

    def test_ends_where_the_whole_run_ends(self, retain: Run, stopped: Path, trained: Path) -> None:
        kept = stopped / "checkpoints"  # and one that is newer and broken
        shutil.copytree(kept / "checkpoint-9", kept / "checkpoint-11")
        (kept / "checkpoint-11" / "trainer_state.json").unlink()
        found = retain("train", "--resume", "--out", stopped, "--json").json
        assert found["resumed_from"] == "checkpoint-9"
        mine, theirs = adapter(stopped), adapter(trained)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        records = [told(p / "train.json") for p in (stopped, trained)]
        assert records[0]["history"] == records[1]["history"]

    def test_refusals(self, retain: Run, stopped: Path, tmp_path: Path) -> None:
        retain("train", "--resume", "--out", stopped, "--set", "training.seed=4").refused(
            "training.seed", "got: 4", "allowed: 0"
        )
        retain("train", "--resume", "--out", tmp_path / "none").refused("no run to resume")
        retain("train", "--resume").refused("which run to resume")


class TestRows:
    """``--rows``, ``--limit`` and ``--seed``: rows are drawn from the whole file."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
        """The numbers of the rows that were read, for each reading of a file."""
        found: list[list[int]] = []
        read = sources.read_rows

        def spy(source: Any, *args: Any, **more: Any) -> Any:
            rows = read(source, *args, **more)
            if isinstance(source, str | Path):
                found.append([row.number - 1 for row in rows])
            return rows

        monkeypatch.setattr(sources, "read_rows", spy)
        return found

    @pytest.mark.parametrize("seed", [0, 5])
    def test_fit(
        self, seed: int, retain: Run, model: Path, source: Path, out: Path, asked: list[Any]
    ) -> None:
        argv = ("--rows", 5, "--batch-size", 5, "--seed", seed, "--json")
        found = retain("fit", model, source, "-o", out / "c", *argv).json
        assert asked[0] == list(draw(16, 5, seed))
        assert found["info"]["note"] == str(source)
        assert found["info"]["sequences"] == 5

    @pytest.mark.parametrize("command", ["fit", "train"])
    def test_a_source_is_read_once(
        self, command: str, retain: Run, model: Path, source: Path, data: Path, out: Path,
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """It is gone by the time the model is there."""
        text = Path(shutil.copy(source, tmp_path / "text.jsonl"))
        load = load_model

        def loaded(*args: Any, **options: Any) -> Any:
            text.unlink()
            return load(*args, **options)

        monkeypatch.setattr("retain.models.load.load_model", loaded)
        argv = [command, model, text, "-o", out / "curvature.safetensors"]
        if command == "train":
            argv = [command, "--model", model, "--data", data, "--source", text, "--out", out]
            argv += [*SHORT, "--max-steps", 1]
        retain(*argv, "-q").done()
        fitted = load_curvature(out / "curvature.safetensors")
        assert (fitted.info.note, fitted.info.sequences) == (str(text), 16)

    def test_eval_measures_on_others(
        self, retain: Run, trained: Path, source: Path, asked: list[Any]
    ) -> None:
        argv = ("eval", "--adapter", trained / "adapter", "--source", source, "--rows", 5, "-q")
        retain(*argv, "--seed", 2).done()
        assert asked == [list(draw(16, 5, HELD_OUT + 2))]
        assert asked[0] != list(draw(16, 5, 2))

    @pytest.mark.parametrize("seed", [0, 5])
    def test_train(self, seed: int, train: Run, out: Path, asked: list[Any]) -> None:
        train(out, "--method", "none", "--limit", 8, "--seed", seed, "-q").done()
        assert asked == [list(draw(24, 8, seed))]
        assert told(out / "train.json")["examples"] == 8

    def test_train_on_a_limit_of_text(self, train: Run, out: Path, tmp_path: Path) -> None:
        text = tmp_path / "a.txt"
        text.write_text("".join(f"{i:04} words " for i in range(900)))
        said = train(out, "--data", text, "--method", "none", "--limit", 8)
        assert told(out / "train.json")["examples"] == 8
        assert "steps are few: --epochs" in said.out and "--general knowledge" in said.out


class TestEval:
    def test_measures_all_and_feeds_the_report(
        self, retain: Run, trained: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "result.json"
        argv = ("--probe", "--task", "word-problems:2", "--rows", 8, "--max-length", 16)
        argv = (*argv, "--out", out, "--json")
        found = retain("eval", "--adapter", trained / "adapter", *argv).json
        assert found == told(out)
        scores = found["scores"]
        kl, knowledge = scores["source.kl"]["tuned"][0], scores["general.knowledge"]
        assert kl["interval"][0] <= kl["value"] > 0
        assert 0 <= knowledge["base"]["value"] <= 1 and knowledge["tuned"][0]["n"] == 300
        assert scores["task.word-problems"]["tuned"][0]["n"] == 2
        assert [a["label"] for a in found["adapters"]] == ["LoRA + retention"]
        made = retain("report", out, "--json").json
        assert [Path(p).name for p in made["written"]] == ["report.html"]
        html = (tmp_path / "report.html").read_text()
        assert "nats per token from the base" in html and "<h3>Loss</h3>" in html

    def test_on_a_file(self, retain: Run, trained: Path, source: Path) -> None:
        outcome = retain("eval", "--adapter", trained / "adapter", "--source", source)
        assert (outcome.code, outcome.err) == (0, "")
        assert "KL to the base" in outcome.out

    def test_answers_to_prompts(
        self, retain: Run, trained: Path, source: Path, tmp_path: Path
    ) -> None:
        prompts, out = tmp_path / "prompts.jsonl", tmp_path / "result.json"
        rows = [
            {"prompt": w, "skill": s, "accepted": "no"} for w, s in zip("abcd", "xxyy", strict=True)
        ]
        write_lines(prompts, rows)
        argv = ("eval", "--adapter", trained / "adapter", "--source", source, "--out", out)
        plain = retain(*argv, "--json").json
        assert "answers" not in plain["adapters"][0]
        argv = (*argv, "--prompts", prompts)
        found = retain(*argv, "--json").json
        assert found == told(out)
        answers = found["adapters"][0]["answers"]
        record = AnswersRecord.model_validate(answers)
        assert record.plain() == answers
        assert (record.overall.prompts, record.skills.keys()) == (4, {"x", "y"})
        assert [row["prompt"] for row in record.rows] == list("abcd")
        assert record.overall.log_ratio.value is not None
        shown = retain(*argv)
        assert "answers to prompts" in shown.out and "log-ratio" in shown.out
        assert [line.split()[1] for line in shown.out.splitlines()[-8:] if "│" in line][:3]
        retain("report", out, "--json").done()

    def test_prompts_that_are_missing(self, retain: Run, trained: Path) -> None:
        argv = ("eval", "--adapter", trained / "adapter", "--prompts", "generl")
        retain(*argv).refused("the prompts cannot be read", "'general'")


class TestDemo:
    def test_prints_the_claims_and_the_report(
        self, retain: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        seen: dict[str, Any] = {}

        def run_demo(**given: Any) -> StudyRecord:
            seen.update(given)
            claim = {"claim": "forgets less", "value": 0.1, "bound": 0.5, "holds": True}
            return StudyRecord.model_validate({"name": "demo", "runs": [], "claims": [claim]})

        monkeypatch.setattr("retain.study.demo.run_demo", run_demo)
        monkeypatch.setattr("retain.report.write_report", lambda _, page: [page])
        outcome = retain("demo", "--out", tmp_path, "--seed", 3, "--quick")
        assert callable(seen.pop("say"))
        assert seen == {"out": tmp_path, "seed": 3, "quick": True, "progress": False}
        assert "forgets less" in outcome.out
        assert "holds" in outcome.out
        assert f"report: {tmp_path / 'report.html'}" in outcome.out
        assert retain("demo", "--out", tmp_path, "--json").json["summary"][0]["holds"] is True


class TestHelp:
    @pytest.mark.parametrize("command", ["fit", "train", "eval", "report", "demo"])
    def test_has_an_example(self, retain: Run, command: str) -> None:
        assert f"Example: retain {command} " in retain(command, "--help").done().out

    def test_without_a_command(self, retain: Run) -> None:
        from retain import __version__

        assert "Commands" in retain().out
        assert retain("--version").out == f"retain {__version__}\n"


class TestSmallThings:
    def test_dtypes_are_the_library_s(self) -> None:
        from retain.models.load import DTYPES as KNOWN

        assert set(DTYPES) == set(KNOWN)
        assert set(get_args(RunConfig.model_fields["dtype"].annotation)) <= set(DTYPES)

    def test_finite(self) -> None:
        nan = float("nan")
        found = finite({"a": [1.0, nan], "b": (Path("x"), float("inf"))})
        assert found == {"a": [1.0, None], "b": ["x", None]}

    def test_name_list(self) -> None:
        assert name_list("all-linear") == "all-linear"
        assert name_list("q_proj, v_proj") == ["q_proj", "v_proj"]

    def test_problem_count(self) -> None:
        assert problem_count("rows.jsonl", "train") is None
        assert problem_count("word-problems", "test") == 100
        assert problem_count("word-problems:7", "train") == 7
        with pytest.raises(ConfigError):
            problem_count("word-problems:", "train")
