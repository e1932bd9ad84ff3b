"""Links to the aggregators of a job: opened, and opened again when they break."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from computron.parameter_service.wire.link import Link, Receiver, connect
from computron.parameter_service.wire.messages import Address

log = logging.getLogger(__name__)

QUICK_TRIES = 3
QUICK_PAUSE = 0.1  # seconds
PAUSE = 0.5  # seconds, once the quick tries have failed


class Connections:
    """opened: told of an aggregator that there is a link to. unreachable: of one that the quick tries did not reach,
    and each further one.

    It belongs to the event loop's thread. machine: this one's, as wire.machine names it.
    """

    def __init__(
        self,
        receiver: Receiver,
        machine: str,
        opened: Callable[[str, bool], None],
        unreachable: Callable[[Address, str], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._receiver = receiver
        self._machine = machine
        self._opened, self._unreachable, self._failed = opened, unreachable, failed
        self._links: dict[str, Link] = {}
        self._addresses: dict[str, Address] = {}
        self._dialling: dict[str, asyncio.Task[None]] = {}

    def open(self, address: Address) -> None:
        self.drop(address.aggregator)
        self._addresses[address.aggregator] = address
        self._dial(address, 0.0)

    def drop(self, aggregator: str) -> None:
        self._addresses.pop(aggregator, None)
        if (task := self._dialling.pop(aggregator, None)) is not None:
            task.cancel()
        if (link := self._links.pop(aggregator, None)) is not None:
            link.close()

    def close(self) -> None:
        for aggregator in list(self._addresses):
            self.drop(aggregator)

    def link(self, aggregator: str) -> Link | None:
        return self._links.get(aggregator)

    def name_of(self, link: Link) -> str | None:
        """None for a link that was dropped."""
        return next((name for name, known in self._links.items() if known is link), None)

    def lost(self, aggregator: str, reason: str) -> None:
        """Its link has ended: unless it was dropped for that, open another, after a moment, as an aggregator without
        descriptors ends each at once.
        """
        address = self._addresses.get(aggregator)
        if address is None:
            log.info("aggregator %s, which has nothing of the job any more, ended the link", aggregator)
            return
        log.warning("the link to aggregator %s broke: %s", aggregator, reason)
        del self._links[aggregator]
        self._dial(address, QUICK_PAUSE)

    def _dial(self, address: Address, pause: float) -> None:
        task = asyncio.get_running_loop().create_task(self._connect(address, pause))
        self._dialling[address.aggregator] = task
        task.add_done_callback(self._dialled)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    async def _connect(self, address: Address, pause: float) -> None:
        name, tries = address.aggregator, 0
        await asyncio.sleep(pause)
        while True:
            try:
                link = await connect(address, self._receiver, machine=self._machine)
            except OSError as error:
                tries += 1
                if tries >= QUICK_TRIES:
                    self._unreachable(address, str(error))
                await asyncio.sleep(QUICK_PAUSE if tries < QUICK_TRIES else PAUSE)
                continue
            del self._dialling[name]
            self._links[name] = link
            self._opened(name, link.shares_memory)
            return
