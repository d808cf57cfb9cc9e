"""The embedded lab's task: what a problem, a solution and a right answer are, and that the splits cannot meet."""

import math
from collections import Counter

import pytest
import torch
from torch import Generator

from opd_lab.data import arithmetic
from opd_lab.data.arithmetic import CONNECTIVES, STUDENT_STYLE, TEACHER_STYLE, Problem, Style, grade, problems, solution
from opd_lab.lab_models import lab_tokenizer

PROBLEM = Problem("start 47 + 8 * 3 - 9 ?", "56", "0")  # 47 + 8 = 55, 55 * 3 = 165 -> 65, 65 - 9 = 56
ONE_WORD = Style((1, 0, 0, 0, 0, 0))


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_a_solution_goes_step_by_step_modulo_100():
    assert solution(PROBLEM, ONE_WORD, generator()) == (
        "so 47 plus 8 makes 55 , so 55 times 3 makes 65 , so 65 minus 9 makes 56 , answer 56"
    )
    assert solution(Problem("start 3 - 9 * 9 ?", "46", "0"), ONE_WORD, generator()) == (
        "so 3 minus 9 makes 94 , so 94 times 9 makes 46 , answer 46"
    )


def test_a_slip_is_carried_on_to_the_answer():
    words = solution(PROBLEM, Style((1, 0, 0, 0, 0, 0), slip=1.0), generator()).split()
    results = [int(words[i + 1]) for i, word in enumerate(words) if word == "makes"]
    starts = [int(words[i - 1]) for i, word in enumerate(words) if word in ("plus", "times", "minus")]
    assert results != [55, 65, 56]
    assert starts == [47, *results[:2]]
    assert words[-1] == str(results[-1])


def test_slips_and_connectives_come_as_often_as_the_style_says():
    style, stream = Style((0.5, 0.3, 0.2, 0, 0, 0), slip=0.3), generator()
    words = [solution(PROBLEM, style, stream).split() for _ in range(2000)]
    seen = Counter(word for solved in words for word in solved if word in CONNECTIVES)
    assert set(seen) == {"so", "hence", "thus"}
    for word, share in zip(CONNECTIVES, (0.5, 0.3, 0.2)):
        assert abs(seen[word] / 6000 - share) < 4 * math.sqrt(share * (1 - share) / 6000)
    wrong = sum(solved[5] != "55" for solved in words) / 2000
    assert abs(wrong - 0.3 * 0.99) < 4 * math.sqrt(0.3 * 0.7 / 2000)  # a slip is right one time in a hundred


def test_the_two_styles_prefer_different_words_and_both_can_say_everything():
    teacher, student = torch.tensor(TEACHER_STYLE.connectives), torch.tensor(STUDENT_STYLE.connectives)
    assert teacher[:3].sum() > 0.85 and student[3:].sum() > 0.85
    assert teacher.min() > 0 and student.min() > 0


def test_the_split_is_a_function_of_the_prompt_alone():
    everything: dict[str, set[str]] = {}
    for split in arithmetic.SPLITS:
        found = [p for seed in range(3) for p in problems(split, (1, 2, 3), 120, seed)]
        assert all(arithmetic.split_of(p.id) == split for p in found)
        everything[split] = {p.prompt for p in found}
    assert not everything["train"] & everything["validation"]
    assert not everything["train"] & everything["test"]
    assert not everything["validation"] & everything["test"]
    assert [arithmetic.split_of(i) for i in ("0", "1", "2", "a", "b", "13")] == [
        "test", "validation", "train", "test", "validation", "train",
    ]  # fmt: skip


def test_the_same_seed_gives_the_same_problems_and_more_of_them_only_adds():
    some = problems("train", (2, 3), 30, seed=5)
    assert some == problems("train", (2, 3), 30, seed=5)
    assert some == problems("train", (2, 3), 60, seed=5)[:30]
    assert some != problems("train", (2, 3), 30, seed=6)
    assert len({p.prompt for p in some}) == len({p.id for p in some}) == 30


