/** The conversation on the page: shows the tree's current branch, and does what the buttons of its messages ask. */

import { asCurl, asEdits, asPython } from "./clipboard.js";
import { button, element, find } from "./elements.js";
import { MessageView, partings } from "./message.js";
import { answer, meansOf, plainMessages, readBranch } from "./talk.js";
import { drawnSeed } from "./sampling.js";

export class Bench {
  /** `page` gives settings, colours and notices: see main.js. */
  constructor(session, lens, page) {
    Object.assign(this, { session, lens, page, views: new Map(), running: null });
  }

  get busy() {
    return this.running !== null;
  }

  show(session) {
    this.session = session;
    this.views.clear();
    find("messages").replaceChildren();
    this.render();
  }

  view(message) {
    if (!this.views.has(message.id)) this.views.set(message.id, new MessageView(message, this.session, this.lens, this));
    return this.views.get(message.id);
  }

  /** The messages that are shown: in each place one, or two side by side. */
  places() {
    return this.session.path().map((message) => {
      const pair = this.session.pairs.get(message.parent);
      return pair?.includes(message.id) ? pair.map((id) => this.session.get(id)) : [message];
    });
  }

  render() {
    const places = this.places();
    const list = find("messages");
    const signature = places.map((each) => each.map(({ id }) => id).join("+")).join(" ");
    if (list.dataset.signature !== signature) {
      list.dataset.signature = signature;
      list.replaceChildren(...places.map((each) => (each.length === 1 ? this.view(each[0]).node
        : element("li", { class: "pair" }, element("ol", { "aria-label": "Two replies side by side" }, ...each.map((one) => this.view(one).node))))));
    }
    for (const each of places) {
      for (const one of each) this.view(one).refresh();
      if (each.length === 2) this.part(each);
    }
    find("blank").hidden = places.length > 0;
    this.page.changed(places.flat());
  }

  part(pair) {
    const [one, other] = pair.map((message) => this.view(message));
    for (const each of [one, other]) each.node.classList.toggle("current", each.message.id === this.session.current || this.session.path().some(({ id }) => id === each.message.id));
    partings(one, other);
  }

  recolour() {
    for (const { tokens } of this.views.values()) tokens?.recolour();
    for (const each of this.places().flat()) this.view(each).refresh();
  }

  /** Say something, and have it answered. */
  async send(text) {
    const { session } = this;
    const system = this.page.system();
    if (session.current === null && system) session.go(session.add("system", system, null).id);
    session.go(session.add("user", text).id);
    await this.answered(session.current, this.page.asked());
  }

  /** Have a message answered with these settings, two of them side by side. */
  async answered(parent, several) {
    const { session } = this;
    const control = new AbortController();
    this.running = control;
    const replies = several.map((settings) => {
      const { edits, history, temperature, top_p, max_tokens, seed, thinking_budget } = settings;
      return session.add("assistant", "", parent, { made: { edits, history, temperature, top_p, max_tokens, seed, thinking_budget } });
    });
    if (replies.length === 2) session.pairs.set(parent, replies.map(({ id }) => id));
    else session.pairs.delete(parent);
    session.go(replies.at(-1).id);
    this.page.began();
    this.render();
    this.page.follow(true);
    const ends = await Promise.all(replies.map((message, number) => this.one(message, several[number], control.signal)));
    this.running = null;
    this.finished(replies, ends, parent, several);
  }

  async one(message, settings, signal) {
    const view = this.view(message);
    view.node.setAttribute("aria-busy", "true");
    view.say("…");
    const why = await answer(this.session, message, settings, signal, {
      begun: () => { this.page.gauges(); view.say(""); view.refresh(); },
      token: (token) => { view.token(token); this.page.arrived(token); },
      rest: (text) => (view.tokens ? view.tokens.rest(text) : view.draw()),
      waiting: (seconds) => view.say(`The server is busy; asking again in ${seconds} s.`),
    });
    view.node.removeAttribute("aria-busy");
    meansOf(message.readings);
    const ended = { length: "It reached its limit of tokens.", alarm: "An alarm ended it." }[message.ended] ?? "";
    view.say(why === "stopped" ? "Stopped." : why || ended, Boolean(why) && why !== "stopped");
    return why;
  }

  finished(replies, ends, parent, several) {
    const { session } = this;
    const empty = replies.filter(({ content, readings }) => !content && !readings?.tokens.length);
    const failed = replies.some((_, number) => ends[number]);
    if (failed && empty.length) {
      session.pairs.delete(parent);
      for (const message of empty) session.drop(message.id);
      const left = replies.find((each) => !empty.includes(each));
      session.go(left?.id ?? parent);
      const why = ends.find((each) => each && each !== "stopped");
      if (why) this.page.notice(why, true, button("Try again", () => !this.busy && this.answered(parent, several)));
    }
    this.page.ended(replies.filter((each) => !empty.includes(each)), ends.find(Boolean) ?? "");
    this.render();
  }

  stop() {
    this.running?.abort();
  }

  enter(id) {
    const [at, key] = [this.session.get(id), document.activeElement?.dataset.key];
    this.session.enter(id);
    this.render();
    const view = this.view(at);
    view.focus(key);
    if (document.activeElement?.dataset.key !== key) view.focus(key === "next" ? "before" : "next");
  }

  edit(view) {
    const { message } = view;
    view.edit(async (text) => {
      view.draw();
      if (!text.trim()) return;
      const changed = this.session.add(message.role, text, message.parent);
      this.session.go(changed.id);
      if (message.role === "user") await this.answered(changed.id, this.page.asked());
      else {
        this.render();
        if (message.role === "assistant") await this.read();
      }
    });
  }

  async read() {
    try {
      await readBranch(this.session);
      for (const message of this.session.path()) this.views.get(message.id)?.draw();
      this.page.gauges();
      this.render();
    } catch (error) {
      this.page.notice(error.message, true);
    }
  }

  again(message) {
    return this.answered(message.parent, [this.page.asked().at(-1)]);
  }

  reseed(message) {
    return this.answered(message.parent, [{ ...message.made, seed: drawnSeed() }]);
  }

  take(message) {
    this.page.take(message.made);
  }

  beside(message) {
    const { pairs } = this.session;
    if (pairs.get(message.parent)?.includes(message.id)) {
      pairs.delete(message.parent);
      this.session.enter(message.id);
    } else {
      const all = this.session.siblings(message.id);
      const at = all.indexOf(message.id);
      pairs.set(message.parent, at ? [all[at - 1], message.id] : [message.id, all[1]]);
    }
    this.render();
  }

  /** Ways to have the same reply elsewhere. */
  copies(message) {
    if (!message.made) return null;
    return copying(() => plainMessages(this.session.path(message.parent)), () => message.made, this.page);
  }
}

/** Buttons that copy settings as a command's option, as Python and as curl. */
export function copying(messages, settings, page) {
  const kinds = [["--edits", () => asEdits(settings())], ["Python", () => asPython(messages(), settings(), page.model())], ["curl", () => asCurl(messages(), settings())]];
  return element("details", { class: "copies" }, element("summary", {}, "Copy"),
    ...kinds.map(([name, text]) => button(name, () => page.copy(text(), name), { class: "link", "aria-label": `Copy as ${name}` })));
}
