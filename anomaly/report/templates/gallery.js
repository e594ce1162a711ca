'use strict';
// Enlarges a case, with its map on and off, and moves the slices of volumes. Without it the page shows the slices
// that it begins with.
const element = id => document.getElementById(id);
const large = element('large');

function enlarge(card) {          // the input in its own resolution, and over it the map, if there is one
  const frames = [...card.querySelectorAll('.frame')], map = frames.at(-1);
  const layers = frames.length > 1 && map.querySelector('img').alt.startsWith('map') ? [frames[0], map] : [frames[0]];
  large.querySelector('.layers').replaceChildren(...layers.map(layer => layer.cloneNode(true)));
  for (const [place, image] of large.querySelectorAll('.layers img').entries()) {
    if (!image.dataset.large) continue;
    image.src = image.dataset.large;
    if (!place) image.classList.remove('small');
  }
  large.querySelector('label').hidden = layers.length < 2;
  large.querySelector('.name').textContent = card.querySelector('.id').textContent;
  showMap();
  large.showModal();
}

function showMap() {
  const [, map] = large.querySelectorAll('.frame');
  if (map) map.hidden = !element('with-map').checked;
}

function showSlice(through) {
  const view = through.closest('.view'), columns = Number(view.dataset.columns);
  const place = (through.value - through.min) / through.step;
  view.style.setProperty('--column', place % columns);
  view.style.setProperty('--row', Math.floor(place / columns));
  const total = view.querySelector('.number').textContent.split(' of ')[1];
  const text = `${Number(through.value) + 1} of ${total}`;
  view.querySelector('.number').textContent = text;
  through.setAttribute('aria-valuetext', text);
}

if (large) {
  element('with-map').addEventListener('change', showMap);
  for (const card of document.querySelectorAll('.case')) {
    const pictures = card.querySelector('.pictures');
    Object.assign(pictures, {role: 'button', tabIndex: 0, ariaLabel: `enlarge ${card.querySelector('.id').textContent}`});
    pictures.addEventListener('click', () => enlarge(card));
    pictures.addEventListener('keydown', event => {
      if (event.key !== 'Enter') return;
      event.preventDefault();                            // else it reaches the dialog, and closes it
      enlarge(card);
    });
  }
}
for (const through of document.querySelectorAll('.through')) {
  through.hidden = false;
  through.addEventListener('input', () => showSlice(through));
}
