// Playground: one prompt, several versions, side by side.

import { events, get } from './api.js';
import { h, notice, pill, problem } from './dom.js';
import { span } from './format.js';
import { may } from './session.js';

const MOST = 6;

export async function playgroundPage(chosen = '') {
  const { data } = await get('/v1/models');
  const models = data.filter(one => !one.id.endsWith('@current')); // the bare name says the same
  const names = models.map(one => one.id);
  const base = models.find(one => !one.parent)?.id;
  const first = decodeURIComponent(chosen).split(',').filter(one => names.includes(one));
  const state = { running: null, boxes: new Map() };
  const status = h('p', { class: 'sr', role: 'status', 'aria-live': 'polite' });
  const answers = h('div', { class: 'answers' }, h('div', { class: 'panel empty' }, h('p', {}, 'Choose versions, write a prompt, and compare what they answer.')));
  const form = build(models, base, first.length ? first : [base], state);
  const stop = h('button', { type: 'button', disabled: true, onclick: () => state.running?.abort() }, 'Stop');
  const go = h('button', { type: 'submit', class: 'primary', disabled: !may('invoke') }, 'Send');
  const submit = async event => {
    event.preventDefault();
    const wanted = [...state.boxes].filter(([, box]) => box.checked).map(([name]) => name);
    if (!wanted.length || wanted.length > MOST) { notice(`Choose one to ${MOST} versions.`); return; }
    state.running?.abort();
    const running = state.running = new AbortController();
    go.disabled = !(stop.disabled = false);
    status.textContent = `Asking ${wanted.length}.`;
    const columns = wanted.map(column);
    answers.replaceChildren(...columns.map(one => one.element));
    await Promise.all(columns.map(one => ask(one, form.request(), running.signal)));
    if (state.running !== running) return;
    go.disabled = !(stop.disabled = true);
    status.textContent = columns.map(one => `${one.name} answered: ${one.text.textContent}`).join('. ');
  };
  form.element.addEventListener('submit', submit);
  form.element.addEventListener('keydown', event => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) form.element.requestSubmit(); });
  form.element.append(h('div', { class: 'row' }, go, stop, h('span', { class: 'quiet small' }, 'Ctrl + Enter sends')));
  return { leave: () => state.running?.abort(), elements: [
    h('div', { class: 'head' }, h('h1', { tabindex: '-1' }, 'Playground')),
    h('div', { class: 'play' }, form.element, h('section', { 'aria-label': 'Answers' }, answers, status)),
  ] };
}

function build(models, base, chosen, state) {
  const prompt = h('textarea', { id: 'prompt', required: true, rows: '6', placeholder: 'My parcel has not arrived. What now?' });
  const mode = h('select', { id: 'mode' }, h('option', { value: 'chat' }, 'as a chat'), h('option', { value: 'text' }, 'as plain text'));
  const field = (id, label, value, min, max, step) => {
    const input = h('input', { id, type: 'number', value, min, max, step });
    return { input, element: h('label', { for: id }, label, input) };
  };
  const temperature = field('temperature', 'Temperature', '0', '0', '2', '0.1');
  const tokens = field('tokens', 'Tokens', '128', '1', '100000', '1');
  const seed = field('seed', 'Seed', '', '0', '9007199254740991', '1');
  const list = h('div', { class: 'choices', role: 'group', 'aria-label': 'Versions' }, models.map(one => {
    const box = h('input', { type: 'checkbox', checked: chosen.includes(one.id) });
    state.boxes.set(one.id, box);
    const note = one.id === base ? pill('base model') : one.root !== one.id ? h('span', { class: 'quiet small' }, one.root) : null;
    return h('label', {}, box, h('span', {}, one.id), note);
  }));
  const filter = h('input', { type: 'search', 'aria-label': 'Filter versions', placeholder: 'Filter', oninput: () => {
    for (const label of list.children) label.hidden = !label.textContent.includes(filter.value.trim().toLowerCase());
  } });
  const element = h('form', { class: 'panel' },
    h('label', { for: 'prompt' }, 'Prompt', prompt),
    h('label', { for: 'mode' }, 'Send it', mode),
    h('fieldset', {}, h('legend', {}, `Versions, up to ${MOST}`), models.length > 12 && filter, list),
    h('div', { class: 'fields' }, temperature.element, tokens.element, seed.element));
  const request = () => ({
    path: mode.value === 'chat' ? '/v1/chat/completions' : '/v1/completions',
    body: {
      ...(mode.value === 'chat' ? { messages: [{ role: 'user', content: prompt.value }] } : { prompt: prompt.value }),
      temperature: Number(temperature.input.value), max_tokens: Number(tokens.input.value), stream: true,
      stream_options: { include_usage: true }, ...(seed.input.value ? { seed: Number(seed.input.value) } : {}),
    },
  });
  return { element, request };
}

function column(name) {
  const text = h('pre', { tabindex: '0', 'aria-label': `Answer of ${name}` });
  const who = h('span');
  const footer = h('footer');
  const element = h('article', { class: 'panel answer going', 'aria-label': name }, h('header', { class: 'row' }, h('h2', {}, name), who), text, footer);
  return { name, text, who, footer, element };
}

async function ask(one, { path, body }, signal) {
  const began = performance.now();
  let firstAt = null;
  let usage = null;
  let reason = '';
  try {
    for await (const event of events(path, { ...body, model: one.name }, signal)) {
      if (event.model !== one.name && !one.who.firstChild) one.who.append(pill(event.model, 'accent'));
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      const more = choice?.delta?.content ?? choice?.text ?? '';
      if (more) { firstAt ??= performance.now(); one.text.append(more); }
      reason = choice?.finish_reason ?? reason;
    }
    facts(one, began, firstAt, usage, reason);
  } catch (error) {
    if (signal.aborted) one.footer.replaceChildren('stopped');
    else one.footer.replaceChildren(problem(error));
  } finally {
    one.element.classList.remove('going');
  }
}

function facts(one, began, firstAt, usage, reason) {
  const now = performance.now();
  const tokens = usage?.completion_tokens ?? 0;
  const pace = firstAt && tokens > 1 && now > firstAt ? `${((tokens - 1) / ((now - firstAt) / 1000)).toFixed(1)} tokens/s` : null;
  const parts = [firstAt && `first token ${span((firstAt - began) / 1000)}`, `${tokens} tokens`, pace, reason === 'length' ? 'cut at the limit' : null];
  one.footer.replaceChildren(...parts.filter(Boolean).map(text => h('span', {}, text)));
}
