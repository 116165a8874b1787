"""The leaderboard's numbers against values worked out by hand, and its files read back."""

import csv
import io
import math
import re
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from crdnd.counts import Count
from crdnd.engine.history import Change, Validation
from crdnd.errors import InputError
from crdnd.evaluation.result import Protocol, Row
from crdnd.report import leaderboard, write_comparison
from crdnd.report.comparison import CellResult, Choice, Comparison, Trial, load_comparison
from crdnd.report.leaderboard import Estimate, escaped, estimate, notes, tables, to_csv, to_latex

ATTACKS = ("fgsm", "pgd_sat", "pgd_trades", "cw_inf", "autoattack")
T_2 = 4.302652729749464  # 97.5% quantile of Student's t with 2 degrees of freedom, from tables: 4.3027
N = 200


def protocol(data_sha256: str = "ab") -> Protocol:
    return Protocol(
        data="digits", data_sha256=data_sha256, split="test", n=N, norm="linf", eps=0.1,
        attacks={name: {} for name in ATTACKS}, seed=0,
    ).with_fingerprint()  # fmt: skip


PROTOCOLS = {seed: protocol(f"split {seed}") for seed in range(3)}


def cell(objective: str, seed: int, worst: int | None, teacher: str | None = "big", **changes: Any) -> CellResult:
    """A cell with that many right answers of 200 in the worst case; 60 more on clean images, 10 under pgd_trades."""
    row = None
    if worst is not None:
        attacks = {name: Count(correct=worst, n=N) for name in ATTACKS} | {"pgd_trades": Count(correct=worst + 10, n=N)}
        row = Row(
            method=objective, role="student", model="cnn(width=8)", params=12345, seed=seed, checkpoint="best", n=N,
            clean=Count(correct=worst + 60, n=N), attacks=attacks, worst_case=Count(correct=worst, n=N),
            model_sha256="0" * 64,
        )  # fmt: skip
    values = {
        "student": "small", "split_seed": seed, "protocol": PROTOCOLS[seed].fingerprint if row else "",
        "seconds": 10.0 + seed,        "student_passes": 600.0, "teacher_passes": 60.0,
    }  # fmt: skip
    return CellResult(objective=objective, seed=seed, teacher=teacher, row=row, **values | changes)


def comparison(cells: list[CellResult], **changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "spec": {"seeds": [0, 1, 2], "splits": "per_seed", "preset": "rslad-table", "trial_seeds": [0]},
        "baseline": "rslad", "protocols": list(PROTOCOLS.values()), "teachers": [], "choices": [], "versions": {},
        "commit": None, "command": "crdnd compare",
    }  # fmt: skip
    return Comparison(schema="crdnd.compare-results/1", cells=cells, **values | changes)


def worked() -> Comparison:
    """rslad 100, 104, 108 of 200; ard better by 2, 4 and 12; trades, without a teacher, at 90 in two seeds of three."""
    cells = [cell("rslad", seed, worst) for seed, worst in enumerate((100, 104, 108))]
    cells += [cell("ard", seed, worst) for seed, worst in enumerate((102, 108, 120))]
    cells += [cell("trades", 0, 90, teacher=None), cell("trades", 2, 90, teacher=None)]
    cells.append(cell("trades", 1, None, teacher=None, failed="the loss is not finite"))
    return comparison(cells)


def entries(document: Comparison) -> dict[tuple[str, str | None], Any]:
    return {(entry.objective, entry.teacher): entry for entry in leaderboard(document).entries}


def test_the_interval_of_three_numbers_is_that_of_students_t():
    found = estimate([50.0, 52.0, 57.0])  # mean 53, squares 9 + 1 + 16 = 26, variance 13
    half = T_2 * math.sqrt(13) / math.sqrt(3)
    assert (found.n, found.mean) == (3, 53.0)
    assert (found.sd, found.low, found.high) == pytest.approx((math.sqrt(13), 53 - half, 53 + half), rel=1e-9)


def test_means_are_over_seeds_and_in_percent():
    entry = entries(worked())["rslad", "big"]
    # 50, 52 and 54 percent.
    found = entry.columns["worst_case"]
    assert (found.mean, found.sd) == pytest.approx((52.0, 2.0))
    assert found.high - found.mean == pytest.approx(T_2 * 2 / math.sqrt(3))
    assert entry.columns["clean"].mean == pytest.approx(82.0)
    assert (entry.gap.mean, entry.gap.sd) == pytest.approx((5.0, 0.0), abs=1e-9)
    assert (entry.seeds, entry.seconds, entry.student_passes, entry.teacher_passes) == ((0, 1, 2), 11.0, 600.0, 60.0)


