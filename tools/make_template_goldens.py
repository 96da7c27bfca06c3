"""Renders every template of the formats crate's tests with `transformers` and writes down what came out.

Usage: make_template_goldens.py [--dump FOLDER]
Made with transformers 5.23.0 and jinja2 3.1.6. Writes tests/data/templates/expected.json: for each template one
string per case of cases.json:
  "t:HASH:BYTES:RANGES"  the text's FNV-1a hash (64 bits, hex), its length in bytes, and the byte ranges of
                         generation blocks as start-end joined by commas (absent when there are none);
  "r:MESSAGE"            the template called raise_exception(MESSAGE);
  "e:CLASS"              any other exception.
--dump writes the texts themselves, to look at when a case differs.
"""

import json
import pathlib
import sys
from datetime import datetime

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from tokenizers import Tokenizer, models

FOLDER = pathlib.Path(__file__).parent.parent / "crates/pmetal-formats/tests/data/templates"


class FixedTime(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 7, 4, 13, 5, 9)


chat_template_utils.datetime = FixedTime


def fnv(data: bytes) -> str:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def apply(tokenizer, source, case):
    text = tokenizer.apply_chat_template(
        case["messages"],
        chat_template=source,
        tools=case.get("tools"),
        documents=case.get("documents"),
        add_generation_prompt=case.get("add_generation_prompt", False),
        continue_final_message=case.get("continue_final_message", False),
        tokenize=False,
        **case.get("variables", {}),
    )
    ranges = []
    if "{% generation" in source or "{%- generation" in source:
        if not case.get("continue_final_message"):
            messages = [{k: v for k, v in m.items() if v is not None} for m in case["messages"]]
            rendered, indices = chat_template_utils.render_jinja_template(
                conversations=[messages],
                tools=case.get("tools"),
                documents=case.get("documents"),
                chat_template=source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=case.get("add_generation_prompt", False),
                **{**tokenizer.special_tokens_map, **case.get("variables", {})},
            )
            assert rendered[0] == text
            ranges = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in indices[0]]
    return text, ranges


def main():
    dump = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 and sys.argv[1] == "--dump" else None
    cases = json.loads((FOLDER / "cases.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, "<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    expected = {}
    for path in sorted(FOLDER.glob("*/*.jinja")):
        source = path.read_bytes().decode()
        name = f"{path.parent.name}/{path.name}"
        rows = []
        for case in cases:
            try:
                text, ranges = apply(tokenizer, source, case)
                data = text.encode()
                row = f"t:{fnv(data)}:{len(data)}"
                if ranges:
                    row += ":" + ",".join(f"{a}-{b}" for a, b in ranges)
                shown = text
            except jinja2.exceptions.TemplateError as error:
                row = f"r:{error}" if type(error) is jinja2.exceptions.TemplateError else f"e:{type(error).__name__}"
                shown = f"{type(error).__name__}: {error}"
            except Exception as error:
                row = f"e:{type(error).__name__}"
                shown = f"{type(error).__name__}: {error}"
            rows.append(row)
            if dump:
                target = dump / name / (case["name"] + ".txt")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(shown.encode())
        expected[name] = rows
    lines = [f"{json.dumps(name)}: [\n{','.join(chr(10) + json.dumps(r) for r in rows)[1:]}\n]" for name, rows in expected.items()]
    (FOLDER / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(len(expected), "templates,", len(cases), "cases")


main()
