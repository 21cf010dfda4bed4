// Numbers and times for people.

const whole = new Intl.NumberFormat('en');

export const count = value => whole.format(Number(value ?? 0));
export const percent = value => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
export const rate = value => (value >= 100 ? count(Math.round(value)) : value.toFixed(value >= 10 ? 0 : 1));

/** A duration of the API ("1.25s") in seconds; null if there is none. */
export const seconds = text => (text ? parseFloat(text) : null);

/** A duration for people. */
export function span(value) {
  if (value === null || Number.isNaN(value)) return '–';
  if (value < 0.0095) return `${(1000 * value).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min`;
  if (value < 86400) return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
  return `${Math.floor(value / 86400)} d ${Math.floor((value % 86400) / 3600)} h`;
}

export const ago = value => (value < 5 ? 'just now' : `${span(value)} ago`);

export function bytes(value) {
  const size = Number(value ?? 0);
  const units = ['B', 'KiB', 'MiB', 'GiB'];
  const at = Math.min(3, size > 0 ? Math.floor(Math.log2(size) / 10) : 0);
  return `${(size / 1024 ** at).toFixed(at && size / 1024 ** at < 10 ? 1 : 0)} ${units[at]}`;
}

export function moment(text) {
  const date = new Date(text);
  return Number.isNaN(date.getTime()) ? '–' : date.toLocaleString('en-GB', { dateStyle: 'medium', timeStyle: 'short' });
}

export const short = digest => (digest ? digest.replace('sha256:', '').slice(0, 12) : '');
