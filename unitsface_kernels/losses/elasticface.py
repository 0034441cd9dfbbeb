"""ElasticFace: margins that are drawn for every row (CVPRW 2022)."""

from __future__ import annotations

from .. import policy
from .class_margin import ClassMargin
from .custom import register
from .from_policy import spec_of
from .margin_softmax import SPEC as MARGIN_SOFTMAX


class ElasticFace(ClassMargin):
    kind: policy.Number = policy.number("arc", choices=("arc", "cos"))
    margin: policy.PerRow = 0.5


SPEC = register(
    spec_of(
        ElasticFace,
        name="elasticface",
        function="fused_elasticface_loss",
        source="ElasticFace (CVPRW 2022), ElasticFace-Arc and ElasticFace-Cos",
        tiles=MARGIN_SOFTMAX,
    )
)
