"""The HTTP endpoint on Ray Serve. Orchestration only: generating, retrieving and caching are done by other packages.

The life of a request: `ingress` checks its form (`openai_schema`) -> `answering` looks into the `cache`, asks the
`retriever` for passages if it is a question, then the `generator` -> there a `served_model` turns text into ids, its
engine generates, `text_stream` turns tokens back into text -> as it comes, or as a whole, to the client. `application`
binds the deployments, `launch` starts them, `ask` is a client.
"""
