import asyncio
import logging

import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.context import Cause, RequestContext
from gateway.middleware.errors import ErrorsASGI
from tests.asgi_call import call, http, websocket

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
MORE: Message = {"type": "http.response.body", "body": b"half", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"whole", "more_body": False}
ACCEPT: Message = {"type": "websocket.accept"}


class Sends:
    """An application that sends these messages and then raises."""

    def __init__(self, *messages: Message, then: BaseException | None = None) -> None:
        self.messages = messages
        self.then = then

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for message in self.messages:
            await send(message)
        if self.then is not None:
            raise self.then


async def test_an_error_before_the_answer_becomes_a_500_without_detail(caplog: pytest.LogCaptureFixture) -> None:
    context = RequestContext()
    context.correlation_id = "abc-123"
    error = ValueError("password=hunter2")
    answer = await call(ErrorsASGI(Sends(then=error)), http("/x", query_string=b"key=secret", gateway=context))
    assert (answer.error, answer.status) == (None, 500)
    assert answer.json == {
        "error": {
            "type": "internal_server_error",
            "message": "An unexpected error occurred",
            "correlation_id": "abc-123",
        }
    }
    assert context.cause is Cause.GATEWAY_FAULT
    (record,) = caplog.records
    assert record.name == "gateway.errors"
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert record.__dict__["correlation_id"] == "abc-123"
    assert "secret" not in caplog.text


async def test_an_error_within_the_answer_cuts_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    context = RequestContext()
    error = ValueError("late")
    answer = await call(ErrorsASGI(Sends(START, MORE, then=error)), http(gateway=context))
    assert isinstance(answer.error, ConnectionAbortedError)
    assert answer.error.__cause__ is error
    assert answer.sent == [START, MORE]
    assert context.cause is Cause.GATEWAY_FAULT
    assert len(caplog.records) == 1


async def test_an_error_behind_a_whole_answer_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    context = RequestContext()
    answer = await call(ErrorsASGI(Sends(START, END, then=ValueError())), http(gateway=context))
    assert (answer.error, answer.sent, context.cause) == (None, [START, END], None)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("scope", [http(), websocket()])
@pytest.mark.parametrize("error", [ConnectionAbortedError("cut"), asyncio.CancelledError(), KeyboardInterrupt()])
async def test_a_wish_to_be_cut_and_a_cancellation_pass_unlogged(
    error: BaseException, scope: Scope, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await call(ErrorsASGI(Sends(then=error)), scope)
    assert answer.error is error
    assert answer.sent == []
    assert caplog.records == []


async def test_a_websocket_is_denied_before_it_is_accepted() -> None:
    answer = await call(ErrorsASGI(Sends(then=ValueError())), websocket())
    assert answer.status == 500
    assert answer.json["error"]["type"] == "internal_server_error"


async def test_an_accepted_websocket_is_closed_with_1011() -> None:
    answer = await call(ErrorsASGI(Sends(ACCEPT, then=ValueError())), websocket())
    assert answer.error is None
    assert answer.sent == [ACCEPT, {"type": "websocket.close", "code": 1011, "reason": ""}]


@pytest.mark.parametrize(
    "ended",
    [
        [ACCEPT, {"type": "websocket.close", "code": 1000}],
        [
            {"type": "websocket.http.response.start", "status": 403, "headers": []},
            {"type": "websocket.http.response.body", "body": b"", "more_body": False},
        ],
    ],
)
async def test_a_websocket_that_is_over_is_left_alone(ended: list[Message]) -> None:
    answer = await call(ErrorsASGI(Sends(*ended, then=ValueError())), websocket())
    assert (answer.error, answer.sent) == (None, ended)


async def test_half_a_denial_is_cut() -> None:
    denial: Message = {"type": "websocket.http.response.start", "status": 403, "headers": []}
    answer = await call(ErrorsASGI(Sends(denial, then=ValueError())), websocket())
    assert isinstance(answer.error, ConnectionAbortedError)


async def test_a_client_that_left_its_websocket_is_not_told() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await receive()
        raise ValueError

    answer = await call(ErrorsASGI(app), websocket(), [{"type": "websocket.disconnect", "code": 1006}])
    assert (answer.error, answer.sent) == (None, [ACCEPT])


async def test_a_server_that_says_the_peer_is_gone_does_not_matter() -> None:
    async def send(message: Message) -> None:
        if message["type"] == "websocket.close":
            raise RuntimeError("gone")

    async def receive() -> Message:
        raise AssertionError

    await ErrorsASGI(Sends(ACCEPT, then=ValueError()))(websocket(), receive, send)


async def test_lifespan_passes_untouched(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    error = RuntimeError("startup failed")
    answer = await call(ErrorsASGI(Sends(then=error)), {"type": "lifespan"}, [])
    assert answer.error is error
    assert caplog.records == []
