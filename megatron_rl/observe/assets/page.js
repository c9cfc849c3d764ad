// The page: what it shows from top to bottom, and how it renews itself.

function stateOfRun() {
  const start = data.starts[data.starts.length - 1];
  if (start.finished) return ["finished", `The run came to its end at ${moment(start.finished)}.`];
  if (data.last.time === null) return ["starting", "No step is done yet."];
  const quiet = Math.max(0, Date.now() / 1000 - data.last.time);
  const told = `The last step was done ${duration(quiet)} ago, when this page was opened. A run that was killed looks like one that is silent.`;
  return [quiet < 600 ? "running" : "silent", told];
}

function headline({ name, title, text, unit }) {
  const curve = data.curves.named[name].mean, known = curve.filter((value) => value !== null);
  const now = known.length ? known[known.length - 1] : null, first = known.length ? known[0] : null;
  return h("div", { class: "tile", tabindex: 0, "data-tip": text },
    h("span", { class: "name" }, title), h("b", {}, ...withSmallUnit(format(now, unit))), known.length > 1 ? h("span", { class: "from" }, `from ${unit === "share" ? format(first, unit) : format(first, unit).split(" ")[0]}`) : null);
}

// The number, and what it counts in small letters behind it.
function withSmallUnit(text) {
  const [number, ...unit] = text.split(" ");
  return unit.length ? [number, h("small", {}, ` ${unit.join(" ")}`)] : [number];
}

function topOfPage() {
  const run = data.run, [state, told] = stateOfRun();
  const done = data.last.step === null ? 0 : data.last.step + 1;
  const facts = `${run.model}, ${grouped.format(run.parameters)} parameters, ${run.ranks} rank${run.ranks === 1 ? "" : "s"} on ${run.host}, ` +
    `started ${moment(data.starts[0].started)}`;
  return h("header", { class: "top" },
    h("div", { class: "bar" }, h("h1", {}, data.title), explained(state, told, `state ${state}`),
      h("span", { class: "progress" }, run.steps ? `${grouped.format(done)} of ${grouped.format(run.steps)} steps` : `${grouped.format(done)} steps`)),
    run.steps ? h("progress", { max: run.steps, value: done, "aria-label": "steps done" }) : null,
    h("p", { class: "lead" }, facts),
    data.headlines.length ? h("div", { class: "tiles" }, data.headlines.map(headline)) : missing("No step is done yet: numbers appear with the first."));
}

function navigation() {
  const entries = [["learning", "Learning"], ["evaluation", "Evaluation"], ["samples", "Samples"], ["mismatch", "Mismatch"], ["experts", "Experts"], ["time", "Time"], ["run", "Run"]];
  const go = (id) => (event) => {
    event.preventDefault(); // the address keeps the place, not the name of a panel
    document.getElementById(id).scrollIntoView({ behavior: calm ? "auto" : "smooth" });
    document.getElementById(`${id}-title`).focus({ preventScroll: true });
  };
  return h("nav", { "aria-label": "panels" }, h("ul", {}, entries.map(([id, title]) =>
    h("li", {}, h("a", { href: `#${id}`, id: `to-${id}`, onclick: go(id) }, title)))), h("div", { class: "tools" }, smoothingSlider(), renewal()));
}

function learningPanel() {
  const apart = data.curves.apart;
  const long = apart > 1 ? ` Each point is the mean of ${apart} steps, the band their range.` : "";
  const others = data.charts.others.length
    ? folded("others", `Further metrics (${data.charts.others.length})`, chartGrid(data.charts.others, data.curves, "others")) : null;
  return panel("learning", "Learning", `By step. The strong line is smoothed, the faint one is what was measured.${long}`,
    data.charts.learning.length ? chartGrid(data.charts.learning, data.curves, "learning") : missing("No step is done yet: curves appear with the first."), others);
}

function evaluationPanel() {
  const lead = "Held-out prompts, answered by the weights after so many steps.";
  if (!data.evaluations.length) return panel("evaluation", "Evaluation", lead, missing("Nothing has been evaluated yet: either it is not due, or no held-out set is given."));
  const text = "avg@k: mean score of k answers. pass@k: one of k is right. maj@k: the answer that most of k give is right.";
  return panel("evaluation", "Evaluation", lead, data.evaluations.map((each) => {
    const scores = each.metrics.filter((name) => name.includes("@")), drawn = scores.length ? scores : each.metrics; // the table has all
    const series = drawn.map((name) => ({ name, title: name, text }));
    const shares = drawn.every((name) => each.named[name].mean.every((value) => value === null || (value >= 0 && value <= 1)));
    const chart = { title: each.name, text, unit: shares ? "share" : "", series, apart: each.apart };
    const rows = each.steps.map((step, at) => [`step ${step}`, ...each.metrics.map((name) => format(each.named[name].mean[at], drawn.includes(name) ? chart.unit : ""))]);
    return h("div", { class: "charts two" }, new LineChart(chart, each, { dots: true, id: `evaluation-${each.name}` }).element,
      h("div", { class: "chart" }, table(["after", ...each.metrics], rows.reverse().slice(0, 12), `${each.name}, the newest first`),
        each.results ? h("p", { class: "lead" }, "What came of every prompt: ", h("code", {}, each.results)) : null));
  }));
}

