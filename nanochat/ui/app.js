// The page: one conversation in view, the others in the drawer, and what hands and keys do.
// What the model says is only ever set as text: it cannot become markup, and the policy of the page forbids it, too.

import { health, stats } from "./client.js";
import { matching, run } from "./commands.js";
import * as conversation from "./conversation.js";
import { el } from "./dom.js";
import { wireDrawer } from "./drawer.js";
import { closePanel } from "./microscope.js";
import { wire } from "./settings.js";
import * as store from "./store.js";
import { textOf, Turn } from "./turns.js";

const $ = (id) => document.getElementById(id);
const scroller = $("scroller"), turns = $("turns"), input = $("input");
const coarse = matchMedia("(pointer: coarse)");
const NEWS = 6000; // ms for which another tab is taken to be writing
const LOOK_AFTER = 15000, LOOK_AGAIN = 2000; // ms between looks at a server that is there, and at one that is gone

let state = conversation.create();
let limits = { messages: 500, message_characters: 8000, conversation_characters: 32000 };
let views = new Map(); // message id -> Turn
let closeEditor = null;
const elsewhere = new Map(); // conversation id -> when another tab was last heard to write it

const app = {
  defaults: { temperature: 0.8, top_k: 50, top_p: 1, max_tokens: 512 },
  longest: () => limits.message_characters,
  system: () => state.conversation.system,
  setSystem(text) {
    state.conversation.system = text.trim().slice(0, limits.message_characters);
    if (state.messages.size) store.save(state.conversation, []);
    render();
  },
  keyChanged: () => introduce(),
  newChat,
};

// ---- what is seen

const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
const busyElsewhere = () => Date.now() - (elsewhere.get(state.conversation.id) ?? 0) < NEWS;
const busy = () => Boolean(conversation.runningIn(state)) || busyElsewhere();

let watching = false, told = ""; // a server that is gone; what was said last
function say(text) {
  if (watching && !text) text = "The server is gone. Waiting for it to come back.";
  if (text !== told) $("status").textContent = told = text;
}

/** What changed of the conversation; the view stays where it is, or at the end if it was there. */
function render({ toEnd = atEnd() } = {}) {
  const shown = conversation.path(state), running = conversation.runningIn(state);
  const microscope = Boolean(store.settings().microscope);
  const before = views;
  views = new Map();
  const nodes = shown.map((message) => {
    const all = conversation.siblings(state, message.parent);
    const view = before.get(message.id) ?? new Turn(message, on);
    view.update(message, { index: all.indexOf(message), count: all.length }, { microscope, busy: busy(), writing: running?.message === message });
    views.set(message.id, view);
    return view.node;
  });
  nodes.push(...notes(shown, nodes, running));
  if (state.conversation.system) nodes.unshift(el("p", { class: "note system", dir: "auto", title: state.conversation.system, text: `System prompt: ${state.conversation.system}` }));
  place(nodes);
  $("welcome").hidden = shown.length > 0 || Boolean(state.remark);
  turns.setAttribute("aria-busy", String(Boolean(running)));
  document.title = state.conversation.title ? `${state.conversation.title} · nanochat` : "nanochat";
  $("legend").hidden = !microscope || !shown.length;
  $("microscope").setAttribute("aria-pressed", String(microscope));
  if (toEnd) scroller.scrollTop = scroller.scrollHeight;
  controls();
}

/** The children of the conversation become these; who stays is not moved. */
function place(nodes) {
  const staying = new Set(nodes);
  for (const child of [...turns.children]) if (!staying.has(child)) child.remove();
  nodes.forEach((node, index) => { if (turns.children[index] !== node) turns.insertBefore(node, turns.children[index] ?? null); });
}

/** What stands beside the turns: what the model could not see, what went wrong, what a command said. */
function notes(shown, nodes, running) {
  const last = shown.findLast((message) => message.role === "assistant" && message !== running?.message);
  if (last?.dropped) {
    // Turns are dropped whole, in twos; an odd one is a question of which only the end was read.
    const odd = last.dropped % 2 === 1;
    const text = odd ? "Too long: the model saw only the end of this message." : "Too long: what stands above the model did not see.";
    const at = Math.min(odd ? last.dropped - 1 : last.dropped, shown.indexOf(last) - 1);
    nodes.splice(Math.max(0, at), 0, el("p", { class: "note wide", text }));
  }
  const made = [];
  const open = shown.at(-1)?.role === "user" && !running && !busyElsewhere();
  const trouble = state.trouble ?? (open ? { kind: "stopped", text: "Not answered.", again: { question: shown.at(-1) } } : null);
  if (trouble && !running) {
    const retry = trouble.again && el("button", { class: "quiet", text: "Try again", onclick: () => write(trouble.again.question, trouble.again) });
    made.push(el("p", { class: trouble.kind === "stopped" ? "note" : "note error", role: "alert" }, el("span", { text: trouble.text }), retry));
  }
  if (busyElsewhere() && !running) made.push(el("p", { class: "note", text: "Another tab is writing in this conversation." }));
  if (state.remark) made.push(el("p", { class: "note remark", text: state.remark, role: "status" }));
  return made;
}

