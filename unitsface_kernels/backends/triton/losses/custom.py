"""Policies of losses outside the registry: modules generated from their formulas."""

from __future__ import annotations

import hashlib
import linecache
from types import ModuleType

from .... import cache
from ....losses import LossSpec
from .policy import Policy

#: By name. Kernels are launched with functions of theirs as constants: they are never dropped.
_modules: dict[str, ModuleType] = {}


def custom_policy(spec: LossSpec) -> Policy:
    """The policy of a loss that is a formula."""
    from ....policy.triton_source import triton_module

    assert spec.formula is not None
    policy: Policy = module_of(triton_module(spec.formula)).POLICY
    return policy


def module_of(text: str) -> ModuleType:
    """``text`` as a module, of a file in the cache folder if there can be one.

    What is executed here, and what Triton compiles, is the text itself: Python's cache of source
    lines has it. The file serves debuggers and profilers; a change of it has no effect.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = f"{__name__}.generated_{digest}"
    found = _modules.get(name)
    if found is None:
        file = _file(f"{digest}.py", text)
        linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
        found = _modules[name] = ModuleType(name)
        found.__file__ = file
        exec(compile(text, file, "exec"), vars(found))
    return found


def _file(name: str, text: str) -> str:
    """Path of the text; without a private cache folder, a name alone."""
    try:
        path = cache.private_folder("triton") / name
        if not path.exists() or path.read_bytes() != text.encode():
            cache.write(path, text.encode())
    except (OSError, cache.UnsafeFolderError):
        return f"<{name}>"
    return str(path)
