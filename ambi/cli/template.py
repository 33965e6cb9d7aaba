r"""The part of Go's text/template that `--format` is used with.

    {{.Name}} {{.State.Status}} {{$x.Name}} {{(index .Mounts 0).Source}}    fields
    {{json .}} {{join .Args " "}} {{index .Labels "a"}} {{len .Mounts}}     functions, see FUNCTIONS
    {{.Name | upper | printf "%s!"}}                                        pipelines
    {{if .A}} {{else if .B}} {{else}} {{end}}   {{range .L}} {{else}} {{end}}   {{with .A}} {{end}}
    {{range $key, $value := .Labels}} {{end}}   {{$name := .Name}}          variables
    {{- trims -}}   {{/* comments */}}

Data is parsed JSON; values print as Go prints them (`[a b]`, `map[k:v]`, `<no value>`). A field that is not there is an
error that names it, not an empty string: a script should not go on with nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ambi.core.errors import InvalidRequest

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "'": "'"}
_END_OF_WORD = frozenset(' \t\r\n()|,:="`')

Scope = dict[str, Any]
Node = Callable[[Any, Scope], Iterable[str]]
Expression = Callable[[Any, Scope], Any]


def text_of(value: Any) -> str:
    """`value` as Go's `%v` prints it."""
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "map[" + " ".join(f"{k}:{text_of(v)}" for k, v in sorted(value.items())) + "]"
    if isinstance(value, list | tuple):
        return "[" + " ".join(map(text_of, value)) + "]"
    return str(value)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key, "")
        elif isinstance(value, list | tuple | str) and isinstance(key, int):
            if not 0 <= key < len(value):
                raise InvalidRequest(f"--format: index {key} is out of range of {len(value)} entries")
            value = value[key]
        else:
            raise InvalidRequest(f"--format: {text_of(value)} cannot be indexed by {text_of(key)}")
    return value


def _printf(form: str, *values: Any) -> str:
    out, rest, left = [], form, list(values)
    while "%" in rest:
        head, _, rest = rest.partition("%")
        out.append(head)
        width = ""
        while rest and (rest[0].isdigit() or rest[0] in "-.+ "):
            width, rest = width + rest[0], rest[1:]
        verb, rest = rest[:1], rest[1:]
        if verb == "%":
            out.append("%")
        elif not left:
            raise InvalidRequest(f"--format: printf {json.dumps(form)} has more verbs than values")
        else:
            out.append(_verb(verb, width, left.pop(0)))
    return "".join(out) + rest


def _verb(verb: str, width: str, value: Any) -> str:
    try:
        if verb in "sv":
            return f"%{width}s" % text_of(value)
        if verb == "q":
            return f"%{width}s" % json.dumps(text_of(value), ensure_ascii=False)
        if verb in "dxXof" and verb:
            return str(f"%{width}{verb}" % value)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"--format: %{width}{verb} does not print {text_of(value)}: {error}") from None
    raise InvalidRequest(f"--format: printf knows no verb '%{verb}'")


def _compare(name: str) -> Callable[..., bool]:
    import operator

    test = getattr(operator, name)

    def compare(left: Any, *right: Any) -> bool:
        try:
            return any(test(left, value) for value in right)
        except TypeError:
            raise InvalidRequest(f"--format: {name} cannot compare {text_of(left)} with {text_of(right[0])}") from None

    return compare


def _and(*values: Any) -> Any:
    return next((v for v in values if not v), values[-1])


def _or(*values: Any) -> Any:
    return next((v for v in values if v), values[-1])


