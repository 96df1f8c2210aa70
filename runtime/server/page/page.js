// The page: its buttons, keys and settings.

import { again, clear, restore, say, stop } from "./chat.js";
import { watch } from "./live.js";
import { settings } from "./server.js";

const at = (id) => document.getElementById(id);
const SETTINGS = ["system", "temperature", "top_p", "max_tokens", "key"];
const field = at("text");

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!at("stop").hidden) return;
  say(field.value);
  field.value = "";
});
field.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("form").requestSubmit();
});
for (const idea of at("ideas").children) idea.addEventListener("click", () => say(idea.textContent));
at("stop").addEventListener("click", stop);
at("again").addEventListener("click", again);
at("new").addEventListener("click", () => {
  clear();
  field.focus();
});
at("turns").addEventListener("click", async ({ target }) => {
  if (target.dataset?.copy === undefined) return;
  await navigator.clipboard.writeText(target.dataset.copy);
  target.textContent = "Copied";
  setTimeout(() => (target.textContent = "Copy"), 1500);
});

function show(view) {
  document.body.dataset.shown = view;
  for (const name of ["chat", "engine"]) {
    at(`to-${name}`).setAttribute("aria-pressed", String(name === view));
  }
}
at("to-chat").addEventListener("click", () => show("chat"));
at("to-engine").addEventListener("click", () => show("engine"));

for (const name of SETTINGS) {
  at(name).value = settings.get(name);
  at(name).addEventListener("change", () => {
    if (at(name).checkValidity()) settings.set(name, at(name).value);
  });
}
at("adjust").addEventListener("click", () => at("settings").showModal());
at("defaults").addEventListener("click", () => {
  for (const name of SETTINGS.filter((name) => name !== "key")) settings.set(name, (at(name).value = ""));
});
document.addEventListener("keydown", (event) => {
  if (at("settings").open) return;
  if (event.key === "Escape") stop();
  const pressed = { KeyN: "new", KeyS: "adjust", KeyR: "again" }[event.code];
  if (event.altKey && !event.ctrlKey && pressed) {
    event.preventDefault();
    at(pressed).click();
  }
});

restore();
watch();
