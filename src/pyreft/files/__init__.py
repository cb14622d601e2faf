"""The files on disk: what an adapter's directory holds, file by file, and the module that reads each.

- `adapter_config.json`: which edits, where, and at which tokens, as a `ReftConfig`; or another method's of PEFT
  (`adapter`).
- `adapter_model.safetensors`: the numbers of the edits (`adapter`), and of heads trained beside them
  (`trained_heads`). PEFT can write `adapter_model.bin` instead.
- `README.md`: the model card, with the base model, and how to load and ask the adapter (`adapter`).
- `<name>/`: a further adapter of the same model, with the same files.
- `recipe.json`: the settings of the job that trained it, for evaluation, if it was one of a suite or a LoRA (`record`).
- `loss.csv`, `loss.png`: the losses of that job.
- `checkpoints/checkpoint-<steps>/`: an adapter as it was then; of the Trainer, `trainer_state.json`, `optimizer.pt`,
  `scheduler.pt` and `rng_state.pth`; of the job, `data.json` (`checkpoints`).
- `.saving-<random>/`, `.saved/`: a save under way, and one that is made and not yet in its place (`together`).

A checkpoint of the original has `config.json`, `intkey_<key>.bin` and perhaps `pytorch_model.bin` (`original`).

What one save writes is replaced together, all or nothing. A file that cannot be what it says is refused by its name and
the field or tensor in it (`text` for JSON, `pickles`, `tuner.values` for the numbers).
"""
