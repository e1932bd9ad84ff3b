"""The communication hook gives DistributedDataParallel the average of all workers' gradients."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from computron.errors import ParameterServiceError
from computron.parameter_service import ddp_hook
from tests.parameter_service.agent.test_one_worker import batches, loss, network, same


@pytest.fixture
def alone(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Bucket:
    """What a hook uses of torch.distributed.GradBucket."""

    def __init__(self, parameters, last):
        self._parameters = parameters
        self._last = last
        self._buffer = torch.cat([p.grad.reshape(-1) for p in parameters])

    def buffer(self):
        return self._buffer

    def parameters(self):
        return self._parameters

    def gradients(self):
        sizes = [p.numel() for p in self._parameters]
        return [g.view(p.shape) for g, p in zip(self._buffer.split(sizes), self._parameters, strict=True)]

    def is_last(self):
        return self._last


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
def test_ddp_trains_with_it(cluster, alone, shared):
    ours, theirs = network(), network()
    model = DistributedDataParallel(ours, bucket_cap_mb=0.01)
    reduction, hook = ddp_hook(cluster.service(shared_memory=shared), model)
    model.register_comm_hook(reduction, hook)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, fused=True) for m in (ours, theirs)]
    for batch in batches(5):
        for trained, optimizer in zip((model, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss(trained, batch).backward()
            optimizer.step()
        assert same(ours, theirs)
    assert reduction.steps == 5
    reduction.close()


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
def test_two_workers_get_the_average(cluster, shared):
    results, errors = {}, []

    def work(rank):
        try:
            model = network()
            reduction, hook = ddp_hook(cluster.service(rank=rank, workers=2, shared_memory=shared), model)
            parameters = list(model.parameters())
            for batch in batches(4):
                model.zero_grad()
                loss(model, batch * (rank + 1)).backward()
                own = [p.grad.clone() for p in parameters]
                buckets = [Bucket(parameters[3:], False), Bucket(parameters[:3], True)]
                sums = [future.wait().clone() for future in [hook(reduction, bucket) for bucket in buckets]]
                results.setdefault(rank, []).append((own, torch.cat([sums[1], sums[0]])))
            reduction.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors
    for (first, sum_of_first), (second, sum_of_second) in zip(results[0], results[1], strict=True):
        expected = torch.cat([((a + b) / 2).reshape(-1) for a, b in zip(first, second, strict=True)])
        assert torch.equal(sum_of_first, expected)
        assert torch.equal(sum_of_second, expected)


def test_a_reduction_that_was_closed_says_so(cluster):
    model = nn.Linear(2, 2)
    reduction, hook = ddp_hook(cluster.service(), model)
    model(torch.ones(2)).sum().backward()
    reduction.close()
    with pytest.raises(ParameterServiceError, match="was left"):
        hook(reduction, Bucket(list(model.parameters()), True))
