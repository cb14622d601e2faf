import pytest
import torch
from torch.nn import functional as F

import pyreft
from conftest import FORMULAS, shaken, tiny_llama
from pyreft.errors import ReftError
from pyreft.interventions import (
    INTERVENTIONS,
    Intervention,
    OrthonormalColumns,
    intervention_class,
    orthonormal_columns,
    orthonormalize,
)
from pyreft.interventions.low_rank import LowRankIntervention

D, RANK = 24, 3


def written_out(name, module, h):
    """The six formulas of the paper's table 17, term by term."""
    weight = getattr(module.learned_source, "weight", None)
    bias = module.learned_source.bias if weight is not None else module.learned_source
    second = module.proj_layer.weight if hasattr(module, "proj_layer") else module.rotate_layer.weight.T
    source = bias if weight is None else h @ weight.T + bias
    return {
        "loreft": lambda: h + (source - h @ second.T) @ second,
        "noreft": lambda: h + (source - h @ second.T) @ second,
        "consreft": lambda: h + (source - h @ second.T) @ second,
        "lobireft": lambda: h + source @ second,
        "direft": lambda: h + source @ second,
        "nodireft": lambda: h + source @ second,
    }[name]()


@pytest.mark.parametrize("name", ["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft"])
def test_formula(name):
    module = INTERVENTIONS[name](embed_dim=D, low_rank_dimension=RANK)
    h = torch.randn(5, D)
    torch.testing.assert_close(module(h), written_out(name, module, h), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("usual", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FORMULAS)
def test_parameters_are_float32_whatever_torch_makes_by_itself(name, usual):
    sizes = {"low_rank_dimension": RANK, "input_dim": D} if name == "lora" else {}
    sizes = sizes or ({"low_rank_dimension": RANK} if issubclass(INTERVENTIONS[name], LowRankIntervention) else {})
    torch.set_default_dtype(usual)
    try:
        made = INTERVENTIONS[name](embed_dim=D, **sizes)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}


@pytest.mark.parametrize("usual", [torch.bfloat16, torch.float64])
def test_numbers_do_not_depend_on_what_torch_makes_by_itself(usual):
    loreft = random_one("loreft", low_rank_dimension=RANK)
    jola, h = INTERVENTIONS["jola"](embed_dim=D, l0=0.1), torch.randn(5, D)
    expected = loreft(h), jola.penalty()
    torch.set_default_dtype(usual)
    try:
        found = loreft(h), jola.penalty()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_activation_is_on_the_source_alone():
    module = INTERVENTIONS["loreft"](embed_dim=D, low_rank_dimension=RANK, act_fn="relu")
    h = torch.randn(5, D)
    rotation = module.rotate_layer.weight
    expected = h + (F.relu(module.learned_source(h)) - h @ rotation) @ rotation.T
    torch.testing.assert_close(module(h), expected)


