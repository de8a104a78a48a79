"""report.html in a real browser: it renders at a desk's and a phone's width, without complaint and without request."""

import re

import pytest

from pretrain.evaluation.report.charts import HeatMap, Line, LineChart
from pretrain.evaluation.report.svg import heat_map_svg, line_chart_svg
from pretrain.evaluation.report.writing import PAGE

FITS = "document.documentElement.scrollWidth <= window.innerWidth"
CHARTS = "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height > 60).length"
ALL_CHARTS = "document.querySelectorAll('svg').length"
SMALLEST = (
    "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
    ".filter(h => h > 0))"
)
TEXT = "document.body.innerText"


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (360, 740)])
def test_the_page_renders_without_complaint_or_request(evaluated, browser, width, height):
    page = evaluated.folder / PAGE
    view = browser.view(page, width, height, [FITS, CHARTS, ALL_CHARTS, SMALLEST, TEXT])
    assert view.complaints == []
    assert [url for url in view.requests if not url.startswith("data:")] == [page.as_uri()]
    assert view.values[FITS]
    assert view.values[CHARTS] == view.values[ALL_CHARTS] >= 10
    assert view.values[SMALLEST] > 7.5
    assert evaluated.report.headline in view.values[TEXT]
    assert len(view.screenshot) > 20_000


def test_the_browser_of_these_tests_sees_a_request_a_complaint_and_an_overflow(tmp_path, browser):
    page = tmp_path / "bad.html"
    page.write_text('<img src="gone.png"><script>console.error("no")</script><div style="width:3000px">wide</div>')
    view = browser.view(page, 360, 740, [FITS])
    assert [url.rsplit("/")[-1] for url in view.requests] == ["bad.html", "gone.png"]
    assert any('"no"' in complaint for complaint in view.complaints)
    assert view.values[FITS] is False


def test_the_page_names_no_address_and_runs_no_script(evaluated):
    text = (evaluated.folder / PAGE).read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|@import|url\(", text)
    assert "nan" not in re.findall(r'points="([^"]*)"', text)


def test_a_chart_puts_values_where_they_belong():
    svg = line_chart_svg(LineChart([Line("a", [(1, 0.0), (2, 1.0), (4, 2.0)])], "x", "y", log_x=True))
    xs, ys = zip(
        *((float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)), strict=True
    )
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert ys[0] > ys[2]
    single = line_chart_svg(LineChart([Line("a", [(3, 1.0)])], "x", "y"))
    assert len(re.findall("<circle", single)) == 1


def test_a_heat_map_is_white_in_its_middle_and_escapes_its_words():
    chart = HeatMap(
        ["<a>"], ["l", "m", "h", "-"], [[-1.0, 0.0, 1.0, None]], x_label="x", y_label="y", low=-1, high=1, middle=0
    )
    svg = heat_map_svg(chart)
    fills = re.findall(r'<rect [^>]*fill="([^"]+)"', svg)
    assert fills[1] == "rgb(255,255,255)"
    assert len(set(fills)) == 4
    assert "&lt;a&gt;" in svg
    assert "not measured" in svg
