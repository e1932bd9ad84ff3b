from __future__ import annotations

import pytest
import torch

from computron.parameter_service.aggregator.kernels import Summer


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (0.5, 1.0, 3.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("average", [True, False])
def test_gradients_are_added_up_in_the_order_of_ranks(workers, dtype, scales, average) -> None:
    gradients = [torch.randn(1000).to(dtype) for _ in range(workers)]
    before = [gradient.clone() for gradient in gradients]
    expected = gradients[0].float() * scales[0]
    for gradient, scale in zip(gradients[1:], scales[1:], strict=False):
        expected = expected + gradient.float() * scale
    if average:
        expected = expected / workers
    summer = Summer()
    for length in (1000, 10):
        found = summer.sum([gradient[:length] for gradient in gradients], scales[:workers], average=average)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected[:length])
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
