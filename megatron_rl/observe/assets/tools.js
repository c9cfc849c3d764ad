// What every panel uses: elements, numbers, explanations on hover and focus, and the place that survives a reload.

const data = JSON.parse(document.getElementById("data").textContent);
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

// -- elements: texts become text nodes and nothing else ----------------------------------------------------------------

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

// -- numbers -----------------------------------------------------------------------------------------------------------

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function plain(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e7 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return grouped.format(value);
  return value.toFixed(size >= 100 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4);
}

function format(value, unit) {
  if (value === null || value === undefined || Number.isNaN(value)) return "none";
  switch (unit) {
    case "share": return `${(value * 100).toFixed(Math.abs(value) < 0.1 || (value > 0.99 && value < 1) ? 2 : 1)} %`;
    case "ratio": return value.toFixed(5);
    case "tokens": return `${grouped.format(value)} tokens`;
    case "tokens/s": return `${grouped.format(value)} tokens/s`;
    case "bytes": return `${(value / 2 ** 30).toFixed(2)} GiB`;
    case "s": return `${value.toFixed(value < 10 ? 2 : 1)} s`;
    case "steps": return `${plain(value)} steps`;
    case "nats": return `${plain(value)} nats`;
    default: return plain(value);
  }
}

// Numbers of an axis, with as few digits as tell them apart; its legend has the unit.
function ticks(values, unit) {
  const scale = unit === "share" ? 100 : unit === "bytes" ? 2 ** -30 : 1, sign = unit === "share" ? " %" : unit === "s" ? " s" : "";
  const sizes = values.map((value) => Math.abs(value * scale)), largest = Math.max(...sizes);
  const short = largest !== 0 && (largest < 1e-2 || largest >= 1e6);
  for (let digits = 1; ; digits++) {
    const texts = values.map((value) => {
      if (value === 0) return `0${sign}`;
      const rounded = parseFloat((value * scale).toPrecision(digits));
      return (short ? rounded.toExponential().replace("e+", "e") : rounded.toLocaleString("en", { maximumFractionDigits: 9 })) + sign;
    });
    const exact = values.every((value) => Math.abs(parseFloat((value * scale).toPrecision(digits)) - value * scale) <= largest * 1e-4);
    if (digits > 8 || (exact && new Set(texts).size === texts.length)) return texts;
  }
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}

function moment(seconds) {
  return new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

function clamp(value, least, most) {
  return Math.min(most, Math.max(least, value));
}

// -- the place on the page, kept in its address ------------------------------------------------------------------------

const place = {
  values: new URLSearchParams(location.hash.slice(1)),
  get(name, otherwise = null) {
    return this.values.get(name) ?? otherwise;
  },
  number(name, otherwise) {
    const value = parseFloat(this.values.get(name));
    return Number.isFinite(value) ? value : otherwise;
  },
  set(name, value) {
    if (value === null || value === "") this.values.delete(name);
    else this.values.set(name, value);
    history.replaceState(null, "", `#${this.values}`);
  },
};

// -- explanations ------------------------------------------------------------------------------------------------------

const tip = h("div", { id: "tip", role: "tooltip", hidden: true });

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${clamp(x - box.width / 2, 8, Math.max(8, document.documentElement.clientWidth - box.width - 8))}px`;
  tip.style.top = `${y + box.height + 18 > innerHeight ? y - box.height - 12 : y + 14}px`;
}

function hideTip() {
  tip.hidden = true;
}

function tipUnder(element) {
  const box = element.getBoundingClientRect();
  showTip(element.dataset.tip, box.left + box.width / 2, box.bottom - 8);
}

for (const kind of ["pointerover", "focusin"]) {
  document.addEventListener(kind, (event) => {
    const owner = event.target.closest?.("[data-tip]");
    if (owner) tipUnder(owner);
    else if (!event.target.closest?.("[data-own-tip]")) hideTip();
  });
}
document.addEventListener("focusout", hideTip);
document.addEventListener("scroll", hideTip, { passive: true });
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

// A word or number that explains itself, to the pointer and to the keyboard.
function explained(text, explanation, kind = "what") {
  return h("span", { class: kind, tabindex: 0, "data-tip": explanation, "aria-description": explanation }, text);
}

// -- panels ------------------------------------------------------------------------------------------------------------

function panel(id, title, lead, ...children) {
  return h("section", { id, "aria-labelledby": `${id}-title` },
    h("h2", { id: `${id}-title`, tabindex: -1 }, title), lead ? h("p", { class: "lead" }, lead) : null, ...children);
}

function missing(sentence) {
  return h("p", { class: "missing" }, sentence);
}

function folded(id, title, ...children) {
  const open = (place.get("open") || "").split(",");
  return h("details", {
    id, open: open.includes(id), ontoggle: () => {
      const all = [...document.querySelectorAll("details[open]")].map((each) => each.id);
      place.set("open", all.join(","));
    },
  }, h("summary", { id: `${id}-summary` }, title), ...children);
}

function choice(name, legend, options, chosen, change) {
  return h("fieldset", { class: "choice" }, h("legend", {}, legend), options.map(([value, title, explanation]) =>
    h("label", { "data-tip": explanation },
      h("input", {
        type: "radio", name, value, id: `${name}-${value}`, checked: value === chosen, onchange: () => change(value),
      }), h("span", {}, title))));
}

function table(head, rows, caption) {
  return h("div", { class: "scroll" }, h("table", {}, caption ? h("caption", {}, caption) : null,
    h("thead", {}, h("tr", {}, head.map((cell) => h("th", { scope: "col" }, cell)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, index) =>
      index ? h("td", {}, cell) : h("th", { scope: "row" }, cell)))))));
}
