"""Adapters at a URL: what is listed, what is seen of changes, and what is said of a place that cannot be reached."""

import shutil

import fsspec
import pytest

from pyreft.errors import ReftError
from pyreft.serving.catalog import Catalog, Store
from pyreft.serving.sources import Bucket, find_source
from served import save


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("one", "two")):
        save(root / name, seed=seed)
    return root


@pytest.fixture(params=["file", "memory"])
def url(request, made, tmp_path):
    """Adapters behind fsspec, on the disk and in memory."""
    if request.param == "file":
        shutil.copytree(made, tmp_path / "bucket")
        return f"file://{tmp_path}/bucket"
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    fs.put(str(made), "/bucket", recursive=True)
    return "memory://bucket"


@pytest.fixture
def catalog(url, tmp_path):
    return Catalog(url, Store(tmp_path / "store"), seconds=0)


def put(url, path, data):
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
    fs.pipe(f"{root}/{path}", data)


def upload(source, url, name):
    for path in source.iterdir():
        if path.is_file():
            put(url, f"{name}/{path.name}", path.read_bytes())


def test_folders_at_a_url_are_adapters(catalog, url, made):
    for path in ("notes/readme.txt", "one/checkpoints/adapter_config.json", "adapter_config.json"):
        put(url, path, b"{}")
    assert catalog.names() == ["one", "two"]
    assert catalog.resolve("one").digest == Store(made / "store").add(made / "one").digest
    assert catalog.resolve("one").directory.parent == catalog.store.root  # a copy, by its digest
    shutil.rmtree(made / "store")


def test_a_list_of_what_is_there_fetches_nothing(catalog):
    assert [catalog.peek(name) for name in catalog.names()] == [None, None]
    known = catalog.resolve("one")
    assert [catalog.peek(name) for name in catalog.names()] == [known, None]
    assert [path.name for path in catalog.store.root.iterdir()] == [known.digest]
    with pytest.raises(KeyError):
        catalog.peek("nobody")


@pytest.mark.parametrize(
    "name", ["..", "../bucket/one", "one/", "", "one/../two", "/bucket/one", "memory://bucket/one"]
)
def test_a_name_is_no_path_there_either(catalog, name):
    with pytest.raises(KeyError):
        catalog.resolve(name)


def test_changes_are_seen(catalog, url, made, tmp_path):
    old = catalog.resolve("one").digest
    assert catalog.resolve("one").digest == old
    upload(save(tmp_path / "other", seed=7), url, "one")
    new = catalog.resolve("one").digest
    assert new not in (old, catalog.resolve("two").digest)
    upload(made / "two", url, "three")
    assert catalog.resolve("three").digest == catalog.resolve("two").digest
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm(f"{root}/one", recursive=True)
    assert catalog.names() == ["three", "two"]
    with pytest.raises(KeyError):
        catalog.resolve("one")


def test_what_is_no_adapter_is_refused_when_it_is_asked_for(catalog, url):
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm(f"{root}/one/adapter_model.safetensors")
    with pytest.raises(ReftError, match=r"bucket/one: expected adapter_config.json and adapter_model.safetensors"):
        catalog.resolve("one")
    fs.pipe(f"{root}/two/adapter_model.safetensors", b"short")
    with pytest.raises(ReftError, match=r"two/?.*damaged"):
        catalog.resolve("two")


def test_while_a_place_cannot_be_reached_what_is_known_is_served(catalog, url, monkeypatch, caplog):
    known = catalog.resolve("one")

    def gone(*_, **__):
        raise ConnectionError("no network")

    for name in ("find", "info", "cat_file"):
        monkeypatch.setattr(catalog.source.fs, name, gone)
    assert catalog.names() == ["one", "two"]
    assert catalog.resolve("one") is known
    assert "could not be listed; the last list stays: no network" in caplog.text
    with pytest.raises(OSError, match="two cannot be reached: no network"):
        catalog.resolve("two")
    monkeypatch.undo()
    assert catalog.resolve("two").digest != known.digest  # that it could not be reached is not remembered


def test_a_place_that_is_none_is_told_at_the_start(tmp_path):
    for url, text in {
        f"file://{tmp_path}/none": "expected a place with a folder for each adapter",
        "memory://nothing-here": "expected a place with a folder for each adapter",
        "nowhere://bucket": "cannot be reached: Protocol not known: nowhere",
    }.items():
        with pytest.raises(ReftError, match=text):
            find_source(url)


def test_a_list_is_good_for_some_seconds(url):
    assert isinstance(find_source(url), Bucket)
    catalog = Catalog(url)
    assert catalog.names() == ["one", "two"]
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm(f"{root}/two", recursive=True)
    assert catalog.names() == ["one", "two"]
