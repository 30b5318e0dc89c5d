/** The page: puts its parts together, and keeps what is set over a reload. */

import * as api from "./api.js";
import { Bench, copying } from "./bench.js";
import { chart } from "./chart.js";
import { button, download, element, find, options } from "./elements.js";
import { Rack } from "./rack.js";
import { Sampling } from "./sampling.js";
import { Scales } from "./scale.js";
import { KEY, Session } from "./store.js";
import { plainMessages } from "./talk.js";
import { legend } from "./tokens.js";

let session = Session.kept();
const kept = session.settings ?? {};
const lens = { gauge: null, place: -1, gauges: session.gauges, scales: new Scales(new Map()) };
let served = [];
let model = { name: "", n_layers: 0 };
let dirty = 0;
let seen = [];

const page = {
  asked: () => {
    const mine = settings();
    return find("compare").checked ? [{ ...mine, edits: against() }, mine] : [mine];
  },
  system: () => sampling.values.system.trim(),
  model: () => model.name,
  changed(shown) {
    seen = shown;
    keep();
    draw();
  },
  began() {
    find("notices").replaceChildren();
    progress(true);
  },
  ended(replies, why) {
    progress(false);
    fit();
    bench.recolour();
    const said = replies.map(({ content }) => content.slice(0, 600)).join(" — The other: ");
    find("live").textContent = why && why !== "stopped" ? why : `${why === "stopped" ? "Stopped" : "Reply finished"}: ${said}`;
    page.follow(false);
  },
  gauges: choices,
  arrived(token) {
    const value = lens.gauge ? token.values[lens.place] : null;
    if (Number.isFinite(value) && Math.abs(lens.scales.share(lens.gauge, value)) === 1) soon();
    page.follow(false);
  },
  notice,
  take(made) {
    rack.load(made.edits, made.history);
    Object.assign(sampling.values, { temperature: made.temperature, top_p: made.top_p, max_tokens: made.max_tokens ?? sampling.values.max_tokens, seed: made.seed ?? "", thinking_budget: made.thinking_budget ?? "" });
    sampling.draw(keep, fresh);
    keep();
    notice("The rack is set to what that reply was made with, its seed too.");
  },
  copy,
  /** Keep the end in view while a reply comes, unless one has scrolled away from it. */
  follow(always) {
    const root = document.documentElement;
    if (always || root.scrollHeight - root.scrollTop - root.clientHeight < 160) root.scrollTop = root.scrollHeight;
  },
};
const bench = new Bench(session, lens, page);
const rack = new Rack(model, () => { against.choices?.(); keep(); }, notice);
const sampling = new Sampling(kept.sampling, keep, fresh);

/** What is set, for one reply; how it finds earlier turns where there are any. */
function settings() {
  const over = session.path().some(({ role }) => role === "assistant");
  return { ...sampling.settings(rack.edits), history: over ? rack.history : undefined };
}

/** What a comparison's other reply is steered by. */
function against() {
  const chosen = find("against").value;
  if (chosen === "last") return session.path().findLast(({ made }) => made)?.made.edits ?? "";
  return chosen ? rack.known[chosen.slice(1)] ?? "" : "";
}
against.choices = () => {
  const select = find("against");
  const pairs = [["", "the unsteered model"], ["last", "the last reply's settings"], ...Object.keys(rack.known).map((name) => [`=${name}`, `preset ${name}`])];
  options(select, pairs, select.value || kept.against);
  find("next").textContent = rack.edits ? `Next: ${rack.edits}` : "Next: not steered";
};

function progress(running) {
  find("stop").hidden = !running;
  find("send").hidden = running;
}

/** The gauges to colour by: those of the server, and those that an opened file has besides. */
function choices() {
  session.places(served);
  lens.gauges = session.gauges;
  const select = find("gauge");
  const tuned = served.find(({ trait, layer }) => rack.vectors.get(trait)?.tuned?.layer === layer);
  const wanted = select.value || kept.gauge || (tuned ?? served[0])?.name || "";
  options(select, [...session.gauges.map(({ name }) => [name, name]), ["none", "nothing"]], wanted);
  lens.place = session.gauges.findIndex(({ name }) => name === select.value);
  lens.gauge = session.gauges[lens.place] ?? null;
}

function fit(gauges = session.gauges) {
  gauges.forEach((gauge) => {
    const place = session.gauges.indexOf(gauge);
    const values = seen.flatMap(({ readings }) => readings?.tokens.map((token) => token.values[place]) ?? []);
    lens.scales.fit(gauge, values);
  });
}

let fitting = 0;
function soon() {
  fitting ||= setTimeout(() => {
    fitting = 0;
    if (!lens.gauge) return;
    const before = lens.scales.limit(lens.gauge);
    fit([lens.gauge]);
    // Values beyond the end of the scale are usual; only another end is another colour for all tokens.
    if (Math.abs(lens.scales.limit(lens.gauge) - before) < 0.02 * before) return;
    bench.recolour();
    find("legend").replaceChildren(...legend(lens));
  }, 120);
}

function draw() {
  fit();
  for (const { tokens } of bench.views.values()) tokens?.recolour();
  find("legend").replaceChildren(...legend(lens));
  const replies = session.path().filter(({ role }) => role === "assistant");
  find("chart").replaceChildren(...chart(session.gauges, replies, lens.scales, lens.gauge));
}

function keep() {
  clearTimeout(dirty);
  dirty = setTimeout(store, 250);
}

