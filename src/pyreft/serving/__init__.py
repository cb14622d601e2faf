"""Many adapters in one engine: what an engine needs to know of an adapter, its slots, and the tokens of a step.

`served` reads a directory, `affine` writes each formula in the one form that slots hold, `tokens` finds the tokens
that a step edits, `bank` keeps the slots and edits (`fixed` for CUDA graphs), `catalog` knows names, `sources` where
adapters lie. None of these knows an engine; `vllm` binds them to one, `laptop` is another, with `api` before it, and
`fleet` makes one server of many.
"""
