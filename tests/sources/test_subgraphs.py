# SPDX-License-Identifier: Apache-2.0
"""What a node reads through the bodies of If and Loop."""

import onnx.parser

from trtdet.sources.subgraphs import captured, reads, subgraphs

MODEL = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["": 17]>
    g (float[2] x, bool c, int64 n) => (float[2] y, float[2] z)
    {
      outer = Relu(x)
      y = If(c) <
        then_branch = a () => (float[2] t) {
          inner = Neg(outer)
          t = If(c) <
            then_branch = b () => (float[2] tt) { tt = Add(inner, x) },
            else_branch = b2 () => (float[2] te) { te = Identity(inner) }
          >
        },
        else_branch = e () => (float[2] outer) { }
      >
      z = Loop(n, c, x) <
        body = l (int64 i, bool go, float[2] state) => (bool still, float[2] next)
          <float[2] own = {1, 2}>
        {
          still = Identity(go)
          sum = Add(state, own)
          next = Add(sum, y)
        }
      >
    }
""")


def test_what_is_captured() -> None:
    relu, branch, loop = MODEL.graph.node
    assert captured(relu) == set()
    # `inner` is made inside; the else branch passes on what is outside.
    assert captured(branch) == {"outer", "x", "c"}
    # `own` is a weight of the body, `state` and `go` are its arguments.
    assert captured(loop) == {"y"}


def test_what_is_read() -> None:
    relu, branch, loop = MODEL.graph.node
    assert reads(relu) == {"x"}
    assert reads(branch) == {"c", "outer", "x"}
    assert reads(loop) == {"n", "c", "x", "y"}
    absent = onnx.helper.make_node("Clip", ["x", "", "top"], ["clipped"])
    assert reads(absent) == {"x", "top"}


def test_subgraphs() -> None:
    assert [[graph.name for graph in subgraphs(node)] for node in MODEL.graph.node] == [[], ["a", "e"], ["l"]]  # fmt: skip
