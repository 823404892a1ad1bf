"""``retain eval`` of adapters that plain PEFT trained: rows, general tasks, answers, the page."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_parts import WORDS, Run, told, write_lines
from markupsafe import escape
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import retain
from retain.cli import main
from retain.cli.eval import _cell
from retain.errors import ConfigError
from retain.evaluation.held_out import held_out, measure_rows, same_answer
from retain.models.view import ModelView
from retain.records import EvalRecord, Measure

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra: eval)"
)
ROWS = [{"prompt": f"{WORDS[i]} {i}:", "completion": f" {WORDS[i % 2]}"} for i in range(8)]


def by_peft(model: Path, folder: Path, steps: int) -> Path:
    """An adapter that a plain loop with PEFT has trained on the rows."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.01)
    texts = [
        (tokenizer(r["prompt"]).input_ids, tokenizer(r["completion"] + "</s>").input_ids)
        for r in ROWS
    ]
    for _ in range(steps):
        for head, answer in texts:
            labels = torch.tensor([[-100] * len(head) + answer])
            tuned(input_ids=torch.tensor([head + answer]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An adapter that knows the rows, and one that has hardly begun."""
    out = tmp_path_factory.mktemp("peft")
    return [by_peft(model, out / "well", 40), by_peft(model, out / "begun", 2)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture
def evaluate(retain: Run, folders: list[Path], source: Path) -> Run:
    """``retain eval`` of the adapter that knows the rows, on a source of two texts."""
    given = ("eval", "--adapter", folders[0], "--source", source, "--rows", 2, "--max-length", 12)
    return lambda *argv: retain(*given, "--batch-size", 2, *argv)


def brute_force(model: Path, folder: Path | None) -> list[tuple[float, int, str]]:
    """Each row's nats, tokens and greedy answer, by transformers and PEFT alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    net: Any = AutoModelForCausalLM.from_pretrained(model)
    if folder is not None:
        net = PeftModel.from_pretrained(net, str(folder))
    net.eval()
    found = []
    for row in ROWS:
        head = [tokenizer.bos_token_id, *tokenizer(row["prompt"]).input_ids][1:]
        answer = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        ids, size = torch.tensor([head + answer]), len(answer)
        with torch.no_grad():
            logp = net(input_ids=ids).logits.log_softmax(-1)[0]
            written = net.generate(
                input_ids=torch.tensor([head]), attention_mask=torch.ones(1, len(head)).long(),
                max_new_tokens=16, do_sample=False,
            )  # fmt: skip
        nats = -sum(float(logp[len(head) + i - 1, t]) for i, t in enumerate(answer))
        text = tokenizer.decode(written[0, len(head) :], skip_special_tokens=True)
        found.append((nats, size, text))
    return found


def test_the_rows_are_those_of_a_loop_by_hand(
    evaluate: Run, folders: list[Path], rows: Path, model: Path
) -> None:
    found = evaluate("--data", rows, "--json").json
    scores, data = found["scores"], found["data"]
    for which, folder in ((None, None), (0, folders[0])):
        want = brute_force(model, folder)
        items = [i["base"] if which is None else i["tuned"][which] for i in data["items"]]
        for item, (nats, _, said) in zip(items, want, strict=True):
            assert item["nats"] == pytest.approx(nats, abs=2e-4)
            assert item["said"] == said.strip()
        right = sum(
            w[2].strip() == r["completion"].strip() for w, r in zip(want, ROWS, strict=True)
        )
        nats, tokens = (sum(w[k] for w in want) for k in (0, 1))
        got = {k: s["base"] if which is None else s["tuned"][which] for k, s in scores.items()}
        assert got["data.loss"]["value"] == pytest.approx(nats / tokens, abs=1e-4)
        assert got["data.loss"]["n"] == tokens
        assert got["data.row_loss"]["value"] == pytest.approx(nats / 8, abs=1e-3)
        assert (got["data.right"]["value"], got["data.right"]["n"]) == (right / 8, 8)
        for measure in (got["data.loss"], got["data.right"]):
            low, high = measure["interval"]
            assert low <= measure["value"] <= high
    assert scores["data.right"]["base"]["value"] == 0 < scores["data.right"]["tuned"][0]["value"]
    change = scores["data.loss"]["changes"][0]
    assert change["value"] < change["interval"][1] < 0
    assert found["adapters"][0]["name"] == "well"
    assert [i["answer"] for i in data["items"]] == [r["completion"].strip() for r in ROWS]
    assert "no train.json beside the adapter" in found["notes"][0]
    assert EvalRecord.model_validate(found).plain() == found


def test_what_is_left_out_or_cut_is_said_and_counted(evaluate: Run, tmp_path: Path) -> None:
    other = (("x" * 50, " y"), ("", "ab"), ("p:", "z" * 50))
    given = [*ROWS[:4], *({"prompt": p, "completion": c} for p, c in other)]
    data = write_lines(tmp_path / "rows.jsonl", given)
    argv = ("--data", data, "--data-length", 30, "--new-tokens", 1)
    found = evaluate(*argv, "--json").json
    counts = found["data"]["counts"]
    assert (counts["left_out_no_room"], counts["completions_cut"]) == (1, 1)
    assert (found["data"]["rows"], found["data"]["asked"]) == (6, 4)
    notes = " ".join(found["notes"])
    assert notes.count("prompt that fills max_length=30") == 1
    assert "2 of 6 rows are not asked" in notes and "do not end within 1 tokens" in notes
    assert found["scores"]["data.right"]["base"]["n"] == 4
    fewer = evaluate("--data", data, "--limit", 3, "--json").json["data"]
    assert fewer["counts"]["rows"] == 3


def test_a_long_prompt_takes_no_room_from_other_answers(model: Path) -> None:
    words = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(words), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    view = ModelView(GPT2LMHeadModel(config), words)
    few = [{"prompt": f"q{i}:", "completion": "a right answer of some length"} for i in range(3)]
    found = []
    for more in ([], [{"prompt": "x" * 58, "completion": "y"}]):
        rows = held_out(view, few + more, max_length=128)
        assert rows.new_tokens == 45 and len(rows.asked) == len(few + more)
        found.append(measure_rows(view, rows))
    alone, beside = found
    assert beside.said[:3] == alone.said
    assert beside.said[3]  # in the room that is left behind it
    assert (alone.cut, beside.cut) == (3, 4)


def test_one_row_tells_no_interval(evaluate: Run, tmp_path: Path) -> None:
    data, out = write_lines(tmp_path / "row.jsonl", ROWS[:1]), tmp_path / "one.html"
    said = evaluate("--data", data, "--rows", 1, "--out", out).done().out
    scores = told(out.with_suffix(".json"))["scores"]
    loss = scores["data.loss"]
    assert all(m["interval"] is None for m in (loss["base"], *loss["tuned"], *loss["changes"]))
    assert scores["source.kl"]["tuned"][0]["interval"] is None
    assert not re.search(r"loss of the rows[^│]*│[^%]*\[", said.replace("┃", "│"))
    assert ", which may be chance)" in out.read_text()


def test_a_prompt_of_one_token_is_asked(model: Path) -> None:
    words = AutoTokenizer.from_pretrained(model)
    view = ModelView(AutoModelForCausalLM.from_pretrained(model), words)
    given: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "b"}, {"text": "ab"}, {"prompt": "", "completion": "ab"},
        {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, {"input_ids": [3, 4, 5]},
    ]  # fmt: skip
    rows = held_out(view, given, max_length=128)
    assert len(words("a", add_special_tokens=False)["input_ids"]) == 1
    assert rows.asked == [0, 3]
    begun = words("a")["input_ids"]
    assert rows.prompts[0] is not None and list(rows.prompts[0])[-1] == begun[-1]
    assert rows.prompts[3] == (3,) and rows.answers[3] == (4, 5)


def test_text_has_a_loss_and_no_answers(evaluate: Run, source: Path) -> None:
    found = evaluate("--data", source, "--limit", 4, "--json").json
    assert found["data"]["asked"] == 0 and "data.right" not in found["scores"]
    assert found["scores"]["data.loss"]["base"]["value"] > 0


@needs_lm_eval
def test_general_tasks_of_local_rows(evaluate: Run, tmp_path: Path) -> None:
    import gzip

    folder = tmp_path / "reasoning" / "arc_easy"
    folder.mkdir(parents=True)
    with gzip.open(folder / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        for i in range(6):
            texts, labels = [f"{WORDS[(i + k) % 19]}." for k in range(4)], list("ABCD")
            row = {"id": str(i), "question": f"Who is {i}?", "answerKey": labels[i % 4],
                   "choices": {"text": texts, "label": labels}}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    argv = ("--general", "knowledge:20,arc_easy:4", "--data-dir", tmp_path)
    found = evaluate(*argv, "--json").json
    for key, n in (("general.knowledge", 20), ("general.arc_easy", 4)):
        score = found["scores"][key]
        assert (score["base"]["n"], score["tuned"][0]["n"]) == (n, n)
        assert score["changes"][0]["interval"][0] <= score["changes"][0]["value"]
        assert (score["unit"], score["better"]) == ("%", 1)
    assert found["general"]["tasks"] == {"knowledge": 20, "arc_easy": 4}
    argv = ("--general", "arc_easy", "--data-dir", tmp_path / "none")
    evaluate(*argv).refused("the rows of arc_easy are not here")


@pytest.fixture(scope="module")
def page(
    folders: list[Path], rows: Path, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A page of two adapters, with rows and prompts of two skills."""
    out = tmp_path_factory.mktemp("page")
    asked = [
        {"prompt": f"{word} <b>{i}</b>?", "skill": "ab"[i % 2], "accepted": "no"}
        for i, word in enumerate(WORDS[:14])
    ]
    prompts = write_lines(out / "prompts.jsonl", asked)
    argv = ["eval", "--adapter", folders[0], "--adapter", folders[1], "--data", rows, "--rows", 2]
    argv += ["--max-length", 12, "--batch-size", 2, "--source", source, "--prompts", prompts]
    assert main([str(arg) for arg in (*argv, "--out", out / "report.html", "--quiet")]) == 0
    return out / "report.html"


def test_two_adapters_are_compared(page: Path) -> None:
    found = told(page.with_suffix(".json"))
    assert found["schema"] == "retain.result/2"
    assert [a["name"] for a in found["adapters"]] == ["well", "begun"]
    for key in ("data.loss", "data.right", "source.kl", "answers.right"):
        score = found["scores"][key]
        (apart,) = score["between"]
        well, begun = (m["value"] for m in score["tuned"])
        assert apart["pair"] == [1, 0]
        assert apart["value"] == pytest.approx(begun - well)
        assert apart["interval"][0] <= apart["value"] <= apart["interval"][1]
    items = [item["tuned"] for item in found["data"]["items"]]
    nats = [b["nats"] - a["nats"] for a, b in items]
    assert found["scores"]["data.row_loss"]["between"][0]["value"] == pytest.approx(sum(nats) / 8)


def test_all_that_an_adapter_brings_is_its_own(
    retain: Run, model: Path, source: Path, tmp_path: Path
) -> None:
    """LoRA on the tables of tokens has no curvature, and is measured as any other."""
    cases: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True, "trainable_token_indices": [3, 4]},
        {"lora_bias": True},
    ]
    argv: list[object] = ["eval", "--source", source, "--rows", 2, "--max-length", 12]
    want = []
    for i, options in enumerate(cases):
        given = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
        base = AutoModelForCausalLM.from_pretrained(model)
        size = base.num_parameters()
        tuned = get_peft_model(base, LoraConfig(**given))
        want.append(tuned.get_nb_trainable_parameters()[0])
        tuned.save_pretrained(tmp_path / str(i))
        argv += ["--adapter", tmp_path / str(i)]
    found = retain(*argv, "--json").json
    assert [one["trainable"] for one in found["adapters"]] == want
    assert found["model"]["parameters"] == size


def test_the_page_shows_answers_side_by_side(page: Path, retain: Run) -> None:
    html = page.read_text(encoding="utf-8")
    body = html.split("<body>")[1].split("</main>")[0]
    body = re.sub(r"<script type.*?</script>", "", body, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", body) and "http" not in body
    assert "&lt;b&gt;3" in body and "<b>3" not in body
    found = told(page.with_suffix(".json"))
    for adapter in found["adapters"]:
        for row in adapter["answers"]["rows"]:
            assert escape(row["tuned"]) in body
    first, rest = body.split("more prompts</summary>")
    rest, more = rest.split("Answers to the held-out rows")
    assert [part.count('class="asked"') for part in (first, rest, more)] == [10, 4, 8]
    for word in ("well", "begun", "begun less well", "exact match of the rows", "KL to the base"):
        assert word in body, word
    again = page.with_name("again.html")
    retain("report", page.with_suffix(".json"), "--out", again).done()
    assert again.read_text(encoding="utf-8") == html
    tables = page.with_name("tables.md")
    retain("report", page.with_suffix(".json"), "--markdown", tables).done()
    assert "exact match of the rows" in tables.read_text()


def test_the_same_from_python(folders: list[Path], rows: Path, source: Path) -> None:
    given = {"source": str(source), "rows": 2, "max_length": 12, "batch_size": 2}
    found = retain.eval_run(given, adapter=folders[0], data=rows, limit=4, quiet=True)
    assert found["data"]["rows"] == 4
    with pytest.raises(ConfigError, match="did you mean 'adapter'"):
        retain.eval_run(adaptr=folders[0])


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("The Cat.", "cat", True),
        ("", "", False),
        ("9*8=72\n#### 72\nmore", "72 is\n#### 72", True),
        ("72", "#### 72", False),
        ("#### $1,200.", "x #### 1200", True),
        ("#### 7", "#### 8", False),
        ("<", ">", False),
        ("#### 1/2", "#### 12", False),
    ],
)
def test_same_answer(said: str, answer: str, right: bool) -> None:
    assert same_answer(said, answer) is right


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--general", "knowledge:0"], "knowledge:0"),
        (["--general", "knowledge,knowledge"], "each once"),
        (["--limit", 0], "allowed: "),
        (["--out", "."], "no plain file"),
        (["--out", "page.htm"], "fix: --out page.html"),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_bad_input_is_refused(evaluate: Run, argv: list[object], said: str) -> None:
    evaluate(*argv).refused(said)


def test_rows_that_cannot_be_asked(evaluate: Run, tmp_path: Path) -> None:
    empty, labels = tmp_path / "empty.jsonl", tmp_path / "labels.jsonl"
    empty.write_text("")
    write_lines(labels, [{"text": w, "label": i % 2} for i, w in enumerate(WORDS)])
    out = tmp_path / "result.json"
    evaluate("--data", empty, "--out", out).refused("empty")
    evaluate("--data", labels, "--out", out).refused("the rows are a classifier's", "completion")
    (twice := tmp_path / "prompts.txt").write_text("hello\nhi\nhello\n")
    evaluate("--prompts", twice, "--out", out).refused("'hello' as given-01 and given-03")
    assert not out.exists()


def test_bases_and_tasks_that_are_not_known(
    evaluate: Run, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(folders[1], tmp_path / "other")
    config = told(other / "adapter_config.json") | {"base_model_name_or_path": "nowhere/model"}
    (other / "adapter_config.json").write_text(json.dumps(config))
    evaluate("--adapter", other).refused("several base models", "nowhere/model")
    config["base_model_name_or_path"] = None
    (other / "adapter_config.json").write_text(json.dumps(config))
    evaluate("--adapter", other).refused("nothing says which base model")
    config |= {"base_model_name_or_path": config["base_model_name_or_path"], "task_type": "SEQ_CLS"}
    (other / "adapter_config.json").write_text(json.dumps(config))
    evaluate("--adapter", other).refused("a classifier's adapter", "docs/classifiers.md")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    evaluate("--general", "hellaswag").refused("retain-lora[eval]")


@needs_lm_eval
@pytest.mark.usefixtures("unloaded")
def test_an_unknown_general_task(evaluate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from retain.evaluation import lm_eval as bridge

    small = bridge._manager("hellaswag")  # the index of all tasks takes many seconds
    monkeypatch.setattr(bridge, "_manager", lambda folder=None: small)
    evaluate("--general", "helaswag:3").refused("did you mean 'hellaswag'?")


def test_a_large_number_is_written_out() -> None:
    """A perplexity of a model that broke: 1,013, not 1.01e+03."""
    broken = Measure(value=1012.6, interval=(890.0, 12345.4))
    assert _cell(broken, "nats") == "1,013 [890, 12,345]"
    assert _cell(broken, "nats", signed=True) == "+1,013 [+890, +12,345]"
    assert _cell(Measure(value=0.01234, interval=(0.0, 0.5)), "nats") == "0.0123 [0, 0.5]"
    assert _cell(Measure(value=0.38, interval=(0.24, 0.54)), "%") == "38.0% [24.0, 54.0]"