def test_lengths_take_turns_and_answers_are_right():
    for index, problem in enumerate(problems("test", (1, 4), 40, seed=0)):
        words = problem.prompt.split()
        assert words[0] == "start" and words[-1] == "?"
        value = int(words[1])
        for symbol, operand in zip(words[2:-1:2], words[3:-1:2]):
            value = eval(f"{value} {symbol} {operand}") % 100
        assert problem.answer == str(value)
        assert len(words) == 3 + 2 * (1, 4)[index % 2]
        assert grade(solution(problem, TEACHER_STYLE, generator(index)), problem.answer) == 1.0


def test_problems_refuses_what_it_cannot_give():
    with pytest.raises(ValueError, match="unknown split 'dev'; allowed: train, validation, test"):
        problems("dev", (2,), 1, 0)
    with pytest.raises(ValueError, match=r"each >= 1, got \(0, 2\)"):
        problems("test", (0, 2), 1, 0)
    with pytest.raises(ValueError, match=r"asked for 1000 test problems .* ask for fewer problems or more operations"):
        problems("test", (1,), 1000, 0)  # there are 2400 chains of one operation, about 240 of them for test


def test_a_style_is_checked():
    with pytest.raises(ValueError, match="the 6 connectives"):
        Style((1.0,))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 1.5"):
        Style(TEACHER_STYLE.connectives, slip=1.5)


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("so 47 plus 8 makes 55 , answer 55", "55", 1.0),
        ("answer 55", "55", 1.0),
        (" answer  55 \n", "55", 1.0),
        ("answer 0", "0", 1.0),
        ("so 47 plus 8 makes 55 , answer 54", "55", 0.0),
        ("so 47 plus 8 makes 55 ,", "55", 0.0),  # cut off
        ("55", "55", 0.0),
        ("answer 55 answer", "55", 0.0),
        ("answer 55 , so", "55", 0.0),  # the answer does not end it
        ("answer 54 answer 55", "55", 1.0),  # the last word counts
        ("answer 055", "55", 0.0),
        ("answer 155", "55", 0.0),
        ("answer 5", "55", 0.0),
        ("answer", "", 0.0),
        ("", "55", 0.0),
    ],
)
def test_the_grader(response: str, answer: str, score: float):
    assert grade(response, answer) == score


def test_every_word_is_one_token_and_text_survives_the_round_trip():
    tokenizer = lab_tokenizer()
    assert len(tokenizer) == 4 + len(set(arithmetic.WORDS))
    text = f"{PROBLEM.prompt} {solution(PROBLEM, STUDENT_STYLE, generator())}"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.split())
    assert [tokenizer.decode([i]) for i in tokenizer("0 7 42 99").input_ids] == ["0", "7", "42", "99"]
    with pytest.raises(Exception, match="WordLevel"):
        tokenizer("hello")


def test_the_chat_template():
    tokenizer = lab_tokenizer()
    chat = [{"role": "user", "content": "start 1 + 2 ?"}]
    answered = [*chat, {"role": "assistant", "content": "answer 3"}]
    render = tokenizer.apply_chat_template
    assert render(chat, tokenize=False, add_generation_prompt=True) == "<user> start 1 + 2 ? <assistant> "
    assert render(answered, tokenize=False) == "<user> start 1 + 2 ? <assistant> answer 3 <end> "
    text = str(render(answered, tokenize=False)).strip()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "start 1 + 2 ? answer 3"
    with pytest.raises(Exception, match="the roles user and assistant, got system"):
        render([{"role": "system", "content": "start"}], tokenize=False)


def test_batches_are_padded_on_the_left():
    tokenizer = lab_tokenizer()
    assert tokenizer.padding_side == "left"
    assert tokenizer(["1 2 3", "4"], padding=True).attention_mask == [[1, 1, 1], [0, 0, 1]]
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<end>", "<user>", "<assistant>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<end>")
