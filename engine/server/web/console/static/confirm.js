// Changes: asked for once more, with a reason for the history, and followed until they are done.

import { follow } from './api.js';
import { h, notice, problem } from './dom.js';

/**
 * Ask, then make the call `method` with `message()`. `fields` are more inputs of the form. Resolves when it is done or given up.
 */
export function confirmed({ title, text, action, danger = false, method, message, done, fields = [] }) {
  const reason = h('input', { id: 'reason', maxlength: '1024', placeholder: 'better on the held-out set', autocomplete: 'off' });
  const bar = h('progress', { max: 1, value: 0, 'aria-label': 'Progress' });
  const stage = h('p', { class: 'small quiet', role: 'status' });
  const working = h('div', { hidden: true }, bar, stage);
  const wrong = h('div');
  const go = h('button', { class: danger ? 'danger' : 'primary', type: 'submit' }, action);
  const cancel = h('button', { type: 'button', onclick: () => dialog.close() }, 'Cancel');
  const submit = async event => {
    event.preventDefault();
    go.disabled = true;
    wrong.replaceChildren();
    working.hidden = false;
    stage.textContent = 'Asking the server';
    try {
      await follow(method, { ...message(), actor: 'console', reason: reason.value.trim() }, step => {
        bar.value = step.fraction;
        stage.textContent = `${step.stage}: ${step.detail}`;
      });
      notice(done);
      dialog.close();
      dispatchEvent(new Event('reload-page'));
    } catch (error) {
      wrong.replaceChildren(problem(error));
      working.hidden = true;
      go.disabled = false;
    }
  };
  const dialog = h('dialog', { 'aria-labelledby': 'confirm-title', onclose: () => dialog.remove() },
    h('form', { onsubmit: submit },
      h('h2', { id: 'confirm-title' }, title), h('p', {}, text), ...fields,
      h('label', { for: 'reason' }, h('span', {}, 'Reason ', h('span', { class: 'hint' }, '(for the history)')), reason),
      working, wrong, h('div', { class: 'row' }, cancel, go)));
  document.body.append(dialog);
  dialog.showModal();
}
