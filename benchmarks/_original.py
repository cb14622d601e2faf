"""A training step of the original pyreft 0.1.0, run by its own interpreter: a line of JSON in, a line out.

The first line says what to train; then each `"step"` makes a step and each `"peak"` measures the memory of one.
"""

import json
import sys
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pyreft
from _memory import peak_bytes


def answer(what):
    print(json.dumps({"answer": what}), flush=True)


def main():
    told = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    torch.set_num_threads(2)
    sizes, prompt, layers = told["sizes"], told["prompt"], told["layers"]
    heads = sizes["hidden_size"] // 64
    base = LlamaForCausalLM(LlamaConfig(num_attention_heads=heads, max_position_embeddings=8192, **sizes))
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": told["rank"],
            "intervention": pyreft.LoreftIntervention(
                embed_dim=sizes["hidden_size"], low_rank_dimension=told["rank"], dtype=torch.float32
            ),
        }
        for layer in layers
    ]
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))
    model.train()
    draw = torch.Generator().manual_seed(prompt)
    ids = torch.randint(5, sizes["vocab_size"], (told["batch"], prompt + told["answer"]), generator=draw)
    labels = ids.clone()
    labels[:, :prompt] = -100
    where = pyreft.get_intervention_locations(
        last_position=prompt,
        num_interventions=len(layers),
        share_weights=True,
        **dict(zip(("first_n", "last_n"), pyreft.parse_positions(told["positions"]), strict=True)),
    )
    locations = [[layer] * told["batch"] for layer in where]
    optimizer = torch.optim.AdamW([p for p in model.get_trainable_parameters() if p.requires_grad], lr=1e-3)

    def step():
        _, output = model(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            unit_locations={"sources->base": (None, locations)},
            labels=labels,
        )
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    answer({name: version(name) for name in ("pyreft", "pyvene", "torch", "transformers")})
    for line in sys.stdin:
        answer(peak_bytes(step) if json.loads(line) == "peak" else step())


if __name__ == "__main__":
    main()
