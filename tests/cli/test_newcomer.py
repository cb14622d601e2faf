"""What a newcomer meets at the command line: typing errors, plain terminals, full disks, lines and completion."""

import errno
import os
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import pyreft
from commands import run
from pyreft.errors import is_disk_full
from pyreft_cli import app
from pyreft_cli.console import progress_bar
from pyreft_cli.lines import typed as lines_typed


def ended(monkeypatch, *words):
    """The status with which the command ends."""
    monkeypatch.setattr(sys, "argv", ["pyreft", *words])
    with pytest.raises(SystemExit) as end:
        app.main()
    return end.value.code


def python(code, *, text=None, **environment):
    """Run a program without the libraries that take seconds to load."""
    line = [sys.executable, "-c", code]
    return subprocess.run(line, env={**os.environ, **environment}, input=text, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trian",), "pyreft: No such command 'trian'. Did you mean 'train'?\nTry 'pyreft --help'."),
        (("train", "--sed", "1"), "pyreft: No such option: --sed"),
        (("train", "--seed", "x"), "pyreft: --seed: Input should be a valid integer"),
        (("train", "--positions", "last"), "pyreft: --positions: expected f<n>, l<n>, f<n>+l<m>, prompt or all"),
        (("train", "--epochs"), "pyreft: Option '--epochs' requires an argument."),
        (("eval", "."), "pyreft: --data / --suite / --tasks: expected one of the three.\nTry 'pyreft eval --help'."),
    ],
)
def test_every_error_is_told_in_one_style(monkeypatch, capsys, words, said):
    assert ended(monkeypatch, *words) == 2
    assert said.lower() in capsys.readouterr().err.lower()


def test_without_a_command_the_help_is_shown(monkeypatch, capsys):
    assert ended(monkeypatch) == 0
    assert "Commands:" in capsys.readouterr().out


