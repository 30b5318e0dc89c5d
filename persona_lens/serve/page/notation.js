/** Terms of a steering as the rack shows them, and as they are written: `optimistic@18:+12% on response`. */

/** What a term may do: how it is called, and the range of its slider where nothing is known of the trait. */
export const ACTIONS = {
  percent: { says: "add %", low: -60, high: 60, step: 1, amount: 10 },
  times: { says: "add ×", low: -4, high: 4, step: 0.1, amount: 1 },
  ablate: { says: "ablate", low: 0, high: 1, step: 0.05, amount: 1 },
  cap: { says: "cap at", low: -20, high: 20, step: 0.5, amount: 0 },
  floor: { says: "floor at", low: -20, high: 20, step: 0.5, amount: 0 },
  affine: { says: "affine to", low: -20, high: 20, step: 0.5, amount: 0 },
};
export const TOKENS = ["all", "prompt", "response", "generating", "thinking", "answer"];

/** How a reply finds the turns before it, whatever its terms are. */
export const HISTORIES = { steered: "stay as they were steered", clean: "are read as if never steered" };

const TERM = /^([A-Za-z][\w-]*)(?:@(all|[\d+-]+))?:\s*([^\s(]+(?:\([^)]*\))?)((?:\s+(?:on|with|schedule|if)\b.*)?)$/;
const NUMBER = "[+-]?(?:\\d+\\.?\\d*|\\.\\d+)(?:[eE][+-]?\\d+)?";

const plain = (number) => String(Number(number.toPrecision(6)));
const plus = (number) => (number >= 0 ? "+" : "") + plain(number);

/** A term as it is written. */
export function written(term) {
  const layers = term.layers.trim() ? `@${term.layers.trim()}` : "";
  const tokens = term.tokens === "all" ? "" : ` on ${term.tokens}`;
  const more = term.more.trim() ? ` ${term.more.trim()}` : "";
  return `${term.trait}${layers}:${action(term)}${tokens}${more}`;
}

function action({ action: kind, amount }) {
  if (kind === "percent") return `${plus(amount)}%`;
  if (kind === "times") return plus(amount);
  if (kind === "ablate") return amount === 1 ? "ablate" : `ablate(${plain(amount)})`;
  return `${kind}(${plain(amount)})`;
}

/** A written term as the rack can show it; null where it says more than sliders do. */
export function read(text) {
  const [, trait, layers, act, rest] = TERM.exec(text.trim()) ?? [];
  if (!trait) return null;
  const found = actionIn(act);
  if (!found) return null;
  const on = /\s+on (all|prompt|response|generating|thinking|answer)(?!\[)\b/.exec(rest);
  const more = (on ? rest.replace(on[0], "") : rest).trim();
  return { trait, layers: layers ?? "", ...found, tokens: on ? on[1] : "all", more, on: true };
}

function actionIn(act) {
  const of = (pattern) => new RegExp(`^${pattern}$`).exec(act);
  let found = of(`(${NUMBER})%`);
  if (found) return { action: "percent", amount: Number(found[1]) };
  found = of(`(${NUMBER})`);
  if (found) return { action: "times", amount: Number(found[1]) };
  if (act === "ablate") return { action: "ablate", amount: 1 };
  found = of(`(ablate|cap|floor|affine)\\((${NUMBER})\\)`);
  return found ? { action: found[1], amount: Number(found[2]) } : null;
}

/** The terms of a steering. No term has a comma in it. */
export const terms = (edits) => edits.split(",").map((term) => term.trim()).filter(Boolean);
