// The page: one conversation in view, the others in the drawer, and what hands and keys do.
// What the model says is only ever set as text: it cannot become markup, and the policy of the page forbids it, too.

import { health, stats } from "./client.js";
import { COMMANDS, matching, run } from "./commands.js";
import * as conversation from "./conversation.js";
import { el } from "./dom.js";
import { wire } from "./settings.js";
import * as store from "./store.js";
import { editor, fill, turn } from "./turns.js";

const $ = (id) => document.getElementById(id);
const scroller = $("scroller"), turns = $("turns"), input = $("input");
const wide = matchMedia("(min-width: 64rem)");

let state = conversation.create();
let limits = { messages: 500, message_characters: 8000, conversation_characters: 32000 };

const app = {
  defaults: { temperature: 0.8, top_k: 50, top_p: 1, max_tokens: 512 },
  system: () => state.conversation.system,
  setSystem(text) {
    state.conversation.system = text.trim().slice(0, limits.message_characters);
    if (state.messages.size) store.save(state.conversation, []);
  },
  keyChanged: () => introduce(),
  newChat,
};

// ---- what is seen

const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
const say = (text) => { $("status").textContent = text; };

function articleOf(message) {
  return [...turns.children].find((node) => node.dataset.id === message.id);
}

/** Everything anew; the view stays where it is, or at the end if it was there. */
function render({ toEnd = atEnd() } = {}) {
  const shown = conversation.path(state), run = conversation.runningIn(state);
  const focused = { id: document.activeElement?.closest?.(".turn")?.dataset.id, label: document.activeElement?.ariaLabel };
  const options = { microscope: store.settings().microscope, busy: Boolean(run), on };
  const nodes = shown.map((message) => {
    const all = conversation.siblings(state, message.parent);
    return turn(message, { index: all.indexOf(message), count: all.length }, { ...options, writing: run?.message === message });
  });
  if (state.trouble) nodes.push(troubleNote(state.trouble));
  if (state.remark) nodes.push(el("p", { class: "note remark", text: state.remark, role: "status" }));
  turns.replaceChildren(...nodes);
  if (focused.id && focused.label) turns.querySelector(`[data-id="${focused.id}"] [aria-label="${CSS.escape(focused.label)}"]`)?.focus();
  $("welcome").hidden = shown.length > 0 || Boolean(state.remark);
  turns.setAttribute("aria-busy", String(Boolean(run)));
  if (toEnd) scroller.scrollTop = scroller.scrollHeight;
  controls();
}

function troubleNote({ kind, text, again }) {
  const retry = el("button", { class: "quiet", text: "Try again", onclick: () => write(again.question, again) });
  return el("p", { class: kind === "stopped" ? "note" : "note error", role: "alert" }, el("span", { text }), retry);
}

/** What of the page follows from the state: buttons, the size of the box, hints on commands. */
function controls() {
  const running = Boolean(conversation.runningIn(state));
  const text = input.value, tooLong = text.length > limits.message_characters;
  $("send").hidden = running;
  $("stop").hidden = !running;
  $("send").disabled = !text.trim() || tooLong;
  $("hint").classList.toggle("error", tooLong);
  if (tooLong) $("hint").textContent = `${text.length} characters: a message may have ${limits.message_characters}.`;
  else if ($("hint").classList.length > 1 || !$("hint").querySelector(".keys")) $("hint").replaceChildren(...hint.map((node) => node.cloneNode(true)));
  const lines = /^\/[a-z]*$/i.test(text) || Object.hasOwn(COMMANDS, text.split(/\s/)[0]) ? matching(text) : [];
  $("commands").hidden = !lines.length;
  $("commands").replaceChildren(...lines.map((line) => el("li", { text: line })));
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}
const hint = [...$("hint").childNodes];

let frame = 0;
function grow(message) {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    const article = articleOf(message);
    if (!article) return;
    const follow = atEnd();
    fill(article.querySelector(".body"), message, { microscope: store.settings().microscope });
    if (follow) scroller.scrollTop = scroller.scrollHeight;
  });
}

async function drawer() {
  const all = await store.list();
  $("conversations").replaceChildren(...all.map((each) => {
    const remove = el("button", { class: "icon small", text: "×", "aria-label": `Delete ${each.title}`, title: "Delete" });
    remove.addEventListener("click", async () => {
      if (remove.textContent === "×") {
        remove.textContent = "Delete?";
        setTimeout(() => { remove.textContent = "×"; }, 3000);
        return;
      }
      conversation.stop({ conversation: each });
      await store.remove(each.id);
      if (each.id === state.conversation.id) newChat();
      drawer();
    });
    const current = each.id === state.conversation.id ? "page" : undefined;
    return el("li", {}, el("a", { href: `#${each.id}`, text: each.title, "aria-current": current, onclick: () => showDrawer(false) }), remove);
  }));
}

