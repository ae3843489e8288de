# SPDX-License-Identifier: Apache-2.0
"""Run as a program of its own, by `facts`: imports the modules it is given, one after the other,
and prints a line of JSON for each.

A module that crashes takes this process with it, not the one that asks; the lines before it stand.
"""

import importlib
import json
import os
import sys


def describe(name):  # type: ignore[no-untyped-def]
    """What is to be known of a module: a dictionary; {"missing": true} where it is not
    installed.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name == error.name or name.startswith(f"{error.name}."):
            return {"missing": True}
        return {"error": f"needs {error.name}, which is not installed"}
    except BaseException as error:  # whatever a broken installation raises
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    file = getattr(module, "__file__", None)
    if file is None:  # only a folder of that name, without a module in it
        return {"missing": True}
    found = {"version": str(getattr(module, "__version__", "")), "location": os.path.dirname(file)}
    if name == "onnxruntime":
        found["providers"] = list(module.get_available_providers())
        found["cuda"] = str(getattr(module, "cuda_version", "") or "")
    if name.startswith("tensorrt"):
        found["library"] = loaded_library()
        members = getattr(getattr(module, "ComputeCapability", None), "__members__", {})
        numbers = sorted(int(key[2:]) for key in members if key[:2] == "SM" and key[2:].isdigit())
        found["capabilities"] = [f"{number // 10}.{number % 10}" for number in numbers]
    return found


def loaded_library():  # type: ignore[no-untyped-def]
    """The TensorRT library that this process has loaded, where Linux says so."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            paths = [line.split(maxsplit=5)[-1].strip() for line in file if "nvinfer" in line or "tensorrt_rtx" in line]  # fmt: skip
    except OSError:
        return ""
    return next((p for p in paths if os.path.basename(p).startswith(("libnvinfer.so", "libtensorrt_rtx.so"))), "")  # fmt: skip


def main():  # type: ignore[no-untyped-def]
    # Modules are looked for where the stages look, not beside this file or in the folder where the
    # user stands.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path and os.path.abspath(path) != here]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what modules print when they are imported is no answer
    for name in sys.argv[1:]:
        answers.write(json.dumps({"module": name, **describe(name)}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
