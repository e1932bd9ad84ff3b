"""What all nodes of a group must agree on, whatever else their configuration files say."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version

from computron.config import Config

OWN = frozenset({"source", "revision", "chat_template", "factory"})  # of a model: may lie elsewhere on another host


def group_settings(config: Config) -> dict[str, str]:
    """By name, as they are compared and shown."""
    settings = {
        "the version of Computron": version("computron"),
        "group.tensor_parallel": str(config.group.tensor_parallel),
        "group.pipeline_parallel": str(config.group.pipeline_parallel),
        "device.page_size": str(config.device.page_size),
        "models": ", ".join(model.id for model in config.models),
    }
    for model in config.models:
        for field in dataclasses.fields(model):
            if field.name not in OWN:
                settings[f"{model.id}: {field.name}"] = repr(getattr(model, field.name))
    return settings
