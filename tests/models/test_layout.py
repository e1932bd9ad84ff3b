from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from computron.models import plan_model
from computron.models.layout import ALIGNMENT, lay_out, main_list, module_stages

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])
SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@given(st.lists(st.lists(st.tuples(DTYPES, SHAPES), max_size=5), max_size=5))
def test_tensors_are_aligned_disjoint_and_in_stage_order(stages):
    described = {f"{i}.{j}": tensor for i, stage in enumerate(stages) for j, tensor in enumerate(stage)}
    layout = lay_out(
        [(str(i), [f"{i}.{j}" for j in range(len(stage))]) for i, stage in enumerate(stages)], described, {}
    )
    end = 0
    for slot in layout.slots:
        assert slot.offset % ALIGNMENT == 0
        assert slot.offset >= end
        assert slot.nbytes == torch.empty(slot.shape, dtype=slot.dtype).nbytes
        end = slot.offset + slot.nbytes
    assert end <= layout.nbytes
    assert list(layout.segment_ends) == sorted(layout.segment_ends)
    assert len(layout.stages) == len(layout.segment_ends) == max(len(stages), 1)
    for name, stage in layout.stage_of().items():
        slot = next(s for s in layout.slots if s.name == name)
        if slot.nbytes:
            assert stage == int(name.split(".")[0])


@pytest.mark.parametrize(
    ("task", "architecture", "stages"),
    [
        ("generate", "llama", ["embeddings", "model.layers.0", "model.layers.1", "model.layers.2", "head"]),
        ("generate", "gpt2", ["embeddings", "transformer.h.0", "transformer.h.1", "transformer.h.2", "head"]),
        ("generate", "opt", ["embeddings", *(f"model.decoder.layers.{i}" for i in range(3))]),
        ("embed", "bert", ["embeddings", *(f"encoder.layer.{i}" for i in range(3))]),
        ("classify", "bert", ["embeddings", *(f"bert.encoder.layer.{i}" for i in range(3)), "head"]),
    ],
)
def test_a_stage_for_the_embeddings_each_layer_and_the_head(task, architecture, stages, checkpoint, config):
    plan = plan_model(config(checkpoint(task, architecture), task=task))
    assert list(plan.stages) == stages


def test_a_tied_head_stands_with_the_embeddings(checkpoint, config):
    plan = plan_model(config(checkpoint("generate", "llama-tied")))
    assert plan.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert plan.layout.stage_of()["lm_head.weight"] == 0
    assert "lm_head.weight" not in {slot.name for slot in plan.tensors}


def test_main_list_is_the_outermost_of_the_largest():
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module = nn.ModuleDict({"small": nn.ModuleList([nn.Linear(2, 2)] * 2), "body": nn.ModuleList([inner, nn.ReLU()])})
    assert main_list(module) == "body"


def test_a_module_without_lists_has_a_stage_for_each_child():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)

    module = Plain()
    stages = module_stages(module, dict(module.named_parameters()))
    assert [name for name, _ in stages] == ["a", "b.0", "b.1", "c"]


def test_tiny_pieces_join_the_next_stage():
    module = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 400), nn.Linear(400, 4), nn.LayerNorm(4))
    stages = module_stages(module, dict(module.named_parameters()))
    assert [tensors for _, tensors in stages] == [
        ["0.weight", "0.bias", "1.weight", "1.bias"],
        ["2.weight", "2.bias", "3.weight", "3.bias"],
    ]


def test_a_module_without_tensors_has_an_empty_image():
    layout = lay_out(module_stages(nn.ReLU(), {}), {}, {})
    assert (layout.nbytes, layout.stages, layout.segment_ends) == (0, ("all",), (0,))
