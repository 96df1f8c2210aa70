// The server that this page came from, asked with the key that was given.

const stored = (name) => localStorage.getItem(`moe-gguf ${name}`) ?? "";
export const settings = {
  get: stored,
  set: (name, value) => localStorage.setItem(`moe-gguf ${name}`, value),
};

const headers = () => {
  const key = stored("key").trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
};

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const failure = new Error(body?.error?.message ?? `the server answered ${response.status}`);
  failure.status = response.status;
  throw failure;
}

export const get = async (path) => (await checked(await fetch(path, { headers: headers() }))).json();

/** The events of a stream; an error among them is thrown. */
export async function* stream(path, body, signal) {
  const asked = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await checked(await fetch(path, asked));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
