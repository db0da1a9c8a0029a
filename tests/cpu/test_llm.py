"""A real model end to end: SmolLM2-135M-Instruct on the CPU backend, in this process."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus import LLM, SamplingParams
from isthmus.errors import InvalidRequest
from isthmus.llm import CompletionOutput, RequestOutput

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    if not SMOLLM2.exists():
        pytest.skip(f"{SMOLLM2} is not there; make demo fetches it")
    options: Any = {"max_model_len": 512, "num_blocks": 256, "progress": False}
    with LLM(str(SMOLLM2), device="cpu", dtype="float32", **options) as made:
        yield made


def generate(llm: LLM, prompts: Any, **params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, SamplingParams(**params), use_tqdm=False)


def complete(llm: LLM, prompt: Any, **params: Any) -> CompletionOutput:
    ((choice,),) = (output.outputs for output in generate(llm, prompt, **params))
    return choice


def test_greedy(llm: LLM) -> None:
    choice = complete(llm, PROMPT, temperature=0.0, max_tokens=2)
    assert (choice.text, choice.finish_reason) == (" Paris.", "length")


def test_prompts_together_and_alone(llm: LLM) -> None:
    prompts = [PROMPT, "Once upon a time", "def add(a, b):", "2 + 2 =", "Die Hauptstadt von"]
    together = [output.outputs[0].token_ids for output in generate(llm, prompts, temperature=0.0, max_tokens=12)]
    alone = [complete(llm, prompt, temperature=0.0, max_tokens=12).token_ids for prompt in prompts]
    assert together == alone


def test_token_ids_are_as_their_text(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(PROMPT)
    assert (
        complete(llm, ids, temperature=0.0, max_tokens=8).text
        == complete(llm, PROMPT, temperature=0.0, max_tokens=8).text
    )


def test_seeds_give_the_same_text_in_any_company(llm: LLM) -> None:
    wanted = {"n": 3, "seed": 11, "temperature": 1.0, "max_tokens": 12}
    first = [choice.text for choice in generate(llm, PROMPT, **wanted)[0].outputs]
    crowd = [SamplingParams(temperature=1.0, max_tokens=9, seed=index) for index in range(6)]
    outputs = llm.generate(["Another text"] * 6 + [PROMPT], [*crowd, SamplingParams(**wanted)], use_tqdm=False)
    assert [choice.text for choice in outputs[-1].outputs] == first
    assert len(set(first)) == 3  # each choice has a seed of its own


def test_choice_i_has_the_seed_plus_i(llm: LLM) -> None:
    choices = generate(llm, PROMPT, n=2, seed=20, max_tokens=8)[0].outputs
    assert complete(llm, PROMPT, seed=21, max_tokens=8).text == choices[1].text


def test_stop_string(llm: LLM) -> None:
    whole = complete(llm, PROMPT, temperature=0.0, max_tokens=20).text
    assert "." in whole
    choice = complete(llm, PROMPT, temperature=0.0, max_tokens=20, stop=(".",))
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (whole[: whole.index(".")], "stop", ".")
    kept = complete(llm, PROMPT, temperature=0.0, max_tokens=20, stop=(".",), include_stop_str_in_output=True)
    assert kept.text == whole[: whole.index(".") + 1]


def test_stop_token(llm: LLM) -> None:
    assert llm.tokenizer is not None
    (dot,) = llm.tokenizer.encode(".")
    choice = complete(llm, PROMPT, temperature=0.0, max_tokens=20, stop_token_ids=(dot,))
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (" Paris", "stop", dot)
    assert choice.token_ids[-1] == dot
    later = complete(llm, PROMPT, temperature=0.0, max_tokens=20, stop_token_ids=(dot,), min_tokens=5)
    assert len(later.token_ids) >= 5


def test_logprobs(llm: LLM) -> None:
    (output,) = generate(llm, PROMPT, temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=2)
    (choice,) = output.outputs
    assert choice.logprobs is not None and len(choice.logprobs) == 4
    for entry, token in zip(choice.logprobs, choice.token_ids, strict=True):
        assert entry.token_id == token and entry.rank == 1  # greedy takes the likeliest
        assert entry.top[0].token_id == token
        assert [top.logprob for top in entry.top] == sorted((top.logprob for top in entry.top), reverse=True)
        assert sum(math.exp(top.logprob) for top in entry.top) <= 1 + 1e-5
    assert "".join(entry.text for entry in choice.logprobs) == choice.text
    assert choice.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in choice.logprobs))
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    for found, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True):
        assert found is not None and found.token_id == token and len(found.top) == 2


def test_bad_words_bias_and_allowed_tokens(llm: LLM) -> None:
    assert llm.tokenizer is not None
    greedy = {"temperature": 0.0, "max_tokens": 1}
    (paris,) = llm.tokenizer.encode(" Paris")
    (rome,) = llm.tokenizer.encode(" Rome")
    assert complete(llm, PROMPT, **greedy, bad_words=("Paris",)).token_ids != [paris]
    assert complete(llm, PROMPT, **greedy, logit_bias={rome: 100.0}).text == " Rome"
    assert complete(llm, PROMPT, **greedy, allowed_token_ids=(rome, 0)).text == " Rome"


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=40), use_tqdm=False)
    assert output.prompt is not None and output.prompt.endswith("<|im_start|>assistant\n")
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"  # it ends its turn by itself
    assert "<|im_end|>" not in output.outputs[0].text


def test_prefix_cache(llm: LLM) -> None:
    prompt = "A long beginning that two requests share. " * 8
    first, second = (generate(llm, prompt + end, temperature=0.0, max_tokens=6)[0] for end in ("One", "One"))
    assert second.num_cached_tokens >= len(second.prompt_token_ids) - 17
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_runs_to_the_context_s_end(llm: LLM) -> None:
    ids = [504] * 505
    assert len(complete(llm, ids, temperature=0.0, max_tokens=None, ignore_eos=True).token_ids) == 7


def test_too_long_a_prompt(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="the prompt has 600 tokens; this model takes 512"):
        generate(llm, [[504] * 600])
    assert llm.stats().num_running == 0
