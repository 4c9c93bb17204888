"""Train a head on a target's answers.

At position p the head is given what the target's layers held at p - 1 and the token at p, and is
to foresee the target's distribution of the token at p + 1. When it drafts on from its own drafts it
has only its own state instead: so the same is asked again, with the states of the round before
moved on by one position, for as many rounds as a chain is to be long ("training-time test" of
EAGLE-3, Li et al. 2025; Zhang et al. 2024, "HASS"). In round r a position sees the keys of round 0
up to p - r, and of each later round j the one at p - r + j: what the cache holds when it drafts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference.feature_head import FeatureHead, HeadConfig
from smartspec.lab.distill.answers import Answer

Loss: TypeAlias = Literal["kl", "reverse-kl", "tv"]
MAX_PROMPT_TOKENS = 128  #: the last of a prompt, that training shows the head
ROUND_WEIGHT = 0.9  #: of each round over the one before
PROMPT_WEIGHT = 0.3  #: of a token in a prompt over one in an answer, when the frequent are chosen


class Batch(NamedTuple):
    """Answers side by side; prompts end, and answers begin, at the same place P."""

    tokens: Tensor  #: [B, P + A], what is read at each position; 0 where there is nothing
    features: Tensor  #: [B, P + A, layers * hidden], the target's one position before
    num_prompt: int  #: P
    present: Tensor  #: [B, P + A] bool
    final: Tensor  #: [B, A, hidden], the target's own, from which its distribution follows
    log_mass: Tensor  #: [B, A], log of the sum of exp of all its logits; infinite: no token
    said: Tensor  #: [B, A], the token that the answer goes on with; -1: none

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.tokens.to(device),
            self.features.to(device),
            self.num_prompt,
            self.present.to(device),
            self.final.to(device),
            self.log_mass.to(device),
            self.said.to(device),
        )


def batch_of(answers: Sequence[Answer], hidden_size: int) -> Batch:
    """Answers of three tokens at least: the first is the target's own, the last only foreseen."""
    shown = [min(a.num_prompt, MAX_PROMPT_TOKENS) for a in answers]
    lengths = [len(a.tokens) - 1 - a.num_prompt for a in answers]
    P, A = max(shown), max(lengths)
    width = answers[0].features.shape[1]
    tokens = torch.zeros(len(answers), P + A, dtype=torch.long)
    features = torch.zeros(len(answers), P + A, width, dtype=torch.float16)
    present = torch.zeros(len(answers), P + A, dtype=torch.bool)
    final = torch.zeros(len(answers), A, hidden_size)
    log_mass = torch.full((len(answers), A), torch.inf)
    said = torch.full((len(answers), A), -1)
    for i, (answer, before, length) in enumerate(zip(answers, shown, lengths, strict=True)):
        begin = answer.num_prompt - before
        end = answer.num_prompt + length
        here = slice(P - before, P + length)
        tokens[i, here] = answer.tokens[begin:end]
        if begin:
            features[i, here] = answer.features[begin - 1 : end - 1]
        else:
            features[i, P - before + 1 : P + length] = answer.features[: end - 1]
        present[i, here] = True
        final[i, :length] = answer.features[answer.num_prompt : end, -hidden_size:].float()
        log_mass[i, :length] = answer.log_mass[1:]
        said[i, :length] = answer.tokens[answer.num_prompt + 1 :]
    return Batch(tokens, features, P, present, final, log_mass, said)


def rounds(head: FeatureHead, batch: Batch, num_rounds: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each round: states [B, A, hidden] after the answer's tokens, and which of them count."""
    P = batch.num_prompt
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None]
    causal = positions[0][:, None] >= positions[0]
    sees = (causal & batch.present[:, None]) | (positions[0][:, None] == positions[0])
    kept: list[tuple[Tensor, Tensor]] = []

    def attend_first(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kept.append((key, value))
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=sees[:, None], enable_gqa=True
        )

    states = head.advance(head.state(batch.features), batch.tokens, positions, attend_first)
    states = states[:, P:]
    counts = batch.log_mass.isfinite()
    yield states, counts
    for number in range(1, num_rounds):

        def attend_later(query: Tensor, key: Tensor, value: Tensor, number: int = number) -> Tensor:
            kept.append((key, value))
            folded = query.shape[1] // key.shape[1]
            scale = query.shape[-1] ** -0.5
            first_key, first_value = (k.repeat_interleave(folded, 1) for k in kept[0])
            scores = (query @ first_key.transpose(2, 3)) * scale
            # Up to p - number, and so one position less in each round.
            late = torch.tril(sees[:, P:], P - number)[:, None]
            scores = scores.masked_fill(~late, -torch.inf)
            own, values = [], []
            for j, (later_key, later_value) in enumerate(kept[1:], 1):
                near_key = _moved(later_key.repeat_interleave(folded, 1), number - j)
                own.append((query * near_key).sum(-1, keepdim=True) * scale)
                values.append(_moved(later_value.repeat_interleave(folded, 1), number - j))
            chances = torch.cat((scores, *own), -1).softmax(-1)
            seen = chances[..., : scores.shape[-1]] @ first_value
            for j, near_value in enumerate(values):
                at = scores.shape[-1] + j
                seen = seen + chances[..., at : at + 1] * near_value
            return seen

        states = head.advance(
            functional.pad(states, (0, 0, 1, 0))[:, :-1],
            batch.tokens[:, P:],
            positions[:, P:],
            attend_later,
        )
        counts = functional.pad(counts[:, :-1], (1, 0)) & counts
        yield states, counts


