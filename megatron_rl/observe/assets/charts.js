// Curves: one axis, a few series, a cross-hair that the pointer and the arrow keys move.

const charts = []; // all that are drawn, so that smoothing reaches them
let smoothing = place.number("smooth", 0.6);

// The moving average that forgets: each point keeps `smoothing` of what came before, and starts without a bias to 0.
function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return found;
}

// Two curves of one name and unit, one line of text: what a picture says to those who do not see it.
function inWords(title, steps, series, unit) {
  const parts = series.map((each) => {
    const known = steps.map((step, index) => [step, each.mean[index]]).filter(([, value]) => value !== null);
    if (!known.length) return `${each.title}: no value yet`;
    const values = known.map(([, value]) => value);
    const [first, last] = [known[0], known[known.length - 1]];
    return `${each.title}: ${format(first[1], unit)} at step ${first[0]}, ${format(last[1], unit)} at step ${last[0]}, ` +
      `between ${format(Math.min(...values), unit)} and ${format(Math.max(...values), unit)}`;
  });
  return `${title}. ${parts.join(". ")}. Arrow keys read single steps.`;
}

class LineChart {
  constructor(chart, curves, options = {}) {
    this.chart = chart;
    this.steps = curves.steps;
    this.dots = options.dots || false;
    this.series = chart.series.map((each) => ({ ...each, ...curves.named[each.name] }));
    this.cursor = null;
    this.plot = h("div", {
      class: "plot", tabindex: 0, role: "img", "data-own-tip": true, id: `chart-${options.id || chart.title}`.replace(/\W+/g, "-"),
      "aria-label": inWords(chart.title, this.steps, this.series, chart.unit),
      onpointermove: (event) => this.point(event), onpointerleave: () => this.move(null),
      onkeydown: (event) => this.key(event), onblur: () => this.move(null),
    });
    this.readout = h("output", { class: "readout", "aria-live": "off" });
    this.element = h("figure", { class: "chart" },
      h("figcaption", {}, explained(chart.title, chart.text), this.readout), this.legend(), this.plot);
    new ResizeObserver(() => this.draw()).observe(this.plot);
    charts.push(this);
  }

  legend() {
    this.values = this.series.map(() => h("b", {}));
    return h("ul", { class: "legend" }, this.series.map((each, index) =>
      h("li", { tabindex: 0, "data-tip": each.text }, svg("svg", { class: "swatch", viewBox: "0 0 18 8", "aria-hidden": "true" },
        svg("line", { x1: 1, x2: 17, y1: 4, y2: 4, class: `line c${index % 8}` })),
      this.series.length > 1 ? `${each.title} ` : "", this.values[index])));
  }

  range() {
    const all = this.series.flatMap((each) => [...each.mean, ...(each.low || []), ...(each.high || [])]).filter((value) => value !== null);
    let low = Math.min(...all), high = Math.max(...all);
    if (!all.length) [low, high] = [0, 1];
    this.most = high;
    const size = Math.max(Math.abs(high), Math.abs(low)); // a line that is flat but for rounding lies in the middle
    if (size === 0) high = 1;
    else if (high - low <= size * 1e-5) [low, high] = [low - size * 0.1, high + size * 0.1];
    if (low > 0 && low < high * 0.35) low = 0;
    const air = (high - low) * 0.06, most = this.chart.unit === "share" && this.most <= 1 ? 1 + air : Infinity;
    return [low === 0 ? 0 : low - air, Math.min(high + air, most)];
  }

  draw() {
    const width = this.plot.clientWidth, height = this.plot.clientHeight;
    if (!width || !height) return;
    const unit = this.chart.unit, [low, high] = this.range();
    const scale = unit === "bytes" ? 2 ** -30 : 1;
    const marks = niceTicks(low * scale, high * scale, 4).map((value) => value / scale), texts = ticks(marks, unit);
    const left = 12 + 6.4 * Math.max(0, ...texts.map((text) => text.length)), right = 8, top = 6, bottom = 20;
    const first = this.steps[0], last = this.steps[this.steps.length - 1];
    this.x = (step) => left + (last === first ? 0.5 : (step - first) / (last - first)) * (width - left - right);
    this.y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
    const steps = niceTicks(first, Math.max(last, first + 1), Math.max(2, Math.floor(width / 90))).filter((step) => Number.isInteger(step) && step <= last);
    this.cross = svg("g", { class: "cross" });
    const picture = svg("svg", { width, height, "aria-hidden": "true" },
      marks.map((value, index) => [
        svg("line", { class: "grid", x1: left, x2: width - right, y1: this.y(value), y2: this.y(value) }),
        svg("text", { class: "tick end", x: left - 6, y: this.y(value) + 3.5 }, texts[index])]),
      steps.map((step) => svg("text", { class: "tick middle", x: clamp(this.x(step), left + 4, width - right - 8), y: height - 5 }, String(step))),
      this.series.map((each, index) => this.curve(each, index)), this.cross);
    this.plot.replaceChildren(picture);
    this.move(this.cursor);
  }

