/** The rack: what steers the next reply. A row for each trait, further terms as they are written, and presets. */

import * as api from "./api.js";
import { button, element, find, options, signed } from "./elements.js";
import { ACTIONS, HISTORIES, TOKENS, read, terms, written } from "./notation.js";

export class Rack {
  constructor(model, changed, said) {
    Object.assign(this, { model, changed, said, vectors: new Map(), rows: new Map(), extras: [], history: "", known: {}, fault: "" });
    this.marks = new Map();
  }

  /** Show these vectors, with what `kept` says of their rows. */
  fill(vectors, kept) {
    this.vectors = new Map(vectors.map((each) => [each.name, each]));
    for (const each of vectors) {
      const old = kept?.rows?.find(({ trait }) => trait === each.name) ?? this.rows.get(each.name);
      this.rows.set(each.name, old && ACTIONS[old.action] ? old : this.fresh(each));
    }
    for (const name of this.rows.keys()) if (!this.vectors.has(name)) this.rows.delete(name);
    if (HISTORIES[kept?.history]) this.history = kept.history;
    if (kept?.extras) this.extras = kept.extras.filter((each) => typeof each === "string");
    this.draw();
  }

  fresh({ name, layers, tuned }) {
    const relative = tuned?.relative;
    const amount = relative ? Math.round(relative * 100) : ACTIONS.percent.amount;
    const layer = tuned?.layer ?? layers[Math.floor(layers.length / 2)] ?? Math.floor(this.model.n_layers / 2);
    return { trait: name, on: false, action: "percent", amount, layers: String(layer), tokens: "all", more: "" };
  }

  get edits() {
    const on = [...this.rows.values()].filter((row) => row.on).map(written);
    return [...on, ...this.extras].join(", ");
  }

  get kept() {
    return { rows: [...this.rows.values()], extras: this.extras, history: this.history };
  }

  /** Set the rack to a steering: terms that its rows cannot show stand as they are written. */
  load(edits, history) {
    if (HISTORIES[history]) this.history = history;
    for (const row of this.rows.values()) row.on = false;
    this.extras = [];
    const seen = new Set();
    for (const text of terms(edits)) {
      const term = read(text);
      if (term && this.rows.has(term.trait) && !seen.has(term.trait)) {
        seen.add(term.trait);
        this.rows.set(term.trait, term);
      } else this.extras.push(text);
    }
    this.draw();
    this.touch();
  }

  draw() {
    const rows = [...this.rows.values()].map((row) => this.row(row));
    find("traits").replaceChildren(...(rows.length ? rows : [element("p", { class: "quiet" }, "The server has no vectors; bring a file of them below.")]));
    find("written").replaceChildren(...this.foot());
    this.line();
  }

