"""SimPLE of samples with class weights: each is a sample of its class."""

from __future__ import annotations

from dataclasses import replace

from .. import policy
from .from_policy import spec_of
from .simple_pairs import SPEC as PAIRS
from .simple_pairs import Score


class SimPLEProxies(Score, policy.Class):
    pass


SPEC = replace(
    spec_of(
        SimPLEProxies,
        name="simple_proxy",
        function="fused_simple_proxy_loss",
        source="SimPLE (ICCV 2023), published code, with class weights in place of samples",
    ),
    policy=PAIRS.name,
)
