// The server, as the page speaks to it: OpenAI's chat completions with the fields that nanochat adds to them.

import { settings } from "./store.js";

class Refusal extends Error {
  /** kind: busy, gone, key or refused. after: seconds to wait. */
  constructor(kind, message, after = 0) {
    super(message);
    Object.assign(this, { kind, after });
  }
}

const SAMPLING = ["temperature", "top_k", "top_p", "max_tokens", "seed"];
const ALTERNATIVES = 8;

function headers() {
  const { key } = settings();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered ${response.status}.`;
  if (response.status === 429) return new Refusal("busy", "The model is busy with others.", Number(response.headers.get("Retry-After")) || 2);
  if (response.status === 401) {
    return new Refusal("key", settings().key ? "The server refused this API key." : "This server wants an API key: give it in the settings.");
  }
  return new Refusal(response.status >= 500 ? "gone" : "refused", message);
}

/** The events of a response: each block of the stream is one `data: ...` line. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const received = (pending + value).split("\n\n");
    pending = received.pop();
    for (const block of received) if (block.startsWith("data: ")) yield block.slice(6);
  }
}

/** An answer to the messages, in pieces {parts, tokens, finish, dropped}; answer_ids: what it begins with. */
export async function* ask(messages, answerIds, signal) {
  const chosen = settings();
  const sampling = Object.fromEntries(SAMPLING.filter((name) => chosen[name] != null).map((name) => [name, chosen[name]]));
  const body = { messages, ...sampling, stream: true, microscope: ALTERNATIVES };
  if (answerIds.length) body.answer_ids = answerIds;
  const request = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await fetch("v1/chat/completions", request).catch((error) => {
    throw signal.aborted ? error : new Refusal("gone", "The server cannot be reached.");
  });
  if (!response.ok) throw await refusal(response);
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal("gone", event.error.message);
      const [choice] = event.choices;
      const parts = choice.delta.parts ?? (choice.delta.content ? [{ type: "text", text: choice.delta.content }] : []);
      yield { parts, tokens: choice.tokens ?? [], finish: choice.finish_reason, dropped: event.dropped ?? 0 };
    }
  } catch (error) {
    if (signal.aborted || error instanceof Refusal) throw error;
  }
  throw new Refusal("gone", "The answer broke off: the server went away.");
}

export async function stats() {
  const response = await fetch("stats", { headers: headers() }).catch(() => null);
  if (!response) throw new Refusal("gone", "The server cannot be reached.");
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** "ok", "starting", "failed", or "gone". */
export async function health() {
  const response = await fetch("health").catch(() => null);
  return (await response?.json().catch(() => null))?.status ?? "gone";
}
