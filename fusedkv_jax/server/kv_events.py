"""KV events: tells routers which prefixes lie in a server's cache, in vLLM's form over ZeroMQ.

A message has three frames: the topic, a number that counts up from 0 (8 bytes, big endian), and a
batch in msgpack. Blocks are full pages of tokens. Whoever has missed messages sends the number of
the first one to the replay socket, and gets all since then that are still there.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from fusedkv_jax.serving.prefix import Node, PrefixChange

if TYPE_CHECKING:
    import zmq

_END = (-1).to_bytes(8, "big", signed=True)
_POLL = 0.1  # seconds between looks at the replay socket
_DEVICE = "GPU"  # what vLLM calls the memory of any accelerator
_log = logging.getLogger(__name__)


class KvEventsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """vLLM's configuration of this name.

    Attributes:
        enable_kv_cache_events, publisher: there for those who pass what they pass to vLLM.
        endpoint: where subscribers connect to; `tcp://*:5557` listens on all addresses.
        replay_endpoint: where they ask for messages that they have missed; None for nowhere.
        buffer_steps: messages that are kept for them.
        hwm: messages that are kept for a subscriber that is slow; further ones it loses.
        max_queue_size: batches that may wait to be sent; then the engine waits.
        topic: first frame of all messages.
    """

    enable_kv_cache_events: Literal[True] = True
    publisher: Literal["zmq"] = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""

    @classmethod
    def decode(cls, text: str) -> KvEventsConfig:
        """From JSON. Raises ValueError, of one line."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise ValueError(f"kv_events_config={text!r}: {error}") from None


class BlockStored(msgspec.Struct, omit_defaults=True, tag=True):
    """Consecutive blocks of a prefix now lie on the device.

    Attributes:
        block_hashes: their names; equal for equal prefixes of equal salts.
        parent_block_hash: of the block before them; None at the beginning of a prompt.
        token_ids: of all of them.
        block_size: tokens of each.
        medium: the kind of memory.
        extra_keys: for each block what else tells it from others, here its salt.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[list[str] | None] | None = None


class BlockRemoved(msgspec.Struct, omit_defaults=True, tag=True):
    """Blocks do not lie on the device any more."""

    block_hashes: list[int]
    medium: str | None


class KvEventBatch(msgspec.Struct, array_like=True):
    """What a step has changed, at `ts` seconds since 1970."""

    ts: float
    events: list[BlockStored | BlockRemoved]
    data_parallel_rank: int = 0


class BlockNames:
    """Names of the blocks that lie on the device, and events under these names."""

    def __init__(self) -> None:
        self._names: dict[Node, int] = {}

    def events(self, changes: Iterable[PrefixChange]) -> Iterator[BlockStored | BlockRemoved]:
        """In the order of the changes; neighbors that belong together in one event."""
        chain: list[Node] = []
        gone: list[int] = []
        for node, stored in changes:
            if chain and not (stored and node.parent is chain[-1]):
                yield self._stored(chain)
                chain = []
            if gone and stored:
                yield BlockRemoved(gone, _DEVICE)
                gone = []
            if stored:
                chain.append(node)
            else:
                gone.append(self._names.pop(node))
        if chain:
            yield self._stored(chain)
        if gone:
            yield BlockRemoved(gone, _DEVICE)

    def _stored(self, chain: Sequence[Node]) -> BlockStored:
        first = chain[0].parent
        assert first is not None
        tokens = array("i", b"".join(node.key for node in chain))
        for node in chain:
            self._names[node] = self._name(node)
        salt = first.key.decode() if first.parent is None else ""
        return BlockStored(
            block_hashes=[self._names[node] for node in chain],
            parent_block_hash=None if first.parent is None else self._names[first],
            token_ids=tokens.tolist(),
            block_size=len(tokens) // len(chain),
            lora_id=None,
            medium=_DEVICE,
            lora_name=None,
            extra_keys=[[salt], *[None] * (len(chain) - 1)] if salt else None,
        )

    def _name(self, node: Node) -> int:
        """64 bits of its own and all earlier tokens and of the salt."""
        before, digest = node.parent, hashlib.blake2b(digest_size=8)
        assert before is not None
        # A salt has no fixed length, which is told first: no token can pass for a part of it.
        own = before.key if before.parent is None else self._names[before].to_bytes(8, "big")
        digest.update(len(own).to_bytes(8, "big") + own + node.key)
        return int.from_bytes(digest.digest(), "big")


class KvEventPublisher:
    """Publishes from a thread of its own.

    Args:
        config: where and how.

    Raises:
        ValueError: an address cannot be listened on; one line.
        ImportError: there is no pyzmq, which the extra `kv-events` has.
    """

    def __init__(self, config: KvEventsConfig):
        import zmq

        self.config = config
        self._context: zmq.Context = zmq.Context()
        self._sockets: list[zmq.Socket] = []
        self._events = self._bind(zmq.PUB, config.endpoint)
        self._replay: zmq.Socket | None = None
        if config.replay_endpoint is not None:
            self._replay = self._bind(zmq.ROUTER, config.replay_endpoint)
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._queue: queue.Queue[list[PrefixChange] | None] = queue.Queue(config.max_queue_size)
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self, changes: list[PrefixChange]) -> None:
        """Send what has changed, from any one thread."""
        self._queue.put(changes)

    def close(self) -> None:
        """Send what waits, and end."""
        self._queue.put(None)
        self._thread.join()

    def source(self) -> dict[str, Any]:
        """What a subscriber has to know, as vLLM's route /kv_event_sources has it."""
        return msgspec.to_builtins(self.config)

    def _bind(self, kind: int, endpoint: str) -> zmq.Socket:
        import zmq

        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.set_hwm(self.config.hwm)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ValueError(f"KV events cannot be published at {endpoint!r}: {error}") from None
        return socket

    def _run(self) -> None:
        names, pack, number = BlockNames(), msgspec.msgpack.Encoder().encode, 0
        topic = self.config.topic.encode()
        while True:
            self._answer(topic)
            try:
                changes = self._queue.get(timeout=_POLL)
            except queue.Empty:
                continue
            if changes is None:
                break
            batch = pack(KvEventBatch(time.time(), list(names.events(changes))))
            self._kept.append((number, batch))
            self._events.send_multipart((topic, number.to_bytes(8, "big"), batch))
            number += 1
        self._context.destroy(linger=1000)

    def _answer(self, topic: bytes) -> None:
        """Send again what was asked for; (client, nothing, first number) is a request."""
        while self._replay is not None and self._replay.poll(0):
            client, *rest = self._replay.recv_multipart()
            if len(rest) != 2 or len(rest[1]) != 8:
                _log.warning("a request for KV events is not an empty frame and 8 bytes")
                continue
            first = int.from_bytes(rest[1], "big")
            for number, batch in self._kept:
                if number >= first:
                    frames = client, b"", topic, number.to_bytes(8, "big"), batch
                    self._replay.send_multipart(frames)
            self._replay.send_multipart((client, b"", b"", _END, b""))
