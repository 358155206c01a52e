"""Names of nobody's choosing stay text: every output is read back by a parser of its own kind."""

import ast
import html.parser
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from smoot_hf.evaluation.results import Measurement, Results, Row
from smoot_hf.experiments import html_page, report
from smoot_hf.markup import figure_text, markdown_code, markdown_link, markdown_text, one_line
from smoot_hf.publishing.card import card_text
from smoot_hf.publishing.metadata import metadata

# Old releases of matplotlib warn of what their own dependencies will drop; its font lacks most of the world's letters.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*"),
    pytest.mark.filterwarnings("ignore:Glyph .* missing from font:UserWarning"),
]

# What has a meaning somewhere, alone and together with anything.
PIECES = [
    *(
        "#",
        "# ",
        "- ",
        "1. ",
        "1) ",
        "> ",
        "+ ",
        "* ",
        "---",
        "===",
        "```",
        "~~~",
        "`",
        "``",
        "*",
        "**",
        "_",
        "__",
        "~~",
    ),
    *("[", "]", "(", ")", "[a](http://x.y)", "![a](http://x.y/z.png)", "[^1]", "[x] ", "<b>", "</code>", "<script>"),
    *(
        "<!--",
        "-->",
        "<http://x.y>",
        "http://x.y",
        "www.x.yz",
        "a@b.cd",
        "&amp;",
        "&#35;",
        "&",
        "|",
        "\\|",
        "\\",
        "\\(",
    ),
    *("$", "$$", "$x$", r"\$", "$\\frac{", ":", ": ", "{{ a }}", "{% raw %}", "%", '"', "'", "\n", "\n\n", "\r", "\t"),
    *("\0", "\x1b[31m", "\x85", "\u2028", "\ud800", "\u202e", "…", "猫", "🐈", "a", "b c", "n01440764_tench", " "),
]
NASTY = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=8).map("".join)


class Text(html.parser.HTMLParser):
    """The text of an HTML page, and its tags."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.comments = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)

    def handle_comment(self, data):
        self.comments.append(data)


def rendered(source):
    """As GitHub and the Hub do, with raw HTML taken for what it is and bare addresses for links."""
    page = Text(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(source))
    return page.tags, [part for part in page.text if part.strip()]


def squeezed(text):
    """Without white space, of which HTML and Markdown keep what they like."""
    return "".join(text.split())


PLACES = {
    "heading": ("# {}\n", ["h1"]),
    "paragraph": ("It knows {}, and more.\n", ["p"]),
    "item": ("- {}: 1\n", ["ul", "li"]),
    "cell": ("| a | b |\n|---|---|\n| {} | c |\n", ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]),
}


@pytest.mark.parametrize("place", PLACES)
@given(name=NASTY)
def test_a_name_is_text_in_markdown(place, name):
    """Fault: a class name that adds a heading, a result, a picture, a column or HTML to a published card."""
    frame, tags = PLACES[place]
    expected = rendered(frame.format("word"))
    assert expected[0] == tags
    found = rendered(frame.format(markdown_text(name)))
    assert found[0] == tags
    whole = "".join(found[1]).strip()
    assert whole == "".join(expected[1]).replace("word", one_line(name)).strip()


@pytest.mark.parametrize("place", PLACES)
@given(name=NASTY)
def test_a_value_is_code_in_markdown(place, name):
    """Fault: a value with a backtick or a bar that ends its code or its cell."""
    frame, tags = PLACES[place]
    found = rendered(frame.format(markdown_code(name)))
    assert [tag for tag in found[0] if tag != "code"] == tags
    assert found[0].count("code") == 1
    expected = "".join(rendered(frame.format("word"))[1]).replace("word", one_line(name))
    assert "".join(found[1]).strip() == expected.strip()


@given(name=NASTY, place=NASTY)
def test_a_link_leads_where_it_is_said_to(name, place):
    """Fault: a data set's name that closes the link and opens another."""
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(
        f"from {markdown_link(name, f'https://huggingface.co/{place}')} on"
    )
    links = [token for token in tokens[1].children if token.type == "link_open"]
    assert len(tokens) == 3
    assert len(links) == 1
    assert re.fullmatch(r"https://huggingface\.co/[!-~]*", links[0].attrGet("href"))


@pytest.mark.parametrize("name", ["www.x.yz", "http://x.y", "see https://x.y/z", "a@b.cd", "WWW.x.yz"])
def test_a_bare_address_is_no_link(name):
    """Fault: a class name that GitHub's Markdown makes a link of, without any markup."""
    for bare in re.findall(r"www\.|https?://|@", name, re.IGNORECASE):
        assert bare not in markdown_text(name)


@given(name=NASTY)
def test_a_name_is_one_line_that_can_be_encoded(name):
    """Fault: a heading of two lines, a terminal's colours, a file that cannot be written."""
    text = one_line(name)
    assert text.encode().decode() == text
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text)


