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

const COMMANDS = {
  "/temperature": { takes: "0 to 2", does: "how freely the next token is drawn; 0 takes the likeliest", run: number("temperature", "Temperature", 0, 2) },
  "/topk": { takes: "0 to 200", does: "draw from the so many likeliest tokens; 0: all", run: number("top_k", "Top-k", 0, 200, true) },
  "/topp": { takes: "0 to 1", does: "draw from the likeliest tokens that have this share together", run: number("top_p", "Top-p", 0, 1) },
  "/seed": {
    takes: "a number, or none",
    does: "the same seed draws the same answer",
    run: (text, app) => (text === "none" ? (change({ seed: null }), "Each answer has a new seed.") : number("seed", "Seed", -none, none, true)(text, app)),
  },
  "/system": {
    takes: "text, or none",
    does: "what the model is told before this conversation",
    run(text, app) {
      if (text) app.setSystem(text === "none" ? "" : text);
      return app.system() ? `The system prompt is: ${app.system()}` : "There is no system prompt.";
    },
  },
  "/clear": { takes: "", does: "a new conversation", run: (_, app) => (app.newChat(), "") },
  "/help": { takes: "", does: "this list, and the keys", run: () => `${all()}\n\nEnter sends, Shift+Enter breaks the line, Esc stops, ↑ in an empty box edits the last question. In the microscope ← and → move from token to token.` },
};

const line = (name) => `${name}${COMMANDS[name].takes ? ` (${COMMANDS[name].takes})` : ""}: ${COMMANDS[name].does}`;

/** The commands that what is typed may become, as {name, line}. */
export function matching(text) {
  const word = text.split(/\s/)[0].toLowerCase();
  const names = Object.keys(COMMANDS).filter((name) => (/\s/.test(text) ? name === word : name.startsWith(word)));
  return text.startsWith("/") ? names.map((name) => ({ name, line: line(name) })) : [];
}

const all = () => Object.keys(COMMANDS).map(line).join("\n");

/** The remark of a command, or null where the text is none: a line that only begins with a slash is a question. */
export function run(text, app) {
  const [word, ...rest] = text.split(/\s+/);
  const name = word.toLowerCase();
  if (Object.hasOwn(COMMANDS, name)) return COMMANDS[name].run(text.slice(word.length).trim(), app);
  return rest.length || !/^\/[a-z]+$/.test(name) ? null : `${word} is not a command here.\n${all()}`;
}
