// Overview: what the engine is doing, for whom, and how fast.

import { call } from './api.js';
import { h, keyed, pill, row, say, svg, table } from './dom.js';
import { ago, count, percent, rate, seconds, span } from './format.js';

const EVERY_MS = 1500;
const KEPT = 60; // points of the throughput's line
const KINDS = { quarantined: 'bad', restarted: 'bad', evicted: 'warn', loaded: 'good', alias: 'accent', published: 'accent' };

export async function overviewPage() {
  const page = build();
  const state = { before: null, line: [] };
  await refresh(page, state);
  let stopped = false;
  const again = async () => {
    if (stopped) return;
    if (!document.hidden) await refresh(page, state).then(() => page.lost.hidden = true, error => tell(page, error));
    if (!stopped) timer = setTimeout(again, EVERY_MS);
  };
  let timer = setTimeout(again, EVERY_MS);
  return { elements: page.elements, leave: () => { stopped = true; clearTimeout(timer); } };
}

function tell(page, error) {
  page.lost.replaceChildren(error instanceof TypeError ? 'The server cannot be reached; trying again.' : error.message);
  page.lost.hidden = false;
}

async function refresh(page, state) {
  const [engine, activity] = await Promise.all([call('EngineService.GetEngine'), call('EngineService.GetActivity').catch(missing)]);
  const now = { engine, activity, at: seconds(activity?.uptime) ?? performance.now() / 1000 };
  draw(page, now, state);
  state.before = now;
}

/** A router adds engines up, but does not watch each request. */
function missing(error) {
  if (error.status === 501 || error.status === 403) return null;
  throw error;
}

