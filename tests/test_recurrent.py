"""Questions behind one prefix run through recurrent layers as each would alone, from copies of the prefix's state."""

import contextlib
import functools
import inspect
import weakref
from itertools import pairwise

import pytest
import torch
from support.tiny_runs import build_items, in_float64, tiny_run, vqa_samples, write_config
from torch.overrides import TorchFunctionMode

import dataset
import evaluate
import recurrent
import train
from batches import collate
from config import load_config
from dataset import EvalDataset
from errors import UserError
from family import Family
from forecast import meta_loss, pass_bytes
from model import load_base
from recurrent import ForkedRows, last_tokens
from samples import SampleList

ROWS = [[20, 5, 70, 1, 64], [33, 130, 2], [2, 9]]  # tokens of each row's prefix and questions; padding follows in two
WIDTH = 165
KERNEL = 4


@pytest.fixture(scope="module")
def layer(tiny_models):
    """In float64 throughout, so that a difference is a mistake and no rounding."""
    layer = load_base(str(tiny_models["qwen3_5"]), torch.float64).model.language_model.layers[1].linear_attn
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(True)
        if parameter.ndim > 1:  # random ones are so small that inputs hardly matter
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    layer.forward = in_float64(layer.forward)
    return layer


def hidden_states(seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(ROWS), WIDTH, 64, dtype=torch.float64, generator=generator)


def spans(row: list[int]) -> list[slice]:
    """Of the prefix and each question in a row."""
    bounds = torch.tensor([0, *row]).cumsum(0).tolist()
    return [slice(*span) for span in pairwise(bounds)]


def forked(layer, hidden, rows=ROWS, **options) -> torch.Tensor:
    return layer(hidden, forked_rows=ForkedRows(rows, hidden.shape[1], hidden.device, **options))


def alone(layer, hidden) -> torch.Tensor:
    """What each question, and each prefix, gives in a sequence of its own, laid out as the rows are."""
    output = torch.zeros_like(hidden)
    for row, lengths in enumerate(ROWS):
        prefix, *questions = spans(lengths)
        for own in questions:
            sequence = torch.cat([hidden[row, prefix], hidden[row, own]])[None]
            found = layer(sequence)[0]
            output[row, prefix], output[row, own] = found[: prefix.stop], found[prefix.stop :]
    return output


def real_tokens() -> torch.Tensor:
    return torch.arange(WIDTH) < torch.tensor([sum(row) for row in ROWS])[:, None]


def gradients(layer, hidden, give) -> list[torch.Tensor]:
    """Of the inputs and every parameter, from the questions' outputs alone: what reaches the prefix, they sent."""
    hidden = hidden.clone().requires_grad_()
    output = give(layer, hidden)
    of_questions = real_tokens() & (torch.arange(WIDTH) >= torch.tensor([row[0] for row in ROWS])[:, None])
    weights = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        output.dtype
    )
    return torch.autograd.grad((output * weights)[of_questions].sum(), [hidden, *layer.parameters()])


def test_every_question_has_the_outputs_that_it_has_in_a_sequence_of_its_own(layer):
    """Several rows with padding, prefixes of several lengths, one shorter than the convolution looks back, questions of
    one token, of a whole chunk and of three."""
    hidden, real = hidden_states(), real_tokens()
    found, expected = forked(layer, hidden), alone(layer, hidden)
    assert torch.allclose(found[real], expected[real], rtol=0, atol=1e-12)
    assert found[real].abs().mean() > 0.1, "numbers that are all zero prove nothing"


def test_all_gradients_flow_back_through_the_copies_into_the_prefix(layer):
    found, expected = (gradients(layer, hidden_states(), give) for give in (forked, alone))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)
    assert all(found[0][row, : ROWS[row][0]].abs().max() > 1e-3 for row in range(len(ROWS)))


