"""The page in a browser: offline, accessible, and safe with hostile responses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import browser as chrome
import pandas as pd
import probed
import pytest
import synthetic

from leeway import report
from leeway.report import formatting
from leeway.report.page.transcripts import embed_rows

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[1] / "support"
SMALL = {"capability": 24, "prompts": 16, "items": 12}
TEMPLATE = "{{ 7*7 }} ${7*7} {% raw %}"
NASTY = "</script><script>document.title='owned';alert(1)</script><img src=x onerror=alert(2)>\u202egpj.exe\x00\u200b"


def rows() -> pd.DataFrame:
    made = synthetic.rows(("sft", "cft", "kl"), (25_000, 100_000), **SMALL)
    capability = made["eval"] == "capability"
    made.loc[capability, "response"] = NASTY + TEMPLATE + made.loc[capability, "response"]
    made.loc[capability, "judge_raw"] = '<b onmouseover="alert(3)">raw</b>'
    made.loc[made.index[capability][0], "response"] = "long " * 200_000  # one line of a megabyte
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chrome.running() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = synthetic.write(tmp_path_factory.mktemp("run"), rows())
    return report.build(probed.write(run, *probed.tables()))


@pytest.fixture(scope="module")
def tab(browser: Any, page: Path) -> Iterator[Any]:
    found, seen = opened(browser, page)
    yield found
    assert seen.console == []


def opened(browser: Any, page: Path, *size: int, **settings: Any) -> tuple[Any, Any]:
    """Open the page with the search unfolded."""
    tab, seen = chrome.opened(browser, page, *size, **settings)
    tab.evaluate("document.getElementById('search-fold').open = true")
    return tab, seen


def drawn(tab: Any, chart: str) -> Any:
    """Scroll to a chart, wait until it is drawn, and return it."""
    holder = tab.locator(f"[data-chart='{chart}']")
    holder.evaluate("h => { for (let d = h; d; d = d.parentElement) if (d.tagName === 'DETAILS') d.open = true; }")
    holder.scroll_into_view_if_needed()
    holder.locator('[tabindex="0"]').first.wait_for(state="attached", timeout=20_000)
    return holder


def labels(tab: Any, chart: str) -> list[str]:
    """Return the labels of a chart's points and cells."""
    found = drawn(tab, chart).locator('[role="graphics-symbol"][tabindex]')
    return [one.get_attribute("aria-label") for one in found.all()]


def counted(tab: Any) -> int:
    chrome.until(tab, "/^(No|[0-9])/.test(document.getElementById('search-count').textContent)")
    text = tab.locator("#search-count").inner_text()
    return 0 if text.startswith("No ") else int(text.split(" ")[0].replace(",", ""))


def after(tab: Any, act: Callable[[], object]) -> int:
    """Return the number of results once the search that `act` starts has ended."""
    tab.evaluate("document.getElementById('search-count').textContent = ''")
    act()
    return counted(tab)


def n_found(tab: Any, **filters: str) -> int:
    """Return the number of results with these filters only."""
    found = after(tab, tab.locator("#search-form button[type=reset]").click)
    for name, value in filters.items():
        field = tab.locator(f"#f-{name}")
        found = after(tab, partial(field.fill if name == "text" else field.select_option, value))
    return found


def test_page_makes_no_requests_and_logs_no_errors(browser: Any, page: Path):
    tab, seen = opened(browser, page)
    tab.locator("#search-form button.main").click()
    counted(tab)
    assert seen.requests == [page.as_uri()]
    assert seen.console == []
    assert tab.evaluate("document.querySelectorAll('script:not([type])').length") == 4  # Vega's three and ours
    tab.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))"
    )
    assert tab.evaluate("window.bad") is None  # the policy lets no other script run
    assert any("Content Security Policy" in line for line in seen.console)


