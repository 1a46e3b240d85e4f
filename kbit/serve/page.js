"use strict";
const $ = (id) => document.getElementById(id);
const make = (kind, name, text = "") => Object.assign(document.createElement(kind), { className: name, textContent: text });
const megabytes = (bytes) => (bytes < 1e9 ? `${(bytes / 1e6).toFixed(0)} MB` : `${(bytes / 1e9).toFixed(2)} GB`);
// What was said with each model; both are asked the same.
let talks = { model: [], beside: [] };
let running = null;

const headers = () => {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
};

async function get(path) {
  const answer = await fetch(path, { headers: headers() });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error.message);
  return body;
}

function add(element) {
  const log = $("log"), below = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  log.append(element);
  if (below) log.scrollTop = log.scrollHeight;
  return element;
}

function follow(change) {
  // Whoever has scrolled up stays there.
  const log = $("log"), below = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  change();
  if (below) log.scrollTop = log.scrollHeight;
}

async function listModels() {
  try {
    const { data } = await get("/v1/models");
    for (const id of ["model", "beside"]) {
      const chosen = $(id).value;
      const options = data.map((each) => new Option(each.id, each.id, false, each.id === chosen));
      $(id).replaceChildren(...(id === "beside" ? [new Option("nobody", "", false, !chosen)] : []), ...options);
    }
    await showMemory();
  } catch (error) {
    add(make("p", "error", error.message));
  }
}

async function showMemory() {
  const chosen = new Set([$("model").value, $("beside").value]);
  const slots = (await get("/slots")).filter((each) => each.id === 0 && chosen.has(each.model));
  $("memory").textContent = slots.map((each) =>
    `${each.model}: weights ${megabytes(each.weights_bytes)}, keys and values ${megabytes(each.cache_bytes)}, ` +
    `${(100 * each.cache_used).toFixed(1)} % in use`).join(" · ");
}

async function* objects(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// Puts an answer's text on the page token by token, so that each can tell its probability. Text and tokens arrive by
// ways of their own: a character may take several tokens, a stop string is held back, special tokens have no text.
class Tokens {
  constructor(element) {
    this.element = element;
    this.rest = element.appendChild(document.createTextNode(""));
    this.waiting = [];
  }
  push(text, tokens) {
    this.rest.data += text;
    this.waiting.push(...tokens);
    while (this.waiting.length) {
      const [piece, count] = this.first();
      if (piece === null || (piece !== this.rest.data && piece.startsWith(this.rest.data))) return;
      const shown = this.rest.data.startsWith(piece) ? piece : piece.trimStart();
      if (shown && this.rest.data.startsWith(shown)) this.show(shown, this.waiting.slice(0, count));
      this.waiting.splice(0, count);
    }
  }
  first() {
    // The first character or more that waits: its text, and of how many tokens it is.
    let bytes = [];
    for (let count = 1; count <= Math.min(16, this.waiting.length); count++) {
      bytes = bytes.concat(this.waiting[count - 1].bytes);
      try {
        return [new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(bytes)), count];
      } catch { /* more of the character is in the next token */ }
    }
    return this.waiting.length < 16 ? [null, 0] : ["", 1];
  }
  show(text, tokens) {
    const span = make("span", "", text), last = tokens[tokens.length - 1];
    const least = Math.min(...tokens.map((each) => each.logprob));
    span.className = least > -0.36 ? "t0" : least > -1.2 ? "t1" : least > -2.5 ? "t2" : "t3";
    span.dataset.token = JSON.stringify([last.token, last.logprob, last.top_logprobs.map((t) => [t.token, t.logprob])]);
    this.rest.data = this.rest.data.slice(text.length);
    this.element.insertBefore(span, this.rest);
  }
}

function request(model, messages) {
  const system = $("system").value.trim();
  const asked = { model, stream: true, stream_options: { include_usage: true } };
  asked.messages = [...(system ? [{ role: "system", content: system }] : []), ...messages];
  if ($("temperature").value !== "") asked.temperature = Number($("temperature").value);
  if ($("seed").value !== "") asked.seed = Number($("seed").value);
  if ($("most").value !== "") asked.max_completion_tokens = Number($("most").value);
  if ($("probabilities").checked) Object.assign(asked, { logprobs: true, top_logprobs: 5 });
  return asked;
}

