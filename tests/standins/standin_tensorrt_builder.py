# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the build-time half of `tensorrt` 8.6, 10 and 11, which needs a GPU to import or
to start.

It has the names each version has (NVIDIA/TensorRT, python/src at v8.6.1, v10.0.0, v10.13.3, v11.1),
so that a call of what a version lacks is an AttributeError here as there; calls that TensorRT
refuses are refused as it does, with an error in the logger and a None. Its plans are JSON: what was
asked of the builder, and the layers with their types. Nothing is timed or compiled.
"""

import json
from collections.abc import Sequence
from enum import IntEnum
from types import ModuleType
from typing import Any

import onnx

from trtdet.graph import builder
from trtdet.nms import lowering

#: Builder flags: of 8.6, what 10.0 added, what 11.0 removed.
FLAGS_8 = "FP16 INT8 DEBUG GPU_FALLBACK STRICT_TYPES REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS DIRECT_IO REJECT_EMPTY_ALGORITHMS VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME FP8"
ADDED_10 = "BF16 ERROR_ON_TIMING_CACHE_MISS DISABLE_COMPILATION_CACHE STRIP_PLAN REFIT_IDENTICAL WEIGHT_STREAMING"
GONE_10 = "STRICT_TYPES"
GONE_11 = "FP16 INT8 BF16 FP8 OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS REJECT_EMPTY_ALGORITHMS"

#: Operators whose output has another type than their input, or none.
INTEGER_OUTPUTS = {"Shape": "INT64"}
LAYER_TYPES = {"Conv": "CONVOLUTION", "Cast": "CAST", "EfficientNMS_TRT": "PLUGIN_V2", "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE"}  # fmt: skip


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8


class Strict:
    """An object whose attributes are fixed, as those of the bindings are; `ALLOWED` are the ones
    a user may set.
    """

    ALLOWED: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self.ALLOWED:
            raise AttributeError(f"{type(self).__name__} has no writable attribute {name!r}")
        super().__setattr__(name, value)


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def __init__(self) -> None:
        self.initialised = True


class IInt8EntropyCalibrator2:
    """To 10."""

    def __init__(self) -> None:
        self.initialised = True


class Dims(tuple):
    def __new__(cls, shape: Sequence[int]) -> "Dims":
        return super().__new__(cls, shape)


class ITensor(Strict):
    ALLOWED = ("name",)

    def __init__(self, name: str, dtype: DataType, shape: Sequence[int] = ()) -> None:
        self.name = name
        self._dtype, self._shape = dtype, Dims(shape)

    @property
    def dtype(self) -> DataType:
        return self._dtype

    @property
    def shape(self) -> Dims:
        return self._shape


class ILayer(Strict):
    ALLOWED = ("name", "metadata", "precision")

    def __init__(self, network: "INetworkDefinition", node: onnx.NodeProto, outputs: Sequence[ITensor]) -> None:  # fmt: skip
        # Set through `super`, not as a user would: with strong typing a user may not.
        for name, value in {"name": node.name, "metadata": f"[ONNX Layer: {node.name}]", "precision": None}.items():  # fmt: skip
            object.__setattr__(self, name, value)
        self._network, self._outputs, self._reads = network, outputs, list(node.input)
        self._output_types: dict[int, DataType] = {}
        self._type = network._module.LayerType[LAYER_TYPES.get(node.op_type, "ELEMENTWISE")]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "precision" and not self._network._has_precision:
            raise AttributeError("ILayer.precision was removed in TensorRT 11")
        if name == "precision" and self._network._strong:
            raise AssertionError("strongly typed network: precision must not be set")
        super().__setattr__(name, value)

    @property
    def type(self) -> Any:
        return self._type

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]

    def set_output_type(self, index: int, dtype: DataType) -> None:
        self._output_types[index] = dtype


class INetworkDefinition(Strict):
    def __init__(self, module: Any, flags: int) -> None:
        self._module = module
        kinds = module.NetworkDefinitionCreationFlag
        known = sum(1 << int(kind) for kind in kinds)
        if flags & ~known:
            raise ValueError(f"unknown network flags {flags:#x}")
        version = module.VERSION
        self._has_precision = version < (11,)
        self._strong = version >= (11,) or ("STRONGLY_TYPED" in kinds.__members__ and bool(flags >> int(kinds.STRONGLY_TYPED) & 1))  # fmt: skip
        self._explicit = version >= (10,) or bool(flags >> int(kinds.EXPLICIT_BATCH) & 1)
        self._layers: list[ILayer] = []
        self._inputs: list[ITensor] = []
        self._outputs: list[ITensor] = []
        self._dequantized: dict[str, DataType] = {}

    num_layers = property(lambda self: len(self._layers))
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class ParserError(Strict):
    def __init__(self, text: str, index: int) -> None:
        self._text, self._index = text, index

    def desc(self) -> str:
        return self._text

    def node(self) -> int:
        return self._index


class ParserError10(ParserError):
    """From 10.0 on an error names its node."""

    def __init__(self, text: str, index: int, node: onnx.NodeProto) -> None:
        super().__init__(text, index)
        self._node = node

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type


class OnnxParser(Strict):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._module = network, network._module
        self._errors: list[ParserError] = []
        self._flags: set[Any] = set()

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def set_flag(self, flag: Any) -> None:
        self._flags.add(self._module.OnnxParserFlag(flag))

    def get_used_vc_plugin_libraries(self) -> list[str]:
        return []

    def parse(self, model: bytes) -> bool:
        proto = onnx.load_model_from_string(model)
        if not self._network._explicit:
            raise AssertionError("the parser takes explicit batch networks only")
        foreign = any(node.domain not in ("", builder.PLUGIN_DOMAIN) for node in proto.graph.node)
        if self._network._strong and not foreign:  # a graph whose types do not fit is refused
            plain = lowering.lower(proto, "graph") if lowering.has_plugin(proto) else proto
            bfloat16 = any(t.data_type == onnx.TensorProto.BFLOAT16 for t in plain.graph.initializer)  # fmt: skip
            onnx.shape_inference.infer_shapes(plain, check_type=not bfloat16, strict_mode=not bfloat16)  # fmt: skip
        graph = onnx.shape_inference.infer_shapes(proto).graph
        kinds = {info.name: info.type.tensor_type.elem_type for info in [*graph.value_info, *graph.output, *graph.input]}  # fmt: skip
        for info in graph.input:
            shape = [d.dim_value or -1 for d in info.type.tensor_type.shape.dim]
            self._network._inputs.append(self._tensor(info.name, kinds, shape))
        for index, node in enumerate(graph.node):
            outputs = [self._tensor(name, kinds) for name in node.output]
            self._network._layers.append(ILayer(self._network, node, outputs))
            if node.op_type == "DequantizeLinear":
                stored = {t.name: t.data_type for t in graph.initializer} | kinds
                fp8 = stored[node.input[0]] == onnx.TensorProto.FLOAT8E4M3FN
                self._network._dequantized[node.output[0]] = DataType.FP8 if fp8 else DataType.INT8
                if not self._network._strong and stored[node.input[1]] != onnx.TensorProto.FLOAT:
                    raise AssertionError("weak typing: scales are float32")
            known = onnx.defs.has(node.op_type) or node.op_type in self._module.PLUGINS
            if not known:
                text = f"Plugin not found: {node.op_type}"
                newer = self._module.VERSION >= (10,)
                self._errors.append(ParserError10(text, index, node) if newer else ParserError(text, index))  # fmt: skip
        self._network._outputs = [self._tensor(info.name, kinds) for info in graph.output]
        return not self._errors

    @staticmethod
    def _tensor(name: str, kinds: dict[str, int], shape: Sequence[int] = ()) -> ITensor:
        names = {
            1: "FLOAT",
            2: "UINT8",
            3: "INT8",
            6: "INT32",
            7: "INT64",
            9: "BOOL",
            10: "HALF",
            16: "BF16",
            17: "FP8",
        }
        return ITensor(name, DataType[names[kinds.get(name) or 1]], shape)


class IOptimizationProfile(Strict):
    def __init__(self) -> None:
        self._shapes: dict[str, list[Dims]] = {}

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise ValueError("shapes are not ordered")
        self._shapes[input] = [min, opt, max]


class ITimingCache(Strict):
    def __init__(self, entries: str) -> None:
        self._entries = entries

    def serialize(self) -> bytes:
        return self._entries.encode()


class IBuilderConfig(Strict):
    ALLOWED = ("builder_optimization_level", "profiling_verbosity", "default_device_type", "DLA_core", "hardware_compatibility_level", "plugins_to_serialize")  # fmt: skip

    def __init__(self, module: Any, logger: ILogger) -> None:
        self._module, self._logger = module, logger
        self._flags = {module.BuilderFlag.TF32}
        self._profiles: list[IOptimizationProfile] = []
        self._pools: dict[Any, int] = {}
        self._cache: ITimingCache | None = None

    def set_flag(self, flag: Any) -> None:
        self._flags.add(self._module.BuilderFlag(flag))

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(self._module.BuilderFlag(flag))

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[self._module.MemoryPoolType(pool)] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        own = f"timings of {self._module.__version__}"
        if serialized_timing_cache not in (b"", own.encode()):
            self._logger.log(Severity.ERROR, "ITimingCache: version tag does not match")
            return None
        return ITimingCache(serialized_timing_cache.decode())

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class IBuilderConfig10(IBuilderConfig):
    """From 10.0 on there is a progress monitor."""

    ALLOWED = (*IBuilderConfig.ALLOWED, "progress_monitor")


class IBuilderConfig8(IBuilderConfig):
    """To 10 there are calibrators."""

    ALLOWED = (*IBuilderConfig.ALLOWED, "int8_calibrator")
    _calibration_profile: IOptimizationProfile | None = None

    def set_calibration_profile(self, profile: IOptimizationProfile) -> bool:
        self._calibration_profile = profile
        return True


class IBuilderConfigBefore11(IBuilderConfig8, IBuilderConfig10):
    ALLOWED = (*IBuilderConfig8.ALLOWED, "progress_monitor")


class Builder(Strict):
    module: Any  # set by make_module

    def __init__(self, logger: ILogger) -> None:
        if self.module.NO_GPU:
            logger.log(Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger
        self._cancelled = False
        self.module.builders.append(self)

    @property
    def cancelled(self) -> bool:
        """For tests: whether the progress monitor stopped a build."""
        return self._cancelled

    @property
    def num_DLA_cores(self) -> int:
        return int(self.module.DLA_CORES)

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(self.module, flags)

    def create_builder_config(self) -> IBuilderConfig:
        version = self.module.VERSION
        kind = IBuilderConfig10 if version >= (11,) else IBuilderConfigBefore11 if version >= (10,) else IBuilderConfig8  # fmt: skip
        return kind(self.module, self._logger)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:  # fmt: skip
        flags = {flag.name for flag in config._flags}
        scales, complaint = self._scales(network, config, flags)
        dynamic = [tensor.name for tensor in network._inputs if -1 in tensor.shape]
        problem = self.module.FAILS or (
            "network has dynamic inputs but no optimization profile" if dynamic and not config._profiles
            else "precision flags are not allowed in a strongly typed network" if network._strong and flags & set(GONE_11.split())
            else complaint if complaint
            else "DLA takes FP16 or INT8" if "GPU_FALLBACK" in flags and not network._strong and "FP16" not in flags
            else ""
        )  # fmt: skip
        if problem:
            self._logger.log(Severity.ERROR, f"IBuilder::buildSerializedNetwork: {problem}")
            return None
        self.module.ON_BUILD()
        monitor = getattr(config, "progress_monitor", None)
        if monitor is not None and not self._report(monitor):
            self._cancelled = True
            self._logger.log(Severity.ERROR, "Build canceled by user")
            return None
        if config._cache is not None:
            config._cache._entries = f"timings of {self.module.__version__}"
        layers = [self._layer(layer, flags, scales) for layer in network._layers]
        plan = {
            "flags": sorted(flags),
            "strong": network._strong,
            "shapes": [p._shapes for p in config._profiles],
            "pools": {pool.name: size for pool, size in config._pools.items()},
            "settings": {name: getattr(config, name) for name in IBuilderConfig.ALLOWED if hasattr(config, name)},
            "scales": scales,
            "pinned": {layer.name: layer.precision.name for layer in network._layers if layer.precision is not None},
            "layers": layers,
        }  # fmt: skip
        return json.dumps(plan).encode()

    def _scales(self, network: INetworkDefinition, config: IBuilderConfig, flags: set[str]) -> tuple[dict[str, str], str]:  # fmt: skip
        """What the calibrator's cache says, and what TensorRT would complain of."""
        calibrator = getattr(config, "int8_calibrator", None)
        if network._strong or ("INT8" not in flags and calibrator is None):
            explicit = network._dequantized and not network._strong
            return {}, "Q/DQ layers without BuilderFlag.INT8" if explicit else ""
        if calibrator is None:
            return (
                {},
                "" if network._dequantized else "calibration failed: no scaling factors detected",
            )
        if network._dequantized:
            return {}, "a calibrator with Q/DQ layers"
        if not calibrator.initialised or calibrator.get_batch_size() != 1:
            return {}, "the calibrator is not initialised"
        header, *lines = calibrator.read_calibration_cache().decode().splitlines()
        major, minor, patch = self.module.VERSION[:3]
        number = f"{major}{minor}0{patch}" if major < 10 else f"{major}{minor:02}{patch:02}"
        if header != f"TRT-{number}-EntropyCalibration2":
            # It would calibrate anew, with images that are not there.
            return {}, f"calibration cache of another version: {header}"
        if (
            config._profiles
            and getattr(config, "_calibration_profile", None) not in config._profiles
        ):
            return {}, "calibration profile is not set"
        return dict(line.rsplit(": ", 1) for line in lines), ""

    @staticmethod
    def _report(monitor: Any) -> bool:
        """Two nested phases. False: the monitor cancelled."""
        assert monitor.initialised
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Timing", "Building", 3)
        for step in range(3):
            if not monitor.step_complete("Timing", step):
                return False
        monitor.phase_finish("Timing")
        going = monitor.step_complete("Building", 1)
        monitor.phase_finish("Building")
        return bool(going)

    def _layer(self, layer: ILayer, flags: set[str], scales: dict[str, str]) -> dict[str, Any]:
        """As the inspector has it.

        With weak typing every float layer that is not pinned takes the flag's type.
        """
        fields = []
        for k, tensor in enumerate(layer._outputs):
            dtype = tensor.dtype
            if dtype == DataType.FLOAT and "FP16" in flags and not self.module.KEEPS_FLOAT:
                pinned = layer.precision == DataType.FLOAT and layer._output_types.get(k) == DataType.FLOAT  # fmt: skip
                dtype = DataType.FLOAT if pinned else DataType.HALF
            fields.append(self._tensor_fields(tensor.name, dtype))
        # A convolution takes the DequantizeLinear in front of both its inputs in, and then reads 8
        # bits; with a calibrator, it does wherever it may and knows the scale.
        convolution, found = layer.type.name == "CONVOLUTION", layer._network._dequantized
        implicit = layer._reads[:1] and layer._reads[0] in scales and layer.precision is None
        fused = convolution and ({*layer._reads[:2]} <= found.keys() or implicit)
        read = [self._tensor_fields(name, found.get(name, DataType.INT8)) for name in layer._reads[:1] if fused]  # fmt: skip
        return {"Name": layer.name, "LayerType": layer.type.name, "Inputs": read, "Outputs": fields}

    def _tensor_fields(self, name: str, dtype: DataType) -> dict[str, Any]:
        short = {"FLOAT": "FP32", "HALF": "FP16"}.get(dtype.name, dtype.name)
        if self.module.VERSION >= (11,):
            return {"Name": name, "Format": "Row major linear", "DataType": dtype.name.capitalize()}
        return {"Name": name, "Format/Datatype": f"Row major linear {short} format"}


