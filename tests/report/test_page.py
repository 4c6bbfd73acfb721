"""The page of a federation: what it says, that it needs nothing else, and that a browser shows it."""

import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from run_records import Clocked, done, federation, start

from pellm_lightning.cli import commands
from pellm_lightning.report import figures, page
from pellm_lightning.report.chart import Chart, Series, bin_means, downsample, shorten
from pellm_lightning.report.figures import lower_is_better
from pellm_lightning.report.record import Validation
from pellm_lightning.report.runs import find

VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = "<script>alert('a & b')</script>"


class Page(HTMLParser):
    """A page's elements, texts and attributes; every element must be closed where it belongs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row[0] == first)


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parties that come and go; one is left out in a round; two trained alone."""
    folder = tmp_path_factory.mktemp("eight")
    names = ["berlin", "london", "bern", "mayo", "kyoto", "lima", "cape-town", "oslo"]
    federation(
        folder / "federated",
        names,
        200,
        away=lambda party, index: party == 2 and 20 <= index < 30,
        broken=lambda party, index: party == 3 and index == 40,
        validate_every=5,
    )
    for name in ("berlin", "nowhere"):
        record = Clocked(folder / f"alone-{name}" / "rounds.jsonl")
        start(record, 0, ["0"])
        for index in range(5):
            record.round(done(index, [0], local_loss=2.0 - index / 5), step=100 * (index + 1), epoch=0)
            record.validation(Validation({"val_loss": 2.5}, {}, round=index, step=100 * (index + 1), epoch=0))
        record.end(None)
    return folder


@pytest.fixture(scope="module")
def shown(eight: Path) -> str:
    return page.html(find(eight))


def test_the_page_tells_who_what_and_how_it_ended(shown: str) -> None:
    told = Page(shown)
    for words in (
        "A federation of 8 parties: CausalLM",
        "Outcome finished Parties 8 Rounds 200 Optimizer steps 2,000",
        "Parties berlin, london, bern, mayo, kyoto, lima, cape-town and oslo trained CausalLM together",
        # 4 bytes each.
        "Of its 1,000,000 parameters 50,000 (5 %) take part in the rounds, in 12 LoRA modules; they leave a"
        " party once a round, 200 kB as 32-bit numbers. The other parties could see each party's values.",
        "There were 200 rounds, with one due every 10 optimizer steps",
        "Missing: party bern in 10 rounds.",
        "healed by the result: party mayo in 1.",
        # 0.4 sqrt(200).
        "Differential privacy has cost epsilon = 5.657.",
        "(alone-berlin and alone-nowhere), drawn dashed",
    ):
        assert words in told.text
    assert told.row("bern")[5:7] == ["190", "2,000"]
    # Every fifth round is followed by a validation; losses fall, so the last is best, round 195:
    # 1 + 2 exp(-4 * 195 / 200) + 0.2 = 1.2405.
    assert told.row("val_loss") == ["val_loss", "lower", "3.2", "1.24", "1.24", "after round 195"]
    assert told.row("val_accuracy")[1] == "higher"
    assert told.row("40")[:5] == ["40", "410", "7 of 8", "mayo", ""]
    assert told.row("25")[:5] == ["25", "260", "7 of 8", "", "bern"]


def test_a_figure_is_there_only_for_what_there_is(shown: str, tmp_path: Path) -> None:
    drawn = {found["id"] for found in Page(shown).all("figure")}
    assert drawn == {
        "loss", "metric-0", "metric-1", "loss-alone", "membership", "trained", "shares", "updates",
        "distances",
        "deviation", "outer-lr", "seconds", "seconds-by-party", "bytes", "epsilon",
    }  # fmt: skip
    record = Clocked(tmp_path / "rounds.jsonl")
    start(record, 0, ["only"])
    record.round(done(0, [0]), step=1, epoch=0)
    drawn = {found["id"] for found in Page(page.html(find(tmp_path))).all("figure")}
    assert drawn == {"loss", "updates", "distances", "seconds", "bytes"}


