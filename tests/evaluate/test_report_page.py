"""The report in a real browser: it runs without complaint, fits its width, shows the figures and executes no data."""

import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.evaluate.history import Record
from components.evaluate.report import Report, render, safe_json

browser_module = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("browser.py"))))
HOSTILE = [
    "</script><script>window.broken = 1</script>",
    '<img src=x onerror="window.broken = 2">',
    "<!--<script>",
    "'\"><svg onload=window.broken=3>",
    "\u2028\u2029\ud800 lone surrogate",
    "{{script}} {{data}}",
]


def record(iteration, **metrics):
    names = {name.replace("__", "/").replace("_at_", "@"): value for name, value in metrics.items()}
    return Record(
        iteration=iteration, run="run-1", policy="blake3:" + "0" * 64, created="2026-01-02T03:04:05+00:00",
        metrics=names, seconds={"rollout": 6.0, "update": 4.0},
    )  # fmt: skip


def row(i, **changes):
    values = {
        "split": "eval" if i % 2 else "train", "iteration": i % 3, "prompt_id": f"p{i}", "sample_index": 0,
        "prompt": f"prompt {i}", "completion": f"completion {i}", "truth": {"answer": "1"},
        "rewards": {"match": i % 4 / 4}, "reward": i % 4 / 4, "advantage": i - 30.0, "length": 10 + i, "finish": "stop",
        "truncated": False,
        "right": i % 4 == 3, "answer": "1", "error": None,
    }  # fmt: skip
    return values | changes


def report(**changes):
    records = [
        record(0, reward=0.2, eval__pass_at_1=0.25, eval__pass_at_1_low=0.2, eval__pass_at_1_high=0.3,
               eval__num_prompts=200, eval__num_samples=800, eval__pass_at_4=0.5),
        record(1, reward=0.4, entropy=0.5, clip_ratio__region_mean=0.01),
        record(2, reward=0.7, entropy=0.4, eval__pass_at_1=0.875, eval__pass_at_1_low=0.84, eval__pass_at_1_high=0.91,
               eval__pass_at_1_gain=0.625, eval__pass_at_1_gain_low=0.58, eval__pass_at_1_gain_high=0.67,
               eval__num_prompts=200, eval__num_samples=800, eval__pass_at_4=0.95),
    ]  # fmt: skip
    values = {
        "fine_tune": "sums", "run": "run-1", "iteration": 2, "policy": "blake3:" + "0" * 64,
        "created": "2026-01-02T03:04:05+00:00", "records": records, "samples": [row(i) for i in range(60)],
        "judged_by": "match is at least 1",
    }  # fmt: skip
    return Report(**values | changes)


def hostile():
    """A report with every text field taken over."""
    rows = [
        row(i, prompt=text, completion=text, truth={text: text}, answer=text, error=text, prompt_id=text, finish=text,
            rewards={text: 1.0})
        for i, text in enumerate(HOSTILE)
    ]  # fmt: skip
    return report(samples=rows, judged_by=HOSTILE[0], fine_tune=HOSTILE[1])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if browser_module.executable() is None:
        pytest.skip("no Chromium here")
    browser = browser_module.Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def show(browser, tmp_path):
    def open_page(page, **options):
        path = tmp_path / "report.html"
        path.write_text(render(page), encoding="utf-8")
        browser.complaints.clear()
        browser.open(path.as_uri(), **{"width": 1280} | options)
        return browser

    return open_page


def text(browser, selector):
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent").replace("\u202f", " ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_nothing_complains_and_nothing_sticks_out(show, width, scheme):
    long = row(0, completion="x" * 3000, prompt="word " * 400, truth={"a very long column name": "y" * 900})
    page = show(report(samples=[long, *(row(i) for i in range(1, 60))]), width=width, scheme=scheme)
    page.run("document.querySelectorAll('details').forEach((item) => item.open = true)")
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.querySelectorAll('.detail').length") == 25
    assert page.run("[...document.querySelectorAll('pre')].every((part) => part.scrollWidth <= part.clientWidth)")
    assert page.complaints == []


def test_the_figures_are_in_the_page(show):
    page = show(report())
    assert text(page, "#pass-before") == "25.0 %"
    assert text(page, "#pass-after") == "87.5 %"
    assert text(page, "#verdict") == "2 updates raised pass@1 by 62.5 points (95 % interval +58.0 to +67.0)."
    assert text(page, '[data-chart="reward"] [data-value]') == "0.700"
    assert text(page, '[data-chart="pass"] [data-band]') == "84.0–91.0 %"
    assert text(page, ".charts-without") == "Without values so far: Completion length, KL to the start policy."
    assert page.run("[...document.querySelectorAll('.charts .chart-title')].map((title) => title.textContent)") == [
        "Solved, held-out", "Reward", "Entropy", "Clipped tokens",
    ]  # fmt: skip
    assert text(page, "tfoot td") == "30.0 s"


def test_arrow_keys_read_all_curves_at_one_update(show):
    page = show(report())
    page.run("document.querySelector('[data-chart=reward]').focus()")
    for _ in range(2):
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
    assert text(page, '[data-chart="reward"] [data-at]') == "after update 1"
    assert text(page, '[data-chart="reward"] [data-value]') == "0.400"
    assert text(page, '[data-chart="entropy"] [data-value]') == "0.500"
    assert text(page, '[data-chart="pass"] [data-value]') == "–"
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert text(page, '[data-chart="reward"] [data-value]') == "0.700"


