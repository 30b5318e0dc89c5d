/** The traits of a conversation turn by turn: a panel for each, its neutral range shaded, and alarms marked. */

import { drawn, element, signed } from "./elements.js";

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [320, 96, 44, 10, 8, 18];

/** The drawing and the same as a table, for those who read numbers or hear the page. */
export function chart(gauges, replies, scales, shown) {
  const turns = replies.filter(({ readings }) => readings?.means.length);
  if (!turns.length) return [element("p", { class: "quiet" }, "Means over each reply stand here once there is one.")];
  const traits = [...new Set(gauges.map(({ trait }) => trait))];
  const panels = traits.map((trait) => panel(trait, gauges, turns, scales, shown));
  const head = ["turn", ...gauges.map(({ name }) => name)].map((name) => element("th", { scope: "col" }, name));
  const rows = turns.map(({ readings }, turn) => element("tr", {}, element("th", { scope: "row" }, String(turn + 1)),
    ...gauges.map((gauge, place) => element("td", {}, signed(readings.means[place], scales.digits(gauge))))));
  const table = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Means as numbers" },
    element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
  const neutral = gauges.some((gauge) => scales.baseline(gauge));
  return [
    ...panels,
    element("p", { class: "quiet small" }, neutral ? "Shaded: the baseline's mean ± 2 SD. " : "No baseline is stored with these vectors. ", "▲ an alarm."),
    element("details", {}, element("summary", {}, "As numbers"), table),
  ];
}

function panel(trait, gauges, turns, scales, shown) {
  const own = gauges.map((gauge, place) => ({ gauge, place })).filter(({ gauge }) => gauge.trait === trait);
  const main = own.find(({ gauge }) => gauge.name === shown?.name) ?? own.find(({ gauge }) => gauge.layer === shown?.layer) ?? own.at(-1);
  const known = scales.baseline(main.gauge);
  const band = known ? [known.mean - 2 * known.sd, known.mean + 2 * known.sd] : [];
  const all = own.flatMap(({ place }) => turns.map(({ readings }) => readings.means[place])).filter(Number.isFinite);
  const [low, high] = widened(Math.min(...all, ...band), Math.max(...all, ...band));
  const x = (turn) => LEFT + ((turn + 0.5) / turns.length) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const [digits, centre] = [scales.digits(main.gauge), scales.centre(main.gauge)];
  const line = ({ gauge, place }) => {
    const points = turns.map(({ readings }, turn) => [x(turn), readings.means[place]]).filter(([, value]) => Number.isFinite(value));
    return drawn("polyline", { class: gauge === main.gauge ? "line main" : "line", points: points.map(([at, value]) => `${at},${y(value)}`).join(" ") });
  };
  const dots = turns.flatMap(({ readings, id }, turn) => {
    const value = readings.means[main.place];
    if (!Number.isFinite(value)) return [];
    const rung = readings.alarms.filter((alarm) => alarm.trait === trait);
    const says = `turn ${turn + 1}: ${signed(value, digits)}${rung.length ? `, alarm ${rung.map((each) => each.alarm).join(", ")}` : ""}`;
    const at = [x(turn), y(value)];
    const mark = rung.length
      ? drawn("path", { class: "alarm-mark", d: `M${at[0]} ${at[1] - 7}l6 11h-12z`, "data-message": id }, drawn("title", {}, says))
      : drawn("circle", { class: "dot", cx: at[0], cy: at[1], r: 3.2, "data-message": id }, drawn("title", {}, says));
    return [mark];
  });
  const ticks = turns.map((_, turn) => turn).filter((turn) => turns.length <= 12 || turn % Math.ceil(turns.length / 8) === 0);
  const picture = drawn("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": `${trait} at layer ${main.gauge.layer}, turn by turn: ${turns.map(({ readings }) => signed(readings.means[main.place], digits)).join(", ")}`,
  },
  known && drawn("rect", { class: "band", x: LEFT, width: WIDTH - LEFT - RIGHT, y: y(band[1]), height: y(band[0]) - y(band[1]) }),
  low <= centre && centre <= high && drawn("line", { class: "centre", x1: LEFT, x2: WIDTH - RIGHT, y1: y(centre), y2: y(centre) }),
  drawn("text", { x: LEFT - 6, y: TOP + 8, class: "axis end" }, signed(high, digits)),
  drawn("text", { x: LEFT - 6, y: HEIGHT - BOTTOM, class: "axis end" }, signed(low, digits)),
  ...ticks.map((turn) => drawn("text", { x: x(turn), y: HEIGHT - 4, class: "axis middle" }, String(turn + 1))),
  ...own.filter((each) => each !== main).map(line), line(main), ...dots);
  return element("figure", { class: "panel" }, element("figcaption", {}, element("b", {}, trait), element("span", { class: "quiet" }, ` layer ${main.gauge.layer}${own.length > 1 ? ", others faint" : ""}`)), picture);
}

function widened(low, high) {
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}
