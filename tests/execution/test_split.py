"""Models that are really split: each node, a thread here, has its part of the layers and of each layer's heads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import pytest
import torch

from computron.config import ModelConfig
from computron.execution.attention import IMPLEMENTATION
from computron.models import load_model, plan_model
from computron.models.shard import Shard

WAIT = 20  # seconds after which a node that waits for another one fails


class Threads:
    """The communicator of one node. `stage` and `parts`: shared by the nodes of its stage; `links`: by all nodes."""

    def __init__(
        self,
        shard: Shard,
        stage: threading.Barrier,
        parts: list[torch.Tensor | None],
        links: Sequence[queue.Queue[torch.Tensor]],
    ) -> None:
        self.shard, self.stage, self.parts, self.links = shard, stage, parts, links

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        first, *others = self._exchange(tensor)
        return sum(others, start=first)

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return torch.cat(self._exchange(tensor), -1)

    def send(self, tensor: torch.Tensor) -> None:
        self.links[self.shard.rank + self.shard.tensor_parallel].put(tensor.clone())

    def receive(self, like: torch.Tensor) -> torch.Tensor:
        tensor = self.links[self.shard.rank].get(timeout=WAIT)
        assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
        return tensor

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.parts[self.shard.tensor_rank] = tensor.clone()
        self.stage.wait(WAIT)
        parts = [part for part in self.parts if part is not None]
        self.stage.wait(WAIT)
        return parts


@pytest.fixture
def split(family, new_split_group):
    def make(name: str, tensor_parallel: int, pipeline_parallel: int, **settings: object):
        config = ModelConfig("model", str(family(name)[1]), dtype="float32", **settings)
        world = tensor_parallel * pipeline_parallel
        barriers = [threading.Barrier(tensor_parallel) for _ in range(pipeline_parallel)]
        parts: list[list[torch.Tensor | None]] = [[None] * tensor_parallel for _ in range(pipeline_parallel)]
        links: list[queue.Queue[torch.Tensor]] = [queue.Queue() for _ in range(world)]
        models = []
        for rank in range(world):
            shard = Shard.of_rank(rank, tensor_parallel, pipeline_parallel)
            plan = plan_model(config, shard)
            parameters = torch.empty(plan.image.nbytes, dtype=torch.uint8)
            plan.image.read_into(0, memoryview(parameters.numpy()))
            communicator = Threads(shard, barriers[shard.stage], parts[shard.stage], links)
            models.append(load_model(plan, parameters, attention=IMPLEMENTATION, communicator=communicator))
        return new_split_group(models)

    return make


@pytest.mark.parametrize(
    ("name", "tensor_parallel", "pipeline_parallel"),
    [
        ("llama", 2, 1),
        ("llama", 1, 2),
        ("llama", 2, 2),
        ("gpt2", 2, 2),
        ("gemma2", 2, 2),
        ("mistral", 1, 3),
        ("opt", 1, 2),
        ("gpt_oss", 1, 2),
    ],
)
def test_greedy_tokens(
    name, tensor_parallel, pipeline_parallel, split, greedy, prompts, reference, monkeypatch
) -> None:
    monkeypatch.setattr("computron.execution.packed_batch.LEAST_PART_TOKENS", 8)
    nodes = split(name, tensor_parallel, pipeline_parallel, max_batch_tokens=90)

    def preempt(step: int, running: list[int]) -> None:
        if step in (3, 6):
            nodes.executor.preempt(running[0])

    answers = nodes.run([greedy(prompt) for prompt in prompts], preempt)
    assert [answer.tokens for answer in answers] == [reference(name, prompt) for prompt in prompts]
    assert max(len(step.parts) for step in nodes.steps) == pipeline_parallel


def test_the_node_with_the_most_layers_sets_the_size_of_a_block(split, greedy, prompts, reference) -> None:
    nodes = split("llama", 1, 2, max_batch_size=20)
    sizes = [runner.block_bytes for runner in nodes.runners]
    assert sizes[0] != sizes[1]  # three layers
    assert nodes.executor.blocks_per_frame == (1 << 16) / max(sizes)
    nodes.set_cache(5)
    answers = nodes.run([greedy(prompt, 4) for prompt in prompts[:12]])
    assert [answer.tokens for answer in answers] == [reference("llama", prompt, 4) for prompt in prompts[:12]]
    for cache, runner in zip(nodes.caches, nodes.runners, strict=True):
        used = int(5 * nodes.executor.blocks_per_frame) * runner.block_bytes
        assert used <= 5 << 16
        assert (cache[5 << 16 :] == 0xFF).all()