def _moved(values: Tensor, by: int) -> Tensor:
    """[B, heads, A, d], position a taking what was at a - ``by``."""
    return functional.pad(values, (0, 0, by, 0))[:, :, : values.shape[2]] if by else values


def loss_of(kind: Loss, target_log: Tensor, logits: Tensor) -> Tensor:
    """[N], of the target's log-probabilities of the draft's tokens and the draft's logits.

    With p the target's distribution over the draft's tokens and q the draft's: kl is
    sum p log(p / q), reverse-kl sum q log(q / p), tv sum |p - q| / 2; times the probability that
    the target says one of these tokens at all, since nothing can be drafted where it does not.
    """
    mass = target_log.logsumexp(-1, keepdim=True)
    log_p, log_q = target_log - mass, logits.log_softmax(-1)
    if kind == "kl":
        distance = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif kind == "reverse-kl":
        distance = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        distance = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    return distance * mass[..., 0].exp()


class Score(NamedTuple):
    """How well a head foresees answers."""

    right: list[float]  #: by depth: share of drafts, all before them right, that are right too
    accepted: float  #: drafts accepted per step, with chains of as many as there are depths


def score(head: FeatureHead, batches: Sequence[Batch], depth: int) -> Score:
    """Of greedy answers: what decoding with chains of ``depth`` would have accepted, exactly."""
    tried, right = [0] * depth, [0] * depth
    accepted = steps = 0
    for batch in batches:
        lengths = (batch.said >= 0).sum(-1).tolist()
        for run, length in zip(runs(head, batch, depth).tolist(), lengths, strict=True):
            place = 0
            while place < length:
                accepted += run[place]
                steps += 1
                place += run[place] + 1
            for begin, size in enumerate(run[:length]):
                for at in range(min(size + 1, depth, length - begin)):
                    tried[at] += 1
                    right[at] += at < size
    shares = [a / max(b, 1) for a, b in zip(right, tried, strict=True)]
    return Score(shares, accepted / max(steps, 1))


@torch.inference_mode()
def runs(head: FeatureHead, batch: Batch, depth: int) -> Tensor:
    """How many drafts of a chain that begins at each place would be right, [B, A]."""
    batch = batch.to(head.device)
    found = torch.zeros_like(batch.said)
    alive = torch.ones_like(batch.said, dtype=torch.bool)
    for number, (states, counts) in enumerate(rounds(head, batch, depth)):
        drafts = head.token_ids[head.logits(states).argmax(-1)]
        agrees = (drafts == batch.said) & counts
        # Place a of this round is the draft of a chain that began ``number`` places before.
        ahead = torch.zeros_like(alive)
        ahead[:, : ahead.shape[1] - number] = agrees[:, number:]
        alive &= ahead
        found += alive
    return found


def target_log(head: FeatureHead, batch: Batch) -> Tensor:
    """The target's log-probabilities of the draft's tokens, [B, A, num_draft_tokens]."""
    logits = functional.linear(batch.final.to(head.unembedding.dtype), head.unembedding).float()
    return logits - batch.log_mass[..., None]


class Progress(NamedTuple):
    """After some steps of training."""

    step: int
    num_steps: int
    loss: float  #: mean of what was trained since the last, per round and token


def train(
    head: FeatureHead,
    answers: Sequence[Answer],
    *,
    loss: Loss = "kl",
    num_rounds: int = 5,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    batch_tokens: int = 1024,
    seed: int = 0,
    every: int = 20,
) -> Iterator[Progress]:
    """Train in place; tells how it goes every so many steps, and at the end.

    AdamW, with a learning rate that rises over a twentieth of the steps and falls by a cosine.

    Parameters
    ----------
    num_rounds : as long a chain as is to be drafted well
    batch_tokens : answer tokens of one step, about
    """
    size = head.config.hidden_size
    rng = random.Random(seed)
    plan = [batch for _ in range(epochs) for batch in _batches(answers, batch_tokens, rng)]
    optimizer = torch.optim.AdamW(head.parameters(), learning_rate, (0.9, 0.95), weight_decay=0.01)
    warm_up = max(1, len(plan) // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / len(plan))) + 0.02
        ),
    )
    weights = [ROUND_WEIGHT**number for number in range(num_rounds)]
    since: list[float] = []
    for step, chosen in enumerate(plan, 1):
        batch = batch_of([answers[i] for i in chosen], size).to(head.device)
        found: list[Tensor] = []
        with torch.autocast(head.device.type, torch.bfloat16):
            aim = target_log(head, batch)
            for weight, (states, counts) in zip(
                weights, rounds(head, batch, num_rounds), strict=True
            ):
                if counts.any():
                    logits = head.logits(states[counts]).float()
                    found.append(weight * loss_of(loss, aim[counts], logits).mean())
        total = torch.stack(found).sum() / sum(weights)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        rate.step()
        since.append(total.item())
        if step % every == 0 or step == len(plan):
            yield Progress(step, len(plan), sum(since) / len(since))
            since = []


