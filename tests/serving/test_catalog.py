"""Names, copies by digest, and files that are replaced while they are served."""

import functools
import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from killing import kills
from pyreft.errors import ReftError
from pyreft.files.together import save_together
from pyreft.serving import catalog as catalog_module
from pyreft.serving.catalog import Catalog, Store
from served import save, save_all


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("made"))


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "adapters")


@pytest.fixture
def catalog(root, tmp_path):
    return Catalog(root, Store(tmp_path / "store"), seconds=0)


def test_names_are_the_folders_with_an_adapter(catalog, root):
    (root / "notes").mkdir()
    (root / "file").write_text("x")
    assert catalog.names() == ["all", "f3l3", "l16", "l4", "prompt"]
    assert catalog.resolve("l4").rules[0].last == 4


def test_a_folder_that_can_have_no_name_is_told(root, tmp_path, caplog):
    shutil.copytree(root / "l4", root / "my adapter")
    shutil.copytree(root / "l4", root / ".new-l4")
    assert "my adapter" not in Catalog(root, Store(tmp_path / "store")).names()
    assert caplog.messages == [f"'my adapter' cannot be the name of a model; rename this folder of {root}."]


def test_an_adapter_is_no_directory_of_adapters(root, tmp_path):
    with pytest.raises(ReftError, match="l4 is an adapter itself: expected the directory whose folders are the adap"):
        Catalog(root / "l4", Store(tmp_path / "store"))
    shutil.copytree(root / "l4", root, dirs_exist_ok=True)  # as PEFT saves a default beside others
    assert len(Catalog(root, Store(tmp_path / "store")).names()) == 5


@pytest.mark.parametrize(
    "name", ["..", "../adapters/l4", "l4/", "", ".", "l4/../l4", "nobody", "/etc", "a" * 5000, "鲸" * 100]
)
def test_a_name_is_never_a_path(catalog, name):
    with pytest.raises(KeyError):
        catalog.resolve(name)


def test_a_folder_that_has_gone_since_it_was_listed_has_no_name(root, tmp_path):
    catalog = Catalog(root, Store(tmp_path / "store"), seconds=60)
    catalog.resolve("l4")
    for name in ("l4", "l16"):
        shutil.rmtree(root / name)
        with pytest.raises(KeyError):
            catalog.resolve(name)


def test_a_tenant_that_is_read_keeps_no_other_waiting(catalog, monkeypatch):
    catalog.resolve("l4")
    begun, go_on, add = threading.Event(), threading.Event(), catalog.store.add

    def slow(path):
        begun.set()
        assert go_on.wait(30)
        return add(path)

    monkeypatch.setattr(catalog.store, "add", slow)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(catalog.resolve, "l16")
        assert begun.wait(30)
        assert pool.submit(catalog.resolve, "l4").result(30).rules[0].last == 4
        assert not reading.done()
        go_on.set()
        assert reading.result(30).rules[0].last == 16