def test_filters_match_pandas(tab: Any):
    found = rows()
    outcome, attack = found["outcome"].fillna(""), found["attack"].fillna("")
    unscored = found["score"].isna() & (outcome == "")
    assert n_found(tab) == len(found)
    assert n_found(tab, eval="jailbreak") == (found["eval"] == "jailbreak").sum()
    assert (
        n_found(tab, eval="jailbreak", attack="dan", outcome="harmful")
        == ((attack == "dan") & (outcome == "harmful")).sum()
    )
    assert n_found(tab, outcome="unscored") == unscored.sum() > 0
    assert (
        n_found(tab, line="sft|plain", budget="100000")
        == ((found["objective"] == "sft") & (found["budget"] == 100_000)).sum()
    )
    words = found["prompt"].str.contains("LOCK NUMBER 7?", case=False, regex=False)
    words |= found["response"].str.contains("LOCK NUMBER 7?", case=False, regex=False)
    assert n_found(tab, text="LOCK NUMBER 7?") == words.sum() > 0
    assert n_found(tab, text="no such words") == 0


def test_result_pages(tab: Any):
    n_found(tab, eval="persona")
    first = tab.locator("#search-list article h4").first.inner_text()
    tab.locator("#next").click()
    assert tab.locator("#search-list article h4").first.inner_text() != first
    assert "showing 21 to 40" in tab.locator("#search-count").inner_text()
    assert tab.evaluate("document.activeElement.id") == "search-list"
    tab.locator("#previous").click()
    assert tab.locator("#previous").is_disabled()


