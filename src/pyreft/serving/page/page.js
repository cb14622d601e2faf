// A chat with one model beside another. Every request goes to the server that this page comes from.

const $ = (id) => document.getElementById(id);
const NONE = "";
const sides = ["left", "right"].map((name) => ({
  name,
  select: $(name),
  title: $(`${name}-name`),
  log: $(`${name}-turns`),
  turns: [],
  model: null,
}));
let base = null;
let running = null; // stops the answers that come

function headers() {
  const key = $("key").value;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

async function problemOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

async function loadModels() {
  const answer = await fetch("/v1/models", { headers: headers() });
  if (answer.status === 401) {
    $("key-label").hidden = false;
    complain($("key").value ? "This key is not known." : "This server wants an API key.");
    return;
  }
  if (!answer.ok) return complain(await problemOf(answer));
  const { data } = await answer.json();
  complain("");
  base = data.find((model) => model.parent === null)?.id ?? null;
  const names = data.map((model) => model.id);
  const before = sides.map((side) => side.select.value);
  sides.forEach((side, number) => {
    const options = names.map((name) => new Option(name === base ? `${name} (base)` : name, name));
    if (number === 1) options.push(new Option("nothing", NONE));
    side.select.replaceChildren(...options);
  });
  const adapter = names.find((name) => name !== base) ?? names[0];
  const wanted = [adapter, base ?? NONE];
  sides.forEach((side, number) => {
    const kept = before[number] && names.includes(before[number]) ? before[number] : wanted[number];
    side.select.value = kept ?? NONE;
    choose(side);
  });
}

function choose(side) {
  if (side.model !== side.select.value) {
    side.model = side.select.value;
    side.turns = [];
    side.log.replaceChildren();
  }
  side.title.textContent = side.model || "nothing";
  side.title.parentElement.hidden = side.model === NONE;
  showCurl();
}

function strength() {
  return Number($("strength").value);
}

function bodyFor(side, turns, stream) {
  return {
    model: side.model,
    messages: turns,
    max_tokens: Math.max(1, Math.floor(Number($("tokens").value) || 1)),
    temperature: Number($("temperature").value) || 0,
    ...(side.model === base || strength() === 1 ? {} : { reft_strength: strength() }),
    ...(stream ? { stream: true, stream_options: { include_usage: true } } : {}),
  };
}

function showCurl() {
  const last = $("message").value || "Hello";
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = sides
    .filter((side) => side.model)
    .map((side) => {
      const known = side.turns.filter((turn) => turn.content);
      const turns = known.length ? known.slice(0, known.at(-1).role === "assistant" ? -1 : undefined) : [];
      const body = bodyFor(side, turns.length ? turns : [{ role: "user", content: last }], false);
      const key = $("key").value ? ` -H "authorization: Bearer $KEY"` : "";
      return `curl ${location.origin}/v1/chat/completions -H "content-type: application/json"${key} -d ${quoted(JSON.stringify(body))}`;
    });
  $("curl").textContent = lines.join("\n");
}

function addTurn(side, role, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  for (const part of ["who", "text", "figures"]) {
    const element = document.createElement("div");
    element.className = part;
    turn.append(element);
  }
  turn.children[0].textContent = role === "user" ? "You" : side.model;
  turn.children[1].textContent = text;
  side.log.append(turn);
  side.log.scrollTop = side.log.scrollHeight;
  return { text: turn.children[1], figures: turn.children[2] };
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

async function answer(side, message, signal) {
  side.turns.push({ role: "user", content: message });
  addTurn(side, "user", message);
  const shown = addTurn(side, "assistant", "");
  const began = performance.now();
  let text = "";
  let usage = null;
  let stopped = false;
  side.log.setAttribute("aria-busy", "true"); // read out when it is whole, not at every token
  try {
    const got = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(bodyFor(side, side.turns, true)),
      signal,
    });
    if (!got.ok) throw new Error(await problemOf(got));
    for await (const event of events(got)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      text += event.choices[0]?.delta.content ?? "";
      const following = side.log.scrollTop + side.log.clientHeight > side.log.scrollHeight - 40;
      shown.text.textContent = text;
      if (following) side.log.scrollTop = side.log.scrollHeight;
    }
  } catch (error) {
    stopped = error.name === "AbortError";
    if (!stopped) {
      side.turns.pop();
      shown.figures.textContent = `Not answered: ${error.message}`;
      return;
    }
  } finally {
    side.log.setAttribute("aria-busy", "false");
  }
  side.turns.push({ role: "assistant", content: text });
  const seconds = (performance.now() - began) / 1000;
  const speed = usage ? `${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(1)} a second, ` : "";
  const read = usage ? `, ${usage.prompt_tokens} read` : "";
  shown.figures.textContent = `${speed}${seconds.toFixed(2)} s${read}${stopped ? ", stopped" : ""}`;
}

async function showTokens(side) {
  const turns = side.turns.filter((turn, number) => number < side.turns.length - 1 || turn.role === "user");
  if (!turns.length) return null;
  const got = await fetch("/v1/located_tokens", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify({ model: side.model, messages: turns }),
  });
  if (!got.ok) return null;
  const found = await got.json();
  const part = document.createElement("div");
  const title = document.createElement("h3");
  const count = found.tokens.filter((token) => token.edited).length;
  title.textContent = `${side.model}: ${count} of ${found.tokens.length} tokens are edited${found.answer_edited ? ", and all of the answer" : ""}`;
  part.append(title);
  for (const token of found.tokens) {
    const element = document.createElement(token.edited ? "mark" : "span");
    element.textContent = token.edited ? `[${token.token}]` : token.token;
    part.append(element, " ");
  }
  return part;
}

async function ask(message) {
  running = new AbortController();
  const { signal } = running;
  complain("");
  $("send").hidden = true;
  $("stop").hidden = false;
  $("status").textContent = "The answers are on their way.";
  const asked = sides.filter((side) => side.model);
  try {
    await Promise.all(asked.map((side) => answer(side, message, signal)));
    const parts = await Promise.all(asked.filter((side) => side.model !== base).map(showTokens));
    $("prompt-tokens").replaceChildren(...parts.filter(Boolean));
  } finally {
    running = null;
    $("send").hidden = false;
    $("stop").hidden = true;
    $("status").textContent = "The answers are here.";
    showCurl();
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const message = $("message").value.trim();
  if (!message || running) return;
  $("message").value = "";
  ask(message);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("message").addEventListener("input", showCurl);
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  for (const side of sides) {
    side.turns = [];
    side.log.replaceChildren();
  }
  $("prompt-tokens").replaceChildren();
  showCurl();
  $("message").focus();
});
$("strength").addEventListener("input", () => {
  $("strength-value").textContent = strength().toFixed(1);
  showCurl();
});
for (const side of sides) side.select.addEventListener("change", () => choose(side));
for (const name of ["temperature", "tokens"]) $(name).addEventListener("input", showCurl);
$("key").addEventListener("change", loadModels);
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    $("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren($("curl"));
    $("copied").textContent = "Selected: copy with the keyboard.";
  }
});
loadModels().catch(() => complain("The server cannot be reached."));
