// Moves the threshold, and filters and sorts the cases. Without it the page shows the threshold from validation.
const data = JSON.parse(document.getElementById('report-data').textContent);
const slider = element('slider'), field = element('threshold'), histogram = element('histogram');
const OUTCOMES = {tp: 'true positive', fp: 'false positive', tn: 'true negative', fn: 'false negative'};
const STEPS = Number(slider.max), BINS = 40;
const cards = [...document.querySelectorAll('.case')].map(card => ({card, place: Number(card.dataset.place)}));
const rows = [...document.querySelectorAll('#confusion tbody tr')].map(row => ({
  cells: row.querySelectorAll('td'), group: row.dataset.group, places: members(row.dataset.group)}));
let name, values, validation, threshold, low, high;

function members(group) {
  return data.label.flatMap((label, place) => (group === 'normal' ? !label
    : label && (group === 'all' || data.classes[data.class[place]] === group)) ? [place] : []);
}

// ------------------------------------------------------------------------------------------------ numbers

const number = value => !Number.isFinite(value) ? 'not finite'
  : Math.abs(value) < 1e5 ? String(Number(value.toPrecision(5))) : value.toFixed(0);
// As the page was written: ties, which in binary are quarters and halves, go to the even digit.
const tenths = value => (value % 1 === 0.25 ? value - 0.05 : value).toFixed(1);
const whole = value => String(value % 1 === 0.5 ? 2 * Math.round(value / 2) : Math.round(value));
const share = (count, total) => total ? `${tenths(100 * count / total)} %` : '-';
const flagged = place => values[place] === Infinity || values[place] > threshold;      // not finite: always
const outcome = place => data.label[place] ? (flagged(place) ? 'tp' : 'fn') : (flagged(place) ? 'fp' : 'tn');

function percentile(value) {
  const below = validation.filter(v => v < value).length, upTo = validation.filter(v => v <= value).length;
  return 50 * (below + upTo) / validation.length;
}

function wilson(count, total) {                       // 95 % interval of a proportion, per cent
  if (!total) return ['0.0', '100.0'];
  const z = 1.959963984540054, part = count / total, scale = 1 + z * z / total;
  const center = (part + z * z / (2 * total)) / scale;
  const half = z / scale * Math.sqrt(part * (1 - part) / total + z * z / (4 * total * total));
  return [Math.max(0, center - half), Math.min(1, center + half)].map(end => tenths(100 * end));
}

// ---------------------------------------------------------------------------------------------- threshold

function chooseScore(chosen) {
  name = chosen;
  const score = data.scores[name];
  [values, validation] = [score.test, score.validation].map(list => list.map(v => v ?? Infinity));
  const finite = [...values, ...validation].filter(Number.isFinite).sort((a, b) => a - b);
  const cut = Math.floor(0.005 * (finite.length - 1));            // outliers would leave no room for the others
  low = finite[cut] ?? 0;
  high = finite[finite.length - 1 - cut] ?? 1;
  const margin = (high - low) / 80 || 0.5;
  low -= margin;
  high += margin;
  // the arrow keys of the field move by about a step of the slider
  field.step = 10 ** Math.floor(Math.log10((high - low) / STEPS));
  element('low').textContent = number(low);
  element('high').textContent = number(high);
  drawHistogram();
  setThreshold(score.threshold ?? Infinity);
}

function setThreshold(value) {
  threshold = value;
  if (document.activeElement !== field) field.value = Number.isFinite(value) ? Number(value.toPrecision(7)) : '';
  if (document.activeElement !== slider) slider.value = Math.round(STEPS * position(value));
  histogram.querySelector('.marker').setAttribute('transform', `translate(${400 * position(value)} 0)`);
  showCalls();
  showCases();
}

const position = value => Math.min(1, Math.max(0, (value - low) / (high - low)));

