"""An engine on transformers alone: requests join a running batch between steps, each with an adapter of its own.

`scheduler` says who computes when, `batch` computes rows side by side, `edits` edits them by slot, `sampling` chooses
tokens, `writing` makes text of them; `engine` puts these around a model. None of them knows HTTP.
"""