def test_each_curve_says_which_update_its_latest_value_is_of(show):
    """The last policy of a run has held-out samples and no training samples."""
    metrics = [{"reward": 0.2, "eval__reward": 0.1}, {"reward": 0.4, "eval__reward": 0.3}, {"eval__reward": 0.7}]
    page = show(report(records=[record(i, **values) for i, values in enumerate(metrics)]))
    assert text(page, '[data-chart="reward"] [data-at]') == "after update 2"
    shown = "[...document.querySelectorAll('[data-chart=reward] .readout')].map((line) => line.textContent)"
    assert page.run(shown) == ["training 0.400 after update 1", "held-out 0.700"]
    page.run("document.querySelector('[data-chart=reward]').focus()")
    for _ in range(3):
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
    assert page.run(shown) == ["training 0.200", "held-out 0.100"]
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert page.run(shown) == ["training 0.400 after update 1", "held-out 0.700"]


def test_errors_of_reward_functions_have_a_panel_when_there_are_any(show):
    none, some = record(0, reward__errors=0.0), record(1, reward__errors=36.0, eval__reward__errors=0.0)
    assert 'data-chart="errors"' not in render(report(records=[none]))
    page = show(report(records=[none, some]))
    assert text(page, '[data-chart="errors"] .readouts') == "36"


def test_completions_are_filtered_and_ordered(show):
    page = show(report())
    rewards = (
        "[...document.querySelectorAll('#rows summary .right-aligned:nth-child(2)')].map((cell) => +cell.textContent)"
    )
    assert page.run(rewards)[:15] == [0.75] * 15
    _choose(page, "order", "worst")
    assert page.run(rewards)[:15] == [0.0] * 15
    _choose(page, "outcome", "right")
    assert page.run("document.getElementById('count').textContent") == "15 of 60 completions"
    _choose(page, "split", "train")
    assert page.run("document.getElementById('count').textContent") == "No completion matches; widen the filter."
    _choose(page, "split", "")
    _choose(page, "outcome", "")
    _choose(page, "search", "PROMPT 41")
    assert page.run("document.querySelectorAll('#rows details').length") == 1
    _choose(page, "search", "")
    page.run("document.getElementById('more').click()")
    assert page.run("document.querySelectorAll('#rows details').length") == 50


def _choose(page, control, value):
    page.run(
        f"(() => {{ const field = document.getElementById('{control}'); field.value = {json.dumps(value)};"
        " field.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def test_model_text_is_shown_and_never_executed(show):
    page = show(hostile())
    page.run("document.querySelectorAll('#rows details').forEach((item) => item.open = true)")
    page.run("new Promise((done) => setTimeout(done, 200))")
    assert page.run("window.broken === undefined")
    shown = page.run("[...document.querySelectorAll('#rows pre')].map((part) => part.textContent)")
    for hostile_text in HOSTILE[:4]:
        assert hostile_text in shown
    assert page.run("document.querySelectorAll('#rows img, #rows svg, #rows script').length") == 0
    assert page.complaints == []


def test_the_policy_of_the_page_refuses_foreign_scripts_and_requests(show):
    page = show(report())
    page.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.broken = 4';"
        " document.body.append(s) })()"
    )
    page.run("(() => { const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i) })()")
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert page.run("window.broken === undefined")
    assert len([one for one in page.complaints if "Content Security Policy" in one]) == 2


def test_it_works_in_a_sandboxed_frame(browser, tmp_path):
    """As KFP and MLflow show it: `sandbox="allow-scripts"`, an opaque origin without storage."""
    (tmp_path / "report.html").write_text(render(report()), encoding="utf-8")
    source = json.dumps((tmp_path / "report.html").read_text()).replace("<", "\\u003c")
    (tmp_path / "frame.html").write_text(
        '<!doctype html><iframe sandbox="allow-scripts" style="width:700px;height:600px"></iframe><script>'
        f"document.querySelector('iframe').srcdoc = {source};"
        "document.querySelector('iframe').onload = () => document.documentElement.dataset.ready = 'true'</script>"
    )
    browser.complaints.clear()
    browser.open((tmp_path / "frame.html").as_uri(), width=1280)
    browser.run("new Promise((done) => setTimeout(done, 300))")
    assert browser.complaints == []
    [frame] = browser.call("Page.getFrameTree")["frameTree"]["childFrames"]
    world = browser.call("Page.createIsolatedWorld", frameId=frame["frame"]["id"])
    found = browser.call(
        "Runtime.evaluate", contextId=world["executionContextId"], returnByValue=True,
        expression="[document.documentElement.dataset.ready, document.querySelectorAll('#rows details').length]",
    )  # fmt: skip
    assert found["result"]["value"] == ["true", 25]


class _Ids(HTMLParser):
    """Ids, names of attributes, and the elements that were opened without being closed."""

    VOID = {"meta", "input", "line", "polyline", "polygon", "path", "rect", "br"}

    def __init__(self):
        super().__init__()
        self.ids, self.open, self.names = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        self.names |= {name for name, _ in attributes}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    "page", [report(), hostile(), report(samples=[]), report(records=[record(0)]), report(records=[])]
)
def test_markup_is_sound_and_self_contained(page):
    html = render(page)
    parser = _Ids()
    parser.feed(html)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert not parser.names & {"src", "href", "srcset", "onload", "onerror", "onclick"}
    assert not re.search(r"url\(|@import", html.split("</style>")[0])
    assert html.count("<script") == 2


def test_embedded_data_reads_back_unchanged():
    value = {"text": "</script><!-- & \u2028 é 漢"}
    text = safe_json(value)
    assert "<" not in text
    assert json.loads(text) == value


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast_is_at_least_4_5(show, scheme):
    page = show(report(), scheme=scheme)
    low = page.run(CONTRAST)
    assert low == []


CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;  // WCAG 2.2, relative luminance
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const low = new Set();
  for (const element of document.querySelectorAll("main *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length) continue;
    const pair = [light(rgb(getComputedStyle(element).color)), light(ground(element))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) low.add(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
  }
  return [...low];
})()
"""