class BuilderBefore11(Builder):
    """Questions about the GPU that 11.0 removed."""

    platform_has_tf32 = property(lambda self: self.module.HAS_TF32)
    platform_has_fast_fp16 = property(lambda self: self.module.HAS_FP16)
    platform_has_fast_int8 = property(lambda self: self.module.HAS_INT8)


class EngineInspector(Strict):
    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan

    def get_engine_information(self, format: Any) -> str:
        layers = self._plan["layers"]
        if self._plan["settings"].get("profiling_verbosity") != 1:
            layers = [layer["Name"] for layer in layers]
        return json.dumps({"Layers": layers})


class ICudaEngine(Strict):
    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._plan)


class Runtime(Strict):
    ALLOWED = ("engine_host_code_allowed", "DLA_core")

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        plan = json.loads(serialized_engine)
        if "VERSION_COMPATIBLE" in plan["flags"] and not self.engine_host_code_allowed:
            self._logger.log(Severity.ERROR, "host code is not allowed")
            return None
        if "DLA_core" in plan["settings"] and not hasattr(self, "DLA_core"):
            self._logger.log(Severity.ERROR, "the DLA core is not set")
            return None
        return ICudaEngine(plan)


def _enum(name: str, members: str) -> Any:
    return IntEnum(name, members.split(), start=0)


