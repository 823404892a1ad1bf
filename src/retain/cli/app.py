"""The ``retain`` command: its subcommands, and the boundary where errors become one line."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from retain import __version__
from retain.cli import (
    certify,
    compact,
    demo,
    explain,
    fit,
    plan,
    report,
    soften,
    study,
    tasks,
    train,
)
from retain.cli import eval as evaluation
from retain.cli.options import has_all
from retain.compat import usage_error
from retain.errors import (
    ConfigError,
    OutputError,
    RetainError,
    RetainWarning,
    SourceError,
    TrainingError,
    memory_full,
    unknown,
    with_point,
)
from retain.extras import command_of, missing
from retain.files import why_unwritable
from retain.runs.messages import Interrupted

__all__ = ["main"]

_HELP = """Fine-tune language models with LoRA without forgetting what they knew.

[bold]fit[/bold] measures what a model relies on, [bold]train[/bold] learns a task while it holds
that still, [bold]eval[/bold] says what was forgotten. [bold]demo[/bold] shows all three."""


_NOTHING = "nothing half-written was left behind"


class _Stopped(Exception):
    """Ctrl-C, on its way through typer."""


class _Group(TyperGroup):
    """Says which command was meant."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise unknown("command", args[0], self.commands)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would drop what it says
            raise _Stopped(
                error if isinstance(error, Interrupted) else Interrupted(_NOTHING)
            ) from None
        except EOFError as error:  # which typer would take for a Ctrl-C
            raise SourceError(
                "a file ends too early",
                got=str(error) or type(error).__name__,
                allowed="whole files",
                fix="copy the file again, or make it again",
            ) from error


app = typer.Typer(
    cls=_Group,
    help=_HELP,
    epilog="Example: retain demo --quick",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"retain {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


app.command("fit", epilog=fit.EXAMPLE)(fit.fit)
app.command("train", epilog=train.EXAMPLE)(train.train)
app.command("eval", epilog=evaluation.EXAMPLE)(evaluation.evaluate)
app.command("certify", epilog=certify.EXAMPLE)(certify.certify)
app.command("explain", epilog=explain.EXAMPLE)(explain.explain)
app.command("soften", epilog=soften.EXAMPLE)(soften.soften)
app.command("compact", epilog=compact.EXAMPLE)(compact.compact)
app.command("plan", epilog=plan.EXAMPLE)(plan.plan)
app.command("tasks", epilog=tasks.EXAMPLE)(tasks.tasks)
app.add_typer(study.app, name="study", epilog=study.EXAMPLE)
app.command("report", epilog=report.EXAMPLE)(report.report)
app.command("demo", epilog=demo.EXAMPLE)(demo.demo)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line of `argv`, else of the process, and returns the exit code.

    0: done. 2: one line on stderr says what was wrong. 130: stopped by Ctrl-C, and the line says
    what stays usable. 1: ``retain certify`` found too much lost; or runs of ``retain study``
    failed; or nobody reads the output any more; or a bug, which keeps its traceback.
    """
    # bitsandbytes, where it is installed, says at its import which kernels of a hub it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    _print_anything()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, module=r"retain(\.|$)")
            warnings.filterwarnings("always", category=RetainWarning)
            code = get_command(app).main(args=argv, prog_name="retain", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer's word for a Ctrl-C that no command had something to say about
            raise _Stopped(Interrupted(_NOTHING))
        return int(code or 0)
    except BrokenPipeError:
        return 1
    except (KeyboardInterrupt, typer.Abort, _Stopped) as stop:
        _say(stop.args[0] if isinstance(stop, _Stopped) else Interrupted(_NOTHING))
        return 130
    except Exception as error:
        known = _explain(error, argv)
        if known is None:
            raise
        _say(known)
        return known.exit_code
    finally:
        _let_go()


def _print_anything() -> None:
    """From now on stdout has a ``?`` for what its encoding lacks, as ASCII does an arrow.

    Else it would end in an error, whose exit code says something else of ``retain certify``.
    stderr escapes such characters by itself.
    """
    out = sys.stdout
    lossy = ("strict",) if has_all(out) else ("strict", "surrogateescape")  # the latter of LANG=C
    if isinstance(out, io.TextIOWrapper) and out.errors in lossy:
        out.reconfigure(errors="replace")


def _let_go() -> None:
    """Drops what a broken pipe or a full disk does not take, so that the exit is quiet."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(error: BaseException) -> None:
    start = "\r\033[K" if sys.stderr.isatty() else ""  # over a progress bar, if there is one
    print(f"{start}retain: {' '.join(str(error).split())}", file=sys.stderr)


def _explain(error: Exception, argv: list[str] | None) -> RetainError | None:
    """The error as one of ours, or None for a bug."""
    if isinstance(error, RetainError):
        return error
    if isinstance(error, ImportError):
        return missing(error, command_of(argv))
    if isinstance(error, usage_error()):
        return _usage(error)
    text = str(error)
    if memory_full(error):
        return TrainingError(
            "the memory is full",
            got=text.partition("\n")[0][:160] or type(error).__name__,
            allowed="what the machine has",
            fix="a smaller --batch-size or --max-length, or a larger training.accumulation",
        )
    reason = why_unwritable(error)
    if reason is not None:
        place = getattr(error, "filename", None)
        return OutputError(
            "a file cannot be read or written",
            got=f"{place}: {reason}" if place else reason,
            allowed="files that can be read and a folder with room that can be written",
            fix="check the disk and the permissions, or choose another folder",
        )
    return None


def _usage(error: Any) -> RetainError:
    """A mistake in the arguments, in our words."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context else "retain"
    if type(error).__name__ == "NoSuchOption" and context:
        every = {o for p in context.command.params for o in (*p.opts, *p.secondary_opts)}
        got = str(getattr(error, "option_name", ""))
        return unknown("option", got, {"--help", *(o for o in every if o.startswith("--"))})
    errors = getattr(error.__cause__, "errors", None)  # pydantic's, for a value of a wrong kind
    given = errors()[0].get("input") if errors else None
    usage = " ".join(context.get_usage().split()[1:]) if context else None
    what = error.format_message().rstrip(".")
    option = re.search(r"'(--[\w-]+)", what)
    number = with_point(given) if isinstance(given, str) else None
    fix = f"see {path} --help"
    if option and number:
        usage, fix = "a number, with a point", f"{option[1]} {number}"
    return ConfigError(
        what[:1].lower() + what[1:],
        got=repr(given) if errors else None,
        allowed=usage and usage.replace("{", "").replace("}", ""),
        fix=fix,
    )
