"""The part of a page about a ``retain eval``: what was learned, what was kept, what is answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from retain.records import (
    AnswersRecord,
    EvalRecord,
    EvalScore,
    Measure,
    RunAdapter,
    RunMethod,
    RunOrder,
    RunRecord,
    RunSpec,
    StudyRecord,
)
from retain.report.axes import Panel, Row, data, tips
from retain.report.cells import short_name
from retain.report.looks import COLOURS, PLAIN
from retain.report.metrics import Metric
from retain.report.tables import Column, Entry, Table
from retain.report.tables import Row as Line

__all__ = ["Asked", "answers_of", "eval_facts", "eval_finding", "eval_panel", "eval_tables",
           "study_of_eval"]  # fmt: skip

_GROUPS = (
    ("learned", "What was learned", ("data.", "task.")),
    ("kept", "What was kept", ("general.", "source.")),
    ("answers", "Answers to prompts, in sum", ("answers.",)),
)
"""Of each table its name, its title, and how the scores in it begin."""

_ABOUT = (
    "Below a value its 95 % interval: of shares Wilson's, of losses a bootstrap's over rows. "
    "Differences are paired, row by row; strong where their interval leaves 0 out"
)
_SKILLS = (("first_word", "Begins as before"), ("task_form", "In the task's form"),
           ("right_before", "Right before"), ("right_after", "Right after"))  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A prompt with what each model said.

    Attributes:
        group: prompts that stand together, and what is said of them.
        prompt: the text.
        wanted: the right answer, if one is known.
        said: of each model its name, its answer, and marks such as "right".
    """

    group: tuple[str, str]
    prompt: str
    wanted: str
    said: list[tuple[str, str, list[str]]]


def study_of_eval(found: EvalRecord) -> StudyRecord:
    """The result as a study without a grid: a run an adapter, for where it comes from."""
    model = str(found.model.get("name", "?"))
    runs = [
        RunRecord(
            key=adapter.name, created=found.created, seed=found.seed, commit=found.commit,
            versions=found.versions, hardware=found.hardware, history=adapter.history,
            config=RunSpec(
                model=model, dtype=found.model.get("dtype"), seed=found.seed,
                adapter=RunAdapter(name="lora", kind="lora"), order=RunOrder(name="", tasks=[""]),
                method=RunMethod(name=adapter.name, label=adapter.name, kind="eval"),
            ),
        )
        for adapter in found.adapters
    ]  # fmt: skip
    title = f"{' and '.join(a.name for a in found.adapters)} on {short_name(model)}"
    return StudyRecord(name=title, runs=runs, evaluated=found)


def eval_facts(found: EvalRecord) -> list[tuple[str, str]]:
    """What was measured on what, as name and value."""
    source, rows, general = found.source, found.data, found.general or {}
    tasks = [f"{n}, first {k}" if k else n for n, k in (general.get("tasks") or {}).items()]
    own = source.get("name") == "self"
    facts = [
        (f"Adapter {a.name}" if len(found.adapters) > 1 else "Adapter",
         f"{a.label}, {a.path}, {a.trainable or 0:,} parameters, digest {(a.digest or '?')[:12]}")
        for a in found.adapters
    ]  # fmt: skip
    if rows is not None:
        cut = rows.counts.get("completions_cut", 0) + rows.counts.get("texts_cut", 0)
        out = sum(n for key, n in rows.counts.items() if key.startswith("left_out"))
        told = f"{rows.name}: {rows.rows} rows, {rows.asked} asked"
        told += f", {cut} cut" if cut else ""
        facts.append(("Rows", told + (f", {out} left out" if out else "")))
    if tasks:
        facts.append(("General tasks", "; ".join(tasks)))
    text = "its own text, written anew" if own else str(source.get("name"))
    facts.append(("Text", f"{text}, {source.get('tokens')} tokens"))
    return [*facts, ("Notes", "; ".join(found.notes))]


# --- numbers


def _metric(score: EvalScore) -> Metric:
    return Metric("", score.label, score.unit, score.better, lambda _: None)


def _ends(measure: Measure) -> tuple[float, float] | None:
    """The interval; one without a width, of rows that were all alike, is none."""
    ends = measure.interval
    return None if ends is None or ends[0] == ends[1] else ends


