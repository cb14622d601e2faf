"""Programs for pyreft 0.1.0 as its examples and other libraries have them, cut to what they ask of a model.

They run under 0.1.0 (with pyvene 0.1.8 and transformers 4.45.1) as they stand; what they answer there is in
`original/test_evaluations.py`.
"""

import sys
from pathlib import Path

import tokenizers
import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PreTrainedTokenizerFast

import pyreft

MODEL = Path(__file__).parent / "oracle" / "models" / "llama"
PROMPTS = ["w11 w5 w70 w34 w9 w9 w41", "w23 w8", "w90 w12 w55 w31", "w77 w41 w16 w28 w63"]


def a_tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 96)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, padding_side="right", **special)


def base():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


def filled(intervention, seed, size=2.0):
    """Give an intervention parameters that are the same under every version of torch and of the library."""
    draw = torch.Generator().manual_seed(seed)
    d, r = intervention.rotate_layer.weight.shape
    R, _ = torch.linalg.qr(torch.randn(d, r, generator=draw, dtype=torch.float64))
    with torch.no_grad():
        if hasattr(intervention.rotate_layer, "set_"):  # here R is a function of what is learned
            intervention.rotate_layer.set_(R.float())
        else:
            intervention.rotate_layer.weight = R.float()
        intervention.learned_source.weight.copy_(size * torch.randn(r, d, generator=draw) / d**0.5)
        intervention.learned_source.bias.copy_(torch.randn(r, generator=draw))
    return intervention.eval()


def wrapped(model, layers, cls=pyreft.LoreftIntervention, rank=4, **settings):
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": rank,
            "intervention": filled(
                cls(embed_dim=32, low_rank_dimension=rank, dtype=torch.float32, **settings), seed=number
            ),
        }
        for number, layer in enumerate(layers)
    ]
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)


class Prompts(pyreft.ReftDataset):
    """The test split of the paper's data sets: prompts without answers."""

    def preprocess(self, kwargs):
        self.fields_to_pad = ["input_ids"]

    def tokenize(self, data_item):
        ids = self.tokenizer(data_item["instruction"], return_tensors="pt")["input_ids"][0]
        return {"input_ids": ids}, len(ids)


