"""Log-probabilities of a few tokens, compared with what whole distributions say."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_quest.tune.comparison import compare, kl_over_top
from vllm_quest.tune.instrument import Position

VOCABULARY = 40


def distribution(seed: int, near: np.ndarray | float = 0.0, scale: float = 3.0) -> np.ndarray:
    logits = near + scale * np.random.default_rng(seed).standard_normal(VOCABULARY)
    return logits - np.log(np.exp(logits).sum())


def position(logprobs: np.ndarray, token: int, top: int) -> Position:
    kept = {*np.argsort(-logprobs)[:top].tolist(), token}
    return Position(float(logprobs[token]), {id_: float(logprobs[id_]) for id_ in kept})


@pytest.mark.parametrize("seed", range(5))
def test_kl_is_exact_with_all_tokens_and_never_more_with_few(seed) -> None:
    p, q = distribution(seed), distribution(seed + 100)
    whole = float((np.exp(p) * (p - q)).sum())
    assert kl_over_top(position(p, 3, VOCABULARY), position(q, 3, VOCABULARY)) == pytest.approx(whole)
    for top in (1, 5, 20):
        part = kl_over_top(position(p, 3, top), position(q, 3, top))
        assert 0 <= part <= whole + 1e-9
    assert kl_over_top(position(p, 3, 5), position(p, 3, 5)) == pytest.approx(0, abs=1e-9)


def test_few_tokens_tell_most_of_a_small_kl() -> None:
    shares = []
    for seed in range(20):
        p = distribution(seed)
        q = distribution(seed + 100, near=p, scale=0.3)
        shares.append(
            kl_over_top(position(p, 3, 20), position(q, 3, 20)) / float((np.exp(p) * (p - q)).sum())
        )
    assert 0.9 < np.mean(shares) <= 1


def test_an_answer_is_exact_if_every_token_is_the_likeliest() -> None:
    logprobs = distribution(0)
    best, second = np.argsort(-logprobs)[:2].tolist()
    right = [position(logprobs, best, 5), position(logprobs, best, 5)]
    wrong = [position(logprobs, best, 5), position(logprobs, second, 5)]
    assert compare(right, right).exact
    result = compare(right, wrong)
    assert not result.exact
    assert result.agreement == 1, "the argmax is the same; the answer's token is another"
    assert result.nll == pytest.approx(-(logprobs[best] + logprobs[second]) / 2)


def test_agreement_is_of_the_argmax() -> None:
    one, other = distribution(0), distribution(1)
    assert one.argmax() != other.argmax()
    assert compare([position(one, 0, 5)] * 2, [position(one, 0, 5), position(other, 0, 5)]).agreement == 0.5
