"""Triton's interpreter without what these tests do not need of it.

For every launch, and every call of one kernel function by another, it replaces the members of
``triton.language`` by its own, a millisecond each. Nothing else of a process that interprets
kernels needs the originals: they are replaced once. It also repeats every integer operation in 64
bits to find overflows, which tensors of a few kilobytes cannot have.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType, SimpleNamespace


def prepare_once(interpreter: ModuleType) -> bool:
    """Changes ``triton.runtime.interpreter``; returns whether this version of it is known."""
    scope, prepare = (getattr(interpreter, n, None) for n in ("_LangPatchScope", "_patch_lang"))
    builder = getattr(interpreter, "interpreter_builder", None)
    if scope is None or prepare is None or builder is None:
        return False
    language = interpreter.tl
    prepare(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda fn: scope()
    builder.options = replace(builder.options, sanitize_overflow=False)
    return True
