from __future__ import annotations

import math

import pytest
import torch

from computron.errors import ConfigError
from computron.models import load_model, plan_model
from computron.models.presets import PRESETS, preset_config

# Parameters as the papers give them, in millions.
PUBLISHED = {
    "opt-125m": 125, "opt-350m": 331, "opt-1.3b": 1316, "opt-2.7b": 2652, "opt-6.7b": 6658, "opt-13b": 12853,
    "opt-30b": 29975, "opt-66b": 65719, "opt-175b": 174604, "smollm2-135m": 135, "tinyllama-1.1b": 1100,
    "llama-3.2-1b": 1236, "llama-2-7b": 6738, "llama-3-8b": 8030, "llama-2-13b": 13016, "llama-3-70b": 70554,
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_number_of_parameters(preset, config):
    plan = plan_model(config(f"random:{preset}"))
    parameters = sum(math.prod(slot.shape) for slot in plan.tensors) / 1e6
    assert parameters == pytest.approx(PUBLISHED[preset], rel=0.005, abs=0.5)


def test_a_preset_of_175b_is_planned_without_making_a_weight(config):
    plan = plan_model(config("random:opt-175b"))
    assert plan.image.nbytes > 349e9
    assert len(plan.stages) == 97
    buffer = bytearray(4096)
    plan.image.read_into(plan.image.nbytes // 2, memoryview(buffer))
    assert any(buffer)


@pytest.mark.parametrize("what", ["folder", "config.json"])
def test_a_config_alone_makes_a_model_that_runs(what, checkpoint, config, filled, tmp_path):
    folder = checkpoint("generate", "llama")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    source = tmp_path if what == "folder" else tmp_path / "config.json"
    plan = plan_model(config(f"random:{source}"))
    model = load_model(plan, filled(plan))
    with torch.inference_mode():
        logits = model.module(input_ids=torch.tensor([model.encode("hello")])).logits
    assert bool(logits.isfinite().all())
    assert model.render_chat([{"role": "user", "content": "x"}]).endswith("assistant:")


def test_the_seed_decides(checkpoint, config, filled):
    source = f"random:{checkpoint('generate', 'llama')}"
    images = [filled(plan_model(config(source, seed=seed))) for seed in (0, 0, 1)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_what_is_neither_path_nor_preset_is_refused_with_the_presets(config):
    with pytest.raises(ConfigError, match=r"neither a folder, nor a config\.json, nor one of the presets opt-125m"):
        plan_model(config("random:opt-1t"))


def test_presets_are_held_in_half_precision():
    assert preset_config("opt-13b").dtype == torch.float16
    assert preset_config("llama-3-8b").dtype == torch.bfloat16
