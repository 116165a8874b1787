"""Write the table in README.md from results/demo.json; with --check only say whether it is up to date."""

import sys
from pathlib import Path

from crdnd.config import build
from crdnd.evaluation import Results
from crdnd.io import read_json

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- table: results/demo.json -->\n", "<!-- end of table -->"


def table(results: Results) -> str:
    """The best checkpoint of every model as a Markdown table."""
    attacks = list(results.protocol.attacks)
    lines = [
        "| " + " | ".join(["method", "parameters", "clean", *attacks, "**worst case**"]) + " |",
        "|---|" + "---:|" * (len(attacks) + 3),
    ]
    for row in results.rows:
        if row.checkpoint == "best":
            name = f"{row.method} (the teacher)" if row.role == "teacher" else row.method
            low, high = row.worst_case.interval()
            accuracies = [f"{count.percent:.1f}" for count in (row.clean, *row.attacks.values())]
            worst = f"**{row.worst_case.percent:.1f}** [{low:.1f}, {high:.1f}]"
            lines.append("| " + " | ".join([name, f"{row.params:,}", *accuracies, worst]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrite or check the README."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    new = before + START + table(build(Results, read_json(ROOT / "results" / "demo.json"))) + END + after
    if "--check" in sys.argv:
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
