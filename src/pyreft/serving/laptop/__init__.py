"""An engine on transformers alone: requests join a running batch between steps, each with an adapter of its own.

`scheduling` says who computes when, `side_by_side` computes rows in one batch, `slotted` edits them by slot, `sampling`
chooses tokens, `writing` makes text of them; `engine` puts these around a model. None of them knows HTTP.
"""
