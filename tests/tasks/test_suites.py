"""The data of the paper's suites: prompts, splits, the layouts that are read and what is said of others."""

import json

import datasets
import pytest

import suite_data
from pyreft.errors import ReftError
from pyreft.tasks import glue, hub
from pyreft.tasks.figures import paper_row, paper_rows
from pyreft.tasks.suites import ARITHMETIC, COMMONSENSE, GENERATED, INSTRUCT, SUITES


def test_commonsense_reads_as_in_the_paper(tmp_path):
    suite_data.commonsense(tmp_path)
    first = COMMONSENSE.examples(tmp_path, limit=5)[0]
    assert first.prompt == "Please choose the correct answer: 3?\n\nAnswer format: true/false\n"
    assert first.completion == "the correct answer is false"
    assert len(COMMONSENSE.examples(tmp_path)) == 8 * 21
    for task, choices in suite_data.CHOICES.items():
        questions = COMMONSENSE.questions(task, tmp_path)
        assert [question.answer for question in questions] == [choices[1]] * 3
        assert questions[0].prompt == questions[0].instruction + "\n"


def test_arithmetic_reads_as_in_the_paper(tmp_path):
    suite_data.arithmetic(tmp_path)
    (first,) = ARITHMETIC.examples(tmp_path, limit=1)
    assert first.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat is 0 + 1?\n\n### Response:\n"
    )
    assert first.completion == "The answer is 1."
    found = {task: [q.answer for q in ARITHMETIC.questions(task, tmp_path)] for task in ARITHMETIC.tasks}
    numbers = ["1.0", "2.0", "3.0"]
    assert found == {"AQuA": ["B"], "gsm8k": ["1", "2", "3"], "mawps": numbers, "SVAMP": numbers}


def test_instructions_read_as_in_the_paper(tmp_path):
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Say nothing.", "output": ""}]
    suite_data.write_json(tmp_path / "ultrafeedback" / "train.json", rows)
    with_input, without = INSTRUCT.examples(tmp_path)
    assert "### Input:\n1 and 2\n" in with_input.prompt
    assert "### Input" not in without.prompt
    assert without.completion == ""  # its end alone is learned
    suite_data.write_json(tmp_path / "alpaca_eval.json", [{"instruction": "Say b.", "dataset": "x"}])
    (question,) = INSTRUCT.questions("alpaca_eval", tmp_path)
    assert (question.answer, question.source) == ("", "x")


@pytest.mark.parametrize("task", glue.TASKS)
def test_glue_reads_its_published_columns(task, tmp_path):
    suite_data.glue(tmp_path, [task], train=6, validation=4)
    task = glue.TASKS[task]
    pairs = glue.read(task, "train", tmp_path)
    assert len(pairs) == 6
    assert len(glue.read(task, "validation", tmp_path)) == 4
    for number, pair in enumerate(pairs):
        label = number % max(task.outputs, 2)
        assert pair.label == (2.5 * label if task.labels is None else label)
        assert set(pair.sentences[0].split()) == {("oak", "cat", "whale")[label]}
        assert pair.sentences[1:] == (('a "dog',) if len(task.hub_columns) == 2 else ())


def test_a_part_of_the_validation_set_chooses_and_the_rest_is_scored():
    pairs = [glue.Pair("", (str(number),), 0) for number in range(9)]
    choosing, scored = glue.split_validation(pairs, 42)
    assert (len(choosing), len(scored)) == (4, 5)
    assert sorted(p.sentences for p in choosing + scored) == [p.sentences for p in pairs]
    assert glue.split_validation(pairs, 42) == (choosing, scored) != glue.split_validation(pairs, 43)
    choosing, scored = glue.split_validation(pairs * 600, 42)
    assert (len(choosing), len(scored)) == (1000, 4400)
    with pytest.raises(ReftError, match="1 example cannot be parted in two"):
        glue.split_validation(pairs[:1], 42)


def test_the_split_is_that_of_the_original_script():
    """Which calls `random_split` on the global generator, right after seeding it."""
    import torch

    torch.manual_seed(42)
    scored, choosing = torch.utils.data.random_split(range(277), [277 - 138, 138])
    pairs = [glue.Pair("", (), number) for number in range(277)]
    ours = glue.split_validation(pairs, 42)
    assert [[p.label for p in part] for part in ours] == [list(choosing), list(scored)]


