"""What a worker says of trouble that does not end it, and of what it cannot take."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

import computron.parameter_service as service
from computron.errors import ConfigError, JobRefused
from computron.parameter_service.agent.master_link import MasterLink
from computron.parameter_service.wire.messages import Denied, Enlist, Unpublished, encoder
from tests.parameter_service.agent.conftest import told
from tests.parameter_service.agent.test_one_worker import batches, loss, network


def until_logged(caplog, words):
    deadline = time.monotonic() + 10
    while words not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_version_that_was_not_published_is_an_error_in_the_log(cluster, caplog):
    with service.SGD(network().parameters(), lr=0.1, service=cluster.service()):
        said = Unpublished("job", "v1", "/files/v1.safetensors: is finished; choose another name")
        cluster.run(cluster.jobs["job"].sockets[0].send_bytes(encoder().encode(said)))
        until_logged(caplog, "version v1 was not published: /files/v1.safetensors: is finished; choose another name")
    assert {entry.levelname for entry in caplog.records if "v1" in entry.getMessage()} == {"ERROR"}


def test_it_is_said_when_the_master_goes_and_when_it_is_back(cluster, caplog):
    model = network()
    with service.SGD(model.parameters(), lr=0.1, service=cluster.service()) as optimizer:
        cluster.disconnect_from_master()
        until_logged(caplog, "is away, training goes on without it")
        until_logged(caplog, "is back")
        loss(model, batches(1)[0]).backward()
        optimizer.step()


def test_a_worker_of_a_deleted_job_does_not_begin_it_anew(cluster, monkeypatch):
    run, ended = MasterLink.run, threading.Event()

    async def noted(self):
        await run(self)
        ended.set()

    monkeypatch.setattr(MasterLink, "run", noted)
    model = network()
    with service.SGD(model.parameters(), lr=0.1, service=cluster.service()) as optimizer:
        socket = cluster.jobs["job"].sockets[0]
        cluster.run(socket.send_bytes(encoder().encode(Denied("job", "unknown_job", "the job was deleted"))))
        cluster.run(socket.close())
        assert ended.wait(10)
        loss(model, batches(1)[0]).backward()
        with pytest.raises(JobRefused, match="the job was deleted"):
            optimizer.step()
    assert len(told(cluster, Enlist)) == 1


def test_an_address_without_http_is_the_masters(cluster):
    settings = cluster.service()
    object.__setattr__(settings, "master", cluster.url.removeprefix("http://"))
    with service.SGD(network().parameters(), lr=0.1, service=settings) as optimizer:
        assert optimizer.steps == 0


def test_an_address_that_is_none_is_told(cluster):
    settings = cluster.service()
    object.__setattr__(settings, "master", "ftp://127.0.0.1:1")
    with pytest.raises(JobRefused, match="is no URL; COMPUTRON_PARAMETER_SERVICE says where the master is"):
        service.SGD(network().parameters(), lr=0.1, service=settings)


def test_a_sparse_gradient_is_refused_with_a_way_out(cluster):
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = service.SGD(model.parameters(), lr=0.1, service=cluster.service())
    with optimizer, pytest.raises(ValueError, match="sparse=False"):
        model(torch.tensor([1])).sum().backward()


def test_an_optimizer_that_there_is_not_names_those_there_are():
    with pytest.raises(AttributeError, match="SGD, Adam and AdamW; for any other, ddp_hook"):
        _ = service.RMSprop


def test_tied_parameters_are_no_extras():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5))
    model[1].weight = model[0].weight
    settings = service.ParameterService("http://127.0.0.1:1", "job", extras=model)
    assert sorted(settings.extra_tensors()) == ["2.num_batches_tracked", "2.running_mean", "2.running_var"]


@pytest.mark.parametrize(("rank", "words"), [("3", "ranks are 0 to 1"), ("one", "must be numbers")])
def test_a_rank_that_there_is_not_is_refused_at_once(monkeypatch, rank, words):
    values = {"COMPUTRON_PARAMETER_SERVICE": "http://127.0.0.1:1", "COMPUTRON_JOB": "job", "WORLD_SIZE": "2"}
    for name, value in {**values, "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        service.ParameterService.from_environment()
