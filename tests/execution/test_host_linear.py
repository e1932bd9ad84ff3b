from __future__ import annotations

import pytest
import torch
from torch import nn

from computron.execution.host_linear import speed_up_linears


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8, 32, 33])
def test_the_product_is_the_same_but_for_rounding(dtype, bias, rows) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(48, 20, bias=bias).to(dtype)
    inputs = torch.randn((1, rows, 48)).to(dtype)
    with torch.inference_mode():
        expected = layer(inputs)
        speed_up_linears(nn.Sequential(layer))
        output = layer(inputs)
    assert output.shape == expected.shape
    assert output.is_contiguous()
    assert torch.allclose(output.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_weights_that_are_bound_later_are_used() -> None:
    layer = nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
    speed_up_linears(nn.Sequential(layer))
    layer.weight = nn.Parameter(torch.ones((3, 4), dtype=torch.bfloat16), requires_grad=False)
    assert layer(torch.ones((1, 2, 4), dtype=torch.bfloat16)).tolist() == [[[4.0] * 3] * 2]


def test_single_precision_is_left_alone() -> None:
    layer = nn.Linear(4, 3)
    speed_up_linears(nn.Sequential(layer))
    assert "forward" not in vars(layer)
