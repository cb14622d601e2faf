"""Many adapters in one engine of stock vLLM: a plug-in, found by its entry points.

`models` makes the model classes, `batch` and `model_state` say which request has which row of the batch, `scheduler`
keeps cached prompts apart, `front` and `routes` are what clients see. What is no documented interface of vLLM is used
in `private` alone. Importing this package imports neither vLLM nor torch.
"""
