"""Recipes: that they are the paper's settings, what wins over them, and what is refused."""

import pytest
import yaml
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, RobertaConfig

import suite_data
from pyreft.errors import ReftError
from pyreft.jobs.methods import attach, classifier_of, count, make_config
from pyreft.jobs.recipes import SHIPPED, decoding_of, read_recipe, recipe_jobs, shipped
from pyreft.jobs.settings import check_settings
from pyreft.tasks.figures import paper_rows


def jobs(name, **given):
    return recipe_jobs(name, given)


def test_the_four_suites_are_shipped():
    assert shipped() == ["arithmetic", "commonsense", "glue", "instruct"]
    for name in shipped():
        assert read_recipe(name) == read_recipe(SHIPPED / f"{name}.yaml")
        assert list(read_recipe(name)["methods"]) == ["loreft", "direft", "lora"]


@pytest.mark.parametrize(
    ("recipe", "method", "expected"),
    [
        (
            "commonsense",
            "loreft",
            {"positions": "f7+l7", "rank": 8, "epochs": 6, "lr": 9e-4, "warmup_ratio": 0.1, "share_weights": True},
        ),
        ("commonsense", "direft", {"epochs": 6, "dropout": 0.05, "weight_decay": 0.06, "warmup_ratio": 0}),
        ("commonsense", "lora", {"rank": 32, "alpha": 64, "lr": 3e-4, "epochs": 3}),
        ("arithmetic", "loreft", {"epochs": 12, "max_length": 512, "dtype": "bfloat16"}),
        ("arithmetic", "direft", {"epochs": 12, "weight_decay": 0.06}),
        ("instruct", "loreft", {"layers": "3;9;18;24", "rank": 4, "positions": "f5+l5", "share_weights": False}),
    ],
)
def test_settings_of_the_paper(recipe, method, expected):
    (job,) = jobs(recipe, method=method)
    assert {name: getattr(job, name) for name in expected} == expected
    assert job.batch_size * job.gradient_accumulation == {"instruct": 128}.get(recipe, 16 if method == "lora" else 32)
    assert (job.suite, job.method, job.output) == (recipe, method, f"{recipe}-{method}")


def published(layers, width, kind):
    """The shape of a published model, without weights."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        if kind == "llama":
            sizes = {"intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
            return AutoModelForCausalLM.from_config(
                LlamaConfig(hidden_size=width, num_hidden_layers=layers, **sizes), dtype="bfloat16"
            )
        config = RobertaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=4 * width,
            num_attention_heads=width // 64,
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
        )
        return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("method", ["loreft", "direft", "lora"])
@pytest.mark.parametrize("recipe", ["commonsense", "arithmetic", "instruct"])
def test_the_number_of_parameters_is_the_papers(recipe, method):
    """On the shape of LLaMA-7B, of which the paper's tables give the share."""
    title = {"loreft": "LoReFT", "direft": "DiReFT", "lora": "LoRA"}[method]
    row = next(row for row in paper_rows(recipe) if row.method == title and row.model in ("LLaMA-7B", "Llama-2 7B"))
    (job,) = jobs(recipe, method=method)
    model = published(32, 4096, "llama")
    total = model.num_parameters()
    share = 100 * count(attach(model, make_config(job), None)) / total
    assert share == pytest.approx(row.params, rel=0.01)


@pytest.mark.parametrize(("size", "layers", "width"), [("base", 12, 768), ("large", 24, 1024)])
@pytest.mark.parametrize("method", ["loreft", "direft", "lora"])
def test_the_number_of_parameters_on_glue_is_the_papers(method, size, layers, width, tmp_path):
    RobertaConfig(num_hidden_layers=layers).save_pretrained(tmp_path)
    (job,) = jobs("glue", method=method, task="rte", model=str(tmp_path))
    title = {"loreft": "LoReFT", "direft": "DiReFT", "lora": "LoRA"}[method]
    row = next(row for row in paper_rows("glue") if row.method == title and row.model == f"RoBERTa {size}")
    model = published(layers, width, "roberta")
    total, config = model.num_parameters(), make_config(job)
    config.modules_to_save = classifier_of(model)
    share = 100 * count(attach(model, config, None)) / total
    assert share == pytest.approx(row.params, rel=0.025)  # the paper's total is another by the classifier


def test_glue_differs_by_task_and_size(tmp_path):
    suite_data.tiny_roberta(tmp_path / "base")
    every = jobs("glue", model=str(tmp_path / "base"))
    assert [job.task for job in every] == ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]
    assert [job.positions for job in every] == ["f1", "f3", "f3", "f3", "f11", "f11", "f3", "f3"]
    assert [job.lr for job in every] == [6e-4, 6e-4, 3e-4, 4e-4, 9e-4, 6e-4, 9e-4, 6e-4]
    assert [job.epochs for job in every] == [40, 40, 40, 60, 20, 40, 60, 60]
    assert every[0].output == "glue-loreft/mnli"
    RobertaConfig(num_hidden_layers=24).save_pretrained(tmp_path / "large")
    large = jobs("glue", model=str(tmp_path / "large"))
    assert [job.epochs for job in large] == [20, 20, 30, 30, 20, 20, 30, 30]
    (direft,) = jobs("glue", model=str(tmp_path / "base"), method="direft", task="RTE", output="here")
    assert (direft.batch_size, direft.weight_decay, direft.output) == (8, 0.04, "here")
    (lora,) = jobs("glue", model=str(tmp_path / "large"), method="lora", task="cola")
    assert (lora.alpha, lora.batch_size, lora.lr) == (16, 4, 2e-4)


