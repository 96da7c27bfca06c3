//! Templates that try to hang, crash or escape, and corners of Python's semantics that published templates rarely reach.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

use pmetal_formats::Error;
use pmetal_formats::chat_template::{ChatTemplate, RenderRequest};
use serde_json::{Map, json};

fn render(source: &str) -> Result<String, Error> {
    let messages = json!([{"role": "user", "content": "a \"b\" c", "n": 3, "f": 1.0, "none": {"x": null, "y": [1, true]}}]);
    let request = RenderRequest {
        messages: &messages,
        tools: None,
        documents: None,
        add_generation_prompt: false,
        continue_final_message: false,
        variables: &Map::new(),
        now_unix_s: 1_709_215_445,
    };
    ChatTemplate::compile(source)?.render(&request).map(|rendered| rendered.text)
}

fn refused(source: &str, part: &str) {
    let shown = &source[..source.len().min(80)];
    match render(source) {
        Ok(text) => panic!("{shown} gave {} bytes", text.len()),
        Err(error) => assert!(error.to_string().contains(part), "{shown}: {error}"),
    }
}

#[test]
fn work_is_bounded() {
    refused("{% for i in range(10**9) %}x{% endfor %}", "too long");
    let nested = "{% for a in range(10000) %}{% for b in range(10000) %}{% if a == b %}{% endif %}{% endfor %}{% endfor %}";
    refused(nested, "steps");
    refused("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses");
    refused("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recurses");
}

#[test]
fn memory_is_bounded() {
    refused("{{ 'x' * 10**9 }}", "bytes");
    refused("{{ [1] * 10**9 }}", "bytes");
    refused(
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "make",
    );
    refused(
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "make",
    );
    refused(
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s|replace('a', 'aa') %}{% endfor %}",
        "make",
    );
    refused(
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}",
        "make",
    );
    refused(
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
        "make",
    );
    refused("{% for i in range(9000) %}{{ 'x' * 100000 }}{% endfor %}", "more text");
    refused(
        "{% set ns = namespace(s='a') %}{% for i in range(900) %}{% set ns.s = [ns.s] %}{% endfor %}",
        "nest",
    );
}

#[test]
fn deep_and_long_sources_are_refused() {
    for source in [
        format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000)),
        format!("{{{{ {}1 }}}}", "-".repeat(100_000)),
        format!("{{{{ {}1 }}}}", "not ".repeat(3_900)),
        format!("{{{{ a{} }}}}", ".a".repeat(100_000)),
        format!("{{{{ a{} }}}}", ".a".repeat(1_900)),
        format!("{{{{ a{} }}}}", "~a".repeat(1_900)),
        format!("{{{{ {}1{} }}}}", "[".repeat(1_900), "]".repeat(1_900)),
        format!("{}{}", "{% if a %}".repeat(10_000), "{% endif %}".repeat(10_000)),
        format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(20_000)),
        "x".repeat(1 << 20),
        "{% if".to_owned(),
        "{{ 'a".to_owned(),
        "{% for x in y %}".to_owned(),
    ] {
        assert!(ChatTemplate::compile(&source).is_err(), "{}", &source[..source.len().min(60)]);
    }
}

#[test]
fn other_files_and_host_objects_are_out_of_reach() {
    for source in
        ["{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{% from 'x' import y %}"]
    {
        assert!(ChatTemplate::compile(source).is_err(), "{source}");
    }
    assert_eq!(render("[{{ ''.__class__ }}{{ messages.__init__ }}]").unwrap(), "[]");
    refused("{{ ''.__class__.__mro__ }}", "undefined");
    refused("{{ messages.append(1) }}", "undefined");
    refused("{% set ns = namespace(__x=1) %}", "underscore");
}

#[test]
fn raised_messages_come_through_whole() {
    match render("{{ raise_exception('no ' ~ messages[0].n ~ '!') }}").unwrap_err() {
        Error::TemplateRaised(message) => assert_eq!(message, "no 3!"),
        other => panic!("{other}"),
    }
}

