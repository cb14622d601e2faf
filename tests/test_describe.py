"""What an adapter's directory tells without its model."""

import pyreft
from pyreft import pocket
from pyreft.describe import located_tokens


def ends_of_sentences(prompt, input_ids):
    """A rule that looks at the ids."""
    return input_ids == pocket.load()[1]("?", add_special_tokens=False)["input_ids"][-1]


def test_the_tokens_of_a_rule_of_ones_own(tmp_path):
    config = pyreft.ReftConfig(
        layers=1, positions=ends_of_sentences, low_rank_dimension=2, prompt_format="text", intervention="loreft"
    )
    pyreft.get_reft_model(pocket.load()[0], config).save(tmp_path)
    (tokens,) = located_tokens(tmp_path, "Why? Where?").values()
    assert [token["token"].strip() for token in tokens if token["edited"]] == ["?", "?"]
