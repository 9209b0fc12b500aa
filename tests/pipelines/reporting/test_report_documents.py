"""Reports: what is gathered, how graphs are laid out, and that each form says it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support import REPOSITORY, parse

from qat2int8 import convert
from qat2int8.ir import OutputError
from qat2int8.pipelines.data import Batch
from qat2int8.pipelines.evaluation.activations import Activation
from qat2int8.pipelines.evaluation.compare import Comparison, LayerComparison
from qat2int8.pipelines.evaluation.errors import Errors
from qat2int8.pipelines.evaluation.evaluate import evaluate
from qat2int8.pipelines.evaluation.metrics import METRICS
from qat2int8.pipelines.reporting.boxes import picture
from qat2int8.pipelines.reporting.charts import error_chart, histogram_chart
from qat2int8.pipelines.reporting.collect import collect
from qat2int8.pipelines.reporting.document import Drawing, ReportDocument, worst_first
from qat2int8.pipelines.reporting.drawing import draw
from qat2int8.pipelines.reporting.html import as_html
from qat2int8.pipelines.reporting.interval import interval
from qat2int8.pipelines.reporting.markdown import as_markdown
from qat2int8.pipelines.reporting.schema import SCHEMA, schema_text
from qat2int8.pipelines.reporting.write import write_report

SOURCE = REPOSITORY / "tools" / "demo_data" / "resnet_trt_qat.onnx"
ERRORS = {"first": 41.5, "<worst> & last": 12.25, "exact": math.inf}
VALUES = Activation("first", "relu_1", 0.0, 8.0, (900, 90, 9, 0, 1), 0.0, 4.0, 7)


def comparison() -> Comparison:
    def layer(name: str, db: float) -> LayerComparison:
        local = Errors(db, 0.9, 0.5, 0.01, (9, 1, 0, 0), 0)
        return LayerComparison(name, "Conv", name, name, name, True, Errors(0.0, 0.0, 9.0, 9.0, (), 0), local)

    return Comparison(tuple(layer(name, db) for name, db in ERRORS.items()), (), 40, (), ())


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> ReportDocument:
    """Of the bundled network, with one layer left in float."""
    path = tmp_path_factory.mktemp("report") / "int8.onnx"
    head = next(record.node for record in convert(SOURCE).certificate.compute if record.op_type == "Gemm")
    convert(SOURCE, skip_nodes=[head]).save(path)
    with np.load(SOURCE.with_name("mnist500.npz")) as digits:
        images, labels = digits["images"][:40].astype(np.float32)[:, None] / 255.0, digits["labels"][:40]
    batches = [Batch({"image": images[at : at + 10]}, labels[at : at + 10], at) for at in range(0, 40, 10)]
    evaluation = evaluate({"fake quant": SOURCE, "int8": path}, batches, METRICS["topk"], skip_batches=1)
    return collect(path, SOURCE, evaluation=evaluation, data="40 digits", comparison=comparison(), values=[VALUES])


class _Page(HTMLParser):
    """Element counts, classes, text, and what is fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.classes: dict[str, int] = {}
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.ids: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name == "class":
                for each in (value or "").split():
                    self.classes[each] = self.classes.get(each, 0) + 1
            elif name in ("src", "href") and value and value.startswith("#"):
                self.anchors.add(value[1:])
            elif name in ("src", "href") and value != "data:,":
                self.fetched.append(value or "")
            elif name == "id":
                self.ids.add(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_is_gathered(document: ReportDocument) -> None:
    cards = {card.label: card for card in document.cards}
    assert cards["top-1"].hint.endswith(" points against fake quant")
    assert cards["top-1"].value.endswith(" %")
    assert cards["Speed"].hint == "of fake quant"
    assert cards["Worst layer"].hint == "<worst> & last"
    assert document.layer_errors[0].off_by == (0.9, 0.1, 0.0, 0.0)
    assert (document.histograms[0].tensor, document.histograms[0].grid_hi) == ("relu_1", 4.0)
    assert cards["In integers"].tone == "doubtful"
    assert [layer.integer for layer in document.layers].count(False) == 1
    assert [row.model for row in document.accuracy] == ["fake quant", "int8"]
    assert document.accuracy[1].samples == 40
    low, high = document.accuracy[1].intervals["top-1"]
    assert low < (document.accuracy[1].figures["top-1"] or 0.0) <= high
    assert document.speed[0].ratio == 1.0
    assert (document.speed[1].batches, document.speed[1].batch_size) == (3, 10)
    lower, middle, upper = (
        getattr(document.speed[1], f"ratio{end}") for end in ("_lower_quartile", "", "_upper_quartile")
    )
    assert lower <= middle <= upper
    assert document.reference is not None
    assert document.reference.bytes == SOURCE.stat().st_size
    assert document.left_float[0].code == "Q303"
    assert document.pipeline[0] == "raise-opset"
    assert document.pipeline[-1] == "own-zero-points"


def test_the_page_needs_nothing_else_and_holds_every_part(document: ReportDocument) -> None:
    text = as_html(document)
    page = _Page(text)
    assert document.drawings[1].islands
    assert page.fetched == []
    assert "script" not in page.tags
    assert "http://" not in text
    assert "https://" not in text
    assert page.anchors == page.ids
    parts = {"answers", "speed", "coverage", "errors", "activations", "graph", "float", "environment", "pipeline"}
    assert page.ids - parts == {"island-1-1", "graph-0", "graph-1"}
    assert page.ids > parts
    assert page.classes["worst"] == 2
    assert page.classes["beyond"] == 1  # one bar of those that hold values, and the grid ends in the middle
    assert page.text.count("14.29 % saturate") == 0
    assert "0.70 % saturate" in page.text
    assert "fake quant" in page.text
    assert "40 digits" in page.text


def test_names_cannot_break_the_page(document: ReportDocument) -> None:
    text = as_html(document)
    assert "<worst>" not in text
    assert "&lt;worst&gt; &amp; last" in text


def test_a_layer_of_noise_is_not_taken_for_an_exact_one(document: ReportDocument) -> None:
    first, _, exact = document.layer_errors
    noise = first.model_copy(update={"name": "noise", "sqnr_db": None})
    assert (exact.exact, exact.sqnr_db) == (True, None)
    assert [error.name for error in worst_first([exact, first, noise])] == ["noise", "first", "exact"]
    bars = error_chart([exact, first, noise])["bars"]
    assert [(bar["height"], bar["worst"]) for bar in bars] == [
        (100.0, False),
        (pytest.approx(100 * 41.5 / 60), True),
        (0.0, True),
    ]


def test_a_histogram_spans_the_grid_too(document: ReportDocument) -> None:
    (narrow,) = document.histograms
    chart = histogram_chart(narrow.model_copy(update={"grid_lo": -8.0, "grid_hi": 16.0}))
    assert (chart["left"], chart["right"], chart["ends"]) == (-8.0, 16.0, [0.0, 100.0])
    assert chart["bars"][0]["x"] == pytest.approx(100 / 3)
    assert not any(bar["beyond"] for bar in chart["bars"])


@pytest.mark.parametrize(
    ("percent", "samples", "low", "high"),
    [(50.0, 100, 40.4, 59.6), (0.0, 10, 0.0, 27.8), (100.0, 10, 72.2, 100.0)],
)
def test_few_samples_say_little(percent: float, samples: int, low: float, high: float) -> None:
    assert interval(percent, samples) == (pytest.approx(low, abs=0.1), pytest.approx(high, abs=0.1))


def test_parts_that_were_not_measured_are_left_out(document: ReportDocument) -> None:
    parts = ("accuracy", "speed", "layer_errors", "histograms", "drawings")
    bare = document.model_copy(update={**dict.fromkeys(parts, ()), "reference": None})
    page = _Page(as_html(bare))
    assert page.ids == {"coverage", "float", "environment", "pipeline"}
    assert page.anchors == page.ids
    assert "## Answers" not in as_markdown(bare)


def test_markdown_says_the_same_in_tables(document: ReportDocument) -> None:
    text = as_markdown(document)
    assert "| fake quant | 40 |" in text
    assert text.index("<worst>") < text.index("| first |")
    assert "| Q303 |" in text
    assert "| relu_1 |" not in text
    assert "| first | 0.00 | 8.00 | 0.00 | 4.00 | 7 |" in text


def test_json_is_the_document_and_fits_its_schema(document: ReportDocument) -> None:
    data = json.loads(document.model_dump_json())
    assert ReportDocument.model_validate(data).model_dump_json() == document.model_dump_json()
    assert data["layer_errors"][2]["sqnr_db"] is None
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    validator.check_schema(schema)
    validator(schema).validate(data)
    data["speed"][0]["ratio"] = "twice"
    assert not validator(schema).is_valid(data)


def test_the_schema_that_is_shipped_is_that_of_the_document() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), (
        "python -m qat2int8.pipelines.reporting.schema writes it anew"
    )