function mismatchPanel() {
  const lead = "The servers and the trainer run the same weights through different kernels. x is the trainer's log-prob of a sampled token minus the server's: " +
    "the closer to 0, the more truly the old policy is the one that sampled.";
  return panel("mismatch", "Mismatch of training and sampling", lead, data.charts.mismatch.length
    ? chartGrid(data.charts.mismatch, data.curves, "mismatch") : missing("No step has compared the trainer's log-probs with the servers': there is none yet, or the objective uses no old log-probs."));
}

function runPanel() {
  const run = data.run;
  const facts = [["directory", data.directory], ["command", run.command.join(" ")], ["model", `${run.model}, ${grouped.format(run.parameters)} parameters`],
    ["ranks", `${run.ranks} on ${run.host}`], ...Object.entries(run.information)];
  const starts = data.starts.map((start, index) => [index ? `resumed at step ${start.step}` : start.step ? `started at step ${start.step}` : "started", moment(start.started), start.host,
    start.finished ? moment(start.finished) : index + 1 < data.starts.length ? "no: it was interrupted" : "not yet"]);
  return panel("run", "What ran", null,
    h("div", { class: "below" },
      h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      table(["start", "when", "host", "came to its end"], starts)),
    folded("settings", "Settings", h("pre", { tabindex: 0 }, run.settings)), folded("layout", "Layout: which rank holds what", h("pre", { tabindex: 0 }, run.layout)),
    folded("versions", "Versions", table(["package", "version"], Object.entries(run.versions).map(([name, version]) => [name, version]))));
}

// -- renewal: the page is written anew while the run goes on, and loads itself again without losing its place -----------

let touched = 0;
for (const kind of ["pointerdown", "pointermove", "keydown", "wheel", "touchmove"]) {
  addEventListener(kind, () => { touched = Date.now(); }, { passive: true });
}

function renewal() {
  if (!data.refresh) return null;
  let paused = place.get("paused") === "1";
  const text = "While `megatron-rl report --watch` runs, the page loads itself again, and keeps its place.";
  const button = h("button", {
    type: "button", id: "renewal", "aria-pressed": String(!paused), "data-tip": text, onclick: () => {
      paused = !paused;
      place.set("paused", paused ? "1" : null);
      name();
    },
  });
  const name = () => {
    button.textContent = paused ? "paused" : `renewed every ${Math.round(data.refresh)} s`;
    button.setAttribute("aria-pressed", String(!paused));
  };
  const again = () => {
    const busy = document.hidden || Date.now() - touched < 2000 || String(getSelection()) !== "";
    if (!paused && !busy) {
      place.set("y", Math.round(scrollY));
      place.set("focus", document.activeElement?.id || null);
      location.reload();
    } else setTimeout(again, 1000);
  };
  setTimeout(again, data.refresh * 1000);
  name();
  return button;
}

function keepPlace() {
  history.scrollRestoration = "manual";
  const y = place.number("y", 0), focus = place.get("focus");
  if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
  place.set("focus", null);
  const restore = () => scrollTo({ top: y, behavior: "instant" });
  restore();
  requestAnimationFrame(() => requestAnimationFrame(() => {
    if (y) restore(); // charts have their heights now
    let later = 0;
    addEventListener("scroll", () => {
      clearTimeout(later);
      later = setTimeout(() => place.set("y", Math.round(scrollY) || null), 200);
    }, { passive: true });
  }));
}

document.title = `${data.title} · megatron-rl`;
document.body.append(
  topOfPage(), navigation(),
  h("main", {}, learningPanel(), evaluationPanel(), samplesPanel(), mismatchPanel(), expertsPanel(), timelinePanel(), runPanel()),
  h("footer", {}, `Written ${moment(data.written)} by ${data.program}. This page holds everything it shows and fetches nothing.`), tip);
keepPlace();
document.body.dataset.ready = "";
