"""A multi-layer perceptron with random weights, served without a batch manager of its own. From the repository's root:

    source .venv/bin/activate
    computron serve examples/mlp.toml
    curl -s localhost:8000/v1/models/mlp-a/infer -H 'Content-Type: application/json' -d '{"input": [1, 0, 0, 0]}'

The two models of the configuration come from one factory with different arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def make(sizes: Sequence[int]) -> nn.Module:
    """Linear layers with ReLU between them. `sizes`: features in, hidden ones, features out."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
