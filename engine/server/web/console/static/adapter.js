// One adapter: its versions, how good they are, which one answers, and who decided that.

import { call } from './api.js';
import { confirmed } from './confirm.js';
import { h, pill, table } from './dom.js';
import { bytes, count, moment, percent, seconds, short, span } from './format.js';
import { scores } from './scores.js';
import { may } from './session.js';

const EVERY_MS = 3000;

export async function adapterPage(name) {
  const found = await call('AdapterService.GetAdapter', { name });
  const { adapter, history } = found;
  const versions = [...found.versions].sort((a, b) => number(b.version) - number(a.version));
  const records = await Promise.all(versions.slice(0, 8).map(async one => [one.version, await evaluations(name, one.version)]));
  const trials = h('div', { class: 'stack' });
  const draw = async () => trials.replaceChildren(...(await standing(adapter)));
  await draw();
  const timer = adapter.canary || adapter.shadow ? setInterval(() => document.hidden || trials.contains(document.activeElement) || draw().catch(() => {}), EVERY_MS) : 0;
  return { leave: () => clearInterval(timer), elements: [
    heading(adapter, history),
    trials,
    h('section', { class: 'panel', 'aria-label': 'Versions' }, h('h2', {}, 'Versions'), versionTable(adapter, versions), !may('promote') && h('p', { class: 'quiet small' }, 'Promoting needs the role “promote”.')),
    h('div', { class: 'columns' }, scores(adapter, versions, new Map(records)), timeline(history)),
  ] };
}

const number = version => Number(version.slice(1));

async function evaluations(name, version) {
  const { records_json: records } = await call('AdapterService.ListEvaluations', { name, version }).catch(() => ({ records_json: [] }));
  return records.map(one => JSON.parse(one));
}

function heading(adapter, history) {
  const moved = history.filter(one => one.alias === 'current').length > 1;
  const back = h('button', { disabled: !may('promote') || !moved, onclick: () => confirmed({
    title: `Roll ${adapter.name} back?`, danger: true, action: 'Roll back', method: 'AdapterService.RollbackAlias',
    text: `${adapter.name} is ${adapter.aliases.current} now and will be what it was before. The version is loaded first; requests under way finish as they began.`,
    message: () => ({ name: adapter.name, alias: 'current', expected_version: adapter.aliases.current }), done: `${adapter.name} is rolled back.`,
  }) }, 'Roll back');
  const try_ = h('a', { class: 'button', href: `#/playground?with=${encodeURIComponent(wanted(adapter).join(','))}` }, 'Try in the playground');
  const chips = Object.entries(adapter.aliases).map(([alias, version]) => pill(`${alias} ${version}`, { current: 'accent', canary: 'warn' }[alias] ?? ''));
  return h('div', { class: 'head' },
    h('div', {}, h('p', { class: 'small' }, h('a', { href: '#/adapters' }, 'Adapters'), ' /'), h('div', { class: 'row' }, h('h1', { tabindex: '-1' }, adapter.name), chips)),
    h('div', { class: 'row' }, try_, back));
}

/** What to compare first: the current version with the canary or the newest one. */
function wanted(adapter) {
  const other = adapter.canary?.version ?? adapter.versions.at(-1);
  return [...new Set([adapter.aliases.current, other].filter(Boolean))].map(version => `${adapter.name}@${version}`);
}

function versionTable(adapter, versions) {
  const made = table('Versions', [['Version', true], ['Change', true], ['Score'], ['Rank'], ['Size'], ['Published', true], ['By', true], ['Notes', true]],
    ...versions.map(one => versionRow(adapter, one)));
  return made.element;
}

