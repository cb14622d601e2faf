"""Requests in, pieces out, turn by turn and without a thread: the answers are those of `generate`."""

import pytest
import torch

import pyreft
from pyreft import pocket
from pyreft.errors import ReftError
from pyreft.serving.catalog import Catalog, Store
from pyreft.serving.laptop.engine import Engine
from pyreft.serving.laptop.requests import Request
from pyreft.serving.laptop.sampling import Sampling
from pyreft.serving.laptop.scheduling import QueueFull
from pyreft.serving.laptop.side_by_side import Batch
from served import LORA, RULES, save, save_all, save_lora

NAMES = (*RULES, *LORA)

QUESTIONS = ["What is a whale?", "Name three animals that live on a farm, please.", "Why?", "What color is the sky?"]
NEW = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_lora(save_all(tmp_path_factory.mktemp("adapters")))


@pytest.fixture(scope="module")
def catalog(root, tmp_path_factory):
    return Catalog(root, Store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def base():
    return pocket.load()


@pytest.fixture(scope="module")
def expected(root):
    """By adapter, none for the base: what `generate` answers to each question, as ids."""
    model, tokenizer = pocket.load()
    model = pyreft.ReftModel.from_pretrained(model, str(root / "l4"), adapter_name="l4").eval()
    for name in NAMES:
        if name != "l4":
            model.load_adapter(str(root / name), adapter_name=name)
    batch = tokenizer(
        [pocket.PROMPT_TEMPLATE % q for q in QUESTIONS], padding=True, padding_side="left", return_tensors="pt"
    )
    answers = {}
    for name in (None, *NAMES):
        with torch.no_grad():
            if name is None:
                with model.disable_adapter():
                    out = model.generate(**batch, max_new_tokens=NEW)
            else:
                model.set_adapter(name)
                out = model.generate(**batch, max_new_tokens=NEW)
        rows = out[:, batch["input_ids"].shape[1] :].tolist()
        answers[name] = [row[: row.index(3) + 1] if 3 in row else row for row in rows]
    return answers


def make_engine(base, **options):
    return Engine(*base, **{"rows": 64, **options})


def ask(engine, catalog, name, question, **options):
    """A request, with the pieces that were delivered for it."""
    pieces = []
    request = Request(
        engine.tokenizer(pocket.PROMPT_TEMPLATE % question)["input_ids"],
        pieces.append,
        None if name is None else catalog.resolve(name),
        **{"most": NEW, "ends": engine.ends, **options},
    )
    return request, pieces


def run(engine, most=500):
    scheduler = engine.scheduler
    for turn in range(most):
        if not any(scheduler.counts.values()):
            return turn
        scheduler.turn()
    raise AssertionError("it does not end")


def tokens(pieces, index=0):
    return [piece.choice.token for piece in pieces if piece.index == index and piece.choice]


def test_answers_are_those_of_generate_with_adapters_mixed(base, catalog, expected):
    """All at once, and some that come while others are answered; long prompts are read in parts."""
    engine = make_engine(base, slots=8)
    engine.scheduler.part = 40
    asked = [(name, number) for number in range(len(QUESTIONS)) for name in (None, *NAMES)]
    made = []
    for count, (name, number) in enumerate(asked):
        request, pieces = ask(engine, catalog, name, QUESTIONS[number])
        engine.submit(request)
        made.append(pieces)
        if count % 5 == 4:  # the next ones join those that are under way
            engine.scheduler.turn()
    run(engine)
    for (name, number), pieces in zip(asked, made, strict=True):
        assert tokens(pieces) == expected[name][number], (name, number)
        assert "".join(piece.text for piece in pieces) == engine.tokenizer.decode(
            expected[name][number], skip_special_tokens=True
        )
        assert pieces[-1].finish == ("stop" if tokens(pieces)[-1] == 3 else "length")
    assert len({str(expected[name]) for name in (None, *NAMES)}) == 8  # the edits can be told apart
    assert not engine.edits.slots._users


def test_more_adapters_than_slots_wait_and_none_fails(base, catalog, expected):
    engine = make_engine(base, slots=2)
    made = {name: ask(engine, catalog, name, QUESTIONS[0]) for name in NAMES}
    for request, _ in made.values():
        engine.submit(request)
    run(engine)
    assert {name: tokens(pieces) for name, (_, pieces) in made.items()} == {n: expected[n][0] for n in NAMES}
    assert engine.edits.loads == len(NAMES)


def test_a_newcomer_does_not_wait_for_the_end_of_others(base, catalog, expected):
    engine = make_engine(base)
    long, _ = ask(engine, catalog, "all", QUESTIONS[1], most=200, ends=frozenset())
    engine.submit(long)
    for _ in range(5):
        engine.scheduler.turn()
    short, pieces = ask(engine, catalog, "l4", QUESTIONS[0])
    engine.submit(short)
    for _ in range(len(expected["l4"][0])):
        engine.scheduler.turn()
    assert tokens(pieces) == expected["l4"][0]
    assert engine.scheduler.counts["running"] == 1
    engine.scheduler.cancel(long)
    engine.scheduler.turn()
    assert engine.scheduler.counts == {"waiting": 0, "reading": 0, "running": 0}
    assert not engine.edits.slots.in_use(long.adapter.digest)


def test_one_that_goes_while_it_is_read_in_leaves_the_others_as_they_are(base, catalog, expected):
    engine = make_engine(base)
    engine.scheduler.part = 8
    made = [ask(engine, catalog, "l4", question) for question in (QUESTIONS[1], QUESTIONS[0])]
    engine.scheduler.part = 200
    for request, _ in made:
        engine.submit(request)
    engine.scheduler._admit()
    engine.scheduler.part = 8
    engine.scheduler.turn()
    engine.scheduler.cancel(made[0][0])
    run(engine)
    assert made[0][1] == []
    assert tokens(made[1][1]) == expected["l4"][0]


def test_several_answers_share_one_reading_and_have_seeds_of_their_own(base, catalog):
    engine = make_engine(base)
    drawn = Sampling(temperature=1.5, seed=7)

    def answers(beside=0):
        request, pieces = ask(engine, catalog, "l16", QUESTIONS[0], n=4, sampling=drawn)
        for _ in range(beside):
            engine.submit(ask(engine, catalog, None, QUESTIONS[1], sampling=drawn)[0])
        engine.submit(request)
        run(engine)
        return [tokens(pieces, index) for index in range(4)]

    first = answers()
    assert len({tuple(answer) for answer in first}) > 1
    assert answers(beside=3) == first  # whoever else is in the batch


def test_a_stop_ends_an_answer_and_is_not_in_it(base, catalog, expected):
    engine = make_engine(base)
    whole = engine.tokenizer.decode(expected[None][0], skip_special_tokens=True)
    stop = whole[6:9]
    request, pieces = ask(engine, catalog, None, QUESTIONS[0], stop=("never there", stop))
    engine.submit(request)
    run(engine)
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"
    assert len(tokens(pieces)) < len(expected[None][0])


def test_the_prompt_s_probabilities_are_those_of_a_forward(base, catalog):
    engine = make_engine(base)
    engine.scheduler.part = 16
    request, pieces = ask(engine, catalog, None, QUESTIONS[1], told_prompt=2, most=0)
    other, _ = ask(engine, catalog, None, QUESTIONS[0])
    for each in (other, request):
        engine.submit(each)
    run(engine)
    assert [(piece.choice, piece.finish) for piece in pieces] == [(None, "length")]
    ids = torch.tensor([request.prompt])
    with torch.no_grad():
        known = engine.model(input_ids=ids).logits[0].log_softmax(-1)
    found = request.prompt_choices
    assert [choice.token for choice in found] == request.prompt[1:]
    expected = known[:-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([choice.logprob for choice in found]), expected)
    assert found[3].top[0][0] == int(known[3].argmax())


def test_strength_multiplies_the_edits(base, catalog, expected):
    engine = make_engine(base)
    made = [ask(engine, catalog, "all", QUESTIONS[0], strength=strength) for strength in (0.0, 1.0, 0.5)]
    for request, _ in made:
        engine.submit(request)
    run(engine)
    assert tokens(made[0][1]) == expected[None][0]
    assert tokens(made[1][1]) == expected["all"][0]
    assert tokens(made[2][1]) not in (expected[None][0], expected["all"][0])


def test_limits_are_told_and_a_full_queue_too(base, catalog):
    engine = make_engine(base, queue=2, rows=4)
    with pytest.raises(ReftError, match="n: expected at most 4 answers, got 5"):
        engine.submit(ask(engine, catalog, None, "Why?", n=5)[0])
    engine.scheduler.room = 100
    with pytest.raises(ReftError, match="may have 100 tokens together, these may have"):
        engine.submit(ask(engine, catalog, None, "Why?", most=100)[0])
    for _ in range(2):
        engine.submit(ask(engine, catalog, None, "Why?")[0])
    with pytest.raises(QueueFull):
        engine.submit(ask(engine, catalog, None, "Why?")[0])


def test_the_room_for_keys_and_values_is_kept(base, catalog, expected):
    engine = make_engine(base)
    made = [ask(engine, catalog, None, QUESTIONS[0]) for _ in range(6)]
    engine.scheduler.room = 2 * made[0][0].longest
    for request, _ in made:
        engine.submit(request)
    most = 0
    while any(engine.scheduler.counts.values()):
        engine.scheduler.turn()
        most = max(most, engine.scheduler.counts["running"])
    assert most == 2
    assert [tokens(pieces) for _, pieces in made] == [expected[None][0]] * 6


def test_late_requests_get_an_error_wherever_they_are(base, catalog, expected):
    engine = make_engine(base)
    running, answered = ask(engine, catalog, "l4", QUESTIONS[0])
    late, pieces = ask(engine, catalog, "l4", QUESTIONS[0], n=2, most=200)
    waiting, unread = ask(engine, catalog, "l4", QUESTIONS[0], deadline=0.0)
    for request in (running, late):
        engine.submit(request)
    engine.scheduler.turn()
    late.deadline = 0.0
    engine.submit(waiting)
    run(engine)
    assert tokens(answered) == expected["l4"][0]
    assert [piece.finish for piece in pieces if piece.finish] == ["timeout", "timeout"]
    assert [piece.finish for piece in unread] == ["timeout"]
    assert not engine.edits.slots._users


def test_an_error_is_that_of_its_own_requests(base, catalog, expected, monkeypatch):
    """Of a step that fails, and of weights that are damaged after they were resolved."""
    engine = make_engine(base)
    running, answered = ask(engine, catalog, "l4", QUESTIONS[0])
    engine.submit(running)
    engine.scheduler.turn()
    adapter = catalog.resolve("f3l3")
    failing, pieces = ask(engine, catalog, "f3l3", QUESTIONS[0])
    monkeypatch.setattr(type(adapter), "edits", lambda self: 1 / 0)  # as when its copy was damaged
    engine.submit(failing)
    run(engine)
    assert [(piece.finish, piece.problem) for piece in pieces] == [
        ("error", "The engine could not compute this request.")
    ]
    assert tokens(answered) == expected["l4"][0]


def test_a_token_that_cannot_be_chosen_ends_its_own_answer(base, catalog, expected):
    engine = make_engine(base)
    good, answered = ask(engine, catalog, "l4", QUESTIONS[0])
    bad, pieces = ask(engine, catalog, None, QUESTIONS[0], sampling=Sampling(bias={10**6: 1.0}))
    for request in (good, bad):
        engine.submit(request)
    run(engine)
    assert [piece.finish for piece in pieces] == ["error"]
    assert tokens(answered) == expected["l4"][0]


@pytest.mark.parametrize("running", [False, True])
def test_answers_that_cannot_begin_end_with_an_error_and_the_engine_goes_on(
    base, catalog, expected, monkeypatch, running
):
    """As where there is no memory for their keys and values beside those of others."""
    engine = make_engine(base)
    asked = [ask(engine, catalog, "l4", QUESTIONS[0])] if running else []
    for request, _ in asked:
        engine.submit(request)
        engine.scheduler.turn()
    asked.append(ask(engine, catalog, "f3l3", QUESTIONS[0]))
    engine.submit(asked[-1][0])
    with monkeypatch.context() as changed:
        changed.setattr(Batch, "join" if running else "select", lambda *_: 1 / 0)
        engine.scheduler.turn()
    assert [pieces[-1].finish for _, pieces in asked] == ["error"] * len(asked)
    assert not any(engine.scheduler.counts.values())
    assert not engine.edits.slots._users
    again, answered = ask(engine, catalog, "l4", QUESTIONS[0])
    engine.submit(again)
    run(engine)
    assert tokens(answered) == expected["l4"][0]


def test_a_model_that_cannot_be_computed_in_batches_is_refused():
    from transformers import AutoModelForCausalLM, MambaConfig

    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).eval()
    with pytest.raises(ReftError, match=r"MambaForCausalLM c.* serve it with --engine vllm"):
        Engine(model, pocket.load()[1])


def test_adapters_that_do_not_fit_are_refused(base, catalog, tmp_path):
    save(tmp_path / "wide", low_rank_dimension=12)
    wide = Catalog(tmp_path, Store(tmp_path / "store"))
    engine = make_engine(base)
    with pytest.raises(ReftError, match="needs a rank of 12, the engine's slots have 8; start it with --rank 12"):
        engine.check(wide.resolve("wide"))
    assert wide.rank() == 12
    engine.check(catalog.resolve("l4"))
    engine.shape = {**engine.shape, "hidden_size": 64}
    with pytest.raises(ReftError, match="for another base model"):
        engine.check(catalog.resolve("l4"))