def test_in_float32_outputs_and_gradients_are_as_near_to_float64_as_those_of_sequences_of_their_own(
    tiny_models, monkeypatch
):
    """In chunks of 64 tokens, and of 48: the worst tensor's error is at most twice the larger of theirs."""
    layer = load_base(str(tiny_models["qwen3_5"]), torch.float32).model.language_model.layers[1].linear_attn
    layer.requires_grad_(True)
    hidden, real, rules = hidden_states().float(), real_tokens(), recurrent.transformers_rules()

    def results(give, hidden=hidden):
        return [give(layer, hidden)[real].detach(), *gradients(layer, hidden, give)]

    found = {"shared": results(forked), 64: results(alone)}
    with monkeypatch.context() as patch:
        in_48 = functools.partial(rules.torch_chunk_gated_delta_rule, chunk_size=48)
        patch.setattr(rules, "torch_chunk_gated_delta_rule", in_48)
        found[48] = results(alone)
    layer.double().forward = in_float64(layer.forward)
    exact = results(alone, hidden.double())
    worst = {
        name: float(torch.stack([(a - b).norm() / b.norm() for a, b in zip(tensors, exact, strict=True)]).max())
        for name, tensors in found.items()
    }
    assert worst[48] != worst[64], "another chunk size changes nothing here"
    assert 0 < worst["shared"] < 2 * max(worst[48], worst[64]) < 1e-4


def packing(own_rule, calls: list, starts=lambda initial_state, number: initial_state[number : number + 1]):
    """A stand-in for flash-linear-attention's rule: one sequence of all questions, their bounds, a state for each."""

    def packed(query, key, value, g, beta, initial_state=None, cu_seqlens=None, **options):
        on_host = options.pop("cu_seqlens_cpu", None)
        if cu_seqlens is None:
            return own_rule(query, key, value, g=g, beta=beta, initial_state=initial_state, **options)
        assert len(query) == 1 and len(initial_state) == len(cu_seqlens) - 1 and cu_seqlens.dtype == torch.int64
        assert torch.equal(on_host, cu_seqlens), "the copy that spares the kernel a wait"
        calls.append(cu_seqlens.tolist())
        outputs, states = [], []
        for number, (begin, end) in enumerate(pairwise(cu_seqlens)):
            parts = (x[:, begin:end] for x in (query, key, value))
            gates = {"g": g[:, begin:end], "beta": beta[:, begin:end]}
            output, state = own_rule(*parts, **gates, initial_state=starts(initial_state, number), **options)
            outputs.append(output)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states) if options["output_final_state"] else None

    return packed