function versionRow(adapter, one) {
  const aliases = Object.entries(adapter.aliases).filter(([, version]) => version === one.version);
  const evaluation = one.evaluation_json ? JSON.parse(one.evaluation_json) : {};
  const score = evaluation.adapter ?? evaluation.score;
  const chips = aliases.map(([alias]) => pill(alias, { current: 'accent', canary: 'warn' }[alias] ?? ''));
  const warnings = one.warnings.map(text => h('div', { class: 'caution' }, text));
  const cell = (...content) => h('td', { class: 't' }, ...content);
  return h('tr', {},
    h('th', { scope: 'row' }, h('span', { class: 'row' }, one.version, chips), h('div', { class: 'quiet small mono', title: one.digest }, short(one.digest))),
    cell(h('span', { class: 'row' }, versionButtons(adapter, one))),
    h('td', {}, typeof score === 'number' ? String(score) : '–'), h('td', {}, String(one.rank)), h('td', {}, bytes(one.size_bytes)),
    cell(moment(one.created_at)), cell(one.publisher || '–'),
    h('td', { class: 'wrap' }, one.notes || (warnings.length ? '' : '–'), ...warnings));
}

function versionButtons(adapter, one) {
  if (!may('promote')) return [];
  const current = adapter.aliases.current;
  const ref = `${adapter.name}@${one.version}`;
  if (one.version === current) return [h('span', { class: 'quiet small' }, 'answers now')];
  return [
    h('button', { class: 'tight', 'aria-label': `Promote ${ref}`, onclick: () => confirmed({
      title: `Promote ${ref}?`, action: 'Promote', method: 'AdapterService.SetAlias',
      text: `${current ? `${adapter.name} is ${current} now. ` : ''}${one.version} is loaded and probed first; then new requests for ${adapter.name} go to it.`,
      message: () => ({ name: adapter.name, alias: 'current', version: one.version, ...(current ? { expected_version: current } : {}) }),
      done: `${ref} is promoted.`,
    }) }, 'Promote'),
    current && h('button', { class: 'tight', 'aria-label': `Canary ${ref}`, onclick: () => canary(adapter, one.version) }, 'Canary'),
  ];
}

function canary(adapter, version) {
  const shown = h('output', { for: 'weight' }, '10 %');
  const weight = h('input', { id: 'weight', type: 'range', min: '1', max: '99', value: String(Math.round(100 * (adapter.canary?.weight || 0.1))), oninput: () => { shown.textContent = `${weight.value} %`; } });
  shown.textContent = `${weight.value} %`;
  const time = h('select', { id: 'trial' }, [['', 'until somebody ends it'], ['600', '10 minutes'], ['3600', '1 hour'], ['86400', '1 day']].map(([value, text]) => h('option', { value }, text)));
  const then = h('select', { id: 'then' }, h('option', { value: 'AFTER_TRIAL_END' }, 'end it'), h('option', { value: 'AFTER_TRIAL_PROMOTE' }, 'promote it'));
  confirmed({
    title: `Let ${adapter.name}@${version} answer a share?`, action: 'Start canary', method: 'AdapterService.SetCanary',
    text: `The others stay with ${adapter.aliases.current}. With a time it is judged by its errors and its time to first token, and ended at once when it does worse.`,
    fields: [
      h('label', { for: 'weight' }, h('span', {}, 'Share of requests: ', shown), weight),
      h('div', { class: 'fields' }, h('label', { for: 'trial' }, 'For how long', time), h('label', { for: 'then' }, 'And if it did well', then)),
    ],
    message: () => ({ name: adapter.name, version, weight: Number(weight.value) / 100, ...(time.value ? { trial: { duration: `${time.value}s`, then: then.value } } : {}) }),
    done: `${adapter.name}@${version} answers ${weight.value} % from now on.`,
  });
}

async function standing(adapter) {
  const panels = [];
  if (adapter.canary) panels.push(canaryPanel(adapter, await call('AdapterService.GetCanaryReport', { name: adapter.name })));
  if (adapter.shadow) panels.push(shadowPanel(adapter, await call('AdapterService.GetShadowReport', { name: adapter.name })));
  return panels;
}

