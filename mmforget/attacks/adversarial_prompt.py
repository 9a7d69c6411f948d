"""Adversarial prompts: real words in front of a prompt, found by gradients through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmforget.attacks.report import (
    AttackReport,
    Budget,
    JudgeFn,
    Key,
    Sampling,
    check_settings,
    concept_cases,
    judged,
    measured,
    unrelated_text,
)
from mmforget.attacks.soft_tokens import SoftTokens, Vocabulary, tokenizers, vocabulary, word_rows
from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError, RequestError
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import generator

WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class _Preset:
    templates: int
    pictures: int
    sampling_steps: int
    times: int
    iterations: int


_PRESETS = {"smoke": _Preset(2, 4, 12, 5, 12), "standard": _Preset(5, 4, 30, 50, 40)}


def adversarial_prompt_attack(
    model: DiffusionGenerator,
    original: DiffusionGenerator,
    concept: ConceptSpec,
    judge_fn: JudgeFn,
    *,
    seed: int = 0,
    budget: Budget = "smoke",
    tokens: int = 3,
    lr: float = 0.01,
    times: int | None = None,
    iterations: int | None = None,
    pictures: int | None = None,
    templates: Sequence[str] | None = None,
    unrelated: str | None = None,
    sampling_steps: int | None = None,
    guidance: float | None = None,
) -> AttackReport:
    r"""Search for words in front of a prompt that make the unlearned model draw the concept.

    For every prompt, `k` rows of weights over the vocabulary are fitted: each step draws one word
    per row, minimises :math:`\|\epsilon_\theta(x_t, t, c) - y\|^2` over the original model's
    pictures of that prompt with straight-through gradients clipped to [-1, 1], and projects the
    rows on the simplex. Times are taken in the order of sampling. After each time the most likely
    words are written out as text; if the tokenizers read it back as the same tokens it is drawn,
    from the noise of the original pictures, and judged. The search ends when all pictures are back.

    The vocabulary are the words that all text encoders of the model have as one token. Differs
    from the paper's code, which searches all tokens, also those that cannot be typed, and uses one
    picture per prompt.

    Args:
        model: the unlearned model; its weights are frozen and unchanged afterwards.
        original: the model before.
        concept: what was to be forgotten.
        judge_fn: is the concept to be seen?
        seed: of noise and draws.
        budget: ``smoke``: two prompts, 5 times of 12 iterations; ``standard``: five prompts, 50
            times of 40 iterations, as in the paper.
        tokens: words in front, k. The paper takes 3 for objects and styles, 5 for nudity.
        lr: of Adam, with weight decay 0.1.
        times: number of times, instead of the budget's.
        iterations: at each time, instead of the budget's.
        pictures: per prompt, instead of the budget's.
        templates: sentences with one ``{}``; None takes the first of the concept's.
        unrelated: what the floor is measured on, random words in front of it, in as many trials
            as the attack had; None takes a preserved concept, or the anchor.
        sampling_steps: per picture, instead of the budget's.
        guidance: scale for the pictures; None takes the model's own.

    Returns:
        `details["tried"]` holds per prompt the texts and how often they worked.

    Raises:
        ConfigurationError: a setting out of range.
        ModelError: the tokenizers have no word in common.

    Reference:
        Zhang, Jia, Chen, Chen, Zhang, Liu, Ding, Liu, "To Generate or Not? Safety-Driven Unlearned
        Diffusion Models Are Still Easy To Generate Unsafe Images ... For Now", 2023,
        arXiv:2310.11868.
    """
    check_settings(budget, tokens=tokens)
    preset = _PRESETS[budget]
    times = preset.times if times is None else times
    iterations = preset.iterations if iterations is None else iterations
    pictures = preset.pictures if pictures is None else pictures
    sampling_steps = preset.sampling_steps if sampling_steps is None else sampling_steps
    check_settings(
        budget,
        times=times,
        iterations=iterations,
        pictures=pictures,
        sampling_steps=sampling_steps,
    )
    if not lr > 0:
        raise ConfigurationError(f"`lr` is {lr}, it must be above 0")
    sampling = Sampling(seed, sampling_steps, guidance)
    sentences = list(templates or concept.sentences[: preset.templates])
    prompts = [text.format(concept.target) for text in sentences]
    notes: list[str] = []
    other = unrelated_text(concept, unrelated)
    with measured(model, original) as cost:
        cases = concept_cases(model, original, prompts, judge_fn, pictures, sampling)
        words = vocabulary(model)
        after = torch.zeros_like(cases.before)
        best: list[str | None] = []
        tried: dict[str, dict[str, float]] = {}
        searched = False
        for prompt in cases.prompts:
            tried[prompt] = {}
            best.append(None)
            rows = cases.counted(prompt)
            if not rows:
                continue
            try:
                search = _Search(model, words, prompt, tokens, lr, cases.images[rows], seed)
            except RequestError as error:
                notes.append(f"left out: {error}")
                continue
            searched = True
            keys = [cases.keys[row] for row in rows]
            for time in search.times(times):
                for _ in range(iterations):
                    search.step(time)
                text = search.text()
                if text is None or text in tried[prompt]:
                    continue
                seen = _shows(model, text, keys, judge_fn, sampling)
                tried[prompt][text] = float(seen.float().mean())
                after[torch.tensor(rows)[seen]] = True
                if after[rows].all():
                    break
            if any(tried[prompt].values()):
                best[-1] = max(tried[prompt], key=tried[prompt].__getitem__)
            if search.unwritable:
                notes.append(
                    f"'{prompt}': {search.unwritable} of {times} results cannot be typed as text"
                )
        trials = max((len(texts) for texts in tried.values()), default=0)
        floor = None
        if trials:
            floor = _floor(model, words, other, tokens, trials, pictures, judge_fn, sampling)
    return cases.report(
        "adversarial_prompt",
        concept,
        after if searched else None,
        best,
        cost,
        budget,
        {
            "seed": seed,
            "tokens": tokens,
            "lr": lr,
            "times": times,
            "iterations": iterations,
            "pictures": pictures,
            "vocabulary": len(words),
            "sampling_steps": sampling.steps,
            "guidance": model.guidance if guidance is None else guidance,
            "unrelated": other,
        },
        floor=floor,
        details={"tried": tried, "trials": trials},
        notes=notes,
    )


def to_simplex(rows: Tensor) -> Tensor:
    """Nearest point of the probability simplex, row by row; exact, by sorting.

    Args:
        rows: (k, M).

    Returns:
        (k, M), non-negative, each row with sum 1.
    """
    falling = rows.sort(dim=1, descending=True).values
    excess = falling.cumsum(1) - 1
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    last = (falling * count > excess).sum(1, keepdim=True)
    return (rows - excess.gather(1, last - 1) / last).clamp_min(0)


class _Search:
    """Weights over the vocabulary for the words in front of one prompt."""

    def __init__(
        self,
        model: DiffusionGenerator,
        words: Vocabulary,
        prompt: str,
        tokens: int,
        lr: float,
        images: Tensor,
        seed: int,
    ) -> None:
        self.model, self.words, self.prompt, self.seed = model, words, prompt, seed
        self.soft = SoftTokens(model, tokens, avoid=[prompt], words=words)
        self.placed = f"{self.soft.text} {prompt}"
        model.check_length([self.placed])
        if not self.soft.readable(self.placed):
            raise RequestError(
                f"the words in front of '{prompt}' merge with it; choose another template"
            )
        self.rows = word_rows(model, words)
        parameter = next(model.network.parameters())
        self.latents = model.to_latents(images.to(parameter.device)).to(parameter.dtype)
        self.weights = torch.full((tokens, len(words)), 1 / len(words)).to(parameter.device)
        self.weights.requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.weights], lr=lr, weight_decay=WEIGHT_DECAY)
        self.steps = self.unwritable = 0

    def times(self, count: int) -> Tensor:
        """Times of a sampling run of so many steps, from noise to picture."""
        return self.model.schedule(count, self.latents)[1]

    def step(self, time: Tensor) -> None:
        """One step of Adam on words drawn from the weights, and the projection."""
        self.steps += 1
        draw = generator(self.seed, "adversarial", self.prompt, self.steps)
        chances = self.weights.detach().cpu()
        chosen = torch.multinomial(chances, 1, generator=draw)
        hard = torch.zeros_like(chances).scatter_(1, chosen, 1.0).to(self.weights.device)
        hard.requires_grad_(True)
        noise = torch.randn(self.latents.shape, generator=draw).to(self.latents)
        times = time.expand(len(self.latents)).to(self.latents.device)
        with self.soft.injected({key: hard @ rows for key, rows in self.rows.items()}):
            embedding = self.model.encode([self.placed])
        every = torch.zeros(len(self.latents), dtype=torch.long, device=self.latents.device)
        found = self.model.predict(
            self.model.noised(self.latents, noise, times), times, embedding[every]
        )
        loss = (found - self.model.target(self.latents, noise, times)).float().square().mean()
        # The gradient of the drawn words passes straight to their weights.
        self.weights.grad = torch.autograd.grad(loss, hard)[0].clamp(-1, 1)
        self.optimizer.step()
        with torch.no_grad():
            self.weights.copy_(to_simplex(self.weights))

    def text(self) -> str | None:
        """The most likely words before the prompt; None if they cannot be typed."""
        chosen = self.weights.argmax(1).cpu()
        text = " ".join([*(self.words.words[row] for row in chosen), self.prompt])
        if reads_as(self.model, self.words, chosen, text, self.prompt):
            return text
        self.unwritable += 1
        return None


def reads_as(
    model: DiffusionGenerator, words: Vocabulary, chosen: Tensor, text: str, prompt: str
) -> bool:
    """Whether every tokenizer reads a text as the chosen words and then the prompt."""
    for key, tokenizer in tokenizers(model).items():
        plain, whole = (
            tokenizer(part, add_special_tokens=False, verbose=False).input_ids
            for part in (prompt, text)
        )
        if whole != [*words.ids[key][chosen].tolist(), *plain]:
            return False
    return True


@torch.no_grad()
def _shows(
    model: DiffusionGenerator, text: str, keys: Sequence[Key], judge_fn: JudgeFn, sampling: Sampling
) -> Tensor:
    return judged(judge_fn, sampling.pictures(model, keys, model.encode([text])))


@torch.no_grad()
def _floor(
    model: DiffusionGenerator,
    words: Vocabulary,
    other: str,
    tokens: int,
    trials: int,
    pictures: int,
    judge_fn: JudgeFn,
    sampling: Sampling,
) -> float:
    """Share of pictures of something else that show the concept in at least one trial."""
    keys = [(other, number) for number in range(pictures)]
    seen = torch.zeros(pictures, dtype=torch.bool)
    for trial in range(trials):
        draw = generator(sampling.seed, "adversarial-floor", trial)
        rows = torch.randint(len(words), (tokens,), generator=draw)
        text = " ".join([*(words.words[row] for row in rows), other]).strip()
        seen |= _shows(model, text, keys, judge_fn, sampling)
    return float(seen.float().mean())
