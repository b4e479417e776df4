"""Options of earlier versions are answered with what replaces them."""

import pytest

from tests.cli.test_main import run


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("hidden", "demo", "--for", "index"), "--for is now --purpose index"),
        (("hidden", "demo", "--for=rolling"), "--for is now --purpose rolling"),
        (
            ("conformance", "--vectors", "some/cases"),
            "--vectors is now the command `python -m tests.vectors some/cases`",
        ),
    ],
)
def test_an_old_option_names_the_new_one(capsys, arguments: tuple[str, ...], answer: str):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == f"error: {answer}"


@pytest.mark.parametrize("verb", ["hidden", "conformance"])
def test_old_options_are_not_in_the_help(capsys, verb: str):
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert "--for " not in out and "--vectors" not in out


def test_each_verb_has_a_line_in_the_help_that_is_not_cut_off(capsys):
    code, out, _ = run(capsys, "--help")
    lines = out.partition("Commands:\n")[2].splitlines()
    assert code == 0
    assert len(lines) == 20
    assert not [line for line in lines if line.endswith("...")]
