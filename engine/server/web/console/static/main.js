// Which page is shown.

import { h, problem } from './dom.js';
import { adapterPage } from './adapter.js';
import { adaptersPage } from './adapters.js';
import { overviewPage } from './overview.js';
import { playgroundPage } from './playground.js';
import { reportsPage } from './reports.js';
import { begin, signIn } from './session.js';

const main = document.getElementById('main');
let leave = () => {};

const PAGES = [
  [/^#?\/?$/, 'Overview', overviewPage],
  [/^#\/adapters$/, 'Adapters', adaptersPage],
  [/^#\/adapters\/([a-z0-9._-]+)$/, 'Adapters', adapterPage],
  [/^#\/playground(?:\?with=(.*))?$/, 'Playground', playgroundPage],
  [/^#\/reports$/, 'Reports', reportsPage],
];

/** Show the page of the address. A page returns its elements, and may return what to do when it is left. */
async function show({ focus = true } = {}) {
  leave();
  leave = () => {};
  const [pattern, title, page] = PAGES.find(([one]) => one.test(location.hash)) ?? PAGES[0];
  for (const link of document.querySelectorAll('#nav a')) {
    if (link.textContent === title) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  document.title = `${title} · Loraplex`;
  const shown = location.hash;
  try {
    const made = await page(...(pattern.exec(location.hash) ?? []).slice(1));
    if (location.hash !== shown) { made.leave?.(); return; }
    leave = made.leave ?? leave;
    main.replaceChildren(...made.elements);
  } catch (error) {
    if (error.status === 401) return;
    main.replaceChildren(h('h1', { tabindex: '-1' }, title), problem(error), h('div', {}, h('button', { onclick: () => show() }, 'Try again')));
  }
  if (focus) main.querySelector('h1')?.focus({ preventScroll: true });
  main.dataset.ready = 'true';
}

async function start() {
  try {
    await begin();
    await show({ focus: false });
  } catch (error) {
    if (error.status !== 401) main.replaceChildren(problem(error), h('div', {}, h('button', { onclick: start }, 'Try again')));
  }
}

function askForKey() {
  leave();
  leave = () => {};
  if (main.querySelector('#key')) return;
  main.replaceChildren(signIn(() => show()));
  main.querySelector('#key').focus();
  main.dataset.ready = 'true';
}

document.getElementById('skip').addEventListener('click', event => { event.preventDefault(); main.focus(); });
addEventListener('hashchange', () => show());
addEventListener('signed-out', askForKey);
addEventListener('reload-page', () => show({ focus: false }));
start();
