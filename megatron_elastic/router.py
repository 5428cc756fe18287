"""The router: budget -> a soft selection while it learns, a hard one when it is decided.

One small net per axis sees only the budget, never a token, so after training it is a table (Nemotron Elastic, eqs
6-11). It is replicated on every rank, in fp32, outside Megatron's gradient buckets: what crosses ranks is the gradient
of its *probabilities*, so every rank takes the same step and the nets stay bitwise equal without being reduced.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_elastic.axes import AXES
from megatron_elastic.budget import Selection
from megatron_elastic.decision import decide
from megatron_elastic.errors import ElasticError
from megatron_elastic.family import Family


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Hyperparameters of the router (Nemotron Elastic, section 'Experimental Setup').

    Attributes:
        iterations: optimizer steps until the choices are decided and the router is frozen.
        width: hidden width of each net.
        std: standard deviation of its initial weights.
        temperature: Gumbel-softmax temperature, first and last, annealed exponentially.
        scale: factor on the logits, first and last, linear.
        learning_rate: AdamW's, after the warm-up.
        warmup: iterations of linear warm-up.
        clip: gradient norm above which the router's gradient is scaled down.
        penalty: weight of the budget penalty (lambda).
        dead_zone: relative deviation from the target that costs nothing.
        tolerance: relative deviation from the target that a decided selection may have.
        hard_share: share of the steps, in [0, 1], on which a budget runs under its most probable hard mask instead of
            the soft mix; the gradient is that of the soft probabilities (straight-through).
        seed: of the initial weights and of the noise.
        check_interval: optimizer steps between two comparisons of the router over all ranks; 0 never compares.
    """

    iterations: int
    width: int = 256
    std: float = 0.1
    temperature: tuple[float, float] = (1.0, 0.05)
    scale: tuple[float, float] = (1.0, 10.0)
    learning_rate: float = 1e-2
    warmup: int = 60
    clip: float = 1.0
    penalty: float = 1.0
    dead_zone: float = 0.0
    tolerance: float = 0.02
    hard_share: float = 0.0
    seed: int = 1234
    check_interval: int = 100

    def progress(self, step: int) -> float:
        """Share of the router's schedule that has passed before `step`, in [0, 1]."""
        return min(1.0, step / max(1, self.iterations - 1))

    def temperature_at(self, step: int) -> float:
        """Temperature of the Gumbel-softmax at an optimizer step."""
        first, last = self.temperature
        return float(first * (last / first) ** self.progress(step))

    def scale_at(self, step: int) -> float:
        """Factor on the logits at an optimizer step."""
        first, last = self.scale
        return first + (last - first) * self.progress(step)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate at an optimizer step."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))


