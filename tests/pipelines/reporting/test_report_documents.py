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
from qat2int8.pipelines.reporting.collect import collect
from qat2int8.pipelines.reporting.document import Drawing, ReportDocument
from qat2int8.pipelines.reporting.drawing import draw
from qat2int8.pipelines.reporting.html import as_html
from qat2int8.pipelines.reporting.markdown import as_markdown
from qat2int8.pipelines.reporting.write import write_report

SOURCE = REPOSITORY / "tools" / "demo_data" / "resnet_trt_qat.onnx"
ERRORS = {"first": 41.5, "<worst> & last": 12.25, "exact": math.inf}
VALUES = Activation("first", "relu_1", 0.0, 8.0, (900, 90, 9, 0, 1), 0.0, 4.0, 7)


def comparison() -> Comparison:
    def layer(name: str, db: float) -> LayerComparison:
        local = Errors(db, 0.9, 0.5, 0.01, (9, 1, 0, 0), 0)
        return LayerComparison(name, "Conv", name, name, True, Errors(0.0, 0.0, 9.0, 9.0, (), 0), local)

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
    assert cards["top-1"].hint.endswith("against fake quant")
    assert cards["Speed"].hint == "of fake quant"
    assert cards["Worst layer"].hint == "<worst> & last"
    assert document.layer_errors[0].off_by == (0.9, 0.1, 0.0, 0.0)
    assert (document.histograms[0].tensor, document.histograms[0].grid_hi) == ("relu_1", 4.0)
    assert cards["Integer multiply-accumulates"].tone == "doubtful"
    assert [layer.integer for layer in document.layers].count(False) == 1
    assert [row.model for row in document.accuracy] == ["fake quant", "int8"]
    assert document.accuracy[1].samples == 40
    assert document.speed[0].ratio == 1.0
    assert document.reference is not None
    assert document.reference.bytes == SOURCE.stat().st_size
    assert document.left_float[0].code == "Q303"
    assert document.pipeline[0] == "raise-opset"
    assert document.pipeline[-1] == "cleanup"


def test_the_page_needs_nothing_else_and_holds_every_part(document: ReportDocument) -> None:
    text = as_html(document)
    page = _Page(text)
    assert page.fetched == []
    assert "script" not in page.tags
    assert "http://" not in text
    assert "https://" not in text
    assert page.anchors == page.ids
    assert page.ids >= {"answers", "speed", "coverage", "errors", "activations", "graph", "float", "environment"}
    assert page.classes["worst"] == 2
    assert page.classes["end"] == 2
    assert "fake quant" in page.text
    assert "40 digits" in page.text


def test_names_cannot_break_the_page(document: ReportDocument) -> None:
    text = as_html(document)
    assert "<worst>" not in text
    assert "&lt;worst&gt; &amp; last" in text


def test_parts_that_were_not_measured_are_left_out(document: ReportDocument) -> None:
    parts = ("accuracy", "speed", "layer_errors", "histograms", "drawings")
    bare = document.model_copy(update={**dict.fromkeys(parts, ()), "reference": None})
    page = _Page(as_html(bare))
    assert page.ids == {"coverage", "float", "environment"}
    assert page.anchors == page.ids
    assert "## Answers" not in as_markdown(bare)


def test_markdown_says_the_same_in_tables(document: ReportDocument) -> None:
    text = as_markdown(document)
    assert "| fake quant | 40 |" in text
    assert text.index("<worst>") < text.index("| first |")
    assert "| Q303 |" in text


def test_json_is_the_document_and_fits_its_schema(document: ReportDocument) -> None:
    data = json.loads(document.model_dump_json())
    assert ReportDocument.model_validate(data).model_dump_json() == document.model_dump_json()
    assert data["layer_errors"][2]["sqnr_db"] is None
    assert set(ReportDocument.model_json_schema()["properties"]) == set(data)


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
    assert [node.name for node in drawing.nodes] == ["a", "b", "c", "e", "y"]
    names = [node.name for node in drawing.nodes]
    edges = {(names[edge.source], names[edge.target]): edge.integer for edge in drawing.edges}
    assert edges == {("a", "b"): False, ("b", "c"): False, ("c", "e"): True, ("a", "e"): False, ("e", "y"): False}
    assert drawing.nodes[0].note == "about a"


def test_rows_follow_the_data_and_no_two_boxes_share_a_place() -> None:
    drawing = drawn()
    rows = {node.name: node.row for node in drawing.nodes}
    assert rows == {"a": 0, "b": 1, "c": 2, "e": 3, "y": 4}
    text = "g (float[2] x) => (float[2] y) { a = Neg (x) b = Abs (x) c = Exp (x) y = Sum (a, b, c) }"
    boxes = draw(parse(text), "wide", lambda node: "float", lambda node: "").nodes
    assert len({(box.row, box.column) for box in boxes}) == len(boxes)


def test_of_a_very_large_graph_only_the_beginning_is_drawn() -> None:
    chain = " ".join(f"v{index} = Neg ({'x' if index == 0 else f'v{index - 1}'})" for index in range(450))
    model = parse(f"g (float[2] x) => (float[2] v449) {{ {chain} }}")
    drawing = draw(model, "long", lambda _: "float", lambda _: "")
    assert (len(drawing.nodes), drawing.left_out) == (400, 50)
