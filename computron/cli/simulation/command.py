"""`computron simulate`: what it takes and what it is for."""

from __future__ import annotations

from computron.cli.output import ASKED_WRONGLY, fail
from computron.cli.simulation import defaults, flags


def simulate(
    profile: flags.ProfileFile = None,
    models: flags.Models = None,
    model_size: flags.ModelSize = None,
    memory: flags.Memory = None,
    bandwidth: flags.Bandwidth = None,
    frame: flags.Frame = None,
    step_time: flags.StepTime = None,
    prompt_token_time: flags.PromptTokenTime = None,
    request_time: flags.RequestTime = None,
    cache_per_token: flags.CachePerToken = None,
    batch: flags.Batch = None,
    rate: flags.Rate = None,
    cv: flags.Cv = None,
    zipf: flags.Zipf = None,
    duration: flags.Duration = None,
    seed: flags.Seed = 0,
    prompt_tokens: flags.PromptTokens = None,
    output_tokens: flags.OutputTokens = None,
    trace: flags.Trace = None,
    trace_format: flags.TraceFormat = None,
    speed_up: flags.SpeedUp = None,
    overlay: flags.Overlay = None,
    system: flags.Systems = None,
    groups: flags.Groups = 1,
    router: flags.RouterName = "resident",
    max_wait: flags.MaxWait = defaults.MAX_WAIT,
    cold: flags.Cold = False,
    slo: flags.Slo = None,
    sweep_load: flags.SweepLoad = None,
    sweep_groups: flags.SweepGroups = None,
    per_model: flags.PerModel = False,
    json_file: flags.JsonFile = None,
    plot: flags.Plot = None,
    timeline: flags.Timeline = None,
) -> None:
    """Simulate a fleet: the real scheduler on a clock and on hardware that exist only in numbers.

    Examples:

        computron simulate

        computron simulate --models 20 --cv 4 --policy default --policy lru --timeline swaps.html

        computron simulate --profile server.json --trace requests.csv --slo 500ms --sweep-groups 1,2,4 --plot plots/
    """
    from computron.cli.simulation.options import HardwareOptions, SystemOptions, WorkloadOptions, experiment
    from computron.cli.simulation.run import Wanted, run

    try:
        asked = experiment(
            HardwareOptions(
                profile,
                models,
                model_size,
                memory,
                bandwidth,
                frame,
                step_time,
                prompt_token_time,
                request_time,
                cache_per_token,
                batch,
            ),
            WorkloadOptions(
                rate, cv, zipf, duration, seed, prompt_tokens, output_tokens, trace, trace_format, speed_up, overlay
            ),
            SystemOptions(tuple(system or ["default"]), groups, router, max_wait, cold, sweep_load, sweep_groups),
            tuple(slo or [defaults.SLO]),
        )
        run(asked, Wanted(per_model, json_file, plot, timeline))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", ASKED_WRONGLY)
    except ValueError as error:
        fail(str(error), ASKED_WRONGLY)
