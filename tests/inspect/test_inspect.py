"""Sizes, directions and likeness of edits: every number against one computed by hand."""

import pytest
import torch

import pyreft
from inspected import QUESTIONS, ROWS, place, tiny_gpt2, train_small
from pyreft import pocket
from pyreft.inspect import (
    compare_edits,
    edit_sizes,
    mean_edit_sizes,
    place_names,
    read_rows,
    record_edits,
    singular_directions,
    text_rows,
    written_directions,
)
from pyreft.inspect.directions import Unembedding
from pyreft.jobs.demo import DATA


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of an adapter that answers in emojis."""
    return train_small(tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture
def loaded(trained):
    model, tokenizer = pocket.load()
    return pyreft.ReftModel.from_pretrained(model, trained), tokenizer


class Captured:
    """h and h' of blocks: what a block itself computes, called past its hooks, and what comes out behind them."""

    def __init__(self, blocks):
        self.before, self.after, self.handles = {}, {}, []
        for number, block in enumerate(blocks):
            self.handles.append(block.register_forward_pre_hook(self.enter(number), with_kwargs=True))
            self.handles.append(block.register_forward_hook(self.leave(number)))

    def enter(self, number):
        def hook(block, args, kwargs):
            with torch.no_grad():
                out = type(block).forward(block, *args, **kwargs)
            self.before[number] = out[0] if isinstance(out, tuple) else out

        return hook

    def leave(self, number):
        def hook(block, args, out):
            self.after[number] = out[0] if isinstance(out, tuple) else out

        return hook


