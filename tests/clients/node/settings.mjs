// Where the scripts of this folder find the server. Each prints one JSON object: what it saw.
export const baseURL = process.env.BASE_URL;
export const apiKey = process.env.API_KEY;
export const model = process.env.MODEL;

export function report(seen) {
  console.log(JSON.stringify(seen));
}
