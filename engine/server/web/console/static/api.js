// Calling the server: the gRPC API as JSON, and OpenAI's for answers.

const KEY = 'loraplex.key';

export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error?.code ?? '';
    this.fix = error?.fix ?? '';
  }
}

/** The API key or token of this tab: kept until it is closed, and nowhere else. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? '',
  set: value => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function request(path, options = {}) {
  const headers = { 'x-loraplex-console': '1', ...(options.body ? { 'content-type': 'application/json' } : {}) };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  const response = await fetch(path, { ...options, headers, credentials: 'same-origin' });
  if (!response.ok) {
    const content = await response.json().catch(() => ({}));
    if (response.status === 401) dispatchEvent(new Event('signed-out'));
    throw new Refused(response.status, content.error);
  }
  return response;
}

export const get = async path => (await request(path)).json();
export const post = async (path, body, signal) => (await request(path, { method: 'POST', body: JSON.stringify(body), signal })).json();

/** One call: `call('AdapterService.GetAdapter', {name})`. */
export const call = (method, message = {}, signal) => post(`/console/call/${method}`, message, signal);

/** A call that reports its progress; returns its last message. */
export async function follow(method, message, onProgress) {
  const response = await request(`/console/call/${method}`, { method: 'POST', body: JSON.stringify(message) });
  let last = {};
  for await (const line of lines(response.body)) {
    last = JSON.parse(line);
    if (last.error) throw new Refused(0, last.error);
    if (last.progress) onProgress(last.progress);
  }
  return last;
}

/** The events of a streamed answer, parsed. */
export async function* events(path, body, signal) {
  const response = await request(path, { method: 'POST', body: JSON.stringify(body), signal });
  for await (const line of lines(response.body)) {
    if (!line.startsWith('data: ') || line === 'data: [DONE]') continue;
    const event = JSON.parse(line.slice(6));
    if (event.error) throw new Refused(0, event.error);
    yield event;
  }
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split('\n');
      rest = parts.pop();
      yield* parts.filter(Boolean);
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {});
  }
}
