// The playground: asks the server like any client, and shows what its traces tell.

import { drawTree } from "./tree.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "temperature", "seed", "top_p", "top_k", "min_p", "repetition_penalty"];
const COLORS = 6;
const drafters = [];
const last = { on: null, off: null };
let running = null;

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function listModels() {
  const answer = await fetch("/v1/models", { headers: headers() });
  if (!answer.ok) return;
  const models = (await answer.json()).data.map((each) => new Option(each.id, each.id));
  $("model").replaceChildren(...models);
}

function body(speculation) {
  const numbers = Object.fromEntries(
    NUMBERS.filter((name) => $(name).value !== "").map((name) => [name, Number($(name).value)]));
  const prediction = $("prediction").value;
  return {
    ...numbers,
    ...($("model").value ? { model: $("model").value } : {}),
    ...(prediction ? { prediction: { type: "content", content: prediction } } : {}),
    messages: [{ role: "user", content: $("prompt").value }],
    speculation: speculation ? "auto" : "off",
    stream: true, stream_options: { include_usage: true }, trace: true,
  };
}

// The events of an answer, parsed. Throws the server's own message.
async function* events(asked, signal) {
  const answer = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(asked), signal });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "", part; !(part = await reader.read()).done;) {
    const frames = (text + part.value).split("\n\n");
    text = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ") || frame === "data: [DONE]") continue;
      const event = JSON.parse(frame.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function color(names) {
  for (const name of names) if (!drafters.includes(name)) { drafters.push(name); showLegend(); }
  return drafters.indexOf(names[0]) % COLORS;
}

function showLegend() {
  const item = (text, classes) => {
    const entry = document.createElement("li"), mark = document.createElement("span");
    mark.className = classes;
    mark.textContent = "text";
    entry.append(mark, text);
    return entry;
  };
  $("legend").replaceChildren(item("the model itself", ""),
    ...drafters.map((name, place) => item(name, `guessed g${place % COLORS}`)));
}

function showTokens(tokens) {
  const follow = $("answer").scrollHeight - $("answer").scrollTop - $("answer").clientHeight < 40;
  for (const token of tokens) {
    if (!token.drafters.length) { $("answer").append(token.text); continue; }
    const piece = document.createElement("span");
    piece.className = `guessed g${color(token.drafters)}`;
    piece.title = token.drafters.join(", ");
    piece.textContent = token.text;
    $("answer").append(piece);
  }
  if (follow) $("answer").scrollTop = $("answer").scrollHeight;
}

function showFigures(way, tokens, forwards, seconds) {
  $(`length-${way}`).textContent = forwards ? (tokens / forwards).toFixed(2) : "–";
  $(`rate-${way}`).textContent = seconds > 0 && tokens > 1 ? (tokens / seconds).toFixed(1) : "–";
  $(`count-${way}`).textContent = `${tokens} / ${forwards}`;
}

function showVerdict() {
  const { on, off } = last;
  if (!on || !off || on.asked !== off.asked) { $("verdict").textContent = ""; return; }
  const same = on.text === off.text ? "The same text" : "Other text (sampled without a seed, or stopped)";
  $("verdict").textContent = `${same}, ${(on.rate / off.rate).toFixed(2)} times the tokens per second of plain.`;
}

async function generate(speculation) {
  const way = speculation ? "on" : "off", asked = body(speculation), started = performance.now();
  running = new AbortController();
  $("send").disabled = $("compare").disabled = true;
  $("stop").disabled = false;
  $("error").hidden = true;
  $("answer").replaceChildren();
  $("status").textContent = "Reading the prompt…";
  let tokens = 0, forwards = 0, first = 0, text = "", ended = "stopped";
  try {
    for await (const event of events(asked, running.signal)) {
      for (const choice of event.choices) {
        text += choice.delta.content ?? "";
        if (choice.finish_reason) ended = choice.finish_reason;
        if (!choice.trace) continue;
        first ||= performance.now();
        $("status").textContent = "Generating…";
        tokens += choice.trace.tokens.length;
        forwards += 1;
        showTokens(choice.trace.tokens);
        showFigures(way, tokens, forwards, (performance.now() - first) / 1000);
        if (choice.trace.tree.length) drawTree($("tree"), choice.trace.tree, color);
      }
    }
    const seconds = (performance.now() - first) / 1000;
    last[way] = { text, rate: tokens / seconds, asked: JSON.stringify({ ...asked, speculation: "" }) };
    $("status").textContent = `${tokens} tokens in ${((performance.now() - started) / 1000).toFixed(1)} s (${ended}).`;
    showVerdict();
  } catch (error) {
    $("status").textContent = "";
    if (error.name === "AbortError") { $("status").textContent = `Stopped after ${tokens} tokens.`; return false; }
    $("error").textContent = error.message;
    $("error").hidden = false;
    return false;
  } finally {
    running = null;
    $("send").disabled = $("compare").disabled = false;
    $("stop").disabled = true;
  }
  return true;
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); generate($("speculation").checked); });
$("stop").addEventListener("click", () => running?.abort());
$("compare").addEventListener("click", async () => { if ($("form").reportValidity() && await generate(false)) generate(true); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) $("form").requestSubmit();
});
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value); listModels(); });
$("key").value = sessionStorage.getItem("key") ?? "";
showLegend();
listModels();
