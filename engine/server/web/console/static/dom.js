// Building the page: text is only ever text, so names and notes of adapters cannot become markup.

const SVG = 'http://www.w3.org/2000/svg';

/** An element. `props`: on* listeners, `class`, `value`-like properties, anything else an attribute; null leaves it out. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'width%') element.style.width = `${value}%`;
    else if (name === 'left%') element.style.left = `${value}%`;
    else if (name in element && typeof value !== 'string') element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

/** An SVG element. */
export function svg(tag, props = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Make `parent` show `items`, keeping the elements of those that stay: focus and selection survive. */
export function keyed(parent, items, key, create, update) {
  const known = parent.known ?? (parent.known = new Map());
  const wanted = new Set(items.map(key));
  for (const [name, element] of known) if (!wanted.has(name)) { element.remove(); known.delete(name); }
  items.forEach((item, at) => {
    let element = known.get(key(item));
    if (!element) known.set(key(item), element = create(item));
    update(element, item);
    if (parent.children[at] !== element) parent.insertBefore(element, parent.children[at] ?? null);
  });
}

/** Change an element's text if it differs. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A table that can be scrolled sideways by keyboard, too. `headings`: [text, is it text rather than a number]. */
export function table(label, headings, ...rows) {
  const body = h('tbody', {}, rows);
  const head = h('tr', {}, headings.map(([text, left]) => h('th', { scope: 'col', class: left ? 't' : null }, text)));
  const made = h('table', {}, h('caption', { class: 'sr' }, label), h('thead', {}, head), body);
  return { element: h('div', { class: 'scroll', role: 'region', 'aria-label': label, tabindex: '0' }, made), body };
}

/** A row of `count` cells, of which the first heads it; `left` says which others are text. */
export function row(first, count, left = []) {
  return h('tr', {}, h('th', { scope: 'row' }, first), Array.from({ length: count - 1 }, (_, at) => h('td', { class: left.includes(at + 1) ? 't' : null })));
}

export const pill = (text, kind = '') => h('span', { class: `pill ${kind}` }, text);

/** A short message that screen readers hear, too. */
export function notice(text) {
  const place = document.getElementById('notice');
  const line = h('p', {}, text);
  place.replaceChildren(line);
  setTimeout(() => line.remove(), 6000);
}

/** What went wrong, and what to do about it. */
export function problem(error) {
  return h('div', { class: 'alert', role: 'alert' }, error.message, error.fix ? ` ${error.fix}` : '');
}
