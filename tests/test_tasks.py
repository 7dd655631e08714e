"""Tasks against visible context, for tiny random models of eight families and for the grid that the table comes from."""

import numpy as np
import pytest
import torch
import transformers

from ctxnb.batch.grid import read_grid
from ctxnb.experiments.tasks import KINDS, answer_losses, continue_from, decode_greedily, last_logits, make_tasks, read_once, score_tasks
from ctxnb.paths import project_root
from ctxnb.text.retrieval import distance_strata, encode
from ctxnb.text.tokenizers import load_tokenizer
from ctxnb.text.tokens import token_store

SIZES = dict(vocab_size=257, hidden_size=32, num_hidden_layers=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HEADS = dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=64, max_position_embeddings=2048)
NEOX = HEADS | dict(num_key_value_heads=2)
FAMILIES = {
    "GPT2": dict(n_positions=2048, n_head=2),
    "Llama": HEADS,
    "GPTNeoX": {k: v for k, v in NEOX.items() if k != "num_key_value_heads"},
    "Qwen2": HEADS,
    "Mistral": HEADS | dict(sliding_window=48),
    "Gemma3": HEADS | dict(head_dim=16, sliding_window=48, layer_types=["sliding_attention", "full_attention"]),
    "Mamba": {},
    "RecurrentGemma": {k: v for k, v in HEADS.items() if k != "max_position_embeddings"} | dict(
        lru_width=32, attention_window_size=48, num_hidden_layers=3),
}
WITHOUT_CACHE = {"Mamba", "RecurrentGemma"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Name and a tiny random model in evaluation mode."""
    config, model = ("Gemma3TextConfig", "Gemma3ForCausalLM") if request.param == "Gemma3" else (f"{request.param}Config", f"{request.param}ForCausalLM")
    model = "GPT2LMHeadModel" if request.param == "GPT2" else model
    torch.manual_seed(0)
    return request.param, getattr(transformers, model)(getattr(transformers, config)(**SIZES | FAMILIES[request.param])).eval()


def _labels_loss(model, prompt: torch.Tensor, answer: torch.Tensor) -> float:
    """The model's own mean loss of an answer."""
    labels = torch.cat([torch.full_like(prompt, -100), answer])
    return model(torch.cat([prompt, answer])[None], labels=labels[None]).loss.item()


def test_answer_loss_is_the_models_own(family):
    """Read once and continued, or read whole: both give the loss that the model computes from its labels."""
    name, model = family
    ids = torch.randint(3, 256, (2, 90), generator=torch.Generator().manual_seed(1))
    answers = [np.array([5, 6, 7, 8]), np.array([9])]
    with torch.inference_mode():
        cache = read_once(model, ids[:, :80])
        assert (cache is None) == (name in WITHOUT_CACHE)
        for kept in {None, continue_from(cache, torch.arange(2))}:
            ours = answer_losses(model, ids, answers, kept)
            for row, (losses, answer) in enumerate(zip(ours, answers)):
                assert losses.mean() == pytest.approx(_labels_loss(model, ids[row], torch.tensor(answer)), abs=2e-4)


def test_continuations_leave_the_cache_as_it_was(family):
    """Two questions on one text, asked one after the other, get the answers that each gets alone."""
    _, model = family
    ids = torch.randint(3, 256, (2, 90), generator=torch.Generator().manual_seed(2))
    rows = torch.tensor([1, 0, 1])
    with torch.inference_mode():
        cache = read_once(model, ids[:, :80])
        first = decode_greedily(model, ids[rows], 4, continue_from(cache, rows))
        second = last_logits(model, ids[rows], continue_from(cache, rows), 3)
        assert torch.equal(first, decode_greedily(model, ids[rows], 4))
        assert torch.allclose(second, model(ids[rows]).logits[:, -3:].float(), atol=2e-3)


def test_scores_do_not_depend_on_sharing(family):
    """The scores of a task are those of each of its prompts alone."""
    _, model = family
    tokenizer = load_tokenizer("bytes")
    tasks = make_tasks("multi", token_store("sotu", "bytes"), tokenizer, 256, 2, nearest=64)
    scored = score_tasks(model, tasks, tokenizer, 128)
    assert len(scored) == 6
    for s in scored:
        question = tasks[s.context].questions[s.question]
        prompt = torch.tensor(np.concatenate([tasks[s.context].prefix(128), question.tokens]))
        with torch.inference_mode():
            alone = _labels_loss(model, prompt, torch.tensor(question.items[0])) * len(question.items[0])
        assert s.loss == pytest.approx(alone, abs=2e-3)


@pytest.mark.parametrize("length", [128, 256, 1024, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_length(kind, length):
    """Contexts have exactly the length asked for, the evidence is where its distance says, and seeds decide everything."""
    store, tokenizer = token_store("sotu", "gpt2"), load_tokenizer("gpt2")
    tasks = make_tasks(kind, store, tokenizer, length, 3, seed=5)
    again = make_tasks(kind, store, tokenizer, length, 3, seed=5)
    other = make_tasks(kind, store, tokenizer, length, 3, seed=6)
    for task, same, different in zip(tasks, again, other):
        assert len(task.context) == length and np.array_equal(task.context, same.context)
        assert not np.array_equal(task.context, different.context)
        for question in task.questions:
            assert 0 < question.chance < 1
            for item, distance in zip(question.items, question.distances):
                key = tokenizer.decode(item).split()[-1].strip(",")
                evidence = tokenizer.decode(task.context if not distance else task.context[-distance:][:24])
                assert key in evidence
                if distance:
                    assert key not in tokenizer.decode(task.context[:-distance])  # nowhere before
    if kind == "multi":
        assert len(tasks[0].questions) == len(distance_strata(length)) - 1


def test_grid_is_sound():
    """The committed grid asks for kinds and lengths that exist, with the whole context as its largest view."""
    grid = read_grid(project_root() / "data" / "grids" / "standard" / "tasks.toml")
    assert set(grid.axes["kind"]) <= set(KINDS)
    settings = grid.template.defaults | grid.parameters
    assert settings["fractions"] == sorted(settings["fractions"]) and settings["fractions"][-1] == 1.0
    assert min(grid.axes["length"]) * settings["fractions"][0] >= settings["nearest"]
    assert len(encode(load_tokenizer("gpt2"), " The number of Oliver is 417.")) <= settings["nearest"]
