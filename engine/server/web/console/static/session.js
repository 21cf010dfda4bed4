// Who is signed in, and what they may do.

import { get, key } from './api.js';
import { h } from './dom.js';

export const session = { identified: false, tenant: '', roles: [] };

export const may = role => session.roles.includes(role);

/** Ask the server who we are. Throws Refused with status 401 if it wants a key that we have not. */
export async function begin() {
  Object.assign(session, await get('/console/me'));
  const place = document.getElementById('whoami');
  if (!session.identified && !key.get()) { place.replaceChildren(); return; }
  const leave = h('button', { class: 'tight', onclick: () => { key.set(''); location.reload(); } }, 'Sign out');
  place.replaceChildren(h('span', {}, session.tenant), leave);
}

/** The page that asks for a key. */
export function signIn(onDone) {
  const field = h('input', { type: 'password', autocomplete: 'off', required: true, id: 'key', spellcheck: 'false' });
  const wrong = h('p', { class: 'alert', role: 'alert', hidden: true });
  const submit = async event => {
    event.preventDefault();
    key.set(field.value.trim());
    try {
      await begin();
      onDone();
    } catch (error) {
      key.set('');
      wrong.textContent = error.message;
      wrong.hidden = false;
      field.select();
    }
  };
  return h('form', { class: 'panel', onsubmit: submit },
    h('h1', { tabindex: '-1' }, 'Sign in'),
    h('p', { class: 'quiet' }, 'This server asks who you are. The key stays in this tab and is forgotten when it is closed.'),
    h('label', { for: 'key' }, 'API key or token', field), wrong,
    h('div', { class: 'row' }, h('button', { class: 'primary', type: 'submit' }, 'Sign in')));
}