def test_every_figure_says_what_it_shows_and_what_is_bad(shown: str) -> None:
    told = Page(shown)
    ids = {attributes["id"] for _, attributes in told.elements if "id" in attributes}
    pictures = [found for found in told.all("svg") if "role" in found]
    assert len(pictures) == len(told.all("figure")) == len(told.all("figcaption"))
    for found in pictures:
        assert found["role"] == "img"
        assert set(str(found["aria-labelledby"]).split()) <= ids
    assert told.text.count("bad sign") + told.text.count("Large for one party only") >= len(pictures)
    assert "worst module, at last model.layers.1.q_proj" in told.text
    assert "all parties: from" in told.text  # what a screen reader is told of a line
    for table in re.findall(r"<table.*?</table>", shown, re.DOTALL):
        assert '<th scope="col">' in table
        assert '<th scope="row">' in table


def test_ids_are_of_one_figure_only_and_lead_somewhere(shown: str) -> None:
    told = Page(shown)
    ids = [attributes["id"] for _, attributes in told.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg viewBox.*?</svg>", shown, re.DOTALL):
        inside = set(re.findall(r'id="([^"]*)"', svg))
        assert set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg)) <= {(i, "") for i in inside} | {
            ("", i) for i in inside
        }


def test_every_colour_of_a_figure_has_one_for_dark_mode(shown: str) -> None:
    (style,) = re.findall(r"<style>.*?</style>", shown, re.DOTALL)
    drawn = set(re.findall(r"(?:fill|stroke): #\w+", shown.replace(style, "")))
    assert len(drawn) > 10
    for declaration in drawn:
        assert f'[style*="{declaration}"] {{ {declaration.partition(":")[0]}: var(--' in style


def test_the_page_needs_nothing_from_outside(shown: str) -> None:
    told = Page(shown)
    assert not {tag for tag, _ in told.elements} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "base",
        "form",
    }
    for _, attributes in told.elements:
        for name, value in attributes.items():
            assert name != "src"
            assert not name.startswith("on")
            if name.endswith("href"):
                assert str(value).startswith("#")
    assert "http://" not in shown
    assert "https://" not in shown
    assert "@import" not in shown
    (policy,) = [m["content"] for m in told.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_what_comes_out_of_a_record_is_text_and_never_markup(tmp_path: Path) -> None:
    names = [EVIL, "$x$ & \"y'", "ordinary"]
    for party in range(3):
        record = Clocked(tmp_path / f"party-{party}" / "rounds.jsonl")
        facts = {"settings": {EVIL: EVIL}, "config": EVIL, "module": EVIL, "device": EVIL, "precision": EVIL}
        start(record, party, names, **facts)
        record.round(done(0, range(3)), step=1, epoch=0)
        record.validation(Validation({EVIL: 1.0}, {EVIL: 1.0}, round=0, step=1, epoch=0))
        record.end(EVIL)
    text = page.html(find(tmp_path))
    told = Page(text)
    assert "<script" not in text
    assert "script" not in {tag for tag, _ in told.elements}
    assert f"Party {EVIL} failed after round 0: {EVIL}" in told.text
    assert told.row(EVIL)[0] == EVIL
    # In a figure, as the name of a row: cut, but as it is written.
    assert "$x$ & \"y'" in told.texts
    assert shorten(EVIL) in told.texts


def test_what_is_missing_or_failed_stands_on_top(tmp_path: Path) -> None:
    federation(tmp_path, ["a", "b", "c"], 4, of=[1], private=False)
    path = tmp_path / "party-1" / "rounds.jsonl"
    top = page.html(find(tmp_path)).partition("</header>")[0]
    assert (
        "Of parties a and c there is no record here. What is shown of them is what party b received." in top
    )
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + '{"event": "rou')  # killed while it wrote
    text = page.html(find(tmp_path))
    assert "Party b's record stops after round 3" in text.partition("</header>")[0]
    assert "no end recorded" in Page(text).text
    ended = json.loads(lines[-1]) | {"failed": "TimeoutError: party 2 is late"}
    path.write_text("".join(lines[:-1]) + json.dumps(ended) + "\n")
    text = page.html(find(tmp_path))
    assert "Party b failed after round 3: TimeoutError: party 2 is late" in text.partition("</header>")[0]