function drawHistogram() {
  for (const [kind, label] of [['normal', 0], ['anomalous', 1]]) {
    const these = values.filter((_, place) => data.label[place] === label), counts = Array(BINS).fill(0);
    for (const value of these) counts[Math.min(BINS - 1, Math.floor(BINS * position(value)))] += 1;
    const most = Math.max(1, ...counts);
    const steps = counts.map((count, i) => `V${100 - 96 * count / most}H${400 * (i + 1) / BINS}`);
    histogram.querySelector(`path.${kind}`).setAttribute('d', `M0 100${steps.join('')}V100Z`);
  }
  const from = data.scores[name].threshold ?? Infinity;
  histogram.querySelector('.from-validation').setAttribute('transform', `translate(${400 * position(from)} 0)`);
}

function showCalls() {
  const counts = Object.fromEntries(rows.map(({group, places}) => [group, places.filter(flagged).length]));
  for (const {cells, group, places} of rows) {
    const count = counts[group], both = count + counts.normal, [from, to] = wilson(count, places.length);
    const texts = [count, places.length - count, share(count, places.length), `${from} to ${to} %`,
                   group === 'normal' ? '' : `${share(count, both)} (${count} of ${both})`];
    texts.forEach((text, i) => { cells[i].textContent = text; });
  }
  const all = values.filter((_, place) => flagged(place)).length;
  const shown = Number.isFinite(threshold) ? number(threshold) : 'infinite';
  const moved = threshold === (data.scores[name].threshold ?? Infinity) ? 'from validation' : 'tried by hand';
  element('sentence').textContent =
    `${name}, threshold ${shown} (${moved}): ${all} of ${values.length} test images flagged as anomalous`;
  slider.setAttribute('aria-valuetext', `${shown}, ${all} of ${values.length} flagged`);
}

// -------------------------------------------------------------------------------------------------- cases

const ORDERS = {
  falling: (a, b) => values[b.place] - values[a.place] || a.place - b.place,
  rising: (a, b) => values[a.place] - values[b.place] || a.place - b.place,
  near: (a, b) => distance(a) - distance(b) || a.place - b.place,
};
const distance = ({place}) => Math.abs(values[place] - threshold);

function showCases() {
  if (!cards.length) return;
  for (const {card, place} of cards) {
    card.dataset.outcome = outcome(place);
    card.querySelector('.outcome').textContent = OUTCOMES[card.dataset.outcome];
    card.querySelector('.value').textContent =
      `${name} ${number(values[place])}, percentile ${whole(percentile(values[place]))}`;
  }
  const wanted = document.querySelector('input[name=outcome]:checked').value, group = element('class').value;
  const inClass = ({card}) => !group || card.dataset.class === group;
  for (const radio of document.querySelectorAll('input[name=outcome]')) {
    const these = cards.filter(({card}) => !radio.value || card.dataset.outcome === radio.value);
    radio.parentElement.querySelector('.count').textContent = these.filter(inClass).length;
  }
  for (const each of cards) each.card.hidden = !inClass(each) || (wanted && each.card.dataset.outcome !== wanted);
  document.querySelector('.gallery').append(...[...cards].sort(ORDERS[element('order').value]).map(({card}) => card));
  const shown = cards.filter(({card}) => !card.hidden).length;
  const inTest = data.label.filter((_, place) => (!wanted || outcome(place) === wanted)
    && (!group || data.classes[data.class[place]] === group)).length;
  element('status').textContent = `${shown} of ${cards.length} cases; ${inTest} such images in the test part`;
}

// ------------------------------------------------------------------------------------------------ controls

slider.addEventListener('input', () =>
  setThreshold(Number((low + (high - low) * slider.value / STEPS).toPrecision(7))));
field.addEventListener('input', () => { if (field.value !== '') setThreshold(Number(field.value)); });
element('reset').addEventListener('click', () => setThreshold(data.scores[name].threshold ?? Infinity));
element('score').addEventListener('change', event => chooseScore(event.target.value));
element('filters')?.addEventListener('change', showCases);
for (const form of document.querySelectorAll('form.controls')) {
  form.hidden = false;
  form.addEventListener('submit', event => event.preventDefault());           // Enter in the field
}
chooseScore(data.primary);