@pytest.mark.parametrize(("name", "begins"), [("r.html", "<!doctype html>"), ("r.md", "# "), ("r.json", "{")])
def test_the_ending_of_the_file_decides(document: ReportDocument, tmp_path: Path, name: str, begins: str) -> None:
    write_report(document, tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(begins)


@pytest.mark.parametrize("name", ["report.pdf", "report"])
def test_other_endings_are_refused(document: ReportDocument, tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"\.html, \.md, \.json"):
        write_report(document, tmp_path / name)


RESIDUAL = """g (float[N,4] x) => (float[N,4] y) <float[4] c = {1, 2, 3, 4}, float s = {0.1}, uint8 z = {128}> {
    [a] a = Neg (x)
    [b] b = Abs (a)
    [c] cc = Exp (b)
    [i] i = Identity (cc)
    [q] q = QuantizeLinear (i, s, z)
    [d] d = DequantizeLinear (q, s, z)
    [e] e = Add (a, d)
    [y] y = Mul (e, c)
}"""


def drawn() -> Drawing:
    return draw(parse(RESIDUAL), "it", lambda node: "float", lambda node: f"about {node.name}")


def test_quantizers_and_constants_are_no_boxes() -> None:
    drawing = drawn()
    assert [node.name for node in drawing.nodes] == ["x", "a", "b", "c", "e", "y", "y"]
    assert [node.op_type for node in drawing.nodes[:1] + drawing.nodes[-1:]] == ["input", "output"]
    ends = [f"{node.op_type} {node.name}" for node in drawing.nodes]
    edges = {(ends[edge.source], ends[edge.target]): edge.integer for edge in drawing.edges}
    assert edges == {
        ("input x", "Neg a"): False,
        ("Neg a", "Abs b"): False,
        ("Abs b", "Exp c"): False,
        ("Exp c", "Add e"): True,
        ("Neg a", "Add e"): False,
        ("Add e", "Mul y"): False,
        ("Mul y", "output y"): False,
    }
    assert drawing.nodes[1].note == "about a"


def test_what_is_computed_from_constants_is_no_box() -> None:
    text = """g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1, 2, 3, 4}, float s = {0.1}, int8 z = {0}> {
        [q] q = QuantizeLinear (w, s, z) [d] d = DequantizeLinear (q, s, z) [t] t = Transpose (d)
        [n] n = Neg (x) [y] y = MatMul (t, n) }"""
    drawing = draw(parse(text), "", lambda _: "float", lambda _: "")
    assert [node.name for node in drawing.nodes] == ["x", "n", "y", "y"]
    assert [(edge.source, edge.target) for edge in drawing.edges] == [(0, 1), (1, 2), (2, 3)]


def test_on_paper_a_graph_is_cut_between_rows() -> None:
    chain = " ".join(f"v{index} = Neg ({'x' if index == 0 else f'v{index - 1}'})" for index in range(30))
    drawing = draw(parse(f"g (float[2] x) => (float[2] v29) {{ {chain} }}"), "", lambda _: "float", lambda _: "")
    shown = picture(drawing, "")
    assert [sheet["top"] for sheet in shown["sheets"]] == [0, 750, 1500]
    assert sum(sheet["height"] for sheet in shown["sheets"]) == shown["height"]
    for box in shown["boxes"]:
        assert any(
            each["top"] <= box["y"] and box["y"] + 34 <= each["top"] + each["height"] for each in shown["sheets"]
        )


def test_rows_follow_the_data_and_no_two_boxes_share_a_place() -> None:
    drawing = drawn()
    assert [node.row for node in drawing.nodes] == [0, 1, 2, 3, 4, 5, 6]
    text = "g (float[2] x) => (float[2] y) { a = Neg (x) b = Abs (x) c = Exp (x) y = Sum (a, b, c) }"
    boxes = draw(parse(text), "wide", lambda node: "float", lambda node: "").nodes
    assert len({(box.row, box.column) for box in boxes}) == len(boxes)


def test_the_longest_way_through_the_graph_stays_on_the_left() -> None:
    text = "g (float[2] x) => (float[2] y) { [s] s = Neg (x) [a] a = Abs (x) [b] b = Exp (a) [y] y = Add (s, b) }"
    columns = {node.name: node.column for node in draw(parse(text), "", lambda _: "float", lambda _: "").nodes}
    assert columns == {"x": 0, "a": 0, "b": 0, "s": 1, "y": 0}


def test_float_islands_are_what_lies_together_in_float() -> None:
    text = """g (float[2] x) => (float[2] y) {
        [a] a = Neg (x) [b] b = Abs (a) [t] t = Transpose (b) [c] c = Exp (t) [d] d = Neg (c) [y] y = Abs (d) }"""
    kinds = {"a": "integer", "t": "movement", "d": "integer"}
    drawing = draw(parse(text), "", lambda node: kinds.get(node.name or "", "float"), lambda _: "")  # type: ignore[return-value]
    named = [[drawing.nodes[one].name for one in island] for island in drawing.islands]
    assert named == [["b", "c"], ["y"]]
    shown = picture(drawing, "island")
    assert [island["ops"] for island in shown["islands"]] == ["Abs, Exp", "Abs"]
    assert (shown["in_float"], shown["computing"]) == (3, 5)


def test_a_box_says_the_op_and_the_end_of_the_name() -> None:
    text = "g (float[2] x) => (float[2] y) { [n] y = Neg (x) }".replace(
        "[n]", "[block_with_a_very_long_name_4_expand_relu]"
    )
    (_, box, _) = picture(draw(parse(text), "", lambda _: "float", lambda _: ""), "island")["boxes"]
    assert box["name"] == "…long_name_4_expand_relu"


def test_a_box_does_not_say_the_op_twice() -> None:
    drawing = drawn()
    named = drawing.nodes[1].model_copy(update={"name": "/block/block.1/Neg_2"})
    boxes = picture(drawing.model_copy(update={"nodes": (drawing.nodes[0], named, *drawing.nodes[2:])}), "")[
        "boxes"
    ]
    assert (boxes[1]["node"].op_type, boxes[1]["name"]) == ("Neg", "block/block.1")


def test_of_a_very_large_graph_only_the_beginning_is_drawn() -> None:
    chain = " ".join(f"v{index} = Neg ({'x' if index == 0 else f'v{index - 1}'})" for index in range(450))
    model = parse(f"g (float[2] x) => (float[2] v449) {{ {chain} }}")
    drawing = draw(model, "long", lambda _: "float", lambda _: "")
    assert (len(drawing.nodes), drawing.left_out) == (1 + 400, 50)
