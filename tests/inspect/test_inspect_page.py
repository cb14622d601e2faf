"""Pictures, page and command of an inspection."""

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from typer.testing import CliRunner

import pyreft
from pyreft import pocket
from pyreft.inspect import (
    Comparison,
    EditSizes,
    StrengthCurve,
    compare_edits,
    edit_sizes,
    record_edits,
    text_rows,
    written_directions,
)
from pyreft.inspect.plots import (
    plot_comparison,
    plot_directions,
    plot_sizes,
    plot_strengths,
    readable,
    shown_columns,
)
from pyreft_cli.app import app

PNG = b"\x89PNG\r\n"


def adapter(seed, **settings):
    """An adapter whose edits are large, without training."""
    torch.manual_seed(seed)
    model, tokenizer = pocket.load()
    config = pyreft.ReftConfig(
        **{"intervention": "loreft", "layers": [1, 2], "positions": "l3", "low_rank_dimension": 2} | settings
    )
    return pyreft.get_reft_model(model, config).eval(), tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two adapters on disk."""
    directories = []
    for seed, settings in enumerate(({}, {"layers": [2, 3], "intervention": "nodireft"})):
        directories.append(tmp_path_factory.mktemp("saved") / f"number {seed}")
        adapter(seed, **settings)[0].save(directories[-1])
    return directories


@pytest.fixture(autouse=True)
def complete():
    """Every glyph of a picture can be drawn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph", UserWarning)
        yield


def labels(axes, which):
    return [text.get_text() for text in getattr(axes, f"get_{which}ticklabels")()]


def drawn(axes):
    axes.figure.canvas.draw()
    return axes


def test_a_heat_map_shows_the_numbers_by_token_and_layer():
    model, tokenizer = adapter(0)
    sizes = edit_sizes(record_edits(model, text_rows(tokenizer, ["Is a 🐳 worth $5 or $6?"])), tokenizer)
    for relative, title, unit in (
        (False, "Size of the edit", "‖h′ − h‖"),
        (True, "Edit relative to the state", "‖h′ − h‖ / ‖h‖"),
    ):
        axes = drawn(plot_sizes(sizes, relative=relative))
        table = torch.tensor(axes.images[0].get_array().filled(torch.nan).tolist())
        torch.testing.assert_close(table, sizes.relative if relative else sizes.size, equal_nan=True)
        assert axes.get_title("left") == title
        assert axes.figure.axes[1].get_ylabel() == unit  # of the colour bar
        assert labels(axes, "y") == ["layer 1", "layer 2"]
        assert len(labels(axes, "x")) == len(sizes.labels)
        assert {"<|user|>", "·a", r"\$", "U+1F433"} <= set(labels(axes, "x"))
        assert len(axes.texts) == 6  # a number in every cell with an edit


def test_long_texts_are_cut_to_what_is_edited():
    def sizes(edited, count):
        table = torch.full((1, count), torch.nan)
        table[0, edited] = 1.0
        return EditSizes([], ["x"] * count, table, table)

    assert shown_columns(sizes([0, 1], 20)) == list(range(20))
    assert shown_columns(sizes([0, 1, 97, 99], 100)) == [0, 1, None, 97, 98, 99]
    many = shown_columns(sizes(list(range(100)), 100))
    assert many == [*range(24), None, *range(76, 100)]


def test_labels_that_a_font_can_draw():
    assert readable(" a\n\tb") == "·a⏎⇥b"
    assert readable("cost$") == r"cost\$"
    assert readable("🐳") == "U+1F433"
    assert readable("abcdefghijklmnop") == "abcdefghijklm…"


def test_directions_strengths_and_comparison_are_drawn():
    (first, tokenizer), (second, _) = adapter(0), adapter(1)
    rows = text_rows(tokenizer, ["What is a whale?", "Where is a castle?"])
    records = [record_edits(model, rows) for model in (first, second)]
    written = written_directions(first, tokenizer, records[0])
    axes = drawn(plot_directions(written))
    shares = [bar.get_width() for bar in axes.patches]
    assert shares == pytest.approx([d.share for place in written for d in place.directions])
    compared = compare_edits(*records)
    axes = drawn(plot_comparison(compared))
    expected = [value for entry in compared.places for value in (entry.overlap, entry.cosine)]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected)
    curve = StrengthCurve("given answers", [0, 1, 2], [3.0, 1.0, 2.0])
    axes = drawn(plot_strengths([curve]))
    assert axes.lines[0].get_xydata().tolist() == [[0, 3], [1, 1], [2, 2]]
    assert axes.get_ylabel() == "loss, nats per token"
    with pytest.raises(pyreft.ReftError, match="edit no place in common"):
        plot_comparison(Comparison([], [], []))


