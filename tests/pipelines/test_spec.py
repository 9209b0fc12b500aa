"""Text, YAML and Python are three spellings of one pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat2int8.ir import Model, PipelineError
from qat2int8.passes import Context, Pass, PassResult, register
from qat2int8.passes.canonicalize import Canonicalize
from qat2int8.pipelines.spec import Fixpoint, PassSpec, PipelineSpec, flatten, option_fields


class Shade(enum.StrEnum):
    LIGHT = "light"
    DARK = "dark"


@register
@dataclass(frozen=True)
class Paint(Pass):
    """A pass with an option of every type."""

    name = "test-spec-paint"
    coats: int = 1
    gloss: float = 0.5
    dry: bool = True
    label: str = "x"
    walls: tuple[str, ...] = ()
    sizes: tuple[float, ...] = (1.0,)
    shade: Shade = Shade.LIGHT
    limit: int | None = None
    side: Literal["in", "out"] = "in"

    def run(self, model: Model, ctx: Context) -> PassResult:
        return PassResult()


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.\-]{0,12}", fullmatch=True).filter(lambda name: name != "fixpoint")
TRICKY = st.sampled_from(
    [
        "",
        "true",
        "none",
        "inf",
        "-inf",
        "nan",
        "1",
        "-0",
        "007",
        "1e5",
        "1.5",
        "a b",
        'q"',
        "\\",
        "a,b",
        "[x]",
        "\n",
        "9" * 25,
    ]
)
SCALARS = (
    st.booleans()
    | st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | TRICKY
)
OPTIONS = SCALARS | st.lists(SCALARS, max_size=3).map(tuple)
PASSES = st.builds(PassSpec, NAMES, st.dictionaries(NAMES, OPTIONS, max_size=3))
STEPS = PASSES | st.lists(PASSES, min_size=1, max_size=3).map(lambda passes: Fixpoint(tuple(passes)))
PIPELINES = st.lists(STEPS, min_size=1, max_size=4).map(lambda steps: PipelineSpec(tuple(steps)))


def typed(spec: PipelineSpec) -> list[Any]:
    """Options with their types, because 1 == 1.0 == True hides a value that changed its type."""
    return [(key, repr(value)) for one in flatten(spec.passes) for key, value in one.options.items()]


@given(PIPELINES)
@settings(max_examples=300, deadline=None)
def test_text_reads_back_as_it_was_written(spec: PipelineSpec) -> None:
    again = PipelineSpec.parse(str(spec))
    assert again == spec
    assert typed(again) == typed(spec)


@given(PIPELINES, st.text(max_size=10), st.text(max_size=10), NAMES)
@settings(max_examples=200, deadline=None)
def test_yaml_reads_back_as_it_was_written(spec: PipelineSpec, name: str, about: str, target: str) -> None:
    spec = dataclasses.replace(spec, name=name, description=about, target=target)
    again = PipelineSpec.from_yaml(spec.to_yaml())
    assert again == spec
    assert typed(again) == typed(spec)


@given(
    st.builds(
        Paint,
        coats=st.integers(-5, 5),
        gloss=st.floats(allow_nan=False),
        dry=st.booleans(),
        label=st.text(max_size=5) | TRICKY,
        walls=st.lists(st.text(max_size=4) | TRICKY, max_size=3).map(tuple),
        sizes=st.lists(st.floats(allow_nan=False), max_size=2).map(tuple),
        shade=st.sampled_from(Shade),
        limit=st.none() | st.integers(0, 9),
        side=st.sampled_from(["in", "out"]),
    )
)
@settings(deadline=None)
def test_a_pass_survives_text_and_yaml(pass_: Paint) -> None:
    spec = PipelineSpec.of([pass_])
    assert PipelineSpec.parse(str(spec)).build() == (pass_,)
    assert PipelineSpec.from_yaml(spec.to_yaml()).build() == (pass_,)


@given(st.text(max_size=30) | st.text('ab{}[]()=," \\', max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(PipelineError):
        PipelineSpec.parse(text)


def test_the_text_form() -> None:
    text = 'a,b{opt=1 other=true list=[x,"y z"] empty=[]},fixpoint(c,d{s="1"})'
    spec = PipelineSpec.parse(text)
    assert spec.passes == (
        PassSpec("a"),
        PassSpec("b", {"opt": 1, "other": True, "list": ("x", "y z"), "empty": ()}),
        Fixpoint((PassSpec("c"), PassSpec("d", {"s": "1"}))),
    )
    assert str(spec) == text
    assert (
        PipelineSpec.parse(' a ,\n b{ opt = 1  other=true list=[ x , "y z" ] empty=[ ]}, fixpoint ( c,d{s="1"} ) ')
        == spec
    )


def test_the_yaml_form() -> None:
    spec = PipelineSpec.from_yaml(
        """
        name: mine
        description: what it does
        target: ort-x86
        passes:
          - a
          - b: {opt: 1, list: [x, y]}
          - fixpoint: [c, d: {s: "1"}]
          - e:
        """
    )
    assert str(spec) == 'a,b{opt=1 list=[x,y]},fixpoint(c,d{s="1"}),e'
    assert (spec.name, spec.description, spec.target) == ("mine", "what it does", "ort-x86")


def test_options_at_their_default_are_not_printed() -> None:
    assert str(PassSpec.of(Paint())) == "test-spec-paint"
    assert str(PassSpec.of(Paint(shade=Shade.DARK, gloss=0.5))) == "test-spec-paint{shade=dark}"
    assert str(PassSpec.of(Canonicalize())) == "canonicalize"


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("", 1, "expected the name of a pass, found the end"),
        ("a,", 3, "expected the name of a pass"),
        ("a b", 3, "expected ',', found 'b'"),
        ("a{", 3, "expected an option or '}'"),
        ("a{x}", 4, "expected '=', found '}'"),
        ("a{x=}", 5, "expected a value, found '}'"),
        ("a{x=[1}", 7, "expected ']'"),
        ("a{x=[[1]]}", 6, "expected a value, found '['"),
        ("a{x=1,y=2}", 6, "expected an option or '}', found ','"),
        ("a{x=1 x=2}", 7, "a is given option 'x' twice"),
        ('a{x="y}', 5, "a quote is not closed"),
        ('a{x="\\q"}', 5, "has an escape that is none"),
        ("fixpoint", 9, "expected '('"),
        ("fixpoint()", 10, "expected the name of a pass"),
        ("fixpoint(fixpoint(a))", 10, "a fixpoint inside a fixpoint"),
        ("a)", 2, "expected ',', found ')'"),
    ],
)
def test_text_that_makes_no_sense_is_refused_where_it_stops_making_sense(
    text: str, column: int, says: str
) -> None:
    with pytest.raises(PipelineError) as caught:
        PipelineSpec.parse(text)
    assert caught.value.where == f"pipeline text, column {column}"
    assert says in caught.value.what


@pytest.mark.parametrize(
    ("text", "where", "says", "remedy"),
    [
        ("passes: [a]\npases: [b]", "f.yaml:2", "unknown key 'pases'", "did you mean 'passes'?"),
        ("name: x", "f.yaml", "'passes' is missing", ""),
        ("passes: a", "f.yaml:1", "passes: ", ""),
        ("name: 3\npasses: [a]", "f.yaml:1", "name: ", ""),
        ("passes: []", "f.yaml", "the pipeline is empty", "name at least one pass"),
        ("", "f.yaml", "a mapping is expected", ""),
        ("[a]", "f.yaml", "a mapping is expected", ""),
        ("passes: [{a: 1}]", "f.yaml: a", "options are a mapping", "write a: {option: value}"),
        ("passes: [{a: {}, b: {}}]", "f.yaml", "is no step", ""),
        ("passes: [3]", "f.yaml", "3 is no step", ""),
        ("passes: [fixpoint]", "f.yaml", "is no step", ""),
        ("passes: [fixpoint: a]", "f.yaml", "fixpoint needs a list", ""),
        ("passes: [fixpoint: []]", "f.yaml", "fixpoint has no passes", ""),
        ("passes: [fixpoint: [fixpoint: [a]]]", "f.yaml", "a fixpoint inside a fixpoint", "one level is enough"),
        ("passes:\n - a: {x: 1,\n       x: 2}", "f.yaml:3", "'x' is given twice", ""),
        (
            "passes: [a: {x: 2020-01-01}]",
            "f.yaml: a: option 'x'",
            "a date is no option value",
            "write text in quotes",
        ),
        ("passes: [a: {x: {y: 1}}]", "f.yaml: a: option 'x'", "a dict is no option value", ""),
        ("passes: [a: {x: [[1]]}]", "f.yaml: a: option 'x'", "a list inside a list", ""),
        ("passes: [a: {x: .nan}]", "f.yaml: a: option 'x'", "nan", ""),
        ("passes: [a: {x: 99999999999999999999}]", "f.yaml: a: option 'x'", "does not fit 64 bits", ""),
        ("passes: [a: {3: 1}]", "f.yaml: a", "'3' cannot be the name of an option", ""),
        ("passes: ['a b']", "f.yaml", "'a b' cannot be the name of a pass", ""),
        ("a: [\nb", "f.yaml:2", "not YAML", ""),
        ("!!python/object:os.system {}", "f.yaml:1", "not YAML", ""),
        ("[" * 5000, "f.yaml", "not YAML", ""),
    ],
)
def test_yaml_that_is_no_pipeline_is_refused_with_its_line(text: str, where: str, says: str, remedy: str) -> None:
    with pytest.raises(PipelineError) as caught:
        PipelineSpec.from_yaml(text, where="f.yaml")
    assert caught.value.where == where
    assert says in caught.value.what
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("option", "expects"),
    [
        ("coats=1.5", "option 'coats' expects a whole number, not 1.5"),
        ("coats=true", "option 'coats' expects a whole number, not true"),
        ("gloss=high", "option 'gloss' expects a number, not high"),
        ("gloss=false", "option 'gloss' expects a number, not false"),
        ("dry=1", "option 'dry' expects true or false, not 1"),
        ('dry="true"', "option 'dry' expects true or false, not \"true\""),
        ("label=1.5", "option 'label' expects text, not 1.5"),
        ("label=none", "option 'label' expects text, not none"),
        ("walls=north", "option 'walls' expects a list of text, not north"),
        ("walls=[a,1.5]", "option 'walls' expects a list of text, not [a,1.5]"),
        ("shade=grey", "option 'shade' expects one of light, dark, not grey"),
        ("shade=1", "option 'shade' expects one of light, dark, not 1"),
        ("limit=x", "option 'limit' expects a whole number or none, not x"),
        ("side=up", "option 'side' expects one of in, out, not up"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(option: str, expects: str) -> None:
    with pytest.raises(PipelineError) as caught:
        PipelineSpec.parse(f"test-spec-paint{{{option}}}").build()
    assert (caught.value.where, caught.value.what) == ("test-spec-paint", expects)


def test_values_that_fit_without_loss_are_converted() -> None:
    (built,) = PipelineSpec.parse("test-spec-paint{gloss=2 label=124 walls=[12,b] limit=none shade=dark}").build()
    assert built == Paint(gloss=2.0, label="124", walls=("12", "b"), shade=Shade.DARK)
    assert isinstance(built, Paint)
    assert isinstance(built.gloss, float)
    assert isinstance(built.shade, Shade)


def test_an_unknown_option_or_pass_is_told_the_nearest() -> None:
    with pytest.raises(PipelineError, match=r"test-spec-paint has no option 'coat' \(did you mean 'coats'\?\)"):
        PipelineSpec.parse("test-spec-paint{coat=1}").build()
    with pytest.raises(PipelineError, match=r"canonicalize has no option 'x' \(it has none\)"):
        PipelineSpec.parse("canonicalize{x=1}").build()
    with pytest.raises(PipelineError, match=r"did you mean 'canonicalize'\?"):
        PipelineSpec.parse("canonicalise").build()


def test_with_options_overrides_by_name_everywhere_and_keeps_the_rest() -> None:
    spec = PipelineSpec.parse("a{x=1 y=2},b,fixpoint(a,c)")
    changed = spec.with_options({"a": {"x": 5, "z": ["p", "q"]}})
    assert str(changed) == "a{x=5 y=2 z=[p,q]},b,fixpoint(a{x=5 z=[p,q]},c)"
    assert str(spec) == "a{x=1 y=2},b,fixpoint(a,c)"


def test_with_options_for_a_pass_that_is_not_there_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"no pass 'fuse-conv' \(did you mean 'fuse-conv-bn'\?\)"):
        PipelineSpec.parse("fuse-conv-bn,cleanup").with_options({"fuse-conv": {}})


def test_a_fixpoint_of_built_passes_keeps_its_shape() -> None:
    built = PipelineSpec.parse("canonicalize,fixpoint(canonicalize,test-spec-paint{coats=3})").build()
    assert built == (Canonicalize(), Fixpoint((Canonicalize(), Paint(coats=3))))
    assert str(PipelineSpec.of(built)) == "canonicalize,fixpoint(canonicalize,test-spec-paint{coats=3})"


def test_option_fields_describe_themselves() -> None:
    assert {name: option.expects for name, option in option_fields(Paint).items()} == {
        "coats": "a whole number",
        "gloss": "a number",
        "dry": "true or false",
        "label": "text",
        "walls": "a list of text",
        "sizes": "a list of a number",
        "shade": "one of light, dark",
        "limit": "a whole number or none",
        "side": "one of in, out",
    }


def test_a_value_the_pass_itself_refuses_is_an_error_of_the_pipeline() -> None:
    @register
    @dataclass(frozen=True)
    class Picky(Paint):
        name = "test-spec-picky"

        def __post_init__(self) -> None:
            if self.coats < 1:
                raise ValueError("coats must be positive")

    with pytest.raises(PipelineError, match="test-spec-picky: coats must be positive"):
        PipelineSpec.parse("test-spec-picky{coats=0}").build()
