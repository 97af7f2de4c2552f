"""A batch of prompts → greedy answers. A picture is read once, and all its questions are answered from that cache.

Questions of one picture stand in one row behind their shared prefix (see `batches.collate`). Each decoding step feeds
one token per question; the mask lets it see the prefix, its own question and its own answer.
"""

import torch
from torch import nn

from batches import last_tokens
from family import Family
from model import forward_logits

MAX_NEW_TOKENS = 128  # the longest Kvasir-VQA answer, all nine places, has 44


@torch.inference_mode()
def greedy(model: nn.Module, batch: dict, family: Family, end_ids: set[int], max_new_tokens: int = MAX_NEW_TOKENS):
    """Greedy answers of a collated batch of prompts, on the batch's device.

    Returns a list over the batch's items of (token ids without the end token, finished); not finished: cut off after
    max_new_tokens. Every slot (row, question) advances on its own, so the answers do not depend on the batching.
    """
    from transformers import DynamicCache

    segments, positions, slots = batch["segments"], batch["position_ids"], batch["slots"]
    rows, width = slots.shape
    device = segments.device
    is_last = last_tokens(segments)
    used = slots >= 0  # (rows, width)
    cache = DynamicCache(config=model.config)
    output = forward_logits(model, batch, family, is_last, use_cache=True, past_key_values=cache)
    token = torch.zeros_like(slots)
    token[used] = output.logits.argmax(-1)
    next_position = torch.zeros(3, *slots.shape, dtype=torch.int64, device=device)
    next_position[:, used] = positions[:, is_last] + 1
    slot_segment = torch.arange(1, width + 1, device=device, dtype=segments.dtype).expand(rows, width)
    key_segment = segments  # of every token in the cache
    ends = torch.tensor(sorted(end_ids), device=device)
    running = used & ~torch.isin(token, ends)
    answers = [token]
    for _ in range(max_new_tokens - 1):
        if not running.any():
            break
        key_segment = torch.cat([key_segment, slot_segment], dim=1)
        # A token sees the prefix (0) and everything of its own question, which is itself and tokens before it.
        mask = (key_segment[:, None, None, :] == 0) | (key_segment[:, None, None, :] == slot_segment[:, None, :, None])
        output = model(
            input_ids=token, attention_mask=mask, position_ids=next_position, past_key_values=cache, use_cache=True
        )
        token = output.logits.argmax(-1)
        next_position = next_position + 1
        answers.append(torch.where(running, token, ends[0]))
        running &= ~torch.isin(token, ends)
    table = torch.stack(answers, dim=-1).tolist()
    results: list[tuple[list[int], bool]] = [([], False) for _ in batch["sample_ids"]]
    for row, items in enumerate(slots.tolist()):
        for column, item in enumerate(items):
            if item >= 0:
                tokens = table[row][column]
                end = next((i for i, value in enumerate(tokens) if value in end_ids), len(tokens))
                results[item] = (tokens[:end], end < len(tokens))
    return results
