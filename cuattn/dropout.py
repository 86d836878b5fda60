"""Dropout: the kept bit of a score is a pure function of (seed, batch, head, i, j), whatever the kernel, tiling or padding.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", Philox4x32-10. One Philox block gives 8 words of 16 bits,
spent on 8 keys of one query; kernels/attention/dropout.cuh draws the same bits.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from cuattn.masks import BoolArray, Tile

Words = npt.NDArray[np.uint32]

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: four uint32 words for every counter; the four parts of `counter` are integer arrays that broadcast.

    >>> [hex(int(word)) for word in philox((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = (np.asarray(c).astype(np.uint64) for c in counter)
    k0, k1 = key
    low, half = np.uint64(LOW), np.uint64(32)
    for _ in range(ROUNDS):
        product0, product1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1 = (product1 >> half) ^ c1 ^ np.uint64(k0), product1 & low
        c2, c3 = (product0 >> half) ^ c3 ^ np.uint64(k1), product0 & low
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    c0, c1, c2, c3 = np.broadcast_arrays(c0, c1, c2, c3)
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def keep(seed: int, p: float, tile: Tile) -> BoolArray:
    """True where the score survives; broadcastable to (heads, rows, columns).

    The 8 slots of a block are keys j that differ in bits 0, 3 and 4: the ones that a tensor core accumulator fragment
    holds in one thread.
    """
    threshold = round(p * 65536)
    if threshold <= 0:
        return np.ones((1, 1, 1), np.bool_)
    col = np.asarray(tile.col).ravel()
    group = (col >> 5) * 4 + ((col & 7) >> 1)
    slot = ((col >> 3) & 3) * 2 + (col & 1)
    groups, block = np.unique(group, return_inverse=True)
    words = philox((groups[None, None, :], tile.row, tile.head, tile.batch), (seed & LOW, (seed >> 32) & LOW))
    halves = np.stack([part for word in words for part in (word & np.uint32(0xFFFF), word >> np.uint32(16))], axis=-1)
    return np.asarray(halves[:, :, block, slot] >= threshold, np.bool_)


def dropout_mask(seed: int, p: float, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> BoolArray:
    """Replay of a call's dropout: a boolean array (batch, num_heads, seqlen_q, seqlen_k), True where P survives.

    seed, p: as given to `attention`; `p` in [0, 1). Survivors are rescaled by 1 / (1 - p). Packed and padded calls draw the
    same bits for the same sequence index and coordinates. Raises ValueError for `p` outside [0, 1) and for a negative size.

    >>> bool(dropout_mask(7, 0.0, 1, 2, 3, 4).all()), dropout_mask(7, 0.5, 1, 2, 3, 4).shape
    (True, (1, 2, 3, 4))
    """
    if not 0 <= p < 1:
        raise ValueError(f"p: got {p!r}, expected a probability in [0, 1)")
    seed, shape = operator.index(seed), (batch, num_heads, seqlen_q, seqlen_k)
    if min(shape) < 0:
        raise ValueError(f"sizes: got {shape}, expected none below 0")
    kept = np.empty(shape, np.bool_)
    for b in range(batch):
        tile = Tile.of(b, range(num_heads), range(seqlen_q), range(seqlen_k), seqlen_q, seqlen_k)
        kept[b] = keep(seed, p, tile)
    return kept
