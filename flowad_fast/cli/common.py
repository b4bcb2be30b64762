"""What every command shares: consoles, one-line errors, progress bars, JSON output, and exit codes."""

import errno
import functools
import io
import json
import os
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from flowad_fast.engines.cores import limit_process
from flowad_fast.errors import ConfigError, FlowADError, OutputError, missing_extra
from flowad_fast.files import replacing


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


_CLOSED = sys.stdout is None  # the process was started without one
if _CLOSED:
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # as long as the process

out = _Console(width=None if sys.stdout.isatty() else 160)
"""Results go here (standard output); in a file or pipe, tables have room for their columns."""
err = Console(stderr=True)
"""Progress, warnings and errors go here, so that `--json` on standard output stays clean."""

for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="backslashreplace")  # a name that an ASCII console cannot show must not end the job

Threads = Annotated[
    int | None,
    typer.Option(
        min=1, callback=limit_process, help="CPU threads. [default: OMP_NUM_THREADS, or the cores of the container]"
    ),
]
"""An option that needs no passing on: it counts for the process, whatever the engine."""

_TRACEBACK = "FLOWAD_FAST_TRACEBACK"
EXIT_ERROR = 1
"""The work was tried and failed (bad file, failed parity, no engine)."""
EXIT_INTERRUPTED = 130
_MARKS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""Characters that only change the direction of the text around them: with them a name looks like another one."""


def run(app: typer.Typer) -> None:
    """Run `app`; warnings and expected errors become one line on standard error each.

    An error gives exit code 1, the operating system's included, a wrong use of options 2, Ctrl-C 130.
    """
    warnings.simplefilter("ignore", FutureWarning)  # libraries among themselves
    warnings.showwarning = _warn  # type: ignore[assignment]
    try:
        if _CLOSED:
            raise OutputError("standard output is closed; give the command one, if only /dev/null")
        try:
            app()
        except ModuleNotFoundError as error:
            raise missing_extra(error, Path(sys.argv[0]).stem) or error from None
        finally:
            with _standard_output():
                sys.stdout.flush()
    except FlowADError as error:
        err.print("[bold red]error:[/] ", end="")
        note(f"{type(error).__name__}: {error}")
        sys.exit(EXIT_ERROR)
    except OSError as error:
        # A full disk, a folder that cannot be written, a missing folder for temporary files: the machine's, not ours.
        if os.environ.get(_TRACEBACK):
            raise
        err.print("[bold red]error:[/] ", end="")
        note(f"{type(error).__name__}: {error}; what was finished is kept ({_TRACEBACK}=1 shows where it happened)")
        sys.exit(EXIT_ERROR)


@contextmanager
def _standard_output() -> Iterator[None]:
    """Turn a standard output that is full or closed into an error of the project's own."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        # What is left in its buffer would raise once more when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise OutputError(
            f"standard output cannot be written ({error.strerror}); files that were written are kept"
        ) from None


def visible(text: object) -> str:
    """`text` on one line, for a person: line breaks, control and direction marks and stray bytes as escapes."""
    return "".join(
        c if c.isprintable() and unicodedata.bidirectional(c) not in _MARKS and c not in "\u200e\u200f\u061c" else
        c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(text)
    )  # fmt: skip


def plain(text: object) -> Text:
    """`text` for tables and titles: nothing in it is markup, see `visible`."""
    return Text(visible(text))


def say(*texts: object) -> None:
    """Print user's text on standard output, one line, whole: no markup, no highlighting, no wrapping."""
    out.print(*map(visible, texts), markup=False, highlight=False, soft_wrap=True)


def note(*texts: object) -> None:
    """As `say`, on standard error."""
    err.print(*map(visible, texts), markup=False, highlight=False, soft_wrap=True)


def _warn(message: Warning | str, category: type[Warning], *_: Any) -> None:
    err.print("[yellow]warning:[/] ", end="")
    note(message)


def interruptible(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command's function that ends with one line and its own exit code on Ctrl-C."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            with _standard_output():
                return function(*arguments, **options)
        except KeyboardInterrupt:  # typer would end without a word
            err.print("[yellow]interrupted[/]; what was finished is kept")
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return run


def command(function: Callable[..., Any]) -> Callable[[], None]:
    """A console-script entry point for a single-command program whose options are `function`'s parameters."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command()(interruptible(function))
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


def write_settings(path: Path, text: str, command: str, force: bool) -> None:
    """Write a settings file of `command`, to be changed by hand; ConfigError where one is there and not to go."""
    if path.exists() and not force:
        raise ConfigError(f"{path}: exists already; choose another name, or replace it with --force")
    with replacing(path) as file:
        file.write(text.encode())
    say(f"{path} written; change it, then: {command} check {path}")
