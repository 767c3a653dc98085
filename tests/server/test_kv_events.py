"""KV events: what a subscriber is told, against what lies in the engine's pages."""

import asyncio
from array import array

import msgspec
import pytest

from fusedkv_jax.server.kv_events import KvEventPublisher, KvEventsConfig
from fusedkv_jax.serving import AsyncEngine
from tests.server.fake import FakeEngine
from tests.server.running import serving
from tests.serving.served import GREEDY, PAGE, engine, prompts

zmq = pytest.importorskip("zmq")
END = (-1).to_bytes(8, "big", signed=True)


def free_address():
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
    return f"tcp://127.0.0.1:{port}"


class Subscriber:
    """Keeps account of blocks as a router does, from decoded maps alone."""

    def __init__(self):
        self.blocks = {}  # name -> (name of the parent, tokens, what else tells it apart)
        self.number, self.removed = -1, 0

    def take(self, frames):
        topic, number, batch = frames
        assert topic == b"kv" and int.from_bytes(number, "big") == self.number + 1
        self.number += 1
        _, events, rank = msgspec.msgpack.decode(batch)
        assert rank == 0
        for event in events:
            names = event["block_hashes"]
            assert event["medium"] == "GPU"
            if event["type"] == "BlockRemoved":
                for name in names:
                    del self.blocks[name]
                self.removed += len(names)
                continue
            assert event["type"] == "BlockStored" and event["block_size"] == PAGE
            assert len(event["token_ids"]) == PAGE * len(names)
            parent = event["parent_block_hash"]
            assert parent is None or parent in self.blocks
            for place, name in enumerate(names):
                tokens = event["token_ids"][place * PAGE : (place + 1) * PAGE]
                keys = (event.get("extra_keys") or [None] * len(names))[place]
                assert name not in self.blocks
                self.blocks[name] = parent, tokens, keys
                parent = name

    def prefixes(self):
        """What the blocks spell from the beginning, with the salt."""

        def spelled(name):
            parent, tokens, keys = self.blocks[name]
            before = spelled(parent) if parent is not None else ("".join(keys or ()),)
            return (*before, *tokens)

        return sorted(spelled(name) for name in self.blocks)


def held(engine):
    def spelled(node):
        if node.parent is None:
            return (node.key.decode(),)
        return (*spelled(node.parent), *array("i", node.key))

    nodes = engine.scheduler.memory.tree.nodes()
    return sorted(spelled(node) for node in nodes if node.page >= 0)


def tell(*salts):
    """A subscriber of an engine that serves prompts under these salts in too few pages for all."""
    config = KvEventsConfig(endpoint=free_address(), replay_endpoint=free_address(), topic="kv")
    publisher, told = KvEventPublisher(config), Subscriber()
    served = engine()
    front = AsyncEngine(served, on_changes=publisher.publish)

    async def serve():
        await front.start()
        for salt in salts:
            streams = [
                front.add(prompt, GREEDY, request_id=f"{number}", tenant=salt)
                for number, prompt in enumerate(prompts(16))
            ]
            for stream in streams:
                async for _ in stream:
                    pass
        await front.stop()

    live, again = [], []
    with (
        zmq.Context() as context,
        context.socket(zmq.SUB) as socket,
        context.socket(zmq.DEALER) as dealer,
    ):
        socket.connect(config.endpoint)
        socket.subscribe("kv")
        dealer.connect(config.replay_endpoint)
        asyncio.run(serve())
        while socket.poll(500):
            live.append(socket.recv_multipart())
        dealer.send_multipart((b"", (0).to_bytes(8, "big")))
        while not again or again[-1][1] != END:
            assert dealer.poll(60_000)
            again.append(dealer.recv_multipart()[1:])
    publisher.close()
    # Who subscribes while messages are sent misses the first; asking again gives all.
    *again, _ = again
    assert live and again[-len(live) :] == live
    for frames in again:
        told.take(frames)
    assert told.removed and told.prefixes() == held(served)
    return told


def test_a_subscriber_knows_what_lies_in_pages():
    once, again = tell("", "x"), tell("x")
    assert {keys for _, _, keys in map(_hashable, once.blocks.values())} >= {("x",)}
    # Names are those of contents: another server has the same, under the same salt only.
    same = set(once.blocks) & set(again.blocks)
    assert same and {once.blocks[name][2:] == again.blocks[name][2:] for name in same} == {True}
    other = set(tell("y").blocks)
    assert not other & (set(once.blocks) | set(again.blocks))


def _hashable(block):
    parent, tokens, keys = block
    return parent, tuple(tokens), None if keys is None else tuple(keys)


def test_the_route_tells_where_they_are():
    config = KvEventsConfig.decode(f'{{"endpoint": "{free_address()}", "topic": "kv"}}')
    with serving(FakeEngine(), kv_events=KvEventPublisher(config)) as running:
        (source,) = running.http.get("/kv_event_sources").json().values()
        assert source["endpoint"] == config.endpoint and source["topic"] == "kv"
        with pytest.raises(ValueError, match="cannot be published"):
            KvEventPublisher(config)
    with serving(FakeEngine()) as running:
        assert running.http.get("/kv_event_sources").json() == {}


@pytest.mark.parametrize("text", ["", "{", '{"endpoint": 3}', '{"port": 3}', '{"publisher": "x"}'])
def test_a_configuration_that_is_none_is_one_line(text):
    with pytest.raises(ValueError, match="kv_events_config=") as error:
        KvEventsConfig.decode(text)
    assert "\n" not in str(error.value)


def test_slots_have_no_prefixes_to_tell_of():
    with pytest.raises(ValueError, match="no KV events without cached prefixes"):
        AsyncEngine(engine(memory="slots", num_pages=None), on_changes=print)
