// What the model said: a prompt, its responses side by side, every token coloured. All of it is text that nobody vouches for.

const COLOURS = {
  ratio: ["log-ratio", "Log-probability of the token after the update minus before: blue less likely, orange more likely."],
  advantage: ["advantage", "What the token is rewarded with against its group: blue worse, orange better."],
  rollout: ["probability", "With which probability the server drew the token."],
};
const PROBABILITIES = [[0.9, "≥ 90 %"], [0.5, "≥ 50 %"], [0.1, "≥ 10 %"], [0.01, "≥ 1 %"], [0, "less"]];
const AUTHORS = { e: "written by the environment", d: "by the policy, not learned from" };
const FINISHES = {
  stop: "ended by itself", length: "cut off at the limit of length", abort: "aborted", budget: "cut off: the token budget was used up", error: "ended by an error",
};

function signed(value, digits) {
  return `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(digits)}`;
}

class SampleBrowser {
  constructor(groups) {
    this.groups = groups;
    this.group = Math.max(0, groups.findIndex((group) => group.id === place.get("group")));
    this.sample = 0;
    this.token = null;
    this.colour = place.get("colour", groups.some((group) => group.traced) ? "ratio" : "rollout");
    this.sorted = place.get("sort") === "reward";
    this.select = h("select", { id: "group", onchange: (event) => this.choose(parseInt(event.target.value, 10)) },
      groups.map((group, index) => h("option", { value: index }, `step ${group.step} · ${group.key} · reward ${plain(meanReward(group))}`)));
    this.key = h("div", { class: "legend", id: "colours" });
    this.body = h("div", { id: "group-body" });
    this.detail = h("output", { id: "token", "aria-live": "polite" });
    this.element = h("div", { id: "browser", onkeydown: (event) => this.keys(event) }, this.controls(), this.key, this.body, this.detail);
    this.draw(place.number("sample", 0));
  }

  controls() {
    const step = (by, title) => h("button", { type: "button", id: `group-${by < 0 ? "newer" : "older"}`, onclick: () => this.choose(this.group + by) }, title);
    return h("div", { class: "bar" }, h("label", { class: "field" }, "Group ", this.select), step(-1, "↑ newer"), step(1, "↓ older"),
      choice("colour", "Colour tokens by", Object.entries(COLOURS).map(([name, [title, text]]) => [name, title, text]), this.colour, (value) => {
        this.colour = value;
        place.set("colour", value);
        this.draw(this.sample);
      }),
      h("label", { class: "check" }, h("input", {
        type: "checkbox", id: "sort", checked: this.sorted, onchange: (event) => {
          this.sorted = event.target.checked;
          place.set("sort", this.sorted ? "reward" : null);
          this.draw(0);
        },
      }), "best first"));
  }

  choose(group) {
    this.group = clamp(group, 0, this.groups.length - 1);
    place.set("group", this.group ? this.groups[this.group].id : null);
    this.draw(0);
  }

