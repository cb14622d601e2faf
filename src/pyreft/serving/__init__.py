"""Many adapters in one engine: what an engine needs to know of an adapter, its slots, and the tokens of a step.

`adapter` reads a directory, `affine` writes each formula in the one form that slots hold, `bank` keeps the slots,
`plan` finds the tokens that a step edits, `catalog` knows names. None of these knows an engine; `vllm` binds them to
one.
"""
