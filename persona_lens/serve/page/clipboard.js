/** Settings in words of others: a command's option, Python, curl. */

import { body } from "./api.js";

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
// JSON's texts are Python's too; its other words are not, and stand outside of texts here.
const python = (value) => JSON.stringify(value).replace(/("(?:[^"\\]|\\.)*")|\b(true|false|null)\b/g,
  (whole, text, word) => text ?? { true: "True", false: "False", null: "None" }[word]);

/** As `persona-lens monitor chat` takes it; other commands hold no conversation, and have no `--history`. */
export const asEdits = ({ edits, history }) => (edits ? `--edits ${shell(edits)}${history ? ` --history ${history}` : ""}` : "");

export function asPython(messages, settings, model) {
  const { stream, persona_lens, thinking_budget, messages: _, ...rest } = body(messages, settings);
  const own = thinking_budget === undefined ? { persona_lens } : { thinking_budget, persona_lens }; // what the client does not know
  const more = Object.entries(rest).filter(([, value]) => value !== undefined).map(([name, value]) => `    ${name}=${python(value)},\n`);
  return `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url=${python(`${location.origin}/v1`)}, api_key=os.environ["PERSONA_LENS_TOKEN"])\n`
    + `reply = client.chat.completions.create(\n    model=${python(model)},\n    messages=${python(messages)},\n${more.join("")}`
    + `    extra_body=${python(own)},\n)\nprint(reply.choices[0].message.content)\n`;
}

export function asCurl(messages, settings) {
  const { stream, ...rest } = body(messages, settings);
  return `curl ${location.origin}/v1/chat/completions -H "Authorization: Bearer $PERSONA_LENS_TOKEN" \\\n`
    + `  -H 'Content-Type: application/json' -d ${shell(JSON.stringify(rest))}\n`;
}
