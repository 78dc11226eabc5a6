// A conversation in the hand: its tree, the path through it that is shown, and the answers that are being written.

import { ask } from "./client.js";
import * as store from "./store.js";
import { textOf } from "./turns.js";

const PATIENCE = 6; // times that a busy server is asked again
const SAVE_EVERY = 1000, BEAT_EVERY = 2000; // ms, of an answer that is being written: its text, and that it is
const CHANCE = 250; // ms, below which a speed would be chance

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(10)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** {conversation, messages: Map by id, trouble: what went wrong last, remark: an answer to a command} */
export function create() {
  return { conversation: { id: newId(), title: "", updated: 0, system: "", chosen: {} }, messages: new Map(), trouble: null, remark: "" };
}

export async function open(id) {
  const found = await store.load(id);
  return found && { ...found, trouble: null, remark: "" };
}

/** Messages that answer the same one. */
export function siblings({ messages }, parent) {
  return [...messages.values()].filter((message) => message.parent === parent).sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

/** The messages that are shown, from the first on; up to `last`, if one is given. */
export function path(state, last = null) {
  const shown = [];
  for (let parent = null; ; parent = shown.at(-1).id) {
    if (last && parent === last.id) return shown;
    const all = siblings(state, parent);
    if (!all.length) return shown;
    shown.push(all.find((message) => message.id === state.conversation.chosen[parent ?? "first"]) ?? all.at(-1));
  }
}

export function choose(state, message) {
  state.conversation.chosen[message.parent ?? "first"] = message.id;
  store.save(state.conversation, []);
}

/** A question under `parent`, an answer or null for the first; it is shown from now on. */
export function addQuestion(state, parent, text) {
  const message = { id: newId(), conversation: state.conversation.id, parent, role: "user", created: Date.now(), text, revision: 0 };
  state.messages.set(message.id, message);
  state.conversation.chosen[parent ?? "first"] = message.id;
  state.conversation.title ||= text.slice(0, 80);
  return message;
}

// ---- what is sent

const contentOf = (message) =>
  message.role === "user" ? message.text
    : message.parts.some((part) => part.type !== "text") ? message.parts.map(({ type, text }) => ({ type, text })) : textOf(message);

const lengthOf = (content) => (typeof content === "string" ? content.length : content.reduce((sum, part) => sum + part.text.length, 0));

/** The newest messages that the server takes, beginning with the user's, and how many older ones are left out. */
function fitting(system, shown, limits) {
  const all = shown.map((message) => ({ role: message.role, content: contentOf(message) }));
  for (const message of all) {
    // Only what was said before can be so long: what is asked now is not sent then.
    if (lengthOf(message.content) > limits.message_characters) {
      const text = typeof message.content === "string" ? message.content : message.content.map((part) => part.text).join("");
      message.content = text.slice(0, limits.message_characters);
    }
  }
  let first = all.length, characters = system.length;
  while (first > 0 && all.length - first < limits.messages - 1) {
    characters += lengthOf(all[first - 1].content);
    if (characters > limits.conversation_characters) break;
    first -= 1;
  }
  while (first < all.length - 1 && all[first].role !== "user") first += 1;
  const sent = all.slice(first);
  if (system) sent.unshift({ role: "system", content: system });
  return { sent, left: first };
}

// ---- answers

const running = new Map(); // conversation id -> {state, message, control}

export const runningIn = (state) => running.get(state.conversation.id);
export const stateOf = (id) => running.get(id)?.state;

/** Text goes on; a call of a tool begins anew where its number does. */
function join(parts, pieces) {
  for (const { type, text, index } of pieces) {
    if (parts.at(-1)?.type === type && parts.at(-1).index === index) parts.at(-1).text += text;
    else parts.push({ type, text, index });
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
  });
}

/**
 * Have `question` answered. tokens: what the answer begins with; into: the answer to go on with, else a new one.
 * show(what, failure): "begin", "grow" or "end"; say(text): how it stands.
 */