function store() {
  clearTimeout(dirty);
  const { checked } = find("compare");
  session.settings = { rack: rack.kept, sampling: sampling.values, gauge: find("gauge").value, compare: checked, against: find("against").value, draft: find("message").value };
  session.model ||= model.name;
  const fault = session.keep();
  if (fault && fault !== store.fault) notice(fault, true);
  store.fault = fault;
}

function notice(text, isError = false, ...more) {
  const line = element("p", { class: isError ? "alert" : "notice", role: isError ? "alert" : "status" }, text, " ", ...more,
    button("×", () => line.remove(), { class: "link", "aria-label": "Close this notice" }));
  find("notices").append(line);
  while (find("notices").children.length > 3) find("notices").firstChild.remove();
  if (!isError) setTimeout(() => line.remove(), 6000);
}

async function copy(text, name) {
  if (!text) return notice("These settings steer nothing.");
  try {
    await navigator.clipboard.writeText(text);
    notice(`Copied as ${name}.`);
  } catch { // not allowed here, such as in a notebook's frame
    const area = element("textarea", { rows: 4, readonly: true, value: text, "aria-label": `Settings as ${name}` });
    notice("Copy it from here:", true, area);
    area.select();
  }
}

/** A conversation of its own, the old branches kept. */
function fresh() {
  if (bench.busy) return;
  session.go(null);
  bench.render();
  find("message").focus();
}

async function opened(file) {
  try {
    if (file.size > 64 * 2 ** 20) throw new Error("This file is larger than 64 MB; it is not read.");
    const settings = session.settings;
    session = Session.fromJsonl(await file.text());
    session.settings = settings;
    choices();
    bench.show(session);
    if (session.path().some(({ role, readings }) => role === "assistant" && !readings?.tokens.length))
      notice("Replies here have no readings.", true, button("Read the traits", () => bench.read()));
  } catch (error) {
    notice(error.message, true);
  }
}

function listen() {
  const field = find("message");
  const send = () => {
    const text = field.value;
    if (!text.trim() || bench.busy) return;
    field.value = "";
    size();
    bench.send(text);
  };
  const size = () => {
    field.style.setProperty("--lines", String(Math.min(10, Math.max(2, field.value.split("\n").length))));
    keep();
  };
  field.addEventListener("input", size);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  find("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  find("stop").addEventListener("click", () => { bench.stop(); field.focus(); });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (document.body.classList.contains("racked")) racked(false);
    else bench.stop();
  });
  find("gauge").addEventListener("change", () => { choices(); draw(); bench.recolour(); keep(); });
  find("compare").addEventListener("change", keep);
  find("against").addEventListener("change", keep);
  find("new").addEventListener("click", fresh);
  find("open").addEventListener("click", () => !bench.busy && find("file").click());
  find("file").addEventListener("change", ({ target }) => { if (target.files[0]) opened(target.files[0]); target.value = ""; });
  find("save").addEventListener("click", () => download("conversation.jsonl", session.toJsonl(), "application/x-ndjson"));
  find("save-messages").addEventListener("click", () => download("messages.jsonl", session.toMessages(), "application/x-ndjson"));
  find("saving").addEventListener("click", ({ target }) => { if (target.localName === "button") find("saving").open = false; });
  find("export").addEventListener("click", async () => {
    try {
      download("conversation.html", await api.exported(session.toJsonl()), "text/html");
    } catch (error) {
      notice(error.message, true);
    }
  });
  const racked = (shown) => {
    document.body.classList.toggle("racked", shown);
    find("show-rack").setAttribute("aria-expanded", String(shown));
    (shown ? find("hide-rack") : find("show-rack")).focus();
  };
  find("show-rack").addEventListener("click", () => racked(!document.body.classList.contains("racked")));
  find("hide-rack").addEventListener("click", () => racked(false));
  find("chart").addEventListener("click", ({ target }) => {
    const id = target.dataset?.message;
    if (id) bench.views.get(id)?.node.scrollIntoView({ block: "center" });
  });
  addEventListener("pagehide", store);
  addEventListener("storage", ({ key }) => {
    if (key === KEY && !store.shared) notice("This page is open in another tab too. After a reload the conversation is the one that was changed last; save what you need.", true);
    store.shared ||= key === KEY;
  });
  find("compare").checked = Boolean(kept.compare);
  field.value = kept.draft ?? "";
}

async function begin() {
  rack.draw();
  listen();
  try {
    const told = await api.vectors();
    Object.assign(model, told.model);
    served = told.gauges ?? told.vectors.flatMap(({ name, layers }) => layers.map((layer) => ({ name: `${name}@${layer}`, trait: name, layer })));
    find("model").textContent = model.name;
    document.title = `${model.name} · persona-lens`;
    sampling.thinks = model.thinks;
    sampling.draw(keep, fresh);
    rack.history = told.history;
    rack.fill(told.vectors, kept.rack);
    lens.scales = new Scales(rack.vectors);
    rack.arrived = async () => { served = (await api.vectors()).gauges; lens.scales.vectors = rack.vectors; choices(); draw(); };
    choices();
    await rack.presets();
    rack.check();
  } catch (error) {
    notice(error.message, true, button("Load again", () => location.reload()));
  }
  against.choices();
  bench.show(session);
  find("written").after(copying(() => [...plainMessages(session.path()), { role: "user", content: find("message").value || "Hello" }], settings, page));
  document.body.dataset.ready = "";
}

begin();
