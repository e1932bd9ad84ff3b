"""How long do the nodes of a stage take to sum a small tensor, by our sockets and by gloo?

Every layer of a model that is split by tensor does this twice in each step. Two and four processes on this machine sum
float32 tensors of one token's hidden state, through the communicator that serves (`GroupCommunicator`), and through
gloo's all-reduce and its all-to-all with the sum made afterwards. `value` is the median of our microseconds, `baseline`
that of the quicker of gloo's two in the same run, `ratio` how many times as long that takes.

Always on the host, where four processes share what cores there are: take the ratios.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from _common import Report, arguments
from _processes import HOST, free_port

from computron.group.communicator import GroupCommunicator
from computron.group.rendezvous import make_store
from computron.models.shard import Shard

WIDTHS = (576, 4096)  # hidden sizes of a small and a large model
NODES = (2, 4)
NAMES = tuple(f"exchange.{nodes}_nodes.{width}.ratio" for nodes in NODES for width in WIDTHS)
SECONDS = 30.0  # for the processes to find each other
WARM = 20

Times = dict[str, dict[int, float]]  # microseconds, by method and width


def medians(sum_up: Callable[[torch.Tensor], object], rounds: int) -> dict[int, float]:
    """For each width."""
    found = {}
    for width in WIDTHS:
        times = []
        for _ in range(WARM + rounds):
            tensor = torch.ones(1, width)
            began = time.perf_counter()
            sum_up(tensor)
            times.append((time.perf_counter() - began) * 1e6)
        found[width] = statistics.median(times[WARM:])
    return found


def node(rank: int, nodes: int, port: int, gloo_port: int, rounds: int, answers: Connection) -> None:
    torch.set_num_threads(1)
    ours = GroupCommunicator(Shard(tensor_parallel=nodes, tensor_rank=rank))
    ours.form(1, HOST, port, SECONDS)
    limit = timedelta(seconds=SECONDS)
    store = dist.TCPStore(HOST, gloo_port, nodes, is_master=rank == 0, timeout=limit, wait_for_workers=False)
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, nodes, limit)

    def all_to_all(tensor: torch.Tensor) -> torch.Tensor:
        parts = torch.empty(nodes, tensor.numel())
        gloo.alltoall_base(parts.view(-1), tensor.view(-1).repeat(nodes), [], []).wait()
        return parts.sum(0)

    times: Times = {
        "ours": medians(ours.all_reduce, rounds),
        "all_reduce": medians(lambda tensor: gloo.allreduce([tensor]).wait(), rounds),
        "all_to_all": medians(all_to_all, rounds),
    }
    answers.send(times)
    answers.recv()  # until all have ended: a connection that closes early fails those that still measure
    ours.close()


@contextmanager
def running(nodes: int, rounds: int) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    store, port = make_store(HOST)
    gloo_port = free_port()
    pipes = [context.Pipe() for _ in range(nodes)]
    processes = [
        context.Process(target=node, args=(rank, nodes, port, gloo_port, rounds, there))
        for rank, (_, there) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, there in pipes:
        there.close()  # so that a process that dies ends its pipe
    try:
        yield [here for here, _ in pipes]
    finally:
        for process in processes:
            process.join(SECONDS)
            process.kill()
        store.close()


def measure(nodes: int, rounds: int) -> Times:
    """By the slowest process, which is what a step waits for."""
    with running(nodes, rounds) as pipes:
        told: list[Times] = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send(None)
    return {method: {width: max(times[method][width] for times in told) for width in WIDTHS} for method in told[0]}


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("Sums of small tensors between nodes", options, NAMES)
    for nodes in NODES:
        times = measure(nodes, 200 if options.quick else 1000)
        for width in WIDTHS:
            ours = times["ours"][width]
            gloo = min(times["all_reduce"][width], times["all_to_all"][width])
            report.row(f"exchange.{nodes}_nodes.{width}.ratio", ours, "us", gloo, gloo / ours)
            for method in ("all_reduce", "all_to_all"):
                report.row(f"exchange.{nodes}_nodes.{width}.gloo_{method}", times[method][width], "us")
    report.finish()


if __name__ == "__main__":
    main()
