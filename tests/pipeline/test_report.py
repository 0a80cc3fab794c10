"""The report: inert whatever a model wrote, the same bytes for the same facts, honest about differences, no number lost."""

import copy
import math
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from pipeline.report import render, text, words
from tests.pipeline.report_facts import cell, make

ROOT = Path(__file__).parents[2]
MISSING = re.compile(r"\b([Nn]a[Nn]|[Ii]nf(inity)?|None)\b")
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>\"' onload='x' </pre></title></style></svg><svg onload=x>"
    "<a href=javascript:x>{{7*7}}{% raw %}&lt;$x^2$ ]]>--> \u202egnp.\u200b\x00\x1b[31m\x85\ud800\r\u2028end"
)


CASES = {
    "seeds": {},
    "one seed": {"seeds": (7,)},
    "no controls": {"controls": ()},
    "no weights": {"diem": False},
    "greedy only": {"exact": False},
    "nothing scored": {"scored": False},
    "one stage": {"seeds": (0,), "stages": 1, "controls": ("control",)},
    "many stages": {"stages": 12},
    "no validity": {"valid": False},
}


@cache
def page_of(case):
    return render(make(**CASES[case]))


class Page(HTMLParser):
    """What a browser would make of a page: tags with attributes, text, and whether every element is closed."""

    VOID = ("meta", "path", "use", "rect")

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.words, self.pre = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "pre":
            self.pre.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if "pre" in self.open:
            self.pre[-1] += data

    def shapes(self):
        return {(tag, name) for tag, attributes in self.tags for name in (*attributes, "")}

    def said(self):
        return " ".join(" ".join(self.words).split())


def replace_texts(value, by):
    """Return facts with `by` appended to every text that comes from data: prompts, answers, names, labels, settings."""
    if isinstance(value, list):
        return [replace_texts(v, by) for v in value]
    if isinstance(value, dict):
        named = ("abilities", "cosines", "influence", "reasons", "drawn", "weights", "seconds", "excluded")
        return {
            k: {f"{name}{by}": v for name, v in d.items()} if k in named else replace_texts(d, by)
            for k, d in value.items()
        }
    return value + by if isinstance(value, str) else value


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_gives_a_whole_page(case):
    """Elements are closed, pictures are XML, nothing is loaded or run, and no number is missing its value."""
    page = page_of(case)
    parsed = Page(page)
    assert parsed.open == []
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) >= 4
    for svg in svgs:
        ElementTree.fromstring(svg)
    assert not {"script", "link", "iframe", "img", "a", "form"} & {tag for tag, _ in parsed.tags}
    assert all(v.startswith("#") for _, a in parsed.tags for k, v in a.items() if k in ("href", "xlink:href", "src"))
    assert all(at.startswith("url(#") for at in re.findall(r"url\(.{3}", page))
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert not MISSING.search(page)
    assert len(page.encode()) < 400_000


def test_what_the_page_says_of_each_case():
    """One seed has no interval, weights that were off are said to be off, and so on."""
    said = {case: Page(page_of(case)).said() for case in CASES}
    assert (
        "Test expected reward 0.550 after 90 steps and 13,920 rollouts, from 0.332 at the start; random"
        in said["seeds"]
    )
    assert "seeds 0, 1, 2" in said["seeds"] and "0.550 ± 0.030" in said["seeds"] and "480 shuffle" in said["seeds"]
    assert "432 influence, 48 floor" in said["seeds"] and "20 of 40 prompts observed" in said["seeds"]
    assert "one seed, no interval" in said["one seed"] and "seed 7" in said["one seed"] and "±" not in said["one seed"]
    assert "No control was run" in said["no controls"] and "curriculum minus" not in said["no controls"]
    assert "Weights were off" in said["no weights"]
    assert "Test greedy accuracy 0.550" in said["greedy only"]
    assert "No stage was scored" in said["nothing scored"]
    assert "nothing to compare" in said["one stage"]
    assert "after 180 steps: 128 prompts with 8 rollouts each, of which 60 have a gradient; 24 of" in said["seeds"]
    assert "cosine to the exact gradient of the expected reward is 0.80" in said["seeds"]
    assert (
        "CROPI cosine 0.40, dot product \u2013" in said["seeds"]
        and "bfloat16 have a mean cosine of 0.9987" in said["seeds"]
    )
    assert "Not measured in this run: influent evaluate --validity" in said["no validity"]


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (
            cell(0.02, 0.01, 3),
            "ahead of the random control of equal steps by 0.020 (95 % interval +0.010 to +0.030, 3 paired seeds).",
        ),
        (
            cell(0.02, 0.03, 3),
            "by 0.020, but this is no clear difference: the interval contains zero (95 % interval \u22120.010 to",
        ),
        (
            cell(-0.02, 0.01, 5),
            "behind the random control of equal steps by 0.020 (95 % interval \u22120.030 to \u22120.010, 5 paired",
        ),
        (cell(-0.02, 0.03, 3), "behind the random control of equal steps by 0.020, but this is no clear difference"),
        (cell(-0.02), "behind the random control of equal steps by 0.020: one seed, no interval"),
        (cell(0.0, 0.0, 3), "level with the random control of equal steps, but this is no clear difference"),
        (cell(math.nan), "The difference to the random control of equal steps was not measured."),
    ],
)
def test_differences_are_said_plainly(difference, expected):
    """A loss is called one, and an interval that contains zero is never sold as a gain."""
    assert expected in words.describe(text.clean(make(difference=difference)))["verdicts"][0]["text"]