def test_an_adapter_is_read_once_for_the_store(root, tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    made = store.add(root / "l4")
    assert made.directory == store.root / made.digest
    monkeypatch.setattr(catalog_module, "read_adapter", None)
    assert store.get(made.digest) is made
    assert made.edits().keys() == made.pattern.keys()


def test_replaced_weights_have_another_digest_and_the_old_copy_stays(catalog, root, tmp_path):
    old = catalog.resolve("l4")
    weights = (old.directory / "adapter_model.safetensors").read_bytes()
    assert catalog.resolve("l4") is old
    save(root / "l4", seed=9, positions="l4")
    new = catalog.resolve("l4")
    assert new.digest != old.digest
    assert (old.directory / "adapter_model.safetensors").read_bytes() == weights
    assert Store(tmp_path / "store").get(old.digest).digest == old.digest
    # written over in place, with the same size and time
    path = root / "l4" / "adapter_model.safetensors"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert catalog.resolve("l4").digest not in (old.digest, new.digest)


def test_an_adapter_whose_save_is_killed_is_served_as_the_old_or_the_new_one(root, made, tmp_path):
    store, kept = Store(tmp_path / "store"), root / "l4"
    digests = {rule: store.add(made / rule).digest for rule in ("l4", "l16")}
    saved = {path.name: path.read_bytes() for path in (made / "l16").iterdir()}

    def write(staged):
        for name, content in saved.items():
            (Path(staged) / name).write_bytes(content)

    seen = []
    for _ in kills(lambda: save_together(kept, write)):
        catalog = Catalog(root, store, seconds=0)
        assert "l4" in catalog.names()
        seen.append(catalog.resolve("l4").digest)
        shutil.rmtree(kept)
        shutil.copytree(made / "l4", kept)
    assert set(seen) == {digests["l4"], digests["l16"]}
    assert seen == sorted(seen, key=digests["l16"].__eq__)


def test_an_adapter_is_there_while_it_is_replaced(catalog, root, made):
    contents = [{path.name: path.read_bytes() for path in (made / rule).iterdir()} for rule in ("l4", "l16")]

    def write(number, staged):
        for name, content in contents[number % 2].items():
            (Path(staged) / name).write_bytes(content)

    def replace_often():
        for number in range(300):
            save_together(root / "l4", functools.partial(write, number))

    other = multiprocessing.get_context("fork").Process(target=replace_often)
    other.start()
    while other.is_alive():
        assert "l4" in catalog.names()
    other.join()
    assert other.exitcode == 0
    assert catalog.resolve("l4").digest == catalog.resolve("l16").digest


def test_folders_come_and_go(catalog, root):
    with pytest.raises(KeyError):
        catalog.resolve("new")
    shutil.copytree(root / "l4", root / "new")
    assert catalog.resolve("new").digest == catalog.resolve("l4").digest
    shutil.rmtree(root / "new")
    with pytest.raises(KeyError):
        catalog.resolve("new")


def test_loaded_and_unloaded(catalog, root, tmp_path):
    path = save(tmp_path / "elsewhere", seed=7)
    digest = catalog.load("tenant-7", path).digest
    assert catalog.resolve("tenant-7").digest == digest
    assert "tenant-7" in catalog.names()
    with pytest.raises(ReftError, match="'l4' is taken; unload it first"):
        catalog.load("l4", path)
    for name in ("../x", "a b", "", "a/b/c", "a..b"):
        with pytest.raises(ReftError, match="name: expected letters"):
            catalog.load(name, path)
    for name in ("tenant-7", "l4"):
        catalog.unload(name)
        with pytest.raises(KeyError):
            catalog.resolve(name)
        with pytest.raises(KeyError):
            catalog.unload(name)
    save(root / "l4", seed=8)  # whoever writes it anew means it
    assert catalog.resolve("l4")


def test_a_bad_adapter_is_refused_alone_and_has_no_copy(catalog, root, tmp_path):
    path = root / "l4" / "adapter_model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:100])
    with pytest.raises(ReftError, match=rf"{root}/l4.*damaged or was cut short"):
        catalog.resolve("l4")
    assert list((tmp_path / "store").iterdir()) == []
    assert catalog.resolve("l16")
    path.write_bytes(good)
    assert catalog.resolve("l4")


def test_the_engine_has_the_last_word(root, tmp_path):
    def check(adapter):
        if adapter.rank > 3:
            raise ReftError("a rank of 4, the slots have 3")

    with pytest.raises(ReftError, match="the slots have 3"):
        Catalog(root, Store(tmp_path / "store"), check).resolve("l4")


def test_pruning_leaves_what_was_asked_for(catalog, root, tmp_path):
    store = Store(tmp_path / "store")
    kept, gone = catalog.resolve("l4"), catalog.resolve("l16")
    old = gone.directory.stat().st_mtime - 100
    for adapter in (kept, gone):
        os.utime(adapter.directory, (old, old))
    catalog.resolve("l4")
    assert store.prune(50) == 1
    assert [path.name for path in store.root.iterdir()] == [kept.digest]
    assert catalog.resolve("l16").edits()  # copied again


def test_the_store_takes_digests_alone(tmp_path):
    for digest in ("../../etc", "l4", "a" * 63, "g" * 64):
        with pytest.raises(ReftError, match="expected the digest"):
            Store(tmp_path).get(digest)
    with pytest.raises(ReftError, match="no adapter aaaaaaaaaaaa in the store"):
        Store(tmp_path).get("a" * 64)


def test_a_directory_that_is_none(tmp_path):
    with pytest.raises(ReftError, match="expected a directory with a folder for each adapter"):
        Catalog(tmp_path / "none")
