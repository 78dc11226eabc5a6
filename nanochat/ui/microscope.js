// An answer as the model wrote it: token by token, each as sure as it was, with what else it might have been.

import { el, iconButton } from "./dom.js";

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  if (p < 0.1 || (p > 99.9 && p < 100)) return p < 0.1 ? "<0.1 %" : ">99.9 %";
  return `${p.toFixed((p >= 10 && p <= 99) || p === 100 ? 0 : 1)} %`;
};

/** A token's text where every character can be seen. */
function shown(text) {
  return text.replace(/ /g, "·").replace(/\t/g, "⇥").replace(/\r/g, "␍").replace(/\n/g, "⏎") || "∅";
}

const name = (token) => (token.special ? token.text.replace(/[<|>]/g, "") : shown(token.text));

function label(token) {
  const by = token.forced ? ", put in by a tool" : token.chosen ? ", chosen by you" : "";
  return `${JSON.stringify(token.text)}, ${percent(token.logprob)}${by}`;
}

/**
 * The tokens of an answer. goOn(index, alternative) is called for an answer that goes on from another token;
 * null: none may. Arrow keys move between tokens; Enter looks at one.
 */
export function tokenView(tokens, goOn) {
  const view = el("div", { class: "microscope" });
  const line = el("div", { class: "tokens", role: "group", "aria-label": "Tokens of the answer" });
  const panel = el("div", { class: "panel", role: "region", "aria-label": "Token", hidden: true });
  const buttons = [];
  let current = 0;

  const move = (to) => {
    if (!buttons[to]) return;
    buttons[current].tabIndex = -1;
    buttons[to].tabIndex = 0;
    buttons[to].focus();
    current = to;
  };
  const close = (refocus) => {
    panel.hidden = true;
    for (const button of buttons) button.setAttribute("aria-expanded", "false");
    if (refocus) buttons[current].focus();
  };
  const look = (index) => {
    const again = !panel.hidden && buttons[index].getAttribute("aria-expanded") === "true";
    close(false);
    buttons[current].tabIndex = -1;
    buttons[(current = index)].tabIndex = 0;
    if (again) return;
    buttons[index].setAttribute("aria-expanded", "true");
    panel.replaceChildren(...details(tokens, index, goOn, () => close(true)));
    panel.hidden = false;
    panel.scrollIntoView({ block: "nearest" });
  };

  tokens.forEach((token, index) => {
    const kinds = ["token", token.special && "special", token.forced && "forced", token.chosen && "chosen"];
    const button = el("button", {
      class: kinds.filter(Boolean).join(" "),
      text: name(token),
      tabindex: index ? "-1" : "0",
      "aria-label": label(token),
      "aria-expanded": "false",
      onclick: () => look(index),
    });
    button.style.setProperty("--doubt", String(1 - Math.exp(token.logprob)));
    buttons.push(button);
    line.append(button);
    if (!token.special && token.text.includes("\n")) line.append(el("br"));
  });
  view.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && line.contains(event.target)) {
      event.preventDefault();
      move(current + step);
      if (!panel.hidden) look(current);
    } else if (event.key === "Escape" && !panel.hidden) {
      event.stopPropagation();
      close(true);
    }
  });
  view.append(line, panel);
  return view;
}

function details(tokens, index, goOn, close) {
  const token = tokens[index];
  const said = [];
  if (token.forced) said.push("Put in by the tool: the model did not choose it. This is how likely it found it.");
  else if (token.chosen) said.push("Chosen by you: the model went on from here.");
  if (token.special && index === tokens.length - 1 && /_end\|>$|bos/.test(token.text) && !/python|output/.test(token.text)) said.push("Here the model ended its turn.");
  const listed = token.likeliest.some((other) => other.id === token.id) ? token.likeliest : [...token.likeliest, token];
  const rows = listed.map((other) => alternative(other, other.id === token.id, goOn && other.id !== token.id && continues(other) ? () => goOn(index, other) : null));
  return [
    el("div", { class: "head" },
      el("code", { class: token.special ? "special" : "", text: name(token) }),
      el("span", { class: "small", text: `id ${token.id} · ${percent(token.logprob)} · token ${index + 1} of ${tokens.length}` }),
      iconButton("close", "Close", close),
    ),
    ...said.map((text) => el("p", { class: "small", text })),
    el("ol", { class: "alternatives", "aria-label": "The likeliest tokens here" }, ...rows),
    el("p", { class: "small", text: "As likely as the model finds them, before temperature, top-k and top-p." }),
  ];
}

/** Marks of turns end an answer: none goes on from them. */
const continues = (token) => !token.special || /python|output/.test(token.text);

function alternative(token, taken, goOn) {
  const inside = [
    el("code", { class: token.special ? "special" : "", text: name(token) }),
    el("span", { class: "bar" }),
    el("span", { class: "share", text: percent(token.logprob) }),
  ];
  const row = goOn
    ? el("button", { onclick: goOn, "aria-label": `Go on from ${JSON.stringify(token.text)}, ${percent(token.logprob)}` }, ...inside, el("span", { class: "go", text: "go on from here" }))
    : el("div", {}, ...inside, el("span", { class: "go", text: taken ? "taken" : "" }));
  row.style.setProperty("--share", String(Math.exp(token.logprob)));
  return el("li", { class: taken ? "taken" : "" }, row);
}
