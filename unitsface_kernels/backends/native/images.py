"""Which devices run the kernel images of a build, by the architectures that it was made for.

The rules are those of the CUDA C++ Programming Guide ("Binary Compatibility", "PTX Compatibility").
"""

from __future__ import annotations

import functools
import re

Capability = tuple[int, int]

# An entry of CMAKE_CUDA_ARCHITECTURES: "90" is machine code and PTX, "-real" and "-virtual" are one
# of them, "a" runs on this architecture alone and "f" on its family.
_ENTRY = re.compile(r"(\d+)(\d)([af]?)(?:-(real|virtual))?")


def _entries(compiled: str) -> list[re.Match[str] | None]:
    return [_ENTRY.fullmatch(entry) for entry in re.split(r"[,; ]+", compiled) if entry]


@functools.cache
def fits(compiled: str, capability: Capability) -> bool:
    """Whether a device of ``capability`` runs code for ``compiled``, such as "80,90-virtual"."""
    # What is not known here is left to the driver.
    return any(entry is None or _runs(entry, capability) for entry in _entries(compiled))


def _runs(entry: re.Match[str], capability: Capability) -> bool:
    built = (int(entry[1]), int(entry[2]))
    if entry[3] == "a":
        return capability == built
    if entry[3] == "f" or entry[4] == "real":
        return capability[0] == built[0] and capability >= built
    # PTX is compiled for any newer architecture when it is loaded.
    return capability >= built


def described(compiled: str) -> str:
    """Text such as "machine code for 8.0 and 9.0, PTX for 9.0"."""
    kinds: dict[str, list[str]] = {"real": [], "virtual": []}
    for entry in _entries(compiled):
        if entry is None:
            return compiled
        name = f"{entry[1]}.{entry[2]}{entry[3]}"
        for kind in [entry[4]] if entry[4] else kinds:
            kinds[kind].append(name)
    texts = {"real": "machine code", "virtual": "PTX"}
    return ", ".join(f"{texts[k]} for {' and '.join(names)}" for k, names in kinds.items() if names)
