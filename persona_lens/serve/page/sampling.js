/** How replies are sampled, what sounds an alarm, and the system prompt of new conversations. */

import { element, find, options } from "./elements.js";

const KINDS = [["token", "each token"], ["running_mean", "the mean so far"], ["turn_mean", "the whole reply's mean"], ["prompt_last", "the prompt's last token"]];
export const USUAL = { temperature: 0.7, top_p: 1, max_tokens: 200, seed: "", thinking_budget: "", alarms: "", alarm_on: "token", stop_on_alarm: false, system: "" };

/** A seed that JavaScript and JSON keep whole. */
export const drawnSeed = () => Math.floor(Math.random() * 2 ** 31);

export class Sampling {
  constructor(kept, changed, system) {
    this.values = { ...USUAL, ...kept };
    this.thinks = false; // until the server says that its model does
    this.draw(changed, system);
  }

  draw(changed, system) {
    const { values } = this;
    const number = (name, says, more, kind = "") => {
      const field = element("input", { type: "number", value: values[name], ...more, onchange: () => {
        if (field.value === "") field.value = USUAL[name];
        values[name] = field.value === "" ? "" : Number(field.value);
        changed();
      } });
      return element("label", { class: kind || null }, element("span", {}, says), field);
    };
    const alarms = element("input", { type: "text", value: values.alarms, placeholder: "evil>2sd, kind<-1", spellcheck: "false", onchange: () => { values.alarms = alarms.value; changed(); } });
    const on = options(element("select", { "aria-label": "What alarms listen to", onchange: () => { values.alarm_on = on.value; changed(); } }), KINDS, values.alarm_on);
    const stop = element("input", { type: "checkbox", checked: values.stop_on_alarm, onchange: () => { values.stop_on_alarm = stop.checked; changed(); } });
    const prompt = element("textarea", { rows: 2, id: "system", value: values.system, dir: "auto", onchange: () => { values.system = prompt.value; changed(); system(); } });
    find("settings").replaceChildren(
      element("div", { class: "grid" }, number("temperature", "Temperature", { min: 0, max: 2, step: 0.1 }), number("top_p", "Top-p", { min: 0.01, max: 1, step: 0.01 }),
        number("max_tokens", "Tokens at most", { min: 1, step: 1 }), number("seed", "Seed", { min: 0, step: 1, placeholder: "drawn" }),
        this.thinks && number("thinking_budget", "Thinking tokens at most", { min: 0, step: 1, placeholder: "no limit" }, "half")),
      element("label", { class: "wide" }, element("span", {}, "Alarms"), alarms),
      element("div", { class: "row fine" }, element("label", {}, "on ", on), element("label", { class: "check" }, stop, " an alarm ends the reply")),
      element("label", { class: "wide" }, element("span", {}, "System prompt"), prompt),
      element("p", { class: "quiet small" }, "A changed system prompt begins a conversation of its own; the old one stays as a branch."),
    );
  }

  /** For one reply, with a seed of its own where none is set. */
  settings(edits) {
    const { seed, system, thinking_budget: most, ...rest } = this.values;
    return { ...rest, edits, seed: seed === "" ? drawnSeed() : seed, thinking_budget: this.thinks && most !== "" ? most : undefined };
  }
}
