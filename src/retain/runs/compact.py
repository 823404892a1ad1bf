"""``retain compact``: an adapter at a smaller rank, and what that loses."""

from __future__ import annotations

import operator
import time
from contextlib import nullcontext
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import Field

from retain.config import Measured, validate
from retain.files import file_digest, locked
from retain.records import finite
from retain.runs.bases import Base, base_of
from retain.runs.folders import check_made, recorded
from retain.runs.messages import Messages, interruption
from retain.runs.months import Previous, previous_run
from retain.runs.tuned import check_finite, load_tuned, place_for, source_rows, text_rows

__all__ = ["SCHEMA", "CompactConfig", "compact", "compact_run"]

SCHEMA = "retain.compact/1"


class CompactConfig(Measured):
    """Settings of ``retain compact``."""

    adapter: Path = Field(
        description="Folder of a PEFT adapter; or of a run of retain train, whose state/ then says "
        "what to keep (of a language model)"
    )
    rank: int = Field(16, ge=1, description="Rank to end at")
    out: Path = Field(description="Folder of the results")
    curvature: Path | None = Field(
        None,
        description="Cut what this feels least: a file of retain fit, weight space; the shortest "
        "cut without one",
    )
    model: Base = None
    measure: bool = Field(
        False, description="Measure the KL to the base before and after, and of the cut itself"
    )
    source: str | None = Field(
        None, description="Text for --measure; by default the base model writes it"
    )
    rows: int = Field(16, ge=1, description="Measure on at most so many texts")


