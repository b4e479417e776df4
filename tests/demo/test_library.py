"""What is taken from the standard library's files."""

import ast

import pytest

from deepspec.demo.library import EXCLUDED, first_sentence, library_functions


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return x.", "Return x."),
        ("Return x\n", "Return x."),
        ("Return the\n    sum of x. Then more.", "Return the sum of x."),
        ("One paragraph:\n\nanother.", "One paragraph."),
        ("Version 3.11 only; e.g. here", "Version 3.11 only; e.g."),
        ("naïve", ""),
        ("", ""),
    ],
)
def test_a_summary_is_the_first_sentence_on_one_line(docstring: str, sentence: str):
    assert first_sentence(docstring) == sentence


def test_functions_come_sorted_once_each_and_their_source_parses():
    functions = library_functions()
    names = [(function.module, function.owner, function.name) for function in functions]
    assert names == sorted(set(names))
    assert all(ast.parse(function.source) for function in functions[:: len(functions) // 200])
    assert not {function.module.split(".")[0] for function in functions} & EXCLUDED


def test_a_function_is_known_by_signature_source_and_summary():
    by_name = {
        (function.module, function.owner, function.name): function
        for function in library_functions()
    }
    function = by_name["posixpath", "", "normcase"]
    assert (function.signature, function.kind, function.place) == (
        "normcase(s)",
        "function",
        "the module `posixpath`",
    )
    assert function.source.startswith("def normcase(s):\n    ")
    assert '"""' not in function.source, "the docstring belongs to the chat domain"
    assert function.summary.startswith("Normalize case of pathname.")
    assert (
        by_name["pathlib", "PurePath", "as_posix"].place
        == "the class `PurePath` in the module `pathlib`"
    )
