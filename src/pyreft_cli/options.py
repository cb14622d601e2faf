"""The options that commands share, and the many of a training: each with its type, its help and its limits.

What an option is called, a command's parameter says; so does its default, but for settings of a job: these have none
here, as a file may say them, and the help names the library's.
"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pyreft.files.online import on_disk  # without torch, transformers or PEFT

# of every command
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print nothing but results and errors.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON, and nothing else.")]


# of an adapter, and of its answers
Adapter = Annotated[str, Argument(help="The adapter's directory, or owner/name on the hub.", callback=on_disk)]
Evaluated = Annotated[
    str,
    Argument(
        help="The adapter's directory, or owner/name on the hub; of GLUE perhaps a directory with all its adapters.",
        callback=on_disk,
    ),
]
AdapterOption = Annotated[str, Option(help="The adapter's directory, or owner/name on the hub.", callback=on_disk)]
AdapterModel = Annotated[
    str | None,
    Option(help="Base model: a hub id, a directory, or smollm2; by default the one the adapter was made for."),
]
MaxNewTokens = Annotated[int, Option(help="The most tokens of an answer.", min=1)]
Temperature = Annotated[float, Option(help="0 takes the likeliest tokens; above, tokens are drawn.", min=0)]
DrawingSeed = Annotated[int, Option(help="Seed for drawn tokens.", min=0, max=2**32 - 1)]

# of a training: what is learned from what
Recipe = Annotated[
    str | None,
    Argument(help="A recipe of the paper: commonsense, arithmetic, instruct, glue, or a YAML file like them."),
]
Data = Annotated[
    str | None,
    Option(
        help="Examples as .jsonl, .json, .csv or .parquet, or a data set of the hub as owner/name, with prompt and "
        "completion; instruction, input and output; or chat messages."
    ),
]
Output = Annotated[str | None, Option(help="The directory for the adapter.")]
Model = Annotated[
    str | None, Option(help="Base model: a hub id, a directory, or smollm2; by default the embedded one.")
]
DataDir = Annotated[str | None, Option(help="Of a recipe: the directory of its data.  [default: the hub]")]
Task = Annotated[str | None, Option(help="Of the recipe glue: one task.  [default: each, one after the other]")]
Turns = Annotated[
    str | None,
    Option(help="Of a chat, learn 'each' answer behind what comes before it, or the 'last'.  [default: each]"),
]
PromptField = Annotated[str | None, Option(help="The column of the prompts, if it has another name.")]
CompletionField = Annotated[str | None, Option(help="The column of the answers, if it has another name.")]
Encoding = Annotated[
    str | None, Option(help="Of the data, such as cp1252.  [default: UTF-8, or as its first bytes say]")
]
OnError = Annotated[str | None, Option(help="At wrong rows 'stop', or 'skip' them.  [default: stop]")]
LongRows = Annotated[
    str | None,
    Option(
        help="Rows that do not fit: 'refuse' them, 'cut' their prompts from the left, or 'skip'.  [default: refuse]"
    ),
]
Limit = Annotated[int | None, Option(help="Train on the first so many rows, or examples of a recipe.")]
MaxLength = Annotated[int | None, Option(help="Most tokens of a row.  [default: the model's context]")]
Format = Annotated[
    str | None,
    Option(
        help="How prompts are written: 'text' as they stand, 'chat' in the tokenizer's chat template, 'alpaca'.  "
        "[default: as the data says, else chat if there is a template]"
    ),
]
Validation = Annotated[str | None, Option(help="A file of examples to measure the loss on.")]
ValidationSplit = Annotated[float | None, Option(help="Or the share of the data to hold out for it.")]
Best = Annotated[
    bool | None, Option("--best", help="Keep the epoch with the lowest validation loss.  [default: the last]")
]
EarlyStopping = Annotated[
    int | None, Option(help="End after so many epochs in a row without a lower validation loss; includes --best.")
]
Dtype = Annotated[str | None, Option(help="Of the base model: float32, bfloat16, float16 or auto.")]

# of a training: the adapter
Method = Annotated[
    str | None,
    Option(help="loreft, direft (of the paper), or lora, PEFT's at every token, to compare with."),
]
Layers = Annotated[str | None, Option(help="'all', or numbers such as '3;9;18'.  [default: all]")]
Positions = Annotated[str | None, Option(help="Tokens to edit: f<n>, l<n>, f<n>+l<m>, prompt or all.  [default: l16]")]
Rank = Annotated[int | None, Option(help="Rank of the edits.  [default: 1 of the formula lora, 8 of others]")]
Alpha = Annotated[float | None, Option(help="LoRA's scale.  [default: 16; of the formula lora, twice the rank]")]
TargetModules = Annotated[
    str | None, Option(help="What the method lora adapts, as 'q_proj;v_proj'.  [default: what PEFT knows of the model]")
]
Component = Annotated[
    str | None,
    Option(
        help="States to edit, one name or several.  [default: value_output,attention_output; of another formula than "
        "lora, block_output]"
    ),
]
Intervention = Annotated[
    str | None,
    Option(
        help="The formula of the edit: loreft, noreft, consreft, lobireft, direft, nodireft, red, bias, reftr1, "
        "road, lofit, jola or lora, which is LoRA at these tokens alone.  [default: lora; beside --component, loreft]"
    ),
]
ShareWeights = Annotated[
    bool | None,
    Option("--share-weights/--no-share-weights", help="One edit for first and last tokens.  [default: share]"),
]
Dropout = Annotated[
    float | None,
    Option(help="Dropout on the edit.  [default: 0 beside a formula or component, else 0.3]"),
]

# of a training: how it goes
Epochs = Annotated[float | None, Option(help="Passes over the data.  [default: 10]")]
LearningRate = Annotated[
    float | None,
    Option(help="Learning rate.  [default: 0.001; for the formula lora 0.008, less beyond a width of 576 or rank 4]"),
]
BatchSize = Annotated[int | None, Option(help="Examples in a batch.  [default: 8]")]
GradientAccumulation = Annotated[int | None, Option(help="Batches in a step.  [default: 1]")]
WarmupRatio = Annotated[float | None, Option(help="Share of the steps to warm up.  [default: 0]")]
LrSchedulerType = Annotated[
    str | None,
    Option(
        help="The rate after that: constant, linear or cosine.  [default: constant for the formula lora, else linear]"
    ),
]
AdamBeta1 = Annotated[
    float | None,
    Option(help="Adam's momentum; with less, small models may learn in fewer steps at a higher rate.  [default: 0.9]"),
]
WeightDecay = Annotated[float | None, Option(help="Weight decay.  [default: 0]")]
Seed = Annotated[int | None, Option(help="Seed.  [default: 42]")]
Reach = Annotated[
    bool | None,
    Option("--reach/--no-reach", help="Compute only what the edits can reach.  [default: where it is exact]"),
]
ReachMemory = Annotated[
    str | None, Option(help="How much may be held of the rest, as 4GB.  [default: half of the free memory]")
]
ReachDirectory = Annotated[str | None, Option(help="Where to put what does not fit into it.")]
SaveSteps = Annotated[int | None, Option(help="Steps between checkpoints.  [default: a tenth of the training]")]
PushToHub = Annotated[
    str | None, Option(help="Upload the adapter to this repository of the hub, owner/name; a new one is private.")
]
ReportTo = Annotated[
    str | None, Option(help="A logger that is installed: tensorboard, trackio, wandb, ...  [default: none]")
]
Resume = Annotated[bool | None, Option("--resume", help="Go on from the last checkpoint in the output.")]
Overwrite = Annotated[bool | None, Option("--overwrite", help="Replace the adapter in the output.")]
Config = Annotated[Path | None, Option(help="A YAML file with any of the options above; those given here win.")]