#[test]
fn corners_match_python() {
    for (source, expected) in [
        ("{{ messages[0].none }}", "{'x': None, 'y': [1, True]}"),
        ("{{ [\"it's\", 'x\\n', 'caf\u{e9}', '\\u200b'] }}", "[\"it's\", 'x\\n', 'caf\u{e9}', '\\u200b']"),
        (
            "{{ 7 // -2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 3 }} {{ 1e16 }} {{ 1e-7 }} {{ 0.1 + 0.2 }}",
            "-4 2 3.5 8 1e+16 1e-07 0.30000000000000004",
        ),
        ("{{ 'abcdef'[::-1] }} {{ [1,2,3][::-2] }} {{ 'abc'[-2:] }} {{ 'abc'[5:] }}", "fedcba [3, 1] bc "),
        (
            "{{ 'a,b,,c'.split(',') }} {{ ' a  b '.split() }} {{ 'a b c'.split(' ', 1) }}",
            "['a', 'b', '', 'c'] ['a', 'b'] ['a', 'b c']",
        ),
        ("{{ \"they're bill's\".title() }} {{ \"they're bill's\"|title }}", "They'Re Bill'S They're Bill's"),
        ("{{ 'xxaxx'.strip('x') }}|{{ '\\u2003 a\\x1c'.strip() }}|", "a|a|"),
        (
            "{{ {'b': 1, 'a': [1.5, none]}|tojson }} {{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}",
            "{\"b\": 1, \"a\": [1.5, null]} {\"a\":2,\"b\":1}",
        ),
        ("{{ {'a': [1, {}]}|tojson(indent=2) }}", "{\n  \"a\": [\n    1,\n    {}\n  ]\n}"),
        (
            "{{ '\u{e9}<'|tojson }} {{ '\u{1f642}'|tojson(ensure_ascii=true) }}",
            "\"\u{e9}<\" \"\\ud83d\\ude42\"",
        ),
        (
            "{{ true + 1 }} {{ none ~ 1 }} {{ (1,) }} {{ 3|string + 'x' }} {{ 2.5|round }} {{ '7'|int + 1 }}",
            "2 None1 (1,) 3x 2.0 8",
        ),
        ("{% set x = 1 %}{% for i in [1, 2] %}{% set x = i %}{% endfor %}{{ x }}", "1"),
        (
            "{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{{ loop.previtem is defined }}{% endfor %}",
            "x1False",
        ),
        (
            "{% macro m(a, b='d') %}{{ a }}{{ b }}{{ c }}{% endmacro %}{% set c = '!' %}{{ m(1) }}{{ m(b=2, a=3) }}",
            "1d!32!",
        ),
        ("{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}x{% endcall %}", "<x>"),
        (
            "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        (
            "{{ [3, 1, 2]|sort|join('-') }} {{ ['b', 'A']|sort }} {{ {'b': 1, 'A': 2}|dictsort }}",
            "1-2-3 ['A', 'b'] [('A', 2), ('b', 1)]",
        ),
        ("{{ [{'a': 1}, {'a': 0}]|selectattr('a')|list|length }} {{ ['x']|map('upper')|list }}", "1 ['X']"),
        ("{{ strftime_now('%d %b %Y %j %-d %H:%M:%S %p %A') }}", "29 Feb 2024 060 29 14:04:05 PM Thursday"),
        ("  {% if true %}\n  x\n  {%- endif %}\ny\r\n", "  xy"),
        ("{# c #}{% raw %}{{ x }}{% endraw %}{{ '%s-%03d' % ('a', 7) }}", "{{ x }}a-007"),
        ("{{ 'a' in 'cat' and 'x' not in ['y'] and 1 < 2 <= 2 }} {{ 'b' if false }}|", "True |"),
        ("{{ 'a\\nb'|indent(2) }} {{ '<'|e ~ '>' }} {{ ('<'|safe) + '>' }}", "a\n  b &lt;> <&gt;"),
    ] {
        assert_eq!(render(source).unwrap_or_else(|error| panic!("{source}: {error}")), expected, "{source}");
    }
    for source in [
        "{{ 1 + 'a' }}",
        "{{ x.y }}",
        "{{ none[1:] }}",
        "{{ 1 < 'a' }}",
        "{{ 'a'.nope() }}",
        "{{ 1|nope }}",
        "{{ x|tojson }}",
    ] {
        assert!(render(source).is_err(), "{source}");
    }
}
