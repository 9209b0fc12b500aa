"""The documentation says what is so: its commands and examples are run, its lists compared with the code."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
import yaml
from support import REPOSITORY, parse
from typer.testing import CliRunner

from qat2int8 import convert
from qat2int8.ir import Code, Diagnostic, Fact, Model, OpRule, PipelineError, QuantParams, ScaleTable, Target
from qat2int8.ir.io import save_model
from qat2int8.passes import all_passes
from qat2int8.passes.qoperators import QOPERATORS
from qat2int8.pipelines.calibration import ALGORITHMS as CALIBRATORS
from qat2int8.pipelines.convert import Conversion
from qat2int8.pipelines.data.options import FORMATS as DATA_FORMATS
from qat2int8.pipelines.data.options import DataOptions
from qat2int8.pipelines.data.options import parse as parse_data
from qat2int8.pipelines.evaluation.metrics import METRICS
from qat2int8.pipelines.quantize_config import QuantizeConfig
from qat2int8.pipelines.shipped import load_pipeline, pipeline_names
from qat2int8.pipelines.spec import PipelineSpec, flatten, option_fields
from qat2int8.pipelines.tables import FORMATS as TABLE_FORMATS
from qat2int8.pipelines.tables.json_table import read_json, write_json
from qat2int8.pipelines.tables.tensorrt_cache import ALGORITHMS, read_tensorrt, write_tensorrt
from qat2int8.pipelines.target_files import target_names
from qat2int8.tools.cli import COMMANDS, app
from qat2int8.tools.passes import meanings

DOCS = REPOSITORY / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
GENERATED = {"benchmarks.md", "fidelity.md"}
"""Their tables and footers are written by the scripts in ``benchmarks/``."""
QAT_MODEL = REPOSITORY / "tools" / "demo_data" / "resnet_trt_qat.onnx"
SHIPPED = {name: cls for name, cls in all_passes().items() if cls.__module__.startswith("qat2int8.passes.")}


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of one language on a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)


def part(name: str, label: str) -> str:
    """What stands between the markers ``begin label`` and ``end label`` of a page."""
    found = re.findall(rf"<!-- begin {label} -->\n(.*?)<!-- end {label} -->", read(name), re.DOTALL)
    assert len(found) == 1, f"{name} has {len(found)} parts called {label}"
    return str(found[0])


def rows(name: str, label: str) -> list[list[str]]:
    """The cells of a marked table, its heading left out."""
    lines = [line for line in part(name, label).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def keys(name: str, label: str, column: int = 0) -> list[str]:
    """The names in backticks in one column of a marked table."""
    return [key for row in rows(name, label) for key in re.findall(r"`([^`]+)`", row[column])]


def nested(name: str, label: str, key: str) -> list[str]:
    """The names in backticks in the meaning of one key: those of the objects it holds."""
    (row,) = (row for row in rows(name, label) if f"`{key}`" in row[0])
    return re.findall(r"`([^`]+)`", row[1])


def console(name: str) -> list[tuple[str, int]]:
    """Every command of a page with the exit code it is said to have; a console block holds nothing else."""
    commands = []
    for block in blocks(name, "console"):
        for line in block.splitlines():
            if line.startswith("error: "):
                continue
            assert line.startswith("$ qat2int8 "), f"{name}: {line}"
            text, _, code = line.removeprefix("$ ").partition("  # exit code ")
            commands.append((text, int(code or 0)))
    return commands


ALL_COMMANDS = [(name, command) for name in PAGES for command, _ in console(name)]


# -- every page -----------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = DOCS / file if file else DOCS / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", sorted({*PAGES} - GENERATED))
def test_lines_can_be_read_in_an_editor(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", read(name), flags=re.M | re.S)
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long


def test_every_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([^)]+)\)", read("README.md")))
    assert linked == {name for name in PAGES if name != "README.md"}


def test_the_commands_are_all_told_of() -> None:
    told = [
        key.removeprefix("qat2int8 ") for key in keys("pipelines.md", "commands") if key.startswith("qat2int8")
    ]
    assert len(told) == len(COMMANDS)
    assert all(key.startswith(command) for key, command in zip(told, COMMANDS, strict=True))


@pytest.mark.parametrize(("name", "command"), ALL_COMMANDS)
def test_commands_and_options_in_the_documentation_exist(name: str, command: str) -> None:
    described: Any = typer.main.get_command(app)
    _, *words = shlex.split(command)
    while hasattr(described, "commands"):
        described = described.commands[words.pop(0)]
    known = {option for parameter in described.params for option in parameter.opts}
    known |= {option for parameter in described.params for option in parameter.secondary_opts}
    used = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert used <= known | {"--help", "-h"}


def invoke(*words: str) -> Any:
    """The JSON document of a command."""
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# -- writing-a-pass.md ----------------------------------------------------------------------------------------

EXAMPLE, EXAMPLE_TEST, SURGEON = blocks("writing-a-pass.md", "python")

SURGEON_TEST = """
from support import check_pass

