// What can be typed after a slash. Each returns a remark to show.

import { change, settings } from "./store.js";

function number(name, words, low, high, whole) {
  return (text, { defaults }) => {
    if (!text) return `${words} is ${settings()[name] ?? defaults[name] ?? "none"}.`;
    const value = Number(text);
    if (!(value >= low && value <= high) || (whole && !Number.isInteger(value))) {
      return `${words} is ${whole ? "a whole number" : "a number"} from ${low} to ${high}.`;
    }
    change({ [name]: value });
    return `${words} is now ${value}.`;
  };
}

const none = Number.MAX_SAFE_INTEGER;

export const COMMANDS = {
  "/temperature": { takes: "0 to 2", does: "how freely the next token is drawn; 0 takes the likeliest", run: number("temperature", "Temperature", 0, 2) },
  "/topk": { takes: "0 to 200", does: "draw from the so many likeliest tokens; 0: all", run: number("top_k", "Top-k", 0, 200, true) },
  "/topp": { takes: "0 to 1", does: "draw from the likeliest tokens that have this share together", run: number("top_p", "Top-p", 0, 1) },
  "/seed": {
    takes: "a number, or none",
    does: "the same seed draws the same answer",
    run: (text, app) => (text === "none" ? (change({ seed: null }), "Each answer has a new seed.") : number("seed", "Seed", -none, none, true)(text, app)),
  },
  "/system": {
    takes: "text",
    does: "what the model is told before this conversation",
    run: (text, app) => (app.setSystem(text), text ? "The system prompt is set." : "There is no system prompt now."),
  },
  "/clear": { takes: "", does: "a new conversation", run: (_, app) => (app.newChat(), "") },
  "/help": { takes: "", does: "this list, and the keys", run: () => `${matching("/").join("\n")}\n\nEnter sends, Shift+Enter breaks the line, Esc stops, ↑ in an empty box edits the last question. In the microscope ← and → move from token to token.` },
};

/** The lines of help for what begins like `text`. */
export function matching(text) {
  const word = text.split(/\s/)[0];
  const found = Object.entries(COMMANDS).filter(([name]) => (text.includes(" ") ? name === word : name.startsWith(word)));
  return found.map(([name, { takes, does }]) => `${name}${takes ? ` (${takes})` : ""}: ${does}`);
}

/** The remark of a command, or null where the text is none: a line that only begins with a slash is a question. */
export function run(text, app) {
  const [word, ...rest] = text.split(/\s+/);
  if (Object.hasOwn(COMMANDS, word)) return COMMANDS[word].run(text.slice(word.length).trim(), app);
  if (rest.length || !/^\/[a-z]+$/i.test(word)) return null;
  return `${word} is not a command here.\n${matching("/").join("\n")}`;
}