function build() {
  const tile = (label, extra) => {
    const value = h('div', { class: 'value' });
    const note = h('div', { class: 'label' });
    return { element: h('div', { class: 'panel tile' }, h('div', { class: 'label' }, label), value, extra, note), value, note };
  };
  const bar = () => h('div', { class: 'meter', 'aria-hidden': 'true' }, h('i'));
  const bars = [bar(), bar(), bar()];
  const line = svg('svg', { class: 'spark', viewBox: '0 0 100 30', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, svg('path'), svg('polyline'));
  const tiles = {
    throughput: tile('Tokens per second', line), running: tile('Running', bars[0]), waiting: tile('Waiting', bars[1]),
    ttft: tile('TTFT p95'), cache: tile('KV cache in use', bars[2]),
  };
  tiles.throughput.element.classList.add('wide');
  const traffic = table('Traffic by version', [['Version', true], ['Running'], ['Waiting'], ['Req/s'], ['Tokens/s'], ['Queue p50'], ['TTFT p50'], ['TTFT p95'], ['Failed']]);
  const tenants = table('Tenants', [['Tenant', true], ['Weight'], ['Running'], ['Waiting'], ['Requests'], ['Failed']]);
  const page = {
    title: h('h1', { tabindex: '-1' }), state: pill('', 'dot'), about: h('p', { class: 'quiet small' }),
    lost: h('p', { class: 'alert warn', role: 'status', hidden: true }),
    tiles, bars, line, traffic, tenants,
    quietTraffic: h('p', { class: 'quiet' }, 'No requests yet. The playground sends some.'),
    slots: h('ul', { class: 'slots' }), slotsTitle: h('h2', { id: 'slots' }, 'Slots'),
    events: h('ul', { class: 'events' }), quietEvents: h('p', { class: 'quiet' }, 'Nothing has happened since the start.'),
  };
  page.tenantsPanel = h('section', { class: 'panel', 'aria-label': 'Tenants' }, h('h2', {}, 'Tenants'), tenants.element);
  page.elements = [
    h('div', { class: 'head' }, h('div', {}, h('div', { class: 'row' }, page.title, page.state), page.about)),
    page.lost,
    h('section', { class: 'tiles', 'aria-label': 'Load' }, Object.values(tiles).map(one => one.element)),
    h('div', { class: 'columns' },
      h('div', { class: 'stack' },
        h('section', { class: 'panel', 'aria-label': 'Traffic by version' }, h('h2', {}, 'Traffic by version'), page.quietTraffic, traffic.element),
        page.tenantsPanel),
      h('div', { class: 'stack' },
        h('section', { class: 'panel', 'aria-labelledby': 'slots' }, page.slotsTitle, page.slots),
        h('section', { class: 'panel', 'aria-label': 'Events' }, h('h2', {}, 'Events'), page.quietEvents, page.events))),
  ];
  return page;
}

function draw(page, now, state) {
  const { engine, activity } = now;
  const { load, limits } = engine;
  say(page.title, engine.base.name);
  const word = load.draining ? 'draining' : load.restarting || activity?.ready === false ? 'no engine' : 'ready';
  say(page.state, word);
  page.state.className = `pill dot ${{ ready: 'good', draining: 'warn' }[word] ?? 'bad'}`;
  const up = activity ? `, up ${span(seconds(activity.uptime))}` : '';
  say(page.about, `${engine.engine}, Loraplex ${engine.server_version}${up}`);
  drawTiles(page, now, state);
  drawTraffic(page, activity, state);
  drawSlots(page, engine);
  drawEvents(page, activity);
}

function drawTiles({ tiles, bars, line }, { engine: { load, limits }, activity, at }, { before, line: points }) {
  const generated = one => Number((one.activity ?? one.engine.load).generated_tokens);
  const perSecond = before && at > before.at ? Math.max(0, generated({ engine: { load }, activity }) - generated(before)) / (at - before.at) : 0;
  if (before) points.push(perSecond);
  if (points.length > KEPT) points.shift();
  tiles.throughput.value.textContent = rate(perSecond);
  drawLine(line, points);
  part(tiles.running, bars[0], load.running, limits.max_running, 'requests on the engine');
  part(tiles.waiting, bars[1], load.waiting, limits.max_waiting, `${count(load.waiting_tokens)} tokens`);
  part(tiles.cache, bars[2], load.kv_cache_usage, null, 'of keys and values');
  const slowest = (activity?.adapters ?? []).filter(one => one.ttft_p95).sort((a, b) => seconds(b.ttft_p95) - seconds(a.ttft_p95))[0];
  tiles.ttft.value.textContent = slowest ? span(seconds(slowest.ttft_p95)) : '–';
  say(tiles.ttft.note, slowest ? `slowest: ${ref(slowest)}` : 'no answers yet');
}

function part(tile, meter, value, most, note) {
  const share = most === null ? value : most ? value / most : 0;
  tile.value.replaceChildren(most === null ? percent(value) : count(value), most === null ? '' : h('small', {}, ` of ${count(most)}`));
  say(tile.note, note);
  meter.firstChild.style.width = `${Math.min(100, 100 * share)}%`;
  meter.firstChild.classList.toggle('high', share > 0.85);
}

function drawLine(line, points) {
  const top = Math.max(...points, 1);
  const at = points.map((value, i) => `${(100 * i / Math.max(1, points.length - 1)).toFixed(2)},${(28 - 26 * value / top).toFixed(2)}`);
  const [path, polyline] = line.children;
  polyline.setAttribute('points', at.join(' '));
  path.setAttribute('d', at.length ? `M0,30 L${at.join(' L')} L${at.at(-1).split(',')[0]},30 Z` : '');
}

const ref = one => (one.name ? `${one.name}@${one.version}` : 'base model');

function drawTraffic(page, activity, { before }) {
  const adapters = activity?.adapters ?? [];
  page.quietTraffic.hidden = adapters.length > 0;
  page.traffic.element.hidden = !adapters.length;
  const earlier = new Map((before?.activity?.adapters ?? []).map(one => [ref(one), one]));
  const passed = before ? seconds(activity?.uptime) - seconds(before.activity?.uptime) : 0;
  const per = (one, field) => (passed > 0 ? rate((Number(one[field]) - Number(earlier.get(ref(one))?.[field] ?? 0)) / passed) : '–');
  const name = one => (one.name ? h('a', { href: `#/adapters/${one.name}` }, ref(one)) : h('span', {}, 'base model'));
  const sorted = [...adapters].sort((a, b) => Number(b.requests) - Number(a.requests) || ref(a).localeCompare(ref(b)));
  keyed(page.traffic.body, sorted.slice(0, 30), ref, one => row(name(one), 9), (element, one) => fill(element, [
    count(one.running), count(one.waiting), per(one, 'requests'), per(one, 'generated_tokens'),
    span(seconds(one.queue_p50)), span(seconds(one.ttft_p50)), span(seconds(one.ttft_p95)), count(one.failed),
  ]));
  const tenants = activity?.tenants ?? [];
  page.tenantsPanel.hidden = !tenants.length;
  keyed(page.tenants.body, tenants.slice(0, 30), one => one.name, one => row(one.name, 6), (element, one) => fill(element, [
    String(one.weight), count(one.running), count(one.waiting), count(one.requests), count(one.failed),
  ]));
}

const fill = (element, texts) => texts.forEach((text, at) => say(element.children[at + 1], text));

function drawSlots(page, { resident, limits }) {
  const total = limits.max_resident;
  say(page.slotsTitle, `Slots: ${resident.length} of ${total}`);
  const shown = resident.slice(0, 60).map(one => ({ ...one, key: `${one.name}@${one.version}` }));
  const free = Math.min(Math.max(0, total - resident.length), Math.max(0, 12 - shown.length));
  const items = [...shown, ...Array.from({ length: free }, (_, at) => ({ key: `free ${at}` }))];
  keyed(page.slots, items, one => one.key, () => h('li', {}, h('b'), h('span')), (element, one) => {
    element.className = `slot ${one.name ? 'full' : ''} ${one.in_use ? 'busy' : ''}`;
    say(element.firstChild, one.name ? one.key : '');
    const use = one.in_use ? `${count(one.in_use)} in use` : `idle ${span(seconds(one.idle))}`;
    say(element.lastChild, one.name ? `${use}${one.pinned ? ', pinned' : ''}` : 'free');
  });
}

function drawEvents(page, activity) {
  const events = [...(activity?.events ?? [])].reverse().slice(0, 12);
  page.quietEvents.hidden = events.length > 0;
  page.events.replaceChildren(...events.map(one => h('li', {},
    h('span', {}, pill(one.kind, KINDS[one.kind] ?? '')), h('span', { class: 'text' }, one.text), h('time', {}, ago(seconds(one.ago))))));
}

