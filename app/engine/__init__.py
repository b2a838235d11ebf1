"""Generation with continuous batching: token ids in, token ids out. Knows no text, no HTTP and no Ray.

The life of a request: `front` takes it from any event loop -> `engine.add_request` checks it and queues it ->
`scheduler` gives it a cache slot -> `runner` computes its prompt, then one token a step, together with all others ->
`sampling` picks the token -> `engine` reports an event, and frees the slot at the end.
"""
