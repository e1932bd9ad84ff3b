"""Jobs and fleets for the tests of packers, and what must hold of every fleet."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st

from computron.parameter_service.packing import BlockLoad, Capacity, Fleet, JobLoad, Limits, Packer

MEMORY, NETWORK = 1_000, 10_000.0
CAPACITY = Capacity(memory=MEMORY, network=NETWORK)


def job(name, period, cpus, *, servers=1, memory=10, network=0, limit=None):
    blocks = tuple(BlockLoad(number, cpu, memory, network) for number, cpu in enumerate(cpus))
    return JobLoad(name, period, blocks, limit, servers)


def placed(packer: Packer, jobs: Iterable[JobLoad], capacity: Capacity = CAPACITY) -> Fleet:
    fleet = Fleet(capacity)
    for load in jobs:
        fleet = fleet.with_job(load, packer.place(fleet, load))
    return fleet


@st.composite
def loads(draw, name):
    compute = draw(st.sampled_from([0.01, 0.05, 0.05, 0.2, 0.21, 0.5]))
    servers = draw(st.sampled_from([1, 1, 1, 2]))
    count = draw(st.integers(servers, 5))
    cpus = [round(draw(st.floats(0.01, 0.3)) * compute, 5) for _ in range(count)]
    memory = draw(st.sampled_from([1, 100, 400]))
    network = draw(st.sampled_from([0, 0, 50]))
    return job(name, compute + sum(cpus) / servers, cpus, servers=servers, memory=memory, network=network)


def jobs(least=1, most=7):
    return st.integers(least, most).flatmap(lambda count: st.tuples(*(loads(f"job-{n}") for n in range(count))))


def check(fleet: Fleet, packer: Packer) -> None:
    """Every block has one place, and what is derived from the places agrees with them."""
    limits: Limits = packer.limits
    for name, load in fleet.jobs.items():
        assert set(fleet.owners[name]) == {block.block for block in load.blocks}
        held = [block for server in fleet.servers.values() if name in server for block in server[name].blocks]
        assert sorted(held) == sorted(fleet.owners[name])
        assert fleet.homes[name] == tuple(sorted(set(fleet.owners[name].values())))
    for server, held in fleet.servers.items():
        assert fleet.memory(server) <= fleet.capacity.memory
        assert fleet.network(server) <= fleet.capacity.network + 1e-6
        assert all(part.blocks for part in held.values())
        if packer.name == "utilisation" and len(held) > 1:
            assert fleet.utilisation(server) <= limits.utilisation + 1e-6


def within_limits(fleet: Fleet, packer: Packer) -> None:
    """No job that shares loses more than it may."""
    for name, loss in packer.losses(fleet).items():
        if any(len(fleet.servers[server]) > 1 for server in fleet.homes[name]):
            assert loss <= packer.limits.loss_of(fleet.jobs[name]) + 1e-6, name