def _entry(score: EvalScore, measure: Measure | None, *, signed: bool = False) -> Entry:
    """A value with the ends of its interval below it."""
    if measure is None or measure.value is None:
        return Entry()
    m, ends, value = _metric(score), _ends(measure), measure.value
    if not value and not ends:
        return Entry("0", value=0.0)
    widest = max(abs(v) for v in (value, *(ends or ())))
    text, *limits = (m.number(v, widest, signed=signed) for v in (value, *(ends or ())))
    verdict = ""
    if signed and score.better and ends and (ends[0] > 0 or ends[1] < 0):
        verdict = "better" if value * score.better > 0 else "worse"
    low, high = ends or (None, None)
    return Entry(text, value=value, low=low, high=high, verdict=verdict,
                 ends=f"[{limits[0]}, {limits[1]}]" if limits else "")  # fmt: skip


def _between(score: EvalScore, later: int, earlier: int) -> Measure | None:
    return next((m for m in score.between if m.pair == (later, earlier)), None)


def _columns(found: EvalRecord) -> list[tuple[Column, Any]]:
    """The columns of a table of scores: their heads, and what makes a score's entry."""
    names = [adapter.name for adapter in found.adapters]
    one = len(names) == 1
    out: list[tuple[Column, Any]] = [(Column("Base"), lambda s: _entry(s, s.base))]
    for i, name in enumerate(names):
        out.append((Column("Adapter" if one else name), lambda s, i=i: _entry(s, s.tuned[i])))
    for i, name in enumerate(names):
        head = Column("Change" if one else f"{name} less base")
        out.append((head, lambda s, i=i: _entry(
            s, s.changes[i] if i < len(s.changes) else None, signed=True)))  # fmt: skip
    for j in range(len(names)):
        for i in range(j):
            head = Column(f"{names[j]} less {names[i]}")
            out.append((head, lambda s, i=i, j=j: _entry(s, _between(s, j, i), signed=True)))
    return out


def eval_tables(found: EvalRecord) -> list[Table]:
    """Scores by what they tell of, then the answers' measures by skill."""
    columns = _columns(found)
    out = []
    for key, title, starts in _GROUPS:
        scores = [s for name, s in found.scores.items() if name.startswith(starts)]
        rows = [Line(s.label, s.unit, [make(s) for _, make in columns]) for s in scores]
        if rows:
            kept = [i for i in range(len(columns)) if any(r.entries[i].value is not None
                                                          for r in rows)]  # fmt: skip
            head = [Column("Measure"), *(columns[i][0] for i in kept)]
            rows = [Line(r.name, r.note, [r.entries[i] for i in kept]) for r in rows]
            out.append(Table(key, title, _ABOUT, head, rows))
    return out + [
        _skills(adapter.name, adapter.answers, several=len(found.adapters) > 1)
        for adapter in found.adapters
        if adapter.answers is not None and len(adapter.answers.skills) > 1  # else it is the sum
    ]


def _skills(name: str, answers: AnswersRecord, *, several: bool) -> Table:
    """What was measured of the answers, a skill a row."""
    rows = []
    groups = {**answers.skills, "all prompts": answers.overall}
    for skill, group in groups.items():
        n = group.prompts
        ratio = EvalScore(label="", unit="nats per token", base=Measure(), tuned=[])
        share = EvalScore(label="", unit="%", base=Measure(), tuned=[])
        entries = [Entry(str(n), value=float(n)), _entry(ratio, group.log_ratio)]
        entries += [_entry(share, getattr(group, key)) for key, _ in _SKILLS]
        rows.append(Line(skill, "", entries, plain=skill == "all prompts"))
    head = [Column("Skill"), Column("Prompts"), Column("Log-ratio", "nats per token"),
            *(Column(title, "%") for _, title in _SKILLS)]  # fmt: skip
    about = (
        "Log-ratio: how much likelier the adapter's own answers are to it than to the base. Below "
        "a value its 95 % bootstrap interval over prompts"
    )
    title = f"Answers by skill, {name}" if several else "Answers by skill"
    return Table("skills", title, about, head, rows)


