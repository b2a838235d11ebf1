"""The prompt template: how a record, or a question at serving time, becomes the text before the response."""

TEMPLATE_NAME = "pacos"


def render_prompt(instruction: str, input: str = "") -> str:
    """Text up to and including `Response: `'s colon; the response starts with the space after it."""
    return f"Instruction: {instruction}\nInput: {input}\nResponse:"


def render_response(output: str) -> str:
    # The space belongs to the response's first word, as byte-level BPE has it.
    return f" {output}"
