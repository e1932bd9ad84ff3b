"""What is asked is sent once, and answered by whoever was asked."""

from __future__ import annotations

import pytest

from computron.parameter_service.agent import questions
from computron.parameter_service.agent.questions import Questions
from computron.parameter_service.wire.messages import Contents, Extra, ExtraTaken, Read, Refused, Write, Written

READ = Read("job", 0, "exp_avg")
WRITE = Write("job", 1, 0, "exp_avg", 5, False)
CONTENTS = Contents("job", 0, "exp_avg", 5, 5)


class Asker:
    """links: to the owner, as they follow one another. sent: what went over each."""

    def __init__(self):
        self.sent = {}
        self.answers = []
        self.link = None
        self.questions = Questions(lambda message: self.link, self.send)
        self.connect()

    def connect(self):
        self.link = object()
        self.sent[self.link] = []

    def send(self, link, message, memory):
        self.sent[link].append(message)

    @property
    def carried(self):
        return self.sent[self.link]

    def ask(self, message, data=b"12345678"):
        memory = memoryview(bytearray(data))
        self.questions.ask(message, memory, self.answers.append)
        return memory


def extra(tensor):
    return Extra("job", 1, "v", 1, tensor)


def taken(tensor):
    return ExtraTaken("job", "v", tensor)


@pytest.fixture
def asker():
    return Asker()


@pytest.mark.parametrize("message", [READ, WRITE, extra(0)])
def test_a_question_without_an_answer_is_asked_again_only_where_that_was_lost(asker, message):
    asker.ask(message)
    asker.questions.send()
    asker.questions.send()
    assert asker.carried == [message]
    asker.connect()
    asker.questions.send()
    asker.questions.send()
    assert asker.carried == [message]


def test_a_question_waits_for_who_can_answer_it(asker):
    link, asker.link = asker.link, None
    asker.ask(READ)
    asker.ask(extra(0))
    asker.link = link
    asker.questions.send()
    assert asker.carried == [READ, extra(0)]


def test_what_was_refused_is_asked_again(asker):
    other = Read("job", 1, "exp_avg")
    for message in (READ, other, extra(0)):
        asker.ask(message)
    asker.questions.refused(asker.link, Refused("job", "not_owner", "", 0, (1,)))
    asker.questions.send()
    assert asker.carried == [READ, other, extra(0), other]
    asker.questions.refused(asker.link, Refused("job", "stale_epoch", ""))
    asker.questions.send()
    assert asker.carried[4:] == [READ, other, extra(0)]


def test_a_new_epoch_asks_again_and_writes_nothing_of_the_old_one(asker):
    for message in (READ, WRITE, extra(0)):
        asker.ask(message)
    asker.questions.new_epoch()
    asker.questions.send()
    assert asker.carried == [READ, WRITE, extra(0), READ, extra(0)]
    asker.questions.answered(asker.link, Written("job", 0, "exp_avg"))
    assert not asker.answers


def test_only_who_was_asked_last_answers(asker):
    asker.ask(READ)
    before = asker.link
    asker.connect()
    asker.questions.send()
    assert asker.questions.place_for(before, CONTENTS, 8) is None
    asker.questions.answered(before, CONTENTS)
    assert not asker.answers
    assert asker.questions.place_for(asker.link, CONTENTS, 8) is not None
    asker.questions.answered(asker.link, CONTENTS)
    assert asker.answers == [CONTENTS]


def test_what_is_read_late_does_not_replace_what_is_to_be_written(asker):
    asker.ask(WRITE)
    assert asker.questions.place_for(asker.link, CONTENTS, 8) is None
    asker.questions.answered(asker.link, CONTENTS)
    assert not asker.answers
    asker.questions.answered(asker.link, Written("job", 0, "exp_avg"))
    assert asker.answers == [Written("job", 0, "exp_avg")]


def test_a_few_tensors_of_a_version_are_on_their_way_at_a_time(asker, monkeypatch):
    monkeypatch.setattr(questions, "EXTRAS_AT_ONCE", 2)
    for tensor in range(4):
        asker.ask(extra(tensor))
    assert asker.carried == [extra(0), extra(1)]
    asker.connect()
    asker.questions.send()
    assert asker.carried == [extra(0), extra(1)]
    for tensor in (1, 0, 2, 3):
        assert asker.questions.extras_left
        asker.questions.answered(asker.link, taken(tensor))
    assert asker.carried == [extra(0), extra(1), extra(2), extra(3)]
    assert not asker.questions.extras_left


def test_what_was_taken_for_a_version_is_sent_again_where_its_step_is_taken_anew(asker):
    for tensor in (0, 1):
        asker.ask(extra(tensor))
    asker.questions.answered(asker.link, taken(0))
    asker.questions.done(0)
    asker.questions.new_epoch()
    asker.questions.send()
    assert asker.carried == [extra(0), extra(1), extra(0), extra(1)]
    for tensor in (0, 1):
        asker.questions.answered(asker.link, taken(tensor))
    assert not asker.questions.extras_left
    asker.questions.done(1)
    asker.questions.new_epoch()
    assert not asker.questions.extras_left


def test_a_large_tensor_of_a_version_travels_alone(asker, monkeypatch):
    monkeypatch.setattr(questions, "EXTRAS_BYTES", 10)
    for tensor, size in enumerate((4, 4, 100, 1)):
        asker.ask(extra(tensor), bytes(size))
    assert asker.carried == [extra(0), extra(1)]
    asker.questions.answered(asker.link, taken(0))
    assert asker.carried == [extra(0), extra(1)]
    asker.questions.answered(asker.link, taken(1))
    assert asker.carried == [extra(0), extra(1), extra(2)]
    asker.questions.answered(asker.link, taken(2))
    assert asker.carried[3:] == [extra(3)]
