// A conversation with the model, and what its engine does meanwhile. Nothing that the model writes
// becomes markup: all of it is set as text.

const at = (id) => document.getElementById(id);
const messages = [];
let running = null; // the AbortController of the answer in progress

at("key").value = localStorage.getItem("key") ?? "";
at("key").addEventListener("change", () => localStorage.setItem("key", at("key").value));

const headers = () => {
  const key = at("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
};

function turn(role, text = "") {
  const item = document.createElement("li");
  item.className = role;
  const thought = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "Reasoning";
  const reasoning = document.createElement("div");
  thought.append(summary, reasoning);
  thought.hidden = true;
  const content = document.createElement("div");
  content.textContent = text;
  const note = document.createElement("small");
  item.append(thought, content, note);
  at("turns").append(item);
  item.scrollIntoView({ block: "end" });
  return { item, thought, reasoning, content, note };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function answer() {
  running = new AbortController();
  at("send").disabled = at("again").disabled = true;
  at("stop").disabled = false;
  const shown = turn("assistant");
  const told = { role: "assistant", content: "" };
  try {
    const temperature = Number(at("temperature").value);
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({ model: at("model").textContent, messages, temperature, stream: true }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      if (delta.reasoning_content) {
        shown.thought.hidden = false;
        shown.reasoning.textContent += delta.reasoning_content;
      }
      if (delta.content) shown.content.textContent = told.content += delta.content;
      if (event.timings) {
        const { predicted_n, predicted_per_second } = event.timings;
        shown.note.textContent = `${predicted_n} tokens, ${predicted_per_second.toFixed(2)} per s`;
      }
    }
  } catch (error) {
    shown.item.classList.add("failed");
    shown.note.textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
  if (told.content) messages.push(told);
  running = null;
  at("stop").disabled = true;
  at("send").disabled = at("again").disabled = false;
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || running) return;
  at("text").value = "";
  messages.push({ role: "user", content: text });
  turn("user", text);
  answer();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("again").addEventListener("click", () => {
  if (running) return;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  at("turns").lastElementChild?.remove();
  answer();
});

const bytes = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : `${(n / 1e6).toFixed(0)} MB`);

function table(id, rows) {
  at(id).replaceChildren(
    ...rows.map((row) => {
      const line = document.createElement("tr");
      for (const text of row) line.insertCell().textContent = text;
      return line;
    }),
  );
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error.message);
  return body;
}

let before = null; // bytes read, and when

async function look() {
  try {
    if (at("state").textContent !== "ready") {
      at("model").textContent = (await get("v1/models")).data[0].id;
      at("state").textContent = "ready";
    }
    const stats = await get("stats");
    const now = performance.now() / 1e3;
    const rate = before ? (stats.bytes_read - before.read) / (now - before.now) : 0;
    before = { read: stats.bytes_read, now };
    table("figures", [
      ["decode", `${(stats.decode_tps ?? 0).toFixed(2)} tok/s`],
      ["prompts", `${(stats.prefill_tps ?? 0).toFixed(1)} tok/s`],
      ["experts in memory", `${((stats.hit_rate ?? 0) * 100).toFixed(1)} % of those needed`],
      ["read", `${bytes(rate)}/s`],
      ["waited for reads", `${(stats.stall_s ?? 0).toFixed(1)} s`],
      ["memory", `${bytes(stats.rss_peak_bytes ?? 0)} of ${bytes(stats.budget_bytes ?? 0)}`],
      ["policy", stats.policy ?? ""],
    ]);
    const slots = await get("slots");
    const said = (slot) =>
      slot.is_processing
        ? `${slot.n_prompt_tokens_processed}/${slot.n_prompt_tokens} + ${slot.next_token.n_decoded}`
        : "free";
    table("slots", slots.map((slot) => [String(slot.id), said(slot)]));
  } catch (error) {
    at("state").textContent = error.message;
  }
  setTimeout(look, 1000);
}
look();
