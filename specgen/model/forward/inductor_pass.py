"""Products of a compiled forward by our operators: linear layers that read the same rows are called at once, and
products of batches, as experts have them, are sums that do not depend on the rows beside."""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate
from pathlib import Path

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from specgen.kernels.cpu_backend import DTYPES


class OwnProducts(CustomGraphPass):
    """A pass of Inductor's over a forward, which looks at operations alone, whatever the model calls its layers."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        readers: dict[Node, list[Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=torch.ops.specgen.linear.default):
            readers[node.args[0]].append(node)
        for group in readers.values():
            if len(group) > 1:
                _merge(graph, group)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
            if node.meta["val"].dtype in DTYPES:
                node.target = torch.ops.specgen.bmm.default

    def uuid(self) -> bytes:
        """What the compiler's cache knows it by."""
        return get_hash_for_files((str(Path(__file__)),))


def _merge(graph: Graph, group: list[Node]) -> None:
    """One call in the first one's place; each of the old ones becomes a slice of its answer."""
    rows = group[0].args[0]
    weights, biases, outputs = ([item for node in group for item in node.args[place]] for place in (1, 2, 3))  # type: ignore[union-attr]
    with graph.inserting_before(group[0]):
        together = graph.call_function(torch.ops.specgen.linear.default, (rows, weights, biases, outputs))
        width = group[0].meta["val"].ndim - 1
        together.meta["val"] = torch.cat([node.meta["val"] for node in group], dim=width)
        for node, stop in zip(group, accumulate(sum(node.args[3]) for node in group), strict=True):  # type: ignore[arg-type]
            start = stop - sum(node.args[3])  # type: ignore[arg-type]
            part = graph.call_function(torch.ops.aten.slice.Tensor, (together, width, start, stop))
            part.meta["val"] = together.meta["val"].narrow(width, start, stop - start)
            node.replace_all_uses_with(part)
    for node in group:
        graph.erase_node(node)
