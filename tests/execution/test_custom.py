"""Custom models: the user's batch manager, and the user's mistakes."""

from __future__ import annotations

import sys
import types
from collections.abc import Hashable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from computron.config import ModelConfig
from computron.errors import BadRequest, ExecutionFailed, SwapFailed
from computron.execution.requests import CustomJob, CustomOutput, EmbedJob, FailedOutput
from computron.models import load_model, plan_model
from computron.models.custom import StackTensors


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if (batch == 13).any():
            raise ArithmeticError("thirteen in the batch")
        return batch * self.factor


class Manager(StackTensors):
    """Payloads are tensors; one of 7s cannot be batched, one of 99s is refused, a result of 22 cannot be split."""

    batches: list[int]

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.batches = []

    def group(self, payload: Any) -> Hashable:
        return super().group(payload)

    def make_batch(self, payloads: Sequence[Any]) -> tuple[Any, ...]:
        if any((payload == 7).any() for payload in payloads):
            raise ValueError("no sevens")
        if any((payload == 99).any() for payload in payloads):
            raise BadRequest("nines are not served")
        self.batches.append(len(payloads))
        return super().make_batch(payloads)

    def split_batch(self, output: Any, count: int) -> Sequence[Any]:
        if (output == 22).any():
            raise KeyError("twenty-two")
        return super().split_batch(output, count)


class Careless(StackTensors):
    def split_batch(self, output: Any, count: int) -> Sequence[Any]:
        return [0]


class Raw(StackTensors):
    """Gives what the module gave, as it is."""

    def split_batch(self, output: Any, count: int) -> Sequence[Any]:
        return [{"tensor": row, "more": (row.sum(), [row.numpy()], "text", None)} for row in output]


class FailingGate:
    is_open = False

    def wait(self, segment: int, stream: int = 0) -> None:
        raise SwapFailed("the link is down")


@pytest.fixture
def custom(monkeypatch, new_rig, new_group):
    module = types.ModuleType("user_models")
    for each in (Double, StackTensors, Manager, Careless, Raw):
        setattr(module, each.__name__, each)
    monkeypatch.setitem(sys.modules, "user_models", module)

    def load(manager: str):
        config = ModelConfig(
            "m", task="custom", factory="user_models:Double", batch_manager=f"user_models:{manager}", max_batch_size=3
        )
        plan = plan_model(config)
        parameters = torch.empty(plan.image.nbytes, dtype=torch.uint8)
        plan.image.read_into(0, memoryview(parameters.numpy()))
        return load_model(plan, parameters)

    def make(manager: str = "Manager", nodes: int = 1):
        if nodes == 1:
            return new_rig(load(manager))
        return new_group([load(manager) for _ in range(nodes)], 1, nodes)

    return make


def outputs(one, *inputs: list[float]) -> list[Any]:
    """Values, or messages of failures."""
    answers = one.run([CustomJob(one.model.batch_manager.parse({"input": each})) for each in inputs])
    given = [answer.outputs[0] for answer in answers]
    return [output.value if isinstance(output, CustomOutput) else output.message for output in given]


def test_steps_overlap_only_where_the_batch_manager_is_known_to_remember_nothing(custom) -> None:
    assert custom("StackTensors").executor.overlaps
    assert not custom("Careless").executor.overlaps


def test_requests_that_fit_together_share_batches_up_to_the_limit(custom) -> None:
    one = custom()
    assert outputs(one, [1, 2], [3, 4], [5], [6, 8], [8, 9]) == [[2, 4], [6, 8], [10], [12, 16], [16, 18]]
    assert one.model.batch_manager.batches == [3, 1, 1]


def test_an_exception_of_the_model_fails_its_batch_alone(custom) -> None:
    given = outputs(custom(), [1.0], [13.0], [1.0, 2.0])
    assert given[:2] == ["the model raised ArithmeticError: thirteen in the batch"] * 2
    assert given[2] == [2, 4]


def test_a_payload_that_cannot_be_batched_fails_alone(custom) -> None:
    assert outputs(custom(), [1.0], [7.0], [3.0]) == [[2], "make_batch raised ValueError: no sevens", [6]]


