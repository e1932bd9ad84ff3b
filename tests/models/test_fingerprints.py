"""A model's fingerprint is the same wherever its source is and whichever part of it is planned, and no other's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from computron.config import ModelConfig
from computron.models import Shard, fingerprint, plan_model
from computron.models.checkpoint import checkpoint_tensors

WEIGHTS = "model.safetensors"


def of(config: ModelConfig, shard: Shard = Shard()) -> str:  # noqa: B008 -- frozen
    return plan_model(config, shard).fingerprint


def flip(file: Path, offset: int) -> None:
    """Change one byte."""
    with file.open("r+b") as content:
        content.seek(offset)
        (byte,) = content.read(1)
        content.seek(offset)
        content.write(bytes([byte ^ 1]))


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def linear(size: int = 4, shard: Shard = Shard()) -> nn.Module:  # noqa: B008 -- frozen
    return nn.Linear(size, size // shard.tensor_parallel)


def other_linear(size: int = 4) -> nn.Module:
    return nn.Linear(size, size)


def test_every_part_of_a_model_has_the_fingerprint_of_the_whole(checkpoint, config):
    model = config(checkpoint("generate", "llama"))
    parts = [Shard(2, 1), Shard(1, 0, 3, 1), Shard(2, 0, 2, 1)]
    assert {of(model, part) for part in parts} == {of(model)}
    assert len(of(model)) == 32


@pytest.mark.parametrize(("task", "name"), [("generate", "llama"), ("embed", "bert"), ("classify", "vit")])
def test_a_copy_in_another_folder_has_the_same_one(task, name, checkpoint, config, tmp_path):
    folder = checkpoint(task, name)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert of(config(copy, task=task)) == of(config(folder, task=task))


def test_another_process_finds_the_same_one(checkpoint, config):
    folder = checkpoint("embed", "bert")
    program = (
        "from computron.config import ModelConfig; from computron.models import plan_model; "
        f"print(plan_model(ModelConfig(id='m', task='embed', source={str(folder)!r})).fingerprint)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert said.stdout.strip() == of(config(folder, task="embed"))


def test_it_does_not_matter_how_tensors_are_spread_over_files(checkpoint, config, new_checkpoint):
    sharded = new_checkpoint("generate", "llama", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert of(config(sharded)) == of(config(checkpoint("generate", "llama")))


def test_another_architecture_or_dtype_of_the_files_is_another_model(checkpoint, config):
    folders = [checkpoint("generate", "llama"), checkpoint("generate", "qwen2"),
               checkpoint("generate", "llama", torch.bfloat16)]  # fmt: skip
    assert len({of(config(folder)) for folder in folders}) == 3


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.norm.weight"])
def test_one_byte_of_a_weight_that_differs_is_seen(tensor, place, new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    before = of(config(folder))
    held = checkpoint_tensors(folder)[tensor]
    assert (held.nbytes > 3 * fingerprint.SAMPLE) == (tensor == "model.embed_tokens.weight")
    flip(held.path, held.offset + int(place * (held.nbytes - 1)))
    assert of(config(folder)) != before


def test_what_it_cannot_see_is_as_documented(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    before = of(config(folder))
    held = checkpoint_tensors(folder)["model.embed_tokens.weight"]
    flip(held.path, held.offset + fingerprint.SAMPLE)
    assert of(config(folder)) == before


def test_tensors_that_swapped_their_names_are_seen(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    before = of(config(folder))
    tensors = load_file(folder / WEIGHTS)
    q, k = (f"model.layers.{layer}.input_layernorm.weight" for layer in range(2))
    tensors[q], tensors[k] = tensors[k], tensors[q]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert of(config(folder)) != before


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config.json", "rms_norm_eps", 1e-3),
        ("config.json", "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("generation_config.json", "temperature", 0.25),
        ("tokenizer_config.json", "clean_up_tokenization_spaces", True),
    ],
)
def test_a_changed_setting_is_seen(file, field, value, new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    before = of(config(folder))
    edit(folder / file, **{field: value})
    assert of(config(folder)) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_changed_tokenizer_is_seen(name, new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    before = of(config(folder))
    file = folder / name
    file.write_text((file.read_text() if file.exists() else "") + " ")
    assert of(config(folder)) != before


def test_files_that_no_model_is_made_of_do_not_matter(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    before = of(config(folder))
    edit(folder / "config.json", transformers_version="0.0.1", _name_or_path="/where/it/was")
    (folder / "README.md").write_text("notes")
    (folder / "trainer_state.json").write_text("{}")
    os.utime(folder / WEIGHTS, (1, 1))
    assert of(config(folder)) == before


def test_a_chat_template_is_compared_by_its_text(checkpoint, config, tmp_path):
    def templated(folder: str, text: str) -> str:
        file = tmp_path / folder / "chat.jinja"
        file.parent.mkdir()
        file.write_text(text)
        return of(config(checkpoint("generate", "llama"), chat_template=str(file)))

    assert templated("a", "{{ messages }}") == templated("b", "{{ messages }}")
    assert templated("c", "{{ 1 }}") != templated("d", "{{ 2 }}")


def test_how_embeddings_are_made_is_seen(checkpoint, config):
    folder = checkpoint("embed", "bert")
    assert of(config(folder, task="embed")) != of(config(folder, task="embed", pooling="cls"))


def test_a_random_model_is_its_config_and_seed(checkpoint, config, tmp_path):
    model = config("random:opt-125m")
    assert of(model) == of(model, Shard(2, 1)) == of(replace(model, id="other"))
    assert of(model) != of(replace(model, seed=1))
    assert of(model) != of(config("random:opt-350m"))
    copy = shutil.copytree(checkpoint("generate", "llama"), tmp_path / "copy")
    (copy / WEIGHTS).unlink()
    assert of(config(f"random:{copy}")) == of(config(f"random:{checkpoint('generate', 'llama')}"))


def test_a_custom_model_is_its_factory_and_arguments(tmp_path, monkeypatch):
    def custom(factory: str, **fields: object) -> ModelConfig:
        return ModelConfig(id="m", task="custom", factory=f"{__name__}:{factory}", **fields)  # type: ignore[arg-type]

    model = custom("linear", arguments={"size": 8})
    assert of(model) == of(model, Shard(2, 1))
    others = [custom("linear"), custom("other_linear", arguments={"size": 8}), replace(model, seed=1),
              replace(model, dtype="float16")]  # fmt: skip
    assert len({of(other) for other in (model, *others)}) == 5


def test_a_factorys_file_may_lie_elsewhere_but_must_hold_the_same(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "from torch import nn\ndef make(): return nn.Linear(2, 2)\n"

    def written(module: str, text: str) -> str:
        (tmp_path / f"{module}.py").write_text(text)
        return of(ModelConfig(id="m", task="custom", factory=f"{module}:make"))

    assert written("one_factory", code) == written("same_factory", code)
    assert written("one_factory", code) != written("changed_factory", code + "\n")


def test_of_very_many_tensors_some_are_sampled_and_all_names_count(tmp_path, checkpoint, config, monkeypatch):
    model = config(checkpoint("generate", "llama"))
    full = of(model)
    monkeypatch.setattr(fingerprint, "MAX_SAMPLED", 5)
    read = []
    monkeypatch.setattr(fingerprint, "_read", lambda file, tensor, offset, nbytes: read.append(tensor.name) or b"")
    assert of(model) != full
    assert len(set(read)) == 5
    first = sorted(read)
    read.clear()
    of(model)
    assert sorted(read) == first