def test_an_interrupt_is_told(monkeypatch, capsys):
    monkeypatch.setattr("pyreft_cli.info.hush", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ended(monkeypatch, "info", ".") == 130
    assert "pyreft: interrupted." in capsys.readouterr().err


def test_the_package_is_a_program():
    done = subprocess.run([sys.executable, "-m", "pyreft", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == pyreft.__version__


def test_a_terminal_without_emojis():
    code = """
import json
from pyreft_cli.console import console, print_json, speak_plainly
speak_plainly()
console.print("a 🐱")
print_json({"b": "🐱"})
"""
    done = python(code, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'a \\U0001f431\n{\n "b": "\\ud83d\\udc31"\n}\n'
    assert "a 🐱" in python(code, PYTHONIOENCODING="utf-8").stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_input_that_is_no_utf8_comes_as_halves_of_characters():
    code = "from pyreft_cli.console import speak_plainly; speak_plainly(); print(ascii(input()))"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, input=b"K\xe4\n", capture_output=True)
    assert done.stdout == b"'K\\udce4'\n", done.stderr


def test_an_output_that_the_shell_has_closed():
    code = "import sys; from pyreft_cli.app import main; sys.argv = ['pyreft', '--version']; main()"
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" >&-', sys.executable, code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_input_that_the_shell_has_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert list(lines_typed()) == []


def test_the_directory_of_the_user_is_found_behind_a_sign_and_in_a_file(tmp_path):
    code = """
import sys
from pyreft_cli import app, train
train.check_data = lambda settings: print(settings["output"], settings["data"]) or sys.exit()
for words in (["--output=~/a", "--data=b"], ["--config=~/c.yaml"]):
    sys.argv = ["pyreft", "train", *words]
    try:
        app.main()
    except SystemExit as end:
        assert not end.code
"""
    (tmp_path / "c.yaml").write_text("output: ~/d\ndata: ~/e\n")
    done = python(code, HOME=str(tmp_path))
    assert done.stdout == f"{tmp_path}/a b\n{tmp_path}/d {tmp_path}/e\n", done.stderr


def test_a_full_disk_behind_the_output():
    with open("/dev/full", "wb") as full:
        line = [sys.executable, "-m", "pyreft", "--help"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("pyreft: the disk is full.")


def test_a_full_disk_in_a_training(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "What is a cat?", "completion": "A pet."}\n')
    words = ("train", "--data", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--epochs", 1, "--layers", 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        result = run(*words, "--positions", "l1", status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "pyreft: the disk is full. There is no checkpoint yet." in result.stderr
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_disk_that_fills_while_a_model_is_downloaded(tmp_path, monkeypatch, capsys):
    def download(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyreft.loading.AutoConfig.from_pretrained", download)
    (tmp_path / "a.jsonl").write_text('{"prompt": "What is a cat?", "completion": "A pet."}\n')
    words = ("train", "--data", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--model", "some/base")
    assert ended(monkeypatch, *words) == 2
    assert "pyreft: the disk is full." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(27, "File too large"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(2, "No such file or directory"), False),
        (ValueError("full"), False),
    ],
)
def test_what_says_that_a_disk_is_full(error, full):
    assert is_disk_full(error) is full
    outer = KeyError("data set")
    outer.__cause__ = error
    assert is_disk_full(outer) is full


def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys):
    with progress_bar("Training", shown=True) as move:
        move(0, None)
        for step in range(21):
            move(step, 20, 1 / (step + 1))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert re.fullmatch(r"Training: 2 of 20 steps, loss 0\.333, \d:\d\d:\d\d gone, about \d:\d\d:\d\d left", lines[0])
    assert re.fullmatch(r"Training: 20 of 20 steps, loss 0\.048, \d:\d\d:\d\d gone", lines[-1])
    with progress_bar("Training", shown=False) as move:
        move(1, 1)
    assert not capsys.readouterr().err


LINES = "from pyreft_cli.lines import typed; print(list(typed()))"


def talk(keys, state):
    """What the program of lines prints when these keys are pressed at its terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", LINES], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True
    )
    os.close(theirs)
    shown = b""
    try:
        for key in (*keys, b"\x04"):
            shown = wait_for(ours, b"> ")
            os.write(ours, key)
        shown = wait_for(ours, b"]")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return shown.decode()


def wait_for(terminal, mark):
    shown = b""
    while mark not in shown:
        shown += os.read(terminal, 1024)
    return shown


def test_lines_are_edited_and_kept(tmp_path):
    pytest.importorskip("readline")
    assert "['a cat', 'a cot']" in talk([b"a cat\n", b"\x1b[A\x7f\x7fot\n"], tmp_path)  # up, and over two letters
    kept = tmp_path / "pyreft" / "chat_history"
    assert kept.read_text().splitlines()[-2:] == ["a cat", "a cot"]
    assert kept.stat().st_mode & 0o077 == 0
    assert "['a cot']" in talk([b"\x1b[A\n"], tmp_path)


def test_lines_of_a_file_are_read_as_they_are():
    assert python(LINES, text=" a \nb\n").stdout == "['a', 'b']\n"


@pytest.mark.parametrize(("typed", "offered"), [("tra", ["train"]), ("train --posi", ["--positions"])])
def test_a_shell_completes_commands_and_options(typed, offered):
    words = f"pyreft {typed}"
    count = str(len(words.split()) - 1)
    code = "import sys; sys.argv = ['pyreft']; from pyreft_cli.app import main; main()"
    done = python(code, _PYREFT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count)
    assert done.stdout.split() == offered, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "train --data a.jsonl --output o --method lorreft",
            "--method: expected loreft, direft, lora, got 'lorreft'. Did",
        ),
        ("train --data a.jsonl --output o --lr -1", "--lr: expected a number above 0, got -1.0."),
        (
            "plan --data a.jsonl --long-rows ct",
            "--long-rows: expected refuse, cut, skip, got 'ct'. Did you mean 'cut'?",
        ),
        (
            "tune --data a.jsonl --output o --validation-split 1",
            "--validation-split: expected a share from 0 to below 1",
        ),
        ("data a.jsonl --format chta", "--format: expected text, chat, alpaca, got 'chta'. Did you mean 'chat'?"),
        ("train --data b.jsonl --output o", "b.jsonl: there is no such file."),
        ("train --data a.jsonl --output o --validation b.jsonl", "b.jsonl: there is no such file."),
        ("generate --adapter no --prompt a", "no: expected an adapter's directory, there is nothing of this name."),
        ("info no", "no: expected an adapter's directory, there is nothing of this name."),
    ],
)
def test_what_is_wrong_is_told_before_the_libraries_load(monkeypatch, capsys, tmp_path, words, said):
    def load():
        raise AssertionError("the libraries would be loaded")

    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for module in ("ask", "data", "info", "plan", "train", "tune"):
        monkeypatch.setattr(f"pyreft_cli.{module}.hush", load)
    assert ended(monkeypatch, *words.split()) == 2
    assert f"pyreft: {said}" in capsys.readouterr().err
