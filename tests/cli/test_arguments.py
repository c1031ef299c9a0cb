"""The words of a command line."""

from __future__ import annotations

import pytest

from nearkin.cli import VERBS, run
from nearkin.cli.arguments import whole_number
from nearkin.cli.train import parser, with_data
from nearkin.errors import ConfigError


def read(*argv):
    return with_data(parser().read(argv))


def test_both_spellings_and_free_objective_options():
    given = read(
        "photos", "--epochs", "3", "--lr=0.1", "--objective", "cone", "--objective.topk", "5"
    )
    assert given == {
        "data": "photos",
        "epochs": "3",
        "lr": "0.1",
        "objective": "cone",
        "objective.topk": "5",
    }


def test_flags_do_not_swallow_words():
    assert read("--pretrained", "photos") == {"pretrained": True, "data": "photos"}
    assert read("--pretrained=false")["pretrained"] is False
    assert read("--no-pretrained")["pretrained"] is False
    assert read("--objective.guard", "--lr", "1")["objective.guard"] == "true"
    assert read("--objective.guard=false")["objective.guard"] == "false"
    assert read("--objective.teacher-crop", "own")["objective.teacher_crop"] == "own"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--bach-size", "3"], "Unknown option --bach-size. Did you mean --batch-size?"),
        (["--pretrained=maybe"], "true or false"),
        (["a", "b"], "The word b is one too many"),
        (["--epochs"], "expected one argument"),
        (["--epoch", "3"], "nearkin calls it --epochs."),
        (["a", "--data", "b"], "DATA is given twice"),
        (["--pretraind"], "Did you mean --pretrained?"),
        (["--foo"], "Unknown option --foo. See nearkin train --help."),
    ],
)
def test_wrong_words(argv, words):
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    assert words in str(caught.value)


def test_help_is_on_stdout_and_complete(capsys):
    assert run(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for option in (
        "--batch-size",
        "--resume",
        "--precision",
        "--print-config",
        "--images-per-class",
    ):
        assert option in out
    assert run(["evaluate", "-h"]) == 0
    assert "--split" in capsys.readouterr().out
    assert run(["--help"]) == 0
    assert "exit codes" in capsys.readouterr().out.lower()


def test_unknown_verb(capsys):
    assert run(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err
        == "nearkin: error: Unknown verb trian. Did you mean train? See nearkin --help.\n"
    )


@pytest.mark.parametrize(
    ("verb", "ours"), [("eval", "evaluate"), ("Fit", "train"), ("infer", "predict")]
)
def test_verbs_of_other_tools(capsys, verb, ours):
    assert run([verb]) == 2
    assert f"Unknown verb {verb}. Did you mean {ours}?" in capsys.readouterr().err


def test_control_characters_are_escaped(capsys):
    assert run(["\x1b[31mx"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_log_may_be_given_several_times():
    assert read("--log", "wandb", "--log=mlflow,tensorboard") == {"log": "wandb,mlflow,tensorboard"}


WITHOUT_FREE = sorted(set(VERBS) - {"train", "compare", "doctor"})


@pytest.mark.parametrize("verb", WITHOUT_FREE)
@pytest.mark.parametrize("option", ["--objective.topk", "--model.depth=3"])
def test_options_of_an_objective_are_unknown_where_none_is_trained(verb, option, capsys):
    assert run([verb, "one", option, "5"]) == 2
    assert f"Unknown option {option.partition('=')[0]}." in capsys.readouterr().err


def test_words_after_two_hyphens_are_names_of_files():
    from nearkin.cli.predict import parser

    words = ["run", "--json", "--", "--objective.jpg", "a.jpg", "-h", "--json=no"]
    assert parser().read(words) == {"run": "run", "json": True, "images": words[3:]}


def test_endless_numbers_are_refused():
    assert whole_number("kin", "9" * 9) == 999_999_999
    with pytest.raises(ConfigError, match="--kin takes a whole number of at most 9 digits"):
        whole_number("kin", "9" * 5000)
