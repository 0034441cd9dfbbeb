"""Ranks agree on a call before any of them does its work.

Collectives that one rank does not take part in hang all others. So every rank first checks its own
arguments, then all exchange whether they can go on, with how many rows and with which arguments.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TypeVar

from . import validate
from .collectives import Group, gather_numbers, gather_texts, host_device

Checked = TypeVar("Checked")


def agree(
    check: Callable[[], tuple[Checked, int, dict[str, object]]], group: Group
) -> tuple[Checked, list[int]]:
    """What ``check`` returned on this rank, and the rows of every rank.

    Args:
        check: raises for a mistake of this rank; else returns anything, the number of rows, and
            what has to be the same on every rank.
        group: every rank of it calls this.

    Raises:
        Exception: what ``check`` raised, on the ranks where it did.
        ValueError: on all others, with the ranks at fault; on all ranks if they differ.
    """
    checked, count, shared, mistake = None, 0, "", None
    try:
        checked, count, same = check()
        shared = json.dumps({name: str(value) for name, value in same.items()})
    except Exception as error:
        mistake = error
    # 56 bits: positive as int64.
    digest = int.from_bytes(hashlib.blake2b(shared.encode(), digest_size=7).digest(), "little")
    headers = gather_numbers([count, mistake is None, digest], host_device(group), group).tolist()
    if not all(able for _, able, _ in headers):
        texts = gather_texts("" if mistake is None else str(mistake), group)
        if mistake is not None:
            raise mistake
        validate.no_rank_failed({k: texts[k] for k, (_, able, _) in enumerate(headers) if not able})
    if len({digest for _, _, digest in headers}) > 1:
        # Rare, so the arguments themselves travel only now.
        validate.same_on_ranks(_by_rank(gather_texts(shared, group)))
    assert checked is not None
    return checked, [count for count, _, _ in headers]


def _by_rank(texts: list[str]) -> list[dict[str, str]]:
    return [json.loads(text) for text in texts]