/** What of the page follows from what is typed: buttons, the size of the box, hints on commands. */
function controls() {
  const running = Boolean(conversation.runningIn(state));
  const text = input.value, tooLong = text.length > limits.message_characters;
  $("send").hidden = running;
  $("stop").hidden = !running;
  $("send").disabled = !text.trim() || tooLong || busyElsewhere();
  $("hint").hidden = tooLong;
  $("too-long").hidden = !tooLong;
  $("too-long").textContent = tooLong ? `${text.length} characters: a message may have ${limits.message_characters}.` : "";
  const found = matching(text);
  $("commands").hidden = !found.length;
  $("commands").replaceChildren(...found.map(({ name, line }) => el("li", {}, el("button", { text: line, onclick: () => complete(name) }))));
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function complete(name) {
  input.value = `${name} `;
  input.focus();
  controls();
}

let frame = 0;
function grow() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    const message = conversation.runningIn(state)?.message;
    if (!message || !views.has(message.id)) return;
    const follow = atEnd();
    views.get(message.id).fill(Boolean(store.settings().microscope));
    if (follow) scroller.scrollTop = scroller.scrollHeight;
  });
}

// ---- what is done

/** Why nothing happens now; false. */
function refuse() {
  const text = busyElsewhere() ? "Another tab is writing in this conversation." : "An answer is being written: Esc stops it.";
  say(text);
  setTimeout(() => { if (told === text) say(""); }, 3000);
  return false;
}

/** Have a question answered. after: what has the focus then, in place of the box. */
function write(question, { tokens = [], into = null, after = null } = {}) {
  const own = state;
  if (busy()) return refuse();
  let mine = "";
  const inTurns = turns.contains(document.activeElement);
  return conversation.answer(own, question, limits, {
    tokens,
    into,
    say(text) { // and take nothing back that others said
      if (own === state && (text || told === mine)) say(mine = text);
    },
    show(what, failure) {
      if (what === "end" && failure?.kind === "gone") watch();
      if (what === "end" && failure?.kind === "key") openSettings(failure.message);
      if (own !== state) return what === "end" && list();
      if (what === "grow") return grow();
      render({ toEnd: what === "begin" || atEnd() });
      list();
      if (what === "begin" && inTurns) $("stop").focus();
      if (what === "end") ended(own, failure, after);
    },
  });
}

/** Tell those who do not see it, and put the focus where one goes on. */
function ended(own, failure, after) {
  const last = conversation.path(own).at(-1);
  $("announcer").textContent = failure ? "" : `nanochat: ${last.role === "assistant" ? textOf(last).slice(0, 1000) : ""}`;
  if (document.activeElement !== document.body && document.activeElement !== $("stop")) return;
  const place = after?.() ?? (coarse.matches ? null : input);
  place?.focus();
}

function askNew(text) {
  const last = conversation.path(state).at(-1);
  // A question whose answer failed has none after it: the new one stands beside it.
  const question = conversation.addQuestion(state, last?.role === "user" ? last.parent : last?.id ?? null, text);
  location.hash = state.conversation.id;
  return write(question);
}

async function erase(id) {
  const own = id === state.conversation.id ? state : conversation.stateOf(id);
  if (own) conversation.forget(own);
  await store.remove(id);
  if (id === state.conversation.id) newChat();
  list();
}

const on = {
  edit(message) {
    closeEditor?.();
    const view = views.get(message.id);
    closeEditor = view.edit(() => !busy() || refuse(), (text) => {
      closeEditor = null;
      if (text === null) view.focus("Edit");
      else write(text === message.text ? message : conversation.addQuestion(state, message.parent, text));
    });
  },
  regenerate: (message) => write(state.messages.get(message.parent)),
  proceed: (message) => write(state.messages.get(message.parent), { tokens: message.tokens, into: message }),
  goOn(message, index, other) {
    const chosen = { ...other, forced: false, chosen: true, likeliest: message.tokens[index].likeliest };
    const after = () => [...turns.querySelectorAll(".token.chosen")].at(-1);
    write(state.messages.get(message.parent), { tokens: [...message.tokens.slice(0, index), chosen], after });
  },
  choose(message, index, label) {
    const other = conversation.siblings(state, message.parent)[index];
    conversation.choose(state, other);
    render({ toEnd: false });
    views.get(other.id).focus(label);
  },
};

