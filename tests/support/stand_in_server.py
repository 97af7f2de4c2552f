"""A small OpenAI-compatible server of a merged model folder, right or wrong in one of the ways that real ones are."""

import base64
import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from PIL import Image


class Served:
    """The folder as transformers reads it. wrong: None, "resizes", "drops system", "drops image", "base weights",
    "tells nothing" or "thinks"."""

    def __init__(self, folder, wrong=None, weights=None):
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.model = AutoModelForImageTextToText.from_pretrained(weights or folder).eval()
        self.wrong = wrong

    @torch.no_grad()
    def complete(self, asked):
        messages, images = [], []
        for message in asked["messages"]:
            content = message["content"]
            if self.wrong == "drops system" and message["role"] == "system":
                continue
            if isinstance(content, list):
                shown = [part for part in content if part["type"] == "image_url"]
                content = [part if part["type"] == "text" else {"type": "image"} for part in content]
                if self.wrong == "drops image":
                    shown, content = [], [part for part in content if part["type"] == "text"]
                for part in shown:
                    image = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
                    images.append(
                        image.resize((image.width // 2, image.height // 2)) if self.wrong == "resizes" else image
                    )
            messages.append({**message, "content": content})
        options = {} if self.wrong == "thinks" else asked.get("chat_template_kwargs", {})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        inputs = {}
        if images:
            inputs = dict(self.processor(images=images, return_tensors="pt"))
            (grid,) = inputs["image_grid_thw"]
            tokens = int(grid.prod()) // self.processor.merge_size**2
            text = text.replace("<|image_pad|>", "<|image_pad|>" * tokens)
        inputs |= self.tokenizer(text, return_tensors="pt")
        image_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        if images:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_id).int()
        length = inputs["input_ids"].shape[1]
        output = self.model.generate(
            **inputs, max_new_tokens=asked["max_tokens"], output_logits=True, return_dict_in_generate=True
        )
        said = output.sequences[0, length:]
        content = self.tokenizer.decode(said, skip_special_tokens=True)
        logprobs = [
            {"token": "?", "logprob": float(logits[0].log_softmax(-1)[token])}
            for logits, token in zip(output.logits, said, strict=True)
        ]
        choice = {"message": {"role": "assistant", "content": content}}
        if self.wrong == "tells nothing":
            return {"choices": [choice]}
        return {"choices": [{**choice, "logprobs": {"content": logprobs}}], "usage": {"prompt_tokens": length}}


@contextlib.contextmanager
def serve(served):
    """The address of a server that answers until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"data": [{"id": "merged"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if served.wrong == "tells nothing" and "logprobs" in asked:
                self.reply(400, {"error": "logprobs are not supported"})
            else:
                assert asked["model"] == "merged" and asked["temperature"] == 0
                self.reply(200, served.complete(asked))

        def reply(self, code, value):
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
