"""The pages of docs/: their snippets run, and what they link to exists."""

import pkgutil
import re
from pathlib import Path

import pytest

from pyreft import pocket
from snippets import all_blocks, blocks, run_snippets

ROOT = Path(__file__).parents[2]
DOCS, SOURCE = ROOT / "docs", ROOT / "src" / "pyreft"
MIGRATION = DOCS / "from-pyreft.md"
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [*PAGES, *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md"))]


def check_migration(names):
    assert names["original_output"] is None
    assert names["edited"].shape[0] == 1
    assert names["tokens"].shape[0] == len(names["prompts"])


def check_steering(names):
    answer = names["tokens"][0, names["batch"]["input_ids"].shape[1] :]
    assert pocket.emojis_only(names["tokenizer"].decode(answer, skip_special_tokens=True))


def check_concepts(names):
    (shown,) = blocks(DOCS / "concepts.md", "text")
    assert shown == f"{names['located'].int()}\n"


def check_server(names):
    assert names["models"] == ["pocket", "emoji"]
    assert pocket.emojis_only(names["adapted"])
    assert not pocket.emojis_only(names["base"])


def check_ecosystem(names):
    assert len(names["outputs"]) == len(names["prompts"])
    assert names["lm"].batch_size == 8
    assert names["served"].reach.describe().startswith("Each step leaves out ")


CHECKS = {
    "concepts.md": check_concepts,
    "ecosystem.md": check_ecosystem,
    "from-pyreft.md": check_migration,
    "server.md": check_server,
    "steering.md": check_steering,
}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing.* is deprecated:FutureWarning")  # TRL's
@pytest.mark.parametrize("page", [page for page in PAGES if all_blocks(page)], ids=lambda page: page.name)
def test_snippets_run_in_order(page, tmp_path, monkeypatch):
    """Those of every page; what they lead to, where a page has a check."""
    if page.name == "serving.md":
        pytest.importorskip("vllm", reason="the page serves with vLLM, which is not installed here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYREFT_STORE", str(tmp_path / "store"))
    CHECKS.get(page.name, lambda names: None)(run_snippets(page))


def links(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"\[([^]]+)\]\(([^)]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_exists(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    for text, target in links(page):
        if target.startswith("https://"):
            continue
        if target.startswith("#"):
            assert target in anchors
            continue
        file = page.parent / target.split("#")[0]
        assert file.is_file(), target
        if "/tests/" in target:
            assert re.search(rf"^def {text.strip('`')}\(", file.read_text(encoding="utf-8"), flags=re.M), text


NAMED = re.compile(r"`((?:pyreft\.)?[a-z_]+(?:\.\w+)+)`|(src/pyreft\w*/[\w/.]+)")
ROOMS = {path.stem for path in SOURCE.iterdir() if path.suffix in ("", ".py") and not path.stem.startswith("_")}


def is_there(name):
    """Whether a dotted name is that of a module or of something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("file", [*WRITTEN, *SOURCE.rglob("*.py")], ids=lambda file: "/".join(file.parts[-2:]))
def test_what_is_named_in_backquotes_is_there(file):
    """Modules of the package and what they hold, and files of the source; a page says `pyreft.` before a module."""
    for name, path in NAMED.findall(file.read_text(encoding="utf-8")):
        if path:
            assert (ROOT / path.rstrip(".")).exists(), path
        elif name.startswith("pyreft."):
            assert is_there(name), name
        elif file.suffix == ".py" and name.split(".")[0] in ROOMS and not name.endswith((".html", ".json")):
            assert is_there(f"pyreft.{name}"), name


def test_every_ask_has_its_row():
    """Numbered from 1 to 25; with threads, and with a test or a plain "not yet"."""
    rows = [line for line in MIGRATION.read_text(encoding="utf-8").splitlines() if re.match(r"\| \d+ \|", line)]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    assert [int(number) for number, *_ in cells] == list(range(1, 26))
    for _, _, threads, holds, tests in cells:
        assert re.fullmatch(r"(\[[\w -]+\]\(https://github\.com/[\w/-]+/issues/\d+\)(, )?)+", threads)
        assert "../tests/" in tests or "**not yet**" in holds
