// The list of conversations: beside the page where there is room, else over it.

import { el } from "./dom.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const wide = matchMedia("(min-width: 64rem)");
const TWICE = 3000; // ms in which a second click deletes

/** app: {current(), erase(id), newChat()}. Returns {list(), showDrawer(open)}. */
export function wireDrawer(app) {
  const entries = new Map(); // conversation id -> {item, link}: an entry keeps its elements

  /** What the store has, anew. */
  async function list() {
    const all = await store.list();
    for (const [id, { item }] of [...entries]) {
      if (all.some((each) => each.id === id)) continue;
      if (item.contains(document.activeElement)) $("new").focus();
      item.remove();
      entries.delete(id);
    }
    all.forEach((each, index) => {
      if (!entries.has(each.id)) entries.set(each.id, entry(each));
      const { item, link } = entries.get(each.id);
      if (each.id === app.current()) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
      const there = $("conversations").children[index];
      if (there !== item && !item.contains(document.activeElement)) $("conversations").insertBefore(item, there ?? null);
    });
    $("kept").textContent = await store.kept();
  }

  function entry({ id, title }) {
    const link = el("a", { href: `#${id}`, text: title, title, dir: "auto", onclick: () => showDrawer(false) });
    const remove = el("button", { class: "icon small", text: "×", "aria-label": `Delete ${title}`, title: "Delete" });
    remove.addEventListener("click", () => {
      if (remove.classList.contains("error")) return app.erase(id);
      Object.assign(remove, { textContent: "Delete?", ariaLabel: `Delete ${title}? Once more` });
      remove.classList.add("error");
      setTimeout(() => {
        Object.assign(remove, { textContent: "×", ariaLabel: `Delete ${title}` });
        remove.classList.remove("error");
      }, TWICE);
    });
    return { item: el("li", {}, link, remove), link };
  }

  function showDrawer(open) {
    const shown = wide.matches ? store.settings().drawer !== false : open;
    const over = shown && !wide.matches;
    document.body.classList.toggle("drawer", shown);
    $("drawer").inert = !shown;
    for (const part of document.querySelectorAll("header, main, footer")) part.inert = over;
    $("veil").hidden = !over;
    $("menu").setAttribute("aria-expanded", String(shown));
    if (over) $("new").focus();
  }

  $("new").addEventListener("click", () => {
    showDrawer(false);
    app.newChat();
  });
  $("menu").addEventListener("click", () => {
    if (wide.matches) store.change({ drawer: store.settings().drawer === false });
    showDrawer(!document.body.classList.contains("drawer"));
  });
  $("veil").addEventListener("click", () => showDrawer(false));
  wide.addEventListener("change", () => showDrawer(false));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || $("veil").hidden) return;
    event.stopImmediatePropagation(); // it stops no answer
    showDrawer(false);
    $("menu").focus();
  });
  showDrawer(false);
  return { list, showDrawer };
}
