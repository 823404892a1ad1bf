"""``retain certify``: exit codes, the record, the model card, the page, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_parts import WORDS, Outcome, told, write_lines
from safetensors.torch import load_file, save_file

import retain
from retain.errors import OutputError
from retain.evaluation.certify import certify
from retain.models.cards import with_section
from retain.models.load import load_model
from retain.models.lora import attach_lora
from retain.models.saved import adapter_digest, save_adapter

CHOICES = ["cat", "sat", "mat", "dog"]  # as long as one another: the shortest would win always
WRITTEN = ["README.md", "adapter_config.json", "adapter_model.safetensors", "certify.json"]


@pytest.fixture(scope="module")
def idle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that does nothing."""
    tuned = attach_lora(load_model(str(model)).model, rank=2)
    return save_adapter(tuned, tmp_path_factory.mktemp("idle") / "adapter", str(model))


@pytest.fixture(scope="module")
def asked(model: Path, idle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Choices and answers that the base gets right."""
    prompts = [f"{WORDS[i % 19]} {WORDS[(i * i + 3) % 19]} {i}" for i in range(60)]
    rows = [{"skill": "pick", "prompt": p, "choices": CHOICES, "answer": 0} for p in prompts]
    rows += [{"skill": "say", "prompt": p, "answer": "x"} for p in prompts[:20]]
    loaded = load_model(str(model))
    tuned = attach_lora(loaded.model, rank=2)
    found = certify(tuned, rows, allow={"say": 0.5}, tokenizer=loaded.tokenizer, new_tokens=4)
    for row, said in zip(rows, found.rows, strict=True):
        row["answer"] = said["base"]
    rows = [row for row in rows if any(map(str.isalnum, str(row["answer"]).partition("\n")[0]))]
    for row in rows:
        if row["skill"] == "say":
            row["answer"] = str(row["answer"]).lstrip().splitlines()[0]
    return write_lines(tmp_path_factory.mktemp("skills") / "skills.jsonl", rows)


@pytest.fixture
def adapter(idle: Path, tmp_path: Path) -> Path:
    """A copy, since the command writes into it."""
    return Path(shutil.copytree(idle, tmp_path / "adapter"))


def spoil(adapter: Path) -> None:
    """Makes an adapter that breaks the model: a large random B."""
    file = adapter / "adapter_model.safetensors"
    random = torch.Generator().manual_seed(0)
    weights = load_file(file)
    for name, value in weights.items():
        if "lora_B" in name:
            weights[name] = 5 * torch.randn(value.shape, generator=random)
    save_file(weights, file, {"format": "pt"})


@pytest.fixture
def run(retain: Any, asked: Path) -> Any:
    def run(adapter: Path, *argv: object) -> Outcome:
        given = ["certify", adapter, "--skills", asked, "--new-tokens", 4]
        return retain(*given, *([] if "--allow" in argv else ["--allow", "pick=40%"]), *argv)

    return run


def test_an_adapter_that_does_nothing_is_held(
    run: Any, adapter: Path, asked: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    argv = ("--allow", "pick=40%", "--allow", "say=40%", "--out", page)
    found = run(adapter, *argv, "--json").json
    assert sorted(p.name for p in adapter.iterdir()) == WRITTEN
    record = told(adapter / "certify.json")
    assert found == record
    assert record["schema"] == "retain.certificate/1"
    assert {"seed", "versions", "commit", "hardware", "created"} <= record.keys()
    assert record["digests"]["adapter"] == adapter_digest(adapter)
    assert (record["held"], record["source"]) == (True, str(asked))
    assert [s["verdict"] for s in record["skills"]] == ["held", "held"]
    assert len(record["rows"]) == len(asked.read_text().splitlines())
    assert all(r["right_before"] and r["right_after"] for r in record["rows"])
    card = (adapter / "README.md").read_text()
    assert "Held: kept at 95% confidence: pick, say" in card and "| pick | 60 |" in card
    html = page.read_text()
    assert "<title>retain report: " in html and "v-held" in html and "v-broken" not in html.split(
        "<body>")[1]  # fmt: skip
    out = run(adapter, *argv).done().out
    assert "pick" in out and "Held: kept at 95% confidence: pick, say" in out and str(page) in out


def test_a_broken_adapter_is_found(run: Any, adapter: Path, tmp_path: Path) -> None:
    spoil(adapter)
    page = tmp_path / "page.html"
    outcome = run(adapter, "--out", page)
    assert (outcome.code, outcome.err) == (1, "")
    assert "Broken: not shown to be kept at 95% confidence: pick" in outcome.out
    record = told(adapter / "certify.json")
    pick, say = record["skills"]
    assert (record["held"], pick["verdict"], say["verdict"]) == (False, "broken", "")
    assert pick["lost"] == sum(
        r["right_before"] and not r["right_after"] for r in record["rows"] if r["skill"] == "pick"
    )
    assert pick["lost"] > 10 and pick["bound"] > 0.4 and say["lost"] > 0
    body = page.read_text().split("<body>")[1]
    assert "v-broken" in body and "Lost: right before, wrong after" in body
    assert run(adapter, "--json", "--quiet").code == 1


def test_the_card_is_added_to_and_never_twice(run: Any, adapter: Path) -> None:
    card = adapter / "README.md"
    card.write_bytes("---\nlicense: mit\n---\n# Mine\r\n\nÜber alles.\n".encode())
    run(adapter).done()
    once = card.read_bytes()
    assert once.startswith("---\nlicense: mit\n---\n# Mine\r\n\nÜber alles.\n\n<!--".encode())
    card.write_bytes(once + b"\nBelow it.\n")
    run(adapter).done()
    assert card.read_bytes() == once + b"\nBelow it.\n"
    run(adapter, "--allow", "say=50%").done()
    other = card.read_bytes()
    assert other != once + b"\nBelow it.\n" and other.endswith(b"\nBelow it.\n")
    assert other.count(b"## What was kept") == 1


def test_a_name_of_several_lines_is_one_in_the_card(run: Any, adapter: Path, asked: Path) -> None:
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    name = "pi\n## ck|ed"
    rows = [row | {"skill": name} for row in rows if row["skill"] == "pick"]
    skills = write_lines(adapter.parent / "named.jsonl", rows)
    run(adapter, "--skills", skills, "--allow", f"{name}=40%").done()
    card = (adapter / "README.md").read_text()
    assert "| pi ## ck/ed | 60 |" in card and "confidence: pi ## ck|ed. Of what" in card
    assert "\n## ck" not in card


def test_a_section_whose_end_is_gone_takes_nothing_along() -> None:
    card = with_section("# Mine\n", "one", "certify")
    torn = card.replace("<!-- end of certify -->", "") + "keep\n"
    again = with_section(torn, "two", "certify")
    assert "keep" in again and "one" in again and again.count("two") == 1
    assert with_section(again, "three", "certify").count("keep") == 1
    assert with_section(again, "two", "certify") == again
    assert with_section("", "x") == with_section(with_section("", "x"), "x")


def test_the_same_from_python(adapter: Path, model: Path, asked: Path) -> None:
    loaded = load_model(str(model))
    tuned = attach_lora(loaded.model, rank=2)
    found = retain.certify(tuned, asked, allow={"pick": "40%"}, new_tokens=4)
    assert found.held and found.skills[0].lost == 0


def test_the_built_in_prompts_have_too_few_items(run: Any, adapter: Path) -> None:
    outcome = run(adapter, "--skills", "general", "--allow", "facts=2%", "--new-tokens", 1)
    assert outcome.code == 1
    assert "no better than chance" in " ".join(outcome.out.split())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--allow", "pick"], "SKILL=SHARE"),
        (["--allow", "pick=2%", "--allow", "pick=3%"], "each skill once"),
        (["--allow", "pick=2"], "above 0% and below 100%"),
        (["--allow", "pock=2%"], "did you mean 'pick'?"),
        (["--new-tokens", 0], "allowed: "),
        (["--skills", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--out", "."], "no plain file"),
        (["--out", "cert.pdf"], "ends in .html"),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_bad_input_is_refused(run: Any, adapter: Path, argv: list[object], said: str) -> None:
    run(adapter, *argv).refused(said)
    assert sorted(p.name for p in adapter.iterdir()) == WRITTEN[:-1]
    assert "What was kept" not in (adapter / "README.md").read_text()


@pytest.mark.usefixtures("unloaded")
def test_other_peoples_files_are_refused(
    run: Any, retain: Any, adapter: Path, asked: Path, tmp_path: Path
) -> None:
    retain("certify", adapter, "--skills", asked).refused("--allow facts=2%")
    run(tmp_path / "nothing").refused("no such adapter folder")
    page = tmp_path / "mine.html"
    page.write_text("mine")
    run(adapter, "--out", page).refused("mine.html")
    (adapter / "README.md").write_bytes(b"\xff\xfe")
    run(adapter).refused("model card", "UTF-8")
    (adapter / "README.md").unlink()
    (adapter / "certify.json").write_text("{}")
    run(adapter).refused("certify.json")
    bad = write_lines(tmp_path / "bad.jsonl", [{"skill": "s", "prompt": "p"}])
    (adapter / "certify.json").unlink()
    run(adapter, "--skills", bad, "--allow", "s=2%").refused("nothing clear", "row 1")
    assert page.read_text() == "mine"


@pytest.mark.usefixtures("unloaded")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused_first(run: Any, adapter: Path) -> None:
    adapter.chmod(0o500)
    try:
        run(adapter).refused("written")
    finally:
        adapter.chmod(0o700)


@pytest.fixture
def read_only(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter whose folder cannot be written, as far as the check can tell: root may."""

    def check(folder: Path) -> Path:
        if folder == adapter:
            raise OutputError("the output folder cannot be written", got=folder, fix="none")
        return folder

    monkeypatch.setattr("retain.runs.certify.check_folder", check)
    return adapter


def test_a_read_only_adapter_is_certified_beside_the_page(
    run: Any, read_only: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page" / "page.html"
    page.parent.mkdir()
    found = run(read_only, "--out", page, "--json").json
    assert sorted(p.name for p in read_only.iterdir()) == WRITTEN[:-1]
    assert "What was kept" not in (read_only / "README.md").read_text()
    assert told(page.parent / "page.json") == found and found["held"]
    assert f"the record is {page.parent / 'page.json'}" in found["notes"][0]
    run(read_only, "--out", page.with_name("other.html")).done()
    assert told(page.parent / "page.json") == found  # as that of another adapter would
    names = ["other.html", "other.json", "page.html", "page.json"]
    assert sorted(p.name for p in page.parent.iterdir()) == names
    (page.parent / "other.json").write_text("{}")
    run(read_only, "--out", page.with_name("other.html")).refused("other.json")


@pytest.mark.usefixtures("unloaded")
def test_a_read_only_adapter_wants_a_page(run: Any, read_only: Path) -> None:
    outcome = run(read_only)
    assert outcome.code == 2 and "fix: --out certificate.html: certificate.json" in outcome.err


def test_what_is_written_into_the_card_meanwhile_stays(
    run: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any, **options: Any) -> Any:
        with (adapter / "README.md").open("a", encoding="utf-8") as card:
            card.write("\nA line of its user.\n")
        return certify(*args, **options)

    monkeypatch.setattr("retain.evaluation.certify.certify", slow)
    run(adapter, "--allow", "pick=40%").done()
    text = (adapter / "README.md").read_text()
    assert "A line of its user." in text and "Held: kept at 95% confidence: pick" in text