def test_a_request_that_its_batch_manager_refuses_is_told_so_and_is_no_failure(custom, caplog) -> None:
    one = custom()
    answers = one.run([CustomJob(one.model.batch_manager.parse({"input": [each]})) for each in (1.0, 99.0, 3.0)])
    first, refused, last = (answer.outputs[0] for answer in answers)
    assert (refused.message, refused.refused) == ("nines are not served", True)
    assert (first.value, last.value) == ([2], [6])
    assert not caplog.records


def test_the_traceback_of_a_models_own_code_is_logged(custom, caplog) -> None:
    outputs(custom(), [13.0])
    (record,) = caplog.records
    assert record.getMessage() == "model_code_failed in=forward"
    assert 'raise ArithmeticError("thirteen in the batch")' in caplog.text


def test_a_result_that_cannot_be_split_fails_alone(custom) -> None:
    assert outputs(custom(), [1.0], [11.0], [3.0]) == [[2], "split_batch raised KeyError: 'twenty-two'", [6]]


def test_tensors_and_arrays_in_an_answer_leave_as_lists(custom) -> None:
    assert outputs(custom("Raw"), [1.0, 2.0]) == [{"tensor": [2.0, 4.0], "more": [6.0, [[2.0, 4.0]], "text", None]}]


def test_a_manager_that_loses_a_result_is_told_so(custom) -> None:
    one = custom("Careless")
    request = [one.add(CustomJob(torch.tensor([1.0]))) for _ in range(2)]
    result = one.step(request)
    assert result.outputs == [FailedOutput(each, "split_batch gave 1 values for 2 requests") for each in request]
    assert sorted(result.finished) == request


def test_in_a_group_batches_travel_and_what_cannot_be_batched_fails_alone(custom) -> None:
    given = outputs(custom(nodes=2), [1.0], [7.0], [3.0], [4.0, 5.0])
    assert given == [[2], "make_batch raised ValueError: no sevens", [6], [8, 10]]
    given = outputs(custom("Raw", nodes=2), [1.0, 2.0])
    assert given == [{"tensor": [2.0, 4.0], "more": [6.0, [[2.0, 4.0]], "text", None]}]


def test_in_a_group_a_batch_that_cannot_be_split_fails_as_a_whole(custom) -> None:
    given = outputs(custom(nodes=2), [1.0], [11.0], [3.0, 4.0])
    assert given == ["split_batch raised KeyError: 'twenty-two'"] * 2 + [[6, 8]]


def test_in_a_group_a_module_that_raises_fails_the_step(custom) -> None:
    nodes = custom(nodes=2)
    requests = [nodes.add(CustomJob(torch.tensor(each))) for each in ([1.0], [13.0], [1.0, 2.0])]
    with pytest.raises(ExecutionFailed, match="ArithmeticError: thirteen in the batch"):
        nodes.step(requests)
    assert nodes.step([requests[0], requests[2]]).batch_size == 2


def test_each_mistake_fails_its_own_request(custom) -> None:
    one = custom()
    given = outputs(one, [11.0], [7.0], [1.0])
    assert given == ["split_batch raised KeyError: 'twenty-two'", "make_batch raised ValueError: no sevens", [2]]


def test_a_batch_manager_that_groups_wrongly_fails_the_step(custom, monkeypatch) -> None:
    one = custom()
    request = one.add(CustomJob(torch.tensor([1.0])))
    with monkeypatch.context() as patch:
        patch.setattr(one.model.batch_manager, "group", lambda payload: [payload])
        with pytest.raises(ExecutionFailed, match="unhashable"):
            one.step([request])
    assert one.step([request]).finished == (request,)


def test_a_step_whose_swap_fails_can_be_tried_again(custom) -> None:
    one = custom()
    request = one.add(CustomJob(torch.tensor([4.0])))
    with pytest.raises(SwapFailed, match="the link is down"):
        one.step([request], FailingGate())
    assert one.step([request]).outputs == [CustomOutput(request, [8.0])]


def test_other_kinds_of_jobs_are_refused(custom) -> None:
    with pytest.raises(BadRequest, match="batch manager"):
        custom().executor.prepare(EmbedJob((1,)))
