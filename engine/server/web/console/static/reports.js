// Load-test reports.

import { get, post } from './api.js';
import { h, notice, pill, table } from './dom.js';
import { moment } from './format.js';

const KINDS = { MEETS: 'good', 'DOES NOT MEET': 'bad', INCONCLUSIVE: 'warn', better: 'good', worse: 'bad', same: 'good' };

export async function reportsPage() {
  const { configured, reports } = await get('/console/reports');
  const place = h('div', { class: 'stack' });
  const rows = reports.map(one => h('tr', {},
    h('th', { scope: 'row' }, h('button', { class: 'plain', onclick: () => open(one.name, place) }, one.name)),
    h('td', { class: 't' }, one.verdict ? pill(one.verdict, KINDS[one.verdict] ?? '') : '–'),
    h('td', { class: 't' }, one.kind ?? '–'), h('td', { class: 't' }, moment(one.at * 1000))));
  const list = table('Reports', [['Report', true], ['Verdict', true], ['Kind', true], ['Written', true]], ...rows);
  const none = h('div', { class: 'panel empty' }, h('h2', {}, 'No reports'),
    h('p', {}, configured ? 'Nothing is in the folder yet: ' : 'This server shows no reports; start it with ', h('code', {}, configured ? 'loraplex loadtest run smoke' : '--reports .loraplex/loadtest')));
  return { elements: [
    h('div', { class: 'head' }, h('h1', { tabindex: '-1' }, 'Load-test reports')),
    reports.length ? h('section', { class: 'panel', 'aria-label': 'Reports' }, list.element) : none, place,
  ] };
}

async function open(name, place) {
  try {
    const { url } = await post('/console/reports/open', { name });
    const frame = h('iframe', { src: url, title: `Report ${name}`, sandbox: '' });
    const tab = h('a', { href: url, target: '_blank', rel: 'noopener noreferrer' }, 'Open in a tab of its own');
    place.replaceChildren(h('section', { class: 'panel', 'aria-label': `Report ${name}` }, h('div', { class: 'head' }, h('h2', {}, name), tab), frame));
    frame.focus();
    place.scrollIntoView({ block: 'start' });
  } catch (error) {
    notice(error.message);
  }
}