def compact(
    adapter: str | Path,
    out: str | Path,
    rank: int = 16,
    *,
    progress: bool = True,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Writes an adapter at a smaller rank, and says what that loses: ``retain compact``.

    No base model is loaded, unless a curvature or ``measure=True`` asks for it. What is written has
    one rank and one alpha for all layers, without ``rank_pattern``, ``alpha_pattern`` and rsLoRA.

    Args:
        adapter: folder of a PEFT LoRA adapter, or of a run of `retain.train_run` with its state.
        out: folder of the results: ``adapter/`` and ``compact.json``.
        rank: to end at. A layer that is no wider keeps its update.
        progress: show bars.
        quiet: print nothing.
        **settings: the options of ``retain compact`` with underscores, such as ``curvature``.

    Returns:
        The record, which is in ``compact.json``. ``lost`` has shares of ``|dW|^2``, ``nats`` are
        predicted and ``kl`` measured, both per token.

    Raises:
        ModelError: no adapter there, a damaged one, or one that is more than plain LoRA.
        MismatchError: a curvature of another model, or that has no two sides to cut by.
        RetainError: files that cannot be read or written.
    """
    messages = Messages(quiet=quiet, progress=progress)
    given = {"adapter": adapter, "out": out, "rank": rank, **settings}
    with messages.listening():
        return compact_run(validate(given, CompactConfig), messages)


def compact_run(config: CompactConfig, messages: Messages) -> dict[str, Any]:
    """`compact` with checked settings, and messages of the caller's.

    Raises:
        RetainError: see `compact`.
        Interrupted: Ctrl-C.
    """
    c = config
    folder, run = _adapter(c.adapter.expanduser())
    out = place_for(c, folder)
    if run is not None and run.labels is not None:  # its base has another head each time
        if c.curvature is None:
            messages.note("a classifier's state is not used: each layer's shortest part is cut")
        run = None
    messages.libraries()
    from retain.curvature.merge import square
    from retain.models.cards import extend_card, or_warned, section
    from retain.models.saved import adapter_digest
    from retain.models.stored import StoredLora
    from retain.provenance import provenance
    from retain.retention.soften.truncate import difference, truncated

    with locked(out), interruption("nothing was written"):
        check_made(out, "compact", "a cut")
        start, text = time.perf_counter(), source_rows(c, c.source)
        stored = StoredLora.read(folder)
        if stored.rank <= c.rank:
            messages.say(f"no layer is wider than {c.rank}: each update is written as it is")
        kept = sorted({name.rsplit(".", 1)[0] for name in stored.others})
        if kept:
            messages.note(f"written as they are, and refused by vLLM: {', '.join(kept)}")
        base = _Base(c, folder, run, messages) if c.curvature or run or c.measure else None
        factors, felt = truncated(stored.layers, None if base is None else base.around, c.rank)
        for layer in stored.layers:
            b, a = factors[layer.name]
            factors[layer.name] = b.to(layer.kinds[0]), a.to(layer.kinds[1])
        ranks = {"before": stored.rank, "after": max(len(a) for _, a in factors.values())}
        update = {n.name: (n.b.double(), n.a.double()) for n in stored.layers}
        cut = {name: square(*difference(pair, factors[name])) for name, pair in update.items()}
        whole = {name: square(*pair) for name, pair in update.items()}
        lost = {name: cut[name] / whole[name] if whole[name] else 0.0 for name in cut}
        worst = max(lost, key=lambda name: lost[name])
        messages.note_width(ranks["after"], out / "adapter")
        told = {} if base is None else base.compare(factors, stored.layers[0].scaling, text)
        given = [*run.sources.values(), run.past] if run else []
        given = [c.curvature] if c.curvature else given
        record: dict[str, Any] = finite({
            "schema": SCHEMA, **provenance(c.seed), "start": str(c.adapter), "rank": ranks,
            "curvature": [str(path) for path in given],
            "source": (c.source or "self") if c.measure else None,
            "model": {"name": stored.config.get("base_model_name_or_path"), "fingerprint": None},
            "lost": {
                "share": sum(cut.values()) / (sum(whole.values()) or 1.0),
                "worst": {"layer": worst, "share": lost[worst]},
                "felt": felt if given else None, "layers": lost,
            },
            "nats": None, "kl": None, **told, "seconds": time.perf_counter() - start,
            "digests": {
                "start": adapter_digest(folder),
                "curvature": [file_digest(path.expanduser()) for path in given],
            },
            "notes": messages.notes,
        })  # fmt: skip
        with recorded(out / "compact.json", record):
            stored.write(out / "adapter", factors)
            card = section({
                "Rank": f"{ranks['after']}, of {ranks['before']} before",
                "Lost": f"{record['lost']['share']:.2%} of the update's square",
            }, "How it was narrowed")  # fmt: skip
            name = str(stored.config.get("base_model_name_or_path") or "")
            with or_warned():
                extend_card(  # a certificate is of the adapter that was cut
                    out / "adapter", name, card, name="retain compact", without="retain certify"
                )
    return record


def _adapter(folder: Path) -> tuple[Path, Previous | None]:
    """The folder of the adapter; and the run that it is of, if that was given and kept its state.

    Raises:
        RetainError: a state that has changed.
    """
    inner = folder / "adapter"
    if (folder / "adapter_config.json").exists() or not inner.is_dir():
        return folder, None
    if not (folder / "state").is_dir():
        return inner, None
    return inner, previous_run(folder)


class _Base:
    """The base model with the adapter, the curvatures, and what is measured before the cut."""

    def __init__(
        self, config: CompactConfig, folder: Path, run: Previous | None, messages: Messages
    ) -> None:
        from retain.curvature.curvature import load_curvature, reanchored

        self.config, self.messages = config, messages
        self.name = base_of(folder, config.model)
        messages.say(f"loading {self.name}")
        self.tuned, self.tokenizer, _ = load_tuned(self.name, folder, config, messages)
        self.sources: list[Any] = []
        past: list[Any] = []
        if config.curvature is not None:
            self.sources = [load_curvature(config.curvature)]
        elif run is not None:  # as the next month would cut it
            sources, before = run.curvatures()
            self.sources, past = list(sources.values()), [before]
        felt = [reanchored(one, self.tuned) for one in (*self.sources, *past)]
        # what is to be kept, around the adapter itself
        self.around: Any = reduce(operator.add, felt) if felt else None
        self.before = self._nats()

    def _nats(self) -> float | None:
        """Predicted from the base, of several sources their mean; None without any."""
        found = [source.quadratic(self.tuned) for source in self.sources]
        return sum(found) / len(found) if found else None

    def compare(self, factors: Any, scaling: float, text: Any) -> dict[str, Any]:
        """Puts the cut adapter, (B, A) by layer, into the model, in place, and measures it.

        Without a text on what the base writes.
        """
        import torch

        from retain.models.fingerprint import fingerprint
        from retain.models.sites import lora_sites
        from retain.retention.measure import Reference

        c, references = self.config, {}
        if c.measure:
            rows = text_rows(self.tuned, self.tokenizer, text, c, self.messages)
            options: dict[str, Any] = {
                "batch_size": c.batch_size,
                "progress": self.messages.progress,
            }
            references["after"] = Reference(self.tuned, rows, **options)
            own = references["after"].measure(self.tuned)
            references["cut"] = Reference(self.tuned, rows, base=nullcontext, **options)
        with torch.no_grad():
            for site in lora_sites(self.tuned):
                b, a = factors[site.name]
                for weight in (site.a, site.b):
                    weight.zero_()
                site.a[: len(a)] = a.to(site.a)
                site.b[:, : len(a)] = (b * (scaling / site.scaling)).to(site.b)
        found: dict[str, Any] = {
            "model": {"name": self.name, "dtype": c.dtype, "fingerprint": fingerprint(self.tuned)},
        }
        if self.sources:
            cut = self.around.quadratic(self.tuned)
            found["nats"] = {"before": self.before, "after": self._nats(), "cut": cut}
        if references:
            measured = {name: one.measure(self.tuned) for name, one in references.items()}
            for one in (own, *measured.values()):
                check_finite(one.kl)
            found["kl"] = {"before": own.to_dict()} | {k: v.to_dict() for k, v in measured.items()}
        return found
