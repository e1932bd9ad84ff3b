from __future__ import annotations

import json

import pytest
import torch

from computron.errors import BadRequest, CheckpointError
from computron.models import load_model, plan_model
from computron.models.byte_tokenizer import byte_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def loaded(config):
    def load(folder, **fields):
        plan = plan_model(config(folder, **fields))
        return load_model(plan, torch.empty(plan.image.nbytes, dtype=torch.uint8))

    return load


def without_template(folder):
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    return folder


def test_text_survives_encoding_and_decoding(checkpoint, loaded):
    model = loaded(checkpoint("generate", "llama"))
    assert model.decode(model.encode("Grüße, 世界!")) == "Grüße, 世界!"


def test_ids_outside_the_vocabulary_are_refused(checkpoint, loaded):
    model = loaded(checkpoint("generate", "llama"))
    with pytest.raises(BadRequest, match="between 0 and 299"):
        model.decode([1, 300])


def test_chat_is_rendered_by_the_checkpoints_template(checkpoint, loaded):
    model = loaded(checkpoint("generate", "llama"))
    assert model.render_chat(MESSAGES) == "user: Hi\nassistant:"
    assert model.render_chat(MESSAGES, add_generation_prompt=False) == "user: Hi\n"


def test_the_configured_template_wins(checkpoint, loaded, tmp_path):
    template = "{% for m in messages %}[{{ m.content }}{{ mark }}]{% endfor %}"
    model = loaded(checkpoint("generate", "llama"), chat_template=template)
    assert model.render_chat(MESSAGES, mark="!") == "[Hi!]"
    (tmp_path / "chat.jinja").write_text(template)
    model = loaded(checkpoint("generate", "llama"), chat_template=str(tmp_path / "chat.jinja"))
    assert model.render_chat(MESSAGES, mark="?") == "[Hi?]"


def test_a_random_model_renders_chats_by_a_template_of_its_own_or_the_configured_one(checkpoint, loaded, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint("generate", "llama") / "config.json").read_text())
    source = f"random:{tmp_path}"
    rendered = [
        loaded(source, chat_template=template).render_chat(MESSAGES)
        for template in (None, "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    ]
    assert rendered == ["user: Hi\nassistant:", "[Hi]"]


def test_a_template_file_that_is_missing_is_named(checkpoint, loaded):
    with pytest.raises(CheckpointError, match="neither a template nor a file: no/such"):
        loaded(checkpoint("generate", "llama"), chat_template="no/such")


def test_a_model_without_template_says_what_else_can_be_done(new_checkpoint, loaded):
    model = loaded(without_template(new_checkpoint("generate", "llama")))
    with pytest.raises(BadRequest, match="has no chat template; use /v1/completions"):
        model.render_chat(MESSAGES)


def test_messages_that_the_template_refuses_are_the_clients_mistake(checkpoint, loaded):
    model = loaded(checkpoint("generate", "llama"), chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRequest, match="refuses these messages: roles must alternate"):
        model.render_chat(MESSAGES)


def test_generation_config_gives_ends_and_sampling_defaults(new_checkpoint, loaded):
    folder = new_checkpoint("generate", "llama")
    settings = {"eos_token_id": [5, 6], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = loaded(folder)
    defaults = model.plan.generation
    assert (defaults.eos, defaults.temperature, defaults.top_p, defaults.top_k) == ((5, 6), 0.6, 0.9, 20)
    assert (defaults.min_p, defaults.repetition_penalty, defaults.max_tokens) == (None, None, 7)
    assert model.eos_token_ids == {5, 6}


def test_without_generation_config_the_ends_are_the_models(new_checkpoint, loaded):
    folder = new_checkpoint("generate", "llama")
    (folder / "generation_config.json").unlink()
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"eos_token_id": 9}))
    assert loaded(folder).eos_token_ids == {9}


def test_a_broken_generation_config_is_named(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not a JSON object"):
        plan_model(config(folder))


def test_the_byte_tokenizer_names_every_id():
    tokenizer = byte_tokenizer(1000)
    assert len(tokenizer) == 1000
    assert tokenizer.decode([999]) == "<999>"
    assert tokenizer.decode(tokenizer.encode("\x00\n€")) == "\x00\n€"
