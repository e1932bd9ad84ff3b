"""Every module waits for its own weights: a gate that brings them on the wait shows that nothing is read before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from computron.errors import SwapFailed
from computron.models import OpenGate, load_model, plan_model
from computron.models.gates import StageWaits, waiting_points
from computron.models.layout import lay_out, module_stages, persistent_tensors

CASES = [
    *(("generate", name) for name in ("llama", "llama-tied", "opt", "opt-350m-like", "gpt2", "gemma3", "gpt-neox")),
    ("generate", "mixtral"),
    *(("embed", name) for name in ("bert", "roberta", "llama")),
    *(("classify", name) for name in ("bert", "llama", "vit")),
]


@pytest.mark.parametrize(("task", "architecture"), CASES)
def test_forward_reads_no_tensor_before_its_stage(task, architecture, checkpoint, config, filled, filling_gate, auto):
    folder = checkpoint(task, architecture)
    plan = plan_model(config(folder, task=task))
    gate = filling_gate(plan)
    model = load_model(plan, gate.parameters)
    model.gate = gate
    tokens, pixels = torch.arange(2, 14)[None], torch.ones(1, 3, 32, 32)
    given = {"pixel_values": pixels} if plan.takes_images else {"input_ids": tokens}
    with torch.inference_mode():
        output = model.module(**given)[0]
        expected = auto(task, architecture).from_pretrained(folder)(**given)[0]
    assert torch.equal(output, expected)
    assert gate.order == list(range(len(plan.stages)))


def test_each_layer_starts_when_its_own_stage_is_there(checkpoint, config, filling_gate):
    plan = plan_model(config(checkpoint("generate", "llama")))
    gate = filling_gate(plan)
    model = load_model(plan, gate.parameters)
    model.gate = gate
    waited_at_layer = []
    for layer in model.module.model.layers:
        layer.register_forward_hook(lambda *_: waited_at_layer.append(len(gate.order)))
    with torch.inference_mode():
        model.module(input_ids=torch.arange(2, 6)[None])
    assert waited_at_layer == [2, 3, 4]  # the embeddings, and the layers up to this one


def test_a_failed_wait_ends_the_forward(checkpoint, config, filled):
    class FailingGate:
        is_open = False

        def wait(self, segment, stream=0):
            if segment == 2:
                raise SwapFailed("the link broke")

    plan = plan_model(config(checkpoint("generate", "llama")))
    model = load_model(plan, filled(plan))
    model.gate = FailingGate()
    with pytest.raises(SwapFailed, match="the link broke"), torch.inference_mode():
        model.module(input_ids=torch.arange(2, 6)[None])


def test_an_open_gate_leaves_no_hooks(checkpoint, config, filling_gate):
    plan = plan_model(config(checkpoint("generate", "llama")))
    gate = filling_gate(plan)
    model = load_model(plan, gate.parameters)
    model.gate = gate
    assert any(module._forward_pre_hooks for module in model.module.modules())
    model.gate = OpenGate()
    assert not any(module._forward_pre_hooks for module in model.module.modules())


def test_a_gate_that_is_set_again_is_waited_for_again(checkpoint, config, filling_gate):
    plan = plan_model(config(checkpoint("generate", "llama")))
    gate = filling_gate(plan)
    model = load_model(plan, gate.parameters)
    for _ in range(2):
        model.gate = gate
        with torch.inference_mode():
            model.module(input_ids=torch.arange(2, 6)[None])
    assert gate.order == [*range(len(plan.stages))] * 2


class Unordered(nn.Module):
    """Registered in one order, used in another; reads a child's weight without calling it; skips a layer's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.last = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * self.scale
        for layer in reversed(self.layers):
            x = layer[2](torch.relu(layer[0](x)))
        x, _ = self.attention(x, x, x)
        return self.last(x)


def test_a_module_used_out_of_order_still_waits(filling_gate):
    torch.manual_seed(0)
    module = Unordered().eval().requires_grad_(False)
    x = torch.randn(2, 3, 8)
    expected = module(x)
    tensors = dict(persistent_tensors(module))
    layout = lay_out(module_stages(module, tensors), {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {})
    stage_of = layout.stage_of()
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.fill_(float("nan"))

    class CopyingGate:
        is_open = False

        def wait(self, segment: int, stream: int = 0) -> None:
            for name, stage in stage_of.items():
                if stage == segment:
                    tensors[name].copy_(held[name])

    StageWaits(module, stage_of, torch.device("cpu")).set(CopyingGate())
    assert torch.equal(module(x), expected)


def test_owners_of_tensors_and_tops_of_stages_are_waiting_points():
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU(), nn.Linear(2, 2))
    points = waiting_points(module, {"0.0.weight": 0, "0.0.bias": 0, "2.weight": 1, "2.bias": 1})
    assert [(type(point).__name__, stage) for point, stage in points] == [
        ("Sequential", 0),
        ("Linear", 0),
        ("Linear", 1),
    ]