def _generator(*coordinates: int) -> torch.Generator:
    """Random numbers as a pure function of coordinates: the same on every rank and after every resume."""
    digest = hashlib.blake2b(struct.pack(f"<{len(coordinates)}q", *coordinates), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def gumbel_noise(size: int, *, seed: int, step: int, budget: int, axis: str, draw: int = 0, layer: int = 0) -> Tensor:
    """Gumbel(0, 1) noise as a pure function of its coordinates: the same on every rank, independent between axes.

    Args:
        size: number of choices.
        seed: of the run.
        step: optimizer step.
        budget: index of the budget.
        axis: name of the axis.
        draw: 0, or the global base-sample index where every sample draws its own.
        layer: which layer of those that have the axis, where it is heterogeneous.

    Returns:
        `[size]` fp32 on the CPU.
    """
    generator = _generator(seed, step, draw, budget, AXES.index(axis), layer)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
    return -torch.log(-torch.log(uniform)).float()


class Router(torch.nn.Module):
    """Budget -> probabilities of the choices of every axis, `[uses, choices]`: one use, or one a layer."""

    def __init__(self, config: RouterConfig, family: Family) -> None:
        super().__init__()
        self.config, self.family, self.budgets = config, family, family.budgets
        self.choices = {axis: family.choices[axis] for axis in family.axes}
        self.nets = torch.nn.ModuleDict()
        generator = torch.Generator().manual_seed(config.seed)
        for axis, choices in self.choices.items():
            if len(choices) == 1:
                continue  # nothing to choose
            net = torch.nn.Sequential(
                torch.nn.Linear(len(self.budgets), config.width, device="meta", dtype=torch.float32),
                torch.nn.LeakyReLU(0.1),
                torch.nn.Linear(config.width, family.uses(axis) * len(choices), device="meta", dtype=torch.float32),
            )
            # Made without storage first: the layers' own initial weights would come from the global generator.
            net.to_empty(device="cpu")
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.zero_()
                    if parameter.dim() == 2:
                        parameter.normal_(0.0, config.std, generator=generator)
            self.nets[axis] = net
        # A router of a family without any choice has no parameter to ask for its device and dtype.
        self.register_buffer("anchor", torch.zeros(()), persistent=False)
        self.anchor: Tensor

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.anchor.device

    def pinned(self, budget: int) -> bool:
        """Whether a budget is the full one, which always selects everything."""
        return self.budgets[budget].fraction >= 1.0

    def logits(self, mix: Mapping[int, float], axis: str, step: int) -> Tensor:
        """Scaled logits of the choices, `[uses, choices]`.

        Args:
            mix: weight of each budget in the input: one of them, or two where a size between them is asked for.
            axis: with more than one choice.
            step: optimizer step.
        """
        vector = self.anchor.new_zeros(len(self.budgets))
        for budget, weight in mix.items():
            vector[budget] = weight
        found: Tensor = self.nets[axis](vector).view(self.family.uses(axis), -1) * self.config.scale_at(step)
        if not all(self.budgets[budget].heterogeneous for budget in mix):
            # A homogeneous budget of a heterogeneous family: all layers decide together.
            found = found.mean(0, keepdim=True).expand_as(found)
        return found

    def _soft(self, mix: Mapping[int, float], axis: str, step: int, noise: int | None) -> Tensor:
        uses = self.family.uses(axis)
        if len(self.choices[axis]) == 1:
            return self.anchor.new_ones(uses, 1)
        logits = self.logits(mix, axis, step)
        if noise is not None:
            apart = self.budgets[noise].heterogeneous
            rows = [
                gumbel_noise(
                    logits.size(1), seed=self.config.seed, step=step, budget=noise, axis=axis, layer=use * apart
                )
                for use in range(uses)
            ]
            logits = logits + torch.stack(rows).to(logits.device)
        return torch.softmax(logits / self.config.temperature_at(step), dim=-1)

    def probabilities(self, budget: int, axis: str, step: int, *, noise: bool = True) -> Tensor:
        """Gumbel-softmax probabilities, `[uses, choices]` (eq 11); certain of the full size where it is pinned."""
        if self.pinned(budget):
            full = self.anchor.new_zeros(self.family.uses(axis), len(self.choices[axis]))
            full[:, 0] = 1.0
            return full
        return self._soft({budget: 1.0}, axis, step, budget if noise else None)

    def is_hard(self, budget: int, step: int) -> bool:
        """Whether a budget runs under a hard mask on a step: a draw that every rank makes alike."""
        share = self.config.hard_share
        # One more coordinate than the noise has: another stream.
        return share > 0.0 and bool(torch.rand((), generator=_generator(self.config.seed, step, budget)) < share)

    def expected_cost(self, budget: int, probabilities: Mapping[str, Tensor]) -> Tensor:
        """Cost in the budget's unit at the expected size of every axis, as a share of the budget's target (0-dim)."""
        family, target = self.family, self.budgets[budget]
        sizes: dict[str, list[Tensor] | Tensor] = {}
        for axis, choices in self.choices.items():
            expected = probabilities[axis].double() @ torch.tensor(choices, dtype=torch.float64, device=self.device)
            sizes[axis] = list(expected) if len(expected) > 1 else expected[0]
        gates: list[Tensor] | None = None
        if len(self.choices["depth"]) > 1:
            kept = [family.select({**family.full.sizes, "depth": depth}) for depth in self.choices["depth"]]
            table = torch.tensor([s.gates(len(family.shape.pattern)) for s in kept], dtype=torch.float64)
            gates = list(probabilities["depth"][0].double() @ table.to(self.device))
        cost: Tensor = family.cost(sizes, gates, target.unit)
        return cost / (target.fraction * family.full_cost(target.unit))

    def penalty(self, budget: int, probabilities: Mapping[str, Tensor]) -> Tensor:
        """Deviation from the target outside the dead zone, `|cost / target - 1|` (0-dim)."""
        deviation = (self.expected_cost(budget, probabilities) - 1.0).abs()
        return (deviation - self.config.dead_zone).clamp(min=0.0)

    def _scores(self, mix: Mapping[int, float], step: int) -> dict[str, list[list[float]]]:
        """Log-probability of every choice without noise: axis -> use -> choice."""
        return {
            axis: self._soft(mix, axis, step, None).log().clamp(min=-1e4).double().tolist() for axis in self.choices
        }

    @torch.no_grad()
    def decide(self, step: int) -> tuple[Selection, ...]:
        """The selection of every budget: the most probable one, without noise, that meets the target.

        Among the selections within `tolerance` of the target the most probable is taken, nested ones (no axis larger
        than in the next larger budget) before others. Deterministic, the same on every rank.
        """
        decided: list[Selection] = []
        for index, budget in enumerate(self.budgets):
            if self.pinned(index):
                decided.append(self.family.full)
                continue
            outer = decided[-1] if decided else self.family.full
            scores = self._scores({index: 1.0}, step)
            decided.append(decide(self.family, budget, scores, self.config.tolerance, outer))
        return tuple(decided)

    @torch.no_grad()
    def decide_between(self, fraction: float, step: int) -> Selection:
        """The selection of a size that was not trained: the router's input lies between those of its two neighbours.

        Args:
            fraction: share of the parent's cost, in the unit of the budgets around it.
            step: optimizer step.

        Raises:
            ElasticError: the fraction is not between two budgets, or these have different units.
        """
        sizes = [budget.fraction for budget in self.budgets]
        after = next((index for index, size in enumerate(sizes) if size <= fraction), 0)
        if not sizes[-1] <= fraction <= sizes[0] or len(sizes) < 2:
            raise ElasticError(f"fraction {fraction}: the budgets {sizes} reach from {sizes[-1]} to {sizes[0]}")
        after = max(1, after)
        larger, smaller = self.budgets[after - 1], self.budgets[after]
        if larger.unit != smaller.unit and larger.fraction < 1.0:
            raise ElasticError(
                f"fraction {fraction}: its neighbours {larger.name} ({larger.unit}) and {smaller.name} "
                f"({smaller.unit}) are measured in different units: ask for one of them"
            )
        weight = (fraction - smaller.fraction) / (larger.fraction - smaller.fraction)
        wanted = replace(smaller, name=f"{fraction:g}", fraction=fraction)
        scores = self._scores({after - 1: weight, after: 1.0 - weight}, step)
        return decide(self.family, wanted, scores, self.config.tolerance, self.family.full)


class RouterTrainer:
    """The router's own optimizer: leaves for the model, one reduction a step, one step per committed iteration."""

    def __init__(self, router: Router, weights: Sequence[float]) -> None:
        """Args:
        router: replicated, identical on every rank.
        weights: weight of each budget in the loss; they sum to 1.
        """
        self.router = router
        self.weights = tuple(weights)
        self.optimizer = torch.optim.AdamW(router.parameters(), lr=router.config.learning_rate, weight_decay=0.0)
        for parameter in router.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._leaves: dict[int, dict[str, Tensor]] = {}
        self._step = -1
        self._pending: Tensor | None = None

    def leaves(self, step: int, budget: int) -> dict[str, Tensor]:
        """Leaf copies of the probabilities, one set a step: every microbatch's backward ends at them.

        Args:
            step: optimizer step (the iteration about to be made).
            budget: index of the budget.

        Returns:
            axis -> `[uses, choices]` fp32; gradients accumulate on them until `reduce`.
        """
        if step != self._step:
            self._leaves, self._step, self._pending = {}, step, None
        if budget not in self._leaves:
            with torch.no_grad():
                made = {axis: self.router.probabilities(budget, axis, step) for axis in self.router.choices}
                if self.router.is_hard(budget, step):
                    made = {axis: F.one_hot(p.argmax(-1), p.size(-1)).to(p.dtype) for axis, p in made.items()}
            self._leaves[budget] = {axis: p.detach().requires_grad_() for axis, p in made.items()}
        return self._leaves[budget]

    def reduce(self, tokens: Tensor, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Sums the leaves' gradients over the world and keeps them for `commit`, overwriting on a rerun.

        Args:
            tokens: the global number of loss tokens, all budgets, as core's finalize leaves it.
            group: the world, or None for a single process.
        """
        width = max(len(c) for c in self.router.choices.values())
        blocks = []
        for budget in range(len(self.router.budgets)):
            for axis in self.router.choices:
                leaf = self._leaves.get(budget, {}).get(axis)
                block = self.router.anchor.new_zeros(self.router.family.uses(axis), width)
                if leaf is not None and leaf.grad is not None:
                    block[:, : leaf.size(1)] = leaf.grad
                    leaf.grad = None
                blocks.append(block)
        stacked = torch.cat(blocks)
        if group is not None and torch.distributed.get_world_size(group) > 1:
            torch.distributed.all_reduce(stacked, group=group)
        self._pending = stacked / tokens.to(stacked.device)

    def loss(self, step: int, gradients: Tensor) -> Tensor:
        """What the router minimises: the KD loss to first order plus the weighted budget penalty (0-dim).

        Args:
            step: optimizer step.
            gradients: of the KD loss in every probability, `[uses of all axes of all budgets, choices]`.
        """
        total = torch.zeros((), dtype=torch.float64, device=gradients.device)
        start = 0
        for budget, weight in enumerate(self.weights):
            made = {axis: self.router.probabilities(budget, axis, step) for axis in self.router.choices}
            for probabilities in made.values():
                uses, choices = probabilities.shape
                total = total + (probabilities * gradients[start : start + uses, :choices]).sum()
                start += uses
            total = total + weight * self.router.config.penalty * self.router.penalty(budget, made)
        return total

    def commit(self) -> bool:
        """Steps the router with the pending gradients, once; False where nothing is pending."""
        if self._pending is None:
            return False
        gradients, self._pending = self._pending, None
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():  # called from the backbone's optimizer step, which runs without
            self.loss(self._step, gradients).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.router.parameters(), self.router.config.clip)
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.router.config.learning_rate_at(self._step)
        self.optimizer.step()
        return True

    def fingerprint(self) -> int:
        """A number of 62 bits that tells one state of the router and its optimizer from another."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in self.tensors().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return int.from_bytes(digest.digest(), "little") >> 2

    def check_replicas(self, step: int, group: torch.distributed.ProcessGroup) -> None:
        """Compares the router over all ranks; a collective of the group.

        Args:
            step: optimizer step, for the message.
            group: the world.

        Raises:
            ElasticError: ranks disagree; raised on every rank.
        """
        ranks, mine = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        found = torch.zeros(ranks, dtype=torch.int64, device=self.router.device)
        found[mine] = self.fingerprint()
        torch.distributed.all_reduce(found, group=group)
        kinds = Counter(found.tolist())
        if len(kinds) == 1:
            return
        usual = kinds.most_common(1)[0][0]
        others = [rank for rank, value in enumerate(found.tolist()) if value != usual]
        raise ElasticError(
            f"step {step}: the router differs between ranks: {others} of {ranks} ranks hold another one than the rest. "
            "It must be the same everywhere: look for a faulty device or a rank that runs other software, and start "
            "again from the last checkpoint"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save: weights and AdamW's state, by name, as live tensors."""
        found = {}
        for name, parameter in self.router.named_parameters():
            found[name] = parameter.data
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{name}.{key}"] = value
        return found
