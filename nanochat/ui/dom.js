// Elements from words. Text is only ever set as text: nothing here makes markup of a string.

const ICONS = {
  copy: "M9 9h10v10H9zM5 15V5h10",
  edit: "M5 19h3l10-10-3-3L5 16zM13 8l3 3",
  again: "M5 12a7 7 0 1 1 2 5M5 20v-4h4",
  more: "M5 12h13M13 7l5 5-5 5",
  left: "m14 6-6 6 6 6",
  right: "m10 6 6 6-6 6",
  close: "M6 6l12 12M18 6 6 18",
};

/** A new element. props: class, text, hidden, on<event>; anything else is an attribute. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "hidden" || name === "disabled") node[name] = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  if (tag === "button") node.type = "button";
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function iconButton(icon, label, onclick, props = {}) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[icon]);
  svg.append(path);
  return el("button", { class: "icon small", "aria-label": label, title: label, onclick, ...props }, svg);
}

/** Copy, and say so on the button for a moment. */
export function copyButton(text) {
  const button = iconButton("copy", "Copy", async () => {
    try {
      await navigator.clipboard.writeText(text());
      announce(button, "Copied");
    } catch {
      announce(button, "The browser does not allow copying"); // not over plain HTTP from another machine
    }
  });
  return button;
}

function announce(button, words) {
  const status = document.getElementById("status");
  status.textContent = words;
  button.classList.add("done");
  setTimeout(() => {
    button.classList.remove("done");
    if (status.textContent === words) status.textContent = "";
  }, 1500);
}
