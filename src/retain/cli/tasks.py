"""``retain tasks``: the tasks there are, and their prompts as a model reads them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from retain.cli.options import Screen, command, quieten
from retain.config import Options
from retain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from retain.data.specs import Item, TaskSpec

__all__ = ["EXAMPLE", "tasks"]

EXAMPLE = "Example: retain tasks glue/sst2 --data-dir data --limit 3"

_SHOWN = 3
_BREAK = "\n"


class TasksConfig(Options):
    """Settings of ``retain tasks``."""

    name: str | None = Field(
        None, description="A task's name, or a YAML file; left out, all are listed"
    )
    data_dir: Path | None = Field(
        None, description="Folder of local copies, such as DIR/glue/sst2/train.jsonl.gz"
    )
    limit: int | None = Field(
        None, ge=1,
        description=f"Show so many rows ({_SHOWN} with --data-dir; without it they are read from "
        "the hub)",
    )  # fmt: skip
    split: Literal["train", "eval"] = Field("eval", description="train or eval")
    model: str | None = Field(
        None,
        description="Count tokens with this model's tokenizer, and cut prompts as it would",
    )
    seed: int = Field(0, ge=0, description="Which rows are shown")
    template: bool = Field(False, description="Print a commented task file to start from")


@command(TasksConfig, "name")
def tasks(config: TasksConfig, screen: Screen) -> None:
    """List the tasks, or show one of them with prompts as a model reads them."""
    if config.template:
        from retain.data.specs import template_text

        screen.say(template_text().rstrip())
        screen.emit({"template": template_text()})
    elif config.name is not None:
        _show(config.name, config, screen)
    elif config.data_dir is not None or config.limit is not None or config.model is not None:
        raise ConfigError(
            "rows are shown of one task",
            got="no task",
            allowed="retain tasks NAME, with these options",
            fix="name a task; retain tasks lists them",
        )
    else:
        _list(screen)


def _list(screen: Screen) -> None:
    from retain.data.specs import list_tasks, load_orders, load_task

    specs = [load_task(name) for name in list_tasks()]
    screen.table(
        f"{len(specs)} tasks",
        ["task", "kind", "classes", "metric", "on the hub"],
        [[s.name, s.kind, str(s.classes or "-"), s.metric, s.hub.path] for s in specs],
    )
    orders = load_orders()
    screen.say(
        f"Orders of the continual benchmark: {', '.join(orders)}.\n"
        "A task of your own: retain tasks --template > mine.yaml"
    )
    screen.emit(
        {
            "tasks": [s.model_dump(mode="json") | {"classes": s.classes} for s in specs],
            "orders": {order: list(names) for order, names in orders.items()},
        }
    )


def _show(name: str, config: TasksConfig, screen: Screen) -> None:
    from retain.data.specs import load_task

    spec, split = load_task(name), config.split
    rows: list[dict[str, Any]] = []
    tokenizer = None if config.model is None else _tokenizer(config.model)
    wanted = config.data_dir is not None or config.limit is not None
    if wanted:
        quieten(False)
        from retain.data.loading import load_items

        items = load_items(
            spec, split, data_dir=config.data_dir, limit=config.limit or _SHOWN, seed=config.seed,
            tokenizer=tokenizer,
        )  # fmt: skip
        rows = [_row(item, tokenizer) for item in items]
    screen.say("\n".join([f"{spec.name}, version {spec.version}", *_facts(spec)]))
    for number, row in enumerate(rows, start=1):
        size = ""
        if "prompt_tokens" in row:
            size = f", {row['prompt_tokens']} tokens + {max(row['option_tokens'])}"
        screen.say(f"\n{split} row {row['row'] + 1} ({number} of {len(rows)}){size}")
        screen.say(_indented(row["prompt"]))
        screen.say(_answers(row))
    if not wanted:
        screen.say("To see rows: --data-dir DIR for local copies, or --limit N from the hub.")
    facts = spec.model_dump(mode="json") | {"classes": spec.classes}
    screen.emit({"task": facts, "split": split, "rows": rows, "notes": screen.notes})


def _facts(spec: TaskSpec) -> list[str]:
    where = " ".join(filter(None, (spec.hub.path, spec.hub.name)))
    splits = f"{spec.hub.splits.train}, {spec.hub.splits.eval}"
    facts = {
        "what": spec.description,
        "cite": spec.citation,
        "kind": spec.kind,
        "options": ", ".join(spec.labels) or ("the row's own" if spec.kind == "choice" else ""),
        "metric": ", ".join((spec.metric, *spec.metrics)),
        "on the hub": f"{where} ({splits})" if where else "",
        "local": f"{spec.local} ({spec.files.train}, {spec.files.eval})" if spec.local else "",
        "longest": f"{spec.max_length} tokens, else cut: {spec.truncate}",
        "prompt": spec.prompt,
        "for an encoder": " | ".join(spec.texts) or "no",
    }
    indent = "\n" + " " * 18
    return [f"  {key:14}  {value.replace(_BREAK, indent)}" for key, value in facts.items() if value]


def _row(item: Item, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    row = asdict(item) | {"completion": item.completion}
    if tokenizer is not None:
        from retain.data.tokens import tokenize

        row["prompt_tokens"] = len(tokenize(tokenizer, item.prompt))
        row["option_tokens"] = [
            len(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in item.options or (item.completion,)
        ]
    return row


def _answers(row: dict[str, Any]) -> str:
    if not row["options"]:
        return _indented(row["completion"], "  > ")
    return "\n".join(
        _indented(option, "  > " if i == row["answer"] else "    ")
        for i, option in enumerate(row["options"])
    )


def _indented(text: str, first: str = "  | ") -> str:
    return first + text.replace("\n", "\n" + (first if first == "  | " else "    "))


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    quieten(False)
    from transformers import AutoTokenizer

    from retain.models.builtin import locate, offline, unknown_model

    where, _ = locate(model)
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=offline())
    except (OSError, ValueError) as error:
        raise unknown_model(model, error) from error