def _batches(answers: Sequence[Answer], batch_tokens: int, rng: random.Random) -> list[list[int]]:
    """All answers in random order, those of like lengths together, by their places."""

    def shape(i: int) -> tuple[int, int]:
        before = min(answers[i].num_prompt, MAX_PROMPT_TOKENS)
        return before // 16, len(answers[i].tokens) - answers[i].num_prompt

    order = list(range(len(answers)))
    rng.shuffle(order)
    found: list[list[int]] = []
    for begin in range(0, len(order), 256):
        pool = sorted(order[begin : begin + 256], key=shape)
        batch: list[int] = []
        tokens = 0
        for i in pool:
            batch.append(i)
            tokens += len(answers[i].tokens) - answers[i].num_prompt
            if tokens >= batch_tokens:
                found.append(batch)
                batch, tokens = [], 0
        if batch:
            found.append(batch)
    rng.shuffle(found)
    return found


def frequent_tokens(
    answers: Iterable[Answer], prompts: Iterable[list[int]], count: int, vocabulary: int
) -> Tensor:
    """The ``count`` tokens that are most frequent, in rising order of their ids.

    In answers and, at a third of the weight, in prompts: they know more of the rare ones.
    """
    counts = torch.zeros(vocabulary)
    for answer in answers:
        counts += torch.bincount(answer.tokens[answer.num_prompt :], minlength=vocabulary)
    for prompt in prompts:
        counts += PROMPT_WEIGHT * torch.bincount(torch.tensor(prompt), minlength=vocabulary)
    return counts.topk(min(count, vocabulary)).indices.sort().values


def new_head(
    target: PreTrainedModel,
    answers: Sequence[Answer],
    layers: tuple[int, ...],
    intermediate_size: int,
    token_ids: Tensor,
    seed: int = 0,
    warm: bool = True,
) -> FeatureHead:
    """An untrained head, which begins as the target's last layer where they are of one shape.

    What the layer adds to its input is scaled down as the input is: states are of unit size here.
    """
    config = target.config.get_text_config()
    heads = config.num_attention_heads
    shape = HeadConfig(
        target=feature_head.fingerprint(target),
        layers=layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_key_heads=getattr(config, "num_key_value_heads", None) or heads,
        intermediate_size=intermediate_size,
        rope_theta=(getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0),
    )
    torch.manual_seed(seed)
    head = FeatureHead(shape, token_ids, target)
    size = shape.hidden_size
    last = torch.cat([answer.features[-64:, -size:].float() for answer in answers[:256]])
    with torch.no_grad():
        for module in head.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.02 if module.in_features == size else 0.01)
        head.fuse.weight[:, -size:] += torch.eye(size)
        head.join.weight[:, size:] += torch.eye(size)
        head.norm_output.copy_(last.pow(2).mean(0).sqrt())
        if warm:
            _begin_as(head, target, answers[0].tokens)
    return head.to(target.device)


def _begin_as(head: FeatureHead, target: Any, text: Tensor) -> None:
    """Take over the target's last layer, if it has Llama's parts and the head's shape."""
    try:
        layer = target.get_decoder().layers[-1]
        attention, mlp = layer.self_attn, layer.mlp
        pairs = [
            (head.query.weight, attention.q_proj.weight),
            (head.key.weight, attention.k_proj.weight),
            (head.value.weight, attention.v_proj.weight),
            (head.output.weight, attention.o_proj.weight),
            (head.gate.weight, mlp.gate_proj.weight),
            (head.up.weight, mlp.up_proj.weight),
            (head.down.weight, mlp.down_proj.weight),
            (head.norm_attention, layer.input_layernorm.weight),
            (head.norm_mlp, layer.post_attention_layernorm.weight),
        ]
    except AttributeError:
        return
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        return
    for ours, theirs in pairs:
        ours.copy_(theirs)
    text = text[None].to(target.device)
    states = target(input_ids=text, output_hidden_states=True).hidden_states[-2][0]
    size = float(states.pow(2).mean(-1).sqrt().median())
    head.output.weight /= size
    head.down.weight /= size
