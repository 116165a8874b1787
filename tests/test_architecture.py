"""What holds for the source as a whole."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import crdnd

PACKAGE = Path(crdnd.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted(Path(__file__).parent.glob("*.py"))

# The data's way through the package; a layer may import what stands before it.
BASE = (
    "errors",
    "config",
    "counts",
    "random",
    "io",
    "machine",
    "registry",
    "provenance",
    "download",
    "threat",
    "losses",
    "recipes",
    "models",
)
WAY = ("data", "attacks", "objectives", "engine", "evaluation", "export", "report", "recipe", "cli")
LAYERS = {**dict.fromkeys(BASE, 0), **{name: rank for rank, name in enumerate(WAY, 1)}}
# The front door and the command stand above everything.
TOP = {"": len(WAY) + 1, "__main__": len(WAY) + 1}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_of(path: Path) -> str:
    """Such as crdnd.engine.loop, or crdnd.engine for its __init__."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """The modules of this package that a file imports, wherever in the file, with their lines."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            # `from crdnd import registry` imports a module, `from crdnd.engine import Run` a name of one.
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module or "" for name in inside]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "crdnd")


def part_of(module: str) -> str:
    """The part of the package that a module belongs to, such as engine."""
    return module.partition(".")[2].partition(".")[0]


def test_every_part_of_the_package_has_its_layer():
    found = {part_of(module_of(path)) for path in SOURCES}
    assert found == {*LAYERS, *TOP}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = part_of(module_of(path))
    rank = (LAYERS | TOP)[own]
    for module, line in imports(path):
        other = part_of(module)
        assert other in LAYERS, f"{path}:{line}: {module} is no part of the package"
        below = LAYERS[other] < rank or other == own or (LAYERS[other] == rank == 0)
        assert below, f"{path}:{line}: {own or 'crdnd'} must not import {other}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: {other for other, _ in imports(path)} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        if name != "crdnd":  # its imports happen on first use
            visit(name, ())


def test_the_parts_beneath_know_nothing_of_the_rest():
    for path in SOURCES:
        if part_of(module_of(path)) in ("errors", "config", "counts", "io", "random", "losses", "provenance"):
            others = {part_of(module) for module, _ in imports(path)} - {"errors", "config"}
            assert not others, f"{path} imports {others}"


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """What a file calls, as it is written: `torch.load`, `eval`, `print`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def places(*names: str, among: list[Path] = SOURCES) -> list[str]:
    """Where a file of the package calls one of these."""
    found = [(path, call) for path in among for name, call in calls(path) if name in names]
    return [f"{path.relative_to(PACKAGE)}:{call.lineno}" for path, call in found]


def test_only_the_commands_print_and_exit():
    outside = [path for path in SOURCES if part_of(module_of(path)) != "cli"]
    assert not places("print", "sys.exit", "exit", "quit", "os._exit", among=outside)
    assert places("print", "sys.exit")


def test_no_file_is_loaded_by_running_what_is_in_it():
    running = ("eval", "exec", "pickle.load", "pickle.loads", "joblib.load", "yaml.load", "torch.export.load")
    assert not places(*running)
    assert not places("accelerator.save_state", "accelerator.load_state", "self.accelerator.load_state")
    # These run nothing only when they are told so.
    safe = {
        "torch.load": ("weights_only", "True"),
        "np.load": ("allow_pickle", "False"),
        "numpy.load": ("allow_pickle", "False"),
    }
    for path in [*SOURCES, *TESTS]:
        for name, call in calls(path):
            if name in safe:
                keyword, value = safe[name]
                arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert arguments.get(keyword) == value, f"{path}:{call.lineno}"
    for path in SOURCES:
        assert "pickle" not in {name.split(".")[0] for name in external_imports(path)}, path


def external_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_random_state_of_the_process_is_only_set_where_it_is_put_back():
    for path in SOURCES:
        forks = [
            node
            for node in ast.walk(tree(path))
            if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item) for item in node.items)
        ]
        inside = {call.lineno for fork in forks for call in ast.walk(fork) if isinstance(call, ast.Call)}
        for name, call in calls(path):
            if name in ("torch.manual_seed", "torch.seed", "random.seed", "np.random.seed", "numpy.random.seed"):
                assert call.lineno in inside, f"{path}:{call.lineno}"


def test_draws_of_torch_and_numpy_are_left_to_the_users_own_modules():
    drawing = ("torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.rand_like", "torch.randn_like")
    assert not places(*drawing, "random.random", "random.shuffle", "np.random.default_rng")


def test_the_types_of_the_package_are_there_for_its_users():
    assert (PACKAGE / "py.typed").exists()


def test_the_public_names_are_about_a_dozen_and_documented():
    assert len(crdnd.__all__) <= 16
    assert dir(crdnd) == sorted(crdnd.__all__)
    for name in crdnd.__all__:
        assert getattr(crdnd, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        crdnd.trian  # noqa: B018