function newChat() {
  state = conversation.create();
  history.pushState(null, "", location.pathname + location.search);
  say("");
  showDrawer(false);
  render();
  list();
  input.focus();
}

async function openFromAddress() {
  const id = location.hash.slice(1);
  if (id === state.conversation.id || (!id && !state.messages.size) || (id && !/^[0-9a-f]{20}$/.test(id))) return;
  state = conversation.stateOf(id) ?? ((id && (await conversation.open(id))) || conversation.create());
  say("");
  render({ toEnd: true });
  list();
}

function submit() {
  const text = input.value.trim();
  if (!text || input.value.length > limits.message_characters) return;
  if (busy()) return refuse();
  const remark = text.startsWith("/") ? run(text, app) : null;
  input.value = "";
  if (remark === null) return askNew(text);
  state.remark = remark;
  render({ toEnd: true });
}

// ---- how the server stands

async function introduce() {
  try {
    const found = await stats();
    Object.assign(app.defaults, found.defaults);
    limits = found.limits;
    $("model").textContent = found.model;
    if (state.trouble?.kind === "key") state.trouble = null;
    render();
    say("");
  } catch (error) {
    say(error.message);
    if (error.kind === "key") openSettings(error.message);
    else watch();
  }
}

/** Look after a server that is gone until it is back. */
async function watch() {
  if (watching) return;
  for (let status; (status = await health()) !== "ok"; ) {
    watching = true;
    say(status === "starting" ? "The model is getting ready." : "");
    await new Promise((resolve) => setTimeout(resolve, LOOK_AGAIN));
  }
  watching = false;
  say("");
  if (!$("model").textContent) introduce();
}

// ---- hands and keys

const openSettings = wire(app);
const { list, showDrawer } = wireDrawer({ current: () => state.conversation.id, erase, newChat });
$("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the conversation
  input.focus();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
input.addEventListener("input", controls);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !coarse.matches) {
    event.preventDefault();
    submit();
  } else if (event.key === "Tab" && !event.shiftKey && /^\/\S*$/.test(input.value) && matching(input.value).length) {
    event.preventDefault();
    complete(matching(input.value)[0].name);
  } else if (event.key === "ArrowUp" && !input.value && !busy()) {
    const last = conversation.path(state).findLast((message) => message.role === "user");
    if (last) {
      event.preventDefault();
      on.edit(last);
    }
  } else if (event.key === "PageUp" || event.key === "PageDown") {
    event.preventDefault();
    scroller.scrollBy({ top: (event.key === "PageUp" ? -0.85 : 0.85) * scroller.clientHeight });
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open || !$("veil").hidden) return;
  if (document.activeElement.closest(".tokens") && closePanel()) return;
  if (conversation.runningIn(state)) conversation.stop(state);
  else if (!closePanel() && state.remark) {
    state.remark = "";
    render();
  }
});
$("stop").addEventListener("click", () => conversation.stop(state));
$("microscope").addEventListener("click", () => {
  store.change({ microscope: !store.settings().microscope });
  render();
});
$("suggestions").addEventListener("click", (event) => {
  if (!(event.target instanceof HTMLButtonElement)) return;
  if (!coarse.matches) input.focus();
  askNew(event.target.textContent);
});
addEventListener("hashchange", openFromAddress);
addEventListener("popstate", openFromAddress);
addEventListener("storage", (event) => { if (event.key === "nanochat.settings") render(); });
addEventListener("pagehide", conversation.saveRunning);
document.addEventListener("visibilitychange", conversation.saveRunning);
setInterval(async () => {
  if (document.visibilityState === "visible" && !watching && (await health()) !== "ok") watch();
}, LOOK_AFTER);

store.onChange(async ({ id, what }) => {
  if (what === "writing") elsewhere.set(id, Date.now());
  else elsewhere.delete(id);
  list();
  if (what === "removed") {
    const own = id === state.conversation.id ? state : conversation.stateOf(id);
    if (own) conversation.forget(own);
  }
  if (what === "writing") setTimeout(() => { if (id === state.conversation.id) render(); }, NEWS + 100);
  if (id !== state.conversation.id || (conversation.runningIn(state) && what !== "removed")) return;
  const found = await conversation.open(id);
  if (!found) return newChat();
  Object.assign(state, { conversation: found.conversation, messages: found.messages });
  render();
});

render();
openFromAddress();
list();
introduce();
