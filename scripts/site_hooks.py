"""What the site of mkdocs.yml needs beside its pages: links, and pages that are made from files.

The pages link to files of the repository as GitHub reads them (``../src/retain/config.py``). Those
lie outside of the site: they become addresses of ``repo_url`` where mkdocs.yml has one, and else
the file's path.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "five-minutes.ipynb"

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)#\s]+|[^):#\s]+\.ipynb)(#[^)\s]*)?\)")

_DIAGRAM = re.compile(r"^```mermaid\n.*?^```\n", re.MULTILINE | re.DOTALL)
"""GitHub draws it; a site would need a script of 3 MB, so it shows a picture made of it once."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the notebook and the table of options as pages."""
    made = {
        "five-minutes.md": notebook_page(ROOT / "docs" / NOTEBOOK),
        "options.md": options_page(),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into what a reader of the site can use."""
    here = posixpath.dirname(page.file.src_uri)

    def shown(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join("docs", here, target))
        if path == f"docs/{NOTEBOOK}":
            return f"[{text}]({target.removesuffix('.ipynb')}.md)"
        if path.startswith("docs/"):
            return found[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which is not there")
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return f"`{path}`" if path.endswith(text.strip("`")) else f"{text} (`{path}`)"

    stem = posixpath.basename(page.file.src_uri).removesuffix(".md")
    return _LINK.sub(shown, _DIAGRAM.sub(f"![What leads to what](images/{stem}.svg)\n", markdown))


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and the text that its cells have printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        printed = "".join(_printed(output) for output in cell["outputs"]).rstrip()
        if printed:
            parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"


def _printed(output: dict[str, Any]) -> str:
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return "".join(text)


def options_page() -> str:
    """Every command with its arguments and options, as ``--help`` has them."""
    from typer.main import get_command

    from retain.cli.app import app

    lines = [
        "# Every option",
        "What `--help` says, of each command. What they do, with examples: "
        "[the command line](command-line.md).",
    ]
    for name, command in _commands(get_command(app), "retain"):
        lines += [f"## {name}", (command.help or "").split("\n\n")[0].replace("\n", " ")]
        rows = ["| | |", "|---|---|"]
        for option in command.params:
            if option.name == "help":
                continue
            names = option.opts if option.opts[0].startswith("-") else [str(option.metavar)]
            silent = option.default in (None, [], -1) or option.default is False
            default = "" if silent else f" By default `{option.default}`."
            default = " **Required.**" if option.required else default
            flags = ", ".join(f"`{flag}`" for flag in names)
            rows.append(f"| {flags} | {(option.help or '').replace('|', '/')}{default} |")
        lines.append("\n".join(rows))
    return "\n\n".join(lines) + "\n"


def _commands(group: Any, name: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for label, command in group.commands.items():
        full = f"{name} {label}"
        found += _commands(command, full) if hasattr(command, "commands") else [(full, command)]
    return found