def to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def to_escaped_json(value: Any) -> str:
    """JSON as Go writes it where nobody asks it not to: safe inside HTML."""
    text = to_json(value)
    for char in "&<>":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": _and,
    "or": _or,
    "not": lambda value: not value,
    "eq": _compare("eq"),
    "ne": _compare("ne"),
    "lt": _compare("lt"),
    "le": _compare("le"),
    "gt": _compare("gt"),
    "ge": _compare("ge"),
    "index": _index,
    "len": len,
    "json": to_json,
    "join": lambda values, sep: sep.join(map(text_of, values or ())),
    "split": lambda text, sep: text_of(text).split(sep),
    "lower": lambda text: text_of(text).lower(),
    "upper": lambda text: text_of(text).upper(),
    "title": lambda text: " ".join(word[:1].upper() + word[1:] for word in text_of(text).split(" ")),
    "pad": lambda text, left, right: " " * left + text_of(text) + " " * right if text else "",
    "truncate": lambda text, length: text_of(text)[:length],
    "print": lambda *values: "".join(map(text_of, values)),
    "println": lambda *values: " ".join(map(text_of, values)) + "\n",
    "printf": _printf,
}


class Template:
    """A compiled template. Raises InvalidRequest where it is malformed or asks for what is not there.

    fields: names that the data is known to have, to tell a wrong one before anything is asked of the engine.
    """

    __slots__ = ("_body", "_fields")

    def __init__(self, text: str, fields: Iterable[str] | None = None) -> None:
        self._fields = frozenset(fields) if fields is not None else None
        text = text.replace("\\t", "\t").replace("\\n", "\n")  # docker does so, for shells that make it hard
        parser = _Parser(list(_split(text)), self._fields)
        self._body = parser.body(())[0]

    def render(self, data: Any) -> str:
        return "".join(self._body(data, {"$": data}))


def _split(text: str) -> Iterator[tuple[bool, str]]:
    """(is an action, its text) in order, with trim markers applied and comments gone."""
    trim = False
    while text:
        start = text.find("{{")
        literal = text if start < 0 else text[:start]
        if trim:
            literal = literal.lstrip()
        if start < 0:
            yield False, literal
            return
        end = text.find("}}", start)
        if end < 0:
            raise InvalidRequest("--format: '{{' without '}}'", hint="a template looks like '{{.ID}} {{.Names}}'")
        action, text = text[start + 2 : end], text[end + 2 :]
        if action.startswith("- "):
            literal, action = literal.rstrip(), action[2:]
        trim = action.endswith(" -")
        action = action.removesuffix(" -").strip()
        if literal:
            yield False, literal
        if not (action.startswith("/*") and action.endswith("*/")):
            yield True, action


def _words(text: str) -> list[str]:
    """The tokens of an action. String literals keep their opening quote, as a mark, and lose the closing one."""
    words: list[str] = []
    place = 0
    while place < len(text):
        char = text[place]
        if char.isspace():
            place += 1
        elif text.startswith(":=", place):
            words.append(":=")
            place += 2
        elif char in "()|,=":
            words.append(char)
            place += 1
        elif char in '"`':
            literal, place = _literal(text, place)
            words.append('"' + literal)
        else:
            end = place
            while end < len(text) and text[end] not in _END_OF_WORD:
                end += 1
            if end == place:
                raise InvalidRequest(f"--format: unexpected '{char}' in '{{{{{text}}}}}'")
            words.append(text[place:end])
            place = end
    return words


def _literal(text: str, place: int) -> tuple[str, int]:
    quote, out = text[place], []
    place += 1
    while place < len(text) and text[place] != quote:
        if quote == '"' and text[place] == "\\" and place + 1 < len(text):
            place += 1
            out.append(_ESCAPES.get(text[place], text[place]))
        else:
            out.append(text[place])
        place += 1
    if place >= len(text):
        raise InvalidRequest(f"--format: a string without its end in '{{{{{text}}}}}'")
    return "".join(out), place + 1