  curve(each, index) {
    const parts = [];
    const weight = this.dots ? 0 : smoothing;
    if (each.low) parts.push(svg("path", { class: `band c${index % 8}`, d: this.band(each) }));
    if (weight > 0) parts.push(svg("path", { class: `line raw c${index % 8}`, d: this.path(each.mean) }));
    parts.push(svg("path", { class: `line c${index % 8}`, d: this.path(weight > 0 ? smoothed(each.mean, weight) : each.mean) }));
    const alone = each.mean.filter((value) => value !== null).length === 1;
    if (this.dots || alone) {
      each.mean.forEach((value, at) => value !== null &&
        parts.push(svg("circle", { class: `dot c${index % 8}`, cx: this.x(this.steps[at]), cy: this.y(value), r: 3 })));
    }
    return parts;
  }

  path(values) {
    let pen = "M";
    return values.map((value, at) => {
      if (value === null) {
        pen = "M";
        return "";
      }
      const point = `${pen}${this.x(this.steps[at]).toFixed(1)} ${this.y(value).toFixed(1)}`;
      pen = "L";
      return point;
    }).join("");
  }

  band(each) {
    const known = this.steps.map((_, at) => at).filter((at) => each.low[at] !== null);
    const edge = (values, order) => order.map((at) => `${this.x(this.steps[at]).toFixed(1)} ${this.y(values[at]).toFixed(1)}`);
    return known.length ? `M${[...edge(each.high, known), ...edge(each.low, [...known].reverse())].join("L")}Z` : "";
  }

  point(event) {
    if (!this.x) return;
    const at = event.clientX - this.plot.getBoundingClientRect().left;
    let nearest = 0;
    this.steps.forEach((step, index) => {
      if (Math.abs(this.x(step) - at) < Math.abs(this.x(this.steps[nearest]) - at)) nearest = index;
    });
    this.move(nearest);
  }

  key(event) {
    const end = this.steps.length - 1, here = this.cursor ?? end;
    const next = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: end, PageUp: here - 10, PageDown: here + 10 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    this.readout.setAttribute("aria-live", "polite");
    this.move(clamp(next, 0, end));
  }

  // The cross-hair to a point, or away, where the legend tells the newest.
  move(index) {
    this.cursor = index;
    const end = this.steps.length - 1, at = index ?? end;
    this.series.forEach((each, number) => {
      let known = at;
      while (index === null && known > 0 && each.mean[known] === null) known--;
      this.values[number].textContent = format(each.mean[known], this.chart.unit);
    });
    const apart = this.chart.apart > 1 ? ` (mean of ${this.chart.apart} steps)` : "";
    this.readout.textContent = index === null ? "" : `step ${this.steps[at]}${apart}`;
    if (!this.cross) return;
    this.cross.replaceChildren();
    if (index === null) return;
    const x = this.x(this.steps[at]);
    this.cross.append(svg("line", { x1: x, x2: x, y1: 4, y2: this.plot.clientHeight - 20 }));
    this.series.forEach((each, number) => each.mean[at] !== null &&
      this.cross.append(svg("circle", { class: `dot c${number % 8}`, cx: x, cy: this.y(each.mean[at]), r: 3.5 })));
  }
}

function chartGrid(list, curves, id) {
  return h("div", { class: "charts" }, list.map((chart) =>
    new LineChart({ ...chart, apart: curves.apart }, curves, { id: `${id}-${chart.title}` }).element));
}

function smoothingSlider() {
  const shown = h("output", { for: "smooth" }, smoothing.toFixed(2));
  const slide = h("input", {
    type: "range", id: "smooth", min: 0, max: 0.98, step: 0.02, value: smoothing, oninput: (event) => {
      smoothing = parseFloat(event.target.value);
      shown.textContent = smoothing.toFixed(2);
      place.set("smooth", smoothing);
      charts.forEach((chart) => chart.draw());
    },
  });
  const text = "Each point of the strong line keeps this share of what came before. The faint line is what was measured.";
  return h("label", { class: "slider", "data-tip": text }, "Smoothing", slide, shown);
}
