// How evenly tokens are spread over experts: one row a layer or an expert, one column a step.

// Cividis, which looks the same to eyes with and without a colour weakness, at nine points.
const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [254, 232, 56]];

function cividis(share) {
  const place = clamp(share, 0, 1) * (CIVIDIS.length - 1), at = Math.min(CIVIDIS.length - 2, Math.floor(place)), rest = place - at;
  return CIVIDIS[at].map((low, channel) => Math.round(low + rest * (CIVIDIS[at + 1][channel] - low)));
}

class HeatMap {
  constructor(experts) {
    this.experts = experts;
    this.cells = Uint8Array.from(atob(experts.cells), (letter) => letter.charCodeAt(0));
    this.layer = clamp(place.number("layer", -1), -1, experts.layers - 1);
    this.row = 0;
    this.column = experts.steps.length - 1;
    this.canvas = h("canvas", {
      id: "heat", tabindex: 0, role: "img", "data-own-tip": true,
      onpointermove: (event) => this.point(event), onpointerleave: () => this.show(null), onkeydown: (event) => this.key(event),
      onblur: () => this.show(null), onclick: (event) => this.layer < 0 && this.choose(this.cell(event)[0]),
    });
    this.readout = h("output", { class: "readout", "aria-live": "polite" });
    this.words = h("p", { class: "lead" });
    this.select = h("select", { id: "layer", onchange: (event) => this.choose(parseInt(event.target.value, 10)) },
      h("option", { value: -1 }, "all layers: the fullest expert of each"),
      Array.from({ length: experts.layers }, (_, layer) => h("option", { value: layer }, `layer ${layer}: every expert`)));
    this.select.value = String(this.layer);
    this.element = h("figure", { class: "chart wide" },
      h("div", { class: "bar" }, h("label", { class: "field" }, "Show ", this.select), this.scale()), this.canvas, this.readout, this.words);
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  scale() {
    const bar = h("canvas", { class: "scale", width: 120, height: 10, "aria-hidden": "true" });
    const pen = bar.getContext("2d");
    for (let x = 0; x < 120; x++) {
      pen.fillStyle = `rgb(${cividis(x / 119)})`;
      pen.fillRect(x, 0, 1, 10);
    }
    return h("span", { class: "legend", tabindex: 0, "data-tip": "Tokens of an expert over the mean of its layer: 1 is a fair share, 0 gets nothing." },
      "0", bar, `${this.experts.largest.toFixed(1)} × fair share`);
  }

  rows() {
    return this.layer < 0 ? this.experts.layers : this.experts.experts;
  }

  // Tokens over the layer's mean.
  load(column, layer, expert) {
    return (this.cells[(column * this.experts.layers + layer) * this.experts.experts + expert] / 255) * this.experts.largest;
  }

  value(row, column) {
    return this.layer < 0 ? this.experts.fullest[row][column] : this.load(column, this.layer, row);
  }

  choose(layer) {
    this.layer = layer;
    this.row = 0;
    this.select.value = String(layer);
    place.set("layer", layer < 0 ? null : layer);
    this.draw();
  }

  draw() {
    const width = this.canvas.clientWidth, rows = this.rows(), columns = this.experts.steps.length;
    if (!width) return;
    const tall = clamp(Math.round(260 / rows), 3, 22), ratio = devicePixelRatio || 1, left = 40, bottom = 20;
    this.shape = { left, tall, wide: (width - left - 6) / columns, height: rows * tall };
    this.canvas.style.height = `${rows * tall + bottom}px`;
    this.canvas.width = width * ratio;
    this.canvas.height = (rows * tall + bottom) * ratio;
    const pen = this.canvas.getContext("2d"), style = getComputedStyle(document.body);
    pen.scale(ratio, ratio);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        pen.fillStyle = `rgb(${cividis(this.value(row, column) / this.experts.largest)})`;
        pen.fillRect(left + column * this.shape.wide, row * tall, Math.ceil(this.shape.wide), tall);
      }
    }
    pen.fillStyle = style.getPropertyValue("--soft");
    pen.font = `11px ${style.fontFamily}`;
    pen.textAlign = "right";
    const every = Math.ceil(14 / tall);
    for (let row = 0; row < rows; row += every) pen.fillText(String(row), left - 6, row * tall + tall / 2 + 4);
    pen.textAlign = "center";
    const labels = Math.max(1, Math.ceil(columns / (width / 70)));
    for (let column = 0; column < columns; column += labels) {
      pen.fillText(String(this.experts.steps[column]), left + (column + 0.5) * this.shape.wide, rows * tall + 14);
    }
    this.tell();
  }

  // The newest step in words, which is also the picture's text.
  tell() {
    const column = this.experts.steps.length - 1, step = this.experts.steps[column];
    const values = Array.from({ length: this.rows() }, (_, row) => this.value(row, column));
    const most = values.indexOf(Math.max(...values)), least = values.indexOf(Math.min(...values));
    const rows = this.layer < 0 ? "layer" : "expert";
    this.words.textContent = this.layer < 0
      ? `At step ${step} the fullest expert gets ${values[most].toFixed(2)} × its fair share in layer ${most}, the most uneven, and ` +
        `${values[least].toFixed(2)} × in layer ${least}, the most even.`
      : `At step ${step} in layer ${this.layer}: expert ${most} gets the most, ${values[most].toFixed(2)} × its fair share, expert ${least} the least, ` +
        `${values[least].toFixed(2)} ×; ${values.filter((value) => value < 0.1).length} experts get less than a tenth of theirs.`;
    this.canvas.setAttribute("aria-label", `Heat map of ${this.rows()} ${rows}s by ${this.experts.steps.length} steps. ${this.words.textContent} Arrow keys read single cells.`);
  }

  cell(event) {
    const box = this.canvas.getBoundingClientRect();
    return [clamp(Math.floor((event.clientY - box.top) / this.shape.tall), 0, this.rows() - 1),
      clamp(Math.floor((event.clientX - box.left - this.shape.left) / this.shape.wide), 0, this.experts.steps.length - 1)];
  }

  point(event) {
    [this.row, this.column] = this.cell(event);
    this.show(this.row, this.column);
  }

  key(event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Enter" && this.layer < 0) this.choose(this.row);
    if (!move) return;
    event.preventDefault();
    this.row = clamp(this.row + move[0], 0, this.rows() - 1);
    this.column = clamp(this.column + move[1], 0, this.experts.steps.length - 1);
    this.show(this.row, this.column);
  }

  show(row, column) {
    this.readout.textContent = row === null ? "" : `step ${this.experts.steps[column]}, ${this.layer < 0 ? `layer ${row}: fullest expert` : `expert ${row}`} ` +
      `${this.value(row, column).toFixed(2)} × its fair share of tokens`;
  }
}

function expertsPanel() {
  const lead = "How evenly tokens are spread over the experts of each layer, over time. An expert that gets nothing learns nothing; one that gets everything is a bottleneck.";
  if (!data.experts) {
    return panel("experts", "Experts", lead,
      missing("No expert has been given a token: the model is dense, or no step is done yet."));
  }
  const { steps, known } = data.experts;
  const note = steps.length < known ? h("p", { class: "lead" }, `${steps.length} of ${known} steps are shown, at equal distances.`) : null;
  return panel("experts", "Experts", lead, new HeatMap(data.experts).element, note,
    data.charts.experts.length ? chartGrid(data.charts.experts, data.curves, "experts") : null);
}