function showDrawer(open) {
  const shown = wide.matches ? store.settings().drawer !== false : open;
  document.body.classList.toggle("drawer", shown);
  $("drawer").inert = !shown;
  $("veil").hidden = wide.matches || !shown;
  $("menu").setAttribute("aria-expanded", String(shown));
}

// ---- what is done

function write(question, { tokens = [], into = null } = {}) {
  const own = state;
  return conversation.answer(own, question, limits, {
    tokens,
    into,
    say: (text) => { if (own === state) say(text); },
    show(what, failure) {
      if (what === "end" && failure?.kind === "gone") watch();
      if (own !== state) return what === "end" && drawer();
      if (what === "grow") return grow(conversation.runningIn(own).message);
      render({ toEnd: what === "begin" || atEnd() });
      drawer();
    },
  });
}

function askNew(text) {
  const last = conversation.path(state).at(-1);
  // A question whose answer failed has none after it: the new one stands beside it.
  const question = conversation.addQuestion(state, last?.role === "user" ? last.parent : last?.id ?? null, text);
  location.hash = state.conversation.id;
  return write(question);
}

const on = {
  edit(message) {
    const article = articleOf(message);
    const { node, focus } = editor(message, (text) => {
      if (text === null) return render();
      write(conversation.addQuestion(state, message.parent, text));
    });
    article.replaceChildren(node);
    article.classList.add("editing");
    focus();
  },
  regenerate: (message) => write(state.messages.get(message.parent)),
  proceed: (message) => write(state.messages.get(message.parent), { tokens: message.tokens, into: message }),
  goOn(message, index, other) {
    const chosen = { ...other, forced: false, chosen: true, likeliest: message.tokens[index].likeliest };
    write(state.messages.get(message.parent), { tokens: [...message.tokens.slice(0, index), chosen] });
  },
  choose(message, index) {
    conversation.choose(state, conversation.siblings(state, message.parent)[index]);
    render({ toEnd: false });
  },
};

function newChat() {
  state = conversation.create();
  history.pushState(null, "", location.pathname + location.search);
  showDrawer(false);
  render();
  drawer();
  input.focus();
}

async function openFromAddress() {
  const id = location.hash.slice(1);
  if (id === state.conversation.id) return;
  if (!id && !state.messages.size) return;
  state = conversation.stateOf(id) ?? (id && await conversation.open(id)) ?? conversation.create();
  if (!state.messages) state = conversation.create();
  say("");
  render({ toEnd: true });
  drawer();
}

function submit() {
  const text = input.value.trim();
  if (!text || conversation.runningIn(state) || input.value.length > limits.message_characters) return;
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
    say("");
  } catch (error) {
    say(error.message);
    if (error.kind === "key") openSettings("key");
    else watch();
  }
}

let watching = false;
/** Look after a server that is gone until it is back. */
async function watch() {
  if (watching) return;
  watching = true;
  for (let status; (status = await health()) !== "ok"; ) {
    say(status === "starting" ? "The model is getting ready." : "The server is gone. Waiting for it to come back.");
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
  watching = false;
  say("");
  if (!$("model").textContent) introduce();
}

// ---- hands and keys

const openSettings = wire(app);
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
input.addEventListener("input", controls);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !input.value && !conversation.runningIn(state)) {
    const last = conversation.path(state).findLast((message) => message.role === "user");
    if (last) {
      event.preventDefault();
      on.edit(last);
    }
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  if (!wide.matches && document.body.classList.contains("drawer")) {
    showDrawer(false);
    $("menu").focus();
  } else conversation.stop(state);
});
$("stop").addEventListener("click", () => {
  conversation.stop(state);
  input.focus();
});
$("new").addEventListener("click", newChat);
$("menu").addEventListener("click", () => {
  if (wide.matches) store.change({ drawer: store.settings().drawer === false });
  showDrawer(!document.body.classList.contains("drawer"));
});
$("veil").addEventListener("click", () => showDrawer(false));
wide.addEventListener("change", () => showDrawer(false));
$("microscope").addEventListener("click", () => {
  store.change({ microscope: !store.settings().microscope });
  $("microscope").setAttribute("aria-pressed", String(store.settings().microscope));
  render();
});
$("suggestions").addEventListener("click", (event) => {
  if (event.target instanceof HTMLButtonElement) askNew(event.target.textContent);
});
addEventListener("hashchange", openFromAddress);
addEventListener("popstate", openFromAddress);
store.onChange(async (id) => {
  drawer();
  if (id !== state.conversation.id || conversation.runningIn(state)) return;
  const found = await conversation.open(id);
  if (!found) return newChat();
  state = found;
  render();
});

$("microscope").setAttribute("aria-pressed", String(Boolean(store.settings().microscope)));
showDrawer(false);
render();
openFromAddress();
drawer();
introduce();
if (!(await store.keeps())) $("kept").textContent = "This browser keeps nothing: conversations end with the tab.";
