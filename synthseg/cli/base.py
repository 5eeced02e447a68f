"""What all commands share: the program, its options, errors and exit codes.

Exit codes: 0 all done, 1 some scans of a batch failed, 2 bad input or usage, 3 internal error, 130 Ctrl-C. Messages
go to stderr, one line per error; ``--debug`` adds the traceback. torch, monai and matplotlib are imported inside
the commands, so that help and usage errors come at once.
"""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from synthseg.errors import SynthSegError
from synthseg.memory import as_shortage

DEFAULT_MODEL = "siam16"
INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    name="synthseg",
    help="Segment head and brain scans of any contrast, resolution and orientation.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", metavar="DEVICE")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting (repeat).")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads (default: all cores).")]


def main() -> None:
    """Entry point of the ``synthseg`` command."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # temporary files are removed
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; every error ends as one line on stderr."""
    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            code = app(args=list(arguments), prog_name="synthseg", standalone_mode=False)
        if code == INTERRUPTED:
            say("error: interrupted")
        return code if isinstance(code, int) else 0
    except Exception as error:
        return report(error, debug)


def report(error: Exception, debug: bool, subject: str = "") -> int:
    """Print one line (and the traceback if asked for) and return the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, SynthSegError):
        say(f"error: {error}")
        return 2
    if (shortage := as_shortage(error)) is not None:
        say(f"error: {subject}{shortage}")
        return 2
    if hasattr(error, "format_message"):  # a usage error of click, or of the copy of click inside typer
        say(f"error: {error.format_message()} (see synthseg --help)")
        return 2
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    hint = "" if debug else "; run again with --debug for the traceback"
    say(f"error: {subject}internal error ({what}){hint}")
    return 3


def say(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr, flush=True)


def _show_version(value: bool) -> None:
    if value:
        from synthseg import __version__

        typer.echo(f"synthseg {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def prepare_torch(threads: int | None) -> None:
    """Settings that must come before the first tensor."""
    from synthseg.allocator import tune_allocator

    tune_allocator()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def within_memory(device: Any) -> Iterator[None]:
    """An allocation that does not fit into the machine or its container is refused, so that an error can say so."""
    import torch

    from synthseg.memory import limit_allocations

    if device.type != "cpu" or not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit_allocations(threads=2 * torch.get_num_threads() + 8)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def shipped(kind: str, pattern: str) -> list[Path]:
    """What ships of one kind; nothing if this installation has no such folder."""
    from synthseg.paths import data_dir

    try:
        return sorted(data_dir(kind).glob(pattern))  # type: ignore[arg-type]
    except FileNotFoundError:
        return []