def test_what_is_given_wins(tmp_path):
    (job,) = jobs("commonsense", epochs=1, lr="1e-2", layers="3", output="here")
    assert (job.epochs, job.lr, job.layers, job.rank, job.output) == (1, 0.01, "3", 8, "here")
    recipe = {"suite": "commonsense", "methods": {"loreft": {"rank": 3, "layers": [1, 2]}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    (job,) = jobs(tmp_path / "mine.yaml")
    assert (job.rank, job.layers, job.epochs) == (3, "1;2", 10)


def test_decoding_is_the_papers():
    assert decoding_of("commonsense") == {"max_new_tokens": 32}
    assert decoding_of("arithmetic") == {
        "max_new_tokens": 512,
        "temperature": 0.3,
        "top_p": 0.75,
        "top_k": 40,
        "num_beams": 4,
    }
    assert decoding_of("instruct") == {"max_length": 2048, "no_repeat_ngram_size": 5, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"suit": "glue"}, "there is no key 'suit'. Did you mean 'suite'?"),
        ({"suite": "comonsense"}, "got 'comonsense'. Did you mean 'commonsense'?"),
        (
            {"suite": "glue", "settings": {"batchsize": 1}},
            "settings: there is no key 'batchsize'. Did you mean 'batch_size'?",
        ),
        ({"suite": "glue", "decoding": {"top-k": 1}}, "decoding: there is no key 'top-k'. Did you mean 'top_k'?"),
        ({"suite": "instruct", "decoding": {"max_new_tokens": "abc"}}, "max_new_tokens: expected a whole number, got"),
        ({"suite": "instruct", "decoding": {"num_beams": 0}}, "num_beams: expected 1 or more, got 0"),
        ({"suite": "instruct", "decoding": {"temperature": 0}}, "temperature: expected a number above 0, got 0"),
        ({"suite": "instruct", "decoding": {"top_p": 1.5}}, "top_p: expected a number above 0, at most 1, got 1.5"),
        ({"suite": "instruct", "decoding": 3}, "decoding: expected 'name: value' lines, got 3"),
        ({"suite": "glue", "methods": {"lorft": {}}}, "methods: there is no key 'lorft'. Did you mean 'loreft'?"),
        ({"suite": "glue"}, "methods: expected at least one of loreft, direft, lora"),
        (
            {"suite": "glue", "methods": {"lora": {"rnk": 1}}},
            "methods: lora: there is no key 'rnk'. Did you mean 'rank'?",
        ),
        ({"suite": "instruct", "methods": {"lora": {"base": {}}}}, "methods: lora: there is no key 'base'"),
        (
            {"suite": "glue", "methods": {"lora": {"base": {"rt": {}}}}},
            "lora: base: there is no key 'rt'. Did you mean 'rte'?",
        ),
        (
            {"suite": "glue", "methods": {"lora": {"base": {"rte": {"lrr": 1}}}}},
            "lora: base: rte: there is no key 'lrr'. Did you mean 'lr'?",
        ),
        ({"suite": "glue", "methods": {"lora": 3}}, "methods: lora: expected 'name: value' lines, got 3"),
        ([], "a recipe should hold the keys suite, settings, decoding, methods"),
        ("a: b: c", "this is not valid YAML"),
    ],
)
def test_a_wrong_recipe_names_the_key(tmp_path, recipe, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    with pytest.raises(ReftError) as caught:
        read_recipe(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "comonsense",
            {},
            "expected a YAML file or one of arithmetic, .*, got 'comonsense'. Did you mean 'commonsense'",
        ),
        ("commonsense", {"method": "dora"}, "method: commonsense has loreft, direft, lora, got 'dora'. Did you mean"),
        ("commonsense", {"task": "boolq"}, "task: one adapter is trained for all of commonsense"),
        ("commonsense", {"data": "a.jsonl"}, "data: a recipe decides it"),
        ("commonsense", {"intervention": "noreft"}, "intervention: a recipe decides it"),
        ("glue", {"task": "rtee"}, "GLUE has mnli, .*, got 'rtee'. Did you mean 'rte'"),
    ],
)
def test_what_a_recipe_refuses(name, given, message):
    with pytest.raises(ReftError, match=message):
        jobs(name, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "lora", "positions": "l1"}, "positions: LoRA has no such setting, got 'l1'"),
        ({"method": "lora", "layers": "3"}, "layers: LoRA has no such setting"),
        ({"method": "lora", "rank": 0}, "rank: expected 1 or more, got 0"),
        ({"alpha": 3}, "alpha: it is LoRA's; representation edits have no such setting, got 3"),
        ({"target_modules": "q_proj"}, "target_modules: it is LoRA's"),
    ],
)
def test_settings_of_another_method(given, message):
    with pytest.raises(ReftError, match=message):
        make_config(*jobs("commonsense", **given))


def test_glue_generates_nothing(tmp_path):
    recipe = {"suite": "glue", "decoding": {"top_k": 3}, "methods": {"loreft": {}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    (job,) = jobs(tmp_path / "mine.yaml", task="rte")
    with pytest.raises(ReftError, match="decoding: the tasks of GLUE generate nothing"):
        check_settings(job)


def test_lora_modules_that_are_not_there(tmp_path):
    (job,) = jobs("commonsense", method="lora", target_modules="no_proj")
    with pytest.raises(ReftError, match=r"target_modules: LoRA does not fit this model: .*no_proj"):
        attach(published(1, 64, "roberta"), make_config(job), None)
    assert isinstance(make_config(job), LoraConfig)