def test_dropout_falls_on_the_edit_alone():
    module = INTERVENTIONS["lobireft"](embed_dim=D, low_rank_dimension=RANK, dropout=0.999999)
    h = torch.randn(5, D)
    assert torch.equal(module.train()(h), h)
    assert not torch.equal(module.eval()(h), h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_are_edited_in_float32(dtype):
    module = INTERVENTIONS["loreft"](embed_dim=D, low_rank_dimension=RANK)
    h = torch.randn(5, D).to(dtype)
    assert torch.equal(module(h), module(h.float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(h), module(h.float()).to(dtype))


def test_parameters_take_the_dtype_asked_for():
    module = INTERVENTIONS["noreft"](embed_dim=D, low_rank_dimension=RANK, add_bias=True, dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module(torch.randn(2, D)).dtype == torch.float32


def off_orthonormal(rotation):
    return (rotation.T @ rotation - torch.eye(rotation.shape[1])).abs().max().item()


def test_rotation_is_orthonormal_after_many_steps():
    layer = OrthonormalColumns(64, 8)
    target = torch.randn(64, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (layer.weight * target).sum().backward()
        optimizer.step()
        assert off_orthonormal(layer.weight.detach()) < 1e-5
    # the best orthonormal matrix for this loss is the polar factor of -target
    u, _, v = torch.linalg.svd(-target, full_matrices=False)
    torch.testing.assert_close(layer.weight.detach(), u @ v, atol=1e-3, rtol=0)


def test_an_orthonormal_matrix_is_kept():
    layer = OrthonormalColumns(64, 8)
    rotation = torch.linalg.qr(torch.randn(64, 8))[0] * torch.tensor([1, -1] * 4)
    layer.set_(rotation)
    torch.testing.assert_close(layer.weight, rotation, atol=1e-6, rtol=0)


def test_batched_orthonormalisation_equals_one_by_one():
    layers = [OrthonormalColumns(32, r) for r in (4, 2, 4)]
    single = [layer.weight for layer in layers]
    grads = torch.autograd.grad(sum(w.pow(3).sum() for w in single), [layer.free for layer in layers])
    orthonormalize(layers)
    batched = [layer.weight for layer in layers]
    again = torch.autograd.grad(sum(w.pow(3).sum() for w in batched), [layer.free for layer in layers])
    for one, other in zip([*single, *grads], [*batched, *again], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)  # the order of sums may differ


def test_rotation_follows_its_parameter_whichever_way_it_is_changed():
    layer = OrthonormalColumns(16, 2).eval()
    changes = (
        lambda: layer.free.add_(torch.randn(16, 2)),
        lambda: layer.load_state_dict({"free": torch.randn(16, 2)}),
        lambda: layer.free.data.copy_(torch.randn(16, 2)),  # which PyTorch does not count
    )
    for change in changes:
        with torch.no_grad():
            change()
        torch.testing.assert_close(layer.weight, orthonormal_columns(layer.free))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low_rank_dimension": 25}, "expected a rank from 1 to the width 24 of the edited states, got 25"),
        ({"low_rank_dimension": 0}, "got 0"),
        ({"low_rank_dimension": 2, "act_fn": "rellu"}, "no activation is called 'rellu'. Did you mean 'relu'?"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ReftError, match=message.replace("?", r"\?")):
        INTERVENTIONS["loreft"](embed_dim=D, **settings)


@pytest.mark.parametrize(
    ("name", "act_fn"),
    [
        ("loreft", None),
        ("noreft", None),
        ("direft", None),
        ("direft", "gelu"),
        ("nodireft", "sigmoid"),
        ("lobireft", None),
    ],
)
def test_an_edit_that_begins_as_the_identity(name, act_fn):
    settings = {"low_rank_dimension": RANK, "act_fn": act_fn, "init": "identity", "add_bias": name == "noreft"}
    module, h = INTERVENTIONS[name](embed_dim=D, **settings), torch.randn(50, D)
    torch.testing.assert_close(module(h), h, atol=1e-5, rtol=1e-5)
    assert module.settings["init"] == "identity"
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for _ in range(30):
        loss = (module(h) - h - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.97  # of 1, with three directions of 24


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("loreft", {"init": "zero"}, "init: expected 'random' or 'identity', got 'zero'"),
        (
            "loreft",
            {"init": "identity", "act_fn": "relu"},
            "init: with an activation, LoreftIntervention is h' = h for",
        ),
        ("direft", {"init": "identity", "act_fn": "sigmoid"}, "init: DireftIntervention is h' = h for no parameters"),
        ("consreft", {"init": "identity"}, "init: ConsreftIntervention is h' = h for no parameters"),
    ],
)
def test_no_such_beginning(name, settings, message):
    with pytest.raises(ReftError, match=message):
        INTERVENTIONS[name](embed_dim=D, low_rank_dimension=RANK, **settings)


@torch.no_grad()
@pytest.mark.parametrize("name", ["loreft", "consreft", "nodireft"])
def test_tensors_by_the_originals_names(name):
    """Also where they stand below another name, as those of a whole model do."""
    module, other = (random_one(name, low_rank_dimension=4, add_bias=True) for _ in range(2))
    theirs = {"embed_dim": torch.tensor(D), "interchange_dim": torch.tensor(D), **module.state_dict()}
    if name == "loreft":
        theirs["weight"], theirs["bias"] = theirs.pop("learned_source.weight"), theirs.pop("learned_source.bias")
        theirs["rotate_layer"] = theirs.pop("rotate_layer.free")
    elif name == "consreft":
        made = torch.nn.Linear(4, D, bias=False)
        parametrized = torch.nn.utils.parametrizations.orthogonal(made)
        del theirs["rotate_layer.free"]
        parametrized.weight = module.rotate_layer.weight
        theirs |= {f"rotate_layer.{key}": tensor for key, tensor in parametrized.state_dict().items()}
    torch.nn.ModuleDict({"key": other}).load_state_dict({f"key.{key}": tensor for key, tensor in theirs.items()})
    h = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(other(h), module(h))
    theirs.popitem()
    with pytest.raises((RuntimeError, ReftError), match=r"Missing key|do not fit each other"):
        other.load_state_dict(theirs)


@torch.no_grad()
def test_a_state_answers_to_the_originals_names(tmp_path):
    module = random_one("loreft", low_rank_dimension=4)
    state = module.state_dict()
    assert state.keys() == {"rotate_layer.free", "learned_source.weight", "learned_source.bias"}
    assert torch.equal(state["rotate_layer"], module.rotate_layer.weight)
    assert [name in state for name in ("rotate_layer", "weight", "bias", "proj_layer")] == [True, True, True, False]
    assert torch.equal(state.get("weight"), module.learned_source.weight)
    assert state.get("proj_layer") is None
    assert "rotate_layer" not in random_one("noreft", low_rank_dimension=4).state_dict()
    assert torch.equal(state["weight"], module.learned_source.weight)
    assert torch.equal(state["bias"], module.learned_source.bias)
    with pytest.raises(KeyError, match="rotate"):
        state["rotate"]
    with pytest.raises(KeyError, match="rotate_layer"):
        random_one("noreft", low_rank_dimension=4).state_dict()["rotate_layer"]
    gradient = torch.func.grad(lambda given: given["rotate_layer"][0, 0])(state)
    assert gradient.keys() == state.keys()
    assert bool(gradient["rotate_layer.free"].any())
    torch.save(state, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


@torch.no_grad()
def test_a_rotation_is_assigned():
    module = random_one("loreft", low_rank_dimension=4)
    module.rotate_layer.weight = torch.eye(D, 4)
    torch.testing.assert_close(module.rotate_layer.weight, torch.eye(D, 4))


def test_unknown_intervention():
    assert intervention_class("LoreftIntervention") is INTERVENTIONS["loreft"]
    with pytest.raises(ReftError, match=r"expected one of loreft, .*, got 'lowreft'. Did you mean 'loreft'\?"):
        intervention_class("lowreft")


# -- the wider family ---------------------------------------------------------------------------------------------


def random_one(name, **settings):
    """An intervention with parameters away from where they start."""
    module = INTERVENTIONS[name](embed_dim=D, **settings).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("name", ["red", "bias", "road", "lofit", "jola"])
def test_edits_without_a_rank_start_as_the_identity(name):
    h = torch.randn(5, D)
    assert torch.equal(INTERVENTIONS[name](embed_dim=D).eval()(h), h)


def test_formulas_without_a_rank():
    h = torch.randn(5, D)
    red, bias, lofit = random_one("red"), random_one("bias"), random_one("lofit")
    torch.testing.assert_close(red(h), red.scale * h + red.bias)
    torch.testing.assert_close(bias(h), h + bias.bias)
    torch.testing.assert_close(lofit(h), (1 + lofit.scale) * h)


def test_road_rotates_pairs():
    module, h = random_one("road"), torch.randn(5, D)
    expected = h.clone()
    for pair, (theta, alpha) in enumerate(zip(module.theta, module.alpha, strict=True)):
        matrix = alpha * torch.tensor([[theta.cos(), -theta.sin()], [theta.sin(), theta.cos()]])
        expected[:, 2 * pair : 2 * pair + 2] = h[:, 2 * pair : 2 * pair + 2] @ matrix.T
    torch.testing.assert_close(module(h), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ReftError, match="the width 5 is odd"):
        INTERVENTIONS["road"](embed_dim=5)


def test_jola_opens_and_closes_its_gates():
    module, h = random_one("jola", l0=0.1), torch.randn(5, D)
    with torch.no_grad():
        module.log_alpha.copy_(torch.tensor([20.0, -20.0]))
    torch.testing.assert_close(module(h), (1 + module.scale) * h)
    # the expected number of open gates, by drawing many
    with torch.no_grad():
        module.log_alpha.copy_(torch.tensor([0.3, -1.0]))
    module.train()
    drawn = torch.stack([(module.gates() > 0).float().sum() for _ in range(20000)]).mean()
    torch.testing.assert_close(module.penalty() / 0.1, drawn, atol=0.03, rtol=0)


def test_reftr1_moves_a_row_by_the_mean_of_its_top_latents():
    module = random_one("reftr1", top_k=2, l1=0.5).train()
    h, rows = torch.randn(7, D), torch.tensor([0, 0, 0, 0, 2, 5, 5])
    w = module.rotate_layer.weight[:, 0]
    assert abs(w.norm().item() - 1) < 1e-6
    edited, expected, rest = module(h, rows=rows), h.clone(), []
    for row in (0, 2, 5):
        latents = (h[rows == row] @ w).relu().sort(descending=True).values
        expected[rows == row] += latents[:2].mean() * w
        rest += latents[2:].tolist()
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.penalty(), 0.5 * torch.tensor(rest).mean(), atol=1e-6, rtol=1e-5)
    assert module.penalty() is None


class PullIntervention(Intervention):
    """Moves a state some way to a learned point."""

    def __init__(self, *, embed_dim, way=0.5, **settings):
        super().__init__(embed_dim=embed_dim, **settings)
        self.way = way
        self.point = torch.nn.Parameter(torch.zeros(embed_dim))

    @property
    def settings(self):
        return {**super().settings, "way": self.way}

    def edit(self, h):
        return self.way * (self.point - h)


def test_an_intervention_of_ones_own_is_saved_and_loaded(tmp_path):
    config = pyreft.ReftConfig(
        layers=[1], positions="l2", intervention=PullIntervention, intervention_kwargs={"way": 0.25}
    )
    adapted = shaken(pyreft.get_reft_model(tiny_llama(), config))
    ready = PullIntervention(embed_dim=32, way=0.25)
    ready.load_state_dict(next(iter(adapted.interventions.values())).state_dict())
    place = {"layer": 1, "component": "block_output", "positions": "l2", "intervention": ready}
    given = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(representations=place)).eval()
    ids = torch.randint(3, 96, (2, 9))
    expected = adapted(ids).logits
    assert torch.equal(given(ids).logits, expected)
    for number, model in enumerate((adapted, given)):
        model.save(tmp_path / str(number))
        del INTERVENTIONS["pull"]
        with pytest.raises(ReftError, match=r"expected one of loreft, .*got 'pull'.*interventions=.MyIntervention."):
            pyreft.ReftModel.load(tmp_path / str(number), tiny_llama())
        again = pyreft.ReftModel.load(tmp_path / str(number), tiny_llama(), interventions=[PullIntervention])
        assert torch.equal(again(ids).logits, expected)


def test_a_name_belongs_to_one_class():
    with pytest.raises(ReftError, match=r"the name 'pull' of .* belongs to .*give the class another"):
        pyreft.ReftConfig(intervention=type("PullIntervention", (Intervention,), {"__qualname__": "Other"}))
    with pytest.raises(ReftError, match=r"expected a subclass of pyreft.interventions.Intervention"):
        pyreft.ReftConfig(intervention=torch.nn.Linear)
    with pytest.raises(ReftError, match=r"l2: the intervention 'lofit' does not take it.*Did you mean 'l1'"):
        pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(intervention="lofit", intervention_kwargs={"l2": 1}))
