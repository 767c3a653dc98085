"""Depth first over the prefix tree, heaviest subtree first (RadixAttention, arXiv 2312.07104)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fusedkv_jax.serving.policy import Policy, View
from fusedkv_jax.serving.prefix import Node
from fusedkv_jax.serving.request import Request


class DFSWeight(Policy):
    """Waiting requests in depth-first order of the prefix they match in the tree.

    The weight of a node is the number of requests that wait below it; heavier children come
    first, so that requests of one prefix run together.

    Args:
        longest_queue: waiting requests up to which prefixes are compared.
    """

    def __init__(self, longest_queue: int = 128):
        self.longest_queue = longest_queue

    def order(self, queue: Sequence[Request], view: View) -> Iterable[Request]:
        if queue is not view.waiting or not 1 < len(queue) <= self.longest_queue:
            return queue
        here: dict[Node, list[Request]] = defaultdict(list)
        weights: dict[Node, int] = defaultdict(int)
        below: dict[Node, set[Node]] = defaultdict(set)
        roots: dict[str, Node] = {}
        tree = view.memory.tree
        for request in queue:
            root = roots.setdefault(request.salt, tree.root(request.salt))
            path = [root, *tree.match(request)]
            here[path[-1]].append(request)
            for node in path:
                weights[node] += 1
            for parent, child in zip(path, path[1:], strict=False):
                below[parent].add(child)
        return _depth_first(roots.values(), here, weights, below)


def _depth_first(
    nodes: Iterable[Node],
    here: Mapping[Node, list[Request]],
    weights: Mapping[Node, int],
    below: Mapping[Node, set[Node]],
) -> Iterator[Request]:
    stack = sorted(nodes, key=weights.__getitem__)
    while stack:
        node = stack.pop()
        yield from here[node]
        stack += sorted(below[node], key=weights.__getitem__)
