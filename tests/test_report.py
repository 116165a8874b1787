import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from plotly.offline import get_plotlyjs
from rich.console import Console

from crdnd.counts import Count
from crdnd.engine.history import Epoch, Validation
from crdnd.errors import InputError
from crdnd.evaluation import Example
from crdnd.evaluation.result import Protocol, Results, Row
from crdnd.report import write_report
from crdnd.report._lines import eps_in_words
from crdnd.report.table import results_table

ATTACKS = ("fgsm", "pgd_sat", "pgd_trades", "cw_inf")

# Right answers of 450: clean, the four attacks, worst case. rslad and crdnd tie under pgd_trades, and so do natural
# and the teacher on clean images.
COUNTS = {
    ("teacher", None): (437, 371, 349, 350, 341, 338),
    ("natural", "best"): (437, 54, 12, 11, 4, 3),
    ("natural", "last"): (436, 50, 8, 7, 2, 1),
    ("rslad", "best"): (422, 329, 308, 317, 292, 289),
    ("rslad", "last"): (420, 326, 301, 309, 290, 281),
    ("crdnd", "best"): (425, 334, 316, 317, 303, 300),
    ("crdnd", "last"): (423, 331, 313, 315, 299, 295),
}


def row(method: str, checkpoint: Any, counts: Sequence[int], n: int = 450, **changes: Any) -> Row:
    clean, *attacked, worst = (Count(correct=count, n=n) for count in counts)
    values: dict[str, Any] = {
        "method": method,
        "role": "teacher" if method == "teacher" else "student",
        "model": "cnn(width=8)",
        "params": 77850,
        "seed": 0,
        "checkpoint": checkpoint,
        "n": n,
        "clean": clean,
        "attacks": dict(zip(ATTACKS, attacked, strict=True)),
        "worst_case": worst,
        "model_sha256": "0" * 64,
    }
    return Row(**values | changes)


def results(rows: list[Row], n: int = 450) -> Results:
    protocol = Protocol(
        data="digits",
        data_sha256="ab" * 32,
        split="test",
        n=n,
        norm="linf",
        eps=8 / 255,
        attacks={name: {"steps": 20, "step": 0.25, "loss": "cross_entropy"} for name in ATTACKS},
        seed=3,
    )
    return Results(schema="crdnd.results/1", protocol=protocol.with_fingerprint(), rows=rows)


