"""What a node's process of `groups` runs. Imported once, then forked."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

import torch
import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama
import transformers.models.opt.modeling_opt
import transformers.models.vit.modeling_vit  # noqa: F401

from computron import _transfer
from computron.api import process
from computron.config import Config, DeviceConfig
from computron.errors import ComputronError
from computron.node import device, worker


class Quiet:
    def loading(self, model: str, done: int, total: int) -> None: ...

    def ready(self, url: str) -> None: ...

    def close(self) -> None: ...


def serve_node(config: Config, environment: Mapping[str, object], log: str) -> None:
    """As `computron serve` does, with what it says in a file. At SIGUSR1 the device's next copy fails."""
    os.environ |= {name: str(value) for name, value in environment.items()}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    fail_copies_on_demand()
    try:
        process.run(config, Quiet)
    except ComputronError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def fail_copies_on_demand() -> None:
    backends = []

    def open_backend(config: DeviceConfig, local_rank: int = 0) -> _transfer.Backend:
        backends.append(device.open_backend(config, local_rank))
        return backends[-1]

    worker.open_backend = open_backend
    signal.signal(signal.SIGUSR1, lambda *_: backends[-1].inject_fault("copy", 0, "the link fell silent"))