from my_passes.drop_dropout import DropDropout


def test_readers_read_the_input() -> None:
    before = "g (float[2] x) => (float[2] y) { [a] t = Neg (x) [d] u = Dropout (t) [b] y = Neg (u) }"
    check_pass(DropDropout(), before, "g (float[2] x) => (float[2] y) { [a] t = Neg (x) [b] y = Neg (t) }")


def test_a_graph_output_stays() -> None:
    text = "g (float[2] x) => (float[2] u) { [a] t = Neg (x) [d] u = Dropout (t) }"
    check_pass(DropDropout(), text, text)
"""

DRIVER = """
import json, shlex, sys
from typer.testing import CliRunner
from qat2int8.tools.cli import app
results = [CliRunner().invoke(app, shlex.split(command)[1:]) for command in json.load(sys.stdin)]
json.dump([(result.exit_code, result.output) for result in results], sys.stdout)
"""


def python(folder: Path, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder``, with what lies there to be imported."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, input=text, capture_output=True, text=True
    )


def run_console(folder: Path, commands: list[tuple[str, int]]) -> list[str]:
    """Run commands one after the other in one process in ``folder``; returns what they printed."""
    done = python(folder, "-c", DRIVER, text=json.dumps([command for command, _ in commands]))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for (command, code), (actual, output) in zip(commands, results, strict=True):
        assert actual == code, f"{command}\n{output}"
    return [output for _, output in results]


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder with the examples as the installed package that the page describes."""
    package, metadata = tmp_path / "my_passes", tmp_path / "my_passes-1.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").touch()
    (package / "sub_to_add.py").write_text(EXAMPLE)
    (package / "drop_dropout.py").write_text(SURGEON)
    (tmp_path / "test_sub_to_add.py").write_text(EXAMPLE_TEST.replace("qat2int8.passes.sub", "my_passes.sub"))
    (tmp_path / "test_drop_dropout.py").write_text(SURGEON_TEST)
    (toml,) = blocks("writing-a-pass.md", "toml")
    entries = tomllib.loads(toml)["project"]["entry-points"]["qat2int8.passes"]
    lines = ["[qat2int8.passes]", *(f"{name} = {module}" for name, module in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join([*lines, "surgeon = my_passes.drop_dropout"]))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-passes\nVersion: 1.0\n")
    text = "g (float[2] x) => (float[2] y) <float[2] c = {1, 2}> { t = Identity (c) [n] y = Sub (x, t) }"
    save_model(parse(text), tmp_path / "model.onnx")
    return tmp_path


def test_the_example_and_its_test_are_short() -> None:
    assert len(EXAMPLE.splitlines()) + len(EXAMPLE_TEST.splitlines()) < 45
    code = [line for line in (EXAMPLE + EXAMPLE_TEST).splitlines() if line.strip()]
    assert len(code) < 40


def pytest_in(folder: Path) -> subprocess.CompletedProcess[str]:
    options = ("-p", "no:cacheprovider", "--import-mode=importlib", "-o", f"pythonpath={REPOSITORY / 'tests'}")
    return python(folder, "-m", "pytest", "-q", "--rootdir", str(folder), *options, str(folder))


def test_the_examples_pass_their_tests_which_fail_without_the_pass(plugin: Path) -> None:
    done = pytest_in(plugin)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
    module = plugin / "my_passes" / "sub_to_add.py"
    idle = EXAMPLE.replace('model.nodes("Sub")', "()")
    assert idle != EXAMPLE
    module.write_text(idle)
    assert "1 failed" in pytest_in(plugin).stdout


def test_the_example_runs_from_the_command_line_as_a_plugin(plugin: Path) -> None:
    listed = ("qat2int8 passes --json", 0)
    output, *_ = run_console(plugin, [listed, *console("writing-a-pass.md")])
    assert {"sub-to-add", "drop-dropout"} <= {entry["name"] for entry in json.loads(output)}
    written = onnx.load(plugin / "out.onnx")
    assert [node.op_type for node in written.graph.node] == ["Add"]
    assert (plugin / "dumps" / "02-sub-to-add.diff").exists()


def test_the_helpers_of_the_model_are_all_told_of() -> None:
    table = read("writing-a-pass.md").split("| of `Model` |")[1].split("\n\n")[0]
    told = {name for row in table.splitlines() for name in re.findall(r"`(\w+)(?:\([^`]*\))?`", row.split("|")[1])}
    fields = {field.name for field in dataclasses.fields(Model)}
    members = {name for name in dir(Model) if not name.startswith("_")}
    assert told == {name for name in fields | members if not name.startswith("_")}


def test_the_facts_are_all_told_of() -> None:
    assert keys("writing-a-pass.md", "facts") == [fact.name for fact in Fact]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_option_of_a_pass_has_a_meaning(name: str) -> None:
    told = meanings(SHIPPED[name])
    assert [option for option in option_fields(SHIPPED[name]) if not told.get(option)] == []


# -- pipelines.md ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pipeline_names())
def test_the_steps_of_a_shipped_pipeline_are_told_in_order(name: str) -> None:
    table = rows("pipelines.md", name)
    shipped = [spec.name for spec in flatten(load_pipeline(name).passes)]
    assert [row[0].strip("`") for row in table] == shipped, (
        f"bring the table of {name} in docs/pipelines.md up to date"
    )


def test_the_shipped_targets_are_all_told_of() -> None:
    assert keys("pipelines.md", "targets") == list(target_names())


def test_the_fields_of_a_target_are_all_told_of() -> None:
    assert keys("pipelines.md", "target") == [field.name for field in dataclasses.fields(Target)]
    table = {row[0].strip("`"): row[2] for row in rows("pipelines.md", "op-rule")}
    assert list(table) == [field.name for field in dataclasses.fields(OpRule)]
    for field in dataclasses.fields(OpRule):
        if field.default is dataclasses.MISSING:
            assert table[field.name] == "required"
        else:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            shown = "none" if default is None else f"`{json.dumps(default)}`"
            assert table[field.name] == shown


def test_what_a_conversion_has_is_all_told_of() -> None:
    told = {key.partition("(")[0] for key in keys("pipelines.md", "conversion")}
    fields = {field.name for field in dataclasses.fields(Conversion)}
    members = {name for name, _ in inspect.getmembers(Conversion)}
    assert told == {name for name in fields | members if not name.startswith("_")}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the files that the commands of a page name."""
    shutil.copy(QAT_MODEL, tmp_path / "model_qat.onnx")
    for name, text in re.findall(r"^`(\S+)`:\n\n```yaml\n(.*?)^```", read("pipelines.md"), re.M | re.S):
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_pipelines_page_run(workplace: Path) -> None:
    commands = console("pipelines.md")
    outputs = run_console(workplace, commands)
    refused = {command: output for (command, code), output in zip(commands, outputs, strict=True) if code == 2}
    promised = [
        line for block in blocks("pipelines.md", "console") for line in block.splitlines() if "error: " in line
    ]
    assert [output.strip() for output in refused.values()] == promised


@pytest.mark.slow
def test_the_python_of_the_pipelines_page_runs(workplace: Path) -> None:
    done = python(workplace, "-", text="\n".join(blocks("pipelines.md", "python")))
    assert done.returncode == 0, done.stderr
    assert (workplace / "steps" / "00-input.onnx").exists()
    assert (workplace / "int8.onnx").exists()


# -- calibration.md -------------------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A folder with the float model, the data and the configuration of the calibration page."""
    shutil.copy(QAT_MODEL, tmp_path / "model_qat.onnx")
    shutil.copy(QAT_MODEL.with_name("resnet_trt_fp32.onnx"), tmp_path / "model.onnx")
    with np.load(QAT_MODEL.with_name("mnist500.npz")) as stored:
        np.savez(tmp_path / "digits.npz", image=stored["images"][:100].astype(np.float32)[:, None] / 255.0)
    (tmp_path / "ptq.yaml").write_text(blocks("calibration.md", "yaml")[0])
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_calibration_page_run(digits: Path) -> None:
    run_console(digits, console("calibration.md"))


@pytest.mark.slow
def test_the_python_of_the_calibration_page_runs(digits: Path) -> None:
    done = python(digits, "-", text="\n".join(blocks("calibration.md", "python")))
    assert done.returncode == 0, done.stderr


def test_the_algorithms_and_their_options_are_all_told_of() -> None:
    told = {
        row[0].strip("`"): set(re.findall(r"`([^`]+)`", row[1])) for row in rows("calibration.md", "algorithms")
    }
    assert told == {name: set(option_fields(kind)) for name, kind in CALIBRATORS.items()}


def test_the_keys_of_a_configuration_are_all_told_of() -> None:
    assert set(keys("calibration.md", "config")) == set(QuantizeConfig.model_fields)


def test_the_document_of_calibrate_is_told_of(digits: Path) -> None:
    words = ("--data", f"{digits}/digits.npz", "--samples", "1", "--calibrator", "minmax")
    document = invoke("calibrate", f"{digits}/model.onnx", *words, "-o", f"{digits}/ranges.json")
    assert keys("formats.md", "json-calibrate") == list(document)
    assert nested("formats.md", "json-calibrate", "tensors") == list(document["tensors"]["image"])


# -- evaluation.md --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands_of_the_evaluation_page_run(workplace: Path) -> None:
    with np.load(QAT_MODEL.with_name("mnist500.npz")) as digits:
        images, labels = digits["images"][:100].astype(np.float32)[:, None] / 255.0, digits["labels"][:100]
    np.savez(workplace / "digits.npz", image=images, labels=labels)
    convert(QAT_MODEL, verify="none").save(workplace / "int8.onnx")
    run_console(workplace, console("evaluation.md"))


def test_the_metrics_are_all_told_of() -> None:
    assert keys("evaluation.md", "metrics") == list(METRICS)


# -- formats.md -----------------------------------------------------------------------------------------------


def test_the_texts_are_pipelines() -> None:
    texts = part("formats.md", "texts").splitlines()[1:-1]
    assert len(texts) > 3
    for text in texts:
        spec = PipelineSpec.parse(text)
        spec.build()
        assert PipelineSpec.parse(str(spec)) == spec


def test_the_grammar_is_the_one_the_parser_documents() -> None:
    from qat2int8.pipelines import spec

    grammar = next(block for block in blocks("formats.md", "text") if "pipeline :=" in block)
    assert spec.__doc__
    assert [line.strip() for line in grammar.splitlines()] == [
        line.strip() for line in spec.__doc__.splitlines() if ":=" in line
    ]


def test_the_keys_of_a_pipeline_file_are_all_told_of() -> None:
    with pytest.raises(PipelineError, match="with the keys") as refused:
        PipelineSpec.from_yaml("[]")
    assert str(refused.value).endswith(", ".join(keys("formats.md", "pipeline-yaml")))


def test_the_scale_table_is_read_as_shown() -> None:
    text, _ = blocks("formats.md", "json")
    model = parse("g (float[2] x) => (float[2] y) { y = Neg (x) }")
    value = model.graph.inputs[0]
    value.name = "conv1.weight"
    table = ScaleTable.from_json(text, {"conv1.weight": value}, "0123456789abcdef")
    assert isinstance(table[value], QuantParams)
    assert json.loads(table.to_json("0123456789abcdef")) == json.loads(text)
    assert keys("formats.md", "scale-table") == list(json.loads(text)["scales"]["conv1.weight"])


def test_the_formats_of_tables_are_told_of_and_read_as_shown() -> None:
    assert keys("formats.md", "table-formats") == list(TABLE_FORMATS)
    _, ours = blocks("formats.md", "json")
    assert keys("formats.md", "calibration-table") == list(json.loads(ours))
    assert nested("formats.md", "calibration-table", "tensors") == list(json.loads(ours)["tensors"]["conv1"])
    assert json.loads(write_json(read_json(ours))) == json.loads(ours)
    (cache,) = (block for block in blocks("formats.md", "text") if block.startswith("TRT-"))
    assert write_tensorrt(read_tensorrt(cache)) == cache
    for theirs, algorithm in ALGORITHMS.items():
        assert f"`{theirs}` is `{algorithm}`" in " ".join(read("formats.md").split())


def test_the_formats_of_data_and_their_keys_are_told_of() -> None:
    table = {row[0].strip("`"): re.findall(r"`(\w+)`", row[2]) for row in rows("formats.md", "data-formats")}
    assert table == {name: list(own) for name, own in DATA_FORMATS.items()}
    assert keys("formats.md", "data-keys") == [*DataOptions.model_fields]
    (text,) = blocks("formats.md", "yaml")
    assert DataOptions.model_validate(yaml.safe_load(text)).inputs == {"image": "x_test"}
    (examples,) = (block for block in blocks("formats.md", "text") if block.startswith("digits.npz\n"))
    assert [parse_data(line).path for line in examples.splitlines()] == [
        "digits.npz",
        "digits.npz",
        "val/",
        "data.yaml",
        "my_package.data:batches",
    ]


def test_the_documents_of_table_are_told_of(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    extracted = invoke("table", "extract", str(QAT_MODEL), "-o", str(path))
    common = keys("formats.md", "json-table")
    assert set(extracted) == {*common, "model", "output", "lost"}
    assert set(invoke("table", "show", str(path))) == {*common, "table"}
    compared = invoke("table", "diff", str(path), str(path))
    assert keys("formats.md", "json-table-diff") == list(compared)
    assert nested("formats.md", "json-table-diff", "differences") == list(compared["differences"][0])


def test_the_operators_are_all_told_of() -> None:
    told = [
        (domain.replace("ONNX", ""), name.strip("`"), re.split(r"\W", text)[0])
        for name, domain, text in rows("formats.md", "qoperators")
    ]
    assert told == [(one.domain, one.op_type, one.float_op) for one in QOPERATORS.values()]


def test_the_metadata_of_the_output_is_told_of() -> None:
    conversion = convert(QAT_MODEL, verify="none")
    written = conversion.model.ir.metadata_props
    assert sorted(keys("formats.md", "metadata")) == sorted(key for key in written if key.startswith("qat2int8."))
    assert written["qat2int8.source_sha256"] == hashlib.sha256(QAT_MODEL.read_bytes()).hexdigest()
    assert json.loads(written["qat2int8.diagnostics"]) == [one.as_dict() for one in conversion.diagnostics]
    assert str(PipelineSpec.parse(written["qat2int8.pipeline"])) == str(conversion.pipeline)
    sources = {name for node in onnx.load(QAT_MODEL).graph.node for name in node.input}
    tensors = json.loads(written["qat2int8.tensors"])
    assert tensors
    assert set(tensors) <= set(conversion.model.values())
    assert set(tensors.values()) <= sources


def test_the_keys_of_a_finding_are_told_of() -> None:
    assert set(keys("formats.md", "json-diagnostic")) == {field.name for field in dataclasses.fields(Diagnostic)}


def test_the_document_of_convert_is_told_of(tmp_path: Path) -> None:
    document = invoke("convert", str(QAT_MODEL), "-o", str(tmp_path / "out.onnx"))
    assert keys("formats.md", "json-convert") == list(document)
    for key in ("bytes", "nodes"):
        assert nested("formats.md", "json-convert", key) == list(document[key])
    assert keys("formats.md", "json-certificate") == list(document["certificate"])
    assert nested("formats.md", "json-certificate", "compute") == list(document["certificate"]["compute"][0])
    assert keys("formats.md", "json-fidelity") == list(document["fidelity"])
    assert nested("formats.md", "json-fidelity", "outputs") == list(document["fidelity"]["outputs"][0])
    for levels in (document["fidelity"]["levels"], document["fidelity"]["local_levels"]):
        assert keys("formats.md", "json-levels") == list(levels)
        assert nested("formats.md", "json-levels", "tensors") == list(levels["tensors"][0])


def test_the_document_of_compare_is_told_of(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    convert(QAT_MODEL, verify="none").save(out)
    document = invoke("compare", str(QAT_MODEL), str(out), "--random-data", "--samples", "1", "--try-skip", "1")
    assert keys("formats.md", "json-compare") == list(document)
    assert nested("formats.md", "json-compare", "layers") == list(document["layers"][0])
    assert nested("formats.md", "json-compare", "try_skip") == list(document["try_skip"])
    assert keys("evaluation.md", "compare-figures") == list(document["layers"][0]["local"])


def test_the_document_of_run_is_told_of(tmp_path: Path) -> None:
    document = invoke("run", str(QAT_MODEL), "-o", str(tmp_path / "out.onnx"), "--passes", "canonicalize")
    assert keys("formats.md", "json-run") == list(document)
    assert nested("formats.md", "json-run", "passes") == list(document["passes"][0])


def test_the_documents_of_passes_and_pipelines_are_told_of() -> None:
    described = invoke("passes", "cleanup")
    assert keys("formats.md", "json-pass") == list(described)
    assert nested("formats.md", "json-pass", "options") == list(described["options"][0])
    assert list(invoke("passes")[0]) == ["name", "summary"]
    document = invoke("pipelines", "qat-to-fp32")
    assert keys("formats.md", "json-pipeline") == list(document)
    assert nested("formats.md", "json-pipeline", "passes") == list(document["passes"][0])


@pytest.mark.slow
def test_the_document_of_the_demo_is_told_of() -> None:
    assert keys("formats.md", "json-demo") == list(invoke("demo"))


def test_the_files_of_a_dump_are_told_of(tmp_path: Path) -> None:
    dumps, out = tmp_path / "dumps", tmp_path / "out.onnx"
    failing = 'fixpoint(cleanup),change-output-dtype{output="no such output"}'
    words = ["run", str(QAT_MODEL), "-o", str(out), "--passes", failing, "--dump-dir", str(dumps)]
    assert CliRunner().invoke(app, words).exit_code == 2
    names = {re.sub(r"^0[1-9]-cleanup", "NN-PASS", file.name) for file in dumps.iterdir() if file.is_file()}
    assert names == set(keys("formats.md", "dumps"))
    assert {file.name for file in (dumps / "reproducer").iterdir()} == set(keys("formats.md", "reproducer"))
    command = (dumps / "reproducer" / "command.txt").read_text()
    again = CliRunner().invoke(app, shlex.split(command)[1:])
    assert again.exit_code == 2
    assert "no such output" in again.output


# -- diagnostics.md -------------------------------------------------------------------------------------------


def findings() -> dict[str, str]:
    """What the page says of each code, by its heading."""
    text = part("diagnostics.md", "codes")
    entries = re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(dict(entries)) == len(entries)
    return dict(entries)


def test_every_code_is_told_of_and_no_other() -> None:
    assert list(findings()) == [f"{code.value} {code.name}" for code in Code]


@pytest.mark.parametrize("code", Code)
def test_a_code_is_told_with_severity_cause_effect_and_remedy(code: Code) -> None:
    entry = findings()[f"{code.value} {code.name}"]
    assert re.findall(r"^- \*\*(.*?)\*\*", entry, re.MULTILINE) == [
        "Severity",
        "When",
        "For the model",
        "What to do",
    ]
    emitters = [
        path
        for folder in ("ir", "passes", "pipelines", "tools")
        for path in (REPOSITORY / folder).glob("*.py")
        if re.search(rf"\bCode\.{code.name}\b", path.read_text(encoding="utf-8"))
    ]
    assert ("No pass emits it" in entry) == (not emitters)