ROW = {"instruction": "a", "output": "b", "answer": "c"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "commonsense_170k.json: the file has no rows"),
        (
            [ROW, {"instruction": "a", "answr": "b"}],
            "commonsense_170k.json, row 2: the field 'answer' is missing. Did you",
        ),
        ([ROW | {"instruction": 3}], "row 1: the field 'instruction' should be text, got int"),
        ([ROW | {"instruction": " "}], "row 1: the field 'instruction' should be text, got an empty text"),
        ([ROW | {"answer": ["a", "b"]}], "row 1: the field 'answer' should be a text or a number, got ['a', 'b']"),
        ([ROW | {"answer": None}], "row 1: the field 'answer' should be a text or a number, got None"),
        (["a"], "row 1: expected an object with fields, got str"),
        ({"a": 1}, "row 1: the field 'instruction' is missing"),
        ("[{", "this is not valid JSON (Expecting property name"),
    ],
)
def test_a_wrong_layout_is_told_with_its_place(tmp_path, content, message):
    path = tmp_path / "commonsense_170k.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ReftError) as caught:
        COMMONSENSE.examples(tmp_path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_data_is_told_with_where_to_get_it(tmp_path):
    with pytest.raises(
        ReftError, match=r"none is not a directory. Expected commonsense_170k.json in it; get it from http"
    ):
        COMMONSENSE.examples(tmp_path / "none")
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "tset.json").write_text("[]")
    expected = r"expected boolq/test.json or .* in .*; .*boolq holds tset.json. Get it from https://github.com/AGI-"
    with pytest.raises(ReftError, match=expected):
        COMMONSENSE.questions("boolq", tmp_path)
    with pytest.raises(ReftError, match=r"there is no .*RTE. Get it from https://gluebenchmark.com/tasks"):
        glue.read(glue.TASKS["rte"], "train", tmp_path)


def test_unknown_tasks_name_the_nearest():
    with pytest.raises(ReftError, match=r"got 'bolq'. Did you mean 'boolq'?"):
        COMMONSENSE.questions("bolq", ".")
    with pytest.raises(ReftError, match=r"GLUE has mnli, .*, got 'stb'. Did you mean 'stsb'?"):
        glue.find_task("stb")
    assert glue.find_task("SST-2").name == "sst2"


def test_gsm8k_needs_its_mark(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "a", "answer": "18"}\n')
    with pytest.raises(ReftError, match=r"test.jsonl, line 1: the field 'answer' should end in '#### ' and a number"):
        ARITHMETIC.questions("gsm8k", tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["index\tsentence1\tsentence2\tlabl"], "line 1: expected a column 'label', got index, sentence1,"),
        (["index\tsentence1\tsentence2\tlabel"], "the file has no rows"),
        (
            ["index\tsentence1\tsentence2\tlabel", "1\ta\tb"],
            "line 2: there is no column 'label'; the line has 3 columns",
        ),
        (
            ["index\tsentence1\tsentence2\tlabel", "1\ta\tb\tyes"],
            "line 2: the column 'label' should be entailment, not_",
        ),
    ],
)
def test_a_wrong_table_is_told_with_its_line(tmp_path, lines, message):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ReftError) as caught:
        glue.read(glue.TASKS["rte"], "train", tmp_path)
    assert message in str(caught.value)


def test_lines_that_were_cut_in_the_published_file_of_qqp_are_left_out(tmp_path):
    suite_data.glue(tmp_path, ["qqp"], train=3, validation=2)
    path = tmp_path / "QQP" / "train.tsv"
    path.write_text(path.read_text() + "4\tx\tx\tcut\n\n")
    assert len(glue.read(glue.TASKS["qqp"], "train", tmp_path)) == 3


def test_a_number_that_is_none_is_told(tmp_path):
    suite_data.glue(tmp_path, ["stsb"], train=1, validation=2)
    path = tmp_path / "STS-B" / "train.tsv"
    path.write_text(path.read_text().replace("\t0.0\n", "\tnan\n"))
    with pytest.raises(ReftError, match="line 2: the column 'score' should be a number, got 'nan'"):
        glue.read(glue.TASKS["stsb"], "train", tmp_path)


