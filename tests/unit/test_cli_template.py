"""Go's templates, as far as `--format` goes. The expected texts are those of docker's `--format` on the same data."""

from __future__ import annotations

from typing import Any

import pytest

from ambi.cli.template import Template
from ambi.core.errors import InvalidRequest

DATA: dict[str, Any] = {
    "Name": "web",
    "Id": "abc",
    "Count": 3,
    "Ratio": 0.5,
    "On": True,
    "Off": False,
    "Null": None,
    "List": ["a", "b c"],
    "Empty": [],
    "Map": {"k": "v", "a": 1},
    "Deep": [{"Name": "x", "More": {"N": 1}}, {"Name": "y", "More": {"N": 2}}],
}

GOOD = {
    "plain": "plain",
    "{{.Name}}": "web",
    "a{{.Name}}b{{.Count}}": "awebb3",
    "{{ .On }} {{.Off}} {{.Null}} {{.Ratio}}": "true false <no value> 0.5",
    "{{.List}} {{.Map}}": "[a b c] map[a:1 k:v]",
    "{{.Map.k}} {{.ID}}": "v abc",
    "{{json .List}} {{json .Null}} {{json .Map}}": '["a","b c"] null {"k":"v","a":1}',
    '{{join .List ","}}|{{join .Empty ","}}': "a,b c|",
    "{{.Name | upper}} {{lower .Name}} {{title .Name}}": "WEB web Web",
    '{{index .List 1}} {{index .Map "k"}} {{index .Map "none"}}.': "b c v .",
    "{{len .List}} {{len .Map}} {{len .Name}}": "2 2 3",
    "{{(index .Deep 1).Name}} {{(index .Deep 0).More.N}}": "y 1",
    "{{if .On}}yes{{else}}no{{end}}": "yes",
    "{{if .Empty}}yes{{else if .On}}other{{else}}no{{end}}": "other",
    "{{if .Off}}yes{{end}}.": ".",
    '{{if eq .Name "web"}}1{{end}}{{if ne .Count 3}}2{{end}}{{if and .On .Name}}3{{end}}{{if not .Null}}4{{end}}': "134",
    '{{if eq .Name "a" "web"}}in{{end}} {{if or .Off .Null}}x{{else}}out{{end}}': "in out",
    "{{if gt .Count 2}}>{{end}}{{if le .Count 2}}<={{end}}": ">",
    "{{range .List}}[{{.}}]{{end}}": "[a][b c]",
    "{{range .Empty}}x{{else}}none{{end}}": "none",
    "{{range $i, $e := .List}}{{$i}}={{$e}};{{end}}": "0=a;1=b c;",
    "{{range $k, $v := .Map}}{{$k}}={{$v}};{{end}}": "a=1;k=v;",
    "{{range $e := .List}}{{$e}}{{$.Name}};{{end}}": "aweb;b cweb;",
    "{{range .Deep}}{{.Name}}{{range $k, $v := .More}}({{$k}}{{$v}}){{end}} {{end}}": "x(N1) y(N2) ",
    "{{with .Map}}{{.k}}{{end}}{{with .Null}}x{{else}}nothing{{end}}": "vnothing",
    "{{$n := .Name}}{{$n}}{{$n}}": "webweb",
    '{{printf "%s-%03d|%-5s|%q|%v%%" .Name .Count .Name .Name .On}}': 'web-003|web  |"web"|true%',
    '{{.Name | printf "%s!%s" "a"}}': "a!web",
    '{{println .Name "x"}}{{print .Name .Count}}': "web x\nweb3",
    "a  {{- .Name -}}  b": "awebb",
    '{{"quoted \\" text"}}': 'quoted " text',
    '{{pad .Name 1 2}}|{{truncate .Name 2}}|{{split "a:b" ":"}}': " web  |we|[a b]",
    "{{.Name}}\\t{{.Id}}": "web\tabc",
    "{{true}} {{1}} {{nil}}": "true 1 <no value>",
    '{{json "<&>"}}': '"<&>"',
}


@pytest.mark.parametrize("template,text", GOOD.items())
def test_template(template: str, text: str) -> None:
    assert Template(template).render(DATA) == text


def test_raw_strings_and_comments() -> None:
    assert Template("{{`a b`}}{{/* gone */}}!").render(DATA) == "a b!"


BAD = [
    "{{", "{{}}", "{{.Name", "{{end}}", "{{else}}", "{{if .On}}", "{{range .List}}x", "{{nofunc .Name}}", "{{Name}}",
    "{{.Nope}}", "{{.Name.Nope}}", "{{.Map.nope}}", '{{"open}}', "{{(.Name}}", "{{.Name)}}", "{{.Name | }}", "{{| upper}}",
    "{{.Name .Id}}", "{{index .List 7}}", "{{index .Count 1}}", "{{join .Name}}", '{{printf "%d" .Name}}', '{{printf "%s"}}',
    "{{$x}}", "{{range .Name}}{{end}}", "{{len .Count}}", "{{gt .Name 1}}", '{{printf "%y" 1}}', "{{if}}{{end}}",
    "{{.List.0}}", "{{split .Name}}",
]  # fmt: skip


@pytest.mark.parametrize("template", BAD)
def test_bad_templates_are_refused_on_one_line(template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Template(template).render(DATA)
    assert caught.value.message.startswith("--format: ") and "\n" not in caught.value.message


def test_a_wrong_field_is_known_before_there_is_data() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Template("{{.Nmae}}", ["Name", "ID"])
    assert caught.value.hint == "did you mean .Name?"
    Template("{{range .Name}}{{.Whatever}}{{end}}", ["Name"])
