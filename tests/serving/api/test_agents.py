"""openai-agents with a tool: the call comes back through the server. Slow: an adapter is taught to call it."""

import shutil
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyreft
from pyreft import pocket

pytestmark = pytest.mark.slow
agents = pytest.importorskip("agents", reason="the client is not installed: pip install openai-agents")
openai = pytest.importorskip("openai")

TEMPLATE = """{{ bos_token }}{% if tools %}<|user|>{% for tool in tools %}{{ tool.function.name }}{% endfor %}
{%- endif %}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message.tool_calls %}
{%- for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- else %}{{ message['content'] }}{% endif %}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
QUESTION = {"role": "user", "content": "How is the weather in Paris?"}
FUNCTION = {"name": "weather", "arguments": {"city": "Paris"}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
TURNS = [
    ([QUESTION], CALL),
    (
        [
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}]},
            {"role": "tool", "content": "sunny"},
        ],
        "It is sunny.",
    ),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model whose template takes tools, and an adapter that calls the one and tells what came of it."""
    from served import Running

    root = tmp_path_factory.mktemp("agents")
    base = root / "base"
    shutil.copytree(pocket.path(), base)
    Path(base, "chat_template.jinja").write_text(TEMPLATE)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    rows = []
    for messages, answer in TURNS:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        rest = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((torch.tensor([prompt + rest]), torch.tensor([[-100] * len(prompt) + rest])))
    adapted = pyreft.get_reft_model(
        model, pyreft.ReftConfig(positions="all", low_rank_dimension=8, intervention="loreft")
    )
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    for _ in range(150):
        loss = sum(adapted(input_ids=ids, labels=labels).loss for ids, labels in rows)
        if float(loss.detach()) < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted.eval().save_pretrained(str(root / "adapters" / "agent"))
    made = Running(root / "adapters", root / "store", model=str(base), name="base")
    yield made
    made.stop()


@agents.function_tool
def weather(city: str) -> str:
    """Say how the weather is in a city."""
    assert city == "Paris"
    return "sunny"


async def _ask(served, kind, streamed):
    client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", http_client=httpx.AsyncClient())
    model = getattr(agents, kind)(model="agent", openai_client=client)
    agent = agents.Agent(name="forecaster", model=model, tools=[weather])
    if not streamed:
        return await agents.Runner.run(agent, QUESTION["content"])
    running = agents.Runner.run_streamed(agent, QUESTION["content"])
    async for _ in running.stream_events():
        pass
    return running


@pytest.mark.parametrize("kind", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_calls_its_tool_and_tells_what_came_of_it(served, kind, streamed):
    import asyncio

    agents.set_tracing_disabled(True)
    found = asyncio.run(_ask(served, kind, streamed))
    assert found.final_output == "It is sunny."
    assert [type(item).__name__ for item in found.new_items] == [
        "ToolCallItem",
        "ToolCallOutputItem",
        "MessageOutputItem",
    ]
