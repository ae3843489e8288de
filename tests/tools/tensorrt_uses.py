# SPDX-License-Identifier: Apache-2.0
"""Finds what a source file uses of TensorRT: each name with the class it belongs to, and the
arguments it is called with.

The types of variables come from their annotations (`tensorrt.IExecutionContext`), those of results
from `RESULTS`.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

from tensorrt_names import CLASSES

#: What a call or a property returns, where that is an object of TensorRT's.
RESULTS = {
    ("Builder", "create_network"): "INetworkDefinition",
    ("Builder", "create_builder_config"): "IBuilderConfig",
    ("Builder", "create_optimization_profile"): "IOptimizationProfile",
    ("IBuilderConfig", "get_timing_cache"): "ITimingCache",
    ("IBuilderConfig", "create_timing_cache"): "ITimingCache",
    ("INetworkDefinition", "get_input"): "ITensor",
    ("INetworkDefinition", "get_output"): "ITensor",
    ("INetworkDefinition", "get_layer"): "ILayer",
    ("ILayer", "get_output"): "ITensor",
    ("ILayer", "type"): "LayerType",
    ("ITensor", "dtype"): "DataType",
    ("OnnxParser", "get_error"): "ParserError",
    ("Runtime", "deserialize_cuda_engine"): "ICudaEngine",
    ("ICudaEngine", "create_execution_context"): "IExecutionContext",
    ("ICudaEngine", "create_engine_inspector"): "EngineInspector",
    ("ICudaEngine", "get_tensor_dtype"): "DataType",
    ("", "get_plugin_registry"): "IPluginRegistry",
    ("ILogger", "Severity"): "type Severity",
}
#: Parameters that are typed Any where several kinds of TensorRT meet.
PARAMETERS = {"engine": "ICudaEngine", "context": "IExecutionContext", "trt": "module"}
#: Functions, with their number of arguments, that ask whether a name exists.
ASKING = {("hasattr", 2), ("getattr", 3)}


@dataclass(frozen=True)
class Use:
    """One use of a name of TensorRT.

    Attributes:
        call: how many arguments by position, and those by name; None: not called.
        asked: only after `hasattr`, or with a default.
    """

    where: str
    owner: str
    name: str
    written: bool = False
    call: tuple[int, frozenset[str]] | None = None
    asked: bool = False


class Finder(ast.NodeVisitor):
    """Finds the uses of one module.

    Types: "C" an object of class C, "type C" the class, "module" TensorRT itself.

    Attributes:
        unresolved: names of TensorRT's, with an underscore or capitals, on something whose type is
            not known.
    """

    def __init__(self, file: Path, known: set[str]) -> None:
        self.uses: list[Use] = []
        self.unresolved: dict[str, None] = {}
        self._file = file.name
        self._known = known
        self._scopes: list[dict[str, str]] = [{}]
        self._attributes: dict[str, str] = {}  # of self
        self._returns: dict[str, str] = {}
        self._done: set[int] = set()
        self._asked: set[str] = set()
        self._modules: set[str] = set()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (kind := self._annotated(node.returns)):
                self._returns[node.name] = kind
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
                self._attributes[node.target.attr] = self._annotated(node.annotation) or ""
            if isinstance(node, ast.Import):
                self._modules |= {alias.asname or alias.name for alias in node.names}
            if isinstance(node, ast.Call) and (ast.unparse(node.func), len(node.args)) in ASKING:
                self._asked.add(getattr(node.args[1], "value", ""))
        for node in ast.walk(tree):  # what a constructor is given is what it keeps
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                kinds = {a.arg: self._annotated(a.annotation) for a in node.args.args}
                for statement in node.body:
                    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
                        (target,) = statement.targets
                        kind = kinds.get(statement.value.id)
                        if isinstance(target, ast.Attribute) and kind:
                            self._attributes[target.attr] = kind
        self.visit(tree)

    @staticmethod
    def _annotated(annotation: ast.AST | None) -> str | None:
        if isinstance(annotation, ast.BinOp):  # tensorrt.X | None
            return Finder._annotated(annotation.left)
        if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "type":
            inner = Finder._annotated(annotation.slice)
            return f"type {inner}" if inner else None
        if isinstance(annotation, ast.Attribute) and ast.unparse(annotation.value) == "tensorrt":
            return annotation.attr
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        scope = dict(self._scopes[-1])
        for argument in (*node.args.args, *node.args.kwonlyargs):
            kind = self._annotated(argument.annotation)
            unknown = argument.annotation is None or ast.unparse(argument.annotation) in ("Any", "ModuleType")  # fmt: skip
            if kind or unknown:
                scope[argument.arg] = kind or PARAMETERS.get(argument.arg, "")
        self._scopes.append(scope)
        self.generic_visit(node)
        self._scopes.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        kind = self._annotated(node.annotation) or (self.kind(node.value) if node.value else None)
        if isinstance(node.target, ast.Name) and kind:
            self._scopes[-1][node.target.id] = kind
        elif isinstance(node.target, ast.Attribute):
            self.kind(node.target)
        if node.value:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    self._scopes[-1][name.id] = self.kind(value) or ""
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.kind(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.kind(node)
        self.generic_visit(node)

    def kind(self, node: ast.AST, call: ast.Call | None = None) -> str | None:
        """The type of an expression; records it where it is a use."""
        if isinstance(node, ast.Name):
            return self._scopes[-1].get(node.id) or None
        if isinstance(node, ast.Call):
            found = self.kind(node.func, node)
            if found is None and isinstance(node.func, ast.Name | ast.Attribute):
                called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                return self._returns.get(called)
            return found.removeprefix("type ") if found else None
        if not isinstance(node, ast.Attribute):
            return None
        if node.attr == "module":
            return "module"
        base = self.kind(node.value)
        if base is None:
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self._attributes.get(node.attr) or None
            if ast.unparse(node.value) in self._modules:
                return None
            if node.attr in self._known and ("_" in node.attr.strip("_") or node.attr.isupper()):
                self.unresolved[f"{self._file}:{node.lineno} {ast.unparse(node)}"] = None
            return None
        owner = "" if base == "module" else base.removeprefix("type ")
        self._record(node, owner, call)
        if owner == "" and node.attr in CLASSES:
            return f"type {node.attr}"
        return RESULTS.get((owner, node.attr)) or (owner if base.startswith("type ") else None)

    def _record(self, node: ast.Attribute, owner: str, call: ast.Call | None) -> None:
        if id(node) in self._done and call is None:
            return
        self._done.add(id(node))
        arguments = None
        if call is not None and not any(isinstance(a, ast.Starred) for a in call.args):
            arguments = (len(call.args), frozenset(k.arg or "" for k in call.keywords))
        written = isinstance(node.ctx, ast.Store | ast.Del)
        where = f"{self._file}:{node.lineno}"
        asked = node.attr in self._asked
        self.uses.append(Use(where, owner, node.attr, written, arguments, asked))
