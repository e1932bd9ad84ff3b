"""Gradients on their way out: a thread of its own copies them to the staging segment while backward goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from computron.parameter_service.layout import Block, Layout
from computron.parameter_service.wire.segments import Segment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Copy(NamedTuple):
    """A gradient, None for zeros, that is complete when `event` has happened."""

    tensor: int
    gradient: Tensor | None
    event: torch.cuda.Event | None


class Staging:
    """Laid out like the flat space, in the dtype of the wire.

    staged: told, in the push thread, of blocks whose last outstanding gradient lies in staging, and whether no other
    will come in this step. may_write: waits, in the push thread, until the owner has read what the block's staging held
    before; False where the gradient is of no use any more. idle: told that nothing is left to copy. failed: told of an
    exception that ends the push thread.
    """

    def __init__(
        self,
        layout: Layout,
        gradients: str,
        *,
        staged: Callable[[list[int], bool], None],
        may_write: Callable[[int], bool],
        idle: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        dtype = DTYPES[gradients]
        self._itemsize = dtype.itemsize
        self.segment = Segment.create("computron-staging", layout.elements * dtype.itemsize)
        flat = self.segment.tensor(dtype, 0, layout.elements)
        self._pieces: list[list[tuple[int, int, int, Tensor]]] = [[] for _ in layout.tensors]
        for block in layout.blocks:
            for piece in block.pieces:
                start = block.start + piece.offset
                view = flat[start : start + piece.count]
                self._pieces[piece.tensor].append((block.index, piece.start, piece.count, view))
        self._tensors_of = [len(block.pieces) for block in layout.blocks]
        self._staged, self._may_write, self._idle, self._failed = staged, may_write, idle, failed
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._outstanding = [0] * len(layout.blocks)
        self._fresh: list[set[int]] = [set() for _ in layout.blocks]  # tensors copied since the block was last told of
        self._left = 0
        self._final = False
        self._thread = threading.Thread(target=self._run, name="computron-push", daemon=True)
        self._thread.start()

    def bytes_of(self, block: Block) -> memoryview:
        start = block.start * self._itemsize
        return self.segment.view()[start : start + block.elements * self._itemsize]

    def put(self, tensor: int, gradient: Tensor | None) -> None:
        """Copy it soon; it must stay as it is, or be put again, until this is `idle`. None: zeros."""
        event = None
        if gradient is not None and gradient.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(gradient.device))
        with self._lock:
            self._count(tensor, 1)
        self._queue.put(_Copy(tensor, gradient, event))

    def finish(self, last: Iterable[tuple[int, Tensor | None]]) -> tuple[list[int], list[int]]:
        """These are the step's last gradients. Returns the blocks that lie in staging already, and those among them
        that `staged` has not told of; it tells of the others.
        """
        last = list(last)
        with self._lock:
            self._final = True
            for tensor, _ in last:
                self._count(tensor, 1)
            done = [block for block, left in enumerate(self._outstanding) if not left]
            untold = [block for block in done if self._fresh[block]]
            for block in untold:
                self._fresh[block].clear()
        for tensor, gradient in last:
            self._queue.put(_Copy(tensor, gradient, None))
        return done, untold

    @property
    def idle(self) -> bool:
        return not self._left

    def untold(self) -> list[int]:
        """Blocks in which something was copied since `staged` told of them last."""
        with self._lock:
            blocks = [block for block, fresh in enumerate(self._fresh) if fresh]
            for block in blocks:
                self._fresh[block].clear()
        return blocks

    def begin(self) -> None:
        """A new step: what was copied counts no more."""
        with self._lock:
            self._final = False
            for fresh in self._fresh:
                fresh.clear()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self.segment.close()

    def _count(self, tensor: int, change: int) -> None:
        self._left += change
        for block, _, _, _ in self._pieces[tensor]:
            self._outstanding[block] += change

    def _run(self) -> None:
        while (copy := self._queue.get()) is not None:
            try:
                self._copy(copy)
            except BaseException as error:  # the training thread raises it
                self._failed(error)
                return
            del copy  # the gradient's memory is not ours to keep

    def _copy(self, copy: _Copy) -> None:
        if copy.event is not None:
            copy.event.synchronize()
        flat = None if copy.gradient is None else copy.gradient.detach().reshape(-1)
        for block, start, count, view in self._pieces[copy.tensor]:
            if self._may_write(block):
                if flat is None:
                    view.zero_()
                else:
                    view.copy_(flat[start : start + count])
            self._done(copy.tensor, block)
        with self._lock:
            self._left -= 1
        if not self._left:
            self._idle()

    def _done(self, tensor: int, block: int) -> None:
        with self._lock:
            self._outstanding[block] -= 1
            fresh = self._fresh[block]
            fresh.add(tensor)
            final = self._final
            if self._outstanding[block] or (not final and len(fresh) < self._tensors_of[block]):
                return
            fresh.clear()
        self._staged([block], final)


class Gradients:
    """Which gradient of each parameter is staged: autograd's hooks put it there as soon as it is complete."""

    def __init__(self, parameters: Sequence[Tensor], names: Sequence[str], staging: Staging) -> None:
        self._parameters = parameters
        self._names = names
        self._staging = staging
        self._seen: dict[int, tuple[Tensor, int]] = {}
        self._hooks: list[Any] = []
        for index, parameter in enumerate(parameters):
            unannotated: Any = parameter
            self._hooks.append(unannotated.register_post_accumulate_grad_hook(self._hook(index)))

    def changed(self, *, zeros: bool) -> list[tuple[int, Tensor | None]]:
        """Gradients that are not staged as they are now, None for zeros.

        Raises ValueError if a parameter has none and `zeros` is false, or if one is sparse.
        """
        found: list[tuple[int, Tensor | None]] = []
        for index, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                if not zeros:
                    raise ValueError(
                        f"{self._names[index]} has no gradient in this step. If that is meant (a part of the model is "
                        "not always used), set find_unused_parameters=True: it then counts as zero; otherwise leave it "
                        "out of the optimizer or freeze it with requires_grad_(False)"
                    )
                found.append((index, None))
                continue
            seen = self._seen.get(index)
            if seen is None or seen[0] is not gradient or seen[1] != gradient._version:
                self._check(index, gradient)
                self._seen[index] = (gradient, gradient._version)
                found.append((index, gradient))
        return found

    def forget(self) -> None:
        self._seen.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def stage(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                return
            self._check(index, gradient)
            self._seen[index] = (gradient, gradient._version)
            self._staging.put(index, gradient)

        return stage

    def _check(self, index: int, gradient: Tensor) -> None:
        if gradient.layout != torch.strided:
            raise ValueError(f"{self._names[index]} has a sparse gradient, which the Parameter Service does not take")
