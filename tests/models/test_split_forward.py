"""The parts of a model, run together, compute what the whole one does."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from computron.models import OpenGate, load_model, plan_model

CASES = [
    *(("generate", "llama", *group) for group in ((2, 1), (4, 1), (1, 2), (2, 2))),
    *(("generate", name, *group) for name in ("llama-tied", "opt", "opt-350m-like", "gpt2")
      for group in ((4, 1), (1, 2), (2, 2))),
    *(("generate", "llama-odd", *group) for group in ((3, 1), (6, 1), (1, 4), (3, 2))),
    *(("generate", name, 2, 2) for name in ("qwen2", "gemma2", "gemma3", "mistral", "phi3", "gpt-neox", "apertus")),
    ("generate", "qwen3", 4, 1),
    ("generate", "mixtral", 1, 3),
    *(("embed", "bert", *group) for group in ((4, 1), (1, 3), (2, 2))),
    *(("embed", name, 2, 2) for name in ("roberta", "distilbert", "electra", "modernbert", "llama")),
    ("embed", "mpnet", 4, 1),
    *(("classify", "vit", *group) for group in ((4, 1), (1, 3), (2, 2))),
    *(("classify", name, 2, 2) for name in ("bert", "deit", "llama")),
]  # fmt: skip
PRODUCTS = ("linear", "mm", "addmm", "bmm", "matmul", "conv2d", "convolution", "scaled_dot_product_attention")


def inputs(task, architecture, dtype=torch.float32):
    """Texts with padding in a batch, where padding is a task's business."""
    generator = torch.Generator().manual_seed(3)
    if architecture in ("vit", "deit"):
        return {"pixel_values": torch.rand((2, 3, 32, 32), generator=generator).to(dtype)}
    ids = torch.randint(2, 300, (2, 17), generator=generator)
    mask = torch.ones_like(ids)
    if task == "embed" and architecture != "llama":
        mask[1, 11:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def whole_output(config, filled, given):
    plan = plan_model(config)
    with torch.inference_mode():
        output = load_model(plan, filled(plan)).forward(**given)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("task", "architecture", "tensor_parallel", "pipeline_parallel"), CASES)
def test_parts_compute_what_the_whole_does(
    task, architecture, tensor_parallel, pipeline_parallel, checkpoint, config, filled, new_group
):
    model = config(checkpoint(task, architecture), task=task)
    given = inputs(task, architecture)
    expected = whole_output(model, filled, given)
    group = new_group(model, tensor_parallel, pipeline_parallel)
    result = group.result(**given)
    if tensor_parallel == 1:
        assert torch.equal(result, expected)
    else:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_half_precision_stays_half_precision(architecture, checkpoint, config, filled, new_group):
    model = config(checkpoint("generate", architecture), dtype="bfloat16")
    given = inputs("generate", architecture)
    expected = whole_output(model, filled, given)
    result = new_group(model, 2, 2).result(**given)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.03)


@pytest.mark.parametrize(
    ("task", "architecture", "group"),
    [("generate", "llama-tied", (2, 2)), ("generate", "opt-350m-like", (1, 3)), ("embed", "bert", (2, 1)),
     ("classify", "vit", (1, 2))],
)  # fmt: skip
def test_a_part_reads_no_tensor_before_its_stage(
    task, architecture, group, checkpoint, config, filled, filling_gate, new_group
):
    model = config(checkpoint(task, architecture), task=task)
    given = inputs(task, architecture)
    expected = whole_output(model, filled, given)
    parts = new_group(model, *group)
    gates = [filling_gate(plan) for plan in parts.plans]
    parts.models = [
        load_model(plan, gate.parameters, communicator=communicator)
        for plan, gate, communicator in zip(parts.plans, gates, parts.communicators, strict=True)
    ]
    for loaded, gate in zip(parts.models, gates, strict=True):
        loaded.gate = gate
    torch.testing.assert_close(parts.result(**given), expected, rtol=1e-4, atol=1e-5)
    for plan, gate in zip(parts.plans, gates, strict=True):
        assert sorted(gate.order) == list(range(len(plan.stages)))
        assert plan.image.segment_ends == plan.layout.segment_ends


def test_a_stage_asks_for_nothing_that_another_one_does(checkpoint, config, new_group):
    group = new_group(config(checkpoint("generate", "llama")), 2, 2)
    group.result(**inputs("generate", "llama"))
    first, last = group.communicators[0].calls, group.communicators[2].calls
    layers = [len([stage for stage in plan.stages if ".layers." in stage]) for plan in group.plans]
    assert first == ["all_reduce"] * (1 + 2 * layers[0]) + ["send"]  # the embedding, and two for each layer
    assert last == ["receive"] + ["all_reduce"] * 2 * layers[2] + ["all_gather"]
    assert layers[0] + layers[2] == 3


@pytest.mark.parametrize(
    ("task", "architecture"), [("generate", "opt-350m-like"), ("embed", "electra"), ("classify", "vit")]
)
def test_no_product_is_computed_on_two_stages(task, architecture, checkpoint, config, filled, new_group):
    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            if func.overloadpacket.__name__ in PRODUCTS and not any(tensor.is_meta for tensor in tensors):
                self.shapes.append(str([tuple(tensor.shape) for tensor in tensors]))
            return func(*args, **(kwargs or {}))

    def counted(model, _=0):
        with Products() as products:
            model.forward(**given)
        return products.shapes

    model = config(checkpoint(task, architecture), task=task)
    given = inputs(task, architecture)
    plan = plan_model(model)
    with torch.inference_mode():
        expected = counted(load_model(plan, filled(plan)))
    stages = new_group(model, 1, 3).run(counted)
    assert len(expected) > 6
    assert sorted(shape for stage in stages for shape in stage) == sorted(expected)


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(2, 1), (1, 2), (2, 2)])
def test_what_a_part_does_not_hold_takes_no_memory(tensor_parallel, pipeline_parallel, checkpoint, config, new_group):
    group = new_group(config(checkpoint("generate", "opt")), tensor_parallel, pipeline_parallel)
    for loaded, plan in zip(group.models, group.plans, strict=True):
        held = plan.layout.stage_of()
        absent = 0
        for name, parameter in loaded.module.named_parameters(remove_duplicate=False):
            assert not parameter.is_meta
            if name not in held:
                assert parameter.untyped_storage().nbytes() <= 4
                absent += 1
        assert absent > 0 or pipeline_parallel == 1


def test_a_part_needs_a_communicator(checkpoint, config, new_group, filled):
    plan = new_group(config(checkpoint("generate", "llama")), 1, 2).plans[0]
    with pytest.raises(ValueError, match="needs a communicator"):
        load_model(plan, filled(plan))


def test_an_error_of_the_communicator_ends_the_forward(checkpoint, config, new_group):
    class Broken(Exception):
        pass

    def fail(*_):
        raise Broken

    group = new_group(config(checkpoint("generate", "llama")), 1, 2)
    group.communicators[1].receive = fail
    group.models[1].gate = OpenGate()
    with pytest.raises(Broken), torch.inference_mode():
        group.models[1].forward(**inputs("generate", "llama"))
