"""The offline engine over the null backend: everything of it but a model."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from isthmus.errors import BackendNotFound, InvalidRequest, IsthmusError, ModelError
from isthmus.llm import LLM, RequestOutput
from isthmus.sampling_params import SamplingParams
from isthmus.testing.toy_model import EOS_TOKEN, write_toy_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy_model(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[LLM]:
    with LLM(folder, device="null", device_options={"eos_every": "0"}, max_model_len=256) as made:
        yield made


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [choice.text for output in outputs for choice in output.outputs]


def generate(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def test_one_prompt_and_many(llm: LLM) -> None:
    (one,) = generate(llm, "hello")
    assert one.prompt == "hello"
    assert one.prompt_token_ids == list(b"hello")
    assert [(choice.index, len(choice.token_ids), choice.finish_reason) for choice in one.outputs] == [
        (0, 20, "length")
    ]
    assert one.outputs[0].text.encode() == bytes(one.outputs[0].token_ids)
    many = generate(llm, ["hello", "other", "hello"])
    assert [output.prompt for output in many] == ["hello", "other", "hello"]
    assert texts(many)[0] == texts(many)[2] == texts([one])[0] != texts(many)[1]


def test_token_ids_are_as_their_text(llm: LLM) -> None:
    ids = list(b"hello")
    text = texts(generate(llm, "hello"))
    for prompts in (ids, [ids], tuple(ids)):
        (output,) = generate(llm, prompts)
        assert (output.prompt, output.prompt_token_ids) == (None, ids)
        assert texts([output]) == text
    assert texts(generate(llm, [ids, "hello"])) == text * 2


def test_nothing_in_nothing_out(llm: LLM) -> None:
    assert generate(llm, []) == []


def test_sampling_params_one_each(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=size) for size in (3, 5)]
    assert [len(output.outputs[0].token_ids) for output in generate(llm, ["a", "b"], params)] == [3, 5]
    with pytest.raises(InvalidRequest, match="2 prompts and 1 sampling_params"):
        generate(llm, ["a", "b"], params[:1])


def test_default_sampling_params(llm: LLM) -> None:
    (output,) = llm.generate("a", use_tqdm=False)
    assert len(output.outputs[0].token_ids) == SamplingParams().max_tokens


def test_several_choices(llm: LLM) -> None:
    (output,) = generate(llm, "abc", SamplingParams(n=3, seed=1, max_tokens=4))
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert all(choice.finish_reason == "length" for choice in output.outputs)


def test_stop_string_ends_the_request_in_the_engine(llm: LLM) -> None:
    whole = texts(generate(llm, "hello", SamplingParams(temperature=0, max_tokens=200)))[0]
    stop = whole[50:53]
    end = whole.index(stop)
    before = llm.stats().generation_tokens
    (output,) = generate(llm, "hello", SamplingParams(temperature=0, max_tokens=200, stop=(stop,)))
    (choice,) = output.outputs
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (whole[:end], "stop", stop)
    assert len(choice.token_ids) == end + 3
    assert llm.stats().generation_tokens - before < end + 3 + 5  # not the 200 that were allowed


def test_no_max_tokens_runs_to_the_models_limit(llm: LLM) -> None:
    (output,) = generate(llm, "a" * 250, SamplingParams(temperature=0, max_tokens=None))
    assert len(output.outputs[0].token_ids) == 6


def test_a_batch_longer_than_the_queue(folder: str) -> None:
    options = {"eos_every": "0"}
    with LLM(folder, device="null", device_options=options, max_num_seqs=2, num_blocks=40, max_model_len=64) as llm:
        llm.ready = msgspec.structs.replace(llm.ready, max_waiting=3)
        outputs = generate(llm, [f"p{index}" for index in range(40)], SamplingParams(temperature=0, max_tokens=4))
    assert [output.prompt for output in outputs] == [f"p{index}" for index in range(40)]
    assert all(len(output.outputs[0].token_ids) == 4 for output in outputs)


def test_end_of_sequence(folder: str) -> None:
    with LLM(folder, device="null", device_options={"eos_every": "3"}) as llm:
        params = SamplingParams(temperature=0, max_tokens=300)
        (output,) = generate(llm, "abc", params)
        (choice,) = output.outputs
        assert (choice.finish_reason, choice.stop_reason) == ("stop", None)
        assert choice.token_ids[-1] == EOS_TOKEN
        assert choice.text.encode() == bytes(choice.token_ids[:-1])
        (output,) = generate(llm, "abc", SamplingParams(temperature=0, max_tokens=300, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 300


def test_prefix_cache_is_reported(llm: LLM) -> None:
    prompt = "a prompt long enough to fill some blocks of sixteen tokens each, twice"
    first, second = (generate(llm, prompt)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= 48
    assert texts([first]) == texts([second])


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt == "<s>user: hi\nassistant: "
    two = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert texts(two) == texts([output]) * 2
    answer = [*messages, {"role": "assistant", "content": "I am"}]
    (going_on,) = llm.chat(answer, GREEDY, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)
    assert going_on.prompt == "<s>user: hi\nassistant: I am"
    (own,) = llm.chat(messages, GREEDY, use_tqdm=False, chat_template="{{ x }}", chat_template_kwargs={"x": "y"})
    assert own.prompt == "y"
    with pytest.raises(InvalidRequest, match="conversation 1"):
        llm.chat([messages, []], GREEDY, use_tqdm=False)


def test_nothing_runs_if_one_prompt_is_refused(llm: LLM) -> None:
    before = llm.stats().prompt_tokens
    with pytest.raises(InvalidRequest, match="prompt 1: the prompt has 300 tokens; this model takes 256"):
        generate(llm, ["fine", "a" * 300])
    with pytest.raises(InvalidRequest, match="prompt 0: stop_token_ids"):
        generate(llm, ["fine", "fine"], SamplingParams(stop_token_ids=(999,)))
    assert llm.stats().prompt_tokens == before


def test_a_failing_choice_harms_no_other(folder: str) -> None:
    with LLM(folder, device="null", device_options={"nan_token": str(ord("#"))}) as llm:
        good, bad, other = generate(llm, ["a", "#", "b"], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert bad.outputs[0].finish_reason == "error" and bad.outputs[0].error
    assert [output.outputs[0].finish_reason for output in (good, other)] == ["length", "length"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process started in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("after", [1, 2, 5])
def test_interrupt_leaves_it_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    step = llm._core.step
    calls = 0

    def interrupted() -> Any:
        nonlocal calls
        calls += 1
        if calls == after:
            signal.raise_signal(signal.SIGINT)
        return step()

    free = llm.stats().num_free_blocks
    with monkeypatch.context() as patch:
        patch.setattr(llm._core, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(llm, ["one", "two"], SamplingParams(temperature=0, max_tokens=200))
    assert after <= calls < after + 10
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, free)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(texts(generate(llm, "again"))[0]) == 20


def test_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY, use_tqdm=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "output tok/s" in shown
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_closed(folder: str) -> None:
    llm = LLM(folder, device="null")
    llm.close()
    llm.close()
    with pytest.raises(IsthmusError, match="closed"):
        generate(llm, "a")


def test_what_cannot_be_opened(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        LLM(str(tmp_path / "nowhere"), device="null")
    with pytest.raises(BackendNotFound):
        LLM(folder, device="nonesuch")
    with pytest.raises(IsthmusError, match="max_model_len"):
        LLM(folder, device="null", max_model_len=0)


IMPORTS = """
import sys
from isthmus.llm import LLM
from isthmus import SamplingParams
with LLM("no such model", device="null", skip_tokenizer_init=True) as llm:
    (output,) = llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4 and output.outputs[0].text == ""
unwanted = "torch tokenizers jinja2 tqdm zmq fastapi starlette uvicorn httpx transformers isthmus_server".split()
print([name for name in unwanted if name in sys.modules])
"""


def test_without_a_tokenizer_little_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