def test_differences_are_paired_by_seed():
    (pair,) = entries(worked())["ard", "big"].differences
    found = pair.columns["worst_case"]  # 1, 2 and 6 points: mean 3, squares 4 + 1 + 9 = 14, variance 7
    half = T_2 * math.sqrt(7 / 3)
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half))
    assert not entries(worked())["rslad", "big"].differences


def test_a_failed_seed_is_counted_and_leaves_its_pair_out():
    entry = entries(worked())["trades", None]
    assert (entry.seeds, entry.failed) == ((0, 2), 1)
    assert entry.differences[0].columns["worst_case"].n == 2
    assert entry.differences[0].columns["worst_case"].mean == pytest.approx((45 - 50 + 45 - 54) / 2)


def test_a_method_without_a_teacher_pairs_with_every_baseline_row_of_its_student():
    cells = [cell("rslad", 0, 100), cell("rslad", 0, 110, teacher="other"), cell("trades", 0, 90, teacher=None)]
    cells += [cell("ard", 0, 104), cell("rslad", 0, 20, student="tiny"), cell("iad", 0, 20, teacher="third")]
    found = entries(comparison(cells))
    pairs = {pair.baseline_teacher: pair.columns["worst_case"].mean for pair in found["trades", None].differences}
    assert pairs == pytest.approx({"big": -5.0, "other": -10.0})
    assert [pair.columns["worst_case"].mean for pair in found["ard", "big"].differences] == pytest.approx([2.0])
    assert found["iad", "third"].differences == ()


def test_one_seed_has_no_interval():
    board = leaderboard(comparison([cell("rslad", 0, 100), cell("ard", 0, 104)]))
    for entry in board.entries:
        found = entry.columns["worst_case"]
        assert (found.n, found.sd, found.low, found.high) == (1, None, None, None)
    shown = printed(board)
    assert "±" not in shown.replace("± their", "")
    assert not re.search(r"\[[+-]?\d+\.", shown)
    assert r"\pm" not in to_latex(board)


def test_seeds_that_are_all_equal_have_no_interval(tmp_path):
    """A t interval of width zero would say that the mean is known exactly."""
    cells = [cell("rslad", seed, worst) for seed, worst in enumerate((58, 70))]
    cells += [cell("ard", seed, worst) for seed, worst in enumerate((110, 122))]
    cells += [cell("iad", seed, 90) for seed in (0, 1)]
    document = comparison(cells)
    found = entries(document)
    (pair,) = found["ard", "big"].differences
    for estimated in (pair.columns["worst_case"], found["iad", "big"].columns["worst_case"]):
        assert (estimated.n, estimated.sd, estimated.low, estimated.high) == (2, 0.0, None, None)
    assert estimate([0.1 + 0.2, 0.3]) == Estimate(2, 0.30000000000000004, 0.0), "equal up to rounding"
    board = leaderboard(document)
    shown = printed(board)
    assert "+26.0" in shown
    assert "[+26.0" not in shown
    assert "[45.0, 45.0]" not in shown
    assert "±0.0" in shown
    row = next(row for row in csv.DictReader(io.StringIO(to_csv(board))) if row["objective"] == "ard")
    assert float(row["difference_worst_case_mean"]) == pytest.approx(26.0)
    assert [row[f"difference_worst_case_{part}"] for part in ("sd", "low", "high")] == ["0.0", "", ""]
    assert "& $+26.0$ " in to_latex(board)
    write_comparison(tmp_path / "report.html", document)
    page = (tmp_path / "report.html").read_text().replace(get_plotlyjs(), "")
    assert "+26.0" in page
    assert "±0.0" in page
    assert "[+26.0" not in page
    assert "[45.0, 45.0]" not in page


def test_without_a_baseline_there_are_no_differences():
    board = leaderboard(worked().model_copy(update={"baseline": None}))
    assert not any(entry.differences for entry in board.entries)
    assert "baseline" not in printed(board)


def test_the_best_worst_case_of_a_student_comes_first():
    cells = [*worked().cells, cell("ard", 0, 20, student="tiny"), cell("iad", 0, None, failed="NaN")]
    board = leaderboard(comparison(cells))
    assert [(entry.student, entry.objective) for entry in board.entries] == [
        ("small", "ard"), ("small", "rslad"), ("small", "trades"), ("small", "iad"), ("tiny", "ard"),
    ]  # fmt: skip


def test_cells_of_a_seed_under_different_protocols_are_refused():
    cells = [cell("rslad", 0, 100), cell("ard", 0, 104, protocol="another")]
    with pytest.raises(InputError, match="cells of seed 0 were measured under different protocols"):
        leaderboard(comparison(cells))
    with pytest.raises(InputError, match="none has numbers"):
        leaderboard(comparison([cell("ard", 0, None, failed="NaN")]))


