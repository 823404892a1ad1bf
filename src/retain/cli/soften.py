"""``retain soften``: trade what a finished adapter learned for what it made the model forget."""

from __future__ import annotations

import time
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from retain.cli.common import (
    DTYPES,
    AsJson,
    Interrupted,
    Quiet,
    Screen,
    Trust,
    base_of,
    check_choices,
    finite,
    load_base,
    quieten,
)
from retain.cli.folders import check_soften
from retain.errors import ConfigError
from retain.files import check_folder, locked

__all__ = ["EXAMPLE", "soften"]

EXAMPLE = (
    "Example: retain soften runs/mine/adapter --curvature curvature.safetensors --budget 0.05 "
    "--out runs/soft"
)


def soften(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="Folder of the finished PEFT adapter."),
    ],
    curvature: Annotated[
        Path,
        typer.Option(help="Of what must not be forgotten: a file of retain fit, weight space."),
    ],
    budget: Annotated[
        float, typer.Option(help="Forgetting to end at, nats per token: measured with --measure.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")],
    target_curvature: Annotated[
        Path | None,
        typer.Option(
            help="Of the task's rows, fitted with --adapter ADAPTER; plain distance without one."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model; the one that the adapter names by default.")
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of the subspaces: deeper is nearer to the optimum, and slower (2 or 1).",
        ),
    ] = None,
    epsilon: Annotated[
        float, typer.Option(help="Damping of the target's curvature, relative to its mean.")
    ] = 1e-3,
    points: Annotated[int, typer.Option(min=2, help="Points of the curve.")] = 12,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="The budget is of measured KL; some points of the curve are measured."
        ),
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(help="Text for --measure; by default the base model writes it."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Measure on at most so many texts.")] = 16,
    max_length: Annotated[int, typer.Option(min=2, help="Cut texts to so many tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of text that the model writes.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"Precision: {', '.join(DTYPES)}.")] = "float32",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Pull a finished adapter back to a budget of forgetting, without training."""
    screen = Screen(as_json, quiet)
    check_choices(("dtype", dtype, DTYPES))
    if source is not None and not measure:
        raise ConfigError(
            "--source is the text to measure on, and nothing is measured",
            got="--source without --measure",
            allowed="both or none",
            fix="add --measure",
        )
    folder = out.expanduser()
    if (folder / "adapter").resolve() == adapter.expanduser().resolve():
        raise ConfigError(
            "the output would take the place of the adapter",
            got=folder,
            allowed="another folder",
            fix="choose another --out",
        )
    folder = check_folder(folder)
    name = base_of(adapter, model)
    quieten(screen.progress)
    options: dict[str, Any] = {
        "budget": budget, "depth": depth, "epsilon": epsilon, "points": points, "seed": seed,
        "dtype": dtype, "trust": trust_remote_code, "measure": measure, "source": source,
        "of": None if model else "the adapter",
        "size": {"rows": rows, "max_length": max_length, "batch_size": batch_size},
    }  # fmt: skip
    with locked(folder):
        check_soften(folder)
        _soften(adapter, curvature, target_curvature, name, folder, screen, options)


def _soften(
    adapter: Path, curvature: Path, target: Path | None, name: str, folder: Path, screen: Screen,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """What the command does in its folder."""
    from retain.cli.softening import Softening
    from retain.curvature.artifact import load_curvature
    from retain.data.draws import HELD_OUT
    from retain.data.sources import read_rows
    from retain.files import file_digest, write_json
    from retain.models.saved import adapter_digest, load_adapter, save_adapter
    from retain.retention.budget import check_budget

    source, seed, dtype = options["source"], options["seed"], options["dtype"]
    check_budget(options["budget"])
    text = None
    if source is not None:
        text = read_rows(
            source, options["size"]["rows"], seed=HELD_OUT + seed,
            max_length=options["size"]["max_length"],
        )  # fmt: skip
    try:
        far = load_curvature(curvature)
        near = None if target is None else load_curvature(target)
        screen.say(f"loading {name}")
        base, tokenizer, _ = load_base(
            name, options["of"], dtype=dtype, trust_remote_code=options["trust"]
        )
        tuned = load_adapter(base, adapter)
        start = time.perf_counter()
        work = Softening(tuned, far, near, depth=options["depth"], epsilon=options["epsilon"])
        if options["measure"]:
            work.measure_on(tokenizer, text, options["size"], seed, screen)
        record = work.record(options["budget"], options["points"])
        record |= {"seconds": time.perf_counter() - start}
        files = {"start": str(adapter), "curvature": str(curvature),
                 "target_curvature": target and str(target),
                 "source": (source or "self") if options["measure"] else None}  # fmt: skip
        result = finite(work.described(record, name, dtype, seed, files))
        result["digests"] = {
            "start": adapter_digest(adapter.expanduser()),
            "curvature": file_digest(curvature.expanduser()),
            "target_curvature": target and file_digest(target.expanduser()),
        }
        result["notes"] = screen.notes
        pictures = work.pictures(result)
        work.apply()
        record_file = folder / "soften.json"
        first = not record_file.exists()
        if first:
            write_json(record_file, result)  # before all else: it tells that the folder is ours
        try:
            written = save_adapter(tuned, folder / "adapter", name)
        except BaseException:
            if first:
                record_file.unlink(missing_ok=True)
            raise
    except KeyboardInterrupt:
        raise Interrupted("nothing was written") from None
    if not first:
        write_json(record_file, result)
    for path in work.write_pictures(pictures, folder):
        screen.say(str(path))
    _tell(screen, result, written)
    screen.emit({"adapter": written, "record": folder / "soften.json", **result})


def _tell(screen: Screen, result: dict[str, Any], written: Path) -> None:
    chosen, before = result["chosen"], result["curve"][0]
    if result["inside"]:
        screen.say("the adapter is inside the budget already: it is written as it is")
    lines = [
        ["predicted forgetting, nats per token", f"{before['nats']:.3g}", f"{chosen['nats']:.3g}"],
        ["learning kept, predicted", "100.0%", f"{chosen['learned']:.1%}"],
        ["the same by plain scaling", "100.0%", f"{chosen['scaled']:.1%}"],
    ]
    if chosen["measured"]:
        for key, name in (("measured", "measured KL"), ("scaled_measured", "by plain scaling")):
            kl = [p[key]["kl"] for p in (before, chosen)]
            lines.append([f"{name}, nats per token", *(f"{value:.3g}" for value in kl)])
    screen.table("softened", ["", "before", "after"], lines)
    screen.say(f"{written}\nnext: retain eval --adapter {quote(str(written))} --probe")
