"""The flags of `computron simulate`, by the part of its help that they stand in."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from computron.cli.simulation import defaults
from computron.routing import ROUTERS
from computron.simulation.systems import SYSTEMS

_hardware = partial(typer.Option, rich_help_panel="Hardware and models")
_workload = partial(typer.Option, rich_help_panel="Workload")
_system = partial(typer.Option, rich_help_panel="Systems")
_output = partial(typer.Option, rich_help_panel="Output")

ProfileFile = Annotated[
    Path | None,
    _hardware("--profile", help="A measured server (`computron bench profile`); most flags of this part overrule it."),
]
Models = Annotated[int | None, _hardware(min=1, help="How many.", show_default=str(defaults.MODELS))]
ModelSize = Annotated[
    str | None,
    _hardware(help="Of a model on one node; several with commas: in turn.", show_default=defaults.MODEL_SIZE),
]
Memory = Annotated[str | None, _hardware(help="Of one node's device.", show_default=defaults.MEMORY)]
Bandwidth = Annotated[str | None, _hardware(help="Of one node's link.", show_default=defaults.BANDWIDTH)]
Frame = Annotated[str | None, _hardware(help="A page of the device's memory.", show_default=defaults.FRAME)]
StepTime = Annotated[str | None, _hardware(help="Of one step of one model.", show_default=defaults.STEP_TIME)]
PromptTokenTime = Annotated[
    str | None, _hardware(help="Of each token of the prompts that a step takes in.", show_default="nothing")
]
RequestTime = Annotated[str | None, _hardware(help="Of each request in a step.", show_default="nothing")]
CachePerToken = Annotated[
    str | None, _hardware(help="KV cache of a token, on one node.", metavar="SIZE", show_default="nothing")
]
Batch = Annotated[int | None, _hardware(min=1, help="Most requests of a step.", show_default=str(defaults.BATCH))]

Rate = Annotated[
    float | None, _workload(help="Requests a second, to all models together.", show_default=f"{defaults.RATE:g}")
]
Cv = Annotated[
    float | None,
    _workload(help="Deviation over mean of the times between a model's requests.", show_default=f"{defaults.CV:g}"),
]
Zipf = Annotated[
    float | None, _workload(help="How unequal popularity is; 0: all alike.", show_default=f"{defaults.ZIPF:g}")
]
Duration = Annotated[str | None, _workload(help="How long requests come.", show_default=defaults.DURATION)]
Seed = Annotated[int, _workload(min=0, help="Of all that is drawn.")]
PromptTokens = Annotated[
    str | None,
    _workload(help="A number, `MEAN,SD` of a log-normal, or a trace to draw lengths from.", show_default="1"),
]
OutputTokens = Annotated[str | None, _workload(help="Likewise; above 1, a token a step.", show_default="1")]
Trace = Annotated[Path | None, _workload(help="The requests of a file instead.")]
TraceFormat = Annotated[
    str | None, _workload(help="`csv` (ours), `gentd26` or `azure`.", show_default="csv", metavar="NAME")
]
SpeedUp = Annotated[float | None, _workload(help="Divides the trace's arrivals and execution times.", show_default="1")]
Overlay = Annotated[
    int | None, _workload(help="Copies of the trace, moved by whole days, over each other.", show_default="1")
]

Systems = Annotated[
    list[str] | None,
    _system(
        "--policy",
        help=f"What is simulated; again, to compare. {', '.join(SYSTEMS)}.",
        show_default="default",
        metavar="NAME",
    ),
]
Groups = Annotated[int, _system(min=1, help="Groups of nodes; each can serve every model.")]
RouterName = Annotated[
    str, _system("--router", help=f"Which group a request goes to: {', '.join(ROUTERS)}.", metavar="NAME")
]
MaxWait = Annotated[
    str,
    _system(
        help="Until overload, no request waits longer because of other models. The exact promise: docs/scheduling.md."
    ),
]
Cold = Annotated[bool, _system("--cold", help="Begin with empty devices, not after a request to each model.")]

Slo = Annotated[
    list[str] | None,
    _output(
        help="Latency to be in time; `first=1s`: of the first token; `2x+2s`: twice the execution time and 2 s. "
        "May be given again.",
        show_default=defaults.SLO,
    ),
]
SweepLoad = Annotated[str | None, _output(help="Also at these loads, like `0.5,1,2`.", metavar="LIST")]
SweepGroups = Annotated[str | None, _output(help="Also on so many groups, like `1,2,4`.", metavar="LIST")]
PerModel = Annotated[bool, _output("--per-model", help="A table of models, too.")]
JsonFile = Annotated[Path | None, _output("--json", help="Write everything to this file.")]
Plot = Annotated[Path | None, _output(help="Draw latencies and sweeps: a file, or a folder for one each.")]
Timeline = Annotated[Path | None, _output(help="Write swaps and runs as an HTML page to zoom in.")]
