"""``hvd-sketch``, also ``python -m hvd_sketch``: what can be known before a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from hvd_sketch.commands.console import console
from hvd_sketch.commands.plan_command import plan
from hvd_sketch.version import __version__

app = typer.Typer(
    help="Sketched gradient exchange for PyTorch over torch.distributed, Horovod and MPI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hvd_sketch {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take what stands before the command."""


@app.command("warm-up")
def warm_up(as_json: AsJson = False) -> None:
    """Compile the CPU kernels now and keep them, so that no job waits for it.

    They are kept beside the package, or in NUMBA_CACHE_DIR.
    """
    from hvd_sketch.warm_up import cache_folder, warm_up  # not before: it imports Numba, which --version does not need

    start_s = time.perf_counter()
    try:
        compiled = warm_up(None if as_json else typer.echo)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        elapsed_s = round(time.perf_counter() - start_s, 3)
        typer.echo(json.dumps({"compiled": compiled, "elapsed_s": elapsed_s, "folder": str(cache_folder())}, indent=2))


app.command()(plan)


@app.command()
def doctor(
    hosts: Annotated[Path | None, typer.Option(help="Host file: also look at these by ssh.")] = None,
    self_test: Annotated[bool, typer.Option(help="Exchange between two ranks under every launcher.")] = True,
    bundle: Annotated[Path | None, typer.Option(help="Also write a text file to attach to a report.")] = None,
    names: Annotated[bool, typer.Option(help="Leave users, hosts and paths in the bundle.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Look for what is wrong with this machine, and say how to mend it.

    Exit status 1 where something is wrong. In a job its first rank alone looks and prints.
    """
    from hvd_sketch.commands import doctor as examining
    from hvd_sketch.commands.bundle import write_bundle

    if told := examining.other_rank():
        typer.echo(f"doctor: {told}, so that rank 0 alone looks and prints", err=True)
        return
    try:
        names_of_hosts = examining.host_names(hosts)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--hosts {hosts}: {error}") from error
    found = examining.examine(names_of_hosts, self_test)
    if as_json:
        typer.echo(examining.as_json(found))
    else:
        examining.show(found, console())
    if bundle is not None:
        try:
            write_bundle(found, bundle, names, names_of_hosts)
        except OSError as error:
            raise typer.BadParameter(str(error)) from error
    raise typer.Exit(any(finding.state == "wrong" for finding in found))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Logs of rank 0, such as run.jsonl.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Write one page about some runs: bytes, losses, where the time goes. It needs no network.

    Logs of other ranks, such as run.rank1.jsonl, are looked for beside each.
    """
    from hvd_sketch.commands import report as reporting

    try:
        written = reporting.write_report(runs, output)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    _tell_of(output, json.dumps(written, indent=2) if as_json else reporting.told(written))


@app.command("merge-traces")
def merge_traces(
    traces: Annotated[list[Path], typer.Argument(help="Of ranks, torch's profiler, or Horovod.", exists=True)],
    output: Annotated[Path, typer.Option(help="The trace to write.")] = Path("merged.json"),
    as_json: AsJson = False,
) -> None:
    """Put traces into one, for Perfetto or chrome://tracing: their times fit together."""
    from hvd_sketch.commands import merge_traces as merging

    try:
        written = merging.merge_traces(traces, output)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    _tell_of(output, json.dumps(written, indent=2) if as_json else merging.told(written))


def _tell_of(output: Path, told: str) -> None:
    """Print what was written; beside the output where that is a pipe or the terminal, such as ``/dev/stdout``."""
    typer.echo(told, err=not output.is_file())


def main() -> None:
    """The console script. Bad use exits with status 2."""
    app(prog_name="hvd-sketch")


if __name__ == "__main__":
    main()
