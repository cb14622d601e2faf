"""The documentation as a site: it builds without a warning or a network, and has every public name."""

import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

import pyreft

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api"
# what a user has no reason to import: how edits are hung on a model, files written, and old programs served
INSIDE = {"errors", "files", "model", "original", "places", "sharded", "steering", "training", "tuner"}
BUILD = """
import socket

def refuse(*_):
    raise OSError("the build wants a network")

socket.socket.connect = refuse
from mkdocs.__main__ import cli
cli()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning fails the build."""
    directory = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-c", BUILD, "build", "--strict", "--site-dir", str(directory)]
    done = subprocess.run(
        line, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return directory


class Page(HTMLParser):
    """The links and anchors of a page, and what it fetches to be shown."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.fetched = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.fetched.append(values["href"])
        elif values.get("src"):
            self.fetched.append(values["src"])


def test_every_link_leads_somewhere_and_nothing_is_fetched(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) >= 18
    for path, page in pages.items():
        assert not [source for source in page.fetched if re.match(r"(https?:)?//", source)], path
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"(https?|mailto):", target):
                assert not re.search(r"localhost|//[^/]*\.local", target)
                continue
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), (path, link)
            if anchor and file in pages:
                assert anchor in pages[file].anchors | {"__comments"}, (path, link)


def test_pages_from_outside_of_docs_are_there(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="benchmarks/"' in home
    assert 'href="from-pyreft/"' in home
    assert "Keeping R orthonormal" in (site / "benchmarks" / "index.html").read_text(encoding="utf-8")
    migration = (site / "from-pyreft" / "index.html").read_text(encoding="utf-8")
    assert "test_logits_loss_and_gradients" in migration
    assert "../tests/" not in migration  # files that are no pages are named, not linked, while there is no repo_url


@pytest.mark.parametrize(
    ("here", "link", "expected"),
    [
        ("guide.md", "[a](architectures.md#x)", "[a](architectures.md#x)"),
        ("guide.md", "[a](../README.md#b)", "[a](index.md#b)"),
        ("index.md", "[`a`](docs/guide.md)", "[`a`](guide.md)"),
        ("api/index.md", "[a](../../benchmarks/RESULTS.md)", "[a](../benchmarks.md)"),
        ("guide.md", "[`f`](../tests/conftest.py)", "[`f`](https://host/name/blob/main/tests/conftest.py)"),
        ("guide.md", "[a](https://host/b) [c](#d)", "[a](https://host/b) [c](#d)"),
        ("guide.md", "[a](none.md)", "[a](none.md)"),
        ("guide.md", "`x[a](../README.md)`", "`x[a](../README.md)`"),
    ],
)
def test_links_are_rewritten_for_the_site(here, link, expected):
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "tools" / "site.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    pages = {"guide.md", "architectures.md", *hooks.OUTSIDE.values()}
    files = SimpleNamespace(get_file_from_path=lambda path: path if path in pages else None)
    page, config = SimpleNamespace(file=SimpleNamespace(src_uri=here)), SimpleNamespace(repo_url="https://host/name/")
    assert hooks.on_page_markdown(link, page, config, files) == expected


def documented(site):
    """The names in the inventory that other sites would link to."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return set(re.findall(r"^(\S+) py:", zlib.decompress(packed).decode(), flags=re.M))


def listed():
    """What the pages show: names of the package, modules, and names of modules."""
    return [name for page in API.glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)]


def modules():
    """The modules that the pages show: what a user imports from, beside the package."""
    return [name for name in listed() if inspect.ismodule(pkgutil.resolve_name(name))]


def public(module):
    """The public names of a module: those in `__all__`, or what it defines."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None) or [
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module
    ]
    return [f"{module}.{name}" for name in names]


def test_the_pages_show_what_users_import_and_nothing_of_the_inside():
    shown = listed()
    assert len(set(shown)) == len(shown)
    assert not [name for name in shown if name.split(".")[1] in INSIDE]
    serving = [f"pyreft.serving.{name}" for name in ("api.listening", "catalog", "rollouts", "vllm.flags")]
    every = ["pyreft", "pyreft.config", *serving, *modules()]
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for module in re.findall(r"^ *from (pyreft[\w.]*) import", page.read_text(encoding="utf-8"), flags=re.M):
            assert module in every, page.name


def test_every_public_name_is_documented(site):
    found = documented(site)
    names = [name for module in modules() for name in public(module)]
    names += [f"pyreft.{name}" for name in pyreft.__all__ if name != "TaskType"]  # PEFT's
    assert not [name for name in names if name not in found], "a name without a docstring"
    assert len(set(names)) > 100
    assert {"pyreft.inspect.plots.plot_sizes", "pyreft.ReftModel.generate"} <= found


def test_every_name_of_the_package_is_on_the_page_of_public_names(site):
    page = (API / "index.md").read_text(encoding="utf-8")
    found = documented(site)
    for name in pyreft.__all__:
        assert f"`{name}`" in page, name
        link = re.search(rf"\[`{name}`\]\[([\w.]+)\]", page)
        if name != "TaskType":
            assert link, name
            assert link[1] in found, name
            assert getattr(importlib.import_module(link[1].rpartition(".")[0]), name) is getattr(pyreft, name)


def test_every_page_is_in_the_navigation(site):
    page = Page(site / "index.html")
    for path in (ROOT / "docs").rglob("*.md"):
        place = path.relative_to(ROOT / "docs").with_suffix("").as_posix().removesuffix("index").rstrip("/")
        assert f"{place}/" in page.links, place