def make_module(version: str, **settings: Any) -> ModuleType:
    """A module to put at `sys.modules["tensorrt"]`.

    Args:
        settings: NO_GPU, DLA_CORES, HAS_TF32, HAS_FP16, HAS_INT8, FAILS (an error message of the
            builder), KEEPS_FLOAT (weak typing that takes no FP16 kernel).
    """
    module: Any = ModuleType("tensorrt")
    numbers = tuple(int(part) for part in version.split("."))
    flags = set(FLAGS_8.split())
    if numbers >= (10,):
        flags = flags - set(GONE_10.split()) | set(ADDED_10.split())
    if numbers >= (11,):
        flags -= set(GONE_11.split())
    creation = "STRONGLY_TYPED PREFER_AOT_PYTHON_PLUGINS" if numbers >= (11,) else "EXPLICIT_BATCH STRONGLY_TYPED" if numbers >= (10,) else "EXPLICIT_BATCH EXPLICIT_PRECISION"  # fmt: skip
    parser_flags = "NATIVE_INSTANCENORM" + (" ENABLE_PLUGIN_OVERRIDE ADJUST_FOR_DLA" if numbers >= (11,) else "")  # fmt: skip
    vars(module).update(
        __version__=version,
        VERSION=numbers,
        PLUGINS=set(),
        builders=[],
        **{"NO_GPU": False, "DLA_CORES": 0, "HAS_TF32": True, "HAS_FP16": True, "HAS_INT8": True, "FAILS": "", "KEEPS_FLOAT": False, "ON_BUILD": int} | settings,
        BuilderFlag=_enum("BuilderFlag", " ".join(sorted(flags))),
        NetworkDefinitionCreationFlag=_enum("NetworkDefinitionCreationFlag", creation),
        OnnxParserFlag=_enum("OnnxParserFlag", parser_flags),
        MemoryPoolType=_enum("MemoryPoolType", "WORKSPACE DLA_MANAGED_SRAM DLA_LOCAL_DRAM DLA_GLOBAL_DRAM"),
        HardwareCompatibilityLevel=_enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS"),
        ProfilingVerbosity=_enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED NONE"),
        LayerInformationFormat=_enum("LayerInformationFormat", "ONELINE JSON"),
        LayerType=_enum("LayerType", "CONVOLUTION CAST CONSTANT SHAPE ELEMENTWISE PLUGIN_V2 QUANTIZE DEQUANTIZE"),
        DeviceType=_enum("DeviceType", "GPU DLA"),
        Builder=type("Builder", (Builder if numbers >= (11,) else BuilderBefore11,), {"module": module}),
    )  # fmt: skip
    for value in (DataType, Dims, ILogger, INetworkDefinition, OnnxParser, Runtime, IBuilderConfig):
        setattr(module, value.__name__, value)
    if numbers >= (10,):
        module.IProgressMonitor = IProgressMonitor
    if numbers < (11,):
        module.IInt8EntropyCalibrator2 = IInt8EntropyCalibrator2

    def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
        module.PLUGINS.add("EfficientNMS_TRT")
        return True

    module.init_libnvinfer_plugins = init_libnvinfer_plugins
    return module
