/** A reply's tokens, coloured; and what is shown of the token under the pointer or the keyboard's focus. */

import { element, find, signed } from "./elements.js";
import { shade } from "./scale.js";

export class Tokens {
  /** `lens` knows the gauge that colours (`gauge`, `place`), all `gauges`, and the `scales`. */
  constructor(lens, label) {
    this.lens = lens;
    this.spans = [];
    this.values = [];
    this.node = element("div", {
      class: "tokens", dir: "auto", role: "group", "aria-label": `${label}; arrow keys go from token to token`,
      onkeydown: (event) => this.walk(event),
      onpointerover: (event) => this.point(event.target),
      onpointerleave: () => hide(),
      onfocusin: (event) => this.point(event.target),
      onfocusout: () => hide(),
    });
    this.last = null;
    this.thinking = null;
  }

  /** Tokens of the thinking before an answer, and its marks, stand in a block of their own, which can be folded. */
  add({ text, values, part }) {
    const number = this.values.push(values) - 1;
    // A character may take several tokens: those before its last have no text, and their values stand with it.
    const span = element("span", { class: "token", "data-token": number, tabindex: number ? "-1" : "0" }, text);
    if (!text) span.classList.add("part");
    this.spans.push(span);
    if (part && !this.thinking) {
      this.thinking = element("details", { class: "thinking", open: true }, element("summary", {}, "Thinking"));
      this.node.append(this.thinking);
    } else if (!part) {
      this.thinking = null;
    }
    (this.thinking ?? this.node).append(span);
    this.colour(number);
  }

  /** Text that belongs to no token, such as what a stop string left. */
  rest(text) {
    if (text) this.node.append(element("span", { class: "rest" }, text));
  }

  colour(number) {
    const { gauge, place, scales } = this.lens;
    if (!gauge) {
      this.spans[number].classList.remove("high", "low", "none");
      return;
    }
    shade(this.spans[number], scales.share(gauge, this.values[number][place]));
  }

  recolour() {
    this.spans.forEach((_, number) => this.colour(number));
  }

  walk(event) {
    const at = this.spans.indexOf(document.activeElement);
    if (at < 0) return;
    const step = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: this.spans.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (step === undefined) return;
    event.preventDefault();
    const next = this.spans[Math.max(0, Math.min(step, this.spans.length - 1))];
    this.spans[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  point(target) {
    const number = this.spans.indexOf(target);
    if (number < 0) return hide();
    show(target, this.lens, number, this.values[number]);
  }
}

let described = null;

function hide() {
  find("tip").hidden = true;
  described?.removeAttribute("aria-describedby");
  described = null;
}

function show(span, { gauges, scales, gauge: chosen }, number, values) {
  hide();
  const traits = [...new Set(gauges.map(({ trait }) => trait))];
  const layers = [...new Set(gauges.map(({ layer }) => layer))].sort((a, b) => a - b);
  const cell = (trait, layer) => {
    const place = gauges.findIndex((each) => each.trait === trait && each.layer === layer);
    if (place < 0) return element("td");
    const gauge = gauges[place];
    const sds = scales.sds(gauge, values[place]);
    const made = element("td", { class: "shaded" }, signed(values[place], scales.digits(gauge)),
      sds !== null && element("small", {}, ` ${signed(sds, 1)} SD`));
    if (gauge.name === chosen?.name) made.classList.add("chosen");
    shade(made, scales.share(gauge, values[place]));
    return made;
  };
  const tip = find("tip");
  tip.replaceChildren(
    element("p", {}, `token ${number} `, element("code", {}, JSON.stringify(span.textContent))),
    element("table", {},
      element("tr", {}, element("th", {}), ...layers.map((layer) => element("th", { scope: "col" }, `layer ${layer}`))),
      ...traits.map((trait) => element("tr", {}, element("th", { scope: "row" }, trait), ...layers.map((layer) => cell(trait, layer))))),
  );
  tip.hidden = false;
  span.setAttribute("aria-describedby", "tip");
  described = span;
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const below = at.bottom + 8 + own.height < innerHeight;
  const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - own.width - 8));
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${Math.max(8, below ? at.bottom + 8 : at.top - own.height - 8)}px`);
}

addEventListener("scroll", hide, { passive: true, capture: true });

/** What the colours mean. */
export function legend(lens) {
  const { gauge, scales } = lens;
  if (!gauge) return [];
  const [centre, limit, digits] = [scales.centre(gauge), scales.limit(gauge), scales.digits(gauge)];
  const known = scales.baseline(gauge);
  return [
    element("span", {}, signed(centre - limit, digits)),
    element("span", { class: "ramp", role: "img", "aria-label": "from blue, less, over no colour to red, more" }),
    element("span", {}, signed(centre + limit, digits)),
    element("span", { class: "quiet" }, known ? `no colour: its usual ${signed(centre, digits)}` : "no colour: 0"),
  ];
}
