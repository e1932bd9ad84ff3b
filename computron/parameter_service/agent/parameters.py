"""The job's parameters in this process: one range of addresses, over which blocks' segments are laid."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from computron.parameter_service.layout import ELEMENT, Block, Layout
from computron.parameter_service.wire.segments import Segment, Window


class FlatParameters:
    """A parameter that is fp32, contiguous and in host memory is a view of the flat space: nothing is copied when it
    changes. Others are copied from there by `refresh`.
    """

    def __init__(self, layout: Layout, parameters: Sequence[Tensor]) -> None:
        """The flat space begins with what the parameters are; they become views of it."""
        self._layout = layout
        self._parameters = parameters
        self._window = Window(layout.elements * ELEMENT)
        for block in layout.blocks:
            self._own(block, None)
        self._views = [
            self._window.tensor(offset * ELEMENT, tensor.elements).view(tensor.shape)
            for tensor, offset in zip(layout.tensors, layout.offsets, strict=True)
        ]
        self._copied = []
        with torch.no_grad():
            for index, (parameter, view) in enumerate(zip(parameters, self._views, strict=True)):
                view.copy_(parameter)
                if parameter.dtype == torch.float32 and parameter.device.type == "cpu" and parameter.is_contiguous():
                    parameter.data = view
                else:
                    self._copied.append(index)

    @property
    def views(self) -> Sequence[Tensor]:
        """Of the flat space, as the tensors are shaped: fp32."""
        return self._views

    def show(self, block: Block, fd: int) -> None:
        """Lay a segment, which begins with the block's parameters, where the block is. Raises OSError."""
        self._window.map(block.start * ELEMENT, fd, block.nbytes)

    def unshare(self, block: Block) -> None:
        """Lay memory of this process with the same contents where the block is; whoever reads it notices nothing."""
        self._own(block, self.bytes_of(block))

    def bytes_of(self, block: Block) -> memoryview:
        return self._window.view(block.start * ELEMENT, block.nbytes)

    def refresh(self, tensors: Iterable[int] | None = None) -> None:
        """Bring parameters up to date that are no views, of these tensors or of all; note that all have changed."""
        chosen = range(len(self._views)) if tensors is None else list(tensors)
        copied = set(self._copied)
        with torch.no_grad():
            for index in chosen:
                if index in copied:
                    self._parameters[index].copy_(self._views[index], non_blocking=False)
        viewed = [self._parameters[index] for index in chosen if index not in copied]
        torch.autograd.graph.increment_version(viewed)

    def load(self) -> None:
        """The other way: the flat space takes what the parameters are."""
        with torch.no_grad():
            for index in self._copied:
                self._views[index].copy_(self._parameters[index])

    def _own(self, block: Block, contents: memoryview | None) -> None:
        segment = Segment.create("computron-parameters", block.nbytes)
        try:
            if contents is not None:
                segment.view()[:] = contents
            self._window.map(block.start * ELEMENT, segment.fd, block.nbytes)
        finally:
            segment.close()


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that have gradients, each once."""
    found: dict[int, nn.Parameter] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            found.setdefault(id(parameter), parameter)
    return list(found.values())
