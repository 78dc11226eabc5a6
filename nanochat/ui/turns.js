// The messages of a conversation as they are shown, with what can be done to each.

import { copyButton, el, iconButton } from "./dom.js";
import { render } from "./markdown.js";
import { tokenView } from "./microscope.js";

export const textOf = (message) => message.parts.filter((part) => part.type === "text").map((part) => part.text).join("");

/**
 * A turn. at: {index, count} among its siblings. on: {edit, regenerate, proceed, goOn, choose}, called with the message;
 * microscope: whether answers are shown as tokens; busy: whether an answer is being written.
 */
export function turn(message, at, { microscope, busy, writing, on }) {
  const mine = message.role === "user";
  const article = el("article", { class: `turn ${message.role}`, "aria-label": mine ? "You" : "nanochat", "data-id": message.id });
  if (message.unseen) article.append(el("p", { class: "note wide", text: message.unseen }));
  const body = el("div", { class: "body" });
  article.append(body);
  fill(body, message, { microscope, goOn: busy ? null : (index, other) => on.goOn(message, index, other) });
  article.classList.toggle("writing", writing);
  if (message.note) article.append(el("p", { class: message.failed ? "note error" : "note", role: message.failed ? "alert" : undefined, text: message.note }));
  article.append(actions(message, at, busy, writing, on));
  return article;
}

/** The text of a message, anew. */
export function fill(body, message, { microscope, goOn = null }) {
  if (message.role === "user") body.textContent = message.text;
  else if (microscope && message.tokens.length) body.replaceChildren(tokenView(message.tokens, goOn));
  else body.replaceChildren(render(message.parts));
}

function actions(message, at, busy, writing, on) {
  const bar = el("div", { class: "actions" });
  if (writing) return bar;
  if (at.count > 1) {
    const to = (step) => () => on.choose(message, at.index + step);
    bar.append(
      iconButton("left", "The one before", to(-1), { disabled: busy || at.index === 0 }),
      el("span", { class: "small", text: `${at.index + 1}/${at.count}`, "aria-label": `${at.index + 1} of ${at.count}` }),
      iconButton("right", "The one after", to(1), { disabled: busy || at.index === at.count - 1 }),
    );
  }
  if (message.role === "user") {
    bar.append(copyButton(() => message.text), iconButton("edit", "Edit", () => on.edit(message), { disabled: busy }));
    return bar;
  }
  bar.append(copyButton(() => textOf(message)), iconButton("again", "Regenerate", () => on.regenerate(message), { disabled: busy }));
  if (message.finish !== "stop" && message.tokens.length) {
    bar.append(iconButton("more", "Go on", () => on.proceed(message), { disabled: busy }));
  }
  const count = message.tokens.length - (message.finish === "stop" ? 1 : 0); // the mark of the end is none of the answer
  if (message.rate && count > 1) bar.append(el("span", { class: "small rate", text: `${count} tokens · ${message.rate} tokens/s` }));
  return bar;
}

/** In place of a question: a box to write it anew. */
export function editor(message, done) {
  const box = el("textarea", { "aria-label": "Edit the message", rows: "2" });
  box.value = message.text;
  const finish = (save) => done(save && box.value.trim() && box.value !== message.text ? box.value.trim() : null);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      finish(true);
    } else if (event.key === "Escape") {
      event.stopPropagation();
      finish(false);
    }
  });
  const buttons = el("div", { class: "row" },
    el("button", { class: "quiet", text: "Cancel", onclick: () => finish(false) }),
    el("button", { class: "solid", text: "Send", onclick: () => finish(true) }),
  );
  return { node: el("div", { class: "editor" }, box, buttons), focus: () => { box.focus(); box.style.height = `${box.scrollHeight}px`; } };
}
