"""Steps of one model that are planned before those before them have ended: each keeps its own requests."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

from computron.execution.requests import ClassifyJob, EmbedJob
from computron.memory.gate import OPEN

TEXTS = [(5, 6, 7), (8,), (9, 10, 11, 12), (13, 14), (15, 16, 17)]
CONFIG = BertConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3
)


@pytest.mark.parametrize("task", ["embed", "classify"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_steps_on_their_way_do_not_mix_their_requests(random_checkpoint, load, new_rig, task, order) -> None:
    kind = AutoModel if task == "embed" else AutoModelForSequenceClassification
    one = new_rig(load(random_checkpoint(kind, CONFIG)[1], task=task))
    jobs = [EmbedJob(text) if task == "embed" else ClassifyJob(tokens=text) for text in TEXTS]
    expected = [values(one.step([one.add(job)]).outputs[0]) for job in jobs]
    assert one.executor.overlaps
    requests = [one.add(job) for job in jobs]
    parts = [requests[:3], requests[3:]]
    steps = [one.executor.plan(part) for part in parts]
    outputs = [one.runner.run(step, OPEN) for step in steps]
    for place in order:
        result = one.executor.finish(steps[place], outputs[place])
        assert sorted(result.finished) == parts[place]
        for output in result.outputs:
            right = expected[requests.index(output.request)]
            torch.testing.assert_close(values(output), right, rtol=0, atol=1e-5)


def test_an_abandoned_step_leaves_others_alone(random_checkpoint, load, new_rig) -> None:
    one = new_rig(load(random_checkpoint(AutoModel, CONFIG)[1], task="embed"))
    requests = [one.add(EmbedJob(text)) for text in TEXTS]
    first, second = one.executor.plan(requests[:2]), one.executor.plan(requests[2:])
    output = one.runner.run(second, OPEN)
    one.executor.abandon(first)
    assert sorted(one.executor.finish(second, output).finished) == requests[2:]
    assert sorted(one.step(requests[:2]).finished) == requests[:2]


def values(output) -> torch.Tensor:
    return torch.tensor(output.embedding if hasattr(output, "embedding") else output.probabilities)
