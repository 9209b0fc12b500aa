"""Pipelines as values: one list of passes with options, spelt as text, as YAML or as Python objects.

Text::

    canonicalize,fuse-conv-bn{epsilon=1e-5 only=[c1,c2]},fixpoint(fuse-conv-relu,cleanup)

    pipeline := step ("," step)*
    step     := pass | "fixpoint" "(" pass ("," pass)* ")"
    pass     := NAME ["{" (NAME "=" value)* "}"]
    value    := scalar | "[" [scalar ("," scalar)*] "]"
    scalar   := true | false | none | whole number | number | bare word | "quoted, with JSON escapes"

YAML: a mapping with ``passes`` (a list of names, ``{name: {option: value}}`` and ``{fixpoint: [...]}``) and,
optionally, ``name``, ``description`` and ``target``.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from qat2int8.ir import PipelineError
from qat2int8.passes import Pass, find_pass

__all__ = [
    "FIXPOINT",
    "Fixpoint",
    "Option",
    "OptionField",
    "PassSpec",
    "PipelineSpec",
    "flatten",
    "option_fields",
    "read_document",
    "spell",
]

Scalar: TypeAlias = bool | int | float | str | None
Option: TypeAlias = Scalar | tuple[Scalar, ...]
"""What an option can be in text and YAML; the fields of the pass give it its Python type."""

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

FIXPOINT = "fixpoint"
"""The one name no pass can have."""

_ONE_LEVEL = "one level is enough"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
_WORD = r'[^\s,{}()\[\]="]+'
_TOKEN = re.compile(rf'\s*(?:(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<word>{_WORD})|(?P<mark>[,{{}}()\[\]=]))', re.DOTALL)
_WHOLE = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")
_NUMBER = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)|inf)")
_CONSTANTS: dict[str, Scalar] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Fixpoint(Generic[T]):
    """Passes that run in turn until a whole round changes nothing."""

    passes: tuple[T, ...]

    def __post_init__(self) -> None:
        if not self.passes:
            raise PipelineError(f"{FIXPOINT} has no passes", remedy=f"write {FIXPOINT}(a,b)")

    def __str__(self) -> str:
        return f"{FIXPOINT}({','.join(map(str, self.passes))})"


def flatten(steps: Iterable[T | Fixpoint[T]]) -> Iterator[T]:
    """The passes of ``steps`` in the order in which they first run."""
    for step in steps:
        if isinstance(step, Fixpoint):
            yield from step.passes
        else:
            yield step


@dataclass(frozen=True)
class PassSpec:
    """One pass by name, with the options that are spelt out.

    Raises:
        PipelineError: a name or a value that none of the spellings can hold.
    """

    name: str
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == FIXPOINT:
            raise PipelineError(f"'{self.name}' cannot be the name of a pass")
        for key in self.options:
            if not _NAME.fullmatch(str(key)):
                raise PipelineError(f"'{key}' cannot be the name of an option", where=self.name)
        plain = {key: _plain(value, f"{self.name}: option '{key}'") for key, value in self.options.items()}
        object.__setattr__(self, "options", plain)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}{{{' '.join(f'{key}={spell(value)}' for key, value in self.options.items())}}}"

    @classmethod
    def of(cls, pass_: Pass) -> PassSpec:
        """The spec that builds ``pass_`` again; options that equal their default are left out."""
        fields = option_fields(type(pass_)).values()
        values = {f.name: getattr(pass_, f.name) for f in fields}
        return cls(pass_.name, {f.name: values[f.name] for f in fields if values[f.name] != f.default})

    def build(self) -> Pass:
        """The pass itself.

        Raises:
            PipelineError: no such pass, an option it does not have, or a value of the wrong type.
        """
        cls = find_pass(self.name)
        known = option_fields(cls)
        arguments: dict[str, Any] = {}
        for key, value in self.options.items():
            if key not in known:
                raise PipelineError(f"{self.name} has no option '{key}'", remedy=_nearest(key, known))
            arguments[key] = known[key].convert(value)
        try:
            return cls(**arguments)
        except (TypeError, ValueError) as error:
            raise PipelineError(str(error), where=self.name) from error


Step: TypeAlias = PassSpec | Fixpoint[PassSpec]


@dataclass(frozen=True)
class PipelineSpec:
    """A pipeline by name of its passes. ``str(spec)`` is its text; :meth:`to_yaml` keeps name and description too.

    ``target`` names the target the pipeline is meant for; empty means whichever the caller chooses.
    """

    passes: tuple[Step, ...]
    name: str = ""
    description: str = ""
    target: str = ""

    def __post_init__(self) -> None:
        if not self.passes:
            raise PipelineError("the pipeline is empty", where=self.name, remedy="name at least one pass")

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    @classmethod
    def parse(cls, text: str) -> PipelineSpec:
        """Read the text form.

        Raises:
            PipelineError: with the column at which the text stops making sense.
        """
        return cls(_Parser(text).pipeline())

    @classmethod
    def of(cls, passes: Iterable[Pass | Fixpoint[Pass]], *, name: str = "", description: str = "") -> PipelineSpec:
        """The spec of passes that were built in Python."""
        steps: list[Step] = []
        for step in passes:
            if isinstance(step, Fixpoint):
                steps.append(Fixpoint(tuple(PassSpec.of(inner) for inner in step.passes)))
            else:
                steps.append(PassSpec.of(step))
        return cls(tuple(steps), name, description)

    def build(self) -> tuple[Pass | Fixpoint[Pass], ...]:
        """The passes themselves, ready to run.

        Raises:
            PipelineError: as :meth:`PassSpec.build`.
        """
        return tuple(
            Fixpoint(tuple(inner.build() for inner in step.passes)) if isinstance(step, Fixpoint) else step.build()
            for step in self.passes
        )

    def with_options(self, overrides: Mapping[str, Mapping[str, Any]]) -> PipelineSpec:
        """The same pipeline with options of some passes replaced, by the name of the pass, wherever it occurs.

        Raises:
            PipelineError: the pipeline has no pass of that name.
        """
        names = {spec.name for spec in flatten(self.passes)}
        for name in overrides:
            if name not in names:
                raise PipelineError(f"the pipeline has no pass '{name}'", remedy=_nearest(name, names))

        def changed(spec: PassSpec) -> PassSpec:
            return PassSpec(spec.name, {**spec.options, **overrides.get(spec.name, {})})

        steps = tuple(
            Fixpoint(tuple(map(changed, step.passes))) if isinstance(step, Fixpoint) else changed(step)
            for step in self.passes
        )
        return dataclasses.replace(self, passes=steps)

    @classmethod
    def from_yaml(cls, text: str, *, where: str = "pipeline") -> PipelineSpec:
        """Read the YAML form.

        Raises:
            PipelineError: not YAML, an unknown key, or a step that is none; ``where`` names the file.
        """
        document = read_document(text, _PipelineFile, where=where)
        try:
            steps = tuple(_step_from_yaml(step) for step in document.passes)
            return cls(steps, document.name, document.description, document.target)
        except PipelineError as error:
            place = f"{where}: {error.where}" if error.where else where
            raise PipelineError(error.what, where=place, remedy=error.remedy) from error

    def to_yaml(self) -> str:
        """The YAML form; the inverse of :meth:`from_yaml`."""
        head = {"name": self.name, "description": self.description, "target": self.target}
        document: dict[str, Any] = {key: value for key, value in head.items() if value}
        document["passes"] = [
            {FIXPOINT: [_pass_to_yaml(inner) for inner in step.passes]}
            if isinstance(step, Fixpoint)
            else _pass_to_yaml(step)
            for step in self.passes
        ]
        text: str = yaml.safe_dump(document, sort_keys=False, width=100)
        return text


# -- options and the fields of a pass -------------------------------------------------------------------------


@dataclass(frozen=True)
class OptionField:
    """One option of a pass: its dataclass field, with the annotation resolved."""

    pass_name: str
    name: str
    type: Any
    default: Any

    @property
    def expects(self) -> str:
        """The values it takes, in words."""
        return _expects(self.type)

    def convert(self, value: Option) -> Any:
        """``value`` as the field's own type.

        Raises:
            PipelineError: it is not one; names the pass, the option, what is expected and what was given.
        """
        try:
            return _convert(self.type, value)
        except _Mismatch:
            raise PipelineError(
                f"option '{self.name}' expects {self.expects}, not {spell(value)}",
                where=self.pass_name,
            ) from None


def option_fields(cls: type[Any]) -> dict[str, OptionField]:
    """The options of a pass, or of anything else with a ``name``, by name, in the order of its fields."""
    # A pass without options need not be a dataclass.
    fields = dataclasses.fields(cls) if "__dataclass_fields__" in vars(cls) else ()
    hints = typing.get_type_hints(cls)
    options: dict[str, OptionField] = {}
    for f in fields:
        if f.init:
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            options[f.name] = OptionField(cls.name, f.name, hints[f.name], default)
    return options


class _Mismatch(Exception):
    """A value is not of the type asked for."""


def _convert(kind: Any, value: Option) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            try:
                return _convert(choice, value)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is tuple and isinstance(value, tuple):
        return tuple(_convert(arguments[0], item) for item in value)
    if origin is typing.Literal and value in arguments:
        return value
    if kind is types.NoneType and value is None:
        return None
    if isinstance(value, bool):
        if kind is bool:
            return value
        raise _Mismatch
    if kind is int and isinstance(value, int):
        return value
    if kind is float and isinstance(value, int | float):
        return float(value)
    if kind is str and isinstance(value, str | int):
        # Exporters number tensors, and "124" without quotes reads as a number.
        return str(value)
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum) and isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            raise _Mismatch from None
    raise _Mismatch


def _expects(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expects(choice) for choice in arguments)
    if origin is tuple:
        return f"a list of {_expects(arguments[0])}"
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        return f"one of {', '.join(kind)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "none"}
    return words.get(kind, str(kind))


def _plain(value: object, where: str) -> Option:
    """An option reduced to what text and YAML can hold."""
    if isinstance(value, list | tuple):
        items = tuple(_plain(item, where) for item in value)
        if any(isinstance(item, tuple) for item in items):
            raise PipelineError("a list inside a list", where=where)
        return typing.cast(tuple[Scalar, ...], items)
    if isinstance(value, enum.StrEnum):
        return value.value
    if isinstance(value, float) and math.isnan(value):
        raise PipelineError("not a number (nan)", where=where)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise PipelineError(f"{value:.3e} does not fit 64 bits", where=where)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise PipelineError(f"a {type(value).__name__} is no option value", where=where, remedy="write text in quotes")


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(names)}" if names else "it has none"


# -- text -----------------------------------------------------------------------------------------------------


def spell(value: Option) -> str:
    """An option's value in the text form."""
    if isinstance(value, tuple):
        return f"[{','.join(map(spell, value))}]"
    if isinstance(value, str):
        bare = re.fullmatch(_WORD, value) and value not in _CONSTANTS
        return value if bare and not _WHOLE.fullmatch(value) and not _NUMBER.fullmatch(value) else _quote(value)
    for word, constant in _CONSTANTS.items():
        if value is constant:
            return word
    return repr(value)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class _Parser:
    """Recursive descent over the text form; every error tells the column."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str, int]] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise PipelineError("a quote is not closed", where=_column(text.index('"', position)))
            kind = match.lastgroup or ""
            self._tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()
        self._tokens.append(("end", "the end", end))
        self._next = 0

    def pipeline(self) -> tuple[Step, ...]:
        steps = [self._step()]
        while self._accept(","):
            steps.append(self._step())
        if self._peek()[0] != "end":
            self._fail("','")
        return tuple(steps)

    def _step(self) -> Step:
        if self._peek()[:2] != ("word", FIXPOINT):
            return self._pass()
        self._next += 1
        self._expect("(")
        passes = [self._pass()]
        while self._accept(","):
            passes.append(self._pass())
        self._expect(")")
        return Fixpoint(tuple(passes))

    def _pass(self) -> PassSpec:
        _, name, at = self._peek()
        if name == FIXPOINT:
            raise PipelineError(f"a {FIXPOINT} inside a {FIXPOINT}", where=_column(at), remedy=_ONE_LEVEL)
        self._word("the name of a pass")
        options: dict[str, Option] = {}
        if self._accept("{"):
            while not self._accept("}"):
                key, at = self._word("an option or '}'")
                if key in options:
                    raise PipelineError(f"{name} is given option '{key}' twice", where=_column(at))
                self._expect("=")
                options[key] = self._value()
        return PassSpec(name, options)

    def _value(self) -> Option:
        if not self._accept("["):
            return self._scalar()
        items: list[Scalar] = []
        if not self._accept("]"):
            items.append(self._scalar())
            while self._accept(","):
                items.append(self._scalar())
            self._expect("]")
        return tuple(items)

    def _scalar(self) -> Scalar:
        kind, text, at = self._peek()
        if kind == "quoted":
            self._next += 1
            try:
                return str(json.loads(text, strict=False))
            except json.JSONDecodeError as error:
                raise PipelineError(f"{text} has an escape that is none", where=_column(at)) from error
        text, _ = self._word("a value")
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _WHOLE.fullmatch(text):
            return int(text)
        return float(text) if _NUMBER.fullmatch(text) else text

    def _peek(self) -> tuple[str, str, int]:
        return self._tokens[self._next]

    def _accept(self, mark: str) -> bool:
        if self._peek()[:2] != ("mark", mark):
            return False
        self._next += 1
        return True

    def _expect(self, mark: str) -> None:
        if not self._accept(mark):
            self._fail(f"'{mark}'")

    def _word(self, wanted: str) -> tuple[str, int]:
        kind, text, at = self._peek()
        if kind != "word":
            self._fail(wanted)
        self._next += 1
        return text, at

    def _fail(self, wanted: str) -> typing.NoReturn:
        kind, found, at = self._peek()
        shown = found if kind == "end" else f"'{found}'"
        raise PipelineError(f"expected {wanted}, found {shown}", where=_column(at))


def _column(position: int) -> str:
    return f"pipeline text, column {position + 1}"


# -- YAML -----------------------------------------------------------------------------------------------------


class _PipelineFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    passes: list[Any]
    name: str = ""
    description: str = ""
    target: str = ""


def _step_from_yaml(entry: object, *, nested: bool = False) -> Any:
    if isinstance(entry, str) and entry != FIXPOINT:
        return PassSpec(entry)
    if not isinstance(entry, dict) or len(entry) != 1:
        raise PipelineError(
            f"{json.dumps(entry, default=str)} is no step",
            remedy="write a pass's name, {name: {option: value}} or {fixpoint: [names]}",
        )
    ((name, body),) = entry.items()
    if name == FIXPOINT:
        if nested:
            raise PipelineError(f"a {FIXPOINT} inside a {FIXPOINT}", remedy=_ONE_LEVEL)
        if not isinstance(body, list):
            raise PipelineError(f"{FIXPOINT} needs a list of passes")
        return Fixpoint(tuple(_step_from_yaml(inner, nested=True) for inner in body))
    if not isinstance(body, dict | None):
        raise PipelineError("options are a mapping", where=str(name), remedy=f"write {name}: {{option: value}}")
    return PassSpec(str(name), body or {})


def _pass_to_yaml(spec: PassSpec) -> Any:
    if not spec.options:
        return spec.name
    return {spec.name: {k: list(v) if isinstance(v, tuple) else v for k, v in spec.options.items()}}


def read_document(text: str, schema: type[M], *, where: str) -> M:
    """Read YAML into a pydantic model that forbids unknown keys.

    Raises:
        PipelineError: with file, line and, for an unknown key, the nearest known one.
    """
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is not None:
            _refuse_duplicates(tree, where)
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PipelineError(f"not YAML: {error.problem}", where=where + mark) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise PipelineError(f"not YAML: {str(error).splitlines()[0]}", where=where) from error
    if not isinstance(content, dict):
        raise PipelineError(f"a mapping is expected, with the keys {', '.join(schema.model_fields)}", where=where)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        # A misspelt key is unknown and, where it is required, missing as well: the first says more.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        path = first["loc"]
        line = _line_of(tree, path)
        place = f"{where}:{line}" if line else where
        dotted = ".".join(map(str, path))
        if first["type"] == "extra_forbidden":
            remedy = _nearest(str(path[-1]), _keys_at(schema, path[:-1]))
            raise PipelineError(f"unknown key '{dotted}'", where=place, remedy=remedy) from error
        if first["type"] == "missing":
            raise PipelineError(f"the key '{dotted}' is missing", where=place) from error
        raise PipelineError(f"{dotted}: {first['msg']}", where=place) from error


def _refuse_duplicates(node: yaml.Node, where: str) -> None:
    """YAML keeps the last of two equal keys and says nothing; an option given twice is a mistake."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, where)
    elif isinstance(node, yaml.MappingNode):
        seen: set[object] = set()
        for key, value in node.value:
            if str(key.value) in seen:
                raise PipelineError(f"the key '{key.value}' is given twice", where=f"{where}:{_line(key)}")
            seen.add(str(key.value))
            _refuse_duplicates(value, where)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _line_of(node: yaml.Node | None, path: Sequence[object]) -> int:
    """The line of the key at ``path``; that of its deepest part that exists; 0 for the document itself."""
    line = 0
    for part in path:
        pairs: list[tuple[yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if key.value == str(part)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            pairs = [(node.value[part], node.value[part])]
        if not pairs:
            break
        key, node = pairs[0]
        line = _line(key)
    return line


def _keys_at(schema: type[BaseModel], path: Sequence[object]) -> Iterable[str]:
    """The keys known at ``path`` of a document."""
    kind: Any = schema
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
        else:
            kind = typing.get_args(kind)[-1]
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else ()