def test_two_checkpoints_side_by_side(tab: Any):
    found = rows()
    jailbreak = found[(found["eval"] == "jailbreak") & (found["objective"].isin(["base", "sft"]))]
    base = jailbreak[(jailbreak["objective"] == "base") & (jailbreak["template_hash"] == synthetic.PLAIN)]
    both = base.merge(jailbreak[jailbreak["budget"] == 100_000], on=["item_id", "attack"])
    differ = (both["outcome_x"].fillna("?") != both["outcome_y"].fillna("?")).sum()
    after(tab, tab.locator("#search-form button[type=reset]").click)
    after(tab, tab.locator("input[name=mode][value=two]").check)
    after(tab, lambda: tab.locator("#f-left").select_option(label="base"))
    after(tab, lambda: tab.locator("#f-right").select_option(label="SFT at 100k tokens"))
    assert after(tab, lambda: tab.locator("#f-eval").select_option("jailbreak")) == len(both)
    assert after(tab, tab.locator("#f-differ").check) == differ > 0
    card = tab.locator("#search-list article").first
    assert [w.inner_text().split("\n")[0] for w in card.locator(".who").all()] == ["base", "SFT at 100k tokens"]
    left, right = (card.locator(".answer").nth(n).bounding_box() for n in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    item = found[(found["item_id"] == both["item_id"].iloc[0]) & (found["attack"] == both["attack"].iloc[0])]
    assert after(tab, card.get_by_text("Show all checkpoints for this prompt").click) == len(item)


def test_harmful_responses_expand_on_click(tab: Any):
    n_found(tab, eval="jailbreak", outcome="harmful")
    card = tab.locator("#search-list article").first
    assert synthetic.REPLY["harmful"] not in card.inner_text()
    card.locator("details > summary").first.click()
    card.get_by_text(synthetic.REPLY["harmful"]).wait_for()  # a fold tells the page that it opened a moment later


def test_hostile_responses_are_text(browser: Any, page: Path):
    tab, seen = opened(browser, page)
    tab.locator("#f-eval").select_option("capability")
    counted(tab)
    tab.locator("#search-list article").first.wait_for()
    for fold in tab.locator("#search-list details").all():
        fold.evaluate("d => { d.open = true; }")
    text = tab.locator("#search-list").inner_text()
    assert "</script><script>document.title" in text
    assert TEMPLATE in text
    assert "⟨U+202E⟩gpj.exe⟨U+0000⟩⟨U+200B⟩" in text
    assert "\u202e" not in text
    assert tab.title() != "owned"
    assert tab.evaluate("document.querySelectorAll('#search-list :is(script, img, b)').length") == 0
    assert (seen.dialogs, seen.console) == ([], [])


def test_megabyte_line_is_truncated_and_expandable(tab: Any):
    assert n_found(tab, text="long long long") == 1
    pre = tab.locator("#search-list .answer pre").first
    assert pre.evaluate("p => p.textContent.length") == formatting.MAX_CHARS
    button = tab.locator("#search-list .answer button.more").first
    for _ in range(5):
        button.click()
    assert pre.evaluate("p => p.textContent.length") == 1_000_000
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280


def test_invisible_characters_are_escaped_as_in_python(tab: Any):
    source = (Path(report.__file__).parent / "page/scripts/text.js").read_text(encoding="utf-8")
    ask = (
        "() => {"
        + source
        + """
      const found = [];
      const as = String.fromCodePoint;
      for (let c = 0; c < 0x110000; c += 1) if (escapeInvisible(as(c)) !== as(c)) found.push(c);
      return [found, escapeInvisible(as(0x202e) + "a" + as(0xe0041)), cutAt("a\\u{1f600}b", 2)];
    }"""
    )
    changed, shown, cut = tab.evaluate(ask)
    assert changed == [c for c in range(0x110000) if formatting.escape_invisible(chr(c)) != (chr(c), 0)]
    assert len(changed) > 6_000
    assert (shown, cut) == (formatting.escape_invisible("\u202ea\U000e0041")[0], 1)


def test_filter_by_objective_budget_and_attack(browser: Any, page: Path):
    tab, seen = opened(browser, page)
    before = labels(tab, "by-budget-jailbreak")
    assert [t for t in before if t.startswith("KL ")]
    tab.locator("#filter summary").click()
    for value in ("kl|plain", "25000", "dan"):
        tab.locator(f"#filter [data-by] input[value='{value}']").uncheck()
    chrome.until(tab, "!document.querySelector('[data-chart=by-budget-jailbreak] [aria-label^=\\'KL \\']')")
    left = [*labels(tab, "by-budget-jailbreak"), *labels(tab, "by-attack")]
    assert not [t for t in left if re.search(r"\bKL\b|25k|DAN", t)]
    assert [t for t in left if "SFT at 100k" in t]
    visible = tab.evaluate(
        "[...document.querySelectorAll('#contrasts tr[data-line]')].filter(r => !r.hidden)"
        ".map(r => [r.dataset.line, r.dataset.budget])"
    )
    assert visible
    assert {tuple(v) for v in visible} == {("sft|plain", "100000"), ("cft|<SAFE>", "100000")}
    assert re.search(
        r"2 of 3 objectives, 1 of 2 budgets, 5 of 6 attacks \(\d+ of \d+ table rows\)",
        tab.locator("#filter-status").inner_text(),
    )
    tab.locator("#filter button[type=reset]").click()
    chrome.until(tab, "document.getElementById('filter-status').textContent === 'all shown'")
    assert seen.console == []


def test_budget_of_the_recommendation_can_be_chosen(tab: Any):
    assert [tab.locator(f".advice[data-at='{b}']").is_visible() for b in (25_000, 100_000)] == [False, True]
    tab.locator("#budget-picker input[value='25000']").check()
    assert [tab.locator(f".at-budget[data-at='{b}']").is_visible() for b in (25_000, 100_000)] == [True, False]
    assert "At 25k tokens" in tab.locator(".advice:visible h3").inner_text()
    assert tab.locator("h1").inner_text().startswith("At 25k tokens, ")
    for chart in ("tradeoff", "by-attack", "contrasts"):  # everything moves
        assert labels(tab, chart)
        marks = f"[...document.querySelectorAll('[data-chart={chart}] [role=graphics-symbol][tabindex]')]"
        names = f"{marks}.map(m => m.getAttribute('aria-label')).filter(t => !t.startsWith('base'))"
        chrome.until(tab, f"{names}.length && {names}.every(t => t.includes('at 25k tokens'))", 20)
    tab.locator("#budget-picker input[value='100000']").check()


def test_tooltips_by_pointer_and_keyboard(tab: Any):
    mark = drawn(tab, "contrasts").locator('[role="graphics-symbol"][tabindex]').first
    mark.hover()
    assert re.search(r" at .*points \(95% CI .* to .*\), p \(Holm\)", tab.locator("#tip").inner_text())
    mark.focus()
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == tab.locator("#tip").inner_text()
    tab.keyboard.press("Escape")
    assert not tab.locator("#tip").is_visible()


def test_tab_key_reaches_everything_with_visible_focus(browser: Any, page: Path):
    tab, _ = opened(browser, page)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to summary"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    stops = tab.evaluate(
        "[...document.querySelectorAll('a[href], button, input, select, summary, [tabindex=\"0\"]')]"
        ".filter(e => e.checkVisibility() && !e.disabled && !e.closest('.skip'))"
        ".filter(e => e.type !== 'radio' || e.checked).length"
    )
    reached, ringless = set(), set()
    tab.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    tab.evaluate("document.querySelectorAll('*').forEach((e, n) => { e.__n = n; })")
    for _ in range(stops + 12):
        tab.keyboard.press("Tab")
        n, ring, tag = tab.evaluate(
            "(e => [e.__n, getComputedStyle(e).outlineStyle, e.tagName])(document.activeElement)"
        )
        reached.add(n)
        ringless |= {tag} if ring == "none" else set()
    assert len(reached) >= stops
    assert ringless <= {"BODY"}  # between the last stop and the first