def test_sizes_of_a_trained_adapter_are_those_of_hooks(loaded):
    model, tokenizer = loaded
    rows = text_rows(tokenizer, QUESTIONS, "chat")
    recorded = record_edits(model, rows)
    captured = Captured(model.get_base_model().model.layers)
    for number, row in enumerate(rows):
        with torch.no_grad():
            model(input_ids=torch.tensor([row["input_ids"]]))
        sizes = edit_sizes(recorded, tokenizer, number)
        assert sizes.labels[-1] == "<|assistant|>"
        assert "".join(sizes.labels) == tokenizer.decode(row["input_ids"])
        assert [p.layer for p in sizes.places] == [1, 2, 3]
        for line, layer in enumerate([1, 2, 3]):
            h, edited = captured.before[layer][0], captured.after[layer][0]
            expected = (edited - h).norm(dim=-1)[-4:]
            assert expected.min() > 1
            torch.testing.assert_close(sizes.size[line, -4:], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(sizes.relative[line, -4:], expected / h.norm(dim=-1)[-4:], rtol=1e-4, atol=1e-4)
            assert sizes.size[line, :-4].isnan().all()
            assert sizes.relative[line, :-4].isnan().all()


EVERYWHERE = [
    place(0, "loreft", "f1+l2", low_rank_dimension=2),
    place(1, "red", "prompt", component="mlp_activation"),
    place(1, "lofit", "l1", component="head_attention_value_output", head=2),
    place(2, "reftr1", "l3"),
    place(2, "bias", "all"),
    place(2, "lora", "l1", component="attention_output", low_rank_dimension=2),
]


def test_every_formula_is_recorded_as_it_edits():
    model = tiny_gpt2(*EVERYWHERE)
    model.set_strength("default", 0.5)
    recorded = record_edits(model, ROWS, batch_size=2)
    assert [edits.place.index for edits in recorded.places] == list(range(6))
    counts = [min(len(row["input_ids"]), n) for row in ROWS for n in (3,)]
    assert [len(edits.rows) for edits in recorded.places] == [3 + 2 + 3, 15, 3, sum(counts), 15, 3]
    assert [edits.edit.shape[1] for edits in recorded.places] == [32, 128, 8, 32, 32, 32]
    for edits in recorded.places:
        (module,) = [m for i, m in enumerate(model.interventions.values()) if i == edits.place.index]
        if module.reads_input:
            continue  # see below
        context = {"rows": edits.rows} if module.by_row else {}
        expected = 0.5 * (module(edits.before, **context) - edits.before)
        torch.testing.assert_close(edits.edit, expected.detach(), rtol=1e-4, atol=1e-5)
    one_by_one = [record_edits(model, [row]) for row in ROWS]
    for number, edits in enumerate(recorded.places):
        alone = torch.cat([record.places[number].edit for record in one_by_one])
        torch.testing.assert_close(edits.edit, alone, rtol=1e-4, atol=1e-4)
    assert place_names([edits.place for edits in recorded.places]) == [
        "layer 0, block_output, f1+l2",
        "layer 1, mlp_activation, prompt",
        "layer 1, head_attention_value_output, head 2, l1",
        "layer 2, block_output, l3",
        "layer 2, block_output, all",
        "layer 2, attention_output, l1",
    ]


def test_a_formula_that_reads_the_input_is_recorded_as_it_edits():
    model = tiny_gpt2(EVERYWHERE[-1])
    (lora,), (edits,) = model.interventions.values(), record_edits(model, ROWS).places
    module, read = model.get_base_model().transformer.h[2].attn.c_proj, []
    with module.register_forward_hook(lambda module, args, output: read.append(args[0][0, -1])):
        for row in ROWS:
            model(input_ids=torch.tensor([row["input_ids"]]))
    expected = lora.scale * torch.stack(read) @ lora.A.weight.T @ lora.B.weight.T
    torch.testing.assert_close(edits.edit, expected.detach(), rtol=1e-4, atol=1e-5)
    directions, _ = singular_directions(edits.edit)
    assert len(directions) == 2  # its rank


def test_recording_leaves_the_model_as_it_was():
    model = tiny_gpt2(place(1, "loreft", low_rank_dimension=2, dropout=0.5)).train()
    edit = next(iter(model.interventions.values()))
    first, second = record_edits(model, ROWS), record_edits(model, ROWS)
    assert torch.equal(first.places[0].edit, second.places[0].edit)  # without dropout
    assert model.training
    assert edit.training
    assert not edit._forward_hooks
    model.get_base_model().transformer.h[0].eval()  # as all of a base model is that comes from the hub
    modes = [module.training for module in model.modules()]
    record_edits(model, ROWS)
    assert [module.training for module in model.modules()] == modes


def test_mean_sizes_count_from_the_nearer_end():
    model = tiny_gpt2(place(0, positions="f1+l2"), place(1, "red", "all"))
    rows = [{"input_ids": [5, 9, 40, 7, 31, 8], "labels": [-100] * 4 + [31, 8]}, ROWS[1]]
    recorded = record_edits(model, rows)
    mean = mean_edit_sizes(recorded)
    assert mean.labels == ["f1", "f2", "l2", "l1", "+1", "+2"]
    bias, red = (edits.edit.norm(dim=-1) for edits in recorded.places)
    assert [bool(cell) for cell in mean.size[0].isnan()] == [False, True, False, False, True, True]
    torch.testing.assert_close(mean.size[0][~mean.size[0].isnan()], bias[:1].expand(3))
    # the first row's prompt is of four tokens, f1 f2 l2 l1, the second one's of three, f1 l2 l1
    expected = [(red[0] + red[6]) / 2, red[1], (red[2] + red[7]) / 2, (red[3] + red[8]) / 2, red[4], red[5]]
    torch.testing.assert_close(mean.size[1], torch.stack(expected))


def test_a_short_prompt_counts_a_suffix_rule_from_its_end():
    recorded = record_edits(tiny_gpt2(place(0, positions="l4")), [{"input_ids": [4, 5, 6, 7]}])
    assert mean_edit_sizes(recorded).labels == ["l4", "l3", "l2", "l1"]
    recorded = record_edits(tiny_gpt2(place(0, positions="f4")), [{"input_ids": [4, 5, 6, 7]}])
    assert mean_edit_sizes(recorded).labels == ["f1", "f2", "f3", "f4"]


# -- directions -------------------------------------------------------------------------------------------------------


def test_singular_directions_by_hand():
    edit = torch.zeros(3, 4)
    edit[0, 1], edit[1, 1], edit[2, 3] = -3.0, -4.0, 2.0
    vectors, shares = singular_directions(edit)
    torch.testing.assert_close(vectors, torch.tensor([[0, -1.0, 0, 0], [0, 0, 0, 1.0]]))
    torch.testing.assert_close(shares, torch.tensor([25 / 29, 4 / 29]))
    assert [len(part) for part in singular_directions(torch.zeros(3, 4))] == [0, 0]


def test_a_bias_that_points_to_a_token_is_nearest_to_it():
    model, tokenizer = pocket.load()
    (token,) = tokenizer("🐳", add_special_tokens=False)["input_ids"]
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=place(3, positions="l1")))
    (module,) = adapted.interventions.values()
    row = model.get_output_embeddings().weight[token].detach()
    module.bias.data.copy_(row / model.model.norm.weight)  # what the last norm's scale turns into the token's row
    recorded = record_edits(adapted, text_rows(tokenizer, QUESTIONS))
    (written,) = written_directions(adapted, tokenizer, recorded, near=3)
    assert written.rank == 1
    (direction,) = written.directions
    assert direction.share == pytest.approx(1)
    assert direction.towards[0][0] == "🐳"
    assert direction.towards[0][1] == pytest.approx(1, abs=1e-4)
    assert direction.away[0][1] < direction.towards[0][1]


