"""The services before this one, in short: FastAPI, and a route that calls `generate`. A process of its own."""

import argparse

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class Body(BaseModel):
    prompt: str
    max_tokens: int
    temperature: float = 1.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    api = FastAPI()

    @api.get("/healthz")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.post("/v1/completions")
    def complete(body: Body) -> dict:
        inputs = tokenizer(body.prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=body.max_tokens, min_new_tokens=body.max_tokens,
                do_sample=body.temperature > 0, temperature=body.temperature, pad_token_id=0,
            )  # fmt: skip
        text = tokenizer.decode(output[0, length:])
        return {"choices": [{"text": text}], "usage": {"completion_tokens": output.shape[1] - length}}

    uvicorn.run(api, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
