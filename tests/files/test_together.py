"""A save that is killed at any moment leaves the old files or the new ones, for every reader."""

import multiprocessing
import os
import re
import shutil

import pytest
import torch
from peft import PeftModel

import pyreft
from conftest import shaken, tiny_llama
from killing import kills
from pyreft.files.together import leave_out, reading, save_together

IDS = torch.tensor([[5, 6, 7, 8, 9]])


NAMES = ("a.txt", "sub/b.txt", "adapter_config.json")
TOP = {"a.txt", "sub", "adapter_config.json"}


def write(number, names=NAMES):
    def fill(directory):
        for name in names:
            path = os.path.join(directory, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(f"{number} of {name}")

    return fill


def read(directory):
    """Which save the files of a directory are of, as a reader that holds it finds them."""
    with reading(directory) as place:
        paths = [path.relative_to(place) for path in place.rglob("*") if path.is_file() and path.name != "mine"]
        found = {(place / path).read_text().split()[0] for path in paths if not path.parts[0].startswith(".saving")}
    assert len(found) <= 1
    return found.pop() if found else None


def test_other_files_stay_and_those_that_are_said_to_go_go(tmp_path):
    (tmp_path / "mine").write_text("note")
    save_together(tmp_path, write("old", (*NAMES, "picture.png")))

    def newer(directory):
        write("new")(directory)
        leave_out(directory, "picture.png", "a.txt", "none")

    save_together(tmp_path, newer)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", *TOP}
    assert (tmp_path / "mine").read_text() == "note"
    assert read(tmp_path) == "new"


@pytest.mark.parametrize("before", [None, "old"])
def test_killed_at_any_moment_it_is_old_or_new(tmp_path, before):
    seen = []
    template = tmp_path / "template"
    if before:
        save_together(template, write(before))
    target = tmp_path / "target"

    def save():
        save_together(target, lambda staged: (write("new")(staged), leave_out(staged, "gone.txt")))

    def renew():
        shutil.rmtree(target, ignore_errors=True)
        if before:
            shutil.copytree(template, target)
            (target / "gone.txt").write_text("old gone")

    renew()
    for _ in kills(save):
        seen.append(read(target))
        if seen[-1] == "new":
            assert {path.name for path in target.iterdir()} == TOP
        renew()
    assert seen == sorted(seen, key=lambda found: found == "new")  # once it is made, it is made
    assert set(seen) == {before, "new"}
    assert read(target) == "new"


def test_killed_while_what_was_cut_off_is_put_in_place(tmp_path):
    cut = []
    target, kept = tmp_path / "target", tmp_path / "kept"
    save_together(target, write("old"))
    for _ in kills(lambda: save_together(target, write("new"))):
        if (target / ".saved").is_dir():
            cut.append(shutil.copytree(target, kept / str(len(cut))))
            break
    for _ in kills(lambda: read(target)):
        again = shutil.copytree(target, tmp_path / "again")
        assert read(again) == "new"
        shutil.rmtree(again)
        shutil.rmtree(target)
        shutil.copytree(cut[0], target)
    assert read(target) == "new"


def test_what_a_killed_save_leaves_is_removed_by_the_next(tmp_path):
    save_together(tmp_path, write("old"))
    for _ in kills(lambda: save_together(tmp_path, write("new"))):
        pass
    assert {path.name for path in tmp_path.iterdir()} == TOP


def test_a_save_that_fails_leaves_nothing(tmp_path):
    def fail(directory):
        write("new")(directory)
        raise OSError("no space")

    save_together(tmp_path / "old", write("old"))
    for target in (tmp_path / "old", tmp_path / "some" / "new"):
        with pytest.raises(OSError, match="no space"):
            save_together(target, fail)
    assert read(tmp_path / "old") == "old"
    assert {path.name for path in (tmp_path / "old").iterdir()} == TOP
    assert not (tmp_path / "some" / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(pyreft.ReftError, match="expected a directory to save in, this is a file"):
        save_together(tmp_path / "file", fail)


def save_often(target, name):
    for number in range(60):
        save_together(target, write(f"{name}{number}"))


def test_two_processes_save_to_one_directory_and_a_third_reads(tmp_path):
    target = tmp_path / "target"
    save_together(target, write("first"))
    savers = [multiprocessing.get_context("fork").Process(target=save_often, args=(target, n)) for n in "xy"]
    for saver in savers:
        saver.start()
    seen = set()
    while any(saver.is_alive() for saver in savers):
        seen.add(read(target))
    for saver in savers:
        saver.join()
        assert saver.exitcode == 0
    assert None not in seen
    assert len(seen) > 10
    assert read(target) in ("x59", "y59")
    assert {path.name for path in target.iterdir()} == TOP


def test_a_save_under_way_is_neither_removed_nor_waited_for(tmp_path):
    target = tmp_path / "target"
    begun, go_on = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def slow(directory):
        write("slow")(directory)
        begun.set()
        assert go_on.wait(60)

    other = multiprocessing.get_context("fork").Process(target=save_together, args=(target, slow))
    other.start()
    assert begun.wait(60)
    assert read(target) is None
    save_together(target, write("quick"))
    assert read(target) == "quick"
    assert len([path for path in target.iterdir() if path.name.startswith(".saving")]) == 1
    go_on.set()
    other.join()
    assert other.exitcode == 0
    assert read(target) == "slow"
    assert {path.name for path in target.iterdir()} == TOP


def test_a_save_waits_for_a_reader(tmp_path):
    save_together(tmp_path, write("old"))
    other = multiprocessing.get_context("fork").Process(target=save_together, args=(tmp_path, write("new")))
    with reading(tmp_path) as place:
        first = (place / "a.txt").read_text()
        other.start()
        other.join(1)
        assert other.is_alive()
        assert first == (place / "a.txt").read_text() == "old of a.txt"
    other.join()
    assert read(tmp_path) == "new"


def test_savers_that_fail_take_back_a_directory_for_which_others_wait(tmp_path):
    """Each makes it again, and no error is told but its own."""
    target = tmp_path / "target"

    def fail(directory):
        raise OSError("no space")

    def fail_often():
        for _ in range(300):
            with pytest.raises(OSError, match="no space"):
                save_together(target, fail)

    others = [multiprocessing.get_context("fork").Process(target=fail_often) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0, 0]
    assert not target.exists() or not list(target.iterdir())


def test_what_cannot_be_put_in_place_is_told(tmp_path, monkeypatch):
    (tmp_path / ".saved" / "sub").mkdir(parents=True)
    (tmp_path / ".saved" / "sub" / "b.txt").write_text("new")
    (tmp_path / "sub").write_text("a file of the user's")
    with pytest.raises(pyreft.ReftError, match=r"a save was cut off here when its files were complete, in .saved"):
        read(tmp_path)


# -- adapters -----------------------------------------------------------------------------------------------------


def adapted(positions, seed):
    """A model with two adapters and a trained head."""
    config = {"intervention": "loreft", "layers": [1], "positions": positions, "low_rank_dimension": 2}
    model = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**config))
    model.add_adapter("second", pyreft.ReftConfig(**config))
    model.get_base_model().lm_head.weight.requires_grad_(True)
    torch.manual_seed(seed)
    shaken(model)
    with torch.no_grad():
        model.get_base_model().lm_head.weight.add_(seed)
    return model