def full_results(n: int = 450) -> Results:
    """The rows in an order in which the teacher is not first."""
    rows = [row(m, c, [count * n // 450 for count in counts], n) for (m, c), counts in COUNTS.items()]
    return results(rows[1:] + rows[:1], n)


def history(epochs: int, every: int | None) -> list[Epoch]:
    return [
        Epoch(
            epoch=e,
            loss=2 / e,
            terms={"ce": 2 / e},
            learning_rate=0.1,
            seconds=1.5,
            validation=Validation(clean=Count(correct=100 + e, n=180), robust=Count(correct=50 + e, n=180))
            if every and e % every == 0
            else None,
        )
        for e in range(1, epochs + 1)
    ]


def item(shape: tuple[int, int, int], **changes: Any) -> Example:
    generator = np.random.default_rng(shape)
    natural = generator.random(shape).astype(np.float32)
    # Not at the edge of the range, so that clipping changes nothing, and with one pixel that stays as it was.
    natural = (0.2 + 0.6 * natural).astype(np.float32)
    delta = generator.uniform(-0.1, 0.1, shape).astype(np.float32)
    delta[0, 0, 0] = 0
    values: dict[str, Any] = {
        "method": "crdnd",
        "attack": "cw_inf",
        "sample": 17,
        "label": "cat",
        "natural": natural,
        "adversarial": natural + delta,
        "predicted_natural": "cat",
        "confidence_natural": 0.914,
        "predicted_adversarial": "dog",
        "confidence_adversarial": 0.556,
    }
    return Example(**values | changes)


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, the tables cell by cell, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.bold: list[set[tuple[int, int]]] = []
        self.text = ""
        self._cell = False
        self._skip = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        self.tags.append((tag, attributes))
        self._skip = tag in ("script", "style")
        if tag == "table":
            self.tables.append([])
            self.bold.append(set())
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True
        elif tag == "strong":
            self.bold[-1].add((len(self.tables[-1]) - 1, len(self.tables[-1][-1]) - 1))

    def handle_endtag(self, tag: str) -> None:
        self._skip = False
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._skip:
            return
        self.text += data
        if self._cell:
            cell = self.tables[-1][-1]
            cell[-1] = f"{cell[-1]} {data}".strip()

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def results(self) -> list[dict[str, str]]:
        """The main table, which follows the table of attacks: one dict a line."""
        return self._records(1)

    @property
    def last(self) -> list[dict[str, str]]:
        return self._records(2)

    @property
    def best(self) -> set[tuple[str, str]]:
        """(method, column) of every bold number of the main table."""
        head, *_ = table = self.tables[1]
        return {(table[line][0], head[column].split()[0]) for line, column in self.bold[1]}

    def _records(self, number: int) -> list[dict[str, str]]:
        head, *body = self.tables[number]
        return [dict(zip((name.split()[0] for name in head), line, strict=True)) for line in body]

    def chart(self, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The traces and the layout of a chart."""
        start = re.search(rf'Plotly\.newPlot\(\s*"{name}",\s*', self.source)
        assert start, name
        data, end = json.JSONDecoder().raw_decode(self.source, start.end())
        layout_at = re.compile(r"\s*,\s*").match(self.source, end)
        assert layout_at
        return data, json.JSONDecoder().raw_decode(self.source, layout_at.end())[0]


def write(
    folder: Path,
    document: Results,
    histories: Mapping[str, Sequence[Epoch]] | None = None,
    gallery: Sequence[Example] = (),
    title: str = "Digits",
    notes: Sequence[str] = (),
    command: str = "crdnd report runs",
) -> Page:
    path = folder / "report.html"
    write_report(
        path,
        title=title,
        results=document,
        histories=histories or {},
        gallery=gallery,
        notes=notes,
        command=command,
    )
    # Plotly's own code is no business of these tests and holds every string there is.
    source = path.read_text(encoding="utf-8")
    assert source.count(get_plotlyjs()) == 1
    return Page(source.replace(get_plotlyjs(), ""))


def cell(count: Count) -> str:
    low, high = count.interval()
    return f"{count.percent:.1f} {count.correct}/{count.n} [{low:.1f}, {high:.1f}]"


def pixels(image: Mapping[str, str]) -> np.ndarray:
    head, data = image["src"].split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_browser_would_load_nothing(tmp_path: Path) -> None:
    page = write(tmp_path, full_results(), {"crdnd": history(4, 2)}, [item((1, 5, 7))])

    loading = {"src", "srcset", "href", "data", "poster", "action", "background"}
    references = [v for _, attributes in page.tags for key, v in attributes.items() if key in loading]
    assert len(references) == 3
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    assert not page.named("link")
    assert not page.named("iframe")
    assert "@import" not in page.source
    assert "url(" not in page.source
    assert "http:" not in page.source
    assert "https:" not in page.source
    policy = next(meta["content"] for meta in page.named("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_every_count_is_in_its_cell(tmp_path: Path) -> None:
    document = full_results()
    page = write(tmp_path, document)

    rows = {(r.method, r.checkpoint): r for r in document.rows}
    assert [line["method"] for line in page.results] == ["teacher", "natural", "rslad", "crdnd"]
    assert [line["method"] for line in page.last] == ["natural", "rslad", "crdnd"]
    for lines, checkpoint in ((page.results, "best"), (page.last, "last")):
        for line in lines:
            expected = rows[line["method"], None if line["method"] == "teacher" else checkpoint]
            assert line["params"] == "77,850"
            assert line["clean"] == cell(expected.clean)
            assert {name: line[name] for name in ATTACKS} == {name: cell(c) for name, c in expected.attacks.items()}
            assert line["worst"] == cell(expected.worst_case)
            gap = expected.attacks["pgd_sat"].correct - expected.worst_case.correct
            assert line["gap"] == cell(Count(correct=gap, n=450))
    assert [line["last"] for line in page.results] == [
        "–",  # noqa: RUF001
        *(cell(rows[method, "last"].worst_case) for method in ("natural", "rslad", "crdnd")),
    ]


def test_bold_marks_the_best_students_and_no_gap(tmp_path: Path) -> None:
    page = write(tmp_path, full_results())
    assert page.best == {
        ("natural", "clean"),
        ("crdnd", "fgsm"),
        ("crdnd", "pgd_sat"),
        ("crdnd", "pgd_trades"),
        ("rslad", "pgd_trades"),
        ("crdnd", "cw_inf"),
        ("crdnd", "worst"),
        ("crdnd", "last"),
    }


def test_the_protocol_is_on_the_page(tmp_path: Path) -> None:
    document = full_results()
    page = write(tmp_path, document, title="My digits", command="crdnd report a b", notes=["First.", "Second."])

    for text in ("My digits", "crdnd report a b", "First.", "Second.", document.protocol.fingerprint, "ab" * 32):
        assert text in page.text
    assert "linf, eps = 8/255" in page.text
    assert page.tables[0] == [[name, "steps 20, step 0.25, loss cross_entropy"] for name in ATTACKS]


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    name = "<b>x</b>"
    document = results([row(name, None, COUNTS["rslad", "best"]), row("b", None, COUNTS["crdnd", "best"])])
    page = write(
        tmp_path,
        document,
        {name: history(3, 1)},
        [item((1, 5, 7), method=name, label=name, predicted_natural=name)],
        title=name,
        notes=[name],
        command=name,
    )

    assert not page.named("b")
    # Heading, title, command, table, note, and of the gallery: sample, method, prediction.
    assert page.text.count(name) == 8
    # Plotly has a markup of its own, in which the name must arrive escaped as well.
    drawn = [trace.get("name") for trace in page.chart("chart-training")[0]]
    assert drawn == ["&lt;b&gt;x&lt;/b&gt;"] * 3
    assert page.chart("chart-attacks")[0][0]["y"] == ["&lt;b&gt;x&lt;/b&gt;"] * 2
    assert "\\u003cb\\u003ex" not in page.source


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 6)])
def test_the_pictures_show_the_pixels_given(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    shown = item(shape)
    page = write(tmp_path, full_results(), gallery=[shown])

    natural, perturbation, adversarial = (pixels(image) for image in page.named("img"))
    channels_last = (lambda a: a[0]) if shape[0] == 1 else (lambda a: a.transpose(1, 2, 0))
    assert natural.dtype == np.uint8
    np.testing.assert_array_equal(natural, np.round(255 * channels_last(shown.natural)))
    np.testing.assert_array_equal(adversarial, np.round(255 * channels_last(shown.adversarial)))
    delta = channels_last(shown.adversarial - shown.natural)
    scale = np.abs(delta).max()
    assert perturbation.shape == delta.shape
    np.testing.assert_allclose(perturbation, 127.5 + 127.5 * delta / scale, atol=0.51)
    assert perturbation.reshape(-1)[0] == 128
    assert perturbation.reshape(-1)[np.abs(delta).argmax()] == (
        255 if delta.reshape(-1)[np.abs(delta).argmax()] > 0 else 0
    )
    assert f"perturbation, ±{scale:.4f}" in page.text
    assert all(image["alt"] for image in page.named("img"))


def test_no_perturbation_is_middle_grey(tmp_path: Path) -> None:
    image = np.full((1, 2, 3), 0.25)
    page = write(tmp_path, full_results(), gallery=[item((1, 2, 3), natural=image, adversarial=image)])
    assert (pixels(page.named("img")[1]) == 128).all()


def test_right_and_wrong_are_told_in_words_and_samples_stand_together(tmp_path: Path) -> None:
    page = write(
        tmp_path,
        full_results(),
        gallery=[item((1, 5, 7)), item((1, 5, 7), sample=4), item((1, 5, 7), method="rslad")],
    )
    assert page.text.count("✓ right 91%") == 3
    assert page.text.count("✗ wrong 56%") == 3
    order = re.findall(r"Sample (\d+), class cat|\b(crdnd|rslad)(?=cw_inf)", page.text)
    assert ["".join(found) for found in order] == ["17", "crdnd", "rslad", "4", "crdnd"]


def test_an_image_of_two_channels_is_refused_and_the_old_report_stays(tmp_path: Path) -> None:
    write(tmp_path, full_results())
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(InputError, match=r"\(2, 3, 4\)"):
        write(tmp_path, full_results(), gallery=[item((2, 3, 4))])
    assert (tmp_path / "report.html").read_bytes() == before


def test_results_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row"):
        write(tmp_path, results([]))
    assert not list(tmp_path.iterdir())


def test_charts_draw_the_numbers_of_the_table(tmp_path: Path) -> None:
    document = full_results()
    page = write(tmp_path, document, {"crdnd": history(7, 3), "rslad": history(7, 3)})
    crdnd = next(r for r in document.rows if (r.method, r.checkpoint) == ("crdnd", "best"))

    traces, layout = page.chart("chart-tradeoff")
    point = next(trace for trace in traces if "crdnd" in trace.get("hovertext", [""])[0])
    assert (point["x"], point["y"]) == ([crdnd.clean.percent], [crdnd.worst_case.percent])
    low, high = crdnd.worst_case.interval()
    assert point["y"][0] - point["error_y"]["arrayminus"][0] == pytest.approx(low)
    assert point["y"][0] + point["error_y"]["array"][0] == pytest.approx(high)
    assert layout["yaxis"]["range"][0] < 0.1
    assert traces[-1]["text"] == ["teacher", "natural", "rslad", "crdnd"]
    colour = point["marker"]["color"]

    traces, _ = page.chart("chart-attacks")
    dots = {trace["hovertext"][3].split("<br>")[1].rsplit(" ", 5)[0]: trace for trace in traces if "hovertext" in trace}
    assert {name: dots[name]["x"][3] for name in ATTACKS} == {name: c.percent for name, c in crdnd.attacks.items()}
    assert dots["worst case"]["x"][3] == crdnd.worst_case.percent
    assert {trace["marker"]["color"][3] for trace in dots.values()} == {colour}

    traces, _ = page.chart("chart-training")
    robust, clean, loss = (
        next(t for t in traces if t["name"] == "crdnd" and t["xaxis"] == x) for x in ("x", "x2", "x3")
    )
    assert (robust["x"], clean["x"], loss["x"]) == ([3, 6], [3, 6], [1, 2, 3, 4, 5, 6, 7])
    assert robust["y"] == [Count(correct=50 + e, n=180).percent for e in (3, 6)]
    assert clean["y"] == [Count(correct=100 + e, n=180).percent for e in (3, 6)]
    assert loss["y"] == [2 / e for e in range(1, 8)]
    assert {trace["line"]["color"] for trace in (robust, clean, loss)} == {colour}
    assert len({trace["line"]["color"] for trace in traces}) == 2


def test_names_in_the_scatter_plot_do_not_cover_each_other(tmp_path: Path) -> None:
    same = [row(f"method_{i}", None, COUNTS["crdnd", "best"]) for i in range(4)]
    page = write(tmp_path, results([*same, row("natural", None, COUNTS["natural", "best"])]))
    places = page.chart("chart-tradeoff")[0][-1]["textposition"]
    assert isinstance(places, list)
    assert len(set(places[:4])) == 4


def test_a_single_row_without_checkpoint_or_seed(tmp_path: Path) -> None:
    page = write(tmp_path, results([row("mine", None, COUNTS["crdnd", "best"], seed=None)]))
    assert [line["method"] for line in page.results] == ["mine"]
    assert "last" not in page.results[0]
    assert len(page.tables) == 2
    assert page.best == set()
    assert not page.named("img")
    for heading in ("Training", "Attacked images", "Findings", "Bold"):
        assert heading not in page.text
    assert "chart-training" not in page.source


def test_runs_without_validation_or_without_epochs(tmp_path: Path) -> None:
    page = write(tmp_path, full_results(), {"natural": [], "crdnd": history(3, None), "elsewhere": history(1, None)})
    traces, _ = page.chart("chart-training")
    assert [(trace["name"], trace["mode"]) for trace in traces] == [
        ("crdnd", "lines+markers"),
        ("elsewhere", "lines+markers"),
    ]


def test_without_pgd_sat_there_is_no_gap(tmp_path: Path) -> None:
    document = full_results()
    protocol = document.protocol.model_copy(update={"attacks": {"fgsm": {"steps": 1}}})
    page = write(tmp_path, document.model_copy(update={"protocol": protocol}))
    assert "gap" not in page.results[0]
    assert "gap" not in page.text


def test_lines_of_one_method_are_told_apart(tmp_path: Path) -> None:
    counts = COUNTS["crdnd", "best"]
    page = write(
        tmp_path,
        results(
            [
                row("trades", "best", counts, seed=0),
                row("trades", "best", counts, seed=1),
                row("trades", "last", COUNTS["natural", "last"], seed=1),
                row("trades", "last", COUNTS["rslad", "last"], seed=0),
                row("trades", None, counts, role="teacher"),
                row("ard", "last", counts),
                row("iad", None, counts, model_sha256="1" * 64),
                row("iad", None, counts, model_sha256="2" * 64),
            ]
        ),
    )
    assert [line["method"] for line in page.results] == [
        "trades (teacher)",
        "trades (seed 0)",
        "trades (seed 1)",
        "iad #111111",
        "iad #222222",
        "ard (last checkpoint)",
    ]
    assert [line["last"].split()[0] for line in page.results[1:3]] == ["62.4", "0.2"]


@pytest.mark.parametrize(
    ("eps", "words"),
    [(8 / 255, "8/255"), (0.1, "0.1"), (0.2, "0.2"), (1.0, "1"), (0.0, "0"), (128 / 255, "128/255"), (0.05, "0.05")],
)
def test_eps_is_a_fraction_of_255_where_that_is_how_people_write_it(eps: float, words: str) -> None:
    assert eps_in_words(eps) == words


def render(document: Results, width: int) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(results_table(document))
    return console.export_text()


@pytest.mark.parametrize(("n", "width"), [(450, 100), (450, 80), (10_000, 100)])
def test_the_terminal_shows_every_number_whole(n: int, width: int) -> None:
    document = full_results(n)
    text = render(document, width)

    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    words = re.split(r"\s+", text)
    for shown in document.rows:
        if shown.checkpoint == "last":
            assert f"{shown.worst_case.percent:.1f}" in words
            continue
        for count in (shown.clean, *shown.attacks.values(), shown.worst_case):
            assert f"({count.correct}/{count.n})" in words
            assert f"{count.percent:.1f}" in words
        low, high = shown.worst_case.interval()
        assert f"[{low:.1f}, {high:.1f}]" in text
    assert "77,850" in words
    assert "cnn(width=8)" in words


def test_the_terminal_table_says_what_was_measured() -> None:
    document = full_results()
    text = render(document, 100)
    lines = text.splitlines()
    assert "digits, test split, n = 450; linf, eps = 8/255" in lines[0]
    assert f"95% Wilson. Last checkpoint: its worst case. Protocol {document.protocol.fingerprint}." in " ".join(
        text.split()
    )
    methods = [line.split()[0] for line in lines if line.startswith(("teacher", "natural", "rslad", "crdnd"))]
    assert methods == ["teacher", "natural", "rslad", "crdnd"]
    after_teacher = lines[next(i for i, line in enumerate(lines) if line.startswith("teacher")) + 3]
    assert not after_teacher.strip()
    crdnd = next(line for line in lines if line.startswith("crdnd"))
    assert crdnd.split() == ["crdnd", "94.4", "74.2", "70.2", "70.4", "67.3", "66.7", "65.6"]


def test_the_terminal_table_leaves_out_a_last_column_of_nothing() -> None:
    text = render(results([row("[red]mine[/red]", None, COUNTS["crdnd", "best"], seed=None)]), 100)
    assert "ckpt" not in text
    assert "ast checkpoint" not in text
    assert "[red]mine[/red]" in text


def test_a_narrow_table_breaks_neither_its_title_nor_its_caption() -> None:
    document = results([row("student.onnx", None, COUNTS["crdnd", "best"], seed=None, params=0)])
    protocol = document.protocol.model_copy(update={"attacks": {"fgsm": {}}})
    lines = render(document.model_copy(update={"protocol": protocol}), 100).splitlines()
    assert lines[0].rstrip() == "Accuracy in percent on digits, test split, n = 450; linf, eps = 8/255"
    assert lines[-1].rstrip() == f"Intervals are 95% Wilson. Protocol {protocol.fingerprint}."
    assert max(len(line.rstrip()) for line in lines[1:-1]) < 60
    assert [line.split()[0] for line in lines if line.startswith("-")] == ["-"], "a file whose parameters are not known"
