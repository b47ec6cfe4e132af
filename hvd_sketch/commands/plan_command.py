"""The options of ``hvd-sketch plan``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from hvd_sketch.commands.console import console
from hvd_sketch.units import seconds

MEASURED = ("ranks", "per_host", "bandwidth", "latency", "launcher")  # what --measure finds itself


def plan(
    context: typer.Context,
    params: Annotated[float | None, typer.Option(help="How many parameters the model has, such as 90e6.")] = None,
    model: Annotated[
        str | None, typer.Option(help="package.module:function that makes the model, in its place.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=2, help="How many there will be, each with a link of its own.")] = 4,
    per_host: Annotated[int, typer.Option(min=1, help="Ranks that share a link, as levels=2 has them.")] = 1,
    bandwidth: Annotated[str, typer.Option(help="Of a link, one way.")] = "1gbit",
    latency: Annotated[str, typer.Option(help="Of a message between hosts.")] = "50us",
    backward: Annotated[str, typer.Option(help="What a training step takes without its exchange.")] = "0s",
    overlap: Annotated[bool, typer.Option(help="DDP exchanges dense gradients during the backward pass.")] = True,
    optimizer: Annotated[
        str, typer.Option(help="The one to be wrapped: sgd, adam, adamw, lagadamw, muon or signsgd.")
    ] = "sgd",
    ratio: Annotated[
        float | None,
        typer.Option(help="Times fewer bytes than a dense ring, for ours. Default: sgd 150, others 60."),
    ] = None,
    bits: Annotated[int, typer.Option(help="Of a value of ours: 4, 8, 16 or 32.")] = 4,
    every: Annotated[int, typer.Option(min=1, help="Steps of an exchange of ours, as of LocalSteps.")] = 1,
    launcher: Annotated[str, typer.Option(help="torch, mpi, horovod, horovod-mpi or horovod-own.")] = "torch",
    device: Annotated[str, typer.Option(help="cpu, a core; or cuda, an H100.")] = "cpu",
    calibrate: Annotated[bool, typer.Option(help="Time the local work on this machine, for seconds.")] = False,
    measure: Annotated[bool, typer.Option(help="Under a launcher: measure this job's network and local work.")] = False,
    gradient: Annotated[
        Path | None, typer.Option(help="From save_gradient: which settings capture most of it?")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw times against bandwidth and ranks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Predict what a step takes, dense and compressed, say whether compression pays, and how to set it up.

    Times are those of a model: bytes over bandwidth, messages, and local work.
    """
    from hvd_sketch.checks import check_choice, check_positive
    from hvd_sketch.commands import calibrate as calibrating
    from hvd_sketch.commands import capture, plan_figure
    from hvd_sketch.commands import measure as measuring
    from hvd_sketch.commands import plan as planning
    from hvd_sketch.commands import plan_options as options
    from hvd_sketch.config import BITS
    from hvd_sketch.cost import Workload
    from hvd_sketch.measured_costs import WORKS

    job = captured = None
    try:
        options.check_together(_given(context, MEASURED) if measure else [], per_host, every)
        flat = capture.load_gradient(gradient) if gradient is not None else None
        shapes, small = options.tensors_of(params, model, flat)
        check_choice("--device", device, WORKS)
        check_choice("--bits", bits, BITS)
        check_choice("--optimizer", optimizer, planning.ADVISED)
        ratio = planning.RATIOS[optimizer] if ratio is None else ratio
        check_positive("--ratio", ratio)
        backward_s = seconds(backward)
        network = options.network_of(ranks, bandwidth, latency, launcher, per_host)
        if measure or calibrate:
            calibrating.check_device(device)
        if measure:
            job = measuring.job_here(device)
            network = job.network
        works, can_split = WORKS[device], network.carrier.can_split
        if measure or calibrate:
            works = calibrating.works_here(shapes, ratio, network.ranks, bits, device, can_split)
        if job is not None and not job.is_first:
            return
        workload = Workload(shapes, ratio, works, bits, every, overlap, backward_s, small, device)
        made = planning.Plan(workload, network, optimizer)
        if plot is not None:
            plan_figure.write_figure(plot, workload, network)
        if flat is not None:
            known = shapes if model is not None else None
            captured = capture.Comparison(flat, known, ratio, network.ranks, bits, can_split)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    parts = [part for part in (made, job, captured) if part is not None]
    if as_json:
        typer.echo(json.dumps({name: value for part in parts for name, value in part.as_record().items()}, indent=2))
        return
    for part in parts:
        part.show(console())


def _given(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those options that stand in the command line."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
