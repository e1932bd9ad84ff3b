"""What a worker has asked aggregators for and has no answer to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from computron.parameter_service.wire.link import Link
from computron.parameter_service.wire.messages import Contents, Extra, ExtraTaken, Read, Refused, Write, Written

EXTRAS_AT_ONCE = 8  # tensors of versions that are on their way: an aggregator keeps them until its disk has them
EXTRAS_BYTES = 64 << 20  # of them; a larger one goes alone

Question = Read | Write | Extra
Reply = Contents | Written | ExtraTaken
Answer = Callable[[Reply], None]
Key = tuple[type[Question], int | str, int | str]  # what a question and its answer have in common


@dataclass(slots=True, eq=False)
class Asked:
    """memory: where what is read goes, or what goes along. over: the link that has carried it, whose answer counts."""

    message: Question
    memory: memoryview
    then: Answer
    over: Link | None = None


class Questions:
    """Each is sent once; again over another link, in another epoch, or when it was refused. Whoever else has not
    answered yet is about to: sent again, it would be answered twice.

    link: that leads to who can answer the question now, if there is one. send: puts a question on a link.
    """

    def __init__(
        self, link: Callable[[Question], Link | None], send: Callable[[Link, Question, memoryview], None]
    ) -> None:
        self._link, self._carry = link, send
        self._of_blocks: dict[Key, Asked] = {}
        self._extras: dict[Key, Asked] = {}
        self._taken: dict[Key, Asked] = {}  # extras that have been answered: an epoch may have their step taken anew

    @property
    def extras_left(self) -> bool:
        """Some that belong to a version are not where they belong."""
        return bool(self._extras)

    def ask(self, message: Question, memory: memoryview, then: Answer) -> None:
        asked = Asked(message, memory, then)
        if isinstance(message, Extra):
            self._extras[_key(message)] = asked
            self._send_extras()
        else:
            self._of_blocks[_key(message)] = asked
            self._send(asked)

    def send(self) -> None:
        """What must be sent and can be."""
        for asked in self._of_blocks.values():
            self._send(asked)
        self._send_extras()

    def place_for(self, link: Link, message: Contents, size: int) -> memoryview | None:
        """Where what comes with this answer goes. None: it is not asked for any more."""
        asked = self._of_blocks.get(_key(message))
        return asked.memory if asked is not None and asked.over is link and len(asked.memory) == size else None

    def answered(self, link: Link, message: Reply) -> None:
        among = self._extras if isinstance(message, ExtraTaken) else self._of_blocks
        key = _key(message)
        asked = among.get(key)
        if asked is not None and asked.over is link:
            del among[key]
            if isinstance(message, ExtraTaken):
                self._taken[key] = asked
            asked.then(message)
            self._send_extras()

    def refused(self, link: Link, message: Refused) -> None:
        """What it may have meant is to be asked again."""
        for asked in (*self._of_blocks.values(), *self._extras.values()):
            if asked.over is link and (not message.blocks or getattr(asked.message, "block", None) in message.blocks):
                asked.over = None

    def new_epoch(self) -> None:
        """What was to be written belongs to the older one, and of the rest not all will be answered. What was taken for
        a step that is not done may be in a file of what is given up.
        """
        self._extras = {**self._taken, **self._extras}
        self._taken = {}
        self._of_blocks = {key: asked for key, asked in self._of_blocks.items() if not isinstance(asked.message, Write)}
        for asked in (*self._of_blocks.values(), *self._extras.values()):
            asked.over = None

    def done(self, step: int) -> None:
        """This step and those before are not taken anew here."""
        if self._taken:
            self._taken = {key: asked for key, asked in self._taken.items() if _step_of(asked) > step}

    def drop_extras(self) -> None:
        """Versions of steps that were taken back come to nothing."""
        self._extras.clear()
        self._taken.clear()

    def _send_extras(self) -> None:
        """As many of the first as may be on their way."""
        nbytes = 0
        for asked in islice(self._extras.values(), EXTRAS_AT_ONCE):
            nbytes += len(asked.memory)
            if nbytes > max(EXTRAS_BYTES, len(asked.memory)):
                return
            self._send(asked)

    def _send(self, asked: Asked) -> None:
        link = self._link(asked.message)
        if link is not None and link is not asked.over:
            asked.over = link
            self._carry(link, asked.message, asked.memory)


def _step_of(asked: Asked) -> int:
    assert isinstance(asked.message, Extra)
    return asked.message.step


def _key(message: Question | Reply) -> Key:
    match message:
        case Extra() | ExtraTaken():
            return Extra, message.version, message.tensor
        case Read() | Contents():
            return Read, message.block, message.part
        case Write() | Written():
            return Write, message.block, message.part