def printed(board: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    for table in tables(board):
        console.print(table)
    return console.export_text()


def test_the_tables_fit_into_100_columns_and_cut_no_number():
    cells = [
        *worked().cells,
        *(cell("rslad", seed, 96, teacher="a-teacher-with-a-rather-long-name") for seed in range(3)),
    ]
    shown = printed(leaderboard(comparison(cells)))
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 100
    for text in ("52.0", "±2.0", "[47.0, 57.0]", "+3.0", "[-3.6, +9.6]", "600 + 60", "11.0", "1 failed"):
        assert text in shown, text


def test_the_csv_reads_back():
    rows = list(csv.DictReader(io.StringIO(to_csv(leaderboard(worked())))))
    assert [row["objective"] for row in rows] == ["ard", "rslad", "trades"]
    ard, rslad, trades = rows
    assert float(rslad["worst_case_mean"]) == pytest.approx(52.0)
    assert float(rslad["worst_case_sd"]) == pytest.approx(2.0)
    assert (rslad["baseline"], rslad["difference_worst_case_mean"]) == ("", "")
    assert (ard["baseline"], ard["baseline_teacher"]) == ("rslad", "big")
    assert float(ard["difference_worst_case_mean"]) == pytest.approx(3.0)
    assert float(ard["gap_mean"]) == pytest.approx(5.0)
    assert (trades["seeds"], trades["failed"], trades["teacher"]) == ("2", "1", "")


def test_the_latex_reads_back():
    text = to_latex(leaderboard(worked()))
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    columns = re.search(r"\\begin{tabular}{(\w+)}", text)
    body = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(line) for line in body} == {len(columns[1])}
    assert [line[0] for line in body] == ["method", "ard", "rslad", "trades"]
    assert body[2][-2:] == [r"$52.0 \pm 2.0$", "--"]
    assert body[1][-1] == r"$+3.0\ [-3.6, +9.6]$"


def test_latex_prints_names_letter_by_letter():
    assert escaped(r"a_b&c%d#e$f{g}") == r"a\_b\&c\%d\#e\$f\{g\}"
    assert escaped("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"
    cells = [cell("pgd_at", 0, 100, teacher=None, student="w_8")]
    assert r"pgd\_at & w\_8 & --" in to_latex(leaderboard(comparison(cells, baseline=None)))


def test_notes_name_the_chosen_trial_failures_and_suspicions():
    right = Validation(clean=Count(correct=180, n=200), robust=Count(correct=120, n=200))
    trials = [Trial(settings={"objective": {"tau": 1}}, validation=right), Trial(settings={}, failed="NaN")]
    choice = Choice(objective="ard", student="small", teacher="big", trials=trials, chosen=1)
    document = worked().model_copy(update={"choices": [choice]})
    row = document.cells[0].row.model_copy(update={"verdict": "suspicious because of masking"})
    change = Change(what="micro_batch", value=64, step=7, why="out of memory")
    document.cells[0] = document.cells[0].model_copy(update={"row": row, "changes": (change,)})
    said = notes(document)
    own = "rslad with student small and teacher big, seed 0: changed by its run, "
    assert own + "micro_batch 64 from step 7 on: out of memory" in said
    assert said[0].startswith('ard with student small and teacher big: trial 1 of 2, {"objective": {"tau": 1}}, was')
    assert "60.0% robust accuracy on validation data; 1 diverged." in said[0]
    assert "rslad with student small and teacher big, seed 0: suspicious because of masking" in said
    assert "trades with student small, seed 1: failed, the loss is not finite" in said
    board = entries(document)
    assert (board["ard", "big"].trials, board["rslad", "big"].trials, board["rslad", "big"].suspicious) == (2, 1, 1)


def test_the_report_is_one_file_that_shows_every_number(tmp_path):
    document = worked()
    document.cells.append(cell("<b>", 0, 80, teacher="<i>"))
    write_comparison(tmp_path / "report.html", document)
    page = (tmp_path / "report.html").read_text().replace(get_plotlyjs(), "")
    assert page.lstrip().startswith("<!doctype html>")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    for text in ("52.0", "±2.0", "[47.0, 57.0]", "+3.0", "[-3.6, +9.6]", "1 failed", "600 + 60", "&lt;b&gt;"):
        assert text in page, text
    assert "<b>" not in page


def test_the_document_reads_back(tmp_path):
    (tmp_path / "compare.json").write_text(worked().to_json())
    assert load_comparison(tmp_path / "compare.json") == worked()
    (tmp_path / "compare.json").write_text(worked().to_json().replace("results/1", "results/2"))
    with pytest.raises(InputError, match=r"compare-results/2'; this version reads crdnd\.compare-results/1"):
        load_comparison(tmp_path / "compare.json")
