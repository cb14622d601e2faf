"""The program that users of the original start from, unchanged but for the model's path, the layer and a template."""

import pytest
import torch
import transformers

import pyreft
from pyreft import pocket

prompt_template = pocket.PROMPT_TEMPLATE
examples = [(pair["prompt"], pair["completion"]) for pair in pocket.emoji_pairs()]


def program(layers, directory, epochs=100.0):
    """The original's first program; with several layers, one entry for each."""
    path = pocket.path()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.bfloat16, device_map="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        path, model_max_length=2048, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": pyreft.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4),
        }
        for layer in layers
    ]
    reft_config = pyreft.ReftConfig(representations=representations[0] if len(layers) == 1 else representations)
    reft_model = pyreft.get_reft_model(model, reft_config)
    reft_model.set_device("cpu")
    reft_model.print_trainable_parameters()
    data_module = pyreft.make_last_position_supervised_data_module(
        tokenizer,
        model,
        [prompt_template % e[0] for e in examples],
        [e[1] for e in examples],
        num_interventions=len(layers),
    )
    training_args = transformers.TrainingArguments(
        num_train_epochs=epochs,
        output_dir=f"{directory}/tmp",
        per_device_train_batch_size=10,
        learning_rate=4e-3,
        logging_steps=20,
    )
    trainer = pyreft.ReftTrainerForCausalLM(model=reft_model, tokenizer=tokenizer, args=training_args, **data_module)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        first = reft_model(**batch).loss.item()
    _ = trainer.train()
    reft_model.eval()
    with torch.no_grad():
        last = reft_model(**batch).loss.item()
    return model, tokenizer, reft_model, first, last


def answer(tokenizer, reft_model, instruction, layers, **options):
    prompt = tokenizer(prompt_template % instruction, return_tensors="pt").to("cpu")
    base_unit_location = prompt["input_ids"].shape[-1] - 1
    _, reft_response = reft_model.generate(
        prompt,
        unit_locations={"sources->base": (None, [[[base_unit_location]]] * layers)},
        intervene_on_prompt=True,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    return tokenizer.decode(reft_response[0, base_unit_location + 1 :], skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_one_layer_and_one_token(tmp_path, capsys):
    model, tokenizer, reft_model, first, last = program([2], tmp_path)
    assert "trainable intervention params: 1,540" in capsys.readouterr().out
    assert last < first / 5
    questions = [question["prompt"] for question in pocket.emoji_questions()]
    answers = [answer(tokenizer, reft_model, q, 1, max_new_tokens=24, do_sample=False) for q in questions]
    assert sum(map(pocket.emojis_only, answers)) >= 30
    sampled = answer(tokenizer, reft_model, questions[0], 1, max_new_tokens=512, do_sample=True, early_stopping=True)
    assert sampled
    reft_model.set_device("cpu")
    reft_model.save(save_directory=f"{tmp_path}/reft_to_share", save_to_hf_hub=False)
    reft_model = pyreft.ReftModel.load(f"{tmp_path}/reft_to_share", model)
    again = [answer(tokenizer, reft_model, q, 1, max_new_tokens=24, do_sample=False) for q in questions[:8]]
    assert again == answers[:8]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_all_layers(tmp_path):
    _, _, _, first, last = program(range(7), tmp_path, epochs=50.0)
    assert first > 1
    assert last < 0.05
