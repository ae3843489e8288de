# SPDX-License-Identifier: Apache-2.0
"""Custom ONNX operators replaced by TensorRT plugins: `--map_op CustomOp=PluginName[:version]`.

A framework's exporter writes an operator of its own where it has no ONNX one; TensorRT finds a
plugin by the node's operator type and the attributes `plugin_version` and `plugin_namespace`.
Inputs, outputs and all other attributes, which are the plugin's fields, stay as they are: that the
plugin wants them so is between the exporter and the plugin.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from trtdet.errors import GraphError
from trtdet.graph.builder import PLUGIN_DOMAIN, forget_domain, import_domain, with_shapes
from trtdet.graph.deformable_attention import PLUGIN_OP
from trtdet.sources.base import Source, nodes_between
from trtdet.sources.onnx_file import OnnxSource
from trtdet.sources.subgraphs import subgraphs

logger = logging.getLogger(__name__)


#: Version of a plugin where none is said, as TensorRT's own plugins and its ONNX parser have it.
DEFAULT_VERSION = "1"
#: The domain of what ONNX Runtime has beside ONNX's own operators.
ONNX_RUNTIME_DOMAIN = "com.microsoft"
#: ONNX's operators for arithmetic in 8 bits that is not Q/DQ.
INTEGER_OPS = frozenset(("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"))  # fmt: skip


@dataclass(frozen=True)
class OpMapping:
    """One custom operator and the plugin that computes it.

    Attributes:
        op: operator type in the ONNX file, in any domain; "domain::op" in that domain alone.
        plugin: name of the plugin.
        version: of the plugin.
    """

    op: str
    plugin: str
    version: str = DEFAULT_VERSION

    @classmethod
    def parse(cls, text: str) -> "OpMapping":
        """'CustomOp=PluginName', 'CustomOp=PluginName:2', 'domain::CustomOp=PluginName'.

        Raises:
            ValueError: another form; argparse shows it as it is.
        """
        op, _, target = text.partition("=")
        plugin, colon, version = target.partition(":")
        if not op or not plugin or (colon and not version) or ":" in version:
            raise ValueError(
                f"expected CustomOp=PluginName or CustomOp=PluginName:version, got {text!r}"
            )
        return cls(op.strip(), plugin.strip(), version.strip() or DEFAULT_VERSION)

    def applies_to(self, node: onnx.NodeProto) -> bool:
        domain, separator, op = self.op.rpartition("::")
        return node.op_type == op and (not separator or node.domain == domain)


def map_ops(model: onnx.ModelProto, mappings: Sequence[OpMapping]) -> int:
    """Replace the operators in place, in the bodies of If, Loop and Scan too.

    op(inputs, attributes)  ->  trt.plugins::plugin(inputs, attributes, plugin_version)

    A version that the node carries already is replaced. trtdet/nms/plugin.py says why the domain is
    "trt.plugins".

    Returns:
        Number of nodes replaced.

    Raises:
        GraphError: an operator that the model does not have, or that is mapped twice.
    """
    ops = [mapping.op for mapping in mappings]
    if doubled := sorted({op for op in ops if ops.count(op) > 1}):
        raise GraphError(
            f"--map_op: expected one plugin for each operator, found several for {doubled}"
        )
    counts = dict.fromkeys(mappings, 0)
    former: set[str] = set()
    for node in _all_nodes(model.graph):
        mapping = next((m for m in mappings if m.applies_to(node)), None)
        if mapping is None:
            continue
        counts[mapping] += 1
        former.add(node.domain)
        node.op_type, node.domain = mapping.plugin, PLUGIN_DOMAIN
        kept = [a for a in node.attribute if a.name != "plugin_version"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("plugin_version", mapping.version)])
    for mapping, count in counts.items():
        if not count:
            raise GraphError(
                f"--map_op {mapping.op}={mapping.plugin}: expected such an operator in the model, found "
                f"{', '.join(custom_ops(model)) or 'none that is not ONNX'}"
            )
        logger.info(
            "%s: %d nodes become %s, version %s", mapping.op, count, mapping.plugin, mapping.version
        )
    if any(counts.values()):
        import_domain(model, PLUGIN_DOMAIN)
    used = {node.domain for node in _all_nodes(model.graph)}
    for domain in former - used - {"", "ai.onnx"}:
        forget_domain(model, domain)
    return sum(counts.values())


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes of the graph and of all graphs inside it."""
    return _within(graph.node)


def _within(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes, and those of all graphs inside them."""
    found = []
    for node in nodes:
        found.append(node)
        for inner in subgraphs(node):
            found.extend(_all_nodes(inner))
    return found


def custom_ops(model: onnx.ModelProto) -> list[str]:
    """Operators that ONNX does not define, with their domain."""
    return _custom_ops(_all_nodes(model.graph))


def _custom_ops(nodes: Iterable[onnx.NodeProto]) -> list[str]:
    return sorted(
        {
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            for node in nodes
            if not onnx.defs.has(node.op_type, node.domain)
        }
    )


def ops_of_onnxruntime(model: onnx.ModelProto) -> list[str]:
    """Operators that ONNX Runtime's optimizer and quantizer write, and that TensorRT does not read:
    https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md. Its parser takes an operator
    by its name: those of "com.microsoft" that ONNX has too (Q/DQ, Gelu) are read by TensorRT-RTX
    1.7, FusedConv and BiasGelu are not.
    """
    integer = {node.op_type for node in _all_nodes(model.graph)} & INTEGER_OPS
    domains = (op.rpartition("::") for op in custom_ops(model))
    own = [
        f"{domain}::{op}"
        for domain, _, op in domains
        if domain.startswith(ONNX_RUNTIME_DOMAIN)
        and not (domain == ONNX_RUNTIME_DOMAIN and onnx.defs.has(op))
    ]
    return [*own, *sorted(integer)]


def unknown_ops(source: Source, tensors: Sequence[str]) -> list[str]:
    """Custom operators between the inputs and `tensors` that keep ONNX Runtime from computing
    these.

    Known are its own, and the one that `deformable_attention.lower` replaces before anything runs.
    """
    if not isinstance(source, OnnxSource):
        return []
    between = nodes_between(source.model, source.graph.inputs, tensors)
    names = (op.rpartition("::") for op in _custom_ops(_within(between)))
    return [
        domain + separator + op
        for domain, separator, op in names
        if domain != ONNX_RUNTIME_DOMAIN and op != PLUGIN_OP
    ]


def check_runs(source: Source, family: str, tensors: Sequence[str]) -> None:
    """For a family that has to measure the network.

    Raises:
        GraphError: ONNX Runtime does not know all operators up to `tensors`.
    """
    if unknown := unknown_ops(source, tensors):
        raise GraphError(
            f"{source.path}: expected operators that ONNX Runtime can run, since the family '{family}' is measured by running the "
            f"network, found {', '.join(unknown)}; export the model with ONNX's own operators there"
        )


def inferred_shapes(model: onnx.ModelProto, tensors: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Tensor -> its shape as the file declares it or as it follows without running anything.

    Raises:
        GraphError: a dimension behind the first is not known.
    """
    graph = with_shapes(model).graph
    found = {
        info.name: tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        for info in (*graph.value_info, *graph.output)
    }
    for tensor in tensors:
        shape = found.get(tensor, ())
        if not shape or not all(shape[1:]):
            raise GraphError(
                f"expected the shape of '{tensor}' in the file, since ONNX Runtime cannot run the network, found {list(shape)} (0: "
                "dynamic); export the model with fixed height and width"
            )
    return {tensor: found[tensor] for tensor in tensors}
