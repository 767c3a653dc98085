"""The prefix tree: which pages hold the keys and values of which tokens.

A node is one full page of tokens behind its parent's; keys are the tokens themselves, so they
compare exactly and nothing collides. It is RadixAttention's tree (arXiv 2312.07104) with edges of
a page each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fusedkv_jax.serving.request import Request


class Node:
    """One page of tokens, behind its parent's.

    Attributes:
        parent: None for a root.
        key: its tokens; of a root its salt.
        page: where its keys and values are, or -1.
        host_page: where a copy is in host memory, or -1.
        users: running requests that read the page.
        pins: swapped-out requests that need the copy.
        children: by their tokens.
    """

    __slots__ = ("parent", "key", "page", "host_page", "users", "pins", "children")

    def __init__(self, parent: Node | None, key: bytes):
        self.parent, self.key = parent, key
        self.page = self.host_page = -1
        self.users = self.pins = 0
        self.children: dict[bytes, Node] = {}


class PrefixChange(NamedTuple):
    """A node has come to lie in a page of the device, or lies in none any more.

    A node's parent and key never change, so any thread may read them later.
    """

    node: Node
    stored: bool


class PrefixTree:
    """Nodes of all salts, each salt with a root of its own as long as it has nodes.

    Args:
        page_size: tokens of a page.
    """

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.version = 0  # changes with the set of nodes
        self._roots: dict[str, Node] = {}

    def root(self, salt: str) -> Node:
        """The empty prefix of one salt."""
        return self._roots.get(salt) or Node(None, salt.encode())

    def match(self, request: Request) -> list[Node]:
        """Nodes of the request's leading full pages, as far as there are any.

        The last known token is left out: its logits are needed, so it is computed anew. Nothing is
        found for a request whose prompt is scored.
        """
        if request.scored:
            return []
        found: list[Node] = []
        children = self.root(request.salt).children
        full = (request.length - 1) // self.page_size
        for key in request.page_keys(0, full, self.page_size):
            node = children.get(key)
            if node is None:
                break
            found.append(node)
            children = node.children
        return found

    def add(self, parent: Node, key: bytes) -> Node:
        """A child that is not there yet."""
        assert key not in parent.children
        if parent.parent is None:
            self._roots[parent.key.decode()] = parent
        node = parent.children[key] = Node(parent, key)
        self.version += 1
        return node

    def remove(self, node: Node) -> None:
        """Forget a node that has no children."""
        parent = node.parent
        assert not node.children and parent is not None
        del parent.children[node.key]
        if parent.parent is None and not parent.children:  # requests may all have other salts
            del self._roots[parent.key.decode()]
        self.version += 1

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots, parents first."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())
