/** One reply: asked for, waited for where the server is busy, and put into the session as it comes. */

import * as api from "./api.js";

const TRIES = 5;

export const plainMessages = (path) => path.map(({ role, content }) => ({ role, content }));

/** `told` hears `begun`, `token`, `rest`, `waiting(seconds)`. Resolves to why it ended: "", "stopped", or an error in words. */
export async function answer(session, message, settings, signal, told) {
  const asked = api.body(plainMessages(session.path(message.parent)), settings);
  for (let tried = 1; ; tried += 1) {
    try {
      await listen(session, message, asked, signal, told);
      return "";
    } catch (error) {
      if (error.name === "AbortError") return "stopped";
      if (error.status !== 429 || tried === TRIES || message.content) return error.message || String(error);
      if (!(await pause(Math.max(1, error.retryAfter || 2), signal, told.waiting))) return "stopped";
    }
  }
}

async function listen(session, message, asked, signal, told) {
  let places = [];
  for await (const chunk of api.reply(asked, signal)) {
    const [choice] = chunk.choices ?? [];
    const lens = { ...chunk.persona_lens, ...choice?.persona_lens };
    if (lens.gauges) {
      places = session.places(lens.gauges);
      const forecast = (lens.forecast ?? []).map((each) => ({ ...each, says: each.says ?? "", gauge: places[each.gauge] }));
      message.readings = { prompt_last: session.placed(lens.prompt_last, places), means: [], tokens: [], alarms: [], forecast };
      Object.assign(message.made, { edits: lens.edits ?? "", history: lens.history ?? undefined, seed: lens.seed ?? message.made.seed });
      told.begun();
    }
    message.content += choice?.delta?.content ?? "";
    for (const { id, text, values, part } of lens.tokens ?? []) {
      const token = { id, text, values: session.placed(values, places), ...(part && { part }) };
      message.readings.tokens.push(token);
      told.token(token);
    }
    if (lens.means) {
      message.readings.means = session.placed(lens.means, places);
      message.readings.alarms = (lens.alarms ?? []).map(({ alarm, gauge, trait, layer, value, sds, token }) =>
        ({ alarm, gauge: places[gauge], trait, layer, value, sds: sds ?? null, token: token ?? null }));
      message.ended = lens.ended ?? choice?.finish_reason;
      told.rest(message.readings.tokens.length ? lens.rest ?? "" : choice?.delta?.content ?? "");
    }
  }
}

/** Wait some seconds, saying how many are left; false if that was stopped. */
function pause(seconds, signal, waiting) {
  return new Promise((resolve) => {
    let left = seconds;
    const end = (whole) => {
      clearInterval(clock);
      signal.removeEventListener("abort", aborted);
      resolve(whole);
    };
    const aborted = () => end(false);
    const clock = setInterval(() => {
      left -= 1;
      if (left <= 0) end(true);
      else waiting(left);
    }, 1000);
    waiting(left);
    if (signal.aborted) end(false);
    signal.addEventListener("abort", aborted);
  });
}

/** A reply that broke off has no means from the server: those of the tokens that came, after thinking those of the answer. */
export function meansOf(readings) {
  if (!readings || readings.means.length || !readings.tokens.length) return;
  const width = Math.max(...readings.tokens.map(({ values }) => values.length));
  const own = readings.tokens.filter(({ part }) => !part);
  readings.means = Array.from({ length: width }, (_, place) => {
    const known = own.map(({ values }) => values[place]).filter(Number.isFinite);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  });
}

/** Have the server read the replies of a branch that have no readings, such as edited ones or a file's. */
export async function readBranch(session) {
  const path = session.path();
  const unread = path.filter(({ role, readings }) => role === "assistant" && !readings?.tokens.length);
  if (!unread.length) return 0;
  const { gauges, turns } = await api.readTurns(plainMessages(path));
  const places = session.places(gauges);
  for (const { message: number, readings, tokens } of turns) {
    const message = path[number];
    if (!unread.includes(message)) continue;
    const by = (name) => gauges.map((gauge) => readings.find(({ trait, layer }) => trait === gauge.trait && layer === gauge.layer)?.[name] ?? null);
    message.readings = {
      prompt_last: session.placed(by("prompt_last"), places), means: session.placed(by("answer_mean").map((mean, at) => mean ?? by("mean")[at]), places), alarms: [], forecast: [],
      tokens: tokens.map(({ text, values }) => ({ text, values: session.placed(values, places) })),
    };
  }
  return unread.length;
}
