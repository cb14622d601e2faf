"""How the house is built: arrows go down its floors, there are no circles, and a file is one idea.

Every import counts, those inside of functions too. `docs/internals.md` says what is where.
"""

import ast
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
# from the ground to the roof; a module imports from lower floors, or from its own room
FLOORS = (
    ("errors", "sharded"),
    ("positions",),
    ("interventions",),
    ("places",),
    ("tuner",),
    ("registration",),
    ("files",),
    ("data", "pocket", "smollm2"),
    ("original",),
    ("model",),
    ("loading", "generation", "steering"),
    ("describe", "reach"),
    ("training",),
    ("tasks",),
    ("jobs",),
    ("serving",),
    ("inspect", "harness"),
    ("tuning",),
    ("config", "dataset", "reft_model", "reft_trainer", "utils", "checkpoint", "training.job", "__main__"),  # doors
)
LINES, LINES_OF_A_FUNCTION = 400, 60


def modules():
    """Every module by its name, with its file."""
    paths = {path: path.relative_to(SRC).with_suffix("").parts for path in sorted(SRC.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in paths.items()}


MODULES = modules()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def imports(name):
    """The modules of the project that a module imports."""
    package = name.split(".") if name in PACKAGES else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {origin}
    return (found & MODULES.keys()) - {name}


def floor(name):
    """The number of a module's floor; the package itself and the commands are above all of them."""
    path = name.removeprefix("pyreft.")
    doors = len(FLOORS) - 1
    if path in FLOORS[doors]:
        return doors
    room = path.split(".")[0]
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


def room(name):
    return name.removeprefix("pyreft.").split(".")[0]


def test_every_room_has_a_floor():
    rooms = {name.split(".")[1] for name in MODULES if name.startswith("pyreft.")}
    assert rooms == {name.split(".")[0] for names in FLOORS for name in names}


def test_arrows_go_down():
    upward = [
        f"{name} imports {other}"
        for name in MODULES
        if name not in ("pyreft", "pyreft.tuner", "pyreft.__main__")
        for other in imports(name)
        if floor(other) >= floor(name) and not (room(name) == room(other) and floor(other) == floor(name))
    ]
    assert not upward


def test_no_circles():
    """Packages pass on what their modules have, so they are left out."""
    graph = {name: imports(name) - PACKAGES for name in MODULES if name not in PACKAGES}
    done, path = set(), []

    def follow(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in graph[name]:
                follow(other)
            done.add(path.pop())

    for name in graph:
        follow(name)


def test_a_file_is_one_idea_and_a_function_fits_on_a_page():
    long = []
    for path in MODULES.values():
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > LINES:
            long.append(f"{path.relative_to(SRC)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = node.end_lineno - node.lineno + 1
                if size > LINES_OF_A_FUNCTION:
                    long.append(f"{path.relative_to(SRC)}: {node.name} has {size} lines")
    assert not long


def test_no_file_but_those_of_commands_and_doors_shares_a_name():
    """Two files of one name are of one thing: a command and what it does, a door and where it leads."""
    names = {}
    for name in MODULES:
        if name.startswith("pyreft.") and name not in PACKAGES and floor(name) < len(FLOORS) - 1:
            names.setdefault(name.rpartition(".")[2], []).append(name)
    assert {key: found for key, found in names.items() if len(found) > 1} == {}
