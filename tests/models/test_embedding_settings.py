from __future__ import annotations

import json

import pytest
import torch

from computron.errors import CheckpointError
from computron.models import load_model, plan_model

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


def describe(folder, modules, pooling):
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling_is_what_the_checkpoint_says(pooling, expected, new_checkpoint, config):
    folder = describe(new_checkpoint("embed", "bert"), [TRANSFORMER, POOLING], pooling)
    settings = plan_model(config(folder, task="embed")).embedding
    assert (settings.pooling, settings.normalize) == (expected, False)


def test_a_normalize_module_normalizes(new_checkpoint, config):
    folder = describe(
        new_checkpoint("embed", "bert"), [TRANSFORMER, POOLING, NORMALIZE], {"pooling_mode_mean_tokens": True}
    )
    assert plan_model(config(folder, task="embed")).embedding.normalize is True


def test_the_configuration_overrides_the_checkpoint(new_checkpoint, config):
    folder = describe(
        new_checkpoint("embed", "bert"), [TRANSFORMER, POOLING, NORMALIZE], {"pooling_mode_max_tokens": True}
    )
    settings = plan_model(config(folder, task="embed", pooling="last", normalize=False)).embedding
    assert (settings.pooling, settings.normalize) == ("last", False)


@pytest.mark.parametrize(
    ("modules", "pooling", "words"),
    [
        ([TRANSFORMER, POOLING, DENSE], {"pooling_mode_mean_tokens": True}, "Dense on top of the transformer"),
        ([TRANSFORMER, POOLING], {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens pooling is not served"),
        ([TRANSFORMER, POOLING], {}, "no pooling is not served; set pooling to"),
    ],
)
def test_what_is_not_served_is_refused(modules, pooling, words, new_checkpoint, config):
    folder = describe(new_checkpoint("embed", "bert"), modules, pooling)
    with pytest.raises(CheckpointError, match=words):
        plan_model(config(folder, task="embed"))


@pytest.mark.parametrize(("architecture", "pooling"), [("bert", "mean"), ("llama", "last")])
def test_without_a_word_from_the_checkpoint_the_architecture_decides(architecture, pooling, checkpoint, config):
    settings = plan_model(config(checkpoint("embed", architecture), task="embed")).embedding
    assert (settings.pooling, settings.normalize) == (pooling, True)


def test_the_length_that_the_checkpoint_was_made_for_is_the_limit(new_checkpoint, config):
    folder = describe(new_checkpoint("embed", "bert"), [TRANSFORMER, POOLING], {"pooling_mode_mean_tokens": True})
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    assert plan_model(config(folder, task="embed")).max_model_len == 24


def test_the_pooler_is_left_out(checkpoint, config, filled):
    plan = plan_model(config(checkpoint("embed", "bert"), task="embed"))
    assert not any("pooler" in slot.name for slot in plan.tensors)
    module = load_model(plan, filled(plan)).module
    with torch.inference_mode():
        assert module(input_ids=torch.arange(2, 9)[None]).pooler_output is None
