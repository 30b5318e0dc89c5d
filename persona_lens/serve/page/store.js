/** A conversation as a tree of messages, its file, and what the browser keeps of it. */

export const KEY = "persona-lens/session/1";
const LARGEST = 4_000_000; // characters; browsers keep about five million for a site
const ID = /^[A-Za-z0-9_.-]{1,64}$/;
const ROLES = ["system", "user", "assistant"];

export class Session {
  constructor(model = "", gauges = []) {
    Object.assign(this, { model, gauges, current: null, messages: new Map(), children: new Map([[null, []]]) });
    this.chosen = new Map(); // by message: the answer to it where one stood last
    this.pairs = new Map(); // by message: the two answers that are shown side by side
    this.settings = null;
  }

  get(id) {
    return this.messages.get(id);
  }

  /** The messages from the first one to where the conversation stands, or to another. */
  path(id = this.current) {
    const found = [];
    for (let at = id; at !== null; at = this.get(at).parent) found.unshift(this.get(at));
    return found;
  }

  siblings(id) {
    return this.children.get(this.get(id).parent);
  }

  add(role, content, parent = this.current, more = {}) {
    let number = this.messages.size;
    while (this.messages.has(`m${number}`)) number += 1;
    const message = { id: `m${number}`, parent, role, content, ...more };
    this.put(message);
    return message;
  }

  put(message) {
    this.messages.set(message.id, message);
    this.children.get(message.parent).push(message.id);
    this.children.set(message.id, []);
  }

  /** Take a message back that nothing answers. */
  drop(id) {
    const { parent } = this.get(id);
    this.children.set(parent, this.children.get(parent).filter((each) => each !== id));
    this.children.delete(id);
    this.messages.delete(id);
    this.chosen.delete(parent);
  }

  /** Stand at a message. */
  go(id) {
    this.current = id;
    for (const { id: each, parent } of this.path()) this.chosen.set(parent, each);
  }

  /** Go to a branch: to its message where one stood last. */
  enter(id) {
    let at = id;
    for (;;) {
      const answers = this.children.get(at);
      if (!answers.length) break;
      at = answers.includes(this.chosen.get(at)) ? this.chosen.get(at) : answers.at(-1);
    }
    this.go(at);
  }

  /** Where gauges of the server stand among the session's; new ones are added. */
  places(gauges) {
    return gauges.map((gauge) => {
      const at = this.gauges.findIndex(({ name }) => name === gauge.name);
      return at < 0 ? this.gauges.push(gauge) - 1 : at;
    });
  }

  /** Readings in the order of the session's gauges. */
  placed(values, places) {
    const found = [];
    values.forEach((value, place) => { found[places[place]] = value; });
    return Array.from(found, (value) => value ?? null);
  }

  toJsonl({ tokens = true } = {}) {
    const { model, gauges, current } = this;
    const header = { persona_lens: "session", format_version: 1, model, gauges, current };
    const lines = [...this.messages.values()].map((message) => {
      const { id, parent, role, content, made, readings } = message;
      return { id, parent, role, content, made, readings: readings && this.whole(readings, tokens) };
    });
    return [header, ...lines].map((line) => JSON.stringify(line)).join("\n") + "\n";
  }

  /** Replies that are older than a gauge have no value of it. */
  whole(readings, tokens) {
    const even = (values) => (values.length ? Array.from(this.gauges, (_, place) => values[place] ?? null) : []);
    return {
      prompt_last: even(readings.prompt_last),
      means: even(readings.means),
      tokens: tokens ? readings.tokens.map((token) => ({ ...token, values: even(token.values) })) : [],
      alarms: readings.alarms,
      forecast: readings.forecast,
    };
  }

  /** The messages alone, as OpenAI has them, one a line. */
  toMessages() {
    return this.path().map(({ role, content }) => JSON.stringify({ role, content })).join("\n") + "\n";
  }

