"""Batches of P identities with K images of each, for losses over pairs.

Batches take identities from one endless sequence of rounds, each all identities in an order of its
own; an epoch is as many steps as with a plain shuffle. So identities are seen equally often,
whatever their number of images. Of one identity's images, a block of visits goes round and round
one permutation and ends where every image was seen equally often; the next block has another
permutation. Everything follows from the number of the visit: no epoch depends on another.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError

Rows = NDArray[np.int64]


def check_balanced(
    identities: int, *, batch_size: int, images_per_identity: int, world_size: int = 1
) -> None:
    each = images_per_identity * world_size
    if batch_size % each:
        processes = f" times {world_size} processes" if world_size > 1 else ""
        raise UserError(
            f"data.sampler=balanced: train.batch_size={batch_size} is no multiple of "
            f"data.images_per_identity={images_per_identity}{processes}"
        )
    if identities * images_per_identity < batch_size:
        raise UserError(
            f"data.sampler=balanced: {batch_size // images_per_identity} identities in a batch of "
            f"{batch_size} at {images_per_identity} images each; data.path has {identities}"
        )


def balanced_order(
    labels: Rows, *, seed: int, epoch: int, steps: int, batch_size: int, images_per_identity: int
) -> Rows:
    """Images of the epoch's steps, (steps * batch_size,), each identity's of a batch in a row."""
    k = images_per_identity
    counts = np.bincount(labels)
    identities = np.flatnonzero(counts)
    check_balanced(len(identities), batch_size=batch_size, images_per_identity=k)
    per_batch = batch_size // k
    first = epoch * steps * per_batch
    chosen, visits = _identities(len(identities), first, steps * per_batch, per_batch, seed)
    images = np.argsort(labels, kind="stable")
    counts = counts[identities]
    starts = np.cumsum(counts) - counts

    # A block ends after n visits, or earlier where n and k have a common divisor.
    block, within = np.divmod(visits, (counts // np.gcd(counts, k))[chosen])
    touched, which = np.unique(block * len(identities) + chosen, return_inverse=True)
    number, owner = np.divmod(touched, len(identities))
    table, begins = _permutations(starts[owner], counts[owner], number, seed)
    places = (within[:, None] * k + np.arange(k)) % counts[chosen][:, None]
    return images[table[begins[which][:, None] + places]].reshape(-1)


def _generator(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))


def _identities(
    identities: int, first: int, count: int, per_batch: int, seed: int
) -> tuple[Rows, Rows]:
    """Places ``first`` to ``first + count`` of the sequence, and the rounds they are of.

    Every identity is seen once a round, so the round is the number of the visit.
    """
    begin, end = first // identities, -(-(first + count) // identities)
    # A batch may begin in one round and end in the next, which then depends on the other's tail.
    # That is out of the reach of the swaps below, unless identities are few: then rounds are built
    # from the last one that began with a batch.
    if identities >= 2 * per_batch:
        start = max(0, begin - 1)
    else:
        start = begin - begin % (per_batch // math.gcd(identities, per_batch))
    rounds: list[Rows] = []
    for index in range(start, end):
        order = _generator(seed, index).permutation(identities)
        begun = index * identities % per_batch
        if begun and rounds:
            _keep_out(order, rounds[-1][-begun:], per_batch - begun)
        rounds.append(order)
    skipped = first - start * identities
    visits = np.repeat(np.arange(start, end), identities)
    return np.concatenate(rounds)[skipped:][:count], visits[skipped:][:count]


def _keep_out(order: Rows, seen: Rows, ahead: int) -> None:
    """Swaps those ``seen`` among the first ``ahead`` with others, which lie right behind those."""
    conflicts = np.flatnonzero(np.isin(order[:ahead], seen))
    behind = order[ahead : ahead + len(seen)]
    free = ahead + np.flatnonzero(~np.isin(behind, seen))[: len(conflicts)]
    order[conflicts], order[free] = order[free], order[conflicts]


def _permutations(starts: Rows, sizes: Rows, numbers: Rows, seed: int) -> tuple[Rows, Rows]:
    """Permutations of ``sizes`` images from ``starts`` on, in the block of this number of each.

    They lie one after another in the first array; the second says where each begins.
    """
    begins = np.cumsum(sizes) - sizes
    permutation = np.repeat(np.arange(len(sizes)), sizes)
    image = (starts - begins)[permutation] + np.arange(len(permutation))
    keys = _hash(_hash(np.uint64(seed % 2**64), numbers)[permutation], image)
    # 32 bits decide; images that agree in them keep their order.
    keys = (permutation.astype(np.uint64) << np.uint64(32)) | (keys >> np.uint64(32))
    return image[np.argsort(keys, kind="stable")], begins


def _hash(state: NDArray[np.uint64] | np.uint64, index: Rows) -> NDArray[np.uint64]:
    """Number ``index`` of the random sequence from ``state``: SplitMix64 (Steele et al., 2014)."""
    x = state + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
