"""Write docs/methods/: a page for every method from its module's head, its settings and its training attack."""

import sys
from pathlib import Path
from typing import Any, get_args

from crdnd.objectives import Objective, load_objective, needs_second_teacher, needs_teacher, objective_names

FOLDER = Path(__file__).resolve().parent / "methods"
NOTE = "<!-- Written by docs/methods.py from the method's file: change that, then run it again. -->\n\n"


def shown(value: Any) -> str:
    """A setting's value as a recipe writes it; fractions such as 215/300 in four digits."""
    if isinstance(value, tuple):
        return f"[{', '.join(shown(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; bars in its cells are escaped."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def settings(method: type[Objective]) -> str:
    """Name, default and meaning of every setting, the method's own first."""
    rows: list[list[str]] = []
    for name, field in method.settings_class.model_fields.items():
        choices = [f"`{value}`" for value in get_args(field.annotation) if isinstance(value, str)]
        text = f"{field.description} One of {', '.join(choices)}." if choices else str(field.description)
        rows.append([f"`{name}`", f"`{shown(field.default)}`", text])
    return table(["setting", "default", "what it is"], sorted(rows, key=lambda row: row[0] == "`loss_scale`"))


def attack(method: type[Objective]) -> str:
    """The paper's training attack, setting by setting."""
    if method.attack is None:
        return "None: it trains on natural images.\n"
    fields = type(method.attack).model_fields
    rows = [[f"`attack.{name}`", f"`{shown(value)}`", str(fields[name].description)] for name, value in method.attack]
    return table(["setting", "of this method", "what it is"], rows)


def teachers(method: type[Objective]) -> str:
    """The teachers a method looks at."""
    first = "a robust one" if needs_teacher(method, method.attack) else "none"
    return f"{first} and a naturally trained one" if needs_second_teacher(method) else first


def page(name: str, method: type[Objective]) -> str:
    """The method's page."""
    title, _, head = (sys.modules[method.__module__].__doc__ or "").partition("\n\n")
    views = ", ".join(f"`{view}`" for view in sorted(method.needs))
    return (
        f"{NOTE}# `{name}`\n\n{title}\n\n{head}\n## Settings\n\n{settings(method)}\n## Training attack\n\n"
        f"{attack(method)}\n## What it looks at\n\nTeachers: {teachers(method)}. Views: {views}.\n"
    )


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    methods = {name: load_objective(name) for name in objective_names()}
    rows = [
        [f"[`{name}`]({name}.md)", str(method.__doc__).partition("\n")[0], teachers(method), method.paper]
        for name, method in methods.items()
    ]
    index = f"{NOTE}# Training methods\n\n{table(['method', 'what it does', 'teachers', 'paper'], rows)}"
    return {"README.md": index} | {f"{name}.md": page(name, method) for name, method in methods.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
