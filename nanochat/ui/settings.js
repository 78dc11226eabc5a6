// The dialog of settings: what is sent with each question, and what this browser shows.

import { change, settings } from "./store.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_k", "top_p", "max_tokens", "seed"];

/** app: {defaults, longest(), system(), setSystem(text), keyChanged()}. Returns open(what is wrong with the key). */
export function wire(app) {
  const dialog = $("settings");

  const fill = () => {
    const chosen = settings();
    $("key-note").textContent = "";
    $("system").maxLength = app.longest();
    for (const name of NUMBERS) $(name).value = chosen[name] ?? app.defaults[name] ?? "";
    $("theme").value = chosen.theme ?? "";
    $("key").value = chosen.key ?? "";
    $("system").value = app.system();
    outputs();
  };
  const outputs = () => {
    for (const output of dialog.querySelectorAll("output")) output.value = Number($(output.htmlFor.value).value).toFixed(2);
  };

  for (const name of NUMBERS) {
    $(name).addEventListener("input", () => {
      outputs();
      const text = $(name).value;
      if ($(name).checkValidity()) change({ [name]: text === "" ? null : Number(text) });
    });
    $(name).addEventListener("change", () => $(name).reportValidity());
  }
  $("theme").addEventListener("change", () => {
    change({ theme: $("theme").value });
    document.documentElement.dataset.theme = $("theme").value;
  });
  $("key").addEventListener("change", () => {
    change({ key: $("key").value.trim() });
    app.keyChanged();
  });
  $("system").addEventListener("input", () => app.setSystem($("system").value));
  $("defaults").addEventListener("click", () => {
    change(Object.fromEntries(NUMBERS.map((name) => [name, null])));
    fill();
  });
  const open = (wrongKey) => {
    fill();
    if (!dialog.open) dialog.showModal();
    if (!wrongKey) return;
    $("key-note").textContent = wrongKey;
    $("key").select();
  };
  $("open-settings").addEventListener("click", () => open());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
  return open;
}
