"""What the cells of a group are called, and which of them share a colour."""

from __future__ import annotations

from retain.report.cells import Cell, Group

__all__ = ["names", "series", "slug"]


def _main(group: Group) -> str:
    """The adapter that needs no word."""
    return group.plain.adapter if group.plain else group.cells[0].adapter


def _name(cell: Cell, group: Group) -> str:
    if cell.plain:
        return "plain LoRA"
    main = _main(group)
    if not cell.held:
        if cell.label != "none":  # of its own settings, such as a rate
            same_kind = group.plain is not None and cell.adapter == main
            return f"{'plain LoRA' if same_kind else cell.adapter}, {cell.label}"
        alone = not any(other.held for other in group.cells)
        return cell.adapter if alone else f"{cell.adapter} (no method)"
    same = [o for o in group.cells if (o.adapter, o.label) == (cell.adapter, cell.label)]
    text = cell.label
    if len(same) > 1 and cell.strength is not None:
        text += f" {cell.strength:g}".replace("e+0", "e").replace("e-0", "e-")
    return text if cell.adapter in (main, cell.method) else f"{text} on {cell.adapter}"


def names(group: Group) -> list[str]:
    """The name of each cell, in order."""
    return [_name(cell, group) for cell in group.cells]


def series(group: Group) -> list[str]:
    """For each cell the name that it shares with the other strengths of its method."""
    own = names(group)
    shared: dict[tuple[str, str], list[int]] = {}
    for i, cell in enumerate(group.cells):
        shared.setdefault((cell.adapter, cell.method), []).append(i)
    main = _main(group)
    out = list(own)
    for (adapter, method), places in shared.items():
        if len(places) > 1:
            labels = {group.cells[i].label for i in places}
            text = labels.pop() if len(labels) == 1 else method
            for i in places:
                out[i] = text if adapter in (main, method) else f"{text} on {adapter}"
    return out


def slug(text: str) -> str:
    """The text as a part of a file's name."""
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())
    return "-".join(part for part in kept.split("-") if part)