def test_what_a_figure_says_is_what_it_was_given(tmp_path: Path) -> None:
    names = ["v1.23456", 'a "#000001" id="x"', "京都"]  # which the font that measures has not
    for party in range(3):
        record = Clocked(tmp_path / f"party-{party}" / "rounds.jsonl")
        start(record, party, names)
        for index in range(3):
            record.round(done(index, range(3)), step=index, epoch=0)
        record.end(None)
    told = Page(page.html(find(tmp_path)))
    assert {"v1.23456", shorten(names[1]), "京都"} <= set(told.texts)
    chart = Chart("a", "b")
    chart.line([(0, 0.0041), (1, 0.0049)], Series("e", "ink"))
    svg = chart.svg()
    assert {"0.0042", "0.0048"} <= set(re.findall(r"<text[^>]*>([^<]*)<", svg))
    assert not re.search(r"<path[^>]*\.\d{3}", svg)  # of points a hundredth is enough


def test_what_is_unknown_of_a_round_s_time_does_not_count_as_nothing(tmp_path: Path) -> None:
    """Party 1 misses round 1, so nobody knows how long it trained for round 2."""
    for party, here in ((0, (0, 1, 2)), (1, (0, 2))):
        record = Clocked(tmp_path / f"party-{party}" / "rounds.jsonl")
        start(record.at(0), party, ["a", "b"])
        for index in here:
            parties = [0] if index == 1 else [0, 1]
            report = done(index, parties, waited_seconds=1.0, seconds=1.0, stalled_seconds=2.0)
            record.at(10.0 * (index + 1)).round(report, step=index, epoch=0)
        record.end(None)
    fit = find(tmp_path).fit
    assert fit.records[1].rounds[2].training_seconds is None
    mean = fit.mean("training_seconds")
    assert mean == pytest.approx(dict.fromkeys(range(3), 8.0), abs=0.1)


def test_parties_that_validate_at_different_moments_have_no_best_mean(tmp_path: Path) -> None:
    for party in range(2):
        record = Clocked(tmp_path / f"party-{party}" / "rounds.jsonl")
        start(record, party, ["a", "b"])
        record.round(done(0, [0, 1]), step=1, epoch=0)
        record.validation(Validation({"m": 1.0}, {"m": 1.0 + party}, round=0, step=1 + party, epoch=0))
        record.end(None)
    text = Page(page.html(find(tmp_path))).text
    assert "Means over some of the parties, which validated at a moment of their own, are left out." in text
    assert "Best m" not in text


def test_a_single_round_is_told_as_one_and_none_as_none(tmp_path: Path) -> None:
    record = Clocked(tmp_path / "rounds.jsonl")
    start(record, 0, ["only"])
    assert "One party was to train CausalLM on its own data" in Page(page.html(find(tmp_path))).text
    record.round(done(0, [0]), step=1, epoch=0)
    text = Page(page.html(find(tmp_path))).text
    assert "There was 1 round, with one due every 10 optimizer steps" in text
    assert "The training loss was 1." in text
    assert "Training loss 1 Sent" in text