def by_ours(directory):
    return pyreft.ReftModel.load(directory, tiny_llama())


def by_ours_again(directory):
    model = pyreft.get_reft_model(tiny_llama(), by_ours(directory).peft_config["default"])
    model.load_intervention(directory)
    return model.eval()


def by_peft(directory):
    return PeftModel.from_pretrained(tiny_llama(), directory).eval()


def by_transformers(directory):
    model = tiny_llama()
    model.load_adapter(str(directory))
    return model.eval()


def test_an_adapter_is_old_or_new_for_every_reader(tmp_path):
    models = {"old": adapted("l4", 1), "new": adapted("f2+l2", 2)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    logits = {name: [by_ours(tmp_path / name / sub)(IDS).logits for sub in (".", "second")] for name in ("old", "new")}
    files = {path.name for path in (tmp_path / "old").iterdir()}
    target = tmp_path / "target"
    shutil.copytree(tmp_path / "old", target)
    seen = set()
    for _ in kills(lambda: models["new"].save_pretrained(target)):
        for reader in (by_transformers, by_peft):  # on copies: they must not find what ours put in place
            copy = shutil.copytree(target, tmp_path / "copy")
            for sub in (".", "second"):
                try:
                    found = reader(copy / sub)(IDS).logits
                except (ValueError, OSError) as error:
                    key = (
                        "none"
                        if re.search("Can't find 'adapter_config|adapter model file not found", str(error))
                        else error
                    )
                else:
                    (key,) = (name for name in logits if torch.equal(found, logits[name][sub == "second"]))
                seen.add((reader, key))
            shutil.rmtree(copy)
        found = [by_ours(target / sub)(IDS).logits for sub in (".", "second")]
        (key,) = (name for name in logits if all(map(torch.equal, found, logits[name])))
        assert torch.equal(by_ours_again(target)(IDS).logits, found[0])
        seen.add(key)
        assert {path.name for path in target.iterdir() if not path.name.startswith(".saving")} == files
        shutil.rmtree(target)
        shutil.copytree(tmp_path / "old", target)
    assert set(seen) == {
        "old",
        "new",
        *((reader, key) for reader in (by_transformers, by_peft) for key in ("old", "new", "none")),
    }
