"""The parts of bench/ that need no GPU: cases, FLOPs, bounds, result rows, the README's table."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import backward, compare, figures, results
from bench.__main__ import STORED, main, parser, selected
from bench.baselines import BASELINES, TITLES, Sdpa, available
from bench.cases import (
    BACKWARD,
    BACKWARD_QUICK,
    FORWARD,
    HOST,
    JIT,
    LENGTHS,
    MASKS,
    MEMORY,
    MEMORY_BACKWARD,
    PACKED,
    QUICK,
    SPLIT,
    UNEVEN_PACKED,
    USER_MOD,
    Case,
    dense,
    gradients,
    user_mod,
)
from bench.ceilings import RECORDED
from bench.inputs import Inputs
from bench.timing import Timing

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
    for cases in (FORWARD, BACKWARD, BACKWARD_QUICK, JIT, MEMORY, MEMORY_BACKWARD):
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


def readme_text() -> str:
    sections = ((results.BEGIN, results.END), (results.BACKWARD_BEGIN, results.BACKWARD_END))
    return "# before\n" + "between\n".join(f"{begin}\nold\n{end}\n" for begin, end in sections) + "after\n"


def test_report_replaces_only_its_section(tmp_path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(readme_text())
    cases = [FORWARD[0], PACKED, SPLIT, dense("float32", 128, 2, 16, 4096)]
    rows = [row(case, 2000.0, flash=3000.0) for case in cases]
    rows[-1]["error"] = 3.2e-7
    rows += [row(replace(HOST, bench="host/cupy"), 15.25), row(replace(JIT[0], bench="jit/cold"), 1.2e6)]
    rows.append(results.make_row(replace(MEMORY[0], bench="memory"), None, {}, ENV, None, bytes=3 << 20))
    results.save(folder / "h200.json", rows)
    results.report(readme, TITLES, folder)
    text = readme.read_text()
    assert text.startswith("# before\n") and text.endswith("after\n") and "old" not in text
    assert "| bf16 | 64 | 4 x 32 | 4096 | full | 2000 | 274.9 |" in text
    assert "x FA2" in text and "1.50" in text and "causal, packed" in text and "3.2e-07" in text
    assert "15.2 us" in text and "1.20 s" in text and "3.00 MiB" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    tables = [list(g) for is_row, g in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")) if is_row]
    assert widths and all(len({line.count("|") for line in table}) == 1 for table in tables)
    results.report(readme, TITLES, folder)
    assert readme.read_text() == text


def test_report_has_a_section_for_gradients(tmp_path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(readme_text())
    wide, narrow = (case for case in BACKWARD if case.head_dim == 192 or case.mods == ("key bias",))
    rows = [row(FORWARD[0], 2000.0, flash=3000.0), row(BACKWARD[0], 5000.0, cudnn=4000.0, flash=6000.0)]
    rows += [row(narrow), row(wide, efficient=2000.0)]
    rows += [row(replace(HOST, bench=f"host/torch{part}"), 15.25) for part in ("", "/backward", "/autograd")]
    rows.append(results.make_row(MEMORY_BACKWARD[0], None, {}, ENV, None, bytes=9 << 20, planned=8 << 20))
    results.save(folder / "h200.json", rows)
    results.report(readme, TITLES, folder)
    forward, _, gradient = readme.read_text().partition("between")
    assert "| 2000 | 274.9 |" in forward and "x best" not in forward and "5000" not in forward
    assert "| bf16 | 64 | 4 x 32 | 4096 | full | 5000 | 274.9 |" in gradient and "| 0.80 | 0.80 | 1.20 |" in gradient
    assert "| 192/128 |" in gradient and "full, key bias" in gradient and "2000 | 274.9" not in gradient
    assert forward.count("15.2 us") == 1 and gradient.count("15.2 us") == 2
    assert "9.00 MiB; planned 8.00 MiB" in gradient
    tables = [list(g) for is_row, g in itertools.groupby(gradient.splitlines(), lambda x: x.startswith("|")) if is_row]
    assert len(tables) == 2 and all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_the_readme_has_the_markers_of_the_report() -> None:
    text = (results.ROOT / "README.md").read_text(encoding="utf-8")
    for marker in (results.BEGIN, results.END, results.BACKWARD_BEGIN, results.BACKWARD_END):
        assert text.count(marker) == 1


def test_report_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="bench:begin"):
        results.replace_section("no markers", "x")


def test_every_forward_case_has_a_peer() -> None:
    for case in FORWARD:
        assert [b.name for b in BASELINES if not b.declines(case)], str(case)


def test_wide_dtypes_are_compared_with_what_serves_them() -> None:
    serving = {c: {b.name for b in BASELINES if not b.declines(c)} for c in FORWARD if c.dtype in ("float32", "float64")}
    for case, names in serving.items():
        assert names == ({"naive", "math"} if case.dtype == "float64" else {"naive", "math", "efficient"})


def test_every_backward_case_has_a_peer() -> None:
    serving = {case: {b.name for b in BASELINES if not b.declines_gradient(case)} for case in BACKWARD}
    for case, names in serving.items():
        assert names, str(case)
        if case.dtype == "float64":
            assert names == {"math"}
        if case.dtype == "float32":
            assert names == {"efficient"}
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


def test_the_user_modification_is_the_same_for_peers() -> None:
    torch = pytest.importorskip("torch")
    from cuattn.masks import Tile
    from cuattn.score_mods import UserMod

    tile = Tile.of(0, range(1), range(5), range(7), 5, 7)
    s = np.random.default_rng(0).standard_normal((1, 5, 7))
    i, j = (torch.from_numpy(np.asarray(x, np.float64)) for x in (tile.row, tile.col))
    np.testing.assert_allclose(user_mod(torch.from_numpy(s), 0, 0, i, j).numpy(), UserMod(*USER_MOD).apply(s, tile), rtol=1e-12)


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


def test_figures_and_page_come_from_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cases = [dense("bfloat16", d, 16384 // s, 2048 // d, s) for d in (64, 128) for s in (4096, 8192)]
    rows = [row(case, 1000.0, cudnn=500.0) for case in cases]
    rows += [results.make_row(replace(HOST, bench="host/cupy"), 20.0, {"flash": 15.0}, ENV, None, p99=31.0)]
    results.save(tmp_path / "rows" / "h200.json", rows)
    written = figures.write(TITLES, tmp_path, tmp_path / "rows")
    assert [path.name for path in written] == ["h200-forward.svg", "h200-host.svg", "results.md"]
    page = (tmp_path / "results.md").read_text()
    assert "figures/h200-forward.svg" in page and "99 of 100 whole calls below 31 us" in page
    assert (tmp_path / "figures" / "h200-forward.svg").read_text().count("cuDNN") == 1
    assert figures.rate(rows[0], "cudnn") == pytest.approx(2 * rows[0]["tflops"])


def test_all_is_the_parts_that_store_rows() -> None:
    chosen = selected(parser().parse_args(["all", "--quick"]))
    for part in STORED:
        assert set(selected(parser().parse_args([part, "--quick"]))) <= set(chosen), part
    assert HOST in chosen and len(chosen) > len(QUICK) + len(BACKWARD_QUICK)
