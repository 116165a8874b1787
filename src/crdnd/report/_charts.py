"""The report's charts as fragments of HTML; each needs plotly.js on the page."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from crdnd.counts import Count
from crdnd.engine.history import Epoch
from crdnd.report._lines import Line
from crdnd.report.leaderboard import WORST, Estimate, Leaderboard

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Middle tones, which read on white and on black alike.
_TEACHER = "#7d8590"
_STUDENTS = (
    "#2f7ed8",
    "#d9622b",
    "#1f9d78",
    "#b0559f",
    "#c99700",
    "#28a4c9",
    "#7a63d1",
    "#d64562",
    "#7d8f2b",
    "#a06a42",
)
# Outlines, since equal accuracies lie on each other.
_ATTACKS = tuple(f"{shape}-open" for shape in ("circle", "square", "triangle-up", "diamond", "pentagon", "star"))
# The drawing area of the scatter plot on a wide screen, in pixels: names are placed for it.
_WIDTH, _HEIGHT = 1080, 440


def colours_of(lines: Sequence[Line], others: Iterable[str]) -> dict[str, str]:
    """Colours by method, the same in all charts; by label too, so that a teacher is told from a student of its method.

    Args:
        lines: the models of the results.
        others: methods that occur elsewhere, perhaps without a line of their own.
    """
    students = [line for line in lines if line.row.role == "student"]
    teachers = [line for line in lines if line.row.role == "teacher"]
    taught = dict.fromkeys(line.row.method for line in students)
    grey = {name: _TEACHER for line in teachers for name in (line.label, line.row.method) if name not in taught}
    methods = [name for name in dict.fromkeys([*taught, *others]) if name not in grey]
    coloured = {name: _STUDENTS[index % len(_STUDENTS)] for index, name in enumerate(methods)}
    return grey | coloured | {line.label: coloured[line.row.method] for line in students}


def clean_against_worst_case(lines: Sequence[Line], colours: Mapping[str, str]) -> Markup:
    """A named point per model with its 95% intervals as error bars."""
    from plotly.graph_objects import Figure, Scatter

    x_range = _range([line.row.clean for line in lines])
    y_range = _range([line.row.worst_case for line in lines])
    places = _label_places(
        [
            (
                _WIDTH * (line.row.clean.percent - x_range[0]) / (x_range[1] - x_range[0]),
                _HEIGHT * (line.row.worst_case.percent - y_range[0]) / (y_range[1] - y_range[0]),
                line.label,
            )
            for line in lines
        ]
    )
    figure = Figure()
    for line in lines:
        clean, worst = line.row.clean, line.row.worst_case
        colour = colours[line.label]
        figure.add_trace(
            Scatter(
                x=[clean.percent],
                y=[worst.percent],
                error_x=_error_bar(clean, colour),
                error_y=_error_bar(worst, colour),
                mode="markers",
                marker={"color": colour, "size": 11},
                hovertext=[f"{_plain(line.label)}<br>clean {_exact(clean)}<br>worst case {_exact(worst)}"],
                hoverinfo="text",
                showlegend=False,
            )
        )
    # The names come last and so above every error bar.
    figure.add_trace(
        Scatter(
            x=[line.row.clean.percent for line in lines],
            y=[line.row.worst_case.percent for line in lines],
            mode="markers+text",
            # Unseen, but plotly keeps a name clear of a marker only where it draws one.
            marker={"size": 11, "opacity": 0},
            text=[_plain(line.label) for line in lines],
            textposition=places,
            cliponaxis=False,
            hoverinfo="skip",
            showlegend=False,
        )
    )
    figure.update_layout(height=520)
    figure.update_xaxes(title_text="clean accuracy (%)", range=x_range)
    figure.update_yaxes(title_text="worst-case accuracy (%)", range=y_range)
    return _fragment(figure, "chart-tradeoff", top=16)


def colours_of_methods(names: Iterable[str]) -> dict[str, str]:
    """A colour for each method, in the order in which they come."""
    return {name: _STUDENTS[index % len(_STUDENTS)] for index, name in enumerate(dict.fromkeys(names))}


def clean_against_robust(board: Leaderboard, colours: Mapping[str, str]) -> Markup:
    """A point per method, student and teacher with its 95% t intervals: a colour per method, a symbol per student."""
    from plotly.graph_objects import Figure, Scatter

    shown = [entry for entry in board.entries if entry.columns]
    students = list(dict.fromkeys(entry.student for entry in shown))
    symbols = {name: _ATTACKS[index % len(_ATTACKS)].removesuffix("-open") for index, name in enumerate(students)}
    figure = Figure()
    for entry in shown:
        clean, worst, colour = entry.columns["clean"], entry.columns[WORST], colours[entry.objective]
        names = [_plain(name) for name in (entry.objective, entry.student, entry.teacher) if name]
        figure.add_trace(
            Scatter(
                x=[clean.mean],
                y=[worst.mean],
                error_x=_t_interval(clean, colour),
                error_y=_t_interval(worst, colour),
                mode="markers",
                marker={"color": colour, "symbol": symbols[entry.student], "size": 11},
                hovertext=["<br>".join([*names, f"clean {_estimated(clean)}", f"worst case {_estimated(worst)}"])],
                hoverinfo="text",
                showlegend=False,
            )
        )
    # In the legend a square stands for a method, whatever the student, and a grey symbol for a student.
    keys = [(name, colours[name], "square") for name in dict.fromkeys(entry.objective for entry in shown)]
    keys += [(name, _TEACHER, symbol) for name, symbol in symbols.items()]
    for name, colour, symbol in keys:
        marker = {"color": colour, "symbol": symbol, "size": 11}
        figure.add_trace(Scatter(x=[None], y=[None], mode="markers", marker=marker, name=_plain(name)))
    figure.update_layout(height=520)
    figure.update_xaxes(title_text="clean accuracy (%)")
    figure.update_yaxes(title_text="worst-case accuracy (%)")
    return _fragment(figure, "chart-comparison", top=48)


def _t_interval(found: Estimate, colour: str) -> dict[str, Any]:
    """An error bar; none where there is no interval."""
    half = 0.0 if found.high is None else found.high - found.mean
    return {"type": "data", "array": [half], "visible": half > 0, "color": colour, "thickness": 1.2, "width": 4}


def _estimated(found: Estimate) -> str:
    interval = "" if found.low is None else f", 95% [{found.low:.1f}, {found.high:.1f}]"
    return f"{found.mean:.1f}% over {found.n} seeds{interval}"


def attacks_on_one_line(lines: Sequence[Line], attacks: Sequence[str], colours: Mapping[str, str]) -> Markup:
    """A line per model with a dot for every attack and a bar at the worst case."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for line in lines:
        robust = [line.row.worst_case.percent, *(line.row.attacks[name].percent for name in attacks)]
        figure.add_trace(
            Scatter(
                x=[min(robust), max(robust)],
                y=[_plain(line.label)] * 2,
                mode="lines",
                line={"color": colours[line.label], "width": 2},
                opacity=0.45,
                showlegend=False,
                hoverinfo="skip",
            )
        )
    symbols = {name: _ATTACKS[index % len(_ATTACKS)] for index, name in enumerate(attacks)}
    for name, symbol in {**symbols, "worst case": "line-ns-open"}.items():
        counts = [line.row.attacks[name] if name in symbols else line.row.worst_case for line in lines]
        marker = {"symbol": symbol, "size": 11 if name in symbols else 20, "line_width": 2.2}
        figure.add_trace(
            Scatter(
                x=[count.percent for count in counts],
                y=[_plain(line.label) for line in lines],
                mode="markers",
                marker={**marker, "color": [colours[line.label] for line in lines]},
                hovertext=[
                    f"{_plain(line.label)}<br>{_plain(name)} {_exact(count)}"
                    for line, count in zip(lines, counts, strict=True)
                ],
                hoverinfo="text",
                showlegend=False,
            )
        )
        # In the legend a symbol stands for an attack and no method's colour may suggest otherwise.
        figure.add_trace(
            Scatter(x=[None], y=[None], mode="markers", marker={**marker, "color": _TEACHER}, name=_plain(name))
        )
    figure.update_layout(height=110 + 36 * len(lines), xaxis_title="accuracy under attack (%)")
    figure.update_yaxes(
        categoryorder="array", categoryarray=[_plain(line.label) for line in lines], autorange="reversed"
    )
    return _fragment(figure, "chart-attacks", top=48)