  samples() {
    const all = [...this.groups[this.group].samples];
    return this.sorted ? all.sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity)) : all;
  }

  draw(sample) {
    const group = this.groups[this.group], had = this.body.contains(document.activeElement);
    this.select.value = String(this.group);
    this.scale = this.largest(group);
    this.key.replaceChildren(...this.colourKey());
    this.cards = this.samples().map((each, index) => this.card(each, index));
    const cut = group.size > group.samples.length ? `, the first ${group.samples.length} of which are shown` : "";
    this.body.replaceChildren(
      h("div", { class: "prompt" }, h("h3", {}, `Prompt, with ${group.size} responses${cut}`), h("pre", { tabindex: 0 }, group.prompt)),
      h("div", { class: "cards", role: "group", "aria-label": "Responses. Left and right move between them, up and down between groups, comma and full stop from token to token." }, this.cards));
    this.chooseSample(clamp(sample, 0, this.cards.length - 1), had);
  }

  // Only the chosen response is in the order of the Tab key; arrows reach the others.
  chooseSample(index, focus) {
    this.sample = index;
    this.mark(null);
    place.set("sample", index || null);
    this.cards.forEach((card, number) => {
      card.setAttribute("tabindex", number === index ? 0 : -1);
      card.toggleAttribute("data-chosen", number === index);
    });
    if (focus) this.cards[index].focus();
  }

  keys(event) {
    if (event.target.matches("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = {
      ArrowLeft: () => this.chooseSample(clamp(this.sample - 1, 0, this.cards.length - 1), true),
      ArrowRight: () => this.chooseSample(clamp(this.sample + 1, 0, this.cards.length - 1), true),
      Home: () => this.chooseSample(0, true),
      End: () => this.chooseSample(this.cards.length - 1, true),
      ArrowUp: () => this.choose(this.group - 1),
      ArrowDown: () => this.choose(this.group + 1),
      ",": () => this.step(-1),
      ".": () => this.step(1),
    };
    if (!moves[event.key] || event.target.matches("pre")) return;
    event.preventDefault();
    moves[event.key]();
  }

  // The largest size of what the colours mean in this group, the rarest hundredth left out.
  largest(group) {
    const sizes = group.samples.flatMap((each) => this.values(each) || []).filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
    return sizes.length ? sizes[Math.floor((sizes.length - 1) * 0.99)] || sizes[sizes.length - 1] || 1 : 1;
  }

  values(sample) {
    if (this.colour === "rollout") return sample.log_probs;
    if (this.colour === "ratio") return sample.log_ratio || null;
    if (sample.token_advantage) return sample.token_advantage;
    return sample.advantage === undefined ? null : sample.ids.map(() => sample.advantage);
  }

  colourKey() {
    const swatch = (kind, text) => h("span", {}, h("span", { class: `t ${kind}` }, "token"), ` ${text}`);
    const others = [swatch("e", "environment"), swatch("d", "not learned")];
    if (this.colour === "rollout") return [...PROBABILITIES.map(([, text], index) => swatch(`p${index}`, text)), ...others];
    if (!this.groups[this.group].traced) return [h("span", {}, "This group was not traced: choose probability to colour its tokens.")];
    const digits = this.colour === "ratio" ? 4 : 2;
    const bins = [-4, -2, 0, 2, 4].map((bin) => swatch(`v${bin}`, bin ? signed((bin / 4) * this.scale, digits) : "0"));
    return [...bins, ...others];
  }

  card(sample, index) {
    const clipped = sample.clipped ? explained("✂ clipped", "The clip took this sequence's gradient: it taught nothing in this update.", "badge clip") : null;
    const failed = sample.failure ? explained("! no honest reward", sample.failure, "badge fail") : null;
    const ended = FINISHES[sample.finish] || sample.finish;
    const facts = [
      ...Object.entries(sample.rewards).map(([name, value]) => [name, plain(value ?? NaN), `Reward component ${name}, unweighted.`]),
      ...(sample.advantage === undefined ? [] : [
        ["advantage", signed(sample.advantage ?? 0, 3), "The reward against those of the group, as the objective takes it."],
        ["ratio", sample.ratio === null ? "none" : sample.ratio.toFixed(5), "New over old probability of the sequence, as the surrogate takes it."]]),
      ["length", `${grouped.format(sample.length)} tokens`, `Tokens behind the prompt; ${ended}.`],
      ["weights", versions(sample.versions), "Version of the weights that wrote it; two when it lived through an update."],
    ];
    return h("article", {
      id: `response-${index}`, class: `card${sample.clipped ? " clipped" : ""}`, "aria-label": `Response ${sample.index}, reward ${plain(sample.reward ?? NaN)}${sample.clipped ? ", clipped" : ""}, ${ended}`,
      onclick: () => this.chooseSample(index, false), onfocus: () => this.sample !== index && this.chooseSample(index, false),
    },
    h("header", {}, h("span", { class: "number" }, `#${sample.index}`),
      explained(plain(sample.reward ?? NaN), "The whole reward of this response.", "reward"), clipped, failed,
      sample.finish === "stop" ? null : explained(sample.finish, `This response ${ended}.`, "badge")),
    h("dl", {}, facts.map(([name, value, text]) => h("div", { "data-tip": text }, h("dt", {}, name), h("dd", {}, value)))),
    this.text(sample, index),
    sample.text ? folded(`text-${this.group}-${index}`, "As text", h("pre", {}, sample.text)) : null,
    sample.ids.length < sample.length ? h("p", { class: "lead" }, `The first ${grouped.format(sample.ids.length)} of ${grouped.format(sample.length)} tokens.`) : null);
  }

  text(sample, index) {
    const values = this.values(sample), authors = sample.ids.map(() => "p");
    for (const [start, stop, author] of sample.authors) authors.fill(author, start, stop);
    const tokens = sample.ids.map((id, at) => h("span", { class: `t ${this.kind(values, authors, at)}`, "data-at": at },
      sample.pieces ? sample.pieces[at] || "\u200b" : `${id} `));
    return h("div", {
      class: "tokens", dir: "auto", "data-own-tip": true, onpointerover: (event) => {
        const at = event.target.dataset?.at;
        if (at !== undefined) showTip(this.told(sample, parseInt(at, 10)), event.clientX, event.clientY + 4);
      }, onpointerleave: hideTip, onclick: (event) => {
        if (event.target.dataset?.at === undefined) return;
        event.stopPropagation();
        this.chooseSample(index, false);
        this.mark(parseInt(event.target.dataset.at, 10));
      },
    }, tokens);
  }

  kind(values, authors, at) {
    if (authors[at] !== "p") return authors[at];
    const value = values ? values[at] : null;
    if (value === null || value === undefined) return "";
    if (this.colour === "rollout") return `p${PROBABILITIES.findIndex(([least]) => Math.exp(Math.min(value, 0)) >= least)}`;
    return `v${clamp(Math.round((value / this.scale) * 4), -4, 4)}`;
  }

  told(sample, at) {
    const parts = [`token ${at}, id ${sample.ids[at]}`], author = sample.authors.find(([start, stop]) => start <= at && at < stop);
    if (author && AUTHORS[author[2]]) parts.push(AUTHORS[author[2]]);
    if (!author || author[2] !== "e") {
      if (sample.log_probs[at] !== null) parts.push(`drawn with ${format(Math.exp(sample.log_probs[at]), "share")} (log-prob ${sample.log_probs[at].toFixed(3)})`);
      if (sample.log_ratio && sample.log_ratio[at] !== null) parts.push(`log-ratio new − old ${signed(sample.log_ratio[at], 5)}`);
      if (sample.token_advantage) parts.push(`advantage ${signed(sample.token_advantage[at] ?? 0, 3)}`);
      else if (sample.advantage !== undefined) parts.push(`advantage ${signed(sample.advantage ?? 0, 3)}`);
      if (author && author[3] !== null) parts.push(`weights ${author[3]}`);
    }
    return parts.join(" · ");
  }

  step(by) {
    const last = this.samples()[this.sample].ids.length - 1;
    if (last >= 0) this.mark(clamp(this.token === null ? (by > 0 ? 0 : last) : this.token + by, 0, last));
  }

  // One token of the chosen response, told in full below.
  mark(at) {
    this.body.querySelector(".t.here")?.classList.remove("here");
    this.token = at;
    if (at === null) {
      this.detail.textContent = "";
      return;
    }
    const token = this.cards[this.sample].querySelector(`[data-at="${at}"]`);
    token.classList.add("here");
    token.scrollIntoView({ block: "nearest" });
    this.detail.textContent = this.told(this.samples()[this.sample], at);
  }
}

function meanReward(group) {
  const known = group.samples.map((sample) => sample.reward).filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : NaN;
}

function versions([oldest, newest]) {
  if (oldest === null) return "none";
  return oldest === newest ? String(oldest) : `${oldest} to ${newest}`;
}

function samplesPanel() {
  const { groups, note } = data.samples;
  const lead = "What was asked and said. Arrow keys: left and right between responses, up and down between groups; comma and full stop from token to token.";
  return panel("samples", "Samples", lead, note ? missing(note) : null, groups.length ? new SampleBrowser(groups).element : null);
}
