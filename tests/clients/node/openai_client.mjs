// The `openai` client: responses, conversations, chat completions, files, embeddings, models, errors.
import OpenAI, { toFile } from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { apiKey, baseURL, model, report } from "./settings.mjs";

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 30_000 });
const Place = z.object({ city: z.string(), people: z.number() });
const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const tool = { type: "function", name: "get_weather", parameters, strict: true };
const seen = {};

const plain = await client.responses.create({ model, input: "capital" });
seen.plain = plain.output_text;
seen.retrieved = (await client.responses.retrieve(plain.id)).output_text;
const next = await client.responses.create({
  model,
  input: "capital again",
  previous_response_id: plain.id,
});
seen.next = next.output_text;
seen.inputItems = (await client.responses.inputItems.list(next.id)).data.length;

const events = [];
const stream = client.responses.stream({ model, input: "count" });
for await (const event of stream) events.push(event);
seen.deltas = events.filter((e) => e.type === "response.output_text.delta").map((e) => e.delta);
seen.streamed = (await stream.finalResponse()).output_text;
seen.numbers = events.map((e) => e.sequence_number);

const begun = await client.responses.create({ model, input: "count", background: true, stream: true });
let first;
for await (const event of begun) {
  first = event;
  break;
}
const rest = [];
const resumed = await client.responses.retrieve(first.response.id, {
  stream: true,
  starting_after: first.sequence_number,
});
for await (const event of resumed) rest.push(event);
seen.resumed = { from: rest[0].sequence_number, last: rest.at(-1).type };

const slow = await client.responses.create({ model, input: "slow", background: true });
seen.cancelled = (await client.responses.cancel(slow.id)).status;
await client.responses.delete(plain.id);
seen.deleted = await client.responses.retrieve(plain.id).then(
  () => "still there",
  (error) => error.constructor.name,
);

const parsed = await client.responses.parse({
  model,
  input: "where",
  text: { format: zodTextFormat(Place, "place") },
});
seen.parsed = parsed.output_parsed;

const input = [{ role: "user", content: "weather" }];
for (let round = 0; round < 2; round++) {
  const answer = await client.responses.create({ model, input, tools: [tool], store: false });
  input.push(...answer.output);
  for (const item of answer.output.filter((one) => one.type === "function_call"))
    input.push({ type: "function_call_output", call_id: item.call_id, output: "sun" });
  seen.tools = answer.output_text;
}

const conversation = (await client.conversations.create({})).id;
await client.responses.create({ model, input: "my name", conversation });
seen.known = (await client.responses.create({ model, input: "who", conversation })).output_text;
seen.said = [];
for await (const item of client.conversations.items.list(conversation, { order: "asc", limit: 3 }))
  seen.said.push(item.content[0].text);
const file = await client.files.create({
  file: await toFile(Buffer.from("hello"), "note.txt"),
  purpose: "user_data",
});
seen.file = [file.bytes, (await client.files.delete(file.id)).deleted];
const embedded = await client.embeddings.create({ model: process.env.EMBEDDER, input: "one" });
seen.embedding = embedded.data[0].embedding.length;

const messages = [{ role: "user", content: "count" }];
const chat = client.chat.completions.stream({
  model,
  messages,
  stream_options: { include_usage: true },
});
const chunks = [];
for await (const chunk of chat) chunks.push(chunk);
seen.chat = await chat.finalContent();
seen.chatUsage = chunks.at(-1).usage.completion_tokens === (await chat.totalUsage()).completion_tokens;
const form = await client.chat.completions.parse({
  model,
  messages: [{ role: "user", content: "where" }],
  response_format: zodResponseFormat(Place, "place"),
});
seen.chatParsed = form.choices[0].message.parsed;
const runner = client.chat.completions.runTools({
  model,
  messages: [{ role: "user", content: "weather" }],
  tools: [
    {
      type: "function",
      function: {
        name: "get_weather",
        parameters,
        parse: JSON.parse,
        function: ({ city }) => `sun in ${city}`,
      },
    },
  ],
});
seen.chatTools = await runner.finalContent();

seen.models = (await client.models.list()).data.map((one) => one.id);
seen.model = (await client.models.retrieve(model)).id;
seen.errors = [];
for (const wrong of [
  { model: "agent/nobody", input: "capital" },
  { model, input: "capital", temperature: 3 },
  { model, input: "capital", tools: [{ type: "web_search" }] },
]) {
  const error = await client.responses.create(wrong).catch((caught) => caught);
  seen.errors.push([error.constructor.name, error.code, error.param]);
}
const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
seen.errors.push([(await stranger.models.list().catch((e) => e)).constructor.name]);
report(seen);
