/** A message as it is shown: its text or coloured tokens, what it was made with, and what can be done with it. */

import { button, element, signed } from "./elements.js";
import { Tokens } from "./tokens.js";

const NAMES = { system: "System", user: "You", assistant: "Reply" };

/** What a reply was made with, in one line. */
export function madeLine(made) {
  if (!made) return "";
  const sampled = made.temperature ? `temperature ${made.temperature}, top-p ${made.top_p}, seed ${made.seed}` : "greedy";
  const limit = made.thinking_budget == null ? "" : `, thinking up to ${made.thinking_budget} ${made.thinking_budget === 1 ? "token" : "tokens"}`;
  return `${made.edits || "not steered"}${made.edits && made.history ? `, ${made.history} history` : ""} · ${sampled}${limit}`;
}

/** `bench` does what buttons ask: go, edit, again, reseed, take, beside. */
export class MessageView {
  constructor(message, session, lens, bench) {
    Object.assign(this, { message, session, lens, bench });
    this.node = element("li", { class: `message ${message.role}`, "data-id": message.id });
    this.tokens = null;
    this.draw();
  }

  draw() {
    const { message } = this;
    this.body = element("div", { class: "body" });
    this.before = element("p", { class: "before" });
    this.after = element("div", { class: "after" });
    this.head = element("div", { class: "head" });
    this.note = element("p", { class: "note", hidden: true });
    this.node.replaceChildren(this.head, this.before, this.body, this.note, this.after);
    const { readings } = message;
    this.tokens = null;
    if (readings?.tokens.length) {
      readings.tokens.forEach((token) => this.token(token));
      const told = readings.tokens.map(({ text, part }) => (part ? "" : text)).join("");
      // Content does not begin with line feeds where the model thinks, though a token may.
      this.tokens.rest(message.content.slice((message.content.startsWith("\n") ? told : told.replace(/^\n+/, "")).length));
    } else if (message.content || message.role !== "assistant") {
      this.body.replaceChildren(element("div", { class: "text", dir: "auto" }, message.content));
    }
    this.refresh();
  }

  token(token) {
    if (!this.tokens) {
      this.tokens = new Tokens(this.lens, `Tokens of ${this.message.role === "assistant" ? "the reply" : "the message"}`);
      this.body.replaceChildren(this.tokens.node);
    }
    this.tokens.add(token);
  }

  /** What may have changed around the text. */
  refresh() {
    const { message, session, bench } = this;
    const all = session.siblings(message.id);
    const at = all.indexOf(message.id);
    const switcher = all.length > 1 && element("span", { class: "switch", role: "group", "aria-label": "Branches" },
      button("‹", () => bench.enter(all[at - 1]), { "aria-label": "Branch before", disabled: at === 0 || bench.busy, "data-key": "before" }),
      element("span", {}, `${at + 1}/${all.length}`),
      button("›", () => bench.enter(all[at + 1]), { "aria-label": "Next branch", disabled: at === all.length - 1 || bench.busy, "data-key": "next" }));
    const doing = (text, key, work, more = {}) => button(text, work, { class: "link", "data-key": key, disabled: bench.busy, ...more });
    const reply = message.role === "assistant";
    const actions = [
      doing("Edit", "edit", () => bench.edit(this)),
      reply && doing("Again", "again", () => bench.again(message), { title: "Another reply, with what is set now" }),
      reply && message.made && doing("Another seed", "reseed", () => bench.reseed(message), { title: "Another reply, with what this one was made with" }),
      reply && message.made && doing("Use its settings", "take", () => bench.take(message), { title: "Set the rack to what this one was made with" }),
      reply && all.length > 1 && doing(session.pairs.get(message.parent)?.includes(message.id) ? "One alone" : "Beside another", "beside", () => bench.beside(message)),
      reply && bench.copies(message),
    ];
    this.head.replaceChildren(element("span", { class: "who" }, NAMES[message.role]), ...(switcher ? [switcher] : []),
      ...(reply && message.made ? [element("code", { class: "made", title: madeLine(message.made) }, madeLine(message.made))] : []));
    this.before.replaceChildren(...this.foretold());
    this.before.hidden = !this.before.childNodes.length;
    this.after.replaceChildren(...this.means(), element("div", { class: "actions" }, ...actions.filter(Boolean)));
  }

  /** Where the last prompt token stood, before anything was said. */
  foretold() {
    const { readings } = this.message;
    const { gauges, gauge, place, scales } = this.lens;
    if (!readings) return [];
    const found = [];
    if (gauge && Number.isFinite(readings.prompt_last[place])) found.push(`Before the reply: ${gauge.name} at ${signed(readings.prompt_last[place], scales.digits(gauge))}`);
    const told = readings.forecast.filter(({ gauge: number }) => gauges[number]);
    for (const { gauge: number, probability, says } of told) {
      const { trait, layer } = gauges[number];
      const by = told.filter((other) => gauges[other.gauge].trait === trait).length > 1 ? `, by layer ${layer}` : "";
      found.push(element("span", { class: "forecast" }, `${Math.round(probability * 100)}% likely to be ${trait}${by}${says ? ` (${says})` : ""}`));
    }
    return found.flatMap((each, number) => (number ? [" · ", each] : [each]));
  }

  means() {
    const { readings } = this.message;
    const { gauge, place, scales } = this.lens;
    if (!readings?.means.length) return [];
    const mean = gauge && readings.means[place];
    const sds = gauge ? scales.sds(gauge, mean) : null;
    const alarms = readings.alarms.map((alarm) => element("span", { class: "alarm" },
      `▲ ${alarm.alarm}: ${alarm.trait}@${alarm.layer} ${signed(alarm.value)}${alarm.token != null ? `, token ${alarm.token}` : ""}`));
    return [element("p", { class: "means" }, gauge && Number.isFinite(mean) ? `mean ${gauge.name} ${signed(mean, scales.digits(gauge))}${sds === null ? "" : ` (${signed(sds, 1)} SD)`}` : "", ...alarms)];
  }

  say(text, wrong = false) {
    this.note.classList.toggle("wrong", wrong);
    this.note.textContent = text;
    this.note.hidden = !text;
  }

  /** Let the text be changed in place. */
  edit(done) {
    const area = element("textarea", { rows: Math.min(12, 2 + this.message.content.split("\n").length), value: this.message.content, "aria-label": `Edit: ${NAMES[this.message.role]}`, dir: "auto",
      onkeydown: (event) => { if (event.key === "Escape") { event.stopPropagation(); this.draw(); this.focus("edit"); } } });
    const save = this.message.role === "user" ? "Save and answer" : "Save as a branch";
    this.body.replaceChildren(area, element("div", { class: "row" }, button(save, () => done(area.value), { class: "primary" }), button("Cancel", () => { this.draw(); this.focus("edit"); })));
    area.focus();
  }

  focus(key) {
    this.node.querySelector(`[data-key="${key}"]`)?.focus();
  }
}

/** Mark where two replies part, token by token. */
export function partings(one, other) {
  const [a, b] = [one.tokens?.spans ?? [], other.tokens?.spans ?? []];
  for (const span of [...a, ...b]) span.classList.remove("parts");
  const least = Math.min(a.length, b.length);
  let at = 0;
  while (at < least && a[at].textContent === b[at].textContent) at += 1;
  if (at < least) for (const span of [a[at], b[at]]) span.classList.add("parts");
  return at;
}
