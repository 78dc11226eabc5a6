// What this browser keeps. A conversation is a tree: editing a question or regenerating an answer adds a sibling, and
// `chosen` says which one is shown. Each message is a record of its own, so that two tabs never overwrite each other's.

const STORES = { conversations: "id", messages: "id" };
const tabs = "BroadcastChannel" in window ? new BroadcastChannel("nanochat") : null;
const memory = { conversations: new Map(), messages: new Map() };

let database; // undefined: not opened yet; null: the browser allows none

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

/** Whether anything lasts beyond this tab. */
export const keeps = async () => (await open()) !== null;

const copy = (value) => JSON.parse(JSON.stringify(value));

async function transact(mode, work) {
  const opened = await open();
  if (!opened) return undefined;
  return new Promise((resolve, reject) => {
    const transaction = opened.transaction(Object.keys(STORES), mode);
    const request = work((name) => transaction.objectStore(name));
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** All conversations, without their messages, the newest first. */
export async function list() {
  const all = (await keeps()) ? await transact("readonly", (store) => store("conversations").getAll()) : [...memory.conversations.values()];
  return all.sort((a, b) => b.updated - a.updated);
}

/** {conversation, messages: Map by id}, or null. */
export async function load(id) {
  if (!(await keeps())) {
    if (!memory.conversations.has(id)) return null;
    const own = [...memory.messages.values()].filter((message) => message.conversation === id);
    return { conversation: memory.conversations.get(id), messages: new Map(own.map((message) => [message.id, message])) };
  }
  const conversation = await transact("readonly", (store) => store("conversations").get(id));
  if (!conversation) return null;
  const own = await transact("readonly", (store) => store("messages").index("conversation").getAll(id));
  return { conversation, messages: new Map(own.map((message) => [message.id, message])) };
}

/** Keep a conversation and what is new of its messages. Where there is no room the chat goes on, and the page says so. */
export async function save(conversation, messages) {
  conversation.updated = Date.now();
  memory.conversations.set(conversation.id, conversation);
  for (const message of messages) memory.messages.set(message.id, message);
  try {
    await transact("readwrite", (store) => {
      for (const message of messages) store("messages").put(copy(message));
      return store("conversations").put(copy(conversation));
    });
    tabs?.postMessage(conversation.id);
  } catch (error) {
    document.getElementById("kept").textContent = `This browser could not keep it: ${error?.message ?? "no room"}`;
  }
}

export async function remove(id) {
  const found = await load(id);
  memory.conversations.delete(id);
  for (const message of found?.messages.keys() ?? []) memory.messages.delete(message);
  await transact("readwrite", (store) => {
    for (const message of found?.messages.keys() ?? []) store("messages").delete(message);
    return store("conversations").delete(id);
  });
  tabs?.postMessage(id);
}

/** Call back with the id of a conversation that another tab has changed. */
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