export async function answer(state, question, limits, { tokens = [], into = null, show, say }) {
  if (runningIn(state)) return;
  const { conversation, messages } = state;
  const before = into && structuredClone(into);
  const message = into ?? { id: newId(), conversation: conversation.id, parent: question.id, role: "assistant", created: Date.now(), parts: [], revision: 0 };
  Object.assign(message, { tokens: [...tokens], finish: null, note: "Not finished.", failed: false, dropped: 0, rate: 0 });
  messages.set(message.id, message);
  const shownBefore = conversation.chosen[question.id];
  conversation.chosen[question.id] = message.id;
  Object.assign(state, { trouble: null, remark: "" });
  const control = new AbortController();
  const save = (which) => state.removed ? null : store.save(conversation, which, running.has(conversation.id));
  running.set(conversation.id, { state, message, control, save: () => save([message]) });
  const { sent, left } = fitting(conversation.system, path(state, question), limits);
  let failure = null, dropped = left, began = 0, first = 0, saved = Date.now();
  const pulse = setInterval(() => store.beat(conversation.id), BEAT_EVERY);
  message.revision += 1;
  show("begin");
  try {
    await save([question]);
    for (let attempt = 0; ; attempt++) {
      try {
        for await (const piece of ask(sent, tokens.map((token) => token.id), control.signal)) {
          if (!began) {
            message.parts = []; // the text of the beginning comes again
            say("");
          }
          if (piece.tokens.length && !first) {
            first = piece.tokens.length;
            began = performance.now();
          }
          began ||= performance.now();
          join(message.parts, piece.parts);
          message.tokens.push(...piece.tokens);
          message.finish = piece.finish ?? message.finish;
          message.revision += 1;
          dropped += piece.dropped;
          show("grow");
          if (Date.now() - saved > SAVE_EVERY) {
            saved = Date.now();
            await save([message]);
          }
        }
        break;
      } catch (error) {
        if (error.kind !== "busy" || attempt >= PATIENCE) throw error;
        const wait = Math.min(20, error.after * 1.5 ** attempt);
        say(`The model is busy with others. Asking again in ${Math.round(wait)} s.`);
        await pause(wait, control.signal);
      }
    }
  } catch (error) {
    failure = control.signal.aborted ? { kind: "stopped", message: "Stopped." } : error;
  }
  running.delete(conversation.id);
  clearInterval(pulse);
  const written = message.tokens.length - tokens.length;
  const elapsed = performance.now() - began;
  if (written > first && elapsed > CHANCE) message.rate = Math.round((1000 * (written - first)) / elapsed);
  message.dropped = dropped;
  message.note = failure ? failure.message : message.finish === "length" ? "Cut off at the length limit." : message.parts.length ? "" : "The model said nothing.";
  message.failed = Boolean(failure && failure.kind !== "stopped");
  message.revision += 1;
  if (failure && !began) {
    // Nothing came: the question stays, to be asked again.
    if (before) Object.assign(message, before, { revision: message.revision });
    else {
      messages.delete(message.id);
      if (shownBefore) conversation.chosen[question.id] = shownBefore;
      else delete conversation.chosen[question.id];
    }
    const full = failure.kind === "refused" && tokens.length;
    state.trouble = full ? { kind: failure.kind, text: "The answer fills the model's context: there is no room to go on." }
      : { kind: failure.kind, text: failure.message, again: { question, tokens, into } };
  }
  say("");
  show("end", failure);
  await save(messages.has(message.id) ? [message] : []);
}

export function stop(state) {
  runningIn(state)?.control.abort();
}

/** Keep what has been written, since the page may go away. */
export function saveRunning() {
  for (const run of running.values()) run.save();
}

/** Another tab has deleted it: what is written here goes nowhere. */
export function forget(state) {
  state.removed = true;
  stop(state);
}
