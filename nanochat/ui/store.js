// What this browser keeps. A conversation is a tree: editing a question or regenerating an answer adds a sibling, and
// `chosen` says which one is shown. Each message is a record of its own, so that two tabs never overwrite each other's.

const STORES = { conversations: "id", messages: "id" };
const tabs = "BroadcastChannel" in window ? new BroadcastChannel("nanochat") : null;
const memory = { conversations: new Map(), messages: new Map() };

let database; // undefined: not opened yet; null: the browser allows none
let trouble = ""; // why something could not be kept

function open() {
  database ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open("nanochat", 1);
      request.onupgradeneeded = () => {
        for (const [name, keyPath] of Object.entries(STORES)) request.result.createObjectStore(name, { keyPath });
        request.transaction.objectStore("messages").createIndex("conversation", "conversation");
      };
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    } catch {
      resolve(null); // private windows of some browsers
    }
  });
  return database;
}

/** How conversations are kept, in words. */
export async function kept() {
  if (trouble) return `This browser could not keep it: ${trouble}`;
  return (await open()) ? "Kept in this browser only." : "This browser keeps nothing: conversations end with the tab.";
}

const copy = (value) => JSON.parse(JSON.stringify(value));

/** The result of work(store), a request; undefined where there is no database, or it fails: then memory goes on. */
async function transact(mode, work) {
  const opened = await open();
  if (!opened) return undefined;
  try {
    return await new Promise((resolve, reject) => {
      const transaction = opened.transaction(Object.keys(STORES), mode);
      const request = work((name) => transaction.objectStore(name));
      transaction.oncomplete = () => resolve(request?.result ?? null);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } catch (error) {
    trouble = error?.message || "there is no room";
    return undefined;
  }
}

/** All conversations, without their messages, the newest first. */
export async function list() {
  const found = await transact("readonly", (store) => store("conversations").getAll());
  const all = new Map((found ?? []).map((conversation) => [conversation.id, conversation]));
  if (!found) memory.conversations.forEach((conversation, id) => all.set(id, conversation));
  return [...all.values()].sort((a, b) => b.updated - a.updated);
}

/** {conversation, messages: Map by id}, or null. */
export async function load(id) {
  let conversation = await transact("readonly", (store) => store("conversations").get(id));
  let own = await transact("readonly", (store) => store("messages").index("conversation").getAll(id));
  if (conversation === undefined || own === undefined) {
    conversation = memory.conversations.get(id);
    own = [...memory.messages.values()].filter((message) => message.conversation === id);
  }
  return conversation ? { conversation, messages: new Map(own.map((message) => [message.id, message])) } : null;
}

/** Keep a conversation and what is new of its messages. Where that fails the chat goes on, and kept() says so. */
export async function save(conversation, messages, writing = false) {
  conversation.updated = Date.now();
  memory.conversations.set(conversation.id, conversation);
  for (const message of messages) memory.messages.set(message.id, message);
  await transact("readwrite", (store) => {
    for (const message of messages) store("messages").put(copy(message));
    return store("conversations").put(copy(conversation));
  });
  tabs?.postMessage({ id: conversation.id, what: writing ? "writing" : "saved" });
}

/** Tell other tabs that this one goes on writing. */
export const beat = (id) => tabs?.postMessage({ id, what: "writing" });

export async function remove(id) {
  const found = await load(id);
  memory.conversations.delete(id);
  for (const message of found?.messages.keys() ?? []) memory.messages.delete(message);
  await transact("readwrite", (store) => {
    for (const message of found?.messages.keys() ?? []) store("messages").delete(message);
    return store("conversations").delete(id);
  });
  tabs?.postMessage({ id, what: "removed" });
}

/** Call back with {id, what} when another tab has saved, removed, or goes on writing a conversation. */
export function onChange(callback) {
  if (tabs) tabs.onmessage = (event) => callback(event.data);
}

// ---- settings

export function settings() {
  try {
    return JSON.parse(localStorage.getItem("nanochat.settings")) ?? {};
  } catch {
    return memory.settings ?? {};
  }
}

export function change(changes) {
  memory.settings = { ...settings(), ...changes };
  try {
    localStorage.setItem("nanochat.settings", JSON.stringify(memory.settings));
  } catch {
    return; // kept for this tab, in memory
  }
}
