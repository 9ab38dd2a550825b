"""Input files: what is accepted as a prompt, and the message for everything that is not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.engine.prompts import Prompt, read_prompts
from ds_moe_ep.errors import InputError


def _write(tmp_path, content, name="in.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl_prompts_keep_order_ids_and_text(tmp_path):
    path = _write(
        tmp_path,
        '{"id": "b", "prompt": "Gr\\u00fc\\u00dfe, \\ud83d\\ude00\\nand more "}\n'
        "\n"
        '{"id": "a", "prompt_token_ids": [5, 0, 7]}\r\n'
        '{"id": 17, "prompt": "no line end"}',
    )
    assert read_prompts(path) == [
        Prompt("b", "Gr\u00fc\u00dfe, \U0001f600\nand more ", None),
        Prompt("a", None, (5, 0, 7)),
        Prompt("17", "no line end", None),
    ]


@pytest.mark.parametrize("name", ["in.jsonl", "in.JSON", "in.ndjson"])
def test_the_ending_says_json(tmp_path, name):
    prompts = read_prompts(_write(tmp_path, '{"prompt": "x"}\n', name))
    assert prompts == [Prompt("0", "x", None)]


@pytest.mark.parametrize("name", ["in.txt", "in", "in.md"])
def test_any_other_ending_is_plain_text(tmp_path, name):
    prompts = read_prompts(_write(tmp_path, ' {"prompt": "x"}\r\n\n \t\nlast \n', name))
    assert prompts == [Prompt("0", ' {"prompt": "x"}', None), Prompt("1", "last ", None)]


def test_an_absent_id_is_the_index_among_the_prompts(tmp_path):
    path = _write(tmp_path, '\n{"id": "x", "prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [prompt.id for prompt in read_prompts(path)] == ["x", "1"]


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path):
    path = _write(tmp_path, b"\xef\xbb\xbfone\ntwo\n", "in.txt")
    assert [prompt.text for prompt in read_prompts(path)] == ["one", "two"]


def test_only_a_newline_ends_a_line(tmp_path):
    path = _write(tmp_path, "a\u2028b\x0bc\n", "in.txt")
    assert [prompt.text for prompt in read_prompts(path)] == ["a\u2028b\x0bc"]


_GOOD = '{"id": "a", "prompt": "x"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "prompt": "y"', ":2:26: not JSON (Expecting ',' delimiter). Write an object"),
        ("[1, 2]", ":2: [1, 2] is not an object. Write an object a line:"),
        ('"text"', ':2: "text" is not an object.'),
        ('{"promt": "y"}', ':2: unknown key "promt". Did you mean "prompt"? Known: id, prompt,'),
        ('{"prompt": "y", "zzz": 1}', ':2: unknown key "zzz". Known: id, prompt, prompt_token_ids'),
        ('{"id": "b"}', ":2: no prompt given. Give either prompt (text) or prompt_token_ids"),
        (
            '{"prompt": "y", "prompt_token_ids": [1]}',
            ":2: both prompt and prompt_token_ids given. Give either",
        ),
        ('{"prompt": ["y"]}', ':2: prompt=["y"] is not a string. Token ids go into prompt_token_i'),
        ('{"prompt": null}', ":2: prompt=null is not a string."),
        ('{"prompt": ""}', ":2: prompt is empty; a model needs at least one token to start."),
        ('{"prompt": "\\ud83d!"}', ':2: prompt holds "\\ud83d" without its other half'),
        ('{"id": "\\udc00", "prompt": "y"}', ':2: id holds "\\udc00" without its other half'),
        ('{"id": true, "prompt": "y"}', ":2: id=true is neither a string nor an integer."),
        ('{"id": 1.0, "prompt": "y"}', ":2: id=1.0 is neither a string nor an integer."),
        ('{"prompt_token_ids": "1 2"}', ':2: prompt_token_ids="1 2" is not a list of integers.'),
        ('{"prompt_token_ids": []}', ":2: prompt_token_ids is empty;"),
        (
            '{"prompt_token_ids": [3, -1]}',
            ":2: prompt_token_ids[1]=-1 is not a token id. Token ids are integers from 0",
        ),
        ('{"prompt_token_ids": [3, 1.5]}', ":2: prompt_token_ids[1]=1.5 is not a token id."),
        ('{"prompt_token_ids": [true]}', ":2: prompt_token_ids[0]=true is not a token id."),
        ('{"prompt_token_ids": [NaN]}', ":2: prompt_token_ids[0]=NaN is not a token id."),
        ('{"id": "a", "prompt": "y"}', ':2: id "a" is already that of {path}:1. Give every prompt'),
        ("[" * 100_000, ":2: JSON that cannot be read ("),
        ('{"id": ' + "1" * 5000 + ', "prompt": "y"}', ":2: JSON that cannot be read ("),
    ],
)
def test_refusals_name_the_line_the_value_and_the_way_out(tmp_path, line, message):
    path = _write(tmp_path, f"{_GOOD}{line}\n")
    with pytest.raises(InputError) as error:
        read_prompts(path)
    assert str(error.value).startswith(str(path) + message.replace("{path}", str(path)))


def test_long_values_are_cut_short_in_messages(tmp_path):
    path = _write(tmp_path, '{"prompt_token_ids": "' + "7" * 5000 + '"}')
    with pytest.raises(InputError) as error:
        read_prompts(path)
    assert len(str(error.value)) < len(str(path)) + 120


def test_an_absent_id_that_is_taken_is_refused_with_both_lines(tmp_path):
    path = _write(tmp_path, '{"id": "1", "prompt": "x"}\n\n{"prompt": "y"}\n')
    with pytest.raises(InputError, match=r':3: id "1" is already that of .*in\.jsonl:1\. .*index'):
        read_prompts(path)


def test_text_that_is_not_utf8_is_refused_with_line_and_byte(tmp_path):
    path = _write(tmp_path, b"fine\nGr\xfc\xdfe\n", "in.txt")
    with pytest.raises(InputError, match=r":2: byte 3 of the line \(0xfc\) is not UTF-8.*iconv"):
        read_prompts(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("name", ["in.jsonl", "in.txt"])
def test_a_file_without_prompts_is_refused(tmp_path, name, content):
    path = _write(tmp_path, content, name)
    with pytest.raises(InputError, match=rf"{name}: no prompt in this file\. Write one a line\."):
        read_prompts(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: cannot be read \(No such file or directory"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_prompts(tmp_path)


@given(st.lists(st.text(min_size=1), min_size=1))
def test_any_text_survives_json(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("prompts") / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    assert [prompt.text for prompt in read_prompts(path)] == texts


@given(st.binary())
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("prompts")
    for name in ("in.jsonl", "in.txt"):
        try:
            prompts = read_prompts(_write(folder, content, name))
        except InputError:
            continue
        assert len({prompt.id for prompt in prompts}) == len(prompts) > 0
