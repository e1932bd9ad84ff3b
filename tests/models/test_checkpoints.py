"""What is wrong with a checkpoint is said before its weights are read: which file, which tensor, what to do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from computron.errors import CheckpointError, ConfigError
from computron.models import load_model, plan_model

WEIGHTS = "model.safetensors"


def logits(module):
    with torch.inference_mode():
        return module(input_ids=torch.arange(2, 14)[None]).logits


def rewrite(folder, change):
    """Save the weights again after change(tensors)."""
    tensors = load_file(folder / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_sharded_checkpoint_is_read_like_a_whole_one(new_checkpoint, checkpoint, config, filled):
    folder = new_checkpoint("generate", "llama", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    sharded = plan_model(config(folder))
    assert torch.equal(filled(sharded), filled(plan_model(config(checkpoint("generate", "llama")))))


def test_a_missing_shard_is_named(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama", max_shard_size="40KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"it names {shard.name}, which is missing; fetch"):
        plan_model(config(folder))


def test_a_tensor_that_its_shard_lacks_is_named(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama", max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tensor model\.extra\.weight is missing"):
        plan_model(config(folder))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_corrupt_index_is_refused(text, new_checkpoint, config):
    folder = new_checkpoint("generate", "llama", max_shard_size="40KB")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="corrupt index"):
        plan_model(config(folder))


def test_a_truncated_file_is_refused_with_what_is_missing(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1000])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: truncated, tensor .+ \(1000 bytes are missing\); fetch"):
        plan_model(config(folder))


@pytest.mark.parametrize("length", [0, 7, 40])
def test_a_file_without_a_whole_header_is_refused(length, new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: truncated, or not a safetensors file"):
        plan_model(config(folder))


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[1, 2]",
        b'{"w": 3}',
        b'{"w": {"dtype": "F32", "shape": [2]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"w": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 4]}}',
        b"\xff\xfe",
    ],
)
def test_a_corrupt_header_is_refused(header, new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: corrupt safetensors header"):
        plan_model(config(folder))


def test_a_type_that_torch_cannot_hold_is_refused(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    header = b'{"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match="tensor w is of type F4, which is not supported; convert"):
        plan_model(config(folder))


def test_a_missing_tensor_is_named_with_how_many_more(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if "layers.1" not in name})
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.\S+ and 8 more of Llama\S+ is missing"):
        plan_model(config(folder))


def test_a_wrong_shape_is_refused_with_both_shapes(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")

    def shrink(tensors):
        tensors["model.norm.weight"] = torch.ones(31)

    rewrite(folder, shrink)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[31\], LlamaForCausalLM needs \[32\]"):
        plan_model(config(folder))


def test_a_base_model_cannot_classify(checkpoint, config):
    with pytest.raises(CheckpointError, match=r"tensor classifier.* is missing; .* task that it was trained for"):
        plan_model(config(checkpoint("embed", "bert"), task="classify"))


def test_weights_without_safetensors_are_named(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"it has pytorch_model\.bin; save the checkpoint with safetensors"):
        plan_model(config(folder))


def test_a_folder_without_config_is_refused(tmp_path, config):
    with pytest.raises(CheckpointError) as caught:
        plan_model(config(tmp_path))
    assert caught.value.message.startswith(f'model "m": {tmp_path}/config.json is missing; ')


@pytest.mark.parametrize("text", ["{", '{"model_type": "nothing-known"}', "[]"])
def test_a_config_that_transformers_cannot_read_is_refused(text, tmp_path, config):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: transformers cannot read it"):
        plan_model(config(tmp_path))


def test_a_quantized_checkpoint_is_refused(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the checkpoint is quantized, which is not supported"):
        plan_model(config(folder))


def test_a_checkpoint_without_tokenizer_is_refused(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot load a tokenizer.*put tokenizer\.json"):
        plan_model(config(folder))


@pytest.mark.parametrize("source", ["./no/such/folder", "/no/such/folder", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(source, config):
    with pytest.raises(CheckpointError, match="there is no folder"):
        plan_model(config(source))


def test_a_hub_id_without_network_says_what_to_do(config, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        plan_model(config("some-org/some-model"))
    message = caught.value.message
    assert message.startswith(
        'model "m": source "some-org/some-model" is no folder, and taken as a hub id it could not'
    )
    assert "the hub cannot be reached (Cannot reach https://huggingface.co/" in message
    assert message.endswith("give the path of a checkpoint folder, or fetch it where there is a network")
    assert "Error" not in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            "RepositoryNotFoundError",
            "is neither a folder nor a model on the hub; if it is a private one, log in with `hf auth login`",
        ),
        ("RevisionNotFoundError", "has no revision main on the hub"),
        ("GatedRepoError", "is gated; accept its terms on the hub and log in with `hf auth login`"),
    ],
)
def test_what_the_hub_does_not_give_is_told_in_words(error, words, config, monkeypatch):
    def refuse(*_, **__):
        raise getattr(huggingface_hub.errors, error)("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError) as caught:
        plan_model(config("some-org/some-model"))
    assert caught.value.message == f'model "m": source "some-org/some-model" {words}'


@pytest.mark.parametrize(("source", "words"), [("", "source is missing"), ("what is this", "neither a folder nor")])
def test_a_source_that_can_mean_nothing_is_a_mistake_in_the_configuration(source, words, config):
    with pytest.raises(ConfigError, match=words):
        plan_model(config(source))


def test_names_without_the_base_models_prefix_are_found(new_checkpoint, config, filled):
    folder = new_checkpoint("generate", "llama")
    before = filled(plan_model(config(folder)))
    rewrite(folder, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert torch.equal(filled(plan_model(config(folder))), before)


def test_old_names_of_layer_norms_are_found(new_checkpoint, config, filled):
    folder = new_checkpoint("embed", "bert")
    before = filled(plan_model(config(folder, task="embed")))

    def age(tensors):
        return {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()
        }

    rewrite(folder, age)
    assert torch.equal(filled(plan_model(config(folder, task="embed"))), before)


def test_tensors_that_the_architecture_does_not_know_are_left_out(new_checkpoint, config, filled):
    folder = new_checkpoint("generate", "llama")
    before = filled(plan_model(config(folder)))

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["optimizer.step"] = torch.ones(1)

    rewrite(folder, add)
    assert torch.equal(filled(plan_model(config(folder))), before)


def test_a_tied_head_that_is_saved_too_is_stored_once(new_checkpoint, config, filled):
    folder = new_checkpoint("generate", "llama-tied")
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert plan_model(config(folder)).aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_tied_head_that_differs_is_not_tied(new_checkpoint, config, filled):
    folder = new_checkpoint("generate", "llama-tied")
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2})
    plan = plan_model(config(folder))
    assert plan.aliases == {}
    model = load_model(plan, filled(plan))
    assert torch.equal(logits(model.module), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_only_the_head_saved_is_enough_for_a_tied_pair(new_checkpoint, config, filled):
    folder = new_checkpoint("generate", "llama-tied")

    def swap(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    rewrite(folder, swap)
    plan = plan_model(config(folder))
    assert plan.aliases == {"model.embed_tokens.weight": "lm_head.weight"}
    assert plan.layout.stage_of()["model.embed_tokens.weight"] == 0
    model = load_model(plan, filled(plan))
    assert torch.equal(logits(model.module), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_fused_experts_are_loaded_through_transformers(checkpoint, config):
    plan = plan_model(config(checkpoint("generate", "mixtral")))
    assert plan.image.extents(0, plan.image.nbytes) is None


def test_a_longer_context_than_the_checkpoints_is_refused(checkpoint, config):
    folder = checkpoint("generate", "llama")
    assert plan_model(config(folder)).max_model_len == 64
    assert plan_model(config(folder, max_model_len=32)).max_model_len == 32
    with pytest.raises(ConfigError, match=r"max_model_len = 65 is more than the 64 .* set it to 64 or less"):
        plan_model(config(folder, max_model_len=65))


def test_a_context_without_end_must_be_given_one(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 0}))
    with pytest.raises(ConfigError, match="names no longest context; set max_model_len"):
        plan_model(config(folder))
    assert plan_model(config(folder, max_model_len=500)).max_model_len == 500


def test_positions_that_roberta_reserves_for_padding_do_not_count(checkpoint, config):
    assert plan_model(config(checkpoint("embed", "roberta"), task="embed")).max_model_len == 62
