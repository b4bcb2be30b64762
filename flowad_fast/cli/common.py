"""What every command shares: consoles, one-line errors, progress bars, JSON output, and exit codes."""

import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowad_fast.errors import FlowADError, missing_extra

out = Console(width=None if sys.stdout.isatty() else 160)
"""Results go here (standard output); in a file or pipe, tables have room for their columns."""
err = Console(stderr=True)
"""Progress, warnings and errors go here, so that `--json` on standard output stays clean."""

EXIT_ERROR = 1
"""The work was tried and failed (bad file, failed parity, no engine)."""
EXIT_INTERRUPTED = 130


def run(app: typer.Typer) -> None:
    """Run `app`; warnings and expected errors become one line on standard error each.

    An error gives exit code 1, a wrong use of options 2, Ctrl-C 130.
    """
    warnings.simplefilter("ignore", FutureWarning)  # libraries among themselves
    warnings.showwarning = _warn  # type: ignore[assignment]
    try:
        try:
            app()
        except ModuleNotFoundError as error:
            raise missing_extra(error, Path(sys.argv[0]).stem) or error from None
    except FlowADError as error:
        err.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_ERROR)


def _warn(message: Warning | str, category: type[Warning], *_: Any) -> None:
    err.print("[yellow]warning:[/] ", end="")
    err.print(str(message), markup=False, highlight=False, soft_wrap=True)


def command(function: Callable[..., Any]) -> Callable[[], None]:
    """A console-script entry point for a single-command program whose options are `function`'s parameters."""

    @functools.wraps(function)
    def interruptible(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except KeyboardInterrupt:  # typer would end without a word
            err.print("[yellow]interrupted[/]; what was finished is kept")
            raise typer.Exit(EXIT_INTERRUPTED) from None

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command()(interruptible)
    return lambda: run(app)


def print_json(value: Any) -> None:
    """`value` as JSON on standard output, for machines."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def status(description: str) -> Iterator[Callable[[str], None]]:
    """What a long command is doing, on standard error; yields `tell(line)`.

    A terminal shows the last line, a file or pipe gets every line with the seconds since the start.
    """
    if err.is_terminal:
        with err.status(description) as shown:
            yield lambda line: shown.update(f"{description} · {line}")
        return
    start = time.monotonic()
    yield lambda line: err.print(
        f"{time.monotonic() - start:6.0f} s  {line}", markup=False, highlight=False, soft_wrap=True
    )


@contextmanager
def progress(description: str, total: int | None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error with count, elapsed and remaining time; yields `advance(n)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=quiet, transient=False) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.update(task, advance=n)
