// Where the time of a step goes: seconds by phase over the run, and the phases of some steps side by side.

// Phases keep their colour whichever of them a run has.
const PHASES = ["sample", "update", "old", "score", "publish", "wait", "evaluate", "checkpoint", "export"];

function phaseColour(name) {
  const known = PHASES.indexOf(name);
  return known >= 0 ? known : [...name].reduce((sum, letter) => sum + letter.charCodeAt(0), 0) % PHASES.length;
}

function phaseKey(names) {
  return h("ul", { class: "legend" }, names.map((name) => h("li", {},
    svg("svg", { class: "swatch", viewBox: "0 0 12 12", "aria-hidden": "true" },
      svg("rect", { width: 12, height: 12, rx: 2, class: `area c${phaseColour(name)}` })), name)));
}

class Overview {
  constructor(overview, choose) {
    this.overview = overview;
    this.choose = choose;
    this.names = Object.keys(overview.named).sort((a, b) => phaseColour(a) - phaseColour(b));
    this.cursor = overview.steps.length - 1;
    this.plot = h("div", {
      class: "plot tall", id: "phases", tabindex: 0, role: "img", "data-own-tip": true, "aria-label": this.words(),
      onkeydown: (event) => this.key(event), onpointermove: (event) => this.point(event), onpointerleave: hideTip,
      onclick: (event) => this.choose(this.overview.steps[this.at(event)]),
    });
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  words() {
    const means = this.names.map((name) => {
      const known = this.overview.named[name].mean.filter((value) => value !== null);
      return `${name} ${format(known.reduce((sum, value) => sum + value, 0) / known.length, "s")}`;
    });
    return `Seconds by phase of each step. Means: ${means.join(", ")}. Arrow keys read single steps, Enter shows one below.`;
  }

  draw() {
    const width = this.plot.clientWidth, height = this.plot.clientHeight, { steps, named } = this.overview;
    if (!width) return;
    const sums = steps.map((_, at) => this.names.reduce((sum, name) => sum + (named[name].mean[at] || 0), 0));
    const high = Math.max(...sums, 1e-6), marks = niceTicks(0, high, 4), texts = ticks(marks, "s");
    const left = 12 + 6.4 * Math.max(0, ...texts.map((text) => text.length)), bottom = 20, top = 6;
    const y = (value) => height - bottom - (value / high) * (height - bottom - top);
    this.left = left;
    this.wide = (width - left - 8) / steps.length;
    const gap = this.wide > 5 ? 1.5 : 0;
    const labels = Math.max(1, Math.ceil(steps.length / (width / 70)));
    const bars = steps.map((step, at) => {
      let below = 0;
      return this.names.map((name) => {
        const value = named[name].mean[at] || 0, from = below;
        below += value;
        const box = { x: left + at * this.wide, width: Math.max(0.5, this.wide - gap), y: y(below), height: Math.max(0, y(from) - y(below)) };
        return svg("rect", { ...box, class: `area c${phaseColour(name)}` });
      });
    });
    this.mark = svg("rect", { class: "mark", y: top - 4, height: height - bottom - top + 4, width: Math.max(2, this.wide), visibility: "hidden" });
    this.plot.replaceChildren(svg("svg", { width, height, "aria-hidden": "true" },
      marks.map((value, index) => [
        svg("line", { class: "grid", x1: left, x2: width - 8, y1: y(value), y2: y(value) }),
        svg("text", { class: "tick end", x: left - 6, y: y(value) + 3.5 }, texts[index])]),
      bars, steps.map((step, at) => at % labels ? null :
        svg("text", { class: "tick middle", x: left + (at + 0.5) * this.wide, y: height - 5 }, String(step))), this.mark));
  }

  at(event) {
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    return clamp(Math.floor((x - this.left) / this.wide), 0, this.overview.steps.length - 1);
  }

  point(event) {
    this.tell(this.at(event), event.clientX, event.clientY);
  }

  tell(at, x, y) {
    const { steps, named, apart } = this.overview;
    const parts = this.names.filter((name) => named[name].mean[at] !== null).map((name) => `${name} ${format(named[name].mean[at], "s")}`);
    showTip(`step ${steps[at]}${apart > 1 ? ` (mean of ${apart})` : ""}: ${parts.join(", ")}`, x, y);
    this.mark.setAttribute("x", this.left + at * this.wide);
    this.mark.setAttribute("visibility", "visible");
  }

  key(event) {
    const end = this.overview.steps.length - 1;
    if (event.key === "Enter") this.choose(this.overview.steps[this.cursor]);
    const next = { ArrowLeft: this.cursor - 1, ArrowRight: this.cursor + 1, Home: 0, End: end }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    this.cursor = clamp(next, 0, end);
    const box = this.plot.getBoundingClientRect();
    this.tell(this.cursor, box.left + this.left + (this.cursor + 0.5) * this.wide, box.top + 20);
  }
}

class Gantt {
  constructor(steps) {
    this.steps = steps;
    this.count = place.number("span", 1);
    this.last = this.index(place.number("phase", null));
    this.title = h("h3", {});
    this.plot = h("div", { class: "plot gantt", id: "gantt" });
    this.listing = h("div", {});
    this.slide = h("input", {
      type: "range", id: "gantt-step", min: 0, max: steps.length - 1, value: this.last, "aria-label": "step whose phases are shown",
      oninput: (event) => this.choose(parseInt(event.target.value, 10)),
    });
    this.element = h("div", { class: "below" },
      h("div", { class: "bar" }, this.title, h("label", { class: "slider" }, "Step", this.slide),
        choice("span", "Steps at once", [["1", "1"], ["3", "3"], ["8", "8"]], String(this.count), (value) => {
          this.count = parseInt(value, 10);
          place.set("span", value);
          this.draw();
        })),
      this.plot, folded("gantt-table", "The same as a table", this.listing));
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  index(step) {
    const found = this.steps.findIndex((each) => each.step === step);
    return found >= 0 ? found : this.steps.length - 1;
  }

  chooseStep(step) {
    this.choose(this.index(step));
  }

  choose(index) {
    this.last = index;
    this.slide.value = index;
    place.set("phase", index === this.steps.length - 1 ? null : this.steps[index].step);
    this.draw();
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    const shown = this.steps.slice(Math.max(0, this.last - this.count + 1), this.last + 1);
    const begin = Math.min(...shown.map((each) => each.begin));
    const spans = shown.flatMap((each) => each.spans.map(([name, lane, start, stop]) =>
      ({ step: each.step, name, lane, start: start + each.begin - begin, stop: stop + each.begin - begin })));
    const lanes = [...new Set(spans.map((span) => span.lane))].sort((a, b) => (a === "train" ? -1 : b === "train" ? 1 : a < b ? -1 : 1));
    const high = Math.max(...spans.map((span) => span.stop), 1e-6), left = 64, row = 30, height = lanes.length * row + 24;
    const x = (seconds) => left + (seconds / high) * (width - left - 10);
    const marks = niceTicks(0, high, Math.max(2, Math.floor(width / 120))), texts = ticks(marks, "s");
    const first = shown[0].step, last = shown[shown.length - 1].step;
    this.title.textContent = first === last ? `Step ${last}` : `Steps ${first} to ${last}`;
    const rects = spans.map((span) => {
      const text = `${span.name}, step ${span.step}, ${span.lane}: ${format(span.stop - span.start, "s")}, from ${format(span.start, "s")} to ${format(span.stop, "s")}`;
      const wide = Math.max(1.5, x(span.stop) - x(span.start) - 1), top = lanes.indexOf(span.lane) * row + 4;
      return svg("g", { tabindex: 0, role: "img", class: "phase", "aria-label": text, "data-tip": text },
        svg("rect", { x: x(span.start), y: top, width: wide, height: row - 8, rx: 3, class: `area c${phaseColour(span.name)}` }),
        wide > span.name.length * 7 + 8 ? svg("text", { x: x(span.start) + 6, y: top + 15, class: `inside on${phaseColour(span.name)}` }, span.name) : null);
    });
    this.plot.style.height = `${height}px`;
    this.plot.replaceChildren(svg("svg", { width, height },
      marks.map((value, index) => [
        svg("line", { class: "grid", x1: x(value), x2: x(value), y1: 0, y2: height - 20 }),
        svg("text", { class: "tick middle", x: clamp(x(value), left, width - 18), y: height - 6 }, texts[index])]),
      lanes.map((lane, at) => svg("text", { class: "tick end", x: left - 8, y: at * row + 20 }, lane)), rects));
    this.listing.replaceChildren(table(["phase", "lane", "step", "begins after", "takes"], spans.map((span) =>
      [span.name, span.lane, String(span.step), format(span.start, "s"), format(span.stop - span.start, "s")])));
  }
}

function timelinePanel() {
  const { steps, overview } = data.timeline;
  const lead = "Where the time of a step goes. Lanes that lie beside each other work at the same time: sampling ahead while the policy learns.";
  if (!overview.steps.length || !Object.keys(overview.named).length) {
    return panel("time", "Time", lead, missing("No phase has been timed yet: they appear with the first step."));
  }
  const gantt = new Gantt(steps);
  const chart = new Overview(overview, (step) => gantt.chooseStep(step));
  return panel("time", "Time", lead,
    h("figure", { class: "chart wide" }, h("figcaption", {}, explained("Seconds by phase", "Stacked: overlapping phases add up to more than the step took.")),
      phaseKey(chart.names), chart.plot),
    gantt.element, data.charts.speed.length ? chartGrid(data.charts.speed, data.curves, "speed") : null);
}