def test_versions_that_differ_are_marked(tmp_path: Path) -> None:
    for party, torch in enumerate(("2.6", "2.13")):
        record = Clocked(tmp_path / f"party-{party}" / "rounds.jsonl")
        start(record, party, ["a", "b"])
        record.round(done(0, [0, 1]), step=1, epoch=0)
        record.end(None)
        text = record.path.read_text()
        record.path.write_text(re.sub(r'"torch": "[^"]*"', f'"torch": "{torch}"', text))
    text = page.html(find(tmp_path))
    assert "different versions of torch: 2.13, 2.6." in text
    row = re.search(r'<tr><th scope="row">torch</th>.*?</tr>', text)
    assert row is not None
    assert row.group().count('<td class="differs">') == 2
    assert '<th scope="row">lightning</th><td>' in text


def test_ten_thousand_rounds_are_thinned_out_and_it_says_so(tmp_path: Path) -> None:
    for party in range(2):
        record = Clocked(tmp_path / f"party-{party}" / "rounds.jsonl")
        start(record, party, ["a", "b"])
        record.round(done(0, [0, 1]), step=1, epoch=0)
        lines = record.path.read_text().splitlines()
        event = json.loads(lines[-1])
        with record.path.open("a") as file:
            for index in range(1, 10_000):
                here = [0] if party == 0 and index % 2 else [0, 1]
                if party in here:
                    loss = 9.5 if index == 5001 else 1.0
                    file.write(json.dumps(event | {"round": index, "parties": here, "loss": loss}) + "\n")
    text = page.html(find(tmp_path))
    assert len(text) < 500_000
    assert "Thinned out to about 400 points" in text
    assert "Round by round, one in 25 and the last" in text
    assert Page(text).row("9999")[0] == "9999"
    points = downsample([(i, 9.5 if i == 5001 else 1.0) for i in range(10_000)])
    assert len(points) <= 402
    assert (5001, 9.5) in points
    assert points[0] == (0, 1.0)
    assert points[-1] == (9999, 1.0)


def test_lines_of_very_many_parties_share_a_name(tmp_path: Path) -> None:
    federation(tmp_path, [str(party) for party in range(25)], 3)
    learning = figures.charts(find(tmp_path))["Learning"]
    (metric,) = [chart for chart in learning if chart.title == "Validation: val_loss"]
    assert [series.label for series in metric.legend] == ["each party", "all parties"]


def test_two_hundred_rounds_of_eight_parties_stay_small(shown: str) -> None:
    assert len(shown) < 600_000


def test_steps_stand_around_their_rounds() -> None:
    assert bin_means([3, 4], [[1.0, 2.0]]) == ([2.5, 3.5, 4.5], [[1.0, 2.0]])
    assert bin_means(range(5), [[1.0, 2.0, 3.0, 4.0, 5.0]], most=3) == (
        [-0.5, 1.5, 3.5, 4.5],
        [[1.5, 3.5, 5.0]],
    )


@pytest.mark.parametrize(
    "metric", ["val_loss", "val/perplexity", "wer", "test-RMSE", "val_loss/dataloader_idx_1"]
)
def test_lower_is_better_for(metric: str) -> None:
    assert lower_is_better(metric)


@pytest.mark.parametrize("metric", ["val_accuracy", "f1", "auroc", "answer_rate", "bleu"])
def test_higher_is_better_for(metric: str) -> None:
    assert not lower_is_better(metric)


def test_pages_of_the_same_records_are_the_same_to_the_byte(tmp_path: Path) -> None:
    federation(tmp_path, ["a", "b"], 3, private=False)
    settings = dict(matplotlib.rcParams)
    pages: list[str] = []
    for _ in range(2):  # in threads of their own: nothing of matplotlib's is global
        thread = threading.Thread(target=lambda: pages.append(page.html(find(tmp_path))))
        thread.start()
        thread.join()
    assert len(pages) == 2
    assert pages[0] == pages[1]
    assert dict(matplotlib.rcParams) == settings


# ---- the command


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (
            ["/venv/lib/pellm_lightning/__main__.py", "fit", "--a=b c"],
            "python -m pellm_lightning fit '--a=b c'",
        ),
        (["/venv/bin/pellm", "fit", "--config=run.yaml"], "pellm fit --config=run.yaml"),
        (["train.py", "--steps=3"], "python train.py --steps=3"),
    ],
)
def test_a_command_is_shown_as_typed(words: list[str], typed: str) -> None:
    assert page._typed(words) == typed


