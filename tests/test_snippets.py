"""Every block of code of the documentation is run, on tiny models, or says why it is not.

The blocks of a page run one after the other in one folder and one namespace. A comment before a
block says what cannot be had here: ``<!-- not run: WHY -->``, then its commands are parsed all the
same, or ``<!-- needs: PACKAGE -->``, then it runs where that is installed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from typer.main import get_command

import retain
from data.task_rows import HUB
from retain.cli import main
from retain.cli.app import app
from retain.data.sources import encode
from retain.study.grid import expand
from retain.study.spec import parse_study, read_study
from tiny import move, save_tiny

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

ELSEWHERE = {"extending.md": "tests/study/test_extending.py"}
"""Pages whose blocks another test runs, in a clone of the package."""

REAL = {"curvature.md", "soften.md"}
"""Pages whose Python is of the real model, in test_docs.py."""

NOT_RUN = Counter({
    "index.md": 2, "certify.md": 1, "command-line.md": 1, "trainers.md": 5, "how-to/gpus.md": 1,
    "how-to/trackers.md": 1, "how-to/serve.md": 2, "how-to/gpu-recipes.md": 2, "how-to/share.md": 2,
    "studies.md": 4, "eval.md": 3, "explain.md": 2, "recipe.md": 1,
})  # fmt: skip
"""Blocks that are marked so, by page: one more is to be noticed."""

SHORT = {
    "fit": "--rows 8 --max-length 32 --rank 2",
    "train": "--limit 8 --batch-size 2 --max-steps 2 --max-length 64",
    "eval": "--rows 8 --max-length 32",
    "soften": "--rows 8 --max-length 32 --points 2",
    "compact": "--rank 1",
    "certify": "--new-tokens 4",
    "study": "--limit 8 --seeds 0",
}
"""What makes a command quick."""

FEWER = {
    r"\bmax_steps=\d+": "max_steps=2",
    r"\b(rows|heldout): \d+": r"\1: 8",
    "max_length: 128": "max_length: 32",
}
"""What makes a script and a study quick."""

GIVEN = {"certify.md": "runs/may/adapter", "soften.md": "runs/mine/adapter"}
"""Adapters that a page takes for granted."""

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run|needs): (?P<why>[^\n]*) -->\n)?"
    r"(?:^`(?P<file>[\w./-]+)`[^`\n]*:\n\n)?"
    r"^```(?P<language>[\w-]*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A block of a page: its mark and why, the file that it is, its language and text."""

    mark: str | None
    why: str | None
    file: str | None
    language: str
    text: str


def pages() -> list[str]:
    """Paths below docs/ of all pages with code."""
    found = (path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md")))
    return [page for page in found if page not in ELSEWHERE and blocks(page)]


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = [Block(**match.groupdict()) for match in BLOCK.finditer(text)]
    assert len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)) / 2, page
    return found


