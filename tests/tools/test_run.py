"""``qat2int8 run`` and what all commands share: help, exit codes, clean errors, a quick start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from support import REPOSITORY, parse
from typer.testing import CliRunner, Result

from qat2int8.ir import Model
from qat2int8.passes import Context, Pass, PassResult, register
from qat2int8.tools.cli import COMMANDS, app

CHAIN = """
g (float[4] x) => (float[4] y) {
  c = Constant <value = float[4] {1, 2, 3, 4}> ()
  [a] t = Add (x, c)
  [b] y = Relu (t)
}
"""


@register
class Crash(Pass):
    """Crashes."""

    name = "test-run-crash"

    def run(self, model: Model, ctx: Context) -> PassResult:
        raise KeyError("inside")


@register
class Interrupted(Pass):
    """Is interrupted."""

    name = "test-run-interrupted"

    def run(self, model: Model, ctx: Context) -> PassResult:
        raise KeyboardInterrupt


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(parse(CHAIN).to_proto(), path)
    return path


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def ran(model: Path, *words: object, passes: str = "canonicalize") -> Result:
    return invoke("run", model, "-o", model.parent / "out.onnx", "--passes", passes, *words)


def one_line(result: Result) -> str:
    """The error of a command that failed as all must: exit code 2, one line on stderr, nothing on stdout."""
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return str(line)


# -- running --------------------------------------------------------------------------------------------------


def test_run_writes_the_result_and_says_what_was_done(model: Path) -> None:
    result = ran(model)
    assert result.exit_code == 0, result.output
    assert [node.op_type for node in onnx.load(model.parent / "out.onnx").graph.node] == ["Add", "Relu"]
    assert "1 constants lifted" in result.stdout
    assert result.stdout.splitlines()[-1] == f"wrote {model.parent / 'out.onnx'}"
    assert result.stderr == ""
    assert len(onnx.load(model).graph.node) == 3


def test_run_says_so_when_there_was_nothing_to_do(model: Path) -> None:
    ran(model)
    result = invoke("run", model.parent / "out.onnx", "-o", model.parent / "again.onnx", "-p", "canonicalize")
    assert "nothing to do" in result.stdout
    assert (model.parent / "again.onnx").exists()


def test_run_prints_one_json_document(model: Path) -> None:
    result = ran(model, "--json", "--time-passes", passes="fixpoint(canonicalize)")
    document = json.loads(result.stdout)
    assert document["pipeline"] == "fixpoint(canonicalize)"
    assert document["target"] == "ort-x86"
    assert document["changed"] is True
    assert document["left_out"] == []
    assert [(one["name"], one["position"], one["round"]) for one in document["passes"]] == [
        ("canonicalize", 1, 1),
        ("canonicalize", 1, 2),
    ]
    assert document["passes"][0]["counts"]["constants lifted"] == 1
    assert document["output"] == str(model.parent / "out.onnx")
    assert document["diagnostics"] == []
    assert result.stderr == ""


def test_run_can_be_quiet(model: Path) -> None:
    result = ran(model, "--quiet", "--time-passes")
    assert (result.exit_code, result.output) == (0, "")


def test_run_times_passes(model: Path) -> None:
    lines = ran(model, "--time-passes").stdout.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("where the time went"))
    assert [line.split()[0] for line in lines[start + 2 : start + 5]] == ["total", "canonicalize", "between"]
    assert all(len(line) <= 80 for line in lines if not line.startswith("wrote"))


@pytest.mark.parametrize(("which", "printed"), [("all", 2), ("changed", 1), ("canonicalize", 2), ("", 0)])
def test_run_prints_the_graph_to_stderr(model: Path, which: str, printed: int) -> None:
    words = ["--print-after", which] if which else []
    result = ran(model, *words, passes="canonicalize,canonicalize")
    assert result.stderr.count("// after canonicalize") == printed
    assert "// after" not in result.stdout


def test_run_keeps_dumps(model: Path) -> None:
    assert ran(model, "--dump-dir", model.parent / "dumps").exit_code == 0
    assert (model.parent / "dumps" / "01-canonicalize.diff").read_text()
    assert not (model.parent / "dumps" / "reproducer").exists()


def test_findings_are_limited_unless_asked_for(tmp_path: Path) -> None:
    proto = parse("g (float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { [a] y = Add (x, w) }").to_proto()
    weight = proto.graph.input.add()
    weight.CopyFrom(proto.graph.input[0])
    weight.name = "w"
    onnx.save(proto, tmp_path / "model.onnx")
    assert "Q402" not in ran(tmp_path / "model.onnx").stdout
    assert "Q402" in ran(tmp_path / "model.onnx", "-v").stdout
    (found,) = json.loads(ran(tmp_path / "model.onnx", "--json").stdout)["diagnostics"]
    assert (found["code"], found["value"], found["pass_name"]) == ("Q402", "w", "canonicalize")


def test_a_pipeline_can_come_from_a_file_with_a_target(model: Path) -> None:
    file = model.parent / "mine.yaml"
    file.write_text("target: ort-x68\npasses: [canonicalize]")
    assert "no target is called 'ort-x68' (did you mean 'ort-x86'?)" in one_line(ran(model, passes=str(file)))
    file.write_text("target: ort-x86\npasses: [canonicalize, fixpoint: [canonicalize]]")
    assert ran(model, passes=str(file)).exit_code == 0


def test_a_pipeline_file_that_is_no_text_is_refused(model: Path) -> None:
    (model.parent / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in one_line(ran(model, passes=str(model.parent / "binary.yaml")))
    assert "Is a directory" in one_line(ran(model, passes=folder(model.parent / "folder.yaml")))


def folder(path: Path) -> str:
    path.mkdir()
    return str(path)


@pytest.mark.parametrize("level", ["none", "structure", "checker", "numeric"])
def test_every_level_of_verification_runs(model: Path, level: str) -> None:
    assert ran(model, "--verify", level).exit_code == 0


# -- what can go wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "words", "says"),
    [
        ("canonicalise", (), "error: no pipeline or pass is called 'canonicalise' (did you mean 'canonicalize'?)"),
        ("canonicalize,", (), "error: pipeline text, column 14: expected the name of a pass, found the end"),
        (
            "canonicalize,canonicalise",
            (),
            "error: no pass is called 'canonicalise' (did you mean 'canonicalize'?)",
        ),
        ("canonicalize{x=1}", (), "error: canonicalize has no option 'x' (it has none)"),
        ("none.yaml", (), "error: none.yaml: cannot be read: No such file or directory"),
        ("canonicalize", ("--target", "ort"), "error: no target is called 'ort'"),
        (
            "canonicalize",
            ("--verify", "all"),
            "error: --verify: no level is called 'all' (one of none, structure,",
        ),
        (
            "canonicalize",
            ("--print-after", "canonize"),
            "error: --print-after: the pipeline has no pass 'canonize' (did",
        ),
        ("canonicalize", ("--bogus",), "error: qat2int8 run: No such option: --bogus"),
        ("test-run-crash", (), "error: test-run-crash (position 1): failed unexpectedly: KeyError: 'inside'"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    model: Path, passes: str, words: tuple[str, ...], says: str
) -> None:
    result = ran(model, *words, passes=passes)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(says)
    assert "Traceback" not in result.stderr
    assert not (model.parent / "out.onnx").exists()


def test_a_model_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "no such file" in one_line(ran(tmp_path / "none.onnx"))
    (tmp_path / "text.onnx").write_text("hello")
    assert "text.onnx" in one_line(ran(tmp_path / "text.onnx"))


def test_a_mistake_in_the_pipeline_is_found_before_the_model_is_read(tmp_path: Path) -> None:
    assert "has no option 'x'" in one_line(ran(tmp_path / "none.onnx", passes="canonicalize{x=1}"))


def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(model: Path) -> None:
    result = invoke("run", model, "-o", model.parent / "no" / "out.onnx", "-p", "test-run-crash")
    assert "does not exist" in one_line(result)
    assert "is the input model itself" in one_line(invoke("run", model, "-o", model, "-p", "canonicalize"))


def test_debug_shows_the_traceback_and_keeps_the_exit_code(model: Path) -> None:
    result = ran(model, "--debug", passes="test-run-crash")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "KeyError: 'inside'" in result.stderr
    assert result.stderr.splitlines()[-2].startswith("error: test-run-crash")


def test_a_failing_pass_tells_how_to_reproduce_it(model: Path) -> None:
    hint = ran(model, passes="canonicalize,test-run-crash").stderr.splitlines()[1]
    assert hint == "rerun with --dump-dir DIR to keep what reproduces it"
    folder = model.parent / "dumps"
    lines = ran(model, "--dump-dir", folder, passes="canonicalize,test-run-crash").stderr.splitlines()
    assert lines[1] == (
        f"reproduce it with: qat2int8 run {folder}/reproducer/before.onnx -o {folder}/reproducer/after.onnx "
        "--passes test-run-crash --target ort-x86 --verify checker"
    )
    assert len(onnx.load(folder / "reproducer" / "before.onnx").graph.node) == 2


def test_an_interrupt_ends_with_130(model: Path) -> None:
    result = ran(model, passes="test-run-interrupted")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


# -- the front door -------------------------------------------------------------------------------------------


def test_without_a_command_the_help_is_shown() -> None:
    result = invoke()
    assert result.exit_code == 0
    assert all(command.split()[0] in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_the_common_flags(command: str) -> None:
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert f"Example: qat2int8 {command}" in shown
    assert all(flag in shown for flag in ("--json", "--quiet", "--verbose", "-v", "--debug"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("runn",), "error: qat2int8: No such command 'runn'."),
        (("--bogus",), "error: qat2int8: No such option: --bogus"),
        (("run",), "error: qat2int8 run: Missing argument"),
        (("run", "m.onnx", "-p", "canonicalize"), "error: qat2int8 run: Missing option '--output'"),
    ],
)
def test_bad_usage_is_one_line_that_points_to_the_help(words: tuple[str, ...], says: str) -> None:
    line = one_line(invoke(*words))
    assert line.startswith(says)
    assert line.endswith("--help')")


def process(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qat2int8", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def test_the_module_runs_as_a_process(model: Path) -> None:
    out = str(model.parent / "out.onnx")
    done = process("run", str(model), "-o", out, "--passes", "canonicalize", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["output"] == out
    failed = process("run", str(model), "-o", out, "--passes", "canonicalise")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert len(failed.stderr.splitlines()) == 1


def test_the_version_is_printed() -> None:
    done = process("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("qat2int8 ")


HEAVY = {"onnx", "onnx_ir", "onnxruntime", "numpy", "networkx", "qat2int8.ir"}
HELP = f"""
from qat2int8.tools.cli import app
try:
    app(["run", "--help"])
except SystemExit as end:
    assert end.code == 0, end.code
assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)
"""


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def test_the_commands_import_what_they_need_when_they_run() -> None:
    bare = f"""
import sys, types
package = types.ModuleType("qat2int8")
package.__path__ = [{str(REPOSITORY / "qat2int8")!r}]
sys.modules["qat2int8"] = package
"""
    done = python(bare + HELP)
    assert done.returncode == 0, done.stderr


def test_help_does_not_wait_for_the_runtime_to_load() -> None:
    done = python("import sys\n" + HELP)
    assert done.returncode == 0, done.stderr


def test_run_tells_which_passes_the_target_does_not_ask_for(model: Path) -> None:
    own = model.parent / "bare.yaml"
    shipped = (REPOSITORY / "pipelines" / "targets" / "ort-x86.yaml").read_text()
    own.write_text(re.sub(r"rewrites:\n(  - .*\n)*", "", shipped).replace("name: ort-x86", "name: bare"))
    result = ran(model, "--target", str(own), passes="canonicalize,optimize-int8")
    assert "left out for bare: optimize-int8" in result.stdout