def training_curves(histories: Mapping[str, Sequence[Epoch]], colours: Mapping[str, str]) -> Markup:
    """Validation accuracy under attack and on clean images, and the training loss, over the epochs of all runs."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    readings: dict[str, Callable[[Epoch], float | None]] = {
        "validation accuracy under attack (%)": lambda epoch: epoch.validation and epoch.validation.robust.percent,
        "validation accuracy, clean (%)": lambda epoch: epoch.validation and epoch.validation.clean.percent,
        "training loss": lambda epoch: epoch.loss,
    }
    panels = {title: {name: _curve(h, read) for name, h in histories.items()} for title, read in readings.items()}
    panels = {title: curves for title, curves in panels.items() if any(curves.values())}
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=list(panels), horizontal_spacing=0.06)
    for column, curves in enumerate(panels.values(), start=1):
        for name, points in curves.items():
            figure.add_trace(
                Scatter(
                    x=[epoch for epoch, _ in points],
                    y=[value for _, value in points],
                    # Few points are shown as such: a single one would have no line.
                    mode="lines+markers" if len(points) < 30 else "lines",
                    marker_size=5,
                    line={"color": colours[name], "width": 2},
                    name=_plain(name),
                    legendgroup=_plain(name),
                    # Every run has a loss, which is the last panel.
                    showlegend=column == len(panels),
                    hovertemplate="%{fullData.name}<br>epoch %{x}: %{y:.3~g}<extra></extra>",
                ),
                row=1,
                col=column,
            )
    figure.update_layout(height=400)
    figure.update_annotations(font_size=14)
    figure.update_xaxes(title_text="epoch")
    return _fragment(figure, "chart-training", top=76)


def _curve(history: Sequence[Epoch], read: Callable[[Epoch], float | None]) -> list[tuple[int, float]]:
    values = [(epoch.epoch, read(epoch)) for epoch in history]
    return [(epoch, value) for epoch, value in values if value is not None]


def _range(counts: Sequence[Count]) -> tuple[float, float]:
    """An axis in percent that shows the intervals whole and does not magnify a narrow one beyond two points."""
    ends = [end for count in counts for end in count.interval()]
    span = max(ends) - min(ends)
    margin = max(0.06 * span, (2 - span) / 2)
    return min(ends) - margin, max(ends) + margin


def _label_places(points: Sequence[tuple[float, float, str]]) -> list[str]:
    """Where plotly writes the name of each point (x, y in pixels, y upwards), so that names do not cover each other."""
    # Places beside the point come last: there the error bars run.
    sides = {"left": -1.0, "center": -0.5, "right": 0.0}
    candidates = [(v, h) for h in ("right", "left", "center") for v in ("top", "bottom")]
    candidates += [("middle", "right"), ("middle", "left")]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    places: list[str] = []
    for x, y, text in points:
        # About what the font needs.
        width, height = 7.0 * len(text), 14.0
        boxes: dict[str, tuple[float, float, float, float]] = {}
        for vertical, horizontal in candidates:
            left = x + sides[horizontal] * width + {"left": -7, "center": 0, "right": 7}[horizontal]
            bottom = y + {"top": 7.0, "middle": -height / 2, "bottom": -7 - height}[vertical]
            boxes[f"{vertical} {horizontal}"] = (left, bottom, left + width, bottom + height)
        free = [
            place
            for place, box in boxes.items()
            if box[0] >= 0 and box[2] <= _WIDTH and not any(_overlap(box, other) for other in taken)
        ]
        place = free[0] if free else "top right"
        taken.append(boxes[place])
        places.append(place)
    return places


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _error_bar(count: Count, colour: str) -> dict[str, Any]:
    low, high = count.interval()
    return {
        "type": "data",
        "array": [high - count.percent],
        "arrayminus": [count.percent - low],
        "color": colour,
        "thickness": 1.2,
        "width": 4,
    }


def _exact(count: Count) -> str:
    low, high = count.interval()
    return f"{count.percent:.1f}% ({count.correct}/{count.n}), 95% [{low:.1f}, {high:.1f}]"


def _plain(text: str) -> str:
    """The text as plotly shows it letter by letter; plotly reads tags and entities in every label."""
    return html.escape(text, quote=False)


def _fragment(figure: "Figure", name: str, top: int) -> Markup:
    """The figure in the style of the page, `top` pixels below its upper edge."""
    grid: dict[str, Any] = {
        "gridcolor": "rgba(128,128,128,0.22)",
        "zeroline": False,
        "linecolor": "rgba(128,128,128,0.5)",
    }
    figure.update_layout(
        template="none",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#24292f"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 56, "r": 16, "t": top, "b": 48},
        # At the upper edge of the figure, whatever its height.
        legend={"orientation": "h", "yref": "container", "y": 1, "x": 0, "yanchor": "top"},
        showlegend=True,
    )
    figure.update_xaxes(automargin=True, title_standoff=10, title_font_size=13, **grid)
    figure.update_yaxes(automargin=True, title_standoff=10, title_font_size=13, **grid)
    # The fragment is plotly's own serialisation, which escapes whatever could end its script element.
    return Markup(  # noqa: S704
        figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config={"displayModeBar": False})
    )
