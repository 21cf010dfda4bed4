// All adapters.

import { call } from './api.js';
import { h, pill, table } from './dom.js';
import { percent } from './format.js';

export async function adaptersPage() {
  const [{ adapters }, engine] = await Promise.all([call('AdapterService.ListAdapters'), call('EngineService.GetEngine').catch(() => ({ resident: [] }))]);
  const resident = new Map();
  for (const one of engine.resident) resident.set(one.name, [...(resident.get(one.name) ?? []), one.version]);
  const rows = adapters.map(one => ({ name: one.name, element: line(one, resident.get(one.name) ?? []) }));
  const made = table('Adapters', [['Adapter', true], ['Current', true], ['Canary', true], ['Shadow', true], ['Other aliases', true], ['Versions'], ['In the engine', true]], ...rows.map(one => one.element));
  const status = h('p', { class: 'quiet small', role: 'status' }, `${adapters.length} adapters`);
  const filter = h('input', { type: 'search', placeholder: 'Filter by name', id: 'filter', oninput: () => {
    const wanted = filter.value.trim().toLowerCase();
    let shown = 0;
    for (const one of rows) shown += !(one.element.hidden = !one.name.includes(wanted));
    status.textContent = wanted ? `${shown} of ${adapters.length} adapters` : `${adapters.length} adapters`;
  } });
  const none = h('div', { class: 'panel empty' }, h('h2', {}, 'No adapters yet'), h('p', {}, 'Publish one: ', h('code', {}, 'loraplex adapters publish FOLDER NAME')));
  return { elements: [
    h('div', { class: 'head' }, h('h1', { tabindex: '-1' }, 'Adapters'), h('label', { for: 'filter' }, h('span', { class: 'sr' }, 'Filter by name'), filter)),
    adapters.length ? h('section', { class: 'panel', 'aria-label': 'Adapters' }, made.element, status) : none,
  ] };
}

function line(one, resident) {
  const others = Object.entries(one.aliases).filter(([alias]) => !['current', 'canary', 'shadow'].includes(alias));
  const cell = (...content) => h('td', { class: 't' }, ...content);
  return h('tr', {},
    h('th', { scope: 'row' }, h('a', { href: `#/adapters/${one.name}` }, one.name)),
    cell(one.aliases.current ? pill(one.aliases.current, 'accent') : 'none'),
    cell(one.canary ? pill(`${one.canary.version} · ${percent(one.canary.weight)}`, 'warn') : '–'),
    cell(one.shadow ? pill(`${one.shadow.version} · ${percent(one.shadow.sample)}`) : '–'),
    cell(others.map(([alias, version]) => `${alias} ${version}`).join(', ') || '–'),
    h('td', {}, String(one.versions.length)),
    cell(resident.join(', ') || '–'));
}
