"""Every attention path gives the same numbers as the masked reference, and none lets a question see another."""

import pytest
import torch
import torch.nn.functional as F
from support.tiny_runs import FAMILIES, build_items, tiny_run, vqa_samples

import attention
from attention import SharedRows, attention_mask, masked, two_part, varlen, varlen_layout
from batches import collate
from errors import UserError
from model import AnswerLoss, load_base, trainable_parameters

PREFIX, PADDING = 0, -1


def row(*runs: tuple[int, int]) -> list[int]:
    """(segment, tokens) runs, one after another."""
    return [segment for segment, tokens in runs for _ in range(tokens)]


LAYOUTS = {
    "one row": [row((PREFIX, 7), (1, 3), (2, 5), (3, 1))],
    "rows of unlike length": [
        row((PREFIX, 9), (1, 2), (2, 4), (3, 2)),
        row((PREFIX, 6), (1, 5), (PADDING, 6)),
        row((PREFIX, 4), (1, 1), (2, 3), (3, 4), (PADDING, 5)),
    ],
    "a row whose prefix is empty": [row((1, 4), (2, 5)), row((PREFIX, 3), (1, 2), (2, 4)), row((1, 6), (2, 3))],
}


@pytest.fixture(params=LAYOUTS)
def segments(request) -> torch.Tensor:
    return torch.tensor(LAYOUTS[request.param], dtype=torch.int32)


def states(segments: torch.Tensor) -> list[torch.Tensor]:
    """Random float64 queries of 4 heads, keys and values of 2."""
    generator = torch.Generator().manual_seed(0)
    rows, tokens = segments.shape
    return [
        torch.randn(rows, heads, tokens, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]


def reference(query, key, value, segments):
    key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask(segments), scale=0.3)


