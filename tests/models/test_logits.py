"""A module bound to an image computes what transformers' own does, bit for bit."""

from __future__ import annotations

import pytest
import torch

from computron.models import load_model, plan_model

CASES = [
    *(("generate", name) for name in (
        "llama", "llama-tied", "opt", "opt-350m-like", "gpt2", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3",
        "gpt-neox", "mixtral",
    )),
    *(("embed", name) for name in ("bert", "roberta", "llama")),
    *(("classify", name) for name in ("bert", "llama", "vit")),
]  # fmt: skip


def inputs(architecture: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if architecture == "vit":
        return {"pixel_values": torch.rand((2, 3, 32, 32), generator=generator).to(dtype)}
    return {"input_ids": torch.randint(2, 300, (2, 17), generator=generator)}


def first_output(module: torch.nn.Module, **arguments: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output = module(**arguments)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("task", "architecture"), CASES)
def test_logits_equal_those_of_from_pretrained(task, architecture, dtype, checkpoint, config, filled, auto):
    folder = checkpoint(task, architecture, dtype)
    plan = plan_model(config(folder, task=task))
    assert plan.dtype == dtype
    model = load_model(plan, filled(plan))
    reference = auto(task, architecture).from_pretrained(folder)
    given = inputs(architecture, dtype)
    assert torch.equal(first_output(model.module, **given), first_output(reference, **given))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("task", "architecture"), [("generate", "llama-tied"), ("generate", "gpt2"), ("embed", "bert")]
)
def test_configured_dtype_is_what_from_pretrained_casts_to(task, architecture, dtype, checkpoint, config, filled, auto):
    folder = checkpoint(task, architecture)
    plan = plan_model(config(folder, task=task, dtype=dtype))
    model = load_model(plan, filled(plan))
    reference = auto(task, architecture).from_pretrained(folder, dtype=getattr(torch, dtype))
    given = inputs(architecture, plan.dtype)
    assert torch.equal(first_output(model.module, **given), first_output(reference, **given))
    assert plan.image.extents(0, plan.image.nbytes) is None


@pytest.mark.parametrize(("task", "architecture"), CASES)
def test_every_tensor_is_a_view_of_the_range(task, architecture, checkpoint, config, filled):
    plan = plan_model(config(checkpoint(task, architecture), task=task))
    parameters = filled(plan)
    module = load_model(plan, parameters).module
    assert not module.training
    low, high = parameters.data_ptr(), parameters.data_ptr() + len(parameters)
    for parameter in module.parameters():
        assert low <= parameter.data_ptr() < high
        assert not parameter.requires_grad
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def test_loading_reads_nothing_of_the_range(checkpoint, config, filled):
    plan = plan_model(config(checkpoint("generate", "llama"), task="generate"))
    parameters = torch.full((plan.image.nbytes,), 0xFF, dtype=torch.uint8)
    model = load_model(plan, parameters)
    assert bool((parameters == 0xFF).all())
    given = inputs("llama", torch.float32)
    assert bool(first_output(model.module, **given).isnan().all())
    parameters.copy_(filled(plan))
    assert not bool(first_output(model.module, **given).isnan().any())


def test_a_range_that_is_too_small_is_refused(checkpoint, config):
    plan = plan_model(config(checkpoint("generate", "llama")))
    with pytest.raises(ValueError, match="flat uint8 tensor of at least"):
        load_model(plan, torch.empty(plan.image.nbytes - 1, dtype=torch.uint8))


def test_keep_in_float32_plans_of_transformers_are_respected(checkpoint, config, filled, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})
    plan = plan_model(config(checkpoint("generate", "llama"), dtype="bfloat16"))
    assert {slot.dtype for slot in plan.tensors if slot.name == "model.norm.weight"} == {torch.float32}
    assert {slot.dtype for slot in plan.tensors if "proj" in slot.name} == {torch.bfloat16}
    load_model(plan, filled(plan))