def test_pictures_can_share_a_figure():
    from matplotlib.figure import Figure

    model, tokenizer = adapter(0)
    recorded = record_edits(model, text_rows(tokenizer, ["What is a whale?"]))
    four = Figure(layout="constrained").subplots(2, 2).flat
    assert plot_sizes(edit_sizes(recorded, tokenizer), axes=four[0]) is four[0]
    assert plot_directions(written_directions(model, tokenizer, recorded), axes=four[1]) is four[1]
    assert plot_strengths([StrengthCurve("a", [0, 1], [2.0, 1.0])], axes=four[2]) is four[2]
    assert plot_comparison(compare_edits(recorded, recorded), axes=four[3]) is four[3]
    four[0].figure.canvas.draw()


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments, status=0):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def test_the_command_writes_a_page_that_stands_alone(saved, tmp_path):
    text = "Is <b>1 & 2</b> for $3 a 🐳?"
    arguments = ("--text", text, "--text", "What is a cat?", "--compare", saved[1], "--strengths", "0;1")
    printed = run(saved[0], *arguments, "--max-new-tokens", 8, "--output", tmp_path / "out").stdout
    for words in (
        r"layer 1: edits of \d+\.\d\d on average, \d+ % of the state; 2 directions carry 99 %, the first towards \S+",
        r"loss on the base model's answer: lowest, \d+\.\d{3}, at strength 0",
        r"layer 2 beside .*: overlap 0\.\d\d \(by chance 0\.01\), cosine of the edits -?0\.\d\d",
        r"Places that only one of them edits: 1 and 1\.",
    ):
        assert re.search(words, printed), printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {f"inspect-{name}.png" for name in ("sizes-1", "sizes-2", "sizes-mean", "directions", "strength")}
    assert names == {"inspect.html", "inspect-comparison.png", *pictures}
    assert all((tmp_path / "out" / name).read_bytes().startswith(PNG) for name in names if name.endswith("png"))
    page = (tmp_path / "out" / "inspect.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == page.count("<img ") == 6
    assert not re.search(r"https?:|<script|<link|url\(", page)
    assert "&lt;b&gt;1 &amp; 2&lt;/b&gt; for $3 a 🐳?" in page
    assert "<title>number 0, inspected</title>" in page
    (tmp_path / "out" / "inspect-own.png").write_bytes(PNG)
    run(saved[0], "--text", "a", "--strengths", "1", "--max-new-tokens", 2, "--output", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    own = {"inspect.html", "inspect-sizes-1.png", "inspect-directions.png", "inspect-strength.png"}
    assert names == {"inspect-own.png", *own}


def test_the_command_prints_json_and_nothing_else(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # the numbers do without
    (tmp_path / "two.txt").write_text("What is a cat?\nWhat is a dog?\nWhat is a cow?\n")
    arguments = ("--data", "two.txt", "--limit", 2, "--strengths", "0,1", "--max-new-tokens", 4, "--json")
    found = json.loads(run(saved[0], *arguments).stdout)
    assert len(found["prompts"]) == 2
    assert [curve["answers"] for curve in found["curves"]] == ["the base model's answer", "the adapter's answer"]
    assert [len(answers) for answers in found["answers"]["answers"]] == [2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["two.txt"]
    with pytest.raises(pyreft.ReftError, match=r'matplotlib, which is not installed: pip install "pyreft\[plot\]"'):
        run(saved[0], "--text", "a")
    with pytest.raises(pyreft.ReftError, match="found no adapter_config"):  # what else is wrong goes first
        run(tmp_path, "--text", "a")
    with pytest.raises(pyreft.ReftError, match=r"none.txt: there is no such file"):
        run(saved[0], "--data", "none.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a --text or a --data file"),
        (("--text", "a", "--data", "b.txt"), "not both"),
        (("--text", "a", "--strengths", "strong"), "expected numbers such as '0;0.5;1', got 'strong'"),
        (("--text", "a", "--strengths", "0;nan"), "expected numbers such as '0;0.5;1', got '0;nan'"),
        (("--text", "a", "--output", "file"), "file is a file, not a directory"),
    ],
)
def test_mistakes_in_the_options(saved, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    printed = re.sub(r"[\s│]+", " ", run(saved[0], *arguments, status=2).stderr)
    assert message in printed


def test_quiet_prints_nothing(saved, tmp_path):
    line = [sys.executable, "-m", "pyreft_cli", "inspect", saved[0], "--text", "What is a cat?", "--quiet"]
    options = ["--strengths", "1", "--max-new-tokens", "2"]
    done = subprocess.run([*line, *options], cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (tmp_path / "pyreft-inspect" / "inspect.html").exists()
