"""The report in a real browser: its controls, its looks, and that it asks the network for nothing.

Runs in a headless Chromium with its driver; skips where there is none (Debian: chromium, chromium-driver).
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait
from test_detect import make_data, make_model, rows_of, run, settings
from toy_volumes import LESION, SHAPE, Mean, make_volumes

from anomaly.metrics import wilson_interval
from anomaly.report.gallery import case_pictures
from anomaly.report.page import write_predictions
from anomaly.scoring import Case

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
DRIVER = shutil.which('chromedriver')
pytestmark = [pytest.mark.page, pytest.mark.skipif(not (CHROMIUM and DRIVER),
                                                   reason='no chromium and chromedriver here')]
OPTIONS = ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu', '--no-first-run',
           '--window-size=1280,900', '--disable-background-networking', '--disable-component-update')


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """A report of 36 images of two anomalous classes, scored by a model that mixes some of them up."""
    out, data = tmp_path_factory.mktemp('report'), make_data(masks=True)
    data.test.x[:6, :, :2, :2] += 0.5                          # normal images that look anomalous
    data.test.x[22:30, :, :2, :2] -= 0.45                      # anomalous ones that look normal
    data.test.x.clamp_(0, 1)
    run(out, data, make_model(), settings(num_draws=1, num_bootstrap=20, num_cases=2, num_gallery=20))
    rows = [row for row in rows_of(out / 'scores.csv') if row['part'] == 'test']
    thresholds = json.loads((out / 'thresholds.json').read_text())['scores']
    return SimpleNamespace(address=(out / 'report.html').as_uri(), rows=rows, thresholds=thresholds)


@pytest.fixture(scope='module')
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium, report):
    """The page, freshly opened; fails the test if the console has an error or anything asks the network."""
    chromium.get_log('browser'), chromium.get_log('performance')
    chromium.get(report.address)
    yield chromium
    assert chromium.get_log('browser') == []
    events = [json.loads(entry['message'])['message'] for entry in chromium.get_log('performance')]
    asked = {e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent'}
    assert report.address in {url.split('#')[0] for url in asked}
    assert all(url.startswith(('file:', 'data:')) for url in asked)


def find(page, name):
    return page.find_element(By.ID, name)


def table(page):
    """The confusion table: group -> its cells."""
    return page.execute_script("""
        return Object.fromEntries([...document.querySelectorAll('#confusion tbody tr')].map(row =>
            [row.dataset.group, [...row.querySelectorAll('td')].map(cell => cell.textContent)]))""")


def cards(page):
    """The visible cases in their order."""
    return [SimpleNamespace(**card) for card in page.execute_script("""
        return [...document.querySelectorAll('.case')].filter(card => card.checkVisibility()).map(card => ({
            place: Number(card.dataset.place), class_name: card.dataset.class,
            outcome: card.dataset.outcome, says: card.querySelector('.outcome').textContent}))""")]


def expected(rows, score, threshold):
    """The same table, computed from scores.csv."""
    values, names = (np.array([row[key] for row in rows]) for key in (score, 'class'))
    flagged = values.astype(float) > threshold
    groups = {'normal': names == 'Normal', 'COVID': names == 'COVID', 'Other': names == 'Other',
              'all': names != 'Normal'}
    false, cells = int(flagged[names == 'Normal'].sum()), {}
    for group, members in groups.items():
        count, total = int(flagged[members].sum()), int(members.sum())
        low, high = wilson_interval(count, total)
        both = count + false
        share = f'{100 * count / both:.1f} %' if both else '-'
        cells[group] = [str(count), str(total - count), f'{100 * count / total:.1f} %',
                        f'{100 * low:.1f} to {100 * high:.1f} %',
                        '' if group == 'normal' else f'{share} ({count} of {both})']
    return cells


def outcomes(rows, score, threshold):
    return [{(1, 1): 'tp', (1, 0): 'fn', (0, 1): 'fp', (0, 0): 'tn'}[
        int(row['label']), int(float(row[score]) > threshold)] for row in rows]


def test_the_page_begins_with_the_threshold_from_validation(page, report):
    threshold = report.thresholds['nelbo']['threshold']
    assert table(page) == expected(report.rows, 'nelbo', threshold)
    assert 'from validation' in find(page, 'sentence').text
    shown, truth = cards(page), outcomes(report.rows, 'nelbo', threshold)
    assert len(shown) == 20 and all(card.outcome == truth[card.place] for card in shown)
    assert {card.outcome for card in shown} == {'tp', 'fp', 'tn', 'fn'}              # the images are mixed up


def test_the_slider_moves_counts_and_calls_by_the_keyboard_and_comes_back(page, report):
    before = table(page), find(page, 'sentence').text, [vars(card) for card in cards(page)]
    slider, field = find(page, 'slider'), find(page, 'threshold')
    seen = []
    for keys in (Keys.HOME, Keys.PAGE_UP * 2, Keys.ARROW_RIGHT * 9, Keys.ARROW_LEFT, Keys.PAGE_UP * 3,
                 Keys.END):
        slider.send_keys(keys)
        threshold = float(field.get_attribute('value'))
        cells = table(page)
        assert cells == expected(report.rows, 'nelbo', threshold)
        truth = outcomes(report.rows, 'nelbo', threshold)
        assert all(card.outcome == truth[card.place] for card in cards(page))
        flagged = int(cells['normal'][0]) + int(cells['all'][0])
        assert slider.get_attribute('aria-valuetext').endswith(f', {flagged} of 36 flagged')
        seen.append((cells['normal'][0], cells['all'][0]))
    assert seen[0] == ('20', '16') and seen[-1] == ('0', '0') and len(set(seen)) > 3
    assert 'tried by hand' in find(page, 'sentence').text
    find(page, 'reset').send_keys(Keys.ENTER)
    assert (table(page), find(page, 'sentence').text, [vars(card) for card in cards(page)]) == before


def test_a_typed_threshold_and_another_score(page, report):
    field = find(page, 'threshold')
    middle = float(np.median([float(row['nelbo']) for row in report.rows]))
    field.clear()
    field.send_keys(repr(middle), Keys.ENTER)
    assert table(page) == expected(report.rows, 'nelbo', middle)
    Select(find(page, 'score')).select_by_visible_text('trivial_knn')
    threshold = report.thresholds['trivial_knn']['threshold']
    assert table(page) == expected(report.rows, 'trivial_knn', threshold)
    truth = outcomes(report.rows, 'trivial_knn', threshold)
    assert all(card.outcome == truth[card.place] for card in cards(page))
    values = [float(report.rows[card.place]['trivial_knn']) for card in cards(page)]
    assert values == sorted(values, reverse=True)


def test_filters_filter(page, report):
    everything = cards(page)
    threshold = report.thresholds['nelbo']['threshold']
    truth = outcomes(report.rows, 'nelbo', threshold)
    titles = {'tp': 'true positive', 'fp': 'false positive', 'tn': 'true negative', 'fn': 'false negative'}
    for kind, title in titles.items():
        page.find_element(By.CSS_SELECTOR, f'input[value={kind}]').click()
        shown = cards(page)
        assert shown and {(card.outcome, card.says) for card in shown} == {(kind, title)}
        assert [card.place for card in shown] == [c.place for c in everything if c.outcome == kind]
        assert find(page, 'status').text == (
            f'{len(shown)} of 20 cases; {truth.count(kind)} such images in the test part')
    page.find_element(By.CSS_SELECTOR, 'input[value=""]').click()
    Select(find(page, 'class')).select_by_value('Other')
    shown = cards(page)
    assert {card.class_name for card in shown} == {'Other'}
    assert find(page, 'status').text == f'{len(shown)} of 20 cases; 8 such images in the test part'
    page.find_element(By.CSS_SELECTOR, 'input[value=fp]').click()
    assert cards(page) == [] and find(page, 'status').text.startswith('0 of 20 cases; 0')


def test_a_case_is_enlarged_with_its_map_on_and_off(page):
    card = page.find_element(By.CSS_SELECTOR, '.case .pictures')
    small = card.find_element(By.TAG_NAME, 'img').size['width']
    card.send_keys(Keys.ENTER)
    large = find(page, 'large')
    image, heat = large.find_elements(By.TAG_NAME, 'img')
    assert large.is_displayed() and image.size['width'] > 3 * small and image.rect == heat.rect
    assert [picture.get_attribute('alt').split()[0] for picture in (image, heat)] == ['input', 'map']
    find(page, 'with-map').click()
    assert image.is_displayed() and not heat.is_displayed()
    find(page, 'with-map').send_keys(Keys.ESCAPE)
    assert not large.is_displayed()
    card.click()
    assert large.is_displayed()
    large.find_element(By.TAG_NAME, 'button').click()
    assert not large.is_displayed()


def test_orders(page, report):
    scores = [float(row['nelbo']) for row in report.rows]
    threshold = report.thresholds['nelbo']['threshold']
    for name, key in (('rising', lambda value: value), ('near', lambda value: abs(value - threshold)),
                      ('falling', lambda value: -value)):
        Select(find(page, 'order')).select_by_value(name)
        keys = [key(scores[card.place]) for card in cards(page)]
        assert len(keys) == 20 and keys == sorted(keys)


def test_tab_reaches_every_control_in_the_order_of_the_page(page):
    reached = []
    for _ in range(40):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.execute_script("const e = document.activeElement; return e.id || e.name"))
        if reached[-1] == 'order':
            break
    controls = ['score', 'threshold', 'reset', 'slider', 'outcome', 'class', 'order']
    assert [name for name in reached if name in controls] == controls
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == 'solid'                                                          # the focus is seen


@pytest.fixture
def media(chromium):
    """media(type, scheme, width) sets what the page is shown on."""
    def change(kind='', scheme='light', width=1280):
        chromium.execute_cdp_cmd('Emulation.setEmulatedMedia', {
            'media': kind, 'features': [{'name': 'prefers-color-scheme', 'value': scheme}]})
        chromium.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
            'width': width, 'height': 800, 'deviceScaleFactor': 1, 'mobile': width < 600})
    yield change
    chromium.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': '', 'features': []})
    chromium.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


@pytest.mark.parametrize('width', [375, 768, 1280])
def test_the_page_does_not_scroll_sideways(page, media, width):
    media(width=width)
    wide, seen = page.execute_script(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]")
    assert wide == seen and width - 20 <= seen <= width             # a scroll bar takes up to 20 pixels


CONTRAST = """
const light = colour => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const colour = name => {
    const probe = document.body.appendChild(document.createElement('i'));
    probe.style.color = `var(--${name})`;
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
};
return arguments[0].flatMap(ink => arguments[1].map(paper => {
    const [a, b] = [light(colour(ink)), light(colour(paper))];
    return [ink, paper, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
}));"""


@pytest.mark.parametrize('kind, scheme', [('', 'light'), ('', 'dark'), ('print', 'dark')])
def test_text_has_contrast(page, media, kind, scheme):
    """At least 4.5 to 1 (WCAG AA), in light and dark mode and on paper, which stays white in dark mode."""
    media(kind, scheme)
    ratios = page.execute_script(CONTRAST, ['ink', 'soft', 'accent', 'good', 'bad'], ['page', 'card'])
    assert [r for r in ratios if r[2] < 4.5] == []
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == 'rgb(255, 255, 255)') == (kind == 'print')
    dark = max(map(int, background[4:-1].split(', '))) < 60
    assert dark == (scheme == 'dark' and kind != 'print')


VISIBLE = "return [...document.querySelectorAll(arguments[0])].map(e => e.checkVisibility())"


def test_paper_has_no_controls_and_everything_open(page, media):
    assert all(page.execute_script(VISIBLE, '.controls, nav'))
    media('print')
    assert not any(page.execute_script(VISIBLE, '.controls, nav'))
    assert all(page.execute_script(VISIBLE, '.case'))
    heights = page.execute_script("return [...document.querySelectorAll('details > :not(summary)')]"
                                  ".map(e => e.getBoundingClientRect().height)")
    assert heights and min(heights) > 10
    rule = page.execute_script("return getComputedStyle(document.querySelector('.case')).breakInside")
    assert rule == 'avoid'


def test_without_its_script_the_page_shows_tables_and_cases(page, report):
    page.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', {'value': True})
    counts = expected(report.rows, 'nelbo', report.thresholds['nelbo']['threshold'])['normal']
    says = [text.text for text in page.find_elements(By.CSS_SELECTOR, '.case .value')]
    try:
        page.get(report.address)
        assert not find(page, 'controls').is_displayed() and not find(page, 'filters').is_displayed()
        cells = page.find_elements(By.CSS_SELECTOR, '#confusion tbody tr:first-child td')
        assert [cell.text for cell in cells] == counts
        assert says == [text.text for text in page.find_elements(By.CSS_SELECTOR, '.case .value')]
        assert len(says) == 20
    finally:
        page.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', {'value': False})


def test_the_browser_forbids_the_page_what_comes_from_a_network(chromium, report):
    chromium.get(report.address)
    refused = chromium.execute_async_script("""const [address, done] = arguments;
        document.addEventListener('securitypolicyviolation', event => done(event.blockedURI));
        new Image().src = address;""", 'http://127.0.0.1:9/picture.png')
    assert refused.startswith('http://127.0.0.1:9/')


# --------------------------------------------------------------------------------------------------- volumes

BRIGHT = """
const read = frame => {                  // width, height, highest value of what a frame shows; its place
  const [image, box] = [frame.querySelector('img'), frame.getBoundingClientRect()];
  const whole = image.getBoundingClientRect(), scale = image.naturalWidth / whole.width;
  const [w, h] = [Math.round(box.width * scale), Math.round(box.height * scale)];
  const canvas = new OffscreenCanvas(w, h).getContext('2d');
  canvas.drawImage(image, Math.round((box.x - whole.x) * scale), Math.round((box.y - whole.y) * scale), w, h,
                   0, 0, w, h);
  const values = canvas.getImageData(0, 0, w, h).data.filter((_, i) => i % 4 === 0);
  const highest = Math.max(...values);
  return [w, h, highest, values.indexOf(highest) % w, Math.floor(values.indexOf(highest) / w)];
};
return [...arguments[0].querySelectorAll('.frame')].map(read);"""


def test_sliders_go_through_a_volume_by_the_keyboard_input_and_map_together(chromium, media, tmp_path):
    run(tmp_path, make_volumes(), Mean(), settings(num_bootstrap=5, num_cases=1, num_gallery=5))
    chromium.get_log('browser')
    chromium.get((tmp_path / 'report.html').as_uri())
    card = chromium.find_element(By.CSS_SELECTOR, '.case[data-class=Tumour]')
    places = [(12 - 1 - LESION[1], 10 - 1 - LESION[0]), (8 - 1 - LESION[2], 10 - 1 - LESION[0]),
              (8 - 1 - LESION[2], 12 - 1 - LESION[1])]
    for view, across, (row, column) in zip(card.find_elements(By.CLASS_NAME, 'view'), (2, 1, 0), places):
        slider, number = (view.find_element(By.CLASS_NAME, name) for name in ('through', 'number'))
        assert number.text == f'{LESION[across] + 1} of {SHAPE[across]}' and slider.is_displayed()
        start = chromium.execute_script(BRIGHT, view)                       # input, reconstruction, map
        assert tuple(start[0][3:]) == (column, row) and start[0][2] > 240
        assert np.abs(np.subtract(start[2][3:], (column, row))).max() <= 1 and start[2][2] > 200
        slider.send_keys(Keys.ARROW_LEFT)                                   # out of the lesion
        seen = chromium.execute_script(BRIGHT, view)
        assert [tuple(s[:2]) for s in seen] == [tuple(s[:2]) for s in start]
        assert seen[0][2] < 150 and seen[2][2] < 200
        assert number.text == slider.get_attribute('aria-valuetext') == f'{LESION[across]} of {SHAPE[across]}'
        slider.send_keys(Keys.ARROW_RIGHT)
        assert chromium.execute_script(BRIGHT, view) == start
    media('print')
    assert not slider.is_displayed() and number.is_displayed()
    media(width=375)
    assert chromium.execute_script("const page = document.documentElement; return page.scrollWidth") <= 375
    assert chromium.get_log('browser') == []


# ----------------------------------------------------------------------------------------------- predictions

def test_a_worklist_is_sorted_and_its_pictures_are_enlarged_in_the_files_resolution(chromium, tmp_path):
    """A file of 48 pixels that a model saw in 16: enlarged, it has its own, and the map lies over it."""
    fine = np.kron(np.arange(9).reshape(3, 3), np.ones((16, 16)))[None] / 9                    # (1, 48, 48)
    case = Case(-1, fine[:, ::3, ::3], None, np.eye(16), None, above=np.eye(16) > 0, original=fine)
    look = {'cmap': 'inferno', 'vmin': 0, 'vmax': 1}
    files = [{'id': 'b.png', 'class': '', 'place': 1, 'outcome': 'flagged', 'score': '7', 'percentile': '99'},
             {'id': 'a.png', 'class': '', 'place': 2, 'outcome': 'clear', 'score': '1', 'percentile': '20'}]
    result = {'primary_score': 'nelbo', 'map_score': 'nelbo', 'about': 'negative ELBO', 'data': 'new',
              'models': [], 'date': '', 'commit': '', 'command': 'evaluate.py', 'num_flagged': 1,
              'num_scored': 2, 'num_unreadable': 1, 'passed_over': 0, 'num_learned': 0, 'threshold': 5.0,
              'promised': 0.05}
    write_predictions(tmp_path, result, files, {'c.png': 'is empty (0 bytes)'},
                      {'b.png': case_pictures(case, look, np.ones(2), 1e6)}, look)
    chromium.get_log('browser')
    chromium.get((tmp_path / 'predictions.html').as_uri())
    rows = [row.text.split() for row in chromium.find_elements(By.CSS_SELECTOR, '.worklist tbody tr')]
    assert rows == [['b.png', 'anomalous', '7', '99', '1'], ['a.png', 'not', 'flagged', '1', '20', '2']]
    assert 'is empty (0 bytes)' in chromium.find_element(By.CSS_SELECTOR, '.wrapped').text
    chromium.find_element(By.CSS_SELECTOR, '.case .pictures').click()
    image, heat = find(chromium, 'large').find_elements(By.TAG_NAME, 'img')
    size = lambda picture: chromium.execute_script('return arguments[0].naturalWidth', picture)
    WebDriverWait(chromium, 5).until(lambda _: size(image) == 48)
    assert size(heat) == 16 and image.rect == heat.rect
    assert find(chromium, 'large').find_element(By.CSS_SELECTOR, 'svg.above').is_displayed()
    find(chromium, 'with-map').click()
    assert image.is_displayed() and not heat.is_displayed()
    assert chromium.get_log('browser') == []
