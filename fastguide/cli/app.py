"""The application: its commands, and what an error means for the exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastguide import __version__
from fastguide.cli.bench import bench
from fastguide.cli.collect import collect, label
from fastguide.cli.demo import demo
from fastguide.cli.evaluate import evaluate
from fastguide.cli.generate import generate
from fastguide.cli.output import drop_output
from fastguide.cli.train import train
from fastguide.cli.validate import validate

UsageError: Any = typer.BadParameter.__base__
"""What typer raises for options that it cannot read; some versions bring a click of their own."""

BAD_INPUT = 2
"""Exit code for input that cannot be used: one sentence on standard error says why."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it; what was done has been printed."""
CLOSED_PIPE = 141
"""Exit code when the reader of standard output has gone (``fastguide … | head``)."""


class Commands(TyperGroup):
    """Turns the errors of every command into one sentence and an exit code."""

    def make_context(self, info_name: Any, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Read the options before the command; without any arguments typer shows the help."""
        with _one_sentence() if args else contextlib.nullcontext():
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Read the command's options and run it."""
        with _one_sentence():
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Say what went wrong.

    Raises:
        typer.Exit: with ``BAD_INPUT``, ``INTERRUPTED`` or ``CLOSED_PIPE``.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    except BrokenPipeError as error:
        drop_output()
        raise typer.Exit(CLOSED_PIPE) from error
    except UsageError as error:
        sentence = " ".join(error.format_message().split()).rstrip(".")
        typer.echo(f"error: {sentence[:1].lower()}{sentence[1:]}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except OSError as error:
        reason = f"{error.filename!r}: {error.strerror}" if error.filename else str(error)
        typer.echo(f"error: {reason}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except (ValueError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(demo)
app.command()(collect)
app.command()(label)
app.add_typer(train, name="train")
app.command()(validate)
app.command()(evaluate)
app.command(
    add_help_option=False,  # the benchmark has its own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastguide {__version__}")
        raise typer.Exit


@app.callback()
def fastguide(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Steer a language model while it decodes, with value models and reward models.

    Try it: fastguide generate "Once upon a time" --guide cheerful --beta 4
    """


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="fastguide")
