"""Gradients on their way out: a thread of its own copies them to the staging segment while backward goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from computron.parameter_service.layout import Block, Layout
from computron.parameter_service.wire.segments import Segment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH = (
    1 << 18
)  # elements of small gradients that are copied together: waking a thread for each costs more than copying


class _Copy(NamedTuple):
    """A gradient, None for zeros, that is complete when `event` has happened."""

    tensor: int
    gradient: Tensor | None
    event: torch.cuda.Event | None


class _Piece(NamedTuple):
    """Where elements of a tensor go: those from `start` on, None for all of them, which `view` then is shaped like."""

    block: int
    start: int | None
    view: Tensor


class Staging:
    """Laid out like the flat space, in the dtype of the wire.

    staged: told of blocks whose last outstanding gradient lies in staging, and whether no other will come in this step.
    may_write: waits until the owner has read what the block's staging held before; False where the gradient is of no
    use any more. idle: told that nothing is left to copy. failed: told of an exception that ends the copying. All are
    called by the thread that copies.
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
        self._elements = [tensor.elements for tensor in layout.tensors]
        self._pieces: list[list[_Piece]] = [[] for _ in layout.tensors]
        for block in layout.blocks:
            for piece in block.pieces:
                start = block.start + piece.offset
                view = flat[start : start + piece.count]
                whole = piece.count == self._elements[piece.tensor]
                shaped = view.view(layout.tensors[piece.tensor].shape) if whole else view
                self._pieces[piece.tensor].append(_Piece(block.index, None if whole else piece.start, shaped))
        self._tensors_of = [len(block.pieces) for block in layout.blocks]
        self._staged, self._may_write, self._idle, self._failed = staged, may_write, idle, failed
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[list[_Copy] | None] = queue.SimpleQueue()
        self._gathered: dict[int, _Copy] = {}  # that nobody has been given yet
        self._size = 0  # of these, in elements
        self._given = [0] * len(layout.tensors)  # copies of each tensor that somebody has been given
        self._ordered = False  # there are two of one tensor: only one thread may copy
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
        """Copy it soon, small ones when `push` or `finish` is called; it must stay as it is, or be put again, until
        this is `idle`. None: zeros.
        """
        event = None
        if gradient is not None and gradient.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(gradient.device))
        with self._lock:
            self._gather(_Copy(tensor, gradient, event))
            full = self._size >= BATCH
        if full:
            self.push()

    def push(self) -> None:
        """Copy soon what has been put."""
        with self._lock:
            copies = self._give()
        if copies:
            self._queue.put(copies)

    def finish(self, last: Iterable[tuple[int, Tensor | None]], *, final: bool = True) -> tuple[list[int], list[int]]:
        """Copy what has been put and these, the step's last gradients if `final`; the calling thread helps. Returns the
        blocks that lay in staging before, and those among them that `staged` has not told of; it tells of the others.
        """
        last = list(last)
        with self._lock:
            self._final = final
            for tensor, gradient in last:
                self._gather(_Copy(tensor, gradient, None))
            done = [block for block, left in enumerate(self._outstanding) if not left]
            untold = [block for block in done if self._fresh[block]]
            for block in untold:
                self._fresh[block].clear()
            copies = self._give()
            alone = not self._ordered
        batches = list(self._batches(copies))
        if len(batches) == 1 and alone:
            self._copy_batch(batches[0])
            return done, untold
        for batch in batches:
            self._queue.put(batch)
        if alone:
            self._help()
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

    # With the lock held.

    def _gather(self, copy: _Copy) -> None:
        if copy.tensor not in self._gathered:
            self._size += self._elements[copy.tensor]
            self._left += 1
            for piece in self._pieces[copy.tensor]:
                self._outstanding[piece.block] += 1
        self._gathered[copy.tensor] = copy

    def _give(self) -> list[_Copy]:
        copies = list(self._gathered.values())
        for copy in copies:
            self._ordered = self._ordered or self._given[copy.tensor] > 0
            self._given[copy.tensor] += 1
        self._gathered.clear()
        self._size = 0
        return copies

    # Whoever copies.

    def _run(self) -> None:
        while (copies := self._queue.get()) is not None:
            if not self._copy_batch(copies):
                return
            del copies  # the gradients' memory is not ours to keep

    def _help(self) -> None:
        while True:
            try:
                copies = self._queue.get_nowait()
            except queue.Empty:
                return
            if copies is None:  # for the thread
                self._queue.put(None)
                return
            if not self._copy_batch(copies):
                return

    def _copy_batch(self, copies: Sequence[_Copy]) -> bool:
        try:
            for part in self._batches(copies):
                self._copy(part)
        except BaseException as error:  # the training thread raises it
            self._failed(error)
            return False
        return True

    def _batches(self, copies: Sequence[_Copy]) -> Iterator[list[_Copy]]:
        batch: list[_Copy] = []
        size = 0
        for copy in copies:
            batch.append(copy)
            size += self._elements[copy.tensor]
            if size >= BATCH:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    @torch.no_grad()
    def _copy(self, copies: Sequence[_Copy]) -> None:
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        arriving: list[tuple[int, int]] = []  # tensors and blocks
        for tensor, gradient, event in copies:
            if event is not None:
                event.synchronize()
            flat = None
            for block, start, view in self._pieces[tensor]:
                if self._may_write(block):
                    if gradient is None:
                        view.zero_()
                    elif start is None:
                        targets.append(view)
                        sources.append(gradient)
                    else:
                        flat = gradient.reshape(-1) if flat is None else flat
                        targets.append(view)
                        sources.append(flat[start : start + len(view)])
                arriving.append((tensor, block))
                if start is not None:
                    self._arrive(targets, sources, arriving)
        self._arrive(targets, sources, arriving)
        with self._lock:
            for copy in copies:
                self._given[copy.tensor] -= 1
            self._left -= len(copies)
            idle = not self._left
            self._ordered = self._ordered and not idle
        if idle:
            self._idle()

    def _arrive(self, targets: list[Tensor], sources: list[Tensor], arriving: list[tuple[int, int]]) -> None:
        """Copy these, tell of the blocks that are complete by them, and empty the lists."""
        if targets:
            torch._foreach_copy_(targets, sources)
        complete = []
        with self._lock:
            final = self._final
            for tensor, block in arriving:
                self._outstanding[block] -= 1
                fresh = self._fresh[block]
                fresh.add(tensor)
                if not self._outstanding[block] and (final or len(fresh) >= self._tensors_of[block]):
                    fresh.clear()
                    complete.append(block)
        for parts in (targets, sources, arriving):
            parts.clear()
        if complete:
            self._staged(complete, final)


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
            raise ValueError(
                f"{self._names[index]} has a sparse gradient, which the Parameter Service does not take: make it dense "
                "(of an embedding: Embedding(..., sparse=False)), or freeze it with requires_grad_(False)"
            )