  /** Read a session, or OpenAI messages: one a line, a list, or `{"messages": […]}`. Throws an Error in words. */
  static fromJsonl(text) {
    const rows = parsed(text);
    const first = rows[0];
    if (first?.persona_lens !== undefined) return fromSession(first, rows.slice(1));
    const listed = rows.length === 1 ? (Array.isArray(first) ? first : first?.messages ?? rows) : rows;
    const session = new Session();
    for (const each of listed) {
      const content = typeof each?.content === "string" ? each.content : each?.content?.map?.((part) => part.text ?? "").join("");
      if (!ROLES.includes(each?.role) || typeof content !== "string")
        throw new Error("This is neither a session nor a list of OpenAI messages with role and content.");
      session.go(session.add(each.role, content).id);
    }
    if (!session.messages.size) throw new Error("There are no messages in this file.");
    return session;
  }

  /** What is kept over a reload; returns what could not be, in words, or an empty text. */
  keep() {
    const rest = { settings: this.settings, pairs: [...this.pairs] };
    const whole = () => JSON.stringify({ ...rest, session: this.toJsonl() });
    const bare = () => JSON.stringify({ ...rest, session: this.toJsonl({ tokens: false }) });
    if (stored(whole())) return "";
    if (stored(bare()))
      return "This conversation is too long for the browser to keep whole: after a reload the colours of its tokens are gone. Save it as a file.";
    return "This conversation is too long for the browser to keep: after a reload it is as it was before. Save it as a file.";
  }

  static kept() {
    try {
      const { session, settings, pairs } = JSON.parse(localStorage.getItem(KEY));
      const found = session ? Session.fromJsonl(session) : new Session();
      found.settings = settings;
      for (const [id, pair] of pairs ?? []) if (pair.every((each) => found.messages.has(each))) found.pairs.set(id, pair);
      return found;
    } catch {
      return new Session();
    }
  }
}

function stored(text) {
  if (text.length > LARGEST) return false;
  try {
    localStorage.setItem(KEY, text);
    return true;
  } catch {
    return false; // no room, or the browser keeps nothing for this page
  }
}

function parsed(text) {
  const trimmed = text.replace(/^\ufeff/, "").trim();
  if (!trimmed) throw new Error("There is nothing in this file.");
  try {
    return [JSON.parse(trimmed)];
  } catch { /* several lines */ }
  return trimmed.split("\n").filter((line) => line.trim()).map((line, number) => {
    try {
      return JSON.parse(line);
    } catch {
      throw new Error(`Line ${number + 1} of this file is not JSON.`);
    }
  });
}

const values = (given) => (Array.isArray(given) ? given.map((each) => (Number.isFinite(each) ? each : null)) : []);
const list = (given) => (Array.isArray(given) ? given.filter((each) => each && typeof each === "object") : []);

function fromSession(header, lines) {
  if (header.persona_lens !== "session" || header.format_version !== 1)
    throw new Error("This file is of another version of persona-lens.");
  const gauges = list(header.gauges).map(({ name, trait, layer }) => ({ name: String(name), trait: String(trait), layer: Number(layer) }));
  const session = new Session(String(header.model ?? ""), gauges);
  for (const line of lines) {
    const { id, parent = null, role, content, made, readings } = line ?? {};
    if (!ID.test(id) || session.messages.has(id) || !ROLES.includes(role) || typeof content !== "string" || !session.children.has(parent))
      throw new Error(`The message ${String(id).slice(0, 40)} of this file cannot be read.`);
    session.put({ id, parent, role, content, ...(made && { made }), ...(readings && { readings: read(readings) }) });
    session.current = id;
  }
  if (header.current === null || session.messages.has(header.current)) session.current = header.current;
  session.go(session.current);
  return session;
}

function read(readings) {
  const tokens = list(readings.tokens).map(({ id, text, values: own, part }) =>
    ({ ...(id != null && { id }), text: String(text), values: values(own), ...(["thinking", "mark"].includes(part) && { part }) }));
  const [alarms, forecast] = [list(readings.alarms), list(readings.forecast)];
  return { prompt_last: values(readings.prompt_last), means: values(readings.means), tokens, alarms, forecast };
}