# -- the hub: its data sets look like this; that they answer is not tried here ----------------------------------------


@pytest.fixture
def published(monkeypatch):
    """The columns of the data sets on the hub, as their cards have them."""
    rows = {
        ("openai/gsm8k", "main", "test"): [{"question": "1 + 1,000?", "answer": "Add.\n#### 1,001"}],
        ("argilla/ultrafeedback-binarized-preferences-cleaned", None, "train"): [
            {
                "prompt": "a",
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "good"}],
                "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bad"}],
            }
        ],
        ("json", None, "train"): [{"instruction": "a", "output": "b", "generator": "g", "dataset": "helpful_base"}],
        ("nyu-mll/glue", "mnli", "validation_matched"): [{"premise": "p", "hypothesis": "h", "label": 2, "idx": 0}],
    }

    def load(path, name=None, split=None, **_):
        return datasets.Dataset.from_list(rows[path, name, split])

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_rows_of_the_hub(published):
    (question,) = ARITHMETIC.questions("gsm8k", None)
    assert (question.instruction, question.answer) == ("1 + 1,000?", "1001")
    (example,) = INSTRUCT.examples(None)
    assert example.completion == "good"
    (question,) = INSTRUCT.questions("alpaca_eval", None)
    assert question.source == "helpful_base"
    (pair,) = glue.read(glue.TASKS["mnli"], "validation", None)
    assert (pair.sentences, pair.label) == (("p", "h"), 2)


def test_what_the_hub_does_not_have_is_told():
    expected = "commonsense is not on the hub by a name; give a directory with commonsense_170k.json, from https://git"
    with pytest.raises(ReftError, match=expected):
        COMMONSENSE.examples(None)


def test_a_hub_that_does_not_answer_is_told(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    expected = (
        r"nyu-mll/glue could not be loaded from the hub \(Couldn't reach the hub\). Without a network, give a dir"
    )
    with pytest.raises(ReftError, match=expected):
        glue.read(glue.TASKS["rte"], "train", None)
    assert set(hub.SOURCES) <= {*GENERATED, *ARITHMETIC.tasks, *INSTRUCT.tasks}


# -- the figures of the paper ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_the_papers_averages_are_those_of_its_scores(suite):
    tasks = list(glue.TASKS if suite == "glue" else GENERATED[suite].tasks)
    rows = paper_rows(suite)
    assert {"LoReFT", "DiReFT", "LoRA"} <= {row.method for row in rows}
    for row in rows:
        assert list(row.scores) == tasks
        assert abs(sum(row.scores.values()) / len(row.scores) - row.average) < 0.06


@pytest.mark.parametrize(
    ("suite", "base", "method", "model", "average"),
    [
        ("commonsense", "huggyllama/llama-7b", "LoReFT", "LLaMA-7B", 80.2),
        ("commonsense", "/data/yahma-llama-13b-hf/", "DiReFT", "LLaMA-13B", 82.2),
        ("commonsense", "meta-llama/Llama-2-7b-hf", "LoRA", "Llama-2 7B", 77.6),
        ("commonsense", "meta-llama/Meta-Llama-3-8B", "LoReFT", "Llama-3 8B", 86.6),
        ("commonsense", "meta-llama/Llama-3.1-8B", "LoReFT", "LLaMA-7B", 80.2),  # not in the paper: its first row
        ("arithmetic", "pocket", "LoReFT", "LLaMA-7B", 42.6),
        ("instruct", "meta-llama/Llama-2-7b-hf", "DiReFT", "Llama-2 7B", 84.85),
        ("glue", "FacebookAI/roberta-large", "LoReFT", "RoBERTa large", 88.2),
        ("glue", "FacebookAI/xlm-roberta-base", "DiReFT", "RoBERTa base", 83.2),
    ],
)
def test_which_row_is_compared_with(suite, base, method, model, average):
    row = paper_row(suite, base, method)
    assert (row.model, row.average) == (model, average)
    assert paper_row(suite, base, None) is None
