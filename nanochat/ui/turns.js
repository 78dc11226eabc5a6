// The messages of a conversation as they are shown, with what can be done to each. A turn keeps its elements while it is
// shown: what did not change is not touched, so that selections, focus and open panels stay.

import { copyButton, el, iconButton } from "./dom.js";
import { render } from "./markdown.js";
import { tokenView } from "./microscope.js";

const FEW = 10; // tokens, of which a speed would be chance

export const textOf = (message) => message.parts.filter((part) => part.type === "text").map((part) => part.text).join("");

/** Put what changed of `nodes` into `parent`, from the first child that differs on. */
function patch(parent, nodes) {
  let same = 0;
  while (same < nodes.length && same < parent.childNodes.length && parent.childNodes[same].isEqualNode(nodes[same])) same += 1;
  while (parent.childNodes.length > same) parent.lastChild.remove();
  parent.append(...nodes.slice(same));
}

/** on: {edit, regenerate, proceed, goOn, choose}, called with the message. */
export class Turn {
  constructor(message, on) {
    Object.assign(this, { message, on });
    const mine = message.role === "user";
    this.body = el("div", { class: "body", dir: "auto" });
    this.note = el("p", { class: "note", hidden: true });
    this.actions = el("div", { class: "actions" });
    this.node = el("article", { class: `turn ${message.role}`, "aria-label": mine ? "You" : "nanochat" }, this.body, this.note, this.actions);
    this.shown = { body: "", actions: "" };
    this.tokens = null; // the microscope's view
  }

  /** at: {index, count} among its siblings; microscope: answers as tokens; busy: an answer is being written, this one if `writing`. */
  update(message, at, { microscope = false, busy = false, writing = false }) {
    this.message = message;
    this.node.classList.toggle("writing", writing);
    const body = `${message.revision} ${microscope}`;
    if (this.shown.body !== body) {
      this.shown.body = body;
      this.fill(microscope);
    }
    const note = writing ? "" : message.note ?? "";
    this.note.textContent = note;
    this.note.hidden = !note;
    this.note.classList.toggle("error", Boolean(message.failed));
    const actions = [writing, busy, at.index, at.count, message.finish, message.rate, message.revision].join();
    if (this.shown.actions !== actions) {
      this.shown.actions = actions;
      const focused = this.actions.contains(document.activeElement) ? document.activeElement.ariaLabel : null;
      this.actions.replaceChildren(...(writing ? [] : this.buttons(at, busy)));
      if (focused) this.focus(focused);
    }
  }

  /** What is said, anew. */
  fill(microscope) {
    const { message, body } = this;
    if (message.role === "user") body.textContent = message.text;
    else if (microscope && message.tokens.length) {
      if (!this.tokens) {
        this.tokens = tokenView((index, other) => this.on.goOn(this.message, index, other));
        body.replaceChildren(this.tokens.node);
      }
      this.tokens.show(message.tokens);
    } else {
      if (this.tokens) body.replaceChildren();
      this.tokens = null;
      patch(body, [...render(message.parts).childNodes]);
    }
  }

  /** The button of this name, or another that can be used. */
  focus(label) {
    const buttons = [...this.actions.querySelectorAll("button:enabled")];
    (buttons.find((button) => button.ariaLabel === label) ?? buttons[0])?.focus();
  }

  buttons(at, busy) {
    const { message, on } = this;
    const made = [];
    if (at.count > 1) {
      const to = (step, label) => () => on.choose(this.message, at.index + step, label);
      made.push(
        iconButton("left", "The one before", to(-1, "The one before"), { disabled: busy || at.index === 0 }),
        el("span", { class: "small", text: `${at.index + 1}/${at.count}` }),
        iconButton("right", "The one after", to(1, "The one after"), { disabled: busy || at.index === at.count - 1 }),
      );
    }
    if (message.role === "user") {
      return [...made, copyButton(() => this.message.text), iconButton("edit", "Edit", () => on.edit(this.message), { disabled: busy })];
    }
    made.push(copyButton(() => textOf(this.message)), iconButton("again", "Regenerate", () => on.regenerate(this.message), { disabled: busy }));
    if (message.finish !== "stop" && message.tokens.length) made.push(iconButton("more", "Go on", () => on.proceed(this.message), { disabled: busy }));
    const count = message.tokens.length - (message.finish === "stop" ? 1 : 0); // the mark of the end is none of the answer
    const rate = message.rate && count >= FEW ? ` · ${message.rate} tokens/s` : "";
    if (count) made.push(el("span", { class: "small rate", text: `${count} ${count === 1 ? "token" : "tokens"}${rate}` }));
    return made;
  }

  /** In place of a question: a box to write it anew. done(text), null where it stays as it is; not before it `may`. */
  edit(may, done) {
    const box = el("textarea", { "aria-label": "Edit the message", rows: "2", dir: "auto" });
    box.value = this.message.text;
    const finish = (text) => {
      if (text !== null && !may()) return;
      editor.remove();
      this.node.classList.remove("editing");
      done(text);
    };
    const grow = () => {
      box.style.height = "auto";
      box.style.height = `${box.scrollHeight}px`;
    };
    box.addEventListener("input", grow);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches) {
        event.preventDefault();
        if (box.value.trim()) finish(box.value.trim());
      } else if (event.key === "Escape") {
        event.stopPropagation();
        finish(null);
      }
    });
    const send = () => box.value.trim() && finish(box.value.trim());
    const editor = el("div", { class: "editor" }, box, el("div", { class: "row" },
      el("button", { class: "quiet", text: "Cancel", onclick: () => finish(null) }),
      el("button", { class: "solid", text: "Send", onclick: send }),
    ));
    this.node.classList.add("editing");
    this.node.prepend(editor);
    box.focus();
    grow();
    return () => finish(null);
  }
}
