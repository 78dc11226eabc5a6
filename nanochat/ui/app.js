// The page: one conversation, held in `messages`, sent whole with every question and answered as a stream of events.
// What the model says is only ever set as textContent: it cannot become markup.

const MAX_MESSAGES = 500;
const MAX_CHARACTERS = 32000; // of a whole conversation, as the server takes it
const MAX_MESSAGE_CHARACTERS = 8000;

const $ = (id) => document.getElementById(id);
const scroller = $("scroller"), turns = $("turns"), input = $("input");

let messages = []; // {role, content}
let answering = null; // the AbortController of the answer being written

// ---- what is seen

function element(className, text = "") {
  const node = document.createElement("div");
  node.className = className;
  node.textContent = text;
  return node;
}

/** Run `change` and keep the end of the conversation in view, unless the reader has scrolled up. */
function following(change) {
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  change();
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}

function showTurn(role, text = "") {
  const node = element(`turn ${role}`, text);
  node.setAttribute("role", "article");
  node.setAttribute("aria-label", role === "user" ? "You" : "nanochat");
  turns.append(node);
  scroller.scrollTop = scroller.scrollHeight;
  return node;
}

function showNote(className, text, { before = null, retry = false } = {}) {
  const node = element(`note ${className}`);
  const label = document.createElement("span");
  label.textContent = text;
  node.append(label);
  if (retry) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "quiet";
    button.textContent = "Try again";
    button.addEventListener("click", () => answer());
    node.append(button);
  }
  following(() => turns.insertBefore(node, before));
  return node;
}

function refresh() {
  $("welcome").hidden = messages.length > 0;
  $("new").hidden = messages.length === 0;
  $("send").hidden = answering !== null;
  $("stop").hidden = answering === null;
  $("send").disabled = !input.value.trim();
  turns.setAttribute("aria-busy", String(answering !== null));
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

// ---- what is asked

/** The newest messages that the server takes, beginning with the user's, and how many older turns are left out. */
function fitting(all) {
  let first = all.length, characters = 0;
  while (first > 0 && all.length - first < MAX_MESSAGES) {
    characters += Math.min(all[first - 1].content.length, MAX_MESSAGE_CHARACTERS);
    if (characters > MAX_CHARACTERS) break;
    first -= 1;
  }
  while (all[first].role !== "user") first += 1;
  const sent = all.slice(first).map(({ role, content }) => ({ role, content: content.slice(0, MAX_MESSAGE_CHARACTERS) }));
  return { sent, left: first };
}

/** The events of a response: each block of the stream is one `data: {...}` line. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (pending + value).split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield JSON.parse(block.slice(6));
  }
}

async function refusal(response) {
  if (response.status === 429) return "The model is busy with others. Try again in a moment.";
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `The server answered ${response.status}.`;
}

/** Ask for an answer to the conversation so far, and write it as it comes. */
async function answer() {
  turns.querySelectorAll(".note:not(.kept), .broken").forEach((node) => node.remove());
  const { sent, left } = fitting(messages);
  const reply = showTurn("assistant");
  reply.classList.add("writing");
  const stop = (answering = new AbortController());
  refresh();
  let text = "", dropped = left, cut = false, complete = false, failure = "";
  try {
    const response = await fetch("chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ messages: sent }),
      signal: stop.signal,
    });
    if (!response.ok) failure = await refusal(response);
    else for await (const event of events(response)) {
      if (event.token) following(() => { reply.textContent = text += event.token; });
      if (event.dropped) dropped += event.dropped;
      if (event.finish === "length") cut = true;
      if (event.error) failure = event.error;
      if (event.done) complete = true;
    }
    if (!complete && !failure) failure = "The answer broke off: the server went away.";
  } catch {
    if (!stop.signal.aborted) failure = text ? "The answer broke off: the server went away." : "The server cannot be reached.";
  }
  if (answering !== stop) return; // a new chat has begun meanwhile
  answering = null;
  reply.classList.remove("writing");
  if (failure || !text) {
    // The question stays, to be asked again; a broken answer can still be read until then.
    if (text) reply.classList.add("broken");
    else reply.remove();
    showNote("error", failure || (stop.signal.aborted ? "Stopped." : "The model said nothing."), { retry: true });
    return refresh();
  }
  messages.push({ role: "assistant", content: text });
  if (stop.signal.aborted) showNote("kept", "Stopped.");
  else if (cut) showNote("kept", "Cut off at the length limit.");
  if (dropped) {
    // Turns are dropped whole, in twos; an odd one is a question of which only the end fits.
    const unseen = dropped % 2 ? "Too long: the model saw only the end of this message."
      : `The first ${dropped} messages no longer fit: the model did not see them.`;
    showNote("wide kept", unseen, { before: reply });
  }
  refresh();
}

function ask(text) {
  if (answering || !text.trim()) return;
  // A question whose answer failed has none after it: the new one takes its place.
  if (messages.at(-1)?.role === "user") {
    messages.pop();
    [...turns.querySelectorAll(".user")].at(-1).remove();
  }
  messages.push({ role: "user", content: text });
  showTurn("user", text);
  answer();
}

function newChat() {
  answering?.abort();
  answering = null;
  messages = [];
  turns.replaceChildren();
  refresh();
  input.focus();
}

// ---- hands and keys

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering || !input.value.trim()) return;
  const text = input.value.trim();
  input.value = "";
  ask(text);
});
input.addEventListener("input", refresh);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") answering?.abort();
});
$("stop").addEventListener("click", () => { answering?.abort(); input.focus(); });
$("new").addEventListener("click", newChat);
$("suggestions").addEventListener("click", (event) => {
  if (event.target instanceof HTMLButtonElement) ask(event.target.textContent);
});

async function introduce() {
  const response = await fetch("stats").catch(() => null);
  if (response?.ok) $("model").textContent = (await response.json()).model;
}

refresh();
introduce();