function canaryPanel(adapter, report) {
  const { version, weight, ends_at: ends } = report.canary ?? adapter.canary;
  const side = (label, one) => [label, count(one?.requests), count(one?.failed), span(seconds(one?.time_to_first_token?.p50)), span(seconds(one?.time_to_first_token?.p95))];
  const rows = [side(`${adapter.aliases.current} (current)`, report.current_side), side(`${version} (canary)`, report.canary_side)];
  const buttons = may('promote') ? h('div', { class: 'row' },
    h('button', { class: 'tight', onclick: () => canary(adapter, version) }, 'Change share'),
    h('button', { class: 'tight danger', onclick: () => confirmed({
      title: `End the canary of ${adapter.name}?`, action: 'End canary', danger: true, method: 'AdapterService.EndCanary',
      text: `All requests for ${adapter.name} go to ${adapter.aliases.current} again.`, message: () => ({ name: adapter.name }), done: 'The canary is ended.',
    }) }, 'End canary')) : null;
  return h('section', { class: 'panel', 'aria-label': 'Canary' },
    h('div', { class: 'head' }, h('h2', {}, `Canary: ${version} answers ${percent(weight)}`), buttons),
    h('div', { class: 'split', 'aria-hidden': 'true' }, h('span', { 'width%': 100 * (1 - weight) }, adapter.aliases.current ?? ''), h('span', { class: 'b', 'width%': 100 * weight }, weight > 0.12 ? version : '')),
    numbers('How both sides fare', [['Side', true], ['Requests'], ['Failed'], ['TTFT p50'], ['TTFT p95']], rows),
    h('p', {}, sentence(report.verdict), ends ? h('span', { class: 'quiet' }, ` Ends ${moment(ends)}.`) : ''));
}

function shadowPanel(adapter, report) {
  const { version, sample } = report.shadow ?? adapter.shadow;
  const share = Number(report.compared) ? Number(report.equal) / Number(report.compared) : null;
  const end = may('promote') && h('button', { class: 'tight danger', onclick: () => confirmed({
    title: `End the shadow of ${adapter.name}?`, action: 'End shadow', danger: true, method: 'AdapterService.EndShadow',
    text: `${version} gets no copies any more.`, message: () => ({ name: adapter.name }), done: 'The shadow is ended.',
  }) }, 'End shadow');
  return h('section', { class: 'panel', 'aria-label': 'Shadow' },
    h('div', { class: 'head' }, h('h2', {}, `Shadow: ${version} is asked copies of ${percent(sample)}`), end),
    h('dl', {}, h('dt', {}, 'Compared'), h('dd', {}, count(report.compared)), h('dt', {}, 'Equal answers'), h('dd', {}, share === null ? '–' : percent(share)),
      h('dt', {}, 'TTFT p50'), h('dd', {}, `${span(seconds(report.shadow_times?.time_to_first_token?.p50))} (current ${span(seconds(report.current_times?.time_to_first_token?.p50))})`)));
}

const sentence = text => (text ? `${text[0].toUpperCase()}${text.slice(1)}${text.endsWith('.') ? '' : '.'}` : '');

function numbers(label, headings, rows) {
  return table(label, headings, ...rows.map(([first, ...rest]) => h('tr', {}, h('th', { scope: 'row' }, first), rest.map(text => h('td', {}, text))))).element;
}

function timeline(history) {
  const items = [...history].reverse().slice(0, 50).map((one, at) => h('li', { class: at === 0 ? 'now' : null },
    h('div', {}, h('b', {}, one.version ? `${one.alias} is ${one.version}` : `${one.alias} is removed`), share(one)),
    one.reason && h('div', {}, one.reason),
    h('div', { class: 'quiet small' }, moment(one.created_at), one.actor ? ` by ${one.actor}` : '')));
  return h('section', { class: 'panel', 'aria-label': 'History' }, h('h2', {}, 'History'), items.length ? h('ol', { class: 'timeline' }, items) : h('p', { class: 'quiet' }, 'No alias has moved yet.'));
}

function share(one) {
  if (one.canary_weight !== undefined) return ` for ${percent(one.canary_weight)} of requests`;
  return one.shadow_sample !== undefined ? ` for copies of ${percent(one.shadow_sample)}` : '';
}
