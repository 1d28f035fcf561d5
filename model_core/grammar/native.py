"""xgrammar's native classes without its Python package, which imports transformers and torch for what is not used here.

They are below the package's public surface, hence the exact version in pyproject.toml. Their texts are documented with the
wrappers of the same names in the package's compiler.py, matcher.py and tokenizer_info.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def _load() -> Any:
    found = importlib.util.find_spec("xgrammar")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("xgrammar is not installed")
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")  # no tensor of torch is given to it; else it may compile C++
    package = ModuleType("xgrammar")  # stands for the package while its parts are imported, so that __init__.py is not run
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["xgrammar"] = package
    try:
        import_module("xgrammar.load_binding")
        return import_module("xgrammar.tvm_ffi_binding._ffi_api")
    finally:
        del sys.modules["xgrammar"]


if "xgrammar" in sys.modules:  # somebody has imported all of it
    native: Any = import_module("xgrammar.tvm_ffi_binding._ffi_api")
else:
    native = _load()