def _field(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        if name in value:
            return value[name]
        lower = name.lower()  # `.ID` of JSON's `Id`
        for key in value:
            if key.lower() == lower:
                return value[key]
        from ambi.cli.output import nearest

        near = nearest(name, map(str, value))
        raise InvalidRequest(f"--format: there is no field '{name}'", hint=f"did you mean .{near}?" if near else None)
    if value is None:
        return None
    raise InvalidRequest(f"--format: '{name}' is asked of {text_of(value)}, which has no fields")


class _Parser:
    """Turns the parts of a template into closures over (dot, variables)."""

    def __init__(self, parts: list[tuple[bool, str]], fields: frozenset[str] | None) -> None:
        self._parts = parts
        self._place = 0
        self._fields = fields
        self._depth = 0  # of blocks that move the dot, in which `fields` says nothing

    def body(self, ends: tuple[str, ...]) -> tuple[Node, str]:
        """Everything up to an action that starts with one of `ends`, and that action."""
        nodes: list[Node] = []
        while self._place < len(self._parts):
            is_action, text = self._parts[self._place]
            self._place += 1
            if not is_action:
                nodes.append(lambda dot, scope, text=text: (text,))  # type: ignore[misc]
                continue
            word = text.split(None, 1)[0] if text else ""
            if word in ends:
                return _sequence(nodes), text
            nodes.append(self._action(word, text))
        if ends:
            raise InvalidRequest("--format: a block without {{end}}")
        return _sequence(nodes), ""

    def _action(self, word: str, text: str) -> Node:
        if word == "if":
            return self._if(text[2:])
        if word == "range":
            return self._range(text[5:])
        if word == "with":
            return self._with(text[4:])
        if word in ("end", "else"):
            raise InvalidRequest(f"--format: {{{{{word}}}}} without a block")
        if not text:
            raise InvalidRequest("--format: an empty '{{}}'")
        words = _words(text)
        if len(words) > 2 and words[0].startswith("$") and words[1] in (":=", "="):
            return self._assign(words[0], self._pipeline(words[2:]))
        value = self._pipeline(words)
        return lambda dot, scope: (text_of(value(dot, scope)),)

    @staticmethod
    def _assign(name: str, value: Expression) -> Node:
        def assign(dot: Any, scope: Scope) -> Iterable[str]:
            scope[name] = value(dot, scope)
            return ()

        return assign

    def _if(self, condition: str) -> Node:
        test = self._pipeline(_words(condition))
        then, end = self.body(("else", "end"))
        otherwise = self._else(end)
        return lambda dot, scope: then(dot, scope) if test(dot, scope) else otherwise(dot, scope)

    def _else(self, end: str) -> Node:
        if end == "end":
            return lambda dot, scope: ()
        more = end.split(None, 1)[1] if " " in end else ""
        if more.startswith("if "):
            return self._if(more[2:])
        return self.body(("end",))[0]

    def _with(self, text: str) -> Node:
        value = self._pipeline(_words(text))
        self._depth += 1
        then, end = self.body(("else", "end"))
        self._depth -= 1
        otherwise = self._else(end)

        def with_(dot: Any, scope: Scope) -> Iterable[str]:
            inner = value(dot, scope)
            return then(inner, scope) if inner else otherwise(dot, scope)

        return with_

    def _range(self, text: str) -> Node:
        words, names = _words(text), []
        if ":=" in words:
            place = words.index(":=")
            names, words = [w for w in words[:place] if w != ","], words[place + 1 :]
        value = self._pipeline(words)
        self._depth += 1
        each, end = self.body(("else", "end"))
        self._depth -= 1
        otherwise = self._else(end)

        def loop(dot: Any, scope: Scope) -> Iterable[str]:
            items = list(_items(value(dot, scope)))
            if not items:
                return otherwise(dot, scope)
            out: list[str] = []
            for key, item in items:
                inner = dict(scope)
                inner.update(zip(names, (item,) if len(names) == 1 else (key, item), strict=False))
                out.extend(each(item, inner))
            return out

        return loop

    def _pipeline(self, words: list[str]) -> Expression:
        if not words:
            raise InvalidRequest("--format: a value is missing")
        stages: list[list[str]] = [[]]
        depth = 0
        for word in words:
            depth += (word == "(") - (word == ")")
            if word == "|" and not depth:
                stages.append([])
            else:
                stages[-1].append(word)
        if depth:
            raise InvalidRequest("--format: parentheses do not match")
        value = self._command(stages[0], None)
        for stage in stages[1:]:
            value = self._command(stage, value)
        return value

    def _command(self, words: list[str], piped: Expression | None) -> Expression:
        """One stage: a function with its arguments, the piped value last, or a single operand."""
        if not words:
            raise InvalidRequest("--format: a value is missing beside '|'")
        name = words[0]
        if name in FUNCTIONS:
            arguments = list(self._operands(words[1:])) + ([piped] if piped else [])
            return _call(name, FUNCTIONS[name], arguments)
        operands = list(self._operands(words))
        if len(operands) > 1 and name.startswith(".") and len(name) > 1:
            return _method(name, operands)
        if len(operands) != 1 or piped:
            raise InvalidRequest(f"--format: '{name.lstrip(chr(34))}' is no function")
        return operands[0]

    def _operands(self, words: list[str]) -> Iterator[Expression]:
        place = 0
        while place < len(words):
            word = words[place]
            place += 1
            if word != "(":
                yield self._operand(word)
                continue
            start, depth = place, 1
            while depth and place < len(words):
                depth += (words[place] == "(") - (words[place] == ")")
                place += 1
            inner = self._pipeline(words[start : place - 1])
            if place < len(words) and words[place].startswith(".") and len(words[place]) > 1:
                inner = _path(inner, words[place][1:].split("."))
                place += 1
            yield inner

    def _operand(self, word: str) -> Expression:
        if word.startswith('"'):
            return lambda dot, scope: word[1:]
        if word in ("true", "false"):
            return lambda dot, scope: word == "true"
        if word == "nil":
            return lambda dot, scope: None
        if word == ".":
            return lambda dot, scope: dot
        if word.startswith("."):
            names = word[1:].split(".")
            self._check(names[0])
            return _path(lambda dot, scope: dot, names)
        if word.startswith("$"):
            variable, *names = word.split(".")
            return _path(lambda dot, scope: _variable(scope, variable), names)
        try:
            number = float(word) if "." in word else int(word, 0)
        except ValueError:
            from ambi.cli.output import nearest

            near = nearest(word, FUNCTIONS)
            hint = f"did you mean {near}?" if near else "fields begin with a dot: {{.Name}}"
            raise InvalidRequest(f"--format: '{word}' is no function", hint=hint) from None
        return lambda dot, scope: number

    def _check(self, name: str) -> None:
        if self._fields is None or self._depth or name in self._fields:
            return
        from ambi.cli.output import nearest

        near = nearest(name, self._fields)
        hint = f"did you mean .{near}?" if near else "fields: ." + " .".join(sorted(self._fields))
        raise InvalidRequest(f"--format: there is no field '{name}'", hint=hint)


def _sequence(nodes: list[Node]) -> Node:
    return lambda dot, scope: [part for node in nodes for part in node(dot, scope)]


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from sorted(value.items())
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from enumerate(range(value))
    elif value:
        raise InvalidRequest(f"--format: range over {text_of(value)} is not possible")


def _path(start: Expression, names: list[str]) -> Expression:
    def walk(dot: Any, scope: Scope) -> Any:
        value = start(dot, scope)
        for name in names:
            value = _field(value, name)
        return value

    return walk


def _variable(scope: Scope, name: str) -> Any:
    if name not in scope:
        raise InvalidRequest(f"--format: there is no variable '{name}'")
    return scope[name]


def _method(name: str, operands: list[Expression]) -> Expression:
    """`.Label "a"`: a field that is a function, with its arguments."""

    def call(dot: Any, scope: Scope) -> Any:
        function, *arguments = (operand(dot, scope) for operand in operands)
        if not callable(function):
            raise InvalidRequest(f"--format: '{name}' takes no argument")
        return function(*arguments)

    return call


def _call(name: str, function: Callable[..., Any], arguments: list[Expression]) -> Expression:
    def call(dot: Any, scope: Scope) -> Any:
        try:
            return function(*(argument(dot, scope) for argument in arguments))
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise InvalidRequest(f"--format: {name}: {error}") from None

    return call
