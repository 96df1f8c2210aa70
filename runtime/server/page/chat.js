// A conversation: what was said, the answer that comes, and its way onto the page.

import { make, render } from "./markdown.js";
import { settings, stream } from "./server.js";

const at = (id) => document.getElementById(id);
const turns = at("turns");
let messages = [];
let running = null; // the AbortController of the answer in progress

const keep = () => sessionStorage.setItem("moe-gguf conversation", JSON.stringify(messages));

/** Whether the reader is at the end, and so wants to stay there. */
const follows = () => turns.scrollHeight - turns.scrollTop - turns.clientHeight < 60;
const toEnd = () => (turns.scrollTop = turns.scrollHeight);

function ask(text) {
  const item = make("li", text);
  item.className = "user";
  turns.append(item);
  toEnd();
}

/** An answer's place: `show` puts there what has come so far, at most once a frame. */
function place() {
  const thought = make("div");
  thought.className = "thought";
  const summary = make("summary", "Reasoning");
  const details = make("details", summary, thought);
  details.hidden = true;
  const text = make("div");
  text.className = "text";
  const note = make("small");
  const item = make("li", details, text, note);
  item.className = "assistant";
  turns.append(item);
  let told = null;
  let frame = 0;
  const draw = () => {
    frame = 0;
    const stays = follows();
    details.hidden = !told.reasoning_content;
    if (told.reasoning_content) thought.replaceChildren(...render(told.reasoning_content));
    text.replaceChildren(...render(told.content));
    if (stays) toEnd();
  };
  return {
    item,
    summary,
    text,
    note,
    show(message) {
      told = message;
      frame ||= requestAnimationFrame(draw);
    },
    end(message) {
      cancelAnimationFrame(frame);
      told = message;
      draw();
    },
  };
}

function body(model) {
  const number = (name) => (settings.get(name) === "" ? {} : { [name]: Number(settings.get(name)) });
  const system = settings.get("system").trim();
  return {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
    return_progress: true,
    ...number("temperature"),
    ...number("top_p"),
    ...number("max_tokens"),
  };
}

const REASONS = { length: "cut off: no more tokens were allowed", content_filter: "filtered" };

function summed(timings, reason) {
  const parts = [];
  if (timings) {
    const { predicted_n: n, predicted_per_second: speed, prompt_n, cache_n } = timings;
    parts.push(`${n} tokens, ${speed.toFixed(speed < 10 ? 2 : 1)} per s`);
    if (prompt_n !== undefined) parts.push(`prompt ${prompt_n}${cache_n ? ` + ${cache_n} kept` : ""}`);
  }
  if (REASONS[reason]) parts.push(REASONS[reason]);
  return parts.join(" · ");
}

async function answer() {
  running = new AbortController();
  buttons();
  const shown = place();
  shown.text.classList.add("waits");
  toEnd();
  const told = { role: "assistant", content: "" };
  const start = performance.now();
  let timings, reason;
  try {
    const model = at("model").textContent;
    for await (const event of stream("v1/chat/completions", body(model), running.signal)) {
      const { delta = {}, finish_reason } = event.choices?.[0] ?? {};
      reason = finish_reason ?? reason;
      timings = event.timings ?? timings;
      const read = event.prompt_progress;
      if (read) {
        const share = (read.processed - read.cache) / Math.max(1, read.total - read.cache);
        shown.note.textContent = share < 1 ? `reading the prompt, ${Math.round(100 * share)} %` : "";
      }
      if (delta.reasoning_content) {
        told.reasoning_content = (told.reasoning_content ?? "") + delta.reasoning_content;
        shown.summary.textContent = "Reasoning …";
      }
      if (delta.content) {
        const seconds = Math.round((performance.now() - start) / 1e3);
        if (!told.content && told.reasoning_content) shown.summary.textContent = `Reasoned for ${seconds} s`;
        told.content += delta.content;
      }
      shown.show(told);
    }
    shown.note.textContent = summed(timings, reason);
  } catch (error) {
    const stopped = error.name === "AbortError";
    shown.item.classList.toggle("failed", !stopped);
    shown.note.textContent = stopped ? "stopped" : error.message;
    if (!stopped) shown.note.setAttribute("role", "alert");
  }
  shown.end(told);
  shown.text.classList.remove("waits");
  if (told.content) messages.push(told);
  keep();
  running = null;
  buttons();
}

function buttons() {
  at("stop").hidden = !running;
  at("send").hidden = at("new").disabled = Boolean(running);
  turns.setAttribute("aria-busy", String(Boolean(running)));
  at("again").disabled = Boolean(running) || !messages.length;
}

export function say(text) {
  if (!text.trim() || running) return;
  messages.push({ role: "user", content: text.trim() });
  ask(text.trim());
  keep();
  answer();
}

export function stop() {
  running?.abort();
}

/** The last answer anew, or the one that failed. */
export function again() {
  if (running || !messages.length) return;
  if (messages.at(-1).role === "assistant") messages.pop();
  if (turns.lastElementChild?.className !== "user") turns.lastElementChild?.remove();
  answer();
}

export function clear() {
  if (running) return;
  messages = [];
  keep();
  turns.replaceChildren();
  buttons();
}

/** What was said before the page was loaded again. */
export function restore() {
  try {
    messages = JSON.parse(sessionStorage.getItem("moe-gguf conversation")) ?? [];
  } catch {
    messages = []; // of an older page
  }
  for (const message of messages) {
    if (message.role === "user") ask(message.content);
    else place().end(message);
  }
  buttons();
}