def test_with_kernels_that_take_packed_sequences_the_outputs_and_gradients_are_the_same(layer, monkeypatch):
    rules, calls = recurrent.transformers_rules(), []
    packed = packing(rules.torch_chunk_gated_delta_rule, calls)
    hidden, real = hidden_states(), real_tokens()
    expected = forked(layer, hidden)
    expected_gradients = gradients(layer, hidden, forked)
    monkeypatch.setattr(recurrent, "takes_packed", lambda device: True)
    monkeypatch.setattr(rules, "torch_chunk_gated_delta_rule", packed)
    assert torch.allclose(forked(layer, hidden)[real], expected[real], rtol=0, atol=1e-12)
    assert calls == [[0, 5, 6, 8, 17, 81, 151, 281]], "every question once, in one call, the short ones first"
    for one, other in zip(gradients(layer, hidden, forked), expected_gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


def with_nan_as_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers; NaN flows back."""
    tensor = tensor.clone()
    tensor.register_hook(lambda gradient: gradient * float("nan"))
    return tensor


@pytest.mark.parametrize(
    "kernel, is_taken",
    [
        (lambda rule: packing(rule, []), True),
        (lambda rule: packing(rule, [], lambda states, number: states[:1]), False),
        (lambda rule: packing(rule, [], lambda states, number: states[number : number + 1].detach()), False),
        (lambda rule: packing(rule, [], lambda states, n: with_nan_as_gradient(states[n : n + 1])), False),
        (lambda rule: lambda *inputs, cu_seqlens=None, **options: rule(*inputs, **options), False),
    ],
    ids=["right", "each-from-the-first-state", "no-gradient-into-the-state", "nan-as-gradient", "bounds-unknown"],
)
def test_kernels_that_pack_are_taken_only_where_they_agree_with_pytorchs_rule(monkeypatch, kernel, is_taken):
    rules = recurrent.transformers_rules()
    recurrent.choose_by_device()
    rule = kernel(inspect.unwrap(rules.torch_chunk_gated_delta_rule))
    rule.chooses_by_device = True
    monkeypatch.setattr(rules, "torch_chunk_gated_delta_rule", rule)
    with contextlib.nullcontext() if is_taken else pytest.warns(UserWarning, match="groups of similar length$"):
        assert recurrent.packed_agrees.__wrapped__(torch.device("cpu")) == is_taken


# ------------------------------------------------------------------------------------------- nobody hears the neighbour


def test_trap_a_state_that_goes_on_from_question_to_question(layer):
    """Another question in the same row changes neither the others nor the prefix, to the last bit."""
    hidden = hidden_states()
    changed = hidden.clone()
    changed[0, spans(ROWS[0])[1]] += 1.0
    before, after = forked(layer, hidden), forked(layer, changed)
    for span in (0, 2, 3, 4):
        assert torch.equal(before[0, spans(ROWS[0])[span]], after[0, spans(ROWS[0])[span]])
    assert torch.equal(before[1:][real_tokens()[1:]], after[1:][real_tokens()[1:]])
    assert not torch.allclose(before[0, spans(ROWS[0])[1]], after[0, spans(ROWS[0])[1]])


def test_trap_a_convolution_that_sees_the_neighbours_last_inputs(layer):
    """A question's first tokens look back to the prefix's last ones, and not to those that stand before them."""
    hidden = hidden_states()
    prefix, first, second, *_ = spans(ROWS[0])
    begin = slice(second.start, second.start + KERNEL - 1)
    before = forked(layer, hidden)
    changed = hidden.clone()
    changed[0, first.stop - KERNEL + 1 : first.stop] += 1.0
    assert torch.equal(forked(layer, changed)[0, begin], before[0, begin])
    changed = hidden.clone()
    changed[0, prefix.stop - 1] += 1.0
    assert ((forked(layer, changed) - before)[0, begin].abs().amax(-1) > 1e-3).all()


def test_trap_padding_that_enters_a_state(layer):
    """Neither what stands in the padding of a row, nor the length of its neighbours, changes a state or an output."""
    kept = {}
    for name, rows, seed in (("short", ROWS[2:], 0), ("padded", ROWS, 0), ("other padding", ROWS, 1)):
        hidden = hidden_states()
        hidden[~real_tokens()] = 3.0 * hidden_states(seed)[~real_tokens()]
        layout = ForkedRows(rows, WIDTH, hidden.device, keep_states=True)
        output = layer(hidden[-len(rows) :], forked_rows=layout)[-1, : sum(ROWS[2])]
        convolution, matrix = layout.states[layer.layer_idx]
        kept[name] = output, convolution[-layout.slots], matrix[-layout.slots]
    for name in ("padded", "other padding"):
        for one, other in zip(kept["short"], kept[name], strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-13), name


# ----------------------------------------------------------------------------------------------------- token by token


def test_answers_go_on_from_each_questions_own_state(layer):
    """Three tokens for every question, one at a time, are those of the whole sequence. Some questions are shorter than
    the convolution looks back."""
    hidden, answers = hidden_states(), torch.randn(3, 3, 4, 64, dtype=torch.float64)  # (tokens, rows, slots, hidden)
    layout = ForkedRows(ROWS, WIDTH, hidden.device, keep_states=True)
    layer(hidden, forked_rows=layout)
    found = torch.stack([layer(answer, forked_rows=layout) for answer in answers], dim=2)  # (rows, slots, tokens, ...)
    for row, lengths in enumerate(ROWS):
        prefix, *questions = spans(lengths)
        for slot, own in enumerate(questions):
            sequence = torch.cat([hidden[row, prefix], hidden[row, own], answers[:, row, slot]])[None]
            assert torch.allclose(found[row, slot], layer(sequence)[0, -3:], rtol=0, atol=1e-12), (row, slot)


def test_answers_of_some_slots_go_on_as_among_all(layer):
    answers = torch.randn(2, 3, 4, 64, dtype=torch.float64)
    rows, columns = torch.tensor([1, 0]), torch.tensor([[1, 0], [3, 1]])
    kept = torch.stack([answers[1][row][slots] for row, slots in zip(rows, columns, strict=True)])
    found = []
    for some in (False, True):
        layout = ForkedRows(ROWS, WIDTH, answers.device, keep_states=True)
        layer(hidden_states(), forked_rows=layout)
        layer(answers[0], forked_rows=layout)
        if some:
            layout.select(rows, columns)
        found.append(layer(kept if some else answers[1], forked_rows=layout))
    everything = torch.stack([found[0][row][slots] for row, slots in zip(rows, columns, strict=True)])
    assert torch.allclose(found[1], everything, rtol=0, atol=1e-13)


def test_the_last_tokens_of_a_short_sequence_are_marked_as_missing():
    assert last_tokens(torch.arange(5).numpy(), 3).tolist() == [2, 3, 4]
    assert last_tokens(torch.arange(2).numpy(), 3).tolist() == [-1, 0, 1]


def test_without_forked_rows_a_layer_runs_as_transformers_own(tiny_models):
    layer = load_base(str(tiny_models["qwen3_5"]), torch.float32).model.language_model.layers[0].linear_attn
    hidden = hidden_states().float()
    assert "forward" in vars(layer) and torch.equal(layer(hidden), type(layer).forward(layer, hidden))


def test_slots_are_selected_one_layer_at_a_time_so_that_the_memory_is_never_twice_the_states():
    layout = ForkedRows(ROWS, WIDTH, torch.device("cpu"), keep_states=True)
    layout.states = {layer: (torch.randn(12, 4), torch.randn(12, 2, 2)) for layer in range(4)}
    old = [weakref.ref(state) for states in layout.states.values() for state in states]
    alive = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, function, kinds, values=(), options=None):
            if "index_select" in function.__name__:
                alive.append(sum(state() is not None for state in old))
            return function(*values, **(options or {}))

    with Count():
        layout.select(torch.tensor([0, 1, 2]), torch.arange(4).expand(3, 4))
    assert len(alive) == 8 and alive[-1] <= 2, "the layers before have let go of theirs"


@pytest.mark.parametrize("share_prefix", [True, False])
def test_an_evaluation_batch_holds_no_more_states_than_there_is_memory_for(tiny_models, monkeypatch, share_prefix):
    """Answers take a state for every slot, of a row that has fewer questions than the widest, too."""
    run = tiny_run(tiny_models, "qwen3_5")
    text = load_base(run.config.model_name, torch.float32).config.get_text_config()
    layers, heads = text.layer_types.count("linear_attention"), text.linear_num_value_heads
    assert run.family.state_bytes == layers * heads * text.linear_key_head_dim * text.linear_value_head_dim * 4
    monkeypatch.setattr(dataset, "EVAL_STATES", 8 * run.family.state_bytes)
    samples = SampleList(
        [*vqa_samples(3, 3)[:8], *vqa_samples(1, 20)[9:]], "s"
    )  # 3, 3 and 2 questions; 11 of the first

    def slots(**options):
        found = EvalDataset(samples, run.encoder(), share_prefix, None, **options)
        counted = [found[index]["slots"].numel() for index in range(len(found))]
        assert sorted(row for batch in found.batches for row in batch) == list(range(len(samples)))
        return counted

    assert max(slots(generation=True)) <= 8 and len(slots(generation=True)) < 8
    assert max(slots(generation=False)) > 8, "a loss keeps no states"


def test_training_asks_the_rule_for_no_states_of_questions(layer, monkeypatch):
    rules, asked = recurrent.transformers_rules(), []
    own_rule = rules.torch_chunk_gated_delta_rule

    def rule(*inputs, **options):
        if options["initial_state"] is not None:
            asked.append(options["output_final_state"])
        return own_rule(*inputs, **options)

    monkeypatch.setattr(rules, "torch_chunk_gated_delta_rule", rule)
    forked(layer, hidden_states())
    assert asked and not any(asked)
    asked.clear()
    forked(layer, hidden_states(), keep_states=True)
    assert asked and all(asked)


# ------------------------------------------------------------------------------------------------------------- kernels


@pytest.fixture
def kernels_for_cuda_alone(monkeypatch):
    """As with flash-linear-attention and causal-conv1d installed: transformers has taken them, whatever the device."""
    rules = recurrent.transformers_rules()
    for name in recurrent.FUNCTIONS:
        own = getattr(rules, name)

        def kernel(first, *others, own=own, **options):
            raise RuntimeError(f"a kernel for CUDA was given a tensor on {first.device}")

        kernel.__wrapped__ = inspect.unwrap(own)
        monkeypatch.setattr(rules, name, kernel)


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "plain"])
def test_with_kernels_installed_a_pass_is_still_counted_on_the_meta_device(
    tiny_models, kernels_for_cuda_alone, share_prefix
):
    run = tiny_run(tiny_models, "qwen3_5")
    encoder = run.encoder()
    items, images = build_items(encoder, vqa_samples(1, 2))
    batch = collate(items, images, share_prefix, encoder.tokenizer.pad_token_id)
    assert pass_bytes(meta_loss(run.config, run.family, torch.bfloat16), batch) > 0


def test_with_kernels_installed_a_cpu_takes_pytorchs_own_functions(tiny_models, kernels_for_cuda_alone):
    layer = load_base(str(tiny_models["qwen3_5"]), torch.float32).model.language_model.layers[0].linear_attn
    hidden = hidden_states().float()
    layout = ForkedRows(ROWS, WIDTH, hidden.device, keep_states=True)
    assert layer(hidden).shape == layer(hidden, forked_rows=layout).shape
    assert layer(torch.randn(3, 4, 64), forked_rows=layout).shape == (3, 4, 64)


def test_deterministic_on_a_gpu_is_refused_for_recurrent_layers_alone_before_anything_is_loaded(
    tiny_models, tmp_path, monkeypatch
):
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.json").write_text("[]")
    configs = {
        family: load_config(write_config(tmp_path, tiny_models[family], family, deterministic=True, compile=False))
        for family in ("qwen3_5", "qwen3_vl")
    }
    train.open_data(configs["qwen3_5"], "s")  # on a CPU it holds
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train.open_data(configs["qwen3_vl"], "s")
    for begin in (
        lambda: train.check(configs["qwen3_5"], "s", 400),
        lambda: train.open_data(configs["qwen3_5"], "s"),
        lambda: evaluate.evaluate(configs["qwen3_5"], "base", "test", "s"),
    ):
        with pytest.raises(UserError, match=r"^deterministic: true cannot be kept .* on GPUs; set it to false$"):
            begin()


def test_one_line_says_what_missing_kernels_cost_and_how_to_get_them(monkeypatch):
    family, gpu = Family("qwen3_5", "relative"), torch.device("cuda")
    monkeypatch.setattr(recurrent, "missing_kernels", lambda: ("flash-linear-attention", "causal-conv1d"))
    (line,) = recurrent.notes(family, gpu)
    assert "flash-linear-attention and causal-conv1d" in line and "requirements-extra.txt" in line and "\n" not in line
    assert not recurrent.notes(family, torch.device("cpu")), "they run on GPUs only"
    assert not recurrent.notes(Family("qwen3_vl", "relative"), gpu)
    monkeypatch.setattr(recurrent, "missing_kernels", lambda: ())
    assert not recurrent.notes(family, gpu)


def test_four_bits_hold_every_linear_layer_but_the_gates(tiny_models):
    """A state that is gated by a rounded number goes on with it, token after token."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (requirements-extra.txt)")
    model = load_base(str(tiny_models["qwen3_5"]), torch.float32, "nf4")
    packed = {name.split(".")[-2] for name, p in model.named_parameters() if p.dtype == torch.uint8}
    mlp, attention = {"gate_proj", "up_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert packed == {"in_proj_qkv", "in_proj_z", "out_proj"} | mlp | attention