def _said(score: EvalScore, measure: Measure | None, *, signed: bool = False) -> str:
    entry = _entry(score, measure, signed=signed)
    return " ".join(filter(None, (entry.text, entry.ends)))


def eval_finding(found: EvalRecord) -> str:
    """What was learned and forgotten, a line an adapter, from the numbers and no kinder."""
    several = len(found.adapters) > 1
    return "\n".join(
        f"{adapter.name if several else 'With the adapter on'}: {'; '.join(_told(found, i))}."
        for i, adapter in enumerate(found.adapters)
    )


def _told(found: EvalRecord, i: int) -> list[str]:
    """What there is to tell of an adapter."""
    told = []
    for key in ("data.loss", "data.right", "task.word-problems"):
        if (score := found.scores.get(key)) is not None:
            told.append(f"{score.label} {_pair(score, i)} ({_doubt(score, i)})")
    if (moved := found.scores.get("source.kl")) is not None:
        told.append(f"moved {_said(moved, moved.tuned[i])} nats per token from the base")
    general = [s for key, s in found.scores.items() if key.startswith("general.") and s.changes]
    for names, how in (
        ([s.label for s in general if _sided(s, i) * s.better < 0], "lower"),
        ([s.label for s in general if _sided(s, i) * s.better > 0], "higher"),
        ([s.label for s in general if not _sided(s, i)], "not shown to have changed"),
    ):
        if names:
            told.append(f"{', '.join(names)} {how}")
    if (score := found.scores.get("answers.right")) is not None:
        told.append(f"{score.label} {_pair(score, i)}")
    return told


def _pair(score: EvalScore, i: int) -> str:
    values = [_entry(score, m).text for m in (score.tuned[i], score.base)]
    unit = "\N{NO-BREAK SPACE}%" if score.unit == "%" else f" {score.unit}"
    return f"{values[0]}{unit.rstrip()} against {values[1]}"


def _sided(score: EvalScore, i: int) -> int:
    """-1 or 1 where the interval of the change lies on that side of 0, else 0."""
    ends = _ends(score.changes[i]) if i < len(score.changes) else None
    return 0 if ends is None else (ends[0] > 0) - (ends[1] < 0)


def _doubt(score: EvalScore, i: int) -> str:
    """The change with its interval, if there is one, and whether that is more than chance."""
    change = score.changes[i] if i < len(score.changes) else None
    if change is None or change.value is None:
        return "no interval"
    lead = "" if _sided(score, i) else ", which may be chance"
    return f"{_said(score, change, signed=True)}{lead}"


def eval_panel(found: EvalRecord) -> Panel | None:
    """All shares before and after, with their intervals; None where none was measured."""
    starts = ("data.", "task.", "general.", "answers.right")
    shares = [s for key, s in found.scores.items() if s.unit == "%" and key.startswith(starts)]
    names = ["base", *(adapter.name for adapter in found.adapters)]
    rows: list[Row] = []
    for score in shares:
        for name, m in zip(names, (score.base, *score.tuned), strict=True):
            if m.value is not None:
                low, high = m.interval or (m.value, m.value)
                rows.append({"score": score.label, "name": name, "x": 100 * m.value,
                             "x_low": 100 * low, "x_high": 100 * high, "n": m.n,
                             "said": f"{_said(score, m)} %"})  # fmt: skip
    if not rows:
        return None
    colours = ["var(--base)", PLAIN, *COLOURS][: len(names)]
    labels = [score.label for score in shares]
    color = alt.Color("name:N", title=None, scale=alt.Scale(domain=names, range=colours))
    band, gap = 16 * len(names), 26  # of the marks, and above them of the name
    place = alt.Scale(paddingInner=gap / (band + gap), paddingOuter=gap / (band + gap) / 2)
    inside = alt.Axis(
        domain=False, ticks=False, minExtent=0, labelAlign="left", labelLimit=300, labelPadding=-2,
        labelOffset=-band / 2 - 6,
    )  # fmt: skip
    y = alt.Y("score:N", title=None, sort=labels, axis=inside, scale=place)
    offset = alt.YOffset("name:N", sort=names)
    x = alt.X("x:Q", title="%", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5))
    marks = data(rows).encode(y=y, yOffset=offset, color=color)
    rule = marks.mark_rule(strokeWidth=2, opacity=0.55).encode(x=alt.X("x_low:Q"), x2="x_high:Q")
    dots = marks.mark_point(filled=True, size=70, opacity=1).encode(
        x=x, tooltip=tips(score="measure", name="model", said="value", n="items")
    )
    chart = alt.layer(rule, dots).properties(height=(band + gap) * len(labels))
    caption = "Dots: the share of items that are right; lines: its 95 % interval (Wilson)."
    return Panel("scores", "", "Before and after", caption, chart, rows, wide=True)


