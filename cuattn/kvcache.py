"""`PagedKVCache`: who owns which page of a pool of keys and values. Policy on the host, pages, page table and lengths where the
arrays are; nothing here waits for a device.

A page is free, or referenced by one or more sequences, or kept: full, unreferenced and found again by its tokens. Full pages
whose tokens are known form a tree (a page's place is its tokens and the page before it), so a lookup compares tokens and
cannot mistake one prefix for another. A page is written by one sequence alone: one that is shared or in the tree is copied
before its first write.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cuattn.arrays import Library, library_of
from cuattn.decode import CACHE_DTYPES
from cuattn.problem import FLOATS


class CacheFull(MemoryError):
    """No page or no sequence is left for a request; the cache is as it was before."""


class Statistics(NamedTuple):
    """What a cache holds and has done."""

    pages: int
    free: int
    referenced: int
    """by sequences"""
    kept: int
    """unreferenced prefixes, which make room when pages run out"""
    sequences: int
    tokens: int
    """of all sequences, shared ones counted for each"""
    hits: int
    """tokens found when sequences were added"""
    misses: int
    evictions: int
    """of kept pages"""
    copies: int
    """of pages before a write"""


@dataclass(eq=False)
class _Node:
    """A full page in the tree of prefixes."""

    page: int
    parent: _Node | None
    tokens: tuple[int, ...]
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


@dataclass
class _Sequence:
    pages: list[int] = field(default_factory=list)
    length: int = 0
    tokens: list[int] | None = field(default_factory=list)
    """None once some token is not known"""
    nodes: list[_Node] = field(default_factory=list)
    """of its first pages, as many as are in the tree"""


class Step(NamedTuple):
    """Arguments of `attention_with_kvcache` for the sequences of one `PagedKVCache.append`."""

    page_table: Any
    cache_seqlens: Any
    cache_batch_idx: Any
    k_cache: Any
    v_cache: Any
    """None: values are columns of the keys"""
    head_dim_v: int | None = None
    """of these"""

    def arguments(self, layer: int = 0) -> dict[str, Any]:
        """By name, for one layer."""
        given = {**self._asdict(), "k_cache": self.k_cache[layer]}
        given.pop("v_cache" if self.v_cache is None else "head_dim_v")
        return given if self.v_cache is None else {**given, "v_cache": self.v_cache[layer]}


class PagedKVCache:
    """Keys and values of many sequences in pages of one pool, shared where sequences have a prefix in common.

    num_pages, page_size: of the pool and of a page, in tokens, for each of `layers`.
    dtype: of the elements: a float dtype, or an 8-bit one (`attention_with_kvcache`).
    latent: values are the first head_dim_v columns of the keys; `v_cache` is None, and new tokens are `k` alone.
    max_sequences, max_length: sequences at a time (default: num_pages), and tokens that one may have (default: the pool's).
    like: an array of the kind, and on the device, that the caches shall have; default: NumPy.

    `k_cache` and `v_cache` are (layers, num_pages, page_size, num_heads_kv, head_dim or head_dim_v), `page_table`
    (max_sequences, max_pages) int32. Work is queued on the caller's current stream. Not thread-safe.

    >>> cache = PagedKVCache(8, 4, num_heads_kv=2, head_dim=16, dtype="float32")
    >>> seq = cache.add_sequence()
    >>> new = np.ones((1, 3, 2, 16), np.float32)
    >>> step = cache.append([seq], [[7, 8, 9]])
    >>> from cuattn import attention_with_kvcache
    >>> attention_with_kvcache(new, k=new, v=new, causal=True, **step.arguments()).shape, cache.length(seq)
    ((1, 3, 2, 16), 3)
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        num_heads_kv: int,
        head_dim: int,
        head_dim_v: int | None = None,
        dtype: str = "float16",
        latent: bool = False,
        layers: int = 1,
        max_sequences: int | None = None,
        max_length: int | None = None,
        like: Any = None,
    ) -> None:
        sizes = {"num_pages": num_pages, "page_size": page_size, "num_heads_kv": num_heads_kv, "head_dim": head_dim}
        sizes |= {"head_dim_v": head_dim if head_dim_v is None else head_dim_v, "layers": layers}
        for name, n in sizes.items():
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise ValueError(f"{name}: got {n!r}, expected a positive integer")
        if latent and (head_dim_v is None or head_dim_v > head_dim):
            raise ValueError(f"head_dim_v: got {head_dim_v!r} in a latent cache, expected 1 to {head_dim}, the head_dim")
        if dtype not in (*FLOATS, *CACHE_DTYPES):
            raise TypeError(f"dtype: got {dtype!r}, expected one of {', '.join((*FLOATS, *CACHE_DTYPES))}")
        like = np.empty(0) if like is None else like
        self._library: Library = library_of(like, "like")
        if not self._library.supports_out:
            raise TypeError(f"like: got a {self._library.name} array, expected a kind that can be written")
        device = self._library.device(like, "like")
        self.page_size, self._pages = page_size, num_pages
        self._max_pages = num_pages if max_length is None else -(-max_length // page_size)
        self.max_sequences = num_pages if max_sequences is None else max_sequences

        def zeros(shape: tuple[int, ...], kind: str) -> Any:
            x = self._library.empty(shape, kind, device)
            with self._library.guard(device):
                x[...] = 0
            return x

        lead = (layers, num_pages, page_size, num_heads_kv)
        self.k_cache = zeros((*lead, head_dim), dtype)
        self.v_cache = None if latent else zeros((*lead, sizes["head_dim_v"]), dtype)
        self._head_dim_v = head_dim_v if latent else None
        self.page_table = zeros((self.max_sequences, self._max_pages), "int32")
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._node_of: dict[int, _Node] = {}
        self._kept: OrderedDict[int, _Node] = OrderedDict()  # least recently used first, and children before their parents
        self._roots: dict[tuple[int, ...], _Node] = {}
        self._sequences: dict[int, _Sequence] = {}
        self._rows = list(range(self.max_sequences - 1, -1, -1))
        self._hits = self._misses = self._evictions = self._copies = 0

    # Sequences --------------------------------------------------------------------------------------------------------

    def add_sequence(self, tokens: Sequence[int] | None = None) -> int:
        """A new sequence; returns its number, which is its row of `page_table`.

        tokens: what it will begin with. Pages that hold a prefix of them are shared, so that `length` tokens are there already;
        the last of `tokens` never is, for a model needs one to go on. Raises CacheFull when all rows are taken.
        """
        if not self._rows:
            raise CacheFull(f"all {self.max_sequences} sequences of the cache are in use")
        found = self._find(tokens or ())
        row, sequence = self._rows.pop(), _Sequence()
        self._sequences[row] = sequence
        for node in found:
            self._refer(node.page)
            sequence.pages.append(node.page)
        sequence.nodes, sequence.length = found, len(found) * self.page_size
        sequence.tokens = [token for node in found for token in node.tokens]
        self._hits += sequence.length
        self._misses += len(tokens or ()) - sequence.length
        self._write_table([(row, n, page) for n, page in enumerate(sequence.pages)])
        return row

    def lookup(self, tokens: Sequence[int]) -> int:
        """How many of the first `tokens` a sequence added now would find."""
        return len(self._find(tokens)) * self.page_size

    def fork(self, seq: int) -> int:
        """A new sequence with everything that `seq` has, in the same pages. Raises CacheFull when all rows are taken."""
        source = self._get(seq)
        if not self._rows:
            raise CacheFull(f"all {self.max_sequences} sequences of the cache are in use")
        self._register(source)
        row = self._rows.pop()
        for page in source.pages:
            self._refer(page)
        tokens = None if source.tokens is None else source.tokens.copy()
        self._sequences[row] = _Sequence(source.pages.copy(), source.length, tokens, source.nodes.copy())
        self._write_table([(row, n, page) for n, page in enumerate(source.pages)])
        return row

    def append(self, seqs: Sequence[int], tokens: Sequence[Sequence[int] | int]) -> Step:
        """Make room for new tokens of some sequences; returns what `attention_with_kvcache` needs to write and attend to them.

        tokens: for each of `seqs`, its new tokens, or their number where they are not known (from then on the sequence's pages
        are not found by other sequences). A batch of different numbers takes a packed call. Raises CacheFull, with nothing
        changed, when there are not enough pages.
        """
        if len(seqs) != len(tokens) or len(set(seqs)) != len(seqs):
            raise ValueError(
                f"seqs: got {list(seqs)} with {len(tokens)} lists of tokens, expected different sequences, one each"
            )
        sequences = [self._get(seq) for seq in seqs]
        counts = [n if isinstance(n, int) else len(n) for n in tokens]
        if any(n < 0 for n in counts):
            raise ValueError(f"tokens: got {counts}, expected non-negative numbers")
        for sequence in sequences:
            self._register(sequence)
        self._check_room(seqs, sequences, counts)
        changes: list[tuple[int, int, int]] = []
        copied: list[tuple[int, int]] = []
        before = np.array([s.length for s in sequences], np.int32)
        for seq, sequence, new, count in zip(seqs, sequences, tokens, counts, strict=True):
            if count and sequence.length % self.page_size and self._is_shared(sequence.pages[-1]):
                last = len(sequence.pages) - 1
                copied.append((sequence.pages[last], self._allocate()))
                self._release(sequence.pages[last])
                sequence.pages[last] = copied[-1][1]
                changes.append((seq, last, sequence.pages[last]))
            sequence.length += count
            while len(sequence.pages) * self.page_size < sequence.length:
                changes.append((seq, len(sequence.pages), self._allocate()))
                sequence.pages.append(changes[-1][2])
            if not isinstance(new, int) and sequence.tokens is not None:
                sequence.tokens.extend(new)
            elif count:
                sequence.tokens = None
        self._copy_pages(copied)
        self._write_table(changes)
        both = self._library.from_host(np.stack([before, np.array(seqs, np.int32)]).reshape(2, -1), self.page_table)
        return Step(self.page_table, both[0], both[1], self.k_cache, self.v_cache, self._head_dim_v)

    def truncate(self, seq: int, length: int) -> None:
        """Drop the tokens of a sequence past the first `length`: drafts that were not accepted."""
        sequence = self._get(seq)
        if not 0 <= length <= sequence.length:
            raise ValueError(f"length: got {length}, expected 0 to {sequence.length}")
        pages = -(-length // self.page_size)
        # The tokens that remain are in place; those of a page that will be written again are not to be found by others.
        sequence.length = length
        for page in reversed(sequence.pages[pages:]):
            self._release(page)
        del sequence.pages[pages:]
        del sequence.nodes[length // self.page_size :]
        if sequence.tokens is not None:
            del sequence.tokens[length:]

    def free(self, seq: int) -> None:
        """End a sequence. Its full pages are kept, while there is room, for others with the same prefix."""
        sequence = self._get(seq)
        self._register(sequence)
        for page in reversed(sequence.pages):
            self._release(page)
        del self._sequences[seq]
        self._rows.append(seq)

    def length(self, seq: int) -> int:
        """Tokens of a sequence."""
        return self._get(seq).length

    def pages(self, seq: int) -> tuple[int, ...]:
        """Of a sequence, in order."""
        return tuple(self._get(seq).pages)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Those that have been added and not freed."""
        return tuple(self._sequences)

    def drop_kept(self) -> int:
        """Free all pages that no sequence references; returns their number."""
        count = len(self._kept)
        while self._kept:
            self._evict()
        return count

    def statistics(self) -> Statistics:
        """What the cache holds and has done."""
        return Statistics(
            pages=self._pages,
            free=len(self._free),
            referenced=self._pages - len(self._free) - len(self._kept),
            kept=len(self._kept),
            sequences=len(self._sequences),
            tokens=sum(s.length for s in self._sequences.values()),
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            copies=self._copies,
        )

    # Pages ------------------------------------------------------------------------------------------------------------

    def _get(self, seq: int) -> _Sequence:
        if seq not in self._sequences:
            raise KeyError(f"seq: got {seq!r}, expected one of {list(self._sequences)}")
        return self._sequences[seq]

    def _is_shared(self, page: int) -> bool:
        return self._references[page] > 1 or page in self._node_of

    def _check_room(self, seqs: Sequence[int], sequences: list[_Sequence], counts: list[int]) -> None:
        needed = 0
        given_up: dict[int, int] = {}
        for seq, sequence, count in zip(seqs, sequences, counts, strict=True):
            pages = -(-(sequence.length + count) // self.page_size)
            if pages > self._max_pages:
                room = self._max_pages * self.page_size
                raise CacheFull(
                    f"sequence {seq} would have {sequence.length + count} tokens, a row of the page table has {room}"
                )
            needed += pages - len(sequence.pages)
            if count and sequence.length % self.page_size:
                last = sequence.pages[-1]
                # The last of those who share a page, unless others may find it, writes it where it is.
                if last in self._node_of or self._references[last] - given_up.get(last, 0) > 1:
                    needed += 1
                    given_up[last] = given_up.get(last, 0) + 1
        # Pages of the tree that this very request gives up become free to take while it runs; they are not counted on.
        if needed > len(self._free) + len(self._kept):
            raise CacheFull(f"{needed} pages are needed, {len(self._free)} are free and {len(self._kept)} can be evicted")

    def _allocate(self) -> int:
        if not self._free:
            self._evict()
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _refer(self, page: int) -> None:
        self._references[page] += 1
        self._kept.pop(page, None)

    def _release(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page]:
            return
        node = self._node_of.get(page)
        if node is None:
            self._free.append(page)
        else:
            self._kept[page] = node

    def _evict(self) -> None:
        """Free the page that has been unreferenced longest. It has no children: they were released before it."""
        page, node = self._kept.popitem(last=False)
        assert not node.children
        siblings = self._roots if node.parent is None else node.parent.children
        del siblings[node.tokens]
        del self._node_of[page]
        self._free.append(page)
        self._evictions += 1

    def _find(self, tokens: Sequence[int]) -> list[_Node]:
        """The longest path in the tree along `tokens`, the last of them left out."""
        found: list[_Node] = []
        children = self._roots
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            node = children.get(tuple(tokens[start : start + self.page_size]))
            if node is None:
                break
            found.append(node)
            children = node.children
        return found

    def _register(self, sequence: _Sequence) -> None:
        """Put the full pages of a sequence into the tree. Called by its next operation, when they have been written."""
        if sequence.tokens is None:
            return
        while (len(sequence.nodes) + 1) * self.page_size <= sequence.length:
            n = len(sequence.nodes)
            parent = sequence.nodes[-1] if n else None
            siblings = self._roots if parent is None else parent.children
            tokens = tuple(sequence.tokens[n * self.page_size : (n + 1) * self.page_size])
            page = sequence.pages[n]
            if tokens in siblings:
                if siblings[tokens].page != page:  # another sequence was first; this one stays out of the tree
                    return
                sequence.nodes.append(siblings[tokens])
                continue
            node = siblings[tokens] = _Node(page, parent, tokens)
            self._node_of[page] = node
            sequence.nodes.append(node)

    # Arrays -----------------------------------------------------------------------------------------------------------

    def _indices(self, columns: Sequence[Sequence[int]]) -> list[Any]:
        return [self._library.from_host(np.array(column, np.int64), self.page_table) for column in columns]

    def _write_table(self, changes: list[tuple[int, int, int]]) -> None:
        if changes:
            rows, columns, pages = zip(*changes, strict=True)
            row, column = self._indices((rows, columns))
            values = self._library.from_host(np.array(pages, np.int32), self.page_table)
            with self._library.guard(self._library.device(self.page_table)):
                self.page_table[row, column] = values

    def _copy_pages(self, copied: list[tuple[int, int]]) -> None:
        if copied:
            self._copies += len(copied)
            source, target = self._indices(tuple(zip(*copied, strict=True)))
            with self._library.guard(self._library.device(self.page_table)):
                for cache in (self.k_cache, self.v_cache):
                    if cache is not None:
                        cache[:, target] = cache[:, source]
