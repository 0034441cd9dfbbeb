"""Softmax whose logits keep the norms: SphereFace (CVPR 2017) and L-Softmax (ICML 2016)."""

from __future__ import annotations

from .. import policy


class NormSoftmax(policy.Class):
    """The target's angle is multiplied; logits are cosines times norms."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(1.0, above=0.0)
    m1: policy.Number = policy.number(1.0, above=0.0)
    #: Of a class, such as the norm of its weights.
    size: policy.PerIdentity

    def positive(self, c):
        turned = policy.where(self.m1 == 1, c, policy.cosine_margin(c, self.m1))
        return self._size() * turned

    def negative(self, c):
        return self._size() * c

    def _size(self):
        return self.scale * self.row_norm * self.size
