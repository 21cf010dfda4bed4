// How good versions are: every evaluation that was kept, metric by metric.

import { h } from './dom.js';

/** A panel of bars; the line on a bar is the 95 % interval. */
export function scores(adapter, versions, records) {
  const groups = new Map();
  const add = (group, version, value, interval) => {
    if (typeof value !== 'number') return;
    groups.set(group, (groups.get(group) ?? new Map()).set(version, { value, interval }));
  };
  for (const one of versions) {
    const told = one.evaluation_json ? JSON.parse(one.evaluation_json) : {};
    const group = `${told.metric ?? 'score'} on held-out rows`;
    add(group, one.version, told.adapter ?? told.score, told.interval);
    add(group, 'base', told.base, null);
    for (const record of records.get(one.version) ?? []) addRecord(add, adapter.name, record);
  }
  const shown = [...groups].map(([title, bars]) => chart(title, bars, adapter.aliases.current));
  const none = h('p', { class: 'quiet' }, 'No evaluations yet: ', h('code', {}, `loraplex eval SUITE ${adapter.name}`));
  return h('section', { class: 'panel', 'aria-label': 'Scores' }, h('h2', {}, 'Scores'), ...(shown.length ? shown : [none]));
}

function addRecord(add, name, record) {
  for (const [who, result] of Object.entries(record.results ?? {})) {
    const version = who === 'base' ? 'base' : who.startsWith(`${name}@`) ? who.slice(name.length + 1) : null;
    if (version === null) continue;
    for (const [metric, entry] of Object.entries(result)) {
      if (metric !== 'classes') add(`${metric} in ${record.suite}`, version, entry?.value, entry?.interval);
    }
  }
}

function chart(title, bars, current) {
  const most = Math.max(1, ...[...bars.values()].map(one => Math.max(one.value, one.interval?.[1] ?? 0)));
  const rows = [...bars].sort(([a], [b]) => order(b) - order(a)).map(([version, { value, interval }]) => {
    const text = `${round(value)}${interval ? ` (${round(interval[0])} to ${round(interval[1])})` : ''}`;
    return h('li', { class: 'bar' },
      h('span', {}, version),
      h('span', { class: 'track', 'aria-hidden': 'true' },
        h('i', { class: version === current ? 'current' : '', 'width%': Math.max(0, 100 * value / most) }),
        interval && h('b', { 'left%': 100 * interval[0] / most, 'width%': 100 * (interval[1] - interval[0]) / most })),
      h('span', { class: 'num' }, text));
  });
  return h('div', {}, h('h3', {}, title), h('ul', { class: 'bars' }, rows));
}

const order = version => (version === 'base' ? 0 : Number(version.slice(1))); // newest first, the base last

const round = value => (Math.abs(value) < 10 ? value.toFixed(2) : value.toFixed(0));
