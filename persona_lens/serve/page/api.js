/** The server's routes: questions with one answer, and streams of server-sent events. */

const OWN = "v1/persona_lens/";

/** What went wrong, in words for the person. */
export class ServerError extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

async function send(path, options) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running? What you wrote is kept.");
  }
  if (answer.ok) return answer;
  let said = "";
  try {
    said = (await answer.json()).error.message;
  } catch {
    said = `it answered ${answer.status} without saying why`;
  }
  if (answer.status === 401) said = "This page's token is not the server's any more. Open the link that it printed last.";
  throw new ServerError(said, answer.status, Number(answer.headers.get("Retry-After")) || 0);
}

function posted(value, signal) {
  return { method: "POST", body: JSON.stringify(value), headers: { "Content-Type": "application/json" }, signal };
}

const json = async (path, options) => (await send(path, options)).json();

export const vectors = () => json(OWN + "vectors");
export const preview = (edits, history, signal) => json(OWN + "preview", posted({ edits, history }, signal));
export const readTurns = (messages, edits = "") => json(OWN + "read", posted({ messages, edits }));
export const presets = () => json(OWN + "presets");
const preset = (name) => `${OWN}presets/${encodeURIComponent(name)}`;
export const keepPreset = (name, edits) => json(preset(name), { ...posted({ edits }), method: "PUT" });
export const dropPreset = (name) => json(preset(name), { method: "DELETE" });
export const removeVectors = (name) => json(`${OWN}vectors/${encodeURIComponent(name)}`, { method: "DELETE" });
export const bringVectors = (name, content) =>
  json(OWN + "vectors", { method: "POST", body: content, headers: { "X-Name": name } });
export const exported = async (session) =>
  (await send(OWN + "export", { method: "POST", body: session, headers: { "Content-Type": "application/x-ndjson" } })).text();

/** The body of a request for one reply. */
export function body(messages, settings) {
  const lens = { edits: settings.edits };
  if (settings.edits && settings.history) lens.history = settings.history;
  if (settings.alarms) {
    lens.alarms = settings.alarms.split(",").map((each) => each.trim()).filter(Boolean);
    lens.alarm_on = settings.alarm_on;
    lens.stop_on_alarm = settings.stop_on_alarm;
  }
  const { temperature, top_p, max_tokens, seed, thinking_budget } = settings;
  return { messages, stream: true, temperature, top_p, max_tokens, seed, thinking_budget, persona_lens: lens };
}

/** The chunks of a reply as they come. Throws a ServerError also where the stream ends before its end. */
export async function* reply(asked, signal) {
  const answer = await send("v1/chat/completions", posted(asked, signal));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      const { value, done } = await next(reader);
      if (done) throw new ServerError("The connection was cut before the reply was whole; what came is kept.");
      const events = (left + value).split(/\r?\n\r?\n/);
      left = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue; // a comment that keeps the connection open
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(chunk.error.message, 500);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function next(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return { done: true };
  }
}
