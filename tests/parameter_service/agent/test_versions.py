"""What a worker gives for a version, whatever becomes of the job meanwhile."""

from __future__ import annotations

import threading
import time

import torch
from torch import nn

import computron.parameter_service as service
from computron.parameter_service.aggregator.saving import Saver
from computron.parameter_service.aggregator.steps import Steps


def test_what_is_not_trained_is_given_again_where_an_epoch_takes_the_step_anew(cluster, monkeypatch):
    given = []

    def note(self, job, message, data, then):
        given.append((message.epoch, message.tensor))
        then()

    monkeypatch.setattr(Saver, "extra", note)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with service.SGD(model.parameters(), lr=0.1, service=cluster.service(extras=model)) as optimizer:
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.publish("v1")
        with monkeypatch.context() as stopped:
            stopped.setattr(Steps, "schedule", lambda *args: None)
            training = threading.Thread(target=optimizer.step)
            training.start()
            deadline = time.monotonic() + 10
            while len(given) < 3 or optimizer._trainer.session._exchange.extras_left:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        cluster.reconfigure(0)
        training.join(10)
        assert optimizer.steps == 1
        assert sorted(given) == [(epoch, tensor) for epoch in (1, 2) for tensor in range(3)]