def test_weights_of_one_are_said_to_be_plain():
    """Where every weight was one, the page says so, for all stages or for some."""
    facts = make()
    facts["diem"][0]["identity"] = True
    some = words.describe(facts)["diem_line"]
    assert some.startswith("In stage 1 every weight was one, which is plain GRPO. Stage 0 was trained without weights")
    facts["diem"][1]["identity"] = True
    assert "Every weight was one: the steps were plain GRPO" in words.describe(facts)["diem_line"]


def test_hostile_text_is_inert_and_visible():
    """Hostile text in every field adds no element and no attribute, and is there to read, in ``pre``, signs and all."""
    page = render(replace_texts(make(seeds=(7,)), HOSTILE))
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.shapes() <= Page(page_of("one seed")).shapes()
    assert not any(not (c.isprintable() or c in "\n\t") for c in page)
    assert page.encode().decode() == page
    shown = [pre for pre in parsed.pre if pre.startswith("1+1=<script>")]
    assert shown and all(
        "{{7*7}}" in pre and "\u2039U+202E\u203agnp." in pre and "\u2039U+001B\u203a[31m" in pre for pre in shown
    )
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def test_the_same_facts_give_the_same_bytes(tmp_path):
    """Twice, in another process with another hash seed, and under a user's own matplotlib settings, which stay as they were."""
    facts = make(seeds=(0,), stages=2)
    page = render(facts)
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert render(copy.deepcopy(facts)) == page
        assert dict(matplotlib.rcParams) == before
    script = tmp_path / "again.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nfrom pipeline.report import render\n"
        f"sys.stdout.buffer.write(render({facts!r}).encode())"
    )
    environment = {"PYTHONHASHSEED": "3", "HOME": str(tmp_path)}
    again = subprocess.run([sys.executable, script], capture_output=True, check=True, env=environment)
    assert again.stdout.decode() == page


def test_numbers_that_are_not_finite_count_as_missing():
    """NaN, infinity and None anywhere leave a dash or a smaller sample, never their name."""
    facts = make()
    facts["stages"][1]["influence"]["validation_add"][:3] = [math.nan, math.inf, None]
    facts["stages"][1]["best"][0]["cosines"]["validation_add"] = math.nan
    facts["beliefs"]["after"]["mean"][0] = math.nan
    facts["diem"][0]["weights"]["add"][0] = math.nan
    facts["diem"][0]["cosine_to_plain"] = math.nan
    facts["overlap"][0][1] = math.nan
    facts["summary"]["runs"][0]["arms"]["control"]["curve"][2]["sets"]["test"]["expected_reward"] = math.nan
    facts["summary"]["final"]["control"]["test"]["expected_reward"]["mean"] = None
    assert not MISSING.search(render(facts))


def test_many_names_and_long_texts_cost_little():
    """Fifty abilities make pictures of twelve rows whose counts still add up; a long prompt is cut, and says so."""
    facts = make(seeds=(0,), stages=2)
    facts["stages"][0]["abilities"], facts["stages"][1]["abilities"] = {f"kind {i}": 100 - i for i in range(50)}, {}
    facts["diem"][0]["weights"] = {f"kind {i}": [1.0, 1.1] for i in range(50)}
    facts["stages"][1]["best"][0]["prompt"] = "x" * 1_000_000
    said = Page(render(facts)).said()
    assert said.count("39 others") == 2 and f" {sum(100 - i for i in range(11, 50)):,} " in said
    assert "(999,400 more characters)" in said and len(said) < 20_000


def test_clean_takes_arrays_and_refuses_objects():
    """Arrays and their scalars become lists and numbers; what cannot be shown is an error that names its type."""
    assert text.clean({"a": np.array([1.0, math.nan]), "b": (np.float32(2), np.int64(3), True)}) == {
        "a": [1.0, None],
        "b": [2.0, 3, True],
    }
    with pytest.raises(TypeError, match="got object"):
        text.clean([object()])


def test_importing_the_report_is_free():
    """Neither the plotting nor the template library is imported before a page is wanted."""
    code = "import sys, pipeline.report; sys.exit(bool({'matplotlib', 'jinja2', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
