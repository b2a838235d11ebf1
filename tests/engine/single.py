"""Running an engine to its end, and a request by itself: what batched answers are compared with."""

from app.engine.engine import Engine


def drain(engine: Engine) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Run to the end: (tokens, finish reason) by request."""
    tokens, reasons = {}, {}
    while engine.has_work:
        collect(engine.step(), tokens, reasons)
    return tokens, reasons


def collect(events, tokens, reasons):
    for event in events:
        tokens.setdefault(event.request_id, [])
        if event.token is not None:
            tokens[event.request_id].append(event.token)
        if event.finish_reason:
            assert event.request_id not in reasons, "an event came after the end"
            reasons[event.request_id] = event.finish_reason


def alone(model, ids, sampling):
    engine = Engine(model, max_batch_size=1, max_queue=1)
    request_id = engine.add_request(ids, sampling)
    return drain(engine)[0][request_id]
