"""Multiple choice: `[batch, choices, tokens]`, of which the model makes a row for each choice."""

import pytest
import torch
from transformers import AutoModelForMultipleChoice, BertConfig, RobertaConfig

import pyreft
from conftest import shaken

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.randint(3, 96, (3, 4, 7), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([[7, 4, 5, 7], [3, 7, 7, 6], [7, 7, 2, 7]])


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig])
@pytest.mark.parametrize("formula", ["lora", "loreft"])
@pytest.mark.parametrize("positions", ["all", "l2", "f1+l1", None])
@torch.no_grad()
def test_each_choice_is_edited_as_by_itself(config, formula, positions):
    model = AutoModelForMultipleChoice.from_config(config(**SIZES)).eval()
    torch.nn.init.normal_(model.classifier.weight)
    given = {"input_ids": IDS, "attention_mask": torch.arange(7) < LENGTHS[..., None]}
    plain = model(**given).logits
    model.add_adapter(pyreft.ReftConfig(intervention=formula, positions=positions, low_rank_dimension=2))
    shaken(model)
    together = model(**given, labels=torch.zeros(3, dtype=torch.long)).logits
    rows = zip(IDS.flatten(0, 1), LENGTHS.flatten(), strict=True)
    alone = [model(row[None, None, :length]).logits for row, length in rows]
    assert not torch.allclose(together, plain, atol=1e-2)
    # float32, of rows of other lengths
    torch.testing.assert_close(together, torch.cat(alone).view(3, 4), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.forward(**given).logits, together)
    embedded = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embedded, attention_mask=given["attention_mask"]).logits, together)