  row(row) {
    const vectors = this.vectors.get(row.trait);
    const id = `trait-${row.trait}`;
    const name = vectors.label && vectors.label !== row.trait ? `${row.trait} (${vectors.label})` : row.trait;
    const toggle = element("input", { type: "checkbox", role: "switch", id, checked: row.on, onchange: () => set({ on: toggle.checked }) });
    const slider = element("input", { type: "range", "aria-label": `strength of ${row.trait}`, oninput: () => set({ amount: Number(slider.value), on: true }) });
    const number = element("input", { type: "number", step: "any", "aria-label": `strength of ${row.trait} as a number`, onchange: () => number.value !== "" && set({ amount: Number(number.value), on: true }) });
    const unit = element("span", { class: "unit" });
    const marks = element("div", { class: "marks" });
    const action = options(element("select", { "aria-label": `operation of ${row.trait}`, onchange: () => set({ action: action.value, amount: this.usual(vectors, action.value), on: true }) }),
      Object.entries(ACTIONS).map(([value, { says }]) => [value, says]), row.action);
    const layers = element("input", { type: "text", class: "layers", value: row.layers, "aria-label": `layers of ${row.trait}`, placeholder: vectors.tuned ? `${vectors.tuned.layer}` : "18", spellcheck: "false", title: "18, 10-20, 12+15+18, all", onchange: () => set({ layers: layers.value }) });
    const tokens = options(element("select", { "aria-label": `tokens of ${row.trait}`, onchange: () => set({ tokens: tokens.value }) }),
      TOKENS.map((each) => [each, each === "all" ? "all tokens" : each]), row.tokens);
    const more = element("input", { type: "text", value: row.more, placeholder: "if evil@12>3", "aria-label": `condition, schedule or sinks of ${row.trait}`, spellcheck: "false", onchange: () => set({ more: more.value }) });
    const box = element("fieldset", { class: "trait" },
      element("legend", { class: "unseen" }, row.trait),
      element("div", { class: "row" },
        element("label", { class: "name", for: id, title: vectors.description || undefined }, toggle, element("bdi", {}, name)),
        element("span", { class: "spring" }), number, unit),
      element("div", { class: "track" }, slider, marks),
      element("div", { class: "row fine" }, action, element("label", {}, "layers ", layers), tokens),
      element("details", { class: "fine", open: Boolean(row.more) }, element("summary", {}, "Condition, schedule"), more,
        vectors.removable && button("Remove these vectors", () => this.remove(row.trait))));
    const show = () => {
      const { low, high, step } = this.range(vectors, row);
      Object.assign(slider, { min: low, max: high, step });
      slider.value = row.amount;
      number.value = row.amount;
      unit.textContent = { percent: "%", times: "×", ablate: "of it" }[row.action] ?? "";
      slider.setAttribute("aria-valuetext", `${row.amount}${row.action === "percent" ? " percent of the residual's norm" : ""}`);
      toggle.checked = row.on;
      box.classList.toggle("on", row.on);
      marks.replaceChildren(...this.marked(vectors, row, low, high));
    };
    const set = (news) => {
      Object.assign(row, news);
      show();
      this.touch();
    };
    show();
    return box;
  }

  /** Where the slider ends: beyond what was tuned and where text breaks, if that is known. */
  range(vectors, { action, amount }) {
    const { low, high, step } = ACTIONS[action];
    if (action === "ablate") return { low, high, step };
    const of = this.points(vectors, action).map(({ at }) => Math.abs(at) * 1.25);
    let end = Math.max(high, ...of, Math.abs(amount));
    if (["cap", "floor", "affine"].includes(action)) end = Math.max(Math.abs(amount), this.spread(vectors)) || high;
    const tidy = action === "percent" ? Math.ceil(end / 10) * 10 : Number(end.toPrecision(2));
    return { low: -tidy, high: tidy, step: action === "percent" ? step : Number((tidy / 100).toPrecision(1)) };
  }

  spread({ baseline }) {
    return Math.max(0, ...Object.values(baseline ?? {}).map(({ mean, sd }) => Math.abs(mean) + 6 * sd));
  }

  usual({ tuned }, action) {
    if (action === "percent" && tuned?.relative) return Math.round(tuned.relative * 100);
    return action === "times" && tuned ? tuned.coefficient : ACTIONS[action].amount;
  }

  points({ tuned, cliff }, action) {
    const found = [];
    const tunedAt = action === "percent" ? tuned?.relative && tuned.relative * 100 : action === "times" ? tuned?.coefficient : null;
    if (tunedAt) found.push({ at: tunedAt, kind: "tuned", says: `tuned ${signed(tunedAt, action === "percent" ? 0 : 1)}${action === "percent" ? "%" : ""}` });
    if (cliff && action === "percent") found.push({ at: cliff * 100, kind: "cliff", says: `text breaks at ${signed(cliff * 100, 0)}%` });
    return found;
  }

  marked(vectors, row, low, high) {
    const share = (at) => `${((at - low) / (high - low)) * 100}%`;
    const points = this.points(vectors, row.action);
    const tick = (at, kind) => element("span", { class: `mark ${kind}`, "--at": share(at), "aria-hidden": "true" });
    return [
      ...(low < 0 ? [tick(0, "zero")] : []), ...points.map(({ at, kind }) => tick(at, kind)),
      element("p", {}, ...points.flatMap(({ kind, says }, number) => [number ? " · " : "", element("span", { class: kind }, says)])),
    ];
  }