def test_the_last_norm_takes_the_mean_off_and_scales():
    base = tiny_gpt2(place(0)).get_base_model()
    vectors = torch.randn(2, 32)
    read = (vectors - vectors.mean(-1, keepdim=True)) * base.transformer.ln_f.weight
    rows = base.lm_head.weight[:90]
    expected = torch.nn.functional.cosine_similarity(read[:, None], rows[None], dim=-1)
    with torch.no_grad():
        torch.testing.assert_close(Unembedding(base).cosines(vectors, 90), expected, atol=1e-4, rtol=1e-4)


def test_a_low_rank_edit_writes_in_the_rows_of_r(loaded):
    model, tokenizer = loaded
    recorded = record_edits(model, read_rows(DATA, tokenizer))
    for written, module in zip(
        written_directions(model, tokenizer, recorded, count=4), model.interventions.values(), strict=True
    ):
        assert 1 <= written.rank <= 4
        assert sum(direction.share for direction in written.directions) == pytest.approx(1, abs=1e-4)
        basis = module.basis().detach()
        for direction in written.directions:
            assert (basis @ direction.vector).norm() == pytest.approx(1, abs=1e-3)
            assert len(direction.towards) == len(direction.away) == 8


def test_single_heads_are_read_behind_their_projection():
    tokenizer = pocket.load()[1]
    model = tiny_gpt2(
        place(1, component="head_attention_value_output", head=2, positions="l1"),
        place(1, component="query_output", positions="l1"),
    )
    head, query = written_directions(model, tokenizer, record_edits(model, ROWS))
    bias = next(iter(model.interventions.values())).bias.detach()
    into = bias @ model.get_base_model().transformer.h[1].attn.c_proj.weight[16:24]  # [inputs, outputs]
    torch.testing.assert_close(head.directions[0].vector, into.detach() / into.norm(), atol=1e-4, rtol=1e-4)
    assert head.directions[0].towards
    assert query.directions[0].share == pytest.approx(1)  # queries are no part of the residual stream
    assert query.directions[0].towards == query.directions[0].away == []


# -- comparison -------------------------------------------------------------------------------------------------------


def test_planes_at_a_known_angle():
    model = tiny_gpt2(place(1, "loreft", "prompt", low_rank_dimension=2))
    (module,) = model.interventions.values()
    axes, angle = torch.eye(32), torch.tensor(0.7)
    with torch.no_grad():
        module.rotate_layer.set_(axes[:, [0, 1]])
        first = record_edits(model, ROWS)
        module.rotate_layer.set_(torch.stack((axes[0], angle.cos() * axes[1] + angle.sin() * axes[2]), dim=1))
        second = record_edits(model, ROWS)
    (entry,) = compare_edits(first, second).places
    assert entry.ranks == (2, 2)
    torch.testing.assert_close(entry.angles, torch.tensor([0.0, float(angle.rad2deg())]), atol=0.05, rtol=1e-3)
    assert entry.overlap == pytest.approx((1 + float(angle.cos()) ** 2) / 2, abs=1e-4)
    assert entry.chance == 2 / 32
    edits = [record.places[0].edit for record in (first, second)]
    assert entry.cosine == pytest.approx(float(torch.cosine_similarity(*edits, dim=-1).mean()), abs=1e-5)
    assert entry.tokens == 15


def test_an_adapter_is_like_itself_and_nothing_like_its_opposite():
    model = tiny_gpt2(place(0, positions="f1"), place(0, positions="l1"), place(2, "red", "prompt"))
    first = record_edits(model, ROWS)
    for entry in compare_edits(first, first).places:
        assert entry.overlap == pytest.approx(1, abs=1e-4)
        assert entry.cosine == pytest.approx(1, abs=1e-4)
    assert len(compare_edits(first, first).places) == 2  # the two interventions of one place count as one
    with torch.no_grad():
        for module in list(model.interventions.values())[:2]:
            module.bias.neg_()
    entry = compare_edits(first, record_edits(model, ROWS)).places[0]
    assert entry.overlap == pytest.approx(1, abs=1e-4)
    assert entry.cosine == pytest.approx(-1, abs=1e-4)


def test_places_that_one_of_them_edits():
    first, second = tiny_gpt2(place(0), place(1)), tiny_gpt2(place(1, positions="f1"), place(2))
    compared = compare_edits(record_edits(first, ROWS), record_edits(second, ROWS))
    assert [entry.place.layer for entry in compared.places] == [1]
    assert compared.places[0].cosine is None  # they edit no token in common
    assert [p.layer for p in compared.only_first] == [0]
    assert [p.layer for p in compared.only_second] == [2]
    with pytest.raises(pyreft.ReftError, match="two records of the same rows"):
        compare_edits(record_edits(first, ROWS), record_edits(second, ROWS[:1]))