def test_the_command_writes_the_page_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation(tmp_path / "runs", ["a", "b"], 2, private=False)
    commands.main(["report", str(tmp_path / "runs")])
    commands.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "deep" / "page.html")])
    first, second = (Path(line) for line in capsys.readouterr().out.splitlines())
    assert (first, second) == (tmp_path / "runs" / "report.html", tmp_path / "deep" / "page.html")
    assert first.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert first.read_bytes() == second.read_bytes()


def test_the_command_says_what_makes_a_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no rounds\.jsonl in .*record=True"):
        commands.main(["report", str(tmp_path)])


def test_the_command_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (f"pellm_lightning.report.{part}" for part in ("page", "figures", "chart")):
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(sys.modules["pellm_lightning.report"], name.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'pellm-lightning\[plots\]'"):
        commands.main(["report", str(tmp_path)])


# ---- in a browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: install it, for instance Debian's chromium"
)

# The page itself may run no script: what measures it stands around it.
AROUND = """<!DOCTYPE html><body style="margin:0">
<iframe src="shown.html" width="WIDTH" height="900"></iframe>
<pre id="found"></pre><script>
addEventListener("load", () => {
  const inside = document.querySelector("iframe").contentWindow, its = inside.document
  const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height] }
  document.querySelector("#found").textContent = JSON.stringify({
    figures: [...its.querySelectorAll("figure > svg")].map(box),
    lines: its.querySelectorAll("figure > svg path").length,
    texts: [...its.querySelectorAll("figure > svg text")].filter(e => box(e)[0] == 0).length,
    width: its.documentElement.scrollWidth,
    fetched: inside.performance.getEntriesByType("resource").map(e => e.name),
    ink: inside.getComputedStyle(its.body).color,
  })
})
</script></body>"""


def browse(folder: Path, text: str, width: int, *flags: str) -> tuple[dict[str, Any], list[str]]:
    """Return what a browser without a network makes of a page, and what stands on its console."""
    (folder / "shown.html").write_text(text, encoding="utf-8")
    (folder / "around.html").write_text(AROUND.replace("WIDTH", str(width)))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", "--dump-dom"]
    command += ["--enable-logging=stderr", "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}"]
    # Nothing of its own either: no welcome, no updates, no account.
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync"]
    command += [*flags, (folder / "around.html").as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', ran.stdout)
    assert found, ran.stderr
    return json.loads(found.group(1)), [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
@pytest.mark.parametrize(
    ("width", "flags"), [(1280, ()), (400, ("--blink-settings=preferredColorScheme=0",))]
)
def test_a_browser_shows_all_figures_and_fetches_nothing(
    tmp_path: Path, shown: str, width: int, flags: tuple[str, ...]
) -> None:
    found, console = browse(tmp_path, shown, width, *flags)
    assert console == []
    assert found["fetched"] == []
    assert len(found["figures"]) == 15
    for wide, high in found["figures"]:
        assert 300 < wide <= width
        assert high > 60
    assert found["texts"] == 0
    assert found["lines"] > 200
    assert found["width"] <= width  # nothing to scroll sideways but tables
    dark = bool(flags)
    assert found["ink"] == ("rgb(230, 234, 238)" if dark else "rgb(27, 31, 36)")


@needs_browser
def test_a_browser_would_refuse_what_is_not_in_the_page(tmp_path: Path, shown: str) -> None:
    # Were something to get past the escaping, the page's policy stops it, and the test above would see it.
    evil = '<img src="http://localhost:9/x.png"><script>document.title = "x"</script>'
    _, console = browse(tmp_path, shown.replace("</main>", evil + "</main>"), 1280)
    assert sum("Content Security Policy" in line for line in console) == 2
