// `@openai/agents`, with an agent of the server as the model of agents here.
import {
  Agent,
  OpenAIConversationsSession,
  OpenAIProvider,
  Runner,
  setTracingDisabled,
  tool,
} from "@openai/agents";
import { z } from "zod";
import { apiKey, baseURL, model, report } from "./settings.mjs";

setTracingDisabled(true);
const getWeather = tool({
  name: "get_weather",
  description: "The weather of a city.",
  parameters: z.object({ city: z.string() }),
  execute: async ({ city }) => `sun in ${city}`,
});

async function tour(useResponses) {
  const modelProvider = new OpenAIProvider({ apiKey, baseURL, useResponses });
  const runner = new Runner({ modelProvider });
  const seen = {};
  const traveller = new Agent({
    name: "traveller",
    instructions: "Travel.",
    model,
    tools: [getWeather],
  });
  const whole = await runner.run(traveller, "weather");
  seen.answer = whole.finalOutput;
  seen.outputs = whole.newItems.filter((i) => i.type === "tool_call_output_item").map((i) => i.output);

  const streamed = await runner.run(traveller, "count", { stream: true });
  let text = "";
  for await (const event of streamed)
    if (event.type === "raw_model_stream_event" && event.data.type === "output_text_delta")
      text += event.data.delta;
  await streamed.completed;
  seen.streamed = [text, streamed.finalOutput];
  const asked = await runner.run(traveller, "weather", { stream: true });
  await asked.completed;
  seen.streamedTool = asked.finalOutput;

  const atlas = new Agent({ name: "atlas", model, outputType: z.object({ city: z.string(), people: z.number() }) });
  seen.parsed = (await runner.run(atlas, "where")).finalOutput;

  const spaniard = new Agent({ name: "spaniard", instructions: "Speak Spanish.", model });
  const greeter = Agent.create({ name: "greeter", model, handoffs: [spaniard] });
  const handed = await runner.run(greeter, "hola");
  seen.handoff = [handed.finalOutput, handed.lastAgent.name];

  const failed = await runner.run(traveller, "fail").catch((error) => error);
  seen.failed = failed.message;
  return seen;
}

async function talk() {
  const runner = new Runner({ modelProvider: new OpenAIProvider({ apiKey, baseURL }) });
  const session = new OpenAIConversationsSession({ apiKey, baseURL });
  const friend = new Agent({ name: "friend", model });
  await runner.run(friend, "my name", { session });
  const known = (await runner.run(friend, "who", { session })).finalOutput;
  return [known, (await session.getItems()).length];
}

report({ responses: await tour(true), chat: await tour(false), session: await talk() });
