"""Losses over pairs by a choice of measure: similarities, or powers of Euclidean distances."""

from __future__ import annotations

from .. import policy

#: Squared distances up to this share of the mean of the squared norms count as 0, and have no
#: slope: what rounding leaves of 2 - 2 c would decide it, and the slope of a root is not bounded.
_LEAST = 1e-6
#: Beyond every hinge.
BEYOND = 1e30


class _Measured(policy.Pair):
    """Formulas of unit vectors; a similarity t is larger for nearer pairs: minus a distance."""

    measure: policy.Number = policy.number("similarity", choices=("similarity", "distance"))
    power: policy.Number = policy.number(1.0, above=0.0)

    def _similarity(self, c):
        squared, least = self._squared(c), _LEAST * self._size()
        distance = policy.pow(policy.maximum(squared, least), self.power / 2)
        distance = policy.where(squared > least, distance, 0)
        return policy.where(self.measure == "similarity", c, -distance)

    def _squared(self, c):
        return 2 - 2 * c

    def _size(self):
        return 1


class _Raw(_Measured):
    """Formulas of vectors as they are."""

    normalize = False

    def _squared(self, c):
        return 2 * (self._size() - c)

    def _size(self):
        return 0.5 * (policy.square(self.row_norm) + policy.square(self.column_norm))


class Softmax(_Measured):
    """Every positive against all negatives of its row, as ``pair_softmax``."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(1.0, above=0.0)

    def positive(self, c):
        return self.scale * self._similarity(c)

    def negative(self, c):
        return self.scale * self._similarity(c)


class AgainstAll(_Measured):
    """The log-sum-exp of a row's pairs of both kinds, or, of a ``lone`` positive, that less its
    logit: exact where next to nothing is left.
    """

    combine = "logsumexps"
    scale: policy.Number = policy.number(1.0, above=0.0)
    lone: policy.PerRow

    def positive(self, c):
        return self.scale * self._similarity(c)

    def negative(self, c):
        return self.scale * self._similarity(c)

    def finish(self, positives, negatives):
        rest = policy.softplus(negatives - positives)
        return rest + policy.where(self.lone > 0.5, 0, positives)


class OwnLogits(_Measured):
    """The sum of a row's positives' logits."""

    scale: policy.Number = policy.number(1.0, above=0.0)

    def positive(self, c):
        return self.scale * self._similarity(c)


class SoftHinges(_Measured):
    """Soft hinges of a row's log-sum-exps, as ``multi_similarity`` and ``proxy_anchor``."""

    combine = "logsumexps"
    alpha: policy.Number = policy.number(1.0, above=0.0)
    beta: policy.Number = policy.number(1.0, above=0.0)
    positive_base: policy.Number = 0.0
    negative_base: policy.Number = 0.0
    of_positives: policy.Number = 1.0
    of_negatives: policy.Number = 1.0
    #: Added to the logits of a column.
    offset: policy.PerColumn

    def positive(self, c):
        return self.alpha * (self.positive_base - self._similarity(c)) + self.offset

    def negative(self, c):
        return self.beta * (self._similarity(c) - self.negative_base) + self.offset

    def finish(self, positives, negatives):
        own = self.of_positives * policy.softplus(positives)
        return own + self.of_negatives * policy.softplus(negatives)


class Hinges(_Measured):
    """Weighted sums of the positives' and of the negatives' hinges, or how many there are; those
    outside of (low, high) are left out.
    """

    positive_margin: policy.Number = 0.0
    negative_margin: policy.Number = 0.0
    positive_low: policy.Number = -1.0
    positive_high: policy.Number = BEYOND
    negative_low: policy.Number = -1.0
    negative_high: policy.Number = BEYOND
    counted: policy.Number = policy.number("no", choices=("no", "yes"))
    of_positives: policy.Scalar
    of_negatives: policy.Scalar

    def positive(self, c):
        hinge = policy.maximum(self.positive_margin - self._similarity(c), 0)
        return self.of_positives * self._kept(hinge, self.positive_low, self.positive_high)

    def negative(self, c):
        hinge = policy.maximum(self._similarity(c) - self.negative_margin, 0)
        return self.of_negatives * self._kept(hinge, self.negative_low, self.negative_high)

    def _kept(self, hinge, low, high):
        found = policy.where(self.counted == "yes", 1, hinge)
        return policy.where((hinge > low) & (hinge < high), found, 0)


class RawSoftmax(_Raw, Softmax):
    """Without normalization."""


class RawAgainstAll(_Raw, AgainstAll):
    """Without normalization."""


class RawOwnLogits(_Raw, OwnLogits):
    """Without normalization."""


class RawSoftHinges(_Raw, SoftHinges):
    """Without normalization."""


class RawHinges(_Raw, Hinges):
    """Without normalization."""


#: The same formula of vectors as they are.
RAW: dict[type[policy.Pair], type[policy.Pair]] = {
    Softmax: RawSoftmax,
    AgainstAll: RawAgainstAll,
    OwnLogits: RawOwnLogits,
    SoftHinges: RawSoftHinges,
    Hinges: RawHinges,
}
