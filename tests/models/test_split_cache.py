"""Generation over the paged cache of each node: only its own heads and layers are kept, and answers stay the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from computron.execution.executor import make_runner
from computron.execution.steps import GenerateStep, TokenBatch
from computron.models import CacheGeometry, OpenGate, load_model, plan_model

CACHE_BYTES = 1 << 18
CASES = [
    *(("llama", *group) for group in ((2, 1), (4, 1), (1, 3), (2, 2))),
    *((name, 2, 2) for name in ("opt", "opt-350m-like", "gpt2", "qwen3", "gemma3", "phi3", "llama-tied")),
    ("llama-odd", 3, 2),
]


def batch(tokens, starts, lengths, blocks, rows):
    return TokenBatch(*(np.array(each, np.int64) for each in (tokens, starts, lengths, blocks, rows)))


def steps():
    """Two prompts, the longer one in two chunks; then one more token of each."""
    tokens = torch.randint(2, 300, (44,), generator=torch.Generator().manual_seed(5)).tolist()
    none = np.zeros(0, np.int64)
    first = (
        batch(tokens[:25], [0, 0], [20, 5], [1, 2, 0], [19, 24]),
        batch(tokens[25:42], [20], [17], [1, 2, 4], [16]),
    )
    second = batch(tokens[42:], [37, 5], [1, 1], [1, 2, 4, 0], [0, 1])
    return [GenerateStep(first, np.arange(5), greedy=False), GenerateStep((second,), none, greedy=False)]


def run(model):
    runner = make_runner(model, torch.full((CACHE_BYTES,), 0xFF, dtype=torch.uint8))
    return [runner.run(step, OpenGate()) for step in steps()]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(model, tensor_parallel, pipeline_parallel, filled, new_group, rtol=1e-4, atol=1e-5):
    plan = plan_model(model)
    expected = run(load_model(plan, filled(plan)))
    group = new_group(model, tensor_parallel, pipeline_parallel)
    outputs = group.run(lambda part, _: run(part))
    for shard, output in zip(group.shards, outputs, strict=True):
        if not shard.gives_result:
            assert output == [None, None]
            continue
        for given, known in zip(output, expected, strict=True):
            torch.testing.assert_close(given.logits, known.logits, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("architecture", "tensor_parallel", "pipeline_parallel"), CASES)
def test_paged_logits_equal_those_of_the_whole(
    architecture, tensor_parallel, pipeline_parallel, checkpoint, config, filled, new_group
):
    check(config(checkpoint("generate", architecture)), tensor_parallel, pipeline_parallel, filled, new_group)


@pytest.mark.parametrize("architecture", ["opt-350m-like", "gpt2"])
def test_linears_that_are_sped_up_still_talk(architecture, checkpoint, config, filled, new_group):
    model = config(checkpoint("generate", architecture), dtype="bfloat16")
    check(model, 2, 2, filled, new_group, rtol=0.05, atol=0.03)


def test_scales_that_depend_on_the_layers_number_stay(new_checkpoint, config, filled, new_group):
    folder = new_checkpoint("generate", "gpt2")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scale_attn_by_inverse_layer_idx": True}))
    check(config(folder), 1, 3, filled, new_group)


@pytest.mark.parametrize(
    ("architecture", "tensor_parallel", "pipeline_parallel", "heads", "layers"),
    [
        ("llama", 2, 1, 1, [3]),
        ("llama", 4, 1, 1, [3]),  # two key-value heads, each on two nodes
        ("gpt2", 2, 2, 2, [1, 2]),
        ("phi3", 2, 1, 2, [3]),  # its fused projection is joined before the attention
        ("llama-odd", 3, 2, 1, [2, 2]),
    ],
)
def test_geometry_is_the_parts(
    architecture, tensor_parallel, pipeline_parallel, heads, layers, checkpoint, config, new_group
):
    group = new_group(config(checkpoint("generate", architecture)), tensor_parallel, pipeline_parallel)
    for shard, plan in zip(group.shards, group.plans, strict=True):
        assert plan.cache == CacheGeometry(layers[shard.stage], heads, 8, 8, torch.float32)


def test_limits_are_the_whole_models(checkpoint, config, new_group):
    model = config(checkpoint("generate", "llama-odd"))
    whole = plan_model(model)
    for plan in new_group(model, 3, 2).plans:
        assert (plan.vocabulary, plan.max_model_len) == (whole.vocabulary, whole.max_model_len) == (301, 64)
        assert plan.architecture == whole.architecture
        assert plan.generation == whole.generation
