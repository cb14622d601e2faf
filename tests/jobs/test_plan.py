"""What a training will cost: the counts are those of the training itself, and what cannot be planned is told."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM

import pyreft
from commands import run
from conftest import tiny_llama
from pyreft import pocket
from pyreft.jobs.job import PreparedJob
from pyreft.jobs.plan import RULES, make_plan
from pyreft.jobs.settings import TrainingJob
from pyreft.jobs.timing import Measured, Rates
from pyreft.loading import load_base
from pyreft.reach.prefixes import SkipPrefixes
from pyreft.reach.probe import Probe

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
MODELS = {
    "llama": lambda **given: tiny_llama(max_position_embeddings=256, **given),
    "sliding": lambda **given: of("mistral", num_key_value_heads=2, sliding_window=5, **SIZES, **given),
    "gpt2": lambda **given: of("gpt2", n_embd=32, n_layer=4, n_head=4, **DROPLESS, **given),
    "mamba": lambda **given: of("mamba", hidden_size=32, num_hidden_layers=4, state_size=4, **given),
    "encoder": lambda **given: of("bert", **SIZES, **given, hidden_dropout_prob=0, attention_probs_dropout_prob=0),
}
DROPLESS = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)


def of(kind, **sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


@pytest.fixture
def data(tmp_path):
    """Rows of several lengths, some of which begin alike."""
    pairs = pocket.emoji_pairs()[:7]
    long = "Tell me what you know about the place where I can see a whale and a castle."
    pairs += [{"prompt": long, "completion": pair["completion"]} for pair in pairs[:3]]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def saved(tmp_path, name, side="right"):
    """The directory of a tiny random model with the tokenizer of the embedded one."""
    _, tokenizer = load_base()
    tokenizer.padding_side = side
    directory = tmp_path / "base"
    MODELS[name](vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def prepared(data, **settings):
    defaults = {"intervention": "loreft", "layers": "2;3", "positions": "l4", "rank": 2, "batch_size": 4, "epochs": 1}
    return PreparedJob(TrainingJob(data=str(data), **defaults | settings))


def assert_counted(data, tmp_path, positions, part="mlp", **settings):
    """Tokens, windows, layers and bytes are those of a training: after its first epoch, and after the second."""
    settings = {"positions": positions, **settings}
    plan = make_plan(prepared(data, **settings), [], timed=False)
    cost = plan.cost_of(positions)
    job = prepared(data, output=str(tmp_path / "out"), epochs=2, save_steps=1000, **settings)
    ran, seen = {True: 0, False: 0}, []

    def counting(forward):
        def counted(*args, **kwargs):
            output = forward(*args, **kwargs)
            shape = (output[0] if isinstance(output, tuple) else output).shape
            ran[torch.is_grad_enabled()] += shape[0] * shape[1]
            return output

        return counted

    def uncounted(allows):
        def tried(*args):
            before = dict(ran)
            allowed = allows(*args)
            ran.update(before)
            return allowed

        return tried

    def look(step, *_):
        if step == plan.steps:
            seen.append((ran[True], ran[False], *_tokens(job.reach)))

    modules = job.model.get_base_model().named_modules()
    kinds = {type(module) for name, module in modules if name.rpartition(".")[2] == part}
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:  # no hooks: with them, whole rows would be computed
            patch.setattr(kind, "forward", counting(kind.forward))
        patch.setattr(Probe, "allows", uncounted(Probe.allows))
        job.train(look)
    above = plan.layers - plan.skipped
    tokens = (cost.tokens, cost.computed) if plan.computes == "windows" else ()
    assert seen == [(cost.computed * above, cost.frozen_first, *tokens)]
    assert cost.frozen_first + cost.frozen_later == ran[False]
    assert (cost.held_bytes, cost.full) == (job.reach.store.held, job.reach.store.full)
    return plan, cost


def _tokens(reach):
    return (reach._way.tokens, reach._way.computed) if isinstance(reach._way, SkipPrefixes) else ()


@pytest.mark.parametrize(
    ("positions", "layers"), [("l1", "all"), ("l8", "3"), ("f3+l3", "all"), ("f7+l7", "6"), ("all", "3")]
)
def test_counts_are_those_of_a_training(data, tmp_path, positions, layers):
    plan, cost = assert_counted(data, tmp_path, positions, layers=layers)
    assert (plan.computes, plan.why_not, cost.frozen_later) == ("windows", None, 0)
    assert plan.skipped == (1 if layers == "all" else int(layers) + 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "sliding", "gpt2"])
def test_counts_of_other_models(data, tmp_path, name, side):
    plan, cost = assert_counted(data, tmp_path, "l4", model=saved(tmp_path, name, side), layers="1")
    assert (plan.computes, cost.frozen_later) == ("windows", 0)


@pytest.mark.parametrize("memory", ["0", "300KB"])
def test_what_does_not_fit_is_computed_again(data, tmp_path, memory):
    _, cost = assert_counted(data, tmp_path, "l1", reach_memory=memory)
    assert cost.full
    assert cost.frozen_later > 0


def test_a_directory_takes_what_does_not_fit(data, tmp_path):
    settings = {"reach_memory": "300KB", "reach_directory": str(tmp_path / "held")}
    cost = make_plan(prepared(data, **settings), ["l1"], timed=False).cost_of("l1")
    assert not (tmp_path / "held").exists()
    assert not cost.full
    assert (cost.frozen_later, cost.held_bytes <= 300_000) == (0, True)


def test_what_validation_holds_counts(data, tmp_path):
    job = prepared(data, output=str(tmp_path / "out"), validation_split=0.3)
    held = make_plan(job, timed=False).cost_of("l4").held_bytes
    job.train()
    assert held == job.reach.store.held


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "part"), [("mamba", "mixer"), ("encoder", "intermediate")])
def test_models_of_whole_rows(data, tmp_path, name, part, side):
    settings = {"model": saved(tmp_path, name, side), "layers": "1"}
    plan, cost = assert_counted(data, tmp_path, "l4", part, **settings)
    assert (plan.computes, plan.skipped, plan.layers) == ("layers", 2, 4)
    assert cost.share == plan.cost_of("l1").share == 1


def test_rows_that_are_computed_whole_say_why(data, tmp_path):
    base = saved(tmp_path, "mamba")
    plan = make_plan(prepared(data, model=base, layers="0", component="block_input"), timed=False)
    assert (plan.computes, plan.skipped) == ("rows", 0)
    assert plan.why_not == "layers of MambaForCausalLM keep more than keys and values of attention"
    plan = make_plan(prepared(data, reach=False))
    assert "is turned off (reach: false)" in plan.why_not
    assert {(cost.share, cost.held_bytes, cost.frozen_first) for cost in plan.costs} == {(1, 0, 0)}


def test_a_plan_changes_nothing(data, tmp_path):
    before = sorted(tmp_path.iterdir())
    files = []
    for planned in (True, False):
        job = prepared(data, output=str(tmp_path / f"out{planned}"), dropout=0.1)
        if planned:
            weights = {name: value.clone() for name, value in job.model.state_dict().items()}
            modes = [module.training for module in job.model.modules()]
            make_plan(job)
            assert all(torch.equal(value, weights[name]) for name, value in job.model.state_dict().items())
            assert [module.training for module in job.model.modules()] == modes
            assert (len(job.reach.store), job.reach.store.held) == (0, 0)
            assert sorted(tmp_path.iterdir()) == before
        job.train()
        files.append(load_file(tmp_path / f"out{planned}" / "adapter_model.safetensors"))
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


def test_times_and_peaks_are_filled_in(data):
    plan = make_plan(prepared(data, epochs=2.5, gradient_accumulation=2))
    assert (plan.batches, plan.steps, plan.timed.split(" to ")[0][:9]) == (3, 2, "4 rows of")
    for cost in plan.costs:
        assert cost.seconds > 0
        assert cost.seconds_per_step > 0
        assert cost.peak_bytes == plan.model_bytes + cost.step_bytes + cost.held_bytes
    assert plan.cost_of("l1").against == 1
    assert 0 < plan.cost_of("l1").step_bytes < plan.cost_of("l8").step_bytes < plan.cost_of("all").step_bytes


def test_rates_are_read_off_between_two_steps():
    rates = Rates(Measured(1.5, 0.5, 1000), Measured(9, 2.5, 5000), (10, 50), 100)
    assert rates.seconds(1, 10, 0) == pytest.approx(0.5)
    assert rates.seconds(1, 50, 0) == pytest.approx(2.5)
    assert rates.seconds(2, 60, 200) == pytest.approx(0.5 + 2.5 + 2.0)
    assert [rates.kept(tokens) for tokens in (10, 30, 50, 70)] == [1000, 3000, 5000, 7000]
    same = Rates(Measured(0.4, 0.5, 1000), Measured(9, 2.5, 5000), (10, 10), 0)  # noise, and nothing held
    assert same.seconds(1, 20, 5) == pytest.approx(1.0)
    falling = Rates(Measured(1, 1, 1000), Measured(1, 0.9, 900), (10, 50), 100)
    assert falling.seconds(3, 200, 0) == pytest.approx(3)


def nothing_found(prompt, input_ids):
    """No token of any prompt."""
    return torch.zeros_like(prompt)


def test_a_rule_that_finds_no_token(data, tmp_path):
    pyreft.positions.register_rule("nothing_found", nothing_found)
    with pytest.raises(pyreft.ReftError, match="'nothing_found' finds no token to edit in any of 10 prompts"):
        make_plan(prepared(data, positions="nothing_found"))
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": pocket.load()[1].bos_token, "completion": "a cat"}) + "\n")
    settings = {"format": "text", "batch_size": 2}  # the prompt is the BOS token alone
    assert make_plan(prepared(one, **settings), timed=False).cost_of("f3+l3").edited == 0
    with pytest.raises(pyreft.ReftError, match="line 1: the prompt has 1 token, and none would be edited"):
        make_plan(prepared(one, positions="f3+l3", **settings))
    assert "no token" in run("plan", "--data", one, "--format", "text", "--positions", "l1").stdout


def test_what_cannot_be_planned(data, tmp_path):
    BertForMaskedLM(BertConfig(vocab_size=99, **SIZES)).save_pretrained(tmp_path / "bert")
    with pytest.raises(pyreft.ReftError, match=r"expected a causal language model, .* holds a BertForMaskedLM"):
        prepared(data, model=str(tmp_path / "bert"))
    with pytest.raises(pyreft.ReftError, match=r"positions: expected f<n>, .* got 'last4'. Did you mean 'l4'\?"):
        make_plan(prepared(data), ["last4"])
    with pytest.raises(pyreft.ReftError, match="plan: the setting 'data' is missing"):
        run("plan")
    with pytest.raises(pyreft.ReftError, match=r"none.jsonl: there is no such file."):
        run("plan", "--data", "none.jsonl")
    with pytest.raises(pyreft.ReftError, match="output: expected the directory for the adapter, got none"):
        prepared(data).train()


def test_the_command_prints_a_table(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    printed = run(
        "plan", "--data", data, "--intervention", "loreft", "--layers", "2;3", "--positions", "f1+l2", "--batch-size", 4
    ).stdout
    lines = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in lines if line and line[0] in (*RULES, "f1+l2")] == [*RULES, "f1+l2"]
    expected = make_plan(prepared(data, positions="f1+l2"), ["f1+l2"], timed=False)
    for rule in ("l1", "f1+l2"):
        (row,) = (line for line in lines if line and line[0] == rule)
        assert row[2:4] == [f"{100 * expected.cost_of(rule).share:.0f}", "%"]
    assert "computed  of the tokens, in each step, in 4 of 7 layers, with gradients" in printed
    assert "…" not in printed
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_takes_the_file_of_a_training(data, tmp_path):
    settings = f"data: {data}\noutput: {tmp_path}\nlayers: 1\npositions: L2\nreach_memory: 100KB\n"
    (tmp_path / "a.yaml").write_text(settings)
    found = json.loads(run("plan", "--config", tmp_path / "a.yaml", "--epochs", 3, "--json").stdout)
    assert (found["rows"], found["epochs"], found["skipped"], found["budget_bytes"]) == (10, 3, 1, 100_000)
    assert [cost["positions"] for cost in found["costs"]] == [*RULES, "L2"]
    printed = run("plan", "--config", tmp_path / "a.yaml").stdout
    assert "What does not fit in memory is computed again in each epoch; --reach-memory" in printed


@pytest.mark.parametrize(
    ("positions", "line"),
    [
        ("l1", "Each step computes {l1} of the tokens in 6 of 7 layers, as with l1."),
        ("l2", "Each step computes {l2} of the tokens in 6 of 7 layers (l1 {l1})."),
        (
            "f7+l7",
            "f7+l7 begins at the first token, so each step computes whole rows in 6 of 7 layers; l8 would compute "
            "{l8} of the tokens, l1 {l1} (see pyreft plan).",
        ),
        (
            "l20",
            "With l20, each step computes {l20} of the tokens in 6 of 7 layers; l8 would compute {l8} of the tokens, "
            "l1 {l1} (see pyreft plan).",
        ),
    ],
)
def test_a_training_says_what_it_will_cost(tmp_path, positions, line):
    long = "Tell me what you know about the place where I can see a whale and a castle in the big blue sea."
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": long, "completion": word}) + "\n" for word in ("yes", "no")))
    arguments = (
        "train",
        "--data",
        path,
        "--positions",
        positions,
        "--component",
        "block_output",
        "--epochs",
        1,
        "--overwrite",
    )
    output = ("--output", tmp_path / "out")
    plan = make_plan(prepared(path, batch_size=8), ["l2", "l8", "l20"], timed=False)
    shares = {cost.positions: f"{100 * cost.share:.0f} %" for cost in plan.costs}
    assert line.format(**shares) in run(*arguments, *output).stdout.splitlines()
    for silent in ("--quiet", "--json", "--no-reach"):
        assert "of 7 layers" not in run(*arguments, *output, silent).stdout.split("Trained")[0].split('"computed"')[0]


def test_a_training_of_whole_rows_says_so(data, tmp_path):
    base = saved(tmp_path, "mamba")
    arguments = (
        "train",
        "--data",
        data,
        "--model",
        base,
        "--intervention",
        "loreft",
        "--epochs",
        1,
        "--overwrite",
        "--output",
        tmp_path / "out",
    )
    assert (
        "Rows of this model cannot be computed in part, so each step computes whole ones, whatever the rule, in 2 of 4 "
        "layers; the 2 below the first edit are computed once."
    ) in run(*arguments, "--layers", 1).stdout
    whole = ("--layers", 0, "--component", "block_input")
    line = "Whole rows are computed in each step, whatever the rule: layers of MambaForCausalLM keep more than keys"
    assert line in run(*arguments, *whole).stdout
    assert line in run("plan", "--data", data, "--model", base, *whole).stdout
