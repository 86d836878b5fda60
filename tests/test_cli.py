"""The command line, and the demo: the main job on real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cuattn import cli, demo


def test_info_says_which_backend_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    import cuattn

    assert cli.main(["info"]) == 0
    text, info = capsys.readouterr().out, cuattn.backend_info()
    assert info.backend in text
    assert info.reason in text


def test_support_prints_a_markdown_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["support"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) <= set("| -")
    assert len(lines) > 2


def test_support_is_written_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- support:begin -->\nold\n<!-- support:end -->\nafter\n")
    assert cli.main(["support", "--write", str(page)]) == 0
    assert page.read_text() == f"before\n<!-- support:begin -->\n{cli.support_table()}\n<!-- support:end -->\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="support:begin"):
        cli.main(["support", "--write", str(page)])


def test_clear_cache_reports_a_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path))
    assert cli.main(["clear-cache"]) == 0
    assert capsys.readouterr().out == "removed 0 cached kernels\n"


def test_compile_fills_the_cache_and_reports_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuattn import jit

    calls = []

    def prewarm(arch: str, all_plans: bool, progress) -> list[str]:
        calls.append((arch, all_plans))
        for done in (1, 2):
            progress(done, 2, f"kernel {done}")
        return ["a", "b"]

    monkeypatch.setattr(jit, "prewarm", prewarm)
    assert cli.main(["compile", "--arch", "sm_80", "sm_90a", "--all"]) == 0
    assert calls == [("sm_80", True), ("sm_90a", True)]
    captured = capsys.readouterr()
    assert "sm_90a: 2 kernels in the cache" in captured.out
    assert "2/2" in captured.err


@pytest.mark.parametrize("argv", [[], ["compile"], ["unknown"]])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    assert "usage: python -m cuattn" in capsys.readouterr().err


def test_hidden_diagonal_hides_the_diagonal_only() -> None:
    n = 2 * demo.MASK_BLOCK + 5
    np.testing.assert_array_equal(demo.hide_diagonal(n).materialize(n, n)[0], ~np.eye(n, dtype=bool))


def test_demo_classifies_the_digits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    figure = tmp_path / "neighbours.png"
    assert cli.main(["demo", "--figure", str(figure)]) == 0
    text = capsys.readouterr().out
    digits = demo.load_digits()
    task = demo.make_task(digits)
    out, (oracle, oracle_lse) = task.numpy_backend()[0], task.oracle()
    assert demo.accuracy(oracle, digits.labels) > 0.98
    assert f"{demo.accuracy(oracle, digits.labels):.2%}" in text
    assert demo.accuracy(out, digits.labels) == demo.accuracy(oracle, digits.labels)
    nearest, weights = demo.most_attended(task, oracle_lse, 0)
    assert 0 not in nearest
    assert 0 < weights[-1] <= weights[0] <= weights.sum() <= 1 + 1e-6
    pytest.importorskip("matplotlib")
    assert figure.stat().st_size > 0
