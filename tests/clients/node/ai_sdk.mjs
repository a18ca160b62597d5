// Vercel's AI SDK with its OpenAI provider, over responses and over chat completions.
import { createOpenAI } from "@ai-sdk/openai";
import {
  APICallError,
  Output,
  generateObject,
  generateText,
  isStepCount,
  streamObject,
  streamText,
  tool,
} from "ai";
import { z } from "zod";
import { apiKey, baseURL, model as name, report } from "./settings.mjs";

const openai = createOpenAI({ baseURL, apiKey });
const schema = z.object({ city: z.string(), people: z.number() });
const tools = {
  get_weather: tool({
    description: "The weather of a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => `sun in ${city}`,
  }),
};
const stopWhen = isStepCount(4);
const maxRetries = 0;

async function tour(model, providerOptions) {
  const common = { model, maxRetries, providerOptions };
  const seen = {};
  const plain = await generateText({ ...common, instructions: "Be short.", prompt: "capital" });
  seen.text = plain.text;
  seen.usage = [plain.usage.inputTokens, plain.usage.outputTokens];
  seen.finish = plain.finishReason;

  const counted = streamText({ ...common, prompt: "count" });
  seen.deltas = [];
  for await (const text of counted.textStream) if (text) seen.deltas.push(text);
  seen.streamUsage = (await counted.usage).outputTokens;

  const worked = await generateText({ ...common, tools, stopWhen, prompt: "weather" });
  seen.tools = [worked.text, worked.steps.map((step) => step.toolResults.map((r) => r.output))];
  const streamed = streamText({ ...common, tools, stopWhen, prompt: "weather" });
  await streamed.consumeStream();
  seen.streamedTools = [await streamed.text, (await streamed.steps).length];

  const object = Output.object({ schema });
  seen.output = (await generateText({ ...common, output: object, prompt: "where" })).output;
  seen.object = (await generateObject({ ...common, schema, prompt: "where" })).object;
  const partial = streamObject({ ...common, schema, prompt: "where" });
  for await (const _ of partial.partialObjectStream);
  seen.streamedObject = await partial.object;

  const failed = await generateText({ ...common, prompt: "fail" }).catch((error) => error);
  seen.failed = failed.message;
  const cut = streamText({ ...common, prompt: "fail", onError: ({ error }) => (seen.cut = error.message) });
  await cut.consumeStream();
  return seen;
}

const refused = await generateText({
  model: openai("agent/nobody"),
  prompt: "capital",
  maxRetries,
}).catch((error) => error);
report({
  responses: await tour(openai(name)),
  unstored: await tour(openai(name), { openai: { store: false } }),
  chat: await tour(openai.chat(name)),
  refused: [APICallError.isInstance(refused), refused.statusCode, refused.message],
});
