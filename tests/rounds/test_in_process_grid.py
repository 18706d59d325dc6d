"""The grid of one process, with a ClientApp written by hand."""

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from simulations.in_process import InProcessGrid


def echo_app() -> ClientApp:
    """A ClientApp that tells who it is, counts its calls in the node's state, and may change what it is given."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        answer = ConfigRecord({"node": context.node_id, "name": context.node_config["name"]})
        return Message(RecordDict({"answer": answer}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["name"] == "broken":
            raise RuntimeError("record 17 reads: patient has")
        calls = context.state.config_records.setdefault("calls", ConfigRecord({"count": 0}))
        calls["count"] = int(str(calls["count"])) + 1
        given = message.content.config_records["task"]
        seen = given["word"]
        given["word"] = f"changed by {context.node_id}"
        return Message(RecordDict({"answer": ConfigRecord({"seen": seen, "count": calls["count"]})}), reply_to=message)

    return app


def grid_of(*names: str) -> InProcessGrid:
    return InProcessGrid(echo_app(), [{"name": name} for name in names])


def task(word: str = "hello") -> RecordDict:
    return RecordDict({"task": ConfigRecord({"word": word})})


def answer_of(message: Message) -> ConfigRecord:
    return message.content.config_records["answer"]


def test_nodes_are_numbered_from_one() -> None:
    assert list(grid_of("a", "b", "c").get_node_ids()) == [1, 2, 3]


def test_each_node_answers_with_its_own_configuration() -> None:
    grid = grid_of("a", "b")
    replies = grid.send_and_receive([Message(RecordDict(), node, MessageType.QUERY) for node in (2, 1)])

    assert [(answer_of(reply)["node"], answer_of(reply)["name"]) for reply in replies] == [(2, "b"), (1, "a")]


def test_a_reply_names_its_sender_and_the_run() -> None:
    (reply,) = grid_of("a", "b").send_and_receive([Message(RecordDict(), 2, MessageType.QUERY)])

    assert reply.metadata.src_node_id == 2
    assert reply.metadata.dst_node_id == 0
    assert reply.metadata.run_id == grid_of("a").run.run_id


def test_replies_are_matched_to_the_messages_they_answer() -> None:
    grid = grid_of("a", "b", "c")
    identifiers = list(grid.push_messages(Message(task(f"for {node}"), node, MessageType.TRAIN) for node in (1, 2, 3)))

    assert len(set(identifiers)) == 3
    (last,) = grid.pull_messages([identifiers[2]])
    assert answer_of(last)["seen"] == "for 3"
    assert last.metadata.reply_to_message_id == identifiers[2]
    assert [answer_of(reply)["seen"] for reply in grid.pull_messages(identifiers[:2])] == ["for 1", "for 2"]


def test_a_reply_is_delivered_once() -> None:
    grid = grid_of("a")
    identifiers = list(grid.push_messages([Message(task(), 1, MessageType.TRAIN)]))

    assert len(list(grid.pull_messages(identifiers))) == 1
    assert not list(grid.pull_messages(identifiers))
    assert not list(grid.pull_messages(["never sent"]))


def test_what_one_node_does_to_a_message_no_other_node_sees() -> None:
    grid = grid_of("a", "b")
    shared = task()
    replies = grid.send_and_receive([Message(shared, node, MessageType.TRAIN) for node in (1, 2)])

    assert [answer_of(reply)["seen"] for reply in replies] == ["hello", "hello"]
    assert shared.config_records["task"]["word"] == "hello"


def test_changing_a_message_after_it_was_pushed_changes_nothing() -> None:
    grid = grid_of("a")
    content = task()
    identifiers = grid.push_messages([Message(content, 1, MessageType.TRAIN)])
    content.config_records["task"]["word"] = "too late"

    (reply,) = grid.pull_messages(identifiers)
    assert answer_of(reply)["seen"] == "hello"


def test_a_nodes_state_lives_as_long_as_the_grid_and_is_its_own() -> None:
    grid = grid_of("a", "b")

    def count(node: int) -> object:
        (reply,) = grid.send_and_receive([Message(task(), node, MessageType.TRAIN)])
        return answer_of(reply)["count"]

    assert [count(1), count(1), count(2)] == [1, 2, 1]


def test_an_exception_becomes_an_error_reply_without_its_text() -> None:
    grid = grid_of("a", "broken", "c")
    messages = [Message(task(), node, MessageType.TRAIN) for node in (1, 2, 3)]
    first, second, third = grid.send_and_receive(messages)

    assert second.has_error()
    assert second.error.code == 2
    assert second.error.reason == "RuntimeError"
    assert second.metadata.src_node_id == 2
    assert not first.has_error()
    assert not third.has_error()


@pytest.mark.parametrize("kind", [MessageType.EVALUATE, "train.unknown"])
def test_what_the_app_does_not_answer_is_an_error_reply(kind: str) -> None:
    (reply,) = grid_of("a").send_and_receive([Message(task(), 1, kind)])

    assert reply.has_error()