@given(name=NASTY)
def test_a_name_is_text_in_a_figure(name):
    """Fault: dollar signs that are TeX to matplotlib, which ends a training at its card; a label left out."""
    figure = Figure()
    axes = figure.subplots()
    text = figure_text(name)
    axes.plot([0, 1], label=text or "-")
    title = axes.set_title(text)
    # What is drawn, by matplotlib's own reading.
    assert title._preprocess_math(title.get_text()) == (figure_text(name).replace(r"\$", "$"), False)
    assert len(axes.get_legend_handles_labels()[1]) == 1
    shown = title._preprocess_math(title.get_text())[0].strip()
    assert shown == one_line(name)[:60] or shown.endswith("…")
    figure.draw_without_rendering()


def test_a_long_name_is_cut():
    """Fault: a name of a thousand letters makes a figure that is too wide to be saved."""
    assert figure_text("a" * 1000, most=10) == "a" * 9 + "…"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NASTY)
def test_a_name_is_text_in_the_report(tmp_path, name):
    """Fault: a data set's or a method's name that adds a tag, a script or a comment to report.html."""
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"")

    def page(name):
        report.write_report(
            tmp_path / "report.html", title=name, introduction=[name], verdict=[name],
            evidence=html_page.paragraphs([name]), tables={"Table": html_page.html_table([name], {name: [[name]]})},
            figures=[(name, name, picture)], results=Results("train", {name: {name: [name]}}, {"python": name}, []),
        )  # fmt: skip
        return Text((tmp_path / "report.html").read_text("utf-8"))

    expected, found = page("word"), page(name)
    assert found.tags == expected.tags
    assert found.comments == []
    assert squeezed("".join(found.text)) == squeezed("".join(expected.text).replace("word", one_line(name)))


@given(name=NASTY)
def test_a_name_is_text_in_a_table_of_results(name):
    """Fault: the name of a method, or of an attribution function such as <lambda>, that is markup in table.md."""
    measured = {"accuracy": Measurement({0: 1.0})}

    def table(name):
        return rendered(
            Results("t", {}, {}, [Row(name, measured, {"description": name})]).markdown_table({"accuracy": "a"})
        )

    expected, found = table("word"), table(name)
    assert found[0] == expected[0]
    assert squeezed("".join(found[1])) == squeezed("".join(expected[1]).replace("word", one_line(name)))


def card_of(name):
    """A card in which everything that others choose is called `name`."""
    about = {
        "name": name, "repo": name, "base_model": name, "base_model_id": None, "is_finetuned": True, "dataset": name,
        "dataset_id": "someone/noise", "dataset_config": name, "dataset_revision": name, "dataset_fingerprint": name,
        "train_images": 10, "eval_images": 5, "has_eval_sets": False, "model": name, "parameters": 3,
        "classes": [name, name], "has_processor": True, "processor_agrees": True, "needs_code": False,
        "needs_timm": False, "is_grey": False, "is_multi_label": False,
    }  # fmt: skip
    first = Row("smoot", {name: Measurement({0: 0.5}, "as reported")})
    curve = {"n": 5, "deletion": {"interval": None}}
    second = Row("smoot", {"deletion_auc": Measurement({0: 40.0})}, {"description": name}, {"by_seed": {"0": curve}})
    settings = {"method": "smoot", "seed": 0, name: name, "epochs": 1.0, "steps": 2}
    results = Results("train", settings, {"python": name}, [first, second])
    given = {"tags": [name], "tasks": name, "language": name, "license": name}
    data = metadata(results, about, given, "transformers")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(results, about, {})}"), data


@given(name=NASTY.filter(lambda name: name not in ("method", "seed", "epochs", "steps", "loss", "")))
def test_a_name_is_text_in_the_whole_card(tmp_path_factory, name):
    """Fault: a class of a downloaded data set that adds results, pictures, HTML or metadata to a published card."""
    (expected, _), (card, data) = card_of("word"), card_of(name)
    path = tmp_path_factory.getbasetemp() / "README.md"
    card.save(path)
    card = ModelCard.load(path)
    assert card.data.to_dict() == data.to_dict()
    head = yaml.safe_load(path.read_bytes().decode().split("\n---", 1)[0])
    assert head["model-index"][0]["name"] == name
    assert head["language"] == head["license"] == name
    assert name in head["tags"]
    found, wanted = rendered(card.text), rendered(expected.text)
    assert [tag for tag in found[0] if tag != "code"] == [tag for tag in wanted[0] if tag != "code"]
    repository = json.dumps(one_line(name), ensure_ascii=False)
    assert card.text.count(f"repo = {repository}\n") == 1
    assert ast.literal_eval(repository) == one_line(name)
    said = squeezed("".join(wanted[1]).replace('"word"', repository).replace("word", one_line(name)))
    assert squeezed("".join(found[1])) == said