async function answer(model, messages, cell) {
  // Shows a model's answer and adds it to the messages; whether there was one.
  cell.append(make("div", "name", model));
  const thought = cell.appendChild(make("div", "thought")), said = cell.appendChild(make("div", "said"));
  const meter = cell.appendChild(make("div", "meter")), tokens = new Tokens(said), begin = performance.now();
  said.tabIndex = 0;
  let first = null, count = 0, text = "", cut = "";
  const measure = (usage) => {
    const now = performance.now(), seconds = (now - (first ?? now)) / 1000;
    const speed = count > 1 && seconds > 0 ? `${((count - 1) / seconds).toFixed(1)} tokens/s · ` : "";
    const prompt = usage ? ` · ${usage.prompt_tokens} in the prompt, ${usage.prompt_tokens_details.cached_tokens} cached` : "";
    meter.textContent = `${speed}${count} tokens · first after ${(((first ?? now) - begin) / 1000).toFixed(2)} s${prompt}${cut}`;
  };
  try {
    const body = JSON.stringify(request(model, messages));
    const options = { method: "POST", headers: headers(), body, signal: running.signal };
    const response = await fetch("/v1/chat/completions", options);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const each of objects(response.body)) {
      if (each.error) throw new Error(each.error.message);
      const choice = each.choices[0], delta = choice?.delta ?? {}, told = choice?.logprobs?.content;
      if (delta.content || delta.reasoning_content) first ??= performance.now();
      count = each.usage?.completion_tokens ?? count + (told ? told.length : delta.content || delta.reasoning_content ? 1 : 0);
      if (choice?.finish_reason === "length") cut = " · cut";
      if (choice?.finish_reason === "stop" && !text) cut = " · it said nothing";
      text += delta.content ?? "";
      follow(() => {
        thought.textContent += delta.reasoning_content ?? "";
        tokens.push(delta.content ?? "", told ?? []);
        measure(each.usage);
      });
    }
  } catch (error) {
    if (error.name !== "AbortError") follow(() => cell.append(make("div", "error", error.message)));
  }
  if (text) messages.push({ role: "assistant", content: text });
  return Boolean(text);
}

async function ask(text) {
  add(make("div", "user", text));
  running = new AbortController();
  $("send").textContent = "Stop";
  $("status").textContent = "answering";
  const beside = $("beside").value;
  const row = add(make("div", beside ? "pair" : "alone"));
  const asked = [["model", $("model").value], ...(beside ? [["beside", beside]] : [])];
  await Promise.all(asked.map(async ([side, model]) => {
    const mine = talks[side];
    mine.push({ role: "user", content: text });
    const good = await answer(model, mine, row.appendChild(make("article", "assistant")));
    if (!good) mine.pop(); // or the next question would be the second in a row
  }));
  running = null;
  $("send").textContent = "Send";
  $("status").textContent = "answered";
  showMemory().catch(() => {});
}

function tell(span) {
  document.querySelector(".here")?.classList.remove("here");
  const tip = $("tip");
  tip.hidden = !span;
  if (!span) return;
  const [token, logprob, top] = JSON.parse(span.dataset.token);
  const rows = top.some(([each]) => each === token) ? top : [[token, logprob], ...top];
  const table = document.createElement("table");
  for (const [each, value] of rows) {
    const row = table.insertRow(), name = make("code", "", JSON.stringify(each));
    if (each === token) row.style.fontWeight = "bold";
    row.insertCell().append(name);
    row.insertCell().textContent = `${value.toFixed(3)}`;
    row.insertCell().textContent = `${(100 * Math.exp(value)).toFixed(1)} %`;
  }
  tip.replaceChildren(table);
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - size.width - 4))}px`;
  tip.style.top = `${box.top > size.height + 8 ? box.top - size.height - 4 : box.bottom + 4}px`;
}

$("log").addEventListener("pointerover", (event) => tell(event.target.closest("[data-token]")));
$("log").addEventListener("pointerleave", () => tell(null));
$("log").addEventListener("scroll", () => tell($("log").querySelector("[data-token]:hover")));
$("log").addEventListener("focusout", () => tell(null));
$("log").addEventListener("keydown", (event) => {
  // In an answer, the arrow keys go from token to token.
  const said = event.target.closest(".said"), step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!said || !step) return;
  event.preventDefault();
  const spans = [...said.querySelectorAll("[data-token]")], at = spans.findIndex((each) => each.classList.contains("here"));
  const span = spans[at < 0 ? (step > 0 ? 0 : spans.length - 1) : Math.max(0, Math.min(spans.length - 1, at + step))];
  if (!span) return;
  span.scrollIntoView({ block: "nearest" });
  tell(span);
  span.classList.add("here");
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = $("text").value.trim();
  if (!text || !$("model").value) return;
  $("text").value = "";
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  running?.abort();
  tell(null);
  document.querySelector("details").open = false;
});
const anew = () => { running?.abort(); talks = { model: [], beside: [] }; $("log").replaceChildren(); tell(null); };
$("reset").addEventListener("click", () => { anew(); $("text").focus(); });
// Whoever joins has not heard what was said.
$("beside").addEventListener("change", () => { if ($("beside").value) talks.beside = talks.model.slice(); showMemory().catch(() => {}); });
$("model").addEventListener("change", () => showMemory().catch(() => {}));
$("key").addEventListener("change", listModels);
listModels();