def test_accessible_names(tab: Any):
    assert tab.evaluate((HERE / "names.js").read_text(encoding="utf-8")) == []


CONTRAST = (HERE / "contrast.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_contrast_and_no_horizontal_overflow(browser: Any, page: Path, scheme: str, width: int):
    tab, seen = opened(browser, page, width, 844, color_scheme=scheme)
    tab.locator("#search-form button.main").click()
    counted(tab)
    assert tab.evaluate(CONTRAST) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert seen.console == []


def test_theme_switch_overrides_the_system(browser: Any, page: Path):
    tab, _ = opened(browser, page, color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(paper)
    tab.locator("#theme").select_option("dark")
    assert tab.evaluate(paper) != light
    tab.locator("#theme").select_option("light")
    assert tab.evaluate(paper) == light


# Elements of a printed page that are cut: wider than the paper, or than the box that hides what leaves it.
CUT = """(width) => [...document.querySelectorAll('main *')]
  .filter((e) => e.checkVisibility() && !e.closest('svg') && !e.matches('.visually-hidden'))
  .filter((e) => e.getBoundingClientRect().right > width + 1 || (e.scrollWidth > e.clientWidth + 1
    && getComputedStyle(e).overflowX !== 'visible' && e.clientWidth)).map((e) => e.outerHTML.slice(0, 120))"""


def test_print_shows_every_table_and_chart_uncut_in_light_colours(browser: Any, page: Path):
    tab, seen = opened(browser, page, 700, 900, color_scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    kept = "#summary, #evidence, #audit, #reproduce"
    tables = f"[...document.querySelectorAll(':is({kept}) table')].filter(t => !t.closest('.numbers'))"
    assert tab.evaluate(f"{tables}.length") > 8
    assert tab.evaluate(f"{tables}.filter(t => !t.checkVisibility()).map(t => t.caption.textContent)") == []
    widths = tab.evaluate("[...document.querySelectorAll('.chart')].map(c => c.querySelector('svg')?.clientWidth ?? 0)")
    assert all(0 < width <= 700 for width in widths)  # at once: printing waits for nothing
    assert tab.evaluate("document.querySelector('.chart .role-axis-label text').getAttribute('fill')") == "#000"
    left_out = "[...document.querySelectorAll('button, input, select, nav, .numbers, #responses')]"
    assert tab.evaluate(f"{left_out}.filter(e => e.checkVisibility()).length") == 0
    assert tab.evaluate(CUT, 700) == []
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate(
        "[document.documentElement.dataset.theme, document.querySelectorAll('main details[open]').length]"
    ) == [
        None,
        1,  # the search, which this test opened
    ]
    assert len(tab.pdf(format="A4")) > 50_000
    assert seen.console == []


def test_page_without_javascript(browser: Any, page: Path):
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto(page.as_uri())
    assert "figures/tradeoff.svg" in tab.locator("#figure-tradeoff noscript").inner_text()
    assert (page.parent / "figures/tradeoff.svg").is_file()
    tab.locator("#transcripts > details > summary").click()
    assert tab.locator("#transcripts article").first.is_visible()
    assert not tab.locator("#search-form").is_visible()
    assert "needs JavaScript" in tab.locator("#search noscript p").inner_text()
    assert tab.locator(".advice").count() == 2
    assert tab.locator(".advice").last.is_visible()


# Boxes of a chart's texts that overlap, or that leave the chart; rotated labels have boxes larger than their ink.
CLIPPED = """() => [...document.querySelectorAll('.chart svg')].flatMap((svg) => {
  const frame = svg.closest('.chart').getBoundingClientRect();
  const upright = (t) => t.textContent && !/rotate/.test(t.getAttribute('transform'));
  const texts = [...svg.querySelectorAll('text')].filter(upright);
  const boxes = texts.map((t) => [t.textContent, t.getBoundingClientRect()]).filter(([, b]) => b.width);
  const out = boxes.filter(([, b]) => b.left < frame.left - 1 || b.right > frame.right + 1).map(([t]) => `out: ${t}`);
  const across = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const down = (a, b) => Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  const cut = boxes.flatMap(([t, a], n) => boxes.slice(n + 1)
    .filter(([, b]) => across(a, b) > 2 && down(a, b) > 3).map(([u]) => `overlap: ${t} / ${u}`));
  return [...out, ...cut];
})"""


@pytest.mark.parametrize("width", [1440, 390, 360])
def test_charts_reflow_without_overlap_or_clipping(browser: Any, page: Path, width: int, pytestconfig: pytest.Config):
    tab, seen = opened(browser, page, width, 844)
    for holder in tab.locator(".chart").all():
        drawn(tab, holder.get_attribute("data-chart"))
    assert tab.evaluate(CLIPPED) == []
    named = "[...document.querySelectorAll('[data-chart=by-attack] .role-axis-label text')].map(t => t.textContent)"
    assert {formatting.attack_name(a) for a in synthetic.ATTACKS} <= set(tab.evaluate(named))  # none is dropped
    tab.evaluate("document.querySelectorAll('.numbers').forEach(d => { d.open = true; })")
    chrome.until(tab, "document.querySelector('.numbers tbody tr')")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert seen.console == []
    tab.evaluate("document.querySelectorAll('.numbers').forEach(d => { d.open = false; })")
    kept = pytestconfig.rootpath / f"build/screenshots/page-{width}.png"  # for a person to look at
    kept.parent.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=kept, full_page=True)


def test_the_numbers_of_a_chart_are_those_of_the_tables(tab: Any, page: Path):
    rates = pd.read_csv(page.parent / "tables/rates.csv")
    line = rates[(rates["objective"] == "sft") & (rates["budget"] == 100_000) & (rates["measure"] == "accuracy")].iloc[
        0
    ]
    shown = f"{100 * line['rate']:.1f}% (95% CI {100 * line['low']:.1f}% to {100 * line['high']:.1f}%)"
    assert [t for t in labels(tab, "by-budget-capability") if t.startswith("SFT at 100k tokens") and shown in t]
    fold = tab.locator("#figure-by-budget-capability details.numbers")
    fold.locator("summary").click()
    fold.locator("tbody tr").first.wait_for()
    assert fold.locator("tbody tr").count() == len(labels(tab, "by-budget-capability"))
    assert shown in fold.locator("tbody").inner_text()


def test_a_probes_chart_has_a_picker_and_numbers_that_follow_it(tab: Any):
    holder = drawn(tab, "mechanism-patching")
    assert "SFT 25k, residual stream, layer 2: 80.0% (95% CI 75.0% to 85.0%), random direction 5.0%, named" in labels(
        tab, "mechanism-patching"
    )
    holder.locator(".vega-bind input").nth(2).check()
    planted = "SFT 25k, MLP, layer 2: 80.0% (95% CI 75.0% to 85.0%), random direction 5.0%, named"
    found = "[...document.querySelectorAll('[data-chart=mechanism-patching] [tabindex]')]"
    chrome.until(tab, f"{found}.some(e => e.getAttribute('aria-label') === '{planted}')")
    assert any(text.endswith(f"layer 1: {probed.WITHHELD}") for text in labels(tab, "mechanism-patching"))
    numbers = tab.locator("#figure-mechanism-patching details.numbers")
    numbers.locator("summary").click()
    numbers.locator("tbody tr").first.wait_for()
    rows = dict(r.split("\t") for r in numbers.locator("tbody tr").all_inner_texts())
    assert rows["SFT 25k, MLP, layer 2"] == planted.partition(": ")[2]


FADED = "[...document.querySelectorAll('[data-chart=by-budget-capability] [role=graphics-symbol][tabindex]')]"
FADED += ".filter(m => Number(m.getAttribute('opacity') ?? 1) < 0.2).length"


def test_a_legend_entry_singles_out_an_objective(browser: Any, page: Path):
    tab, seen = opened(browser, page)
    chart = drawn(tab, "by-budget-capability")
    chart.locator(".role-legend-symbol path").first.click(timeout=15_000)
    chrome.until(tab, f"{FADED} > 0")
    assert seen.console == []


def test_legend_folds_and_budget_picker_by_keyboard(browser: Any, page: Path):
    tab, seen = opened(browser, page)
    chart = drawn(tab, "by-budget-capability")
    assert tab.evaluate(FADED) == 0
    chart.locator('[role="button"][tabindex="0"]').focus()
    tab.keyboard.press("ArrowRight")
    entry = "[document.activeElement.getAttribute('aria-label'), document.activeElement.getAttribute('aria-pressed')]"
    assert tab.evaluate(entry) == ["Single out CFT <SAFE>", "false"]
    tab.keyboard.press("Enter")
    chrome.until(tab, f"{FADED} > 0")
    assert tab.evaluate(entry) == ["Single out CFT <SAFE>", "true"]
    tab.keyboard.press(" ")
    chrome.until(tab, f"{FADED} === 0")
    assert tab.evaluate(entry) == ["Single out CFT <SAFE>", "false"]
    tab.keyboard.press("Shift+Tab")  # to the marks, which come before the legend
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == tab.locator("#tip").inner_text()
    fold = tab.locator("#figure-by-budget-capability details.numbers")
    fold.locator("summary").focus()
    tab.keyboard.press("Enter")
    fold.locator("tbody tr").first.wait_for()
    tab.locator("#budget-picker input:checked").focus()
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("h1").inner_text().startswith("At 25k tokens, ")
    assert seen.console == []


def accessible(tab: Any) -> list[dict[str, str]]:
    """Role, name and description of every element in Chromium's accessibility tree that is not ignored."""
    tree = tab.context.new_cdp_session(tab).send("Accessibility.getFullAXTree")["nodes"]
    keys = ("role", "name", "description")
    return [{k: str(n.get(k, {}).get("value", "")) for k in keys} for n in tree if not n["ignored"]]


def test_every_chart_has_a_text_alternative_from_its_data(browser: Any, page: Path):
    tab, _ = opened(browser, page)
    names = [holder.get_attribute("data-chart") for holder in tab.locator(".chart").all()]
    for name in names:
        drawn(tab, name)
    nodes = accessible(tab)
    titles = tab.evaluate("[...document.querySelectorAll('figure h3, figure h4')].map(h => h.textContent)")
    described = {n["name"]: n["description"] for n in nodes if n["description"]}
    assert len(names) == len(titles) > 8
    rates = pd.read_csv(page.parent / "tables/rates.csv")
    for title in titles:
        assert re.search(r"(Lowest|Highest|Only): .*\d", described[title]), title
    own = rates[(rates["measure"] == "accuracy") & (rates["budget"] == 100_000)].sort_values("rate").iloc[-1]
    label = formatting.objective_name(own["objective"], own["condition"])
    highest = f"Highest: {label} at 100k tokens, Capability: accuracy: {100 * own['rate']:.1f}%, n {own['n']}."
    assert highest in described["Capability: accuracy, by budget"]
    marks = {n["name"] for n in nodes if n["role"] == "graphics-symbol"}
    assert any(m.startswith(f"{label} at 100k tokens, Capability: accuracy: {100 * own['rate']:.1f}%") for m in marks)
    assert f"Single out {label}" in {n["name"] for n in nodes if n["role"] == "button"}
    assert not [n for n in nodes if n["role"] in ("graphics-symbol", "button", "table", "figure") and not n["name"]]


def test_an_audit_of_one_eval_fits_a_phone(browser: Any, tmp_path: Path):
    audited = report.build(synthetic.audit_of_sycophancy(tmp_path / "run"))
    tab, seen = opened(browser, audited, 360, 800)
    drawn(tab, "by-budget-sycophancy")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.evaluate(SCROLLING) == []
    assert seen.console == []


SCROLLING = "[...document.querySelectorAll('*')].filter(e => e.checkVisibility() && e !== document.documentElement"
SCROLLING += " && e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX))"
SCROLLING += ".map(e => e.getAttribute('aria-label'))"


def test_one_scroll_box_at_most(browser: Any, page: Path):
    tab, _ = opened(browser, page, 390, 844)
    assert len(tab.evaluate(SCROLLING)) <= 1


def test_page_with_a_hundred_thousand_rows_is_responsive(browser: Any, page: Path, tmp_path: Path):
    """Generous bounds for a busy machine; docs/log.md has what was measured of a whole report."""
    many = synthetic.lengthened(synthetic.rows(capability=1_000, prompts=310, items=400))
    assert len(many) > 100_000
    packed = embed_rows(many, synthetic.CONDITIONS, [])
    assert (packed.rows, packed.left_out) == (len(many), "")
    small = page.read_text(encoding="utf-8")
    large = tmp_path / "large.html"
    large.write_text(re.sub(r'(id="rows">)[^<]*', lambda m: m.group(1) + packed.data, small), encoding="utf-8")
    loaded = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    usual = opened(browser, page)[0].evaluate(loaded)
    tab, seen = opened(browser, large)
    load = tab.evaluate(loaded)
    assert 0 < load < max(4_000, 10 * usual)  # a busy machine is slow on both
    watch = (
        "new PerformanceObserver((l) => { for (const e of l.getEntries()) longest = Math.max(longest, e.duration); })"
    )
    tab.evaluate(f"window.longest = 0; {watch}.observe({{ type: 'longtask' }})")
    tab.locator("#search-form button.main").click()
    chrome.until(tab, "/^[0-9]/.test(document.getElementById('search-count').textContent)", 30)
    assert tab.locator("#search-count").inner_text().startswith(f"{len(many):,} of {len(many):,} responses")
    tab.locator("#f-text").fill("no such words")
    chrome.until(tab, "/^No /.test(document.getElementById('search-count').textContent)", 30)
    assert tab.evaluate("window.longest") < max(1_000, 5 * usual)
    assert seen.console == []
