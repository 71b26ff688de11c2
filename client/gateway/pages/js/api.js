// The gateway's API: requests with the key, server-sent events, and errors in words.
const KEY = "swarm.key";
export const apiKey = {
  get: () => { try { return localStorage.getItem(KEY) ?? ""; } catch { return ""; } },
  set: (key) => { try { key ? localStorage.setItem(KEY, key) : localStorage.removeItem(KEY); } catch { /* not kept */ } },
};

export class ApiError extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

/** A response that is fine. Throws ApiError with a message for people; an aborted request throws as fetch does. */
export async function ask(path, { body, signal } = {}) {
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(apiKey.get() && { Authorization: `Bearer ${apiKey.get()}` }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The gateway does not answer. Is it still running?", 0);
  }
  if (response.ok) return response;
  let message = `The gateway answered ${response.status} ${response.statusText}.`;
  try { message = (await response.json()).error.message; } catch { /* no JSON: the status has to do */ }
  if (response.status === 401) message = `${message} Enter a key under Settings; who runs the gateway makes one with: swarm gateway keys add NAME`;
  const wait = response.headers.get("retry-after");
  throw new ApiError(wait ? `${message} (Try again in ${wait} s.)` : message, response.status);
}

/** The JSON objects of a stream of server-sent events. Ends at [DONE]; throws if the connection breaks off before. */
export async function* events(response, { endless = false } = {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection to the gateway broke off.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!endless) throw new ApiError("The reply broke off: the gateway ended the connection.", 0);
}