def in_pieces(queries, keys, values, cu_q, cu_k, max_q, max_k, scale):
    """What `torch.nn.attention.varlen` computes, from its definition: sequence by sequence, causal from the end."""
    outputs = []
    for i in range(len(cu_q) - 1):
        q = queries[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
        k, v = (x[cu_k[i] : cu_k[i + 1]].transpose(0, 1).repeat_interleave(2, dim=0) for x in (keys, values))
        assert 0 < q.shape[1] <= max_q and q.shape[1] <= k.shape[1] <= max_k
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(outputs)


def shared_rows(segments, groups=1, dtype=torch.float64):
    return SharedRows(segments, attention_mask(segments), int((segments == PREFIX).sum(1).min()), dtype, groups)


def by_two_part(query, key, value, segments):
    rows = shared_rows(segments)
    return two_part(query, key, value, rows.bias, 0.3)


def by_two_part_as_on_cuda(query, key, value, segments):
    """The query heads that read the same keys as queries of one head."""
    rows = shared_rows(segments, groups=2)
    return two_part(query, key, value, rows.bias, 0.3)


def by_varlen(query, key, value, segments):
    return varlen(query, key, value, varlen_layout(segments), 0.3, attend=in_pieces)


@pytest.mark.parametrize("path", [by_two_part, by_two_part_as_on_cuda, by_varlen])
def test_a_path_gives_the_masked_references_outputs_and_gradients(segments, path):
    inputs = states(segments)
    real = (segments >= 0)[:, None, :, None]  # nothing reads what stands at padding
    results = []
    for attend in (reference, path):
        output = attend(*inputs, segments) * real
        gradients = torch.autograd.grad((output * torch.arange(8.0)).square().sum(), inputs)
        results.append([output, *gradients])
    for expected, got in zip(*results, strict=True):
        assert torch.allclose(expected, got, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", [reference, by_two_part, by_two_part_as_on_cuda, by_varlen])
def test_no_question_sees_another_nor_the_future(segments, path):
    """Changing one token's key and value changes nothing before it and nothing in other questions."""
    query, key, value = (x.detach() for x in states(segments))
    before = path(query, key, value, segments)
    for b, token in [(0, segments.shape[1] // 2), (len(segments) - 1, segments.shape[1] - 2), (0, 1)]:
        key2, value2 = key.clone(), value.clone()
        key2[b, :, token] += 1
        value2[b, :, token] -= 1
        changed = (path(query, key2, value2, segments) != before).any(dim=(1, 3))
        own = int(segments[b, token])
        may_see = (segments == own) | (own == PREFIX)
        may_see[:, :token] = False
        may_see[torch.arange(len(segments)) != b] = False
        assert not (changed & ~may_see & (segments >= 0)).any()


def test_the_two_part_path_leaves_out_most_of_what_the_mask_throws_away():
    segments = torch.tensor([row((PREFIX, 600), *((k, 40) for k in range(1, 10)))])
    rows = shared_rows(segments)
    useful = int(attention_mask(segments).sum())
    prefix = 960 - rows.bias.shape[3]
    computed = prefix**2 / 2 + rows.bias.numel()
    assert prefix == 600 and computed < 0.6 * 960**2 and computed < 1.3 * useful + 360**2 * 0.9


def loss_and_gradients(run, monkeypatch, path: str, dtype=torch.float64):
    monkeypatch.setenv("SHARED_ATTENTION", path)
    items, images = build_items(run.encoder(), vqa_samples(3, 4)[:-2])
    batch = collate(items, images, True, run.tokenizer.pad_token_id)
    model = run.model(dtype)
    model.zero_grad()
    loss = AnswerLoss(model, run.family)(batch)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in trainable_parameters(model).items()}


def test_a_model_trains_the_same_on_every_path(tiny_models, monkeypatch):
    run = tiny_run(tiny_models, "qwen3_vl")
    calls = []
    for name, stand_in in (("two_part", two_part), ("varlen", varlen)):
        monkeypatch.setattr(attention, name, lambda *a, f=stand_in, n=name, **k: calls.append(n) or f(*a, **k))
    expected, expected_gradients = loss_and_gradients(run, monkeypatch, "mask")
    assert calls == []
    monkeypatch.setattr(attention, "varlen_agrees", lambda device: True)
    monkeypatch.setattr(attention, "_varlen_kernel", in_pieces)
    monkeypatch.setattr(attention, "VARLEN_TYPES", (torch.float64,))
    for path in ("two_part", "varlen"):
        calls.clear()
        loss, gradients = loss_and_gradients(run, monkeypatch, path)
        assert calls == [path] * 2, "both layers take it"
        assert loss == pytest.approx(expected, rel=1e-10)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, expected_gradients[name], rtol=1e-7, atol=1e-10), name


def test_rows_of_one_question_need_no_mask_and_no_path(tiny_models, monkeypatch):
    run = tiny_run(tiny_models, "qwen3_vl")
    monkeypatch.setattr(attention, "two_part", None)  # calling it would be an error
    items, images = build_items(run.encoder(), vqa_samples(3, 1))
    batch = collate(items, images, True, run.tokenizer.pad_token_id)
    assert batch["shared_prefix"] is None
    assert float(AnswerLoss(run.model(), run.family)(batch).detach()) > 0


def test_varlen_on_a_cpu_falls_back_to_two_part_and_says_so(monkeypatch):
    monkeypatch.setenv("SHARED_ATTENTION", "varlen")
    attention.varlen_agrees.cache_clear()
    with pytest.warns(UserWarning, match="varlen is not usable here .* CUDA only.*; using two_part"):
        assert attention.chosen_path(torch.device("cpu")) == "two_part"


def test_an_unknown_path_is_an_error_that_names_the_known_ones(monkeypatch):
    monkeypatch.setenv("SHARED_ATTENTION", "flash")
    with pytest.raises(UserError, match="SHARED_ATTENTION is 'flash'; choose one of mask, two_part, varlen"):
        attention.chosen_path(torch.device("cpu"))


def test_varlen_is_compared_with_the_reference_wherever_it_is_first_asked_for(monkeypatch):
    """In an evaluation too, which runs without gradients."""
    monkeypatch.setattr(attention, "_varlen_kernel", in_pieces)
    for surroundings in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with surroundings():
            assert attention.varlen_difference(torch.device("cpu")) < 0.02
    monkeypatch.setattr(attention, "_varlen_kernel", lambda *states: in_pieces(*states) * 1.1)
    assert attention.varlen_difference(torch.device("cpu")) > 0.02

    def with_nan_as_gradient(*states):
        output = in_pieces(*states)
        output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    monkeypatch.setattr(attention, "_varlen_kernel", with_nan_as_gradient)
    assert not attention.varlen_difference(torch.device("cpu")) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vision_tower_attends_as_transformers_own_does_with_fewer_calls(tiny_models, monkeypatch, family):
    """Three images, two of one size; Qwen2.5-VL's windows at their right and lower edges are smaller."""
    from transformers import AutoModelForImageTextToText

    own = load_base(str(tiny_models[family]), torch.float64)
    stock = AutoModelForImageTextToText.from_pretrained(tiny_models[family], dtype=torch.float64)
    grids = torch.tensor([[1, 20, 26], [1, 20, 26], [1, 8, 6]])
    generator = torch.Generator().manual_seed(0)
    width = own.model.visual.patch_embed.proj.weight[0].numel()
    patches = torch.randn(int(grids.prod(1).sum()), width, generator=generator, dtype=torch.float64)
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(0) or sdpa(*a, **k))
    counts, features = [], []
    for model in (stock, own):
        calls.clear()
        with torch.no_grad():
            found = model.get_image_features(patches, grids, return_dict=True)
        layers = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
        features.append([torch.cat(list(layer)) for layer in layers])
        counts.append(len(calls))
    assert counts[1] < counts[0], counts
    for one, other in zip(*features, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_answers_read_a_cache_alike_whether_keys_are_repeated_or_heads_stand_together(groups):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, t, 8, generator=generator) for n, t in ((4, 3), (2, 11), (2, 11)))
    mask = torch.rand(2, 1, 3, 11, generator=generator) > 0.4
    mask[..., 0] = True
    repeated = (x.repeat_interleave(2, dim=1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    assert torch.allclose(
        masked(query, key, value, mask[:, :, None].expand(-1, -1, groups, -1, -1), 0.3), expected, atol=1e-6
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_varlen_agrees_with_the_reference():
    attention.varlen_agrees.cache_clear()
    assert attention.varlen_agrees(torch.device("cuda"))