  /** Below the rows: terms beyond them, the line itself, presets, and a way to bring vectors. */
  foot() {
    const extras = this.extras.map((text, number) => element("li", {}, element("code", {}, text),
      button("Remove", () => { this.extras.splice(number, 1); this.draw(); this.touch(); }, { "aria-label": `Remove ${text}` })));
    this.field = element("input", { type: "text", id: "line", spellcheck: "false", autocomplete: "off", "aria-describedby": "fault", placeholder: "not steered",
      onchange: ({ target }) => target.isConnected && this.load(target.value),
      // The field must have lost the focus when it is drawn anew, or the browser tells of its change once more.
      onkeydown: ({ key, target }) => { if (key === "Enter") { target.blur(); this.field.focus(); } } });
    const past = options(element("select", { "aria-label": "Earlier turns", onchange: () => { this.history = past.value; this.touch(); } }), Object.entries(HISTORIES), this.history);
    this.faulty = element("p", { id: "fault", class: "fault", role: "status" }, this.fault);
    this.select = options(element("select", { "aria-label": "Presets" }), [["", "presets"], ...Object.keys(this.known).map((name) => [name, name])], this.select?.value);
    const name = element("input", { type: "text", class: "short", placeholder: "name", "aria-label": "Name of a new preset", spellcheck: "false" });
    const file = element("input", { type: "file", accept: ".safetensors", "aria-label": "A file of vectors", onchange: () => this.bring(file) });
    return [
      extras.length ? element("ul", { class: "extras", "aria-label": "Further terms" }, ...extras) : null,
      element("label", { for: "line", class: "quiet small" }, "The steering as it is written"), this.field, this.faulty,
      element("label", { class: "row fine" }, "Earlier turns", past),
      element("div", { class: "row fine" }, this.select, button("Load", () => this.select.value && this.load(this.known[this.select.value])),
        button("Delete", () => this.select.value && this.drop(this.select.value)), button("All off", () => this.load(""))),
      element("div", { class: "row fine" }, name, button("Save preset", () => this.save(name.value.trim()))),
      element("details", { class: "fine" }, element("summary", {}, "Bring vectors"), file),
    ].filter(Boolean);
  }

  line() {
    if (document.activeElement !== this.field) this.field.value = this.edits;
    this.faulty.textContent = this.fault;
    this.field.setAttribute("aria-invalid", String(Boolean(this.fault)));
  }

  touch() {
    this.field.value = this.edits;
    this.changed();
    clearTimeout(this.later);
    this.later = setTimeout(() => this.check(), 300);
  }

  /** Let the server say whether the steering holds. */
  async check() {
    this.asking?.abort();
    this.asking = new AbortController();
    try {
      if (this.edits) await api.preview(this.edits, this.history || undefined, this.asking.signal);
      this.fault = "";
    } catch (error) {
      if (error.name === "AbortError") return;
      this.fault = error.message;
    }
    this.line();
  }

  async presets() {
    this.known = (await api.presets()).presets;
    options(this.select, [["", "presets"], ...Object.keys(this.known).map((each) => [each, each])]);
    this.changed();
  }

  async attempt(work, done) {
    try {
      await work();
      if (done) this.said(done);
    } catch (error) {
      this.said(error.message, true);
    }
  }

  save(name) {
    return this.attempt(async () => { await api.keepPreset(name, this.edits); await this.presets(); this.select.value = name; }, `Preset ${name} is kept.`);
  }

  drop(name) {
    return this.attempt(async () => { await api.dropPreset(name); await this.presets(); }, `Preset ${name} is deleted.`);
  }

  bring(file) {
    const [given] = file.files;
    const name = given?.name.replace(/\.safetensors$/, "").replace(/[^A-Za-z0-9_-]/g, "-").replace(/^[^A-Za-z]+/, "") || "vectors";
    return this.attempt(async () => { await api.bringVectors(name, given); await this.refresh(); }, `The vectors ${name} are there.`);
  }

  remove(name) {
    return this.attempt(async () => { await api.removeVectors(name); await this.refresh(); }, `The vectors ${name} are removed.`);
  }

  async refresh() {
    this.fill((await api.vectors()).vectors);
    this.touch();
    this.arrived?.();
  }
}
