"""Whether a system was asked for more than it can do."""

from __future__ import annotations

import numpy as np

from computron.simulation.log import Log
from computron.simulation.results import Summary
from computron.simulation.workload import Workload

FEWEST = 20  # requests; fewer tell nothing
BUSY = 0.9  # share of the time
BEHIND = 0.05  # by how much answers may come more slowly than requests
LAST = 0.1  # share of the requests, the last to arrive
LONG = 10  # mean steps


def overloaded(log: Log, workload: Workload, summary: Summary, max_wait: float) -> bool:
    """Answers came more slowly than requests, at a device or a link that had hardly a pause; or of the last tenth of
    the requests a tenth waited for longer than `max_wait` and than ten mean steps, so that the queue has grown.
    """
    arrivals = workload.arrivals
    if len(arrivals) < FEWEST or not summary.span:
        return False
    asked = asked_for(workload)
    busy = max(summary.device_utilisation, summary.link_utilisation, summary.link_back_utilisation)
    behind = summary.throughput < (1.0 - BEHIND) * asked
    return (behind and busy > BUSY) or _late_wait(log) > max(max_wait, LONG * _mean_step(log))


def asked_for(workload: Workload) -> float:
    """Requests a second, from the first arrival to the last."""
    arrivals = workload.arrivals
    length = arrivals[-1].time - arrivals[0].time if arrivals else 0.0
    return len(arrivals) / length if length else 0.0


def _late_wait(log: Log) -> float:
    """What a tenth of the last requests waited, or longer. A request that never began has waited until the end."""
    first = int(len(log.arrived) * (1.0 - LAST))
    started = np.asarray(log.started)[first:]
    waits = np.where(np.isnan(started), log.ended, started) - np.asarray(log.arrived)[first:]
    waits[[number - first for number in log.rejected if number >= first]] = np.nan
    waits = waits[~np.isnan(waits)]
    return float(np.quantile(waits, 0.9)) if len(waits) else 0.0


def _mean_step(log: Log) -> float:
    return sum(row.ended - row.started for row in log.steps) / len(log.steps) if log.steps else 0.0