def commands(text: str) -> list[list[str]]:
    """The command lines of a block, without what is set for them alone (``NAME=value``)."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [[*words] for words in map(_bare, found) if words]


def _bare(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def parsed(words: list[str]) -> None:
    """A command line has options that there are, with values of their kind."""
    command: Any = get_command(app)
    _, command, rest = command.resolve_command(command.make_context("retain", words), words)
    if hasattr(command, "commands"):
        name = rest[0] if rest[0] in command.commands else "run"
        command, rest = command.commands[name], rest[rest[0] == name :]
    command.make_context(words[0], list(rest))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for the models that the pages name."""
    root = tmp_path_factory.mktemp("models")
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}  # as 4 bits want it
    decoder = save_tiny(root / "decoder", max_position_embeddings=1024, **size)
    encoder = save_tiny(root / "encoder", kind="bert")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(decoder)
    return {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(decoder), "smollm2-135m": str(decoder),
        "minilm-22m": str(encoder), "path/of/the/base": str(encoder),
    }  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of."""
    sums = [{"prompt": f"{i} + {i}? ", "completion": str(2 * i)} for i in range(20)]
    texts = [{"text": f"The {i}th house is red, and the next one is green."} for i in range(40)]
    skills = [{"skill": s, "prompt": f"{s}?", "answer": 1} for s in ("facts", "formats")]
    labelled = [row | {"label": i % 2} for i, row in enumerate(texts[:12])]
    files = {
        **dict.fromkeys(("rows", "may", "june", "july"), sums), "skills": skills,
        **dict.fromkeys(("heldout", "texts", "general", "source"), texts), "reviews": labelled,
    }  # fmt: skip
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("Where is it?\nWho are you?\n", encoding="utf-8")
    for task in ("glue/cola", "glue/rte"):
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            line = json.dumps(HUB[task][0]) + "\n"
            (folder / f"{split}.jsonl").write_text(4 * line, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name, few in (("rows", 8), ("max_length", 24)):  # what the models write takes the time
        monkeypatch.setitem(retain.fit_curvature.__wrapped__.__kwdefaults__, name, few)
    monkeypatch.setattr("retain.training.probes.PROBE_TOKENS", 16)
    monkeypatch.setattr("retain.training.probes.PROBE_ROWS", 2)
    return tmp_path


def namespace(folder: str) -> dict[str, Any]:
    """The names that a page takes for granted: a model with LoRA, its rows and its trainer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = retain.attach_lora(AutoModelForCausalLM.from_pretrained(folder), rank=2)
    text = [{"text": f"{i} and {i} are {2 * i}"} for i in range(8)]
    rows = encode(text, tokenizer, max_length=32, causal=True)

    def collate(items: list[Any]) -> Any:
        found = tokenizer.pad(items, return_tensors="pt")
        return {
            **found,
            "labels": found["input_ids"].masked_fill(found["attention_mask"] == 0, -100),
        }

    data = [dict(tokenizer(row["text"])) for row in text]
    arguments = TrainingArguments(
        output_dir="runs/given", max_steps=2, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate,
        processing_class=tokenizer,
    )  # fmt: skip
    return {
        "retain": retain, "RetentionCallback": retain.RetentionCallback,
        "fit_curvature": retain.fit_curvature, "grow_lora": retain.grow_lora,
        "model": model, "tokenizer": tokenizer, "rows": rows, "trainer": trainer,
        "loader": DataLoader(data, batch_size=4, collate_fn=collate),  # type: ignore[arg-type]
        "optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        "curvature": retain.fit_curvature(model, rows, progress=False),
    }  # fmt: skip


@pytest.mark.parametrize("page", pages())
def test_the_blocks_of_a_page_run(page: str, models: dict[str, str], place: Path) -> None:
    names: dict[str, Any] | None = None
    if page in GIVEN:
        tuned = retain.attach_lora(retain.load_model(models["smollm2-135m"]).model, rank=2)
        move(tuned, seed=0)
        tuned.save_pretrained(GIVEN[page])
    for block in blocks(page):
        text = block.text
        for name, folder in models.items():
            text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w-])", folder, text)
        for long, short in FEWER.items():
            text = re.sub(long, short, text)
        if block.file:
            (place / block.file).write_text(text, encoding="utf-8")
        missing = block.mark == "needs" and importlib.util.find_spec(str(block.why)) is None
        skipped = missing or block.mark == "not run"
        if block.language == "python":
            code = compile(text, page, "exec")
            if not skipped and page not in REAL:
                names = names or namespace(models["smollm2-135m"])
                exec(code, names)
        elif block.language == "bash":
            for words in commands(text):
                _run(words, skipped)
        elif block.language == "yaml":
            _check_yaml(text, place)
        elif block.language == "json":
            assert [json.loads(line) for line in text.splitlines()]
        else:
            assert block.language in ("", "text", "mermaid"), block.language


def _run(words: list[str], skipped: bool) -> None:
    if words[0] != "retain":
        assert skipped, f"only retain's own commands can be run: {words}"
        if "-m" in words and words[words.index("-m") + 1] == "retain":
            parsed(words[words.index("-m") + 2 :])
        return
    parsed(words[1:])
    if skipped:
        return
    _, command, *rest = words
    quick = shlex.split(SHORT.get(command, ""))
    if command == "fit" and "--adapter" in rest:
        quick = quick[:-2]
    if command == "train" and "--continue-from" not in rest:
        quick += ["--rank", "2"]
    if "--prompts" in rest:
        quick += ["--prompts", "prompts.txt"]
    code = main([command, *rest, *quick, *([] if command == "plan" else ["--quiet"])])
    assert code == 0 or (command, code) == ("certify", 1), words  # a tiny model knows no facts


def _check_yaml(text: str, place: Path) -> None:
    found = yaml.safe_load(text)
    assert isinstance(found, dict)
    if "orders" in found:
        assert expand(parse_study(found), place).runs


def test_what_is_not_run_is_known() -> None:
    found = Counter({page: sum(b.mark == "not run" for b in blocks(page)) for page in pages()})
    assert +found == +NOT_RUN


def test_every_study_of_the_repository_is_one() -> None:
    for path in sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")):
        assert expand(read_study(path), path.parent).runs, path