def evaluation(num_beams, position="f2+l2", share_weights=False):
    """`examples/loreft/compute_metrics.py`: padding on the left, and locations that the program shifts itself."""
    tokenizer, layers = a_tokenizer(), [0, 2] if share_weights else [0, 2, 0, 2]
    intervenable = wrapped(base(), layers)
    rows = [{"instruction": prompt} for prompt in PROMPTS]
    how = {"num_interventions": len(layers), "position": position, "share_weights": share_weights}
    dataset = Prompts("prompts", None, tokenizer, data_split="test", dataset=rows, **how)
    tokenizer.padding_side = "left"
    collator = pyreft.ReftDataCollator(
        data_collator=DataCollatorForSeq2Seq(
            tokenizer=tokenizer, model=intervenable.model, label_pad_token_id=-100, padding="longest", max_length=2048
        )
    )
    answers = {}
    for inputs in torch.utils.data.DataLoader(dataset, shuffle=False, batch_size=3, collate_fn=collator):
        locations = inputs["intervention_locations"].permute(1, 0, 2)
        left_padding = (inputs["input_ids"] == tokenizer.bos_token_id).nonzero(as_tuple=True)[1]
        locations = locations + left_padding.reshape(1, -1, 1) - 1
        _, tokens = intervenable.generate(
            base={"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]},
            unit_locations={"sources->base": (None, locations.repeat_interleave(num_beams, dim=1).tolist())},
            intervene_on_prompt=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            early_stopping=num_beams > 1,
            num_beams=num_beams,
            max_new_tokens=6,
            do_sample=False,
        )
        width = inputs["input_ids"].shape[1]
        answers.update(zip(inputs["id"].tolist(), tokens[:, width:].tolist(), strict=True))
    return [answers[number] for number in range(len(PROMPTS))]


class SubloreftIntervention(pyreft.LoreftIntervention):
    """`examples/composition`: directions by row, each with a coefficient."""

    def __init__(self, **kwargs):
        self.subspace_coeff = torch.tensor(kwargs.pop("subspace_coeff", [1.0] * kwargs["low_rank_dimension"]))
        super().__init__(**kwargs)

    def forward(self, base, source=None, subspaces=None, **kwargs):
        assert subspaces is not None
        diff = self.act_fn(self.learned_source(base)) - self.rotate_layer(base)
        batched_subspace, batched_weights = [], []
        for row in range(len(diff)):
            batched_subspace += [diff[row, :, subspaces[row]] * self.subspace_coeff[subspaces[row]]]
            batched_weights += [self.rotate_layer.weight[..., subspaces[row]].T]
        output = base + torch.bmm(torch.stack(batched_subspace), torch.stack(batched_weights))
        return self.dropout(output.to(base.dtype))


def composition():
    """`compreft.ipynb` and `neg_reft_all.ipynb`: one direction or another, all, none, and against them."""
    tokenizer, model = a_tokenizer(), base()
    reft_model = wrapped(model, [1, 2], SubloreftIntervention, init_orth=True)
    prompt = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    last = prompt["input_ids"].shape[-1] - 1
    answers = []

    def ask(subspaces, locations):
        _, tokens = reft_model.generate(
            prompt,
            unit_locations=locations,
            subspaces=subspaces,
            intervene_on_prompt=True,
            max_new_tokens=6,
            do_sample=False,
            no_repeat_ngram_size=5,
            repetition_penalty=1.1,
            pad_token_id=0,
        )
        answers.append(tokens[0, last + 1 :].tolist())

    at_last = {"sources->base": (None, [[[last]]] * 2)}
    for directions in ([0, 1], [2, 3], [0, 1, 2, 3]):
        ask([[directions]] * 2, at_last)
    losses = []
    for coefficient in (0.0, 1.0, -1.0):
        for intervention in reft_model.interventions.values():
            intervention.subspace_coeff = coefficient * torch.ones(4)
        ask([[[0, 1, 2, 3]]] * 2, at_last)
        inputs = {name: prompt[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            for locations in (None, {"sources->base": (None, [[[0]]] * 2)}):
                _, output = reft_model(
                    inputs, unit_locations=locations, labels=prompt["input_ids"], subspaces=[[[0, 1, 2, 3]]] * 2
                )
                losses.append(round(output.loss.item(), 4))
    return answers, losses


def preferences():
    """`examples/dpo`: the policy is the edited model, the reference `reft_model.model`, the base; one loss."""
    tokenizer, model = a_tokenizer(), base()
    reft_model = wrapped(model, [1, 3])
    prompts, answers = PROMPTS[:2], [["w4 w5", "w6 w7"], ["w8 w9", "w10 w11"]]
    module = pyreft.make_multiple_position_supervised_data_module(
        tokenizer, model, prompts, [chosen for chosen, _ in answers], "f1+l1", 2, share_weights=True
    )
    locations = [list(row) for row in module["train_dataset"]["intervention_locations"]]
    texts = [f"{p} {pair[side]}" for side in (0, 1) for p, pair in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    lengths = [len(tokenizer(p)["input_ids"]) for p in prompts] * 2
    places = torch.tensor(locations + locations).transpose(0, 1).tolist()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        reference = reft_model.model(**inputs, use_cache=False).logits
        _, output = reft_model(inputs, unit_locations={"sources->base": (None, places)}, use_cache=False)
    sums = []
    for logits in (output.logits, reference):
        spoken = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        sums.append(torch.stack([spoken[row, length - 1 : length + 1].sum() for row, length in enumerate(lengths)]))
    margin = (sums[0] - sums[1])[:2] - (sums[0] - sums[1])[2:]
    loss = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
    return [round(value, 4) for value in (*sums[0].tolist(), *sums[1].tolist(), loss.item())]


def by_hooks():
    """As ms-swift wraps it: hooks turn a call by names into the original's, and its pair into the edited output."""
    tokenizer, model = a_tokenizer(), base()
    reft_model = wrapped(model, [1, 3])
    batch = tokenizer(PROMPTS[:1], return_tensors="pt", return_token_type_ids=False)

    def before(module, args, kwargs):
        names = ("input_ids", "attention_mask")
        inputs = {name: kwargs[name] for name in names}
        return args, {"base": inputs, "unit_locations": None, "labels": kwargs["labels"], "use_cache": False}

    handles = [
        reft_model.register_forward_pre_hook(before, with_kwargs=True),
        reft_model.register_forward_hook(lambda module, args, output: output[1]),
    ]
    with torch.no_grad():
        output = reft_model(**batch, labels=batch["input_ids"])
    for handle in handles:
        handle.remove()
    _, tokens = reft_model.generate(
        base=dict(batch),
        unit_locations=None,
        intervene_on_prompt=True,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    return round(output.loss.item(), 4), tokens[0, batch["input_ids"].shape[1] :].tolist()


def steering(bases):
    """As AxBench does: a class on pyvene's three, with one vector for each concept, chosen and sized by `subspaces`.

    Args:
        bases: pyvene's three classes, or ours by the same names.
    """

    class AdditionIntervention(*bases):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, keep_last_dim=True)
            self.proj = torch.nn.Linear(self.embed_dim, kwargs["low_rank_dimension"])

        def forward(self, base, source=None, subspaces=None):
            vectors = self.proj.weight[subspaces["idx"]]
            sized = subspaces["max_act"].unsqueeze(-1) * subspaces["mag"].unsqueeze(-1) * vectors
            return base + sized.unsqueeze(dim=1)

    tokenizer, model = a_tokenizer(), base()
    intervention = AdditionIntervention(embed_dim=32, low_rank_dimension=3)
    with torch.no_grad():
        intervention.proj.weight.copy_(torch.randn(3, 32, generator=torch.Generator().manual_seed(7)))
    places = [
        {"layer": 2, "component": "model.layers[2].output", "low_rank_dimension": 3, "intervention": intervention}
    ]
    ax_model = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=places), set_device=False)
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    chosen = {"idx": torch.tensor([0, 1, 2, 0]), "mag": torch.tensor([1.0, 2.0, 3.0, 0.0]), "max_act": torch.ones(4)}
    with torch.no_grad():
        _, tokens = ax_model.generate(
            batch,
            unit_locations=None,
            intervene_on_prompt=True,
            subspaces=[chosen],
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )
        _, output = ax_model(dict(batch), unit_locations=None, subspaces=[chosen])
    return tokens[:, batch["input_ids"].shape[1] :].tolist(), round(output.logits[:, -1].sum().item(), 3)


def first(intervention):
    """Of the pair that an earlier pyvene gave; 0.1.8 gives the intervention alone."""
    return intervention[0] if hasattr(intervention, "__getitem__") else intervention


def concepts(bases):
    """As AxBench does: what LoReFT has learned is read from `state_dict` and asked of a class for many concepts.

    Args:
        bases: pyvene's three classes, or ours by the same names.
    """

    class ConceptReFTIntervention(*bases):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, keep_last_dim=True)
            shape = kwargs["n_concepts"], self.embed_dim, kwargs["low_rank_dimension"]
            self.W_proj = torch.nn.Parameter(torch.zeros(shape))
            self.W_source = torch.nn.Parameter(torch.zeros(shape))
            self.b_source = torch.nn.Parameter(torch.zeros(shape[0], shape[2]))

        def forward(self, base, source=None, subspaces=None):
            proj, weight = self.W_proj[subspaces["idx"]], self.W_source[subspaces["idx"]]
            learned = torch.bmm(base, weight) + self.b_source[subspaces["idx"]].unsqueeze(dim=1)
            edit = torch.bmm(learned - torch.bmm(base.float(), proj), proj.transpose(-1, -2))
            return (base + edit).to(base.dtype)

    tokenizer, model = a_tokenizer(), base()
    learned = wrapped(model, [1, 2])
    module = pyreft.make_multiple_position_supervised_data_module(
        tokenizer, model, PROMPTS, [" w4 w5"] * len(PROMPTS), "f1+l1", 2, nonstop=True, share_weights=True
    )
    batch = next(iter(torch.utils.data.DataLoader(module["train_dataset"], 4, collate_fn=module["data_collator"])))
    _, output = learned.forward(
        base={name: batch[name] for name in ("input_ids", "attention_mask")},
        unit_locations={"sources->base": (None, batch["intervention_locations"].permute(1, 0, 2).tolist())},
        labels=batch["labels"],
        use_cache=False,
    )
    states = {name: first(intervention).state_dict() for name, intervention in learned.interventions.items()}
    places = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": ConceptReFTIntervention(n_concepts=2, embed_dim=32, low_rank_dimension=4),
        }
        for layer in (1, 2)
    ]
    model = base()
    reft_model = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=places), set_device=False)
    for name, intervention in reft_model.interventions.items():
        state = states[name]
        first(intervention).W_proj.data = torch.stack([state["rotate_layer"], state["rotate_layer"] * 0])
        first(intervention).W_source.data = torch.stack([state["weight"].T, state["weight"].T * 0])
        first(intervention).b_source.data = torch.stack([state["bias"], state["bias"] * 0])
    tokenizer.padding_side = "left"
    prompts = tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    begin = (prompts["attention_mask"] == 0).sum(-1)
    at = torch.stack([begin, torch.full_like(begin, prompts["input_ids"].shape[1] - 1)], dim=-1)
    _, tokens = reft_model.generate(
        dict(prompts),
        unit_locations={"sources->base": (None, [at.tolist()] * 2)},
        intervene_on_prompt=True,
        subspaces=[{"idx": torch.tensor([0, 1, 0, 1])}] * 2,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens[:, prompts["input_ids"].shape[1] :].tolist(), round(output.loss.item(), 4)


if __name__ == "__main__":
    import pyvene

    kinds = ("SourcelessIntervention", "TrainableIntervention", "DistributedRepresentationIntervention")
    runs = {
        "evaluation of one beam": lambda: evaluation(1),
        "evaluation of four beams": lambda: evaluation(4),
        "evaluation with shared weights": lambda: evaluation(4, "f3+l1", share_weights=True),
        "composition": composition,
        "preferences": preferences,
        "by hooks": by_hooks,
        "steering": lambda: steering([getattr(pyvene, kind) for kind in kinds]),
        "concepts": lambda: concepts([getattr(pyvene, kind) for kind in kinds]),
    }
    for run in sys.argv[1:] or runs:
        print(run, runs[run]())