# --- answers


def answers_of(found: EvalRecord) -> list[tuple[str, list[Asked]]]:
    """The prompts, then the held-out rows, each with a title; those of a group stand together."""
    out = [("prompts", _prompts(found)), ("rows", _rows(found))]
    return [(what, asked) for what, asked in out if asked]


def _prompts(found: EvalRecord) -> list[Asked]:
    known = [(a.name, a.answers) for a in found.adapters if a.answers is not None]
    if not known:
        return []
    first, out = known[0][1], []
    one = len(known) == 1
    for i, row in enumerate(first.rows):
        said = [("base", str(row["base"]), _marks(row, "right_before", "_base"))]
        for name, answers in known:
            mine = answers.rows[i]
            marks = _marks(mine, "right_after", "")
            said.append(("adapter" if one else name, str(mine["tuned"]), marks))
        skill = str(row["skill"])
        several = len(first.skills) > 1
        note = "; ".join(_group_note(name, answers, skill, one) for name, answers in known)
        out.append(Asked((skill if several else "", note), str(row["prompt"]), "", said))
    order = list(dict.fromkeys(a.group[0] for a in out))
    return sorted(out, key=lambda a: order.index(a.group[0]))


def _group_note(name: str, answers: AnswersRecord, skill: str, one: bool) -> str:
    group = answers.skills.get(skill, answers.overall)
    parts = [f"{group.prompts} prompts"] if one else []
    if group.first_word.value is not None:
        parts.append(f"{group.first_word.value:.0%} begin as before")
    if group.right_before.value is not None and group.right_after.value is not None:
        parts.append(f"right {group.right_before.value:.0%} → {group.right_after.value:.0%}")
    return ("" if one else f"{name}: ") + ", ".join(parts)


def _marks(row: dict[str, Any], right: str, end: str) -> list[str]:
    marks = [] if row.get(right) is None else ["right" if row[right] else "wrong"]
    marks += ["task's form"] if row.get(f"task_form{end}") else []
    return marks + (["repeats"] if row.get(f"repeats{end}") else [])


def _rows(found: EvalRecord) -> list[Asked]:
    """Held-out rows that were asked, those on which the models differ first."""
    if found.data is None:
        return []
    one = len(found.adapters) == 1
    names = ["base", *(["adapter"] if one else [a.name for a in found.adapters])]
    out: list[tuple[tuple[bool, ...], Asked]] = []
    for item in found.data.items:
        if item.prompt is None:
            continue
        every = (item.base, *item.tuned)
        flags = tuple(bool(answer.right) for answer in every)
        said = [(name, a.said or "", [_word(a.right), f"{a.nats / item.tokens:.2f} nats a token"])
                for name, a in zip(names, every, strict=True)]  # fmt: skip
        title = ", ".join(f"{n} {_word(f)}" for n, f in zip(names, flags, strict=True))
        if len(set(flags)) == 1:
            title = f"all {_word(flags[0])}"
        out.append((flags, Asked((title, ""), item.prompt, item.answer, said)))
    out.sort(key=lambda pair: (len(set(pair[0])) == 1, pair[0]))
    counts = Counter(asked.group[0] for _, asked in out)
    return [Asked((a.group[0], f"{counts[a.group[0]]} of {len(out)} rows"), a.prompt, a.wanted,
                  a.said) for _, a in out]  # fmt: skip


def _word(right: bool | None) -> str:
    return "right" if right else "wrong"


def blocks(asked: Sequence[Asked]) -> list[tuple[tuple[str, str], list[Asked]]]:
    """Prompts by their groups, in order."""
    out: dict[tuple[str, str], list[Asked]] = {}
    for one in asked:
        out.setdefault(one.group, []).append(one)
    return list(out.items())
