"""The parts of bench/ that need no GPU: cases, FLOPs, bounds, result rows, the README's table."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import time
import types
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import (
    backward,
    compare,
    decode,
    error,
    figures,
    forward,
    host,
    latency,
    memory,
    progress,
    results,
    summary,
    tables,
    timing,
)
from bench.__main__ import PEERS, STORED, main, parser, selected
from bench.baselines import BASELINES, TITLES, Sdpa, available
from bench.cases import (
    BACKWARD,
    BACKWARD_QUICK,
    COMPILED,
    ERROR,
    FORWARD,
    HOST,
    JIT,
    LATENCY,
    LENGTHS,
    MASKS,
    MATRIX,
    MEMORY,
    MEMORY_BACKWARD,
    MEMORY_LENGTHS,
    PACKED,
    QUICK,
    SPLIT,
    UNEVEN_PACKED,
    USER_MOD,
    Case,
    dense,
    deterministic,
    gradients,
    user_mod,
)
from bench.ceilings import RECORDED
from bench.inputs import Inputs
from bench.timing import Contender, Timing
from cuattn import reference

ENV = {"gpu": "NVIDIA H200", "versions": {"cuattn": "0"}, "source_hash": "f" * 64, "date": "2026-11-21T10:00:00+00:00"}
CEILINGS = RECORDED["h200"]


def row(case: Case, us: float = 1000.0, date: str = ENV["date"], **peers: float) -> results.Row:
    return results.make_row(case, us, peers, {**ENV, "date": date}, CEILINGS)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", [(256, 256), (256, 512)], ids=str)
def test_flops_count_what_the_mask_shows(mask: str, sizes: tuple[int, int]) -> None:
    seqlen_q, seqlen_k = sizes
    if mask == "boolean" and seqlen_q != seqlen_k:
        pytest.skip("documents are square")
    case = Case("forward", "float32", 8, 24, 3, 3, 2, seqlen_q, seqlen_k, mask=mask)
    visible = case.mask_object().materialize(seqlen_q, seqlen_k)
    assert case.flops() == 2 * 2 * 3 * int(visible.sum()) * (8 + 24)
    assert visible.any(-1).all(), "a row without a key would make the case easier than it looks"


def test_flops_of_a_packed_case_stay_inside_its_sequences() -> None:
    assert PACKED.flops() == sum(n * (n + 1) // 2 for n in LENGTHS) * 4 * PACKED.num_heads * PACKED.head_dim


def test_bytes_count_every_operand_once() -> None:
    case = dense("bfloat16", 64, 2, 4, 128)
    assert case.bytes() == 4 * 2 * 4 * 128 * 64 * 2
    assert replace(case, mods=("bias",)).bytes() - case.bytes() == 4 * 128 * 128 * 2
    assert replace(case, mask="boolean").bytes() - case.bytes() == 128 * 128


def test_a_backward_has_five_products_for_two() -> None:
    for case in BACKWARD:
        forward = replace(case, bench="forward")
        assert 2 * case.flops() == 5 * forward.flops() > 0
    assert row(BACKWARD[0], 1000.0)["tflops"] == pytest.approx(2.5 * row(FORWARD[0], 1000.0)["tflops"], abs=0.01)


def test_a_backward_reads_results_and_writes_gradients_once() -> None:
    (case,) = gradients(dense("bfloat16", 64, 2, 4, 128))
    arrays, lse = 8 * (2 * 4 * 128 * 64) * 2, 2 * 4 * 128 * 4
    assert case.bytes() == arrays + lse
    assert replace(case, mods=("bias",)).bytes() - case.bytes() == 2 * 4 * 128 * 128 * 2
    assert replace(case, mods=("key bias",)).bytes() - case.bytes() == 2 * 4 * 128 * 2


def test_packed_shapes_have_no_batch_axis() -> None:
    assert PACKED.shapes()[0] == (sum(LENGTHS), 16, 128)
    assert SPLIT.shapes()[1] == (1, 65536, 16, 128)


def test_every_case_has_its_own_row_and_name() -> None:
    assert set(QUICK) <= set(FORWARD)
    assert set(BACKWARD_QUICK) <= set(BACKWARD)
    for cases in (FORWARD, BACKWARD, BACKWARD_QUICK, JIT, MEMORY, MEMORY_BACKWARD, LATENCY, ERROR):
        assert len({str(case) for case in cases}) == len(cases)
        assert len({results.key(row(case)) for case in cases}) == len(cases)


def test_the_paper_setting_has_as_many_tokens_and_channels_everywhere() -> None:
    paper = [c for c in FORWARD if c.dtype == "bfloat16" and not c.mods and c.mask in ("full", "causal") and c != SPLIT]
    dense_ones = [c for c in paper if c.num_heads == c.num_heads_kv and c.head_dim == c.head_dim_v]
    assert len(dense_ones) == 36
    assert {(c.batch * c.seqlen_q, c.num_heads * c.head_dim) for c in dense_ones} == {(16384, 2048)}


def test_tf32x3_is_bounded_by_a_third_of_tf32() -> None:
    ieee, x3, tf32 = (CEILINGS.rate(dense("float32", 128, 1, 1, 1024, precision=p)) for p in ("ieee", "tf32x3", "tf32"))
    assert (ieee, 3 * x3, tf32) == (50.0, pytest.approx(400.0), 400.0)


def test_a_bound_is_the_larger_of_arithmetic_and_traffic() -> None:
    long = dense("bfloat16", 128, 4, 16, 4096)
    assert CEILINGS.bound_us(long) == pytest.approx(long.flops() / 741e6)
    assert CEILINGS.bound_us(SPLIT) == pytest.approx(SPLIT.bytes() / 4.36e6)


def test_a_row_has_the_documented_fields() -> None:
    case = FORWARD[0]
    made = row(case, 2000.0, flash=3000.0)
    expected = {*results.KEY, "us", "tflops", "gbps", "bound_pct", "peers", "gpu", "versions", "source_hash", "date"}
    assert set(made) == expected
    assert made["tflops"] == pytest.approx(case.flops() / 2000e-6 / 1e12, abs=0.01)
    assert made["gbps"] == pytest.approx(case.bytes() / 2000e-6 / 1e9, abs=0.1)
    assert made["bound_pct"] == pytest.approx(100 * CEILINGS.bound_us(case) / 2000, abs=0.1)
    assert json.loads(json.dumps(made)) == made


def test_host_rows_have_no_rate() -> None:
    made = row(replace(HOST, bench="host/cupy"), 15.0)
    assert (made["us"], made["tflops"], made["gbps"], made["bound_pct"]) == (15.0, None, None, None)


def test_the_newest_row_of_a_case_replaces_the_older() -> None:
    first, second = FORWARD[:2]
    old, other = row(first, 10.0, "2026-11-20T00:00:00+00:00"), row(second, 20.0)
    new = row(first, 5.0, "2026-11-21T00:00:00+00:00")
    assert results.merge([old, other], [new]) == [new, other]
    assert results.merge([new, other], [old]) == [new, other]
    assert results.merge([], [old, new]) == [new]


def test_a_store_writes_after_every_row(tmp_path) -> None:
    store = results.Store(tmp_path / "deep" / "rows.json", ENV)
    for us in (10.0, 5.0):
        store.add(row(FORWARD[0], us))
    store.add(row(PACKED))
    assert [r["us"] for r in results.load(store.path)] == [5.0, 1000.0]
    assert list(store.path.parent.iterdir()) == [store.path]


def test_a_store_names_its_file_after_the_gpu() -> None:
    assert results.Store(None, ENV).path == results.FOLDER / "h200.json"


def rows_of_every_part() -> list[results.Row]:
    """One GPU's rows of every part, with peers."""
    paper = [dense("bfloat16", d, 16384 // s, 2048 // d, s) for d in (64, 128) for s in (4096, 8192)]
    rows = [row(case, 2000.0, cudnn=1000.0, flash=3000.0) for case in (*paper, PACKED, SPLIT)]
    rows += [row(case, 5000.0, cudnn=4000.0, flash=6000.0) for case in gradients(*paper)]
    rows += [row(case, 5000.0, fa4=6000.0) for case in deterministic(*gradients(*paper))]
    rows.append({**row(dense("float32", 128, 2, 16, 4096)), "error": 3.2e-7})
    rows += [row(case, 100.0, cudnn=110.0, math=900.0) for case in MATRIX if case.seqlen_q < 4096]
    rows += [row(replace(HOST, bench=f"host/{kind}"), 15.25) for kind in ("cupy", "torch", "torch/backward", "torch/autograd")]
    rows += [row(replace(JIT[0], bench="jit/cold"), 1.2e6), row(replace(JIT[0], bench="jit/warm"), 2e4)]
    for case in MEMORY_LENGTHS:
        planned = {"planned": 8 << 20} if case.bench == "memory/backward" else {}
        more = {"bytes": 9 << 20, "peer_bytes": {"cudnn": 1 << 20, "math": case.scores * 4}, **planned}
        rows.append(results.make_row(case, None, {}, ENV, None, **more))
    rows += [results.make_row(c, 50.0, {"flash": 40.0}, ENV, None, p99=90.0, peers_p99={"flash": 70.0}) for c in LATENCY]
    own = {"out": (2e-3, 3e-4), "dq": (4e-3, 5e-4)}
    errors = {"cuattn": own, "cudnn": own, "fa3": {"out": (7e-3, 8e-4)}}
    rows += [results.make_row(case, None, {}, ENV, None, errors=errors) for case in ERROR]
    return rows + [decode.row(case, 10.0, {"fa3": 12.0}, ENV) for case in (*decode.CASES, *decode.LENGTHS)]


def tables_of(text: str) -> list[list[str]]:
    return [list(g) for is_row, g in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")) if is_row]


def test_the_summary_replaces_only_its_section(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "rows"
    readme.write_text(f"# before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    results.save(folder / "h200.json", rows_of_every_part())
    summary.write(readme, TITLES, folder)
    text = readme.read_text()
    assert text.startswith("# before\n") and text.endswith("after\n") and "old" not in text
    assert "| forward, bf16 | 64 | 4096 to 8192 | 275 to 550 | 0.50 | 0.50 | cuDNN, FA2 |" in text
    assert "| backward, bf16, deterministic | 128 | 4096 to 8192 | 275 to 550 | 1.20 | 1.20 | FA4 |" in text
    assert "| forward, fp32 ieee | 128 | 4096 | 275 |  |  |  |" in text
    assert "15 us on cupy arrays, 15 us on torch arrays" in text and "1.2 s, with kernels in the disk cache 0.02 s" in text
    assert "forward and backward, 65536 tokens, 16 heads, d128: 9 MiB" in text
    (table,) = tables_of(text)
    assert len({line.count("|") for line in table}) == 1
    summary.write(readme, TITLES, folder)
    assert readme.read_text() == text


def test_the_summary_means_are_geometric_and_over_the_best_peer() -> None:
    cases = [dense("bfloat16", 64, 16384 // s, 32, s) for s in (4096, 8192)]
    rows = [row(cases[0], 100.0, cudnn=200.0, flash=900.0), row(cases[1], 100.0, cudnn=900.0, flash=50.0)]
    line = summary.rate_line("x", rows, TITLES)
    assert "| 1.00 | 0.50 | cuDNN, FA2 |" in line


def test_the_page_has_a_table_for_every_part(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = rows_of_every_part()
    results.save(tmp_path / "rows" / "h200.json", rows)
    written = figures.write(TITLES, tmp_path, tmp_path / "rows")
    drawn = ["forward", "backward", "matrix", "matrix-backward", "decode", "memory", "latency", "host", "error"]
    assert [path.name for path in written] == [*(f"h200-{name}.svg" for name in drawn), "results.md"]
    forward, _, gradient = (tmp_path / "results.md").read_text().partition("## Gradients")
    for name, other in ((forward, gradient), (gradient, forward)):
        assert name.count("**One causal sequence**") == other.count("**One causal sequence**") == 1
        assert all(len({line.count("|") for line in table}) == 1 for table in tables_of(name))
    assert "| bf16 | 64 | 4 x 32 | 4096 | full | 2000 | 274.9 |" in forward and "causal, packed" in forward
    assert "3.2e-07" in forward and "1.20 s" in forward and "50.0 / 90.0" in forward and "40.0 / 70.0" in forward
    assert "| out | 2.0e-03 (3.0e-04) | 2.0e-03 (3.0e-04) | 7.0e-03 (8.0e-04) |" in forward
    assert "| 64 x mixed | 64/8 | 128 | page 16 | 1 | 10.0 |" in forward
    assert "| bf16 | 128 | 1 x 16 | 65536 | causal | 9.00 | 1.00 |" in forward.replace("| 65536.00 ", "").replace(
        "| 131072.00 ", ""
    )
    assert "| 9.00 | 8.00 | 1.00 |" in gradient and forward.count("15.2 us") == gradient.count("15.2 us") == 2
    assert "| 0.80 | 0.80 | 1.20 |" in gradient.replace("|  |", "|")


def test_the_readme_and_the_page_are_what_the_rows_say(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pages = ("README.md", "docs/results.md", "docs/peers.md")
    for name in pages:
        (tmp_path / Path(name).name).write_text((results.ROOT / name).read_text(encoding="utf-8"))
    summary.write(tmp_path / "README.md", TITLES)
    summary.write_standing(tmp_path / "peers.md", TITLES)
    figures.write(TITLES, tmp_path)
    for name in pages:
        written = (tmp_path / Path(name).name).read_text(encoding="utf-8")
        assert written == (results.ROOT / name).read_text(encoding="utf-8"), "run: python -m bench report"


def test_rows_behind_a_peer_are_listed_the_worst_first() -> None:
    near, far, ahead = (dense("bfloat16", d, 1, 4, 1024) for d in (64, 128, 256))
    rows = [row(near, 100.0, cudnn=99.0, flash=98.0), row(far, 100.0, fa4=50.0), row(ahead, 100.0, cudnn=101.0)]
    rows.append(row(replace(HOST, bench="host/torch/autograd"), 100.0, **{"an empty autograd.Function": 10.0}))
    rows.append({**row(replace(HOST, bench="host/torch/sdpa"), 10.0, cudnn=20.0), "whole": 19.0})
    *_, first, second = tables.behind(rows, TITLES)
    assert first == "| forward | bf16 | 128 | 1 x 4 | 1024 | full | FA4 | 0.50 |" and "| FA2 | 0.98 |" in second
    assert tables.behind(rows[2:], TITLES) == []
    assert "10.0 us, 19.0 us in all (cuDNN 20)" in tables.other_lines(rows, TITLES)[-1]
    rows[-1]["whole"] = 25.0
    assert tables.behind(rows[2:], TITLES)[-1].endswith("| cuDNN | 0.80 |")


def test_peers_that_are_faster_are_counted() -> None:
    near, far = (dense("bfloat16", d, 1, 4, 1024) for d in (64, 128))
    rows = [row(near, 100.0, cudnn=99.0, flash=98.0), row(far, 100.0, cudnn=101.0), row(gradients(far)[0], 100.0, fa4=50.0)]
    rows.append({**row(replace(HOST, bench="host/torch/autograd"), 10.0, cudnn=20.0, other=1.0), "whole": 30.0})
    rows.append(row(replace(far, bench="matrix/backward"), 100.0, fa4=101.0))
    head, _, *lines = tables.standing(rows, TITLES)
    assert head == "| faster than cuattn in | cuDNN | FA2 | FA4 |"
    assert lines == [
        "| forward | 1 of 2 | 1 of 1 |  |",
        "| backward |  |  | 1 of 1 |",
        "| host, backward | 1 of 1 |  |  |",
        "| matrix, backward |  |  | 0 of 1 |",
    ]


SOURCES = re.compile(r"sources ([0-9a-f]{6,})")


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{p.name}" for p in (results.ROOT / "docs").glob("*.md"))])
def test_pages_speak_of_sources_whose_rows_are_stored(page: str) -> None:
    """A remark about rows goes when they do."""
    stored = {row["source_hash"] for path in results.FOLDER.glob("*.json") for row in results.load(path)}
    for digest in SOURCES.findall((results.ROOT / page).read_text(encoding="utf-8")):
        assert any(own.startswith(digest) for own in stored), f"{page} speaks of rows of {digest}, which are no longer stored"


def test_every_row_of_the_results_file_is_in_the_page() -> None:
    """Rows that no table shows would be measured for nothing."""
    shown = {*results.RATED, *tables.TABLES}
    for path in results.FOLDER.glob("*.json"):
        for entry in results.load(path):
            assert entry["bench"] in shown or entry["bench"].split("/")[0] in ("host", "jit"), entry["bench"]


def test_a_report_says_which_part_is_of_which_sources() -> None:
    rows = [row(FORWARD[0], 2000.0), {**row(BACKWARD[0], 5000.0), "source_hash": "e" * 64}]
    assert tables.environment_line(rows[:1]).count("(") == 0
    mine = rows[0]["source_hash"][:12]
    assert f"sources {mine} (forward), {'e' * 12} (backward);" in tables.environment_line(rows)


def test_the_readme_has_the_markers_of_the_report() -> None:
    text = (results.ROOT / "README.md").read_text(encoding="utf-8")
    for marker in (tables.BEGIN, tables.END):
        assert text.count(marker) == 1


def test_report_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="bench:begin"):
        tables.replace_section("no markers", "x")


def test_every_forward_case_has_a_peer() -> None:
    for case in FORWARD:
        assert [b.name for b in BASELINES if not b.declines(case)], str(case)


def test_wide_dtypes_are_compared_with_what_serves_them() -> None:
    serving = {c: {b.name for b in BASELINES if not b.declines(c)} for c in FORWARD if c.dtype in ("float32", "float64")}
    for case, names in serving.items():
        assert names == ({"naive", "math"} | ({"efficient", "xformers"} if case.dtype == "float32" else set()))


def test_every_backward_case_has_a_peer() -> None:
    serving = {case: {b.name for b in BASELINES if not b.declines_gradient(case)} for case in BACKWARD}
    for case, names in serving.items():
        assert names, str(case)
        if case.dtype == "float64":
            assert names == {"math"}
        if case.dtype == "float32":
            assert names == {"efficient", "xformers"}
        if case.dtype == "bfloat16" and case.mask in ("full", "causal") and set(case.mods) <= {"deterministic", "dropout"}:
            assert "cudnn" in names and ("flash" in names or case.head_dim != case.head_dim_v)
        if case.biased:
            assert "efficient" in names and "cudnn" not in names


def test_peers_without_gradients_say_so(capsys) -> None:
    assert {"flash", "cudnn", "efficient", "math", "flex", "fa4"} <= set(backward.peer_names([]))
    assert backward.peer_names(["fa3", "flash"]) == ["flash"]
    assert "fa3: vLLM" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nobody"):
        available(backward.peer_names(["nobody"]))


@pytest.mark.parametrize("case", BACKWARD + MEMORY_BACKWARD, ids=str)
def test_every_backward_case_has_plans(case: Case) -> None:
    forward, gradient = backward.plans(case, "sm_90a")
    assert forward.problem.head_dim == gradient.problem.head_dim == case.head_dim
    assert gradient.backward.deterministic == ("deterministic" in case.mods)
    assert (gradient.backward.bias is not None) == case.biased


class TorchOnCpu:
    name = "torch"

    def normal(self, shape, dtype):
        import torch

        return torch.randn(shape, dtype=getattr(torch, dtype))

    def put(self, array):
        import torch

        return torch.from_numpy(np.ascontiguousarray(array))

    def get(self, array):
        return array.numpy()


@pytest.mark.parametrize("mods", [(), ("bias",), ("key bias",), ("deterministic",)], ids=str)
def test_a_peer_computes_the_gradients_that_we_do(mods: tuple[str, ...], capsys) -> None:
    torch = pytest.importorskip("torch")
    (case,) = gradients(dense("float32", 16, 2, 4, 24, mods=mods))
    inputs = Inputs.of(case, TorchOnCpu())
    douts = inputs.cotangents()
    mine = backward.ours(inputs, douts)
    peer = backward.theirs(Sdpa("MATH", "math", "torch math", ("float32",)), inputs, douts)
    expected = [x for x in mine()[:4] if x is not None]
    for _ in range(2):
        with peer.context():
            found = peer()
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y.reshape(x.shape))
    assert not torch.are_deterministic_algorithms_enabled()
    backward.check_peers(mine, [peer], case)
    assert capsys.readouterr().out == ""
    other = backward.theirs(Sdpa("MATH", "math", "torch math", ("float32",)), inputs, inputs.cotangents())
    backward.check_peers(mine, [other], case)
    assert "math: dq differs" in capsys.readouterr().out


def test_the_error_of_gradients_is_that_of_their_precision() -> None:
    pytest.importorskip("torch")
    (case,) = gradients(dense("float32", 16, 1, 1, 64))
    assert 0 < backward.reference_error(case, TorchOnCpu()) < np.finfo(np.float32).eps * 100


def test_unknown_peers_are_refused() -> None:
    with pytest.raises(ValueError, match="nobody"):
        available(["nobody"])


def test_a_modification_is_measured_beside_the_plain_call() -> None:
    from bench.inputs import HostArrays

    for mods, count in (("alibi",), 1), (("bias",), 1), (("dropout",), 0), (("alibi", "dropout"), 0), ((), 0):
        inputs = Inputs.of(dense("float16", 16, 1, 2, 32, mods=mods), HostArrays())
        found = forward.without_mods(inputs)
        assert len(found) == count
        for contender in found:
            (call,) = contender.calls
            assert call.args == inputs.sets[0] and not call.keywords
    case = replace(FORWARD[0], mods=("softcap",))
    page = "\n".join(tables.table([row(FORWARD[0], 900.0), {**row(case, 1000.0), "plain": 910.0}], TITLES))
    assert "| x plain |" in page and page.endswith("| 0.91 |")
    assert "x plain" not in "\n".join(tables.table([row(FORWARD[0], 900.0)], TITLES))


def test_the_user_modification_is_the_same_for_peers() -> None:
    torch = pytest.importorskip("torch")
    from cuattn.masks import Tile
    from cuattn.score_mods import UserMod

    tile = Tile.of(0, range(1), range(5), range(7), 5, 7)
    s = np.random.default_rng(0).standard_normal((1, 5, 7))
    i, j = (torch.from_numpy(np.asarray(x, np.float64)) for x in (tile.row, tile.col))
    np.testing.assert_allclose(user_mod(torch.from_numpy(s), 0, 0, i, j).numpy(), UserMod(*USER_MOD).apply(s, tile), rtol=1e-12)


@pytest.mark.parametrize(
    ("medians", "windows"),
    [
        ([10.0] * 99, 5),  # long enough is half a second, here of a tenth for each window
        ([20.0 - n for n in range(9)] + [12.0] * 90, 10),  # falling for longer than that
        ([1e3 * 0.9**n for n in range(99)], 50),  # falling for ever
    ],
)
def test_the_host_is_timed_when_it_is_warm(medians: list[float], windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every contender until none of them has become faster, in calls that no row counts."""
    asked: list[str] = []

    def host_times(contender: timing.Contender, calls: int) -> list[float]:
        asked.append(contender.name)
        return [medians[asked.count(contender.name) - 1] if contender.name == "one" else 7.0] * calls

    monkeypatch.setattr(timing, "host_times", host_times)
    monkeypatch.setattr(timing.time, "monotonic", lambda: 0.1 * asked.count("other"))
    timing.settle([timing.Contender(name, []) for name in ("one", "other")])
    assert asked == ["one", "other"] * windows


def test_timing_is_a_median_with_its_spread() -> None:
    assert Timing.of([1.0, 4.0, 2.0]) == Timing(2.0, 1.5)


def test_options_select_cases(capsys) -> None:
    arguments = parser().parse_args(["forward", "--only", "packed"])
    assert selected(arguments) == [PACKED, UNEVEN_PACKED]
    assert main(["forward", "--list", "--quick"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(QUICK)
    assert main(["forward", "--only", "no such case"]) == 1


def test_importing_bench_needs_no_gpu_library() -> None:
    code = "import sys, bench.__main__; print([m for m in ('cupy', 'torch', 'jax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# compare and figures ---------------------------------------------------------------------------------------------------------


def test_compare_finds_what_became_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    cases = [dense("bfloat16", 64, 4, 32, 4096), dense("bfloat16", 128, 4, 16, 4096), dense("bfloat16", 256, 4, 8, 4096)]
    results.save(old, [row(case, 100.0) for case in cases])
    results.save(new, [row(case, us) for case, us in zip(cases, (104.0, 50.0, 111.0), strict=True)])
    assert main(["compare", str(old), str(new)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("+11.0 % slower") and "256" in lines[0] and "slower" not in lines[1] + lines[2]
    assert lines[-1] == f"3 compared, 1 worse by more than 5 %; 0 cases only in {old}"
    assert main(["compare", str(old), str(new), "--tolerance", "12"]) == 0
    assert main(["compare", str(old), str(old)]) == 0


def test_compare_looks_at_memory_too(tmp_path: Path) -> None:
    def memory(size: int) -> list[results.Row]:
        return [results.make_row(replace(MEMORY[0], bench="memory"), None, {}, ENV, None, bytes=size)]

    old, new = tmp_path / "old.json", tmp_path / "new.json"
    results.save(old, memory(1000))
    results.save(new, memory(1100))
    assert main(["compare", str(old), str(new)]) == 1 and main(["compare", str(new), str(old)]) == 0


def test_compare_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    results.save(old, [row(dense("bfloat16", 64, 4, 32, 4096))])
    results.save(new, [row(dense("bfloat16", 128, 4, 32, 4096))])
    with pytest.raises(ValueError, match="no case in common"):
        compare.compare(old, new)
    results.save(new, [{**row(dense("bfloat16", 64, 4, 32, 4096)), "gpu": "another"}])
    with pytest.raises(ValueError, match="expected those of one GPU"):
        compare.compare(old, new)


def test_a_figure_draws_each_library_once(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cases = [dense("bfloat16", d, 16384 // s, 2048 // d, s) for d in (64, 128) for s in (4096, 8192)]
    rows = [row(case, 1000.0, cudnn=500.0) for case in cases]
    results.save(tmp_path / "rows" / "h200.json", rows)
    figures.write(TITLES, tmp_path, tmp_path / "rows")
    assert (tmp_path / "figures" / "h200-forward.svg").read_text().count("cuDNN") == 1
    assert figures.rate(rows[0], "cudnn") == pytest.approx(2 * rows[0]["tflops"])
    assert figures.rate(rows[0], "flash") is None


def test_all_is_the_parts_that_store_rows() -> None:
    chosen = selected(parser().parse_args(["all", "--quick"]))
    for part in STORED:
        assert set(selected(parser().parse_args([part, "--quick"]))) <= set(chosen), part
    some = selected(parser().parse_args(["all", "--parts", "latency,host"]))
    assert some == [*LATENCY, HOST]
    with pytest.raises(ValueError, match="--parts: got sleep, expected some of forward"):
        selected(parser().parse_args(["all", "--parts", "host,sleep"]))
    assert HOST in chosen and len(chosen) > len(QUICK) + len(BACKWARD_QUICK)


# Matrix, errors, latency, memory, progress -----------------------------------------------------------------------------------


def test_the_matrix_is_complete_in_both_directions() -> None:
    grid = set(itertools.product((1024, 2048, 4096, 8192, 16384), (64, 128), (8, 16, 32)))
    for backward_too in (False, True):
        cells = [case for case in MATRIX if case.backward == backward_too]
        assert {(c.seqlen_q, c.head_dim, c.num_heads) for c in cells} == grid and len(cells) == len(grid)
    assert len({results.key(row(case)) for case in MATRIX}) == len(MATRIX) and MATRIX[-2:] == COMPILED
    flex = next(b for b in BASELINES if b.name == "flex")
    for case in MATRIX:
        names = {b.name for b in BASELINES if not (b.declines_gradient(case) if case.backward else b.declines(case))}
        assert {"cudnn", "flash", "fa4", "xformers"} <= names
        assert (not flex.declines(case)) == (case in COMPILED)
        if not case.backward:
            assert {"fa3", "efficient"} <= names and ({"naive", "math"} <= names) == (case.scores <= 1 << 30)


def test_parts_name_peers_that_exist() -> None:
    for part, names in PEERS.items():
        assert part in STORED and set(names) <= set(TITLES)


def test_xformers_says_why_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    (baseline,) = (b for b in BASELINES if b.name == "xformers")
    monkeypatch.setattr("bench.baselines.needs_torch", lambda: "")
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert baseline.absent().startswith("xformers does not import: ModuleNotFoundError")
    assert not baseline.declines(dense("bfloat16", 64, 1, 4, 128, mask="causal"))
    assert baseline.declines(dense("bfloat16", 64, 1, 4, 128, num_heads_kv=2)) and baseline.declines(PACKED)


@pytest.mark.parametrize("imported", [False, True])
def test_xformers_imports_beside_flash_attention_4(imported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for a package flash_attn and takes it for version 2, of which version 4 has the name and nothing else."""
    files = {
        "flash_attn/cute/__init__.py": "",
        "xformers/__init__.py": "",
        "xformers/ops.py": "import importlib.util\nif importlib.util.find_spec('flash_attn'):\n"
        "    import flash_attn.flash_attn_interface\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("flash_attn", "xformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("bench.baselines.needs_torch", lambda: "")
    if imported:
        importlib.import_module("flash_attn.cute")
    before = sys.modules.get("flash_attn")
    (baseline,) = (b for b in BASELINES if b.name == "xformers")
    assert baseline.absent() == ""
    assert sys.modules.get("flash_attn") is before or not imported
    assert importlib.import_module("flash_attn.cute")
    for name in [n for n in sys.modules if n.partition(".")[0] in ("flash_attn", "xformers")]:
        del sys.modules[name]


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_xformers_masks_are_ours(mask: str) -> None:
    """Of its own masks, which need neither a GPU nor its compiled half."""
    pytest.importorskip("xformers.ops")
    (baseline,) = (b for b in BASELINES if b.name == "xformers")
    for case in (
        dense("bfloat16", 16, 1, 2, 32, seqlen_k=48, mask=mask),
        dense("bfloat16", 16, 1, 2, 300, mask="window 128"),
    ):
        (call,) = baseline.calls(Inputs.of(case, TorchOnCpu()))
        bias = call.keywords["attn_bias"]
        visible = case.mask_object().materialize(case.seqlen_q, case.seqlen_k)
        theirs = np.zeros(visible.shape) if bias is None else bias.materialize(visible.shape).numpy()
        np.testing.assert_array_equal(theirs == 0, visible)


def test_the_first_host_rows_are_those_that_are_told() -> None:
    """A time limit cuts off what explains them, never JAX's, which takes longest to start."""
    rows = [(arrays.name, part) for arrays, part, _, _ in host.jobs(BASELINES, torch=True)]
    assert rows[:4] == [("cupy", ""), ("torch", ""), ("cupy", "/jax"), ("cupy", "/jax_return")]
    assert len(set(rows)) == len(rows) == 17
    assert all("jax" not in part and arrays == "cupy" for arrays, part, _, _ in
               ((a.name, p, b, s) for a, p, b, s in host.jobs([], torch=False)))  # fmt: skip
    peers = {part: [b.name for b in peers] for _, part, _, peers in host.jobs(BASELINES, torch=True)}
    assert peers["/jax"] == ["jax"] and peers["/autograd"] == ["cudnn", "flash", "fa3", "fa4"]


def test_a_peer_that_cannot_be_prepared_is_named_and_the_others_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Sdpa):
        def calls(self, inputs: Inputs) -> list:
            raise RuntimeError("no kernel image")

    pytest.importorskip("torch")
    case = dense("float32", 16, 1, 2, 24, mask="causal", bench="latency")
    peers = [Broken("MATH", "broken", "broken", ("float32",)), Sdpa("MATH", "math", "torch math", ("float32",))]
    found = latency.contenders(case, peers, Inputs.of(case, TorchOnCpu()))
    assert [c.name for c in found] == ["cuattn", "math"]
    assert "broken: RuntimeError: no kernel image" in capsys.readouterr().out


def test_a_part_imports_no_library_but_its_peers() -> None:
    """What is absent is named, in a line each; what the part has no use for is not looked at."""
    script = """if True:
        import sys
        from bench.__main__ import parser, peers_of
        peers_of(parser().parse_args(["host"]))
        loaded = {"flashinfer": "flashinfer", "xformers": "xformers", "flex": "torch.nn.attention.flex_attention"}
        print("loaded:", *(name for name, module in loaded.items() if module in sys.modules))
    """
    *lines, last = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert last == "loaded:"
    assert {line.split()[1].rstrip(":") for line in lines} <= set(PEERS["host"])


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_errors_are_those_of_each_library(mask: str) -> None:
    """The textbook formula in float64 against the oracle, ours and PyTorch's in float32 against both."""
    pytest.importorskip("torch")
    case = dense("float32", 16, 1, 2, 48, mask=mask, bench="error")
    inputs = Inputs.of(case, TorchOnCpu())
    (dout, *_) = inputs.cotangents()
    found = error.reference(inputs, dout)
    host = [x.double().numpy() for x in (dout, *inputs.sets[0])]
    oracle = reference.backward(*host, scale=0.25, mask=case.mask_object(), dtype=np.float64)
    out, _ = reference.forward(*host[1:], scale=0.25, mask=case.mask_object(), mods=(), dtype=np.float64)
    for name, expected in (("out", out), ("dq", oracle.dq), ("dk", oracle.dk), ("dv", oracle.dv)):
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=0, atol=1e-12)
    errors = error.errors_of(case, [Sdpa("MATH", "math", "torch math", ("float32", "float64"))], TorchOnCpu())
    assert errors.keys() == {"cuattn", "math"} and errors["cuattn"].keys() == {"out", "dq", "dk", "dv"}
    assert errors["math"].keys() == {"out"}, "it declines gradients that faster kernels have"
    for arrays in errors.values():
        for worst, rms in arrays.values():
            assert 0 < rms < np.finfo(np.float32).eps * 10 and 0 < worst < np.finfo(np.float32).eps * 100


def test_errors_are_shown_over_those_of_peers() -> None:
    found = {"a case": {"cuattn": {"out": (2e-3, 1e-3), "dq": (4e-3, 2e-3)}, "fa3": {"out": (1e-3, 2e-3)}, "fa4": {}}}
    head, out, dq = error.ratios(found)
    assert head.split()[-3:] == ["cuattn", "fa3", "fa4"]
    assert out.split()[-5:] == ["out", "1.00e-03", "(2.00e-03)", "0.50", "(2.00)"]
    assert dq.split()[-3:] == ["dq", "2.00e-03", "(4.00e-03)"]


def test_an_error_is_relative_to_its_array() -> None:
    torch = pytest.importorskip("torch")
    assert error.error(torch.tensor([4.0, 2.0]), torch.tensor([4.0, 3.0]).double()) == (0.25, 0.2)


def test_latency_is_the_time_of_whole_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter(range(10_000))
    monkeypatch.setattr(latency, "synchronize", lambda: next(waits))
    monkeypatch.setattr(latency, "warm_up", lambda contender: contender())
    quick, broken = Contender("quick", [lambda: None]), Contender("broken", [lambda: 1 / 0])
    found = latency.measure([quick, broken], 2, 50)
    assert found.keys() == {"quick"} and 0 <= found["quick"][0] <= found["quick"][1]
    assert next(waits) == 100


def test_a_peers_memory_is_that_of_its_own_call() -> None:
    """A call of a backward case returns the result and three gradients, which are not counted."""
    torch = pytest.importorskip("torch")
    baseline = Sdpa("MATH", "math", "torch math", ("float32",))
    case = dense("float32", 16, 1, 2, 24, mask="causal", bench="memory/backward")
    results_of = memory.peer_call(baseline, Inputs.of(case, TorchOnCpu()))()
    assert [tuple(x.shape) for x in results_of] == [(1, 2, 24, 16), *[(1, 24, 2, 16)] * 3]
    (out,) = memory.peer_call(baseline, Inputs.of(replace(case, bench="memory"), TorchOnCpu()))()
    assert isinstance(out, torch.Tensor) and out.shape == (1, 2, 24, 16)


class Passed:
    """A deadline that passes after some cases."""

    def __init__(self, cases: int) -> None:
        self.left = cases

    @property
    def passed(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_time_limit_says_what_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.within(Passed(2), ["a", "b", "c"])) == ["a", "b"]  # type: ignore[arg-type]
    assert capsys.readouterr().out == "time limit: 1 of 3 not run, from c\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals_alone(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    for case in progress.within(Passed(9), ["one", "two"]):  # type: ignore[arg-type]
        print("row of", case)
    assert sys.stdout is screen
    text = screen.getvalue()
    if not terminal:
        assert text == "row of one\nrow of two\n"
        return
    assert "0/2" in text and "1/2" in text
    shown = [line.rpartition("\r")[2] for line in text.split("\n")]
    assert "row of one" in shown and "row of two" in shown, "each row has a line of its own"


def test_what_a_graph_reads_is_kept_while_it_is_timed(monkeypatch) -> None:
    """A graph knows addresses: memory that nobody holds would be given to the next contender."""
    pytest.importorskip("torch")
    held: dict[str, weakref.ref[object]] = {}

    def contender(name):
        def make(case, inputs):
            memory = Memory()
            held[name] = weakref.ref(memory)
            return lambda: memory

        return make

    class Memory:
        pass

    def timed(graphs, rounds):
        assert set(graphs) == set(held) == {"cuattn", "one", "other"}
        assert all(memory() is not None for memory in held.values())
        return dict.fromkeys(graphs, 1.0)

    monkeypatch.setattr(decode, "inputs_of", lambda case: None)
    monkeypatch.setattr(decode, "ours", contender("cuattn"))
    monkeypatch.setattr(decode, "PEERS", {name: contender(name) for name in ("one", "other")})
    monkeypatch.setattr(decode, "graph_of", lambda call: call() and None)
    monkeypatch.setattr(decode, "measure", timed)
    decode.run_case(decode.CASES[0], ["one", "other"], 1, ENV)
    assert all(memory() is None for memory in held.values())


def test_kernels_of_decode_are_those_of_its_calls() -> None:
    """Compiled ahead of time for a typical GPU: one kernel serves all lengths."""
    sources = {case: decode.sources(case, "sm_90a") for case in (*decode.CASES, *decode.LENGTHS)}
    assert all(len(found) == 1 and found[0][1] == "sm_90a" for found in sources.values())
    alone, many = (sources[decode.DecodeCase(batch, 2048)] for batch in (1, 8))
    assert alone != many and many == sources[decode.DecodeCase(128, 8192)]


def test_a_peer_that_is_not_ready_is_left_out(monkeypatch, capsys) -> None:
    """It neither holds up rows nor takes part in those whose kernels it has not compiled."""
    small, other = (decode.smallest("flashinfer", decode.DecodeCase(8, 2048, head_dim=d)) for d in (128, 64))
    assert small is not None and other is not None and small != other
    assert decode.smallest("fa3", decode.CASES[0]) is None
    fresh = multiprocessing.get_context("spawn")
    processes = {
        ("flashinfer", small): fresh.Process(target=time.sleep, args=(600,), daemon=True),
        ("flashinfer", other): fresh.Process(target=int, args=("0",), daemon=True),
        ("broken", small): fresh.Process(target=int, args=("x",), daemon=True),
    }
    for process in processes.values():
        process.start()
    for key in list(processes)[1:]:
        processes[key].join()
    assert decode.finish(processes, end=0.0) == {("flashinfer", small), ("broken", small)}
    processes["flashinfer", small].join()
    text = capsys.readouterr().out
    assert "flashinfer, as for decode 1x64 h8/1 d128 page16: has not compiled in time" in text
    assert "broken, as for decode 1x64 h8/1 d128 page16: its first call failed" in text

    seen = []
    monkeypatch.setattr(decode, "start", lambda peers, cases: processes)
    monkeypatch.setattr(decode, "prewarm", lambda cases, sources: None)
    monkeypatch.setattr(decode, "run_case", lambda case, peers, rounds, env: seen.append(peers))
    cases = [decode.DecodeCase(8, 2048), decode.DecodeCase(8, 2048, head_dim=64)]
    stored: list[object] = []
    store = types.SimpleNamespace(add=stored.append)
    decode.run(cases, ["fa3", "flashinfer"], 1, store, ENV, decode.Deadline(60.0))  # type: ignore[arg-type]
    assert seen == [["fa3"], ["fa3", "flashinfer"]] and len(stored) == 2
