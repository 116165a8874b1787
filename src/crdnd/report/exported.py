"""An exported file beside its model, as a table for the terminal."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from crdnd.export import Cost, Export, Share
from crdnd.report._lines import eps_in_words, titled


def export_table(export: Export) -> Group:
    """A line for each thing measured: the model, the file, and in the last column what the file costs."""
    equality = export.equality
    table = Table(box=box.SIMPLE, padding=0, pad_edge=False, show_edge=False, collapse_padding=False)
    table.add_column("", overflow="fold")
    for name in ("  model", "  file", "  file - model"):
        table.add_column(name, justify="right")
    model, file = export.model_accuracy, export.accuracy
    table.add_row("clean", _cell(model.clean), _cell(file.clean), _cost(export.cost_clean))
    for name, share in file.attacks.items():
        kind, _, attack = name.rpartition(":")
        own = None if kind == "twin" else model.attacks.get(attack)
        words = {"model": f"{attack} (model)", "twin": f"{attack} (twin)"}
        table.add_row(words.get(kind, attack), _cell(own), _cell(share), "")
    table.add_row("worst case", _cell(model.worst_case), _cell(file.worst_case), _cost(export.cost_worst_case))
    if export.quantisation is not None:
        table.add_row("same class", "", _cell(export.quantisation.agreeing), "")
    for line in export.latency:
        name = f"ms, batch of {line.batch}"
        table.add_row(name, f"{line.model:.3f}", f"{line.file:.3f}", f"{line.model / line.file:.2f} x as fast")
    return titled(
        f"{export.file} ({export.format}, {export.size_bytes / 2**20:.2f} MiB) on {export.data}, {export.split} "
        f"split, n = {export.n}; {export.threat.norm}, eps = {eps_in_words(export.threat.eps)}",
        table,
        f"Intervals are 95%. Logits within {equality.largest_difference:.2g} of the model's on {equality.inputs} "
        f"inputs{' before quantisation' if export.quantisation else ''}. (model): made by the model's gradients; "
        f"{'(twin): by those of the dequantised twin; ' if export.quantisation else ''}square: "
        f"{export.square_queries} queries. Times are for one image, on {export.latency[0].threads} threads.",
    )


def _cell(share: Share | None) -> Text:
    if share is None:
        return Text("-")
    return Text(f"  {share.count.percent:.1f}").append(f" [{share.low:.1f}, {share.high:.1f}]", style="dim")


def _cost(cost: Cost) -> Text:
    points, interval = str(cost).split(" ", 1)
    return Text(f"  {points}").append(f" {interval}", style="dim")
