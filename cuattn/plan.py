"""Step 3: which kernel runs a problem, with which tiles, grid, shared memory and workspace. Pure: needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cuattn.fields import ITEMSIZE
from cuattn.problem import Problem
from cuattn.registry import BIAS_STAGES, FORWARD, SHORT, SHORTEST, Device, KernelSpec, Tiles, staged_bias

SECTION_BYTES = 32 << 20
"""Of keys and values that stay in L2 (50 MB on sm_90) beside what passes through it."""
MIN_BLOCKS_PER_SPLIT = 4
"""Key tiles that a split must have to be worth a CTA."""
MAX_SPLITS = 128
KEYS_PER_SUM = 32768
"""Keys that one float32 sum of products takes before its rounding shows (a sum of many small terms is a random walk)."""
MAX_ACCURATE_SPLITS = 4
"""Bounds the workspace that this accuracy costs."""
WARPS_PER_COMBINE = 4
TILE_MAP_THREADS = 1024
"""of a CTA of tile_map.cu, which writes one word of each kind"""
SPLIT_THREADS = 256
"""of a CTA of magnitude.cu and split.cu"""
SPLIT_PARTS = 32
"""kMagnitudes of kernels/mainloop/split_input.cuh"""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a launch. `threads`, `smem_bytes` and `grid` are those of the attention kernel."""

    problem: Problem
    device: Device
    kernel: str
    mma: str
    tiles: Tiles
    head_dim: int
    """compiled, a multiple of 16"""
    head_dim_v: int
    """compiled columns of out per CTA"""
    dv_chunks: int
    m_blocks: int
    num_splits: int
    map_words: int
    """32-bit words of the tile map per query tile; 0 without one"""
    map_batches: int
    map_heads: int
    smem_bytes: int

    @property
    def threads(self) -> int:
        return 32 * self.tiles.warps

    @property
    def empty(self) -> bool:
        """Nothing to compute or write."""
        return self.m_blocks * self.problem.num_heads * (self.problem.batch + self.problem.packed) == 0

    @property
    def grid(self) -> int:
        batches = self.problem.batch + self.problem.packed  # one more for the tokens past the last packed sequence
        work = self.m_blocks * self.dv_chunks * self.problem.num_heads * batches * self.num_splits
        return min(work, self.device.num_sms * self.tiles.min_blocks) if self.tiles.persistent else work

    @property
    def section(self) -> int:
        """Pairs of sequence and head whose keys and values L2 holds together. Of short rows fewer, so that the query tiles of a
        pair run side by side: keys then come from memory at an even rate, not all of a section's at its start.
        """
        p = self.problem
        bytes_kv = ITEMSIZE[p.dtype] * min(p.seqlen_k, p.total_k) * (p.head_dim + p.head_dim_v)
        most = min(SECTION_BYTES // max(1, bytes_kv) * p.group, p.num_heads * (p.batch + p.packed))
        keys = min(p.seqlen_k, p.total_k)
        if keys <= SHORT:
            places = self.device.num_sms * self.tiles.min_blocks // (4 if keys <= SHORTEST else 2)
            most = min(most, places // max(1, self.m_blocks))
        return max(1, most)

    @property
    def bias_stages(self) -> int:
        """Buffers for tiles of a bias that the copy engine loads."""
        return BIAS_STAGES if self.uses_tma and staged_bias(self.problem) else 0

    @property
    def uses_tma(self) -> bool:
        """Whether the attention kernel's parameters begin with tensor maps of q, k and v."""
        return self.kernel == "forward_sm90"

    @property
    def partial_rows(self) -> int:
        p = self.problem
        return p.num_heads * (p.total_q if p.packed else p.batch * p.seqlen_q)

    @property
    def split_inputs(self) -> bool:
        """Whether q, k and v are first written as pairs of fp16 numbers (kernels/mainloop/split_input.cuh)."""
        return self.mma == "MmaSplit"

    @property
    def split_grid(self) -> int:
        """CTAs of magnitude.cu and split.cu, and words of magnitudes."""
        p = self.problem
        return SPLIT_PARTS * (1 if p.packed else p.batch) * (p.num_heads + 2 * p.num_heads_kv)

    def _split_workspace(self) -> tuple[int, int, int, int]:
        p = self.problem
        if not self.split_inputs:
            return 0, 0, 0, 0
        rows_kv = p.num_heads_kv * (p.total_k if p.packed else p.batch * p.seqlen_k)
        size, size_v = 4 * self.head_dim, 4 * self.head_dim_v * self.dv_chunks
        return self.partial_rows * size, rows_kv * size, rows_kv * size_v, 4 * self.split_grid

    @property
    def workspace(self) -> tuple[int, ...]:
        """Bytes of partial_out to tile_counter, in the order of `POINTERS`, each rounded up to 256."""
        size = ITEMSIZE[self.problem.real]
        rows = self.num_splits * self.partial_rows if self.num_splits > 1 else 0
        maps = self.map_batches * self.map_heads * self.m_blocks * 2 * self.map_words
        sizes = (
            rows * self.problem.head_dim_v * size,
            rows * size,
            4 * maps,
            *self._split_workspace(),
            16 * self.tiles.persistent,
        )
        return tuple(-(-n // 256) * 256 for n in sizes)

    def __str__(self) -> str:
        t = self.tiles
        splits = f", {self.num_splits} splits" if self.num_splits > 1 else ""
        tile_map = ", tile map" if self.map_words else ""
        splits += ", inputs as fp16 pairs" if self.split_inputs else ""
        return (
            f"Plan({self.kernel} for {self.device.arch}: {t.block_m}x{t.block_n} x{t.stages}, "
            f"d{self.head_dim}/{self.head_dim_v}, "
            f"{self.threads} threads, {self.smem_bytes} B shared, grid {self.grid}{splits}{tile_map}, "
            f"workspace {sum(self.workspace)} B)"
        )


def make_plan(problem: Problem, device: Device) -> Plan:
    """The plan of the first kernel that serves `problem` on `device`.

    Raises NotImplementedError listing every kernel's reasons when none does.
    """
    reasons = []
    for spec in FORWARD:
        declined = spec.unsupported(problem, device)
        if not declined:
            for tiles in spec.candidates(problem, device):
                if spec.smem_bytes(problem, tiles, device) <= device.smem_per_block:
                    return _plan(problem, device, spec, tiles)
            declined = [f"no tile fits the {device.smem_per_block} bytes of shared memory of a block"]
        reasons.append(f"{spec.name}: {'; '.join(declined)}")
    raise NotImplementedError(f"no kernel serves {problem} on {device.arch}:\n  " + "\n  ".join(reasons))


def _plan(problem: Problem, device: Device, spec: KernelSpec, tiles: Tiles) -> Plan:
    head_dim, head_dim_v = spec.padded_dims(problem)
    longest = min(problem.seqlen_q, problem.total_q)
    m_blocks = -(-longest // tiles.block_m)
    if problem.packed:
        m_blocks = max(m_blocks, 1)  # the tail of padding tokens needs a CTA even when every sequence is empty
    dv_chunks = -(-problem.head_dim_v // head_dim_v)
    n_blocks = -(-min(problem.seqlen_k, problem.total_k) // tiles.block_n)
    smem = spec.smem_bytes(problem, tiles, device)
    resident = max(1, min(tiles.min_blocks, device.smem_per_sm // (smem + 1024)))
    ctas = m_blocks * dv_chunks * problem.num_heads * problem.batch
    if tiles.persistent and ctas + m_blocks * problem.num_heads * problem.packed <= device.num_sms * tiles.min_blocks:
        tiles = replace(tiles, persistent=False)  # no CTA would take a second tile, and the counter costs the host a workspace
    per_batch, per_head = problem.mask.varies(problem.mask_operands)
    own_lengths = problem.packed or problem.operand("q_lens") is not None or problem.operand("kv_lens") is not None
    return Plan(
        problem=problem,
        device=device,
        kernel=spec.name,
        mma=spec.mma(problem, device),
        tiles=tiles,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dv_chunks=dv_chunks,
        m_blocks=m_blocks,
        num_splits=1
        if spec.name == "forward_sm90"
        else max(
            _num_splits(ctas, _visited(problem, tiles), resident * device.num_sms),
            1 if spec.mma(problem, device) == "MmaSplit" else _accurate_splits(problem),
        ),
        map_words=-(-n_blocks // 32) if problem.mask.tiled else 0,
        map_batches=problem.batch if own_lengths or per_batch else 1,
        map_heads=problem.num_heads if per_head else 1,
        smem_bytes=smem,
    )


def _visited(problem: Problem, tiles: Tiles) -> int:
    """Key tiles that the last query tile of the longest sequence visits."""
    seqlen_q, seqlen_k = min(problem.seqlen_q, problem.total_q), min(problem.seqlen_k, problem.total_k)
    rows = range(max(0, seqlen_q - tiles.block_m), seqlen_q)
    return -(-len(problem.mask.kv_range(rows, seqlen_q, seqlen_k)) // tiles.block_n) if len(rows) else 0


def _accurate_splits(problem: Problem) -> int:
    """Parts that keep the rounding of float32 sums near 1e-5: it grows as the square root of the keys that one sum takes."""
    if problem.dtype != "float32" or problem.precision == "tf32":
        return 1
    return min(-(-min(problem.seqlen_k, problem.total_k) // KEYS_PER_SUM), MAX_ACCURATE_SPLITS)


def _num_splits(ctas: int, n_blocks: int, slots: int) -> int:
    """Parts into which keys are divided so that a small grid fills the GPU: the fewest that come nearest to whole waves."""
    most = min(n_blocks // MIN_BLOCKS_PER_SPLIT, MAX_SPLITS)
    if ctas == 0 or most < 2 or ctas * 5 >= slots * 4:
        return 1

    def efficiency(splits: int) -> float:
        waves = -(-ctas * splits // slots)
        return ctas * splits / (waves * slots)

    best = max(efficiency(s) for s in range(1, most + 1))
    return next(s for s in range(1, most + 1) if efficiency(s) >= 0.85 * best)
