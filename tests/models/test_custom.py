from __future__ import annotations

import sys
import weakref

import pytest
import torch
from torch import nn

from computron.errors import BadRequest, ConfigError
from computron.models import load_model, plan_model
from computron.models.custom import StackTensors, import_object


class Shared(nn.Module):
    """Tied weights, a persistent buffer, one that is not, an LSTM that keeps its weights in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.arange(16.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, _ = self.rnn(self.embed(ids) + self.offset)
        return self.head(self.norm(x[:, -1]))


def shared() -> nn.Module:
    module = Shared()
    nn.init.normal_(module.norm.running_mean)
    return module


def linear(inputs: int = 3, outputs: int = 2) -> nn.Module:
    return nn.Linear(inputs, outputs)


def raising() -> nn.Module:
    raise RuntimeError("no such weights")


def no_module() -> int:
    return 3


class NoSplit:
    def __init__(self, module: nn.Module) -> None:
        pass

    def parse(self, body):
        return body

    def group(self, payload):
        return None

    def make_batch(self, payloads):
        return ()


class RaisingManager:
    def __init__(self, module: nn.Module) -> None:
        raise ValueError("labels are missing")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "custom_models", sys.modules[__name__])


@pytest.fixture
def loaded(config, filled):
    def load(factory, **fields):
        plan = plan_model(config(task="custom", factory=f"custom_models:{factory}", **fields))
        return load_model(plan, filled(plan))

    return load


def test_a_bound_custom_model_computes_what_its_factory_made(loaded):
    model = loaded("shared", seed=5)
    torch.manual_seed(5)
    reference = shared().eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.inference_mode():
        assert torch.equal(model.module(ids), reference(ids))
    assert model.plan.aliases == {"head.weight": "embed.weight"}
    assert model.module.head.weight is model.module.embed.weight


def test_persistent_buffers_are_in_the_image_and_others_are_not(loaded):
    names = {slot.name for slot in loaded("shared").plan.tensors}
    assert "norm.running_mean" in names
    assert "offset" not in names


def test_the_factorys_own_weights_are_freed(config, filled):
    plan = plan_model(config(task="custom", factory="custom_models:shared"))
    image = filled(plan)
    module = plan.build(torch.device("cpu"), None)
    original = weakref.ref(module.rnn.weight_ih_l0)
    del module
    assert original() is None
    model = load_model(plan, image)  # builds it again
    assert torch.equal(model.module.rnn.weight_ih_l0, dict(shared_again().named_parameters())["rnn.weight_ih_l0"])


def shared_again() -> nn.Module:
    torch.manual_seed(0)
    return shared()


def test_the_configured_dtype_is_used(loaded):
    model = loaded("linear", dtype="bfloat16")
    assert model.plan.dtype == torch.bfloat16
    assert model.module.weight.dtype == torch.bfloat16


def test_arguments_reach_the_factory(loaded):
    assert loaded("linear", arguments={"inputs": 5, "outputs": 7}).module.weight.shape == (7, 5)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (None, 'needs factory = "package.module:function"'),
        ("custom_models", 'must be "package.module:name"'),
        ("no_such_module_here:make", "there is no module no_such_module_here; install"),
        ("custom_models:no_such_function", "module custom_models has no no_such_function"),
        ("custom_models:raising", r"raised RuntimeError\('no such weights'\)"),
        ("custom_models:no_module", r"gave a int, not a torch\.nn\.Module"),
    ],
)
def test_a_factory_that_gives_no_module_is_a_mistake_in_the_configuration(factory, words, config):
    with pytest.raises(ConfigError, match=words):
        plan_model(config(task="custom", factory=factory))


def test_wrong_arguments_are_named(config):
    with pytest.raises(ConfigError, match="unexpected keyword argument 'depth'"):
        plan_model(config(task="custom", factory="custom_models:linear", arguments={"depth": 2}))


@pytest.mark.parametrize(
    ("manager", "words"), [("NoSplit", "has no method split_batch"), ("RaisingManager", "labels are missing")]
)
def test_a_batch_manager_that_cannot_work_is_refused_on_loading(manager, words, loaded):
    with pytest.raises(ConfigError, match=words):
        loaded("linear", batch_manager=f"custom_models:{manager}")


def test_modules_in_the_working_directory_are_found(tmp_path, monkeypatch):
    (tmp_path / "just_here.py").write_text("value = 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert import_object("just_here:value", "here") == 7


def test_stacked_inputs_give_an_answer_each(loaded):
    model = loaded("linear")
    manager = model.batch_manager
    payloads = [manager.parse({"input": [1, 2, 3]}), manager.parse({"input": [0.5, 0, 0]})]
    with torch.inference_mode():
        output = model.module(*manager.make_batch(payloads))
    assert manager.split_batch(output, 2) == output.tolist()


def test_inputs_of_different_shapes_go_to_different_batches(loaded):
    manager = loaded("linear").batch_manager
    assert manager.group(manager.parse({"input": [1, 2]})) == manager.group(manager.parse({"input": [3.5, 4]}))
    assert manager.group(manager.parse({"input": [1, 2]})) != manager.group(manager.parse({"input": [1, 2, 3]}))


@pytest.mark.parametrize("body", [None, [], {}, {"input": "x"}, {"input": [[1], [2, 3]]}, {"input": [1, None]}])
def test_bodies_that_are_no_numbers_are_the_clients_mistake(body, loaded):
    with pytest.raises(BadRequest):
        loaded("linear").batch_manager.parse(body)


def test_outputs_of_several_tensors_are_split_too():
    manager = StackTensors(nn.ReLU())
    output = {"a": torch.tensor([[1.0], [2.0]]), "b": (torch.tensor([3, 4]),)}
    assert manager.split_batch(output, 2) == [{"a": [1.0], "b": [3]}, {"a": [2.0], "b": [4]}]
