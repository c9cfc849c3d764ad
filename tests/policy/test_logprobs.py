"""The fused output layer against a float64 log-softmax over the whole vocabulary, on one rank and on two real ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rl.policy.logprobs import fused_log_probs

# float32 sums over 8 products and 37 exponentials; the reference is float64.
FLOAT32 = (2e-5, 2e-6)  # relative, absolute
# Gradients are rounded to bfloat16 once, at the end.
BFLOAT16_GRADIENT = (2**-8, 2e-5)


@dataclass
class Problem:
    """Inputs over the whole vocabulary, and weights of both outputs in a scalar to differentiate."""

    hidden: Tensor  # [tokens, hidden]
    weight: Tensor  # [vocab, hidden]
    labels: Tensor  # [tokens]
    log_prob_weights: Tensor  # [tokens]
    entropy_weights: Tensor  # [tokens]


def problem(tokens: int = 13, vocab: int = 37, width: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[:4] = torch.tensor([0, vocab // 2 - 1, vocab // 2, vocab - 1])  # the first and last of two shards
    log_prob_weights, entropy_weights = torch.randn(2, tokens, generator=generator)
    return Problem(hidden, weight, labels, log_prob_weights, entropy_weights)


@dataclass
class Outcome:
    log_probs: Tensor
    entropy: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor


def gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def reference(given: Problem, temperature: float = 1.0, counted: Tensor | None = None) -> Outcome:
    """Everything at once in float64; positions not `counted` are left out."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (given.hidden, given.weight))
    counted = torch.ones_like(given.labels, dtype=torch.bool) if counted is None else counted
    log_softmax = torch.log_softmax(hidden[counted] @ weight.t() / temperature, -1)
    log_probs = hidden.new_zeros(len(hidden)).index_put(
        (counted,), log_softmax.gather(1, given.labels[counted, None]).squeeze(1)
    )
    entropy = hidden.new_zeros(len(hidden)).index_put((counted,), -(log_softmax.exp() * log_softmax).sum(1))
    (log_probs @ given.log_prob_weights.double() + entropy @ given.entropy_weights.double()).backward()
    return Outcome(log_probs.detach(), entropy.detach(), gradient(hidden), gradient(weight))


def options(given: Problem, **changes: Any) -> dict[str, Any]:
    whole = {"temperature": 1.0, "chunk": 5, "vocab_start": 0, "vocab_valid": len(given.weight), "group": None}
    return {**whole, "with_entropy": True, **changes}


def fused(given: Problem, **changes: Any) -> Outcome:
    hidden, weight = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    log_probs, entropy = fused_log_probs(hidden, weight, given.labels, **options(given, **changes))
    assert entropy is not None
    (log_probs @ given.log_prob_weights + entropy @ given.entropy_weights).backward()
    return Outcome(log_probs.detach(), entropy.detach(), gradient(hidden), gradient(weight))


def padded(given: Problem, rows: int) -> Problem:
    """With rows of NaN after the vocabulary, as padding that must never count."""
    nan = torch.full((rows, given.weight.shape[1]), torch.nan, dtype=given.weight.dtype)
    return Problem(given.hidden, torch.cat([given.weight, nan]), given.labels, given.log_prob_weights, given.entropy_weights)


def assert_close(found: Tensor, expected: Tensor, tolerance: tuple[float, float] = FLOAT32) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance[0], atol=tolerance[1])


def assert_equal(found: Outcome, expected: Outcome) -> None:
    """Values to float32; gradients to the rounding of their own format."""
    assert_close(found.log_probs, expected.log_probs)
    assert_close(found.entropy, expected.entropy)
    tolerance = FLOAT32 if found.hidden_gradient.dtype == torch.float32 else BFLOAT16_GRADIENT
    assert_close(found.hidden_gradient, expected.hidden_gradient, tolerance)
    assert_close(found.weight_gradient, expected.weight_gradient, tolerance)


@pytest.mark.parametrize("chunk", [1, 5, 13, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_float64_log_softmax(dtype: torch.dtype, temperature: float, chunk: int) -> None:
    """bfloat16 inputs too, to float32 accuracy: their logits are never rounded to bfloat16."""
    given = problem(dtype=dtype)
    found = fused(given, temperature=temperature, chunk=chunk)
    assert found.log_probs.dtype == found.entropy.dtype == torch.float32
    assert found.hidden_gradient.dtype == found.weight_gradient.dtype == dtype
    assert_equal(found, reference(given, temperature))


def test_gradients_are_those_of_the_values() -> None:
    """Central differences in float64, of both outputs, with a chunk that does not divide and a position without label."""
    given = problem(tokens=5, vocab=7, width=3, dtype=torch.float64)
    given.labels[1] = -1

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        both = fused_log_probs(hidden, weight, given.labels, **options(given, temperature=0.7, chunk=2, vocab_valid=6))
        return tuple(output for output in both if output is not None)

    torch.autograd.gradcheck(outputs, (given.hidden.requires_grad_(), given.weight.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tiles_and_blocks_are_cut_where_they_do_not_divide(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rl.policy.logprobs.BLOCK_ELEMENTS", 80)  # 2 rows of 37 logits, tiles of 10 rows of 8
    given = problem(dtype=dtype)
    assert_equal(fused(given), reference(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_rows_of_the_vocabulary_never_count(dtype: torch.dtype) -> None:
    given = problem(dtype=dtype)
    found = fused(padded(given, 11), vocab_valid=37)
    assert found.weight_gradient[37:].eq(0).all()
    found.weight_gradient = found.weight_gradient[:37]
    assert_equal(found, reference(given))


def test_positions_without_a_label_are_zero_and_have_no_gradient() -> None:
    given = problem()
    given.labels[[2, 5, 6]] = torch.tensor([-1, 37, 1000])
    given.hidden[2] = torch.nan
    counted = (given.labels >= 0) & (given.labels < 37)
    found = fused(padded(given, 4), vocab_valid=37)
    assert found.log_probs[~counted].eq(0).all()
    assert found.entropy[~counted].eq(0).all()
    assert found.hidden_gradient[~counted].eq(0).all()
    found.weight_gradient = found.weight_gradient[:37]
    assert_equal(found, reference(given, counted=counted))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_only_needed_positions_are_computed(chunk: int) -> None:
    given = problem()
    needed = torch.arange(13) % 3 == 1
    given.hidden[~needed] = torch.nan
    found = fused(given, needed=needed, chunk=chunk)
    assert found.log_probs[~needed].eq(0).all()
    assert_equal(found, reference(given, counted=needed))


def test_no_needed_position_gives_zeros_and_zero_gradients() -> None:
    given = problem()
    found = fused(given, needed=torch.zeros(13, dtype=torch.bool))
    for tensor in (found.log_probs, found.entropy, found.hidden_gradient, found.weight_gradient):
        assert tensor.eq(0).all()


def test_no_position_influences_another() -> None:
    given, other = problem(), problem()
    other.labels[1::2] = (other.labels[1::2] + 5) % 37
    other.hidden[1::2] *= 3
    first, second = fused(given), fused(other)
    assert torch.equal(first.log_probs[::2], second.log_probs[::2])
    assert torch.equal(first.entropy[::2], second.entropy[::2])
    assert torch.equal(first.hidden_gradient[::2], second.hidden_gradient[::2])
    assert not torch.equal(first.log_probs, second.log_probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_bitwise_the_same_with_and_without_gradient_or_entropy(dtype: torch.dtype) -> None:
    """The ratio of an unchanged policy is exactly 1."""
    given = problem(tokens=50, vocab=301, width=64, dtype=dtype)
    trained = fused(given, chunk=16, vocab_valid=300)
    settings = options(given, chunk=16, vocab_valid=300)
    with torch.no_grad():
        log_probs, entropy = fused_log_probs(given.hidden, given.weight, given.labels, **settings)
        alone, nothing = fused_log_probs(given.hidden, given.weight, given.labels, **settings | {"with_entropy": False})
    assert entropy is not None
    assert nothing is None
    assert torch.equal(trained.log_probs, log_probs)
    assert torch.equal(trained.entropy, entropy)
    assert torch.equal(trained.log_probs, alone)


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_stay_unused(used: int) -> None:
    given = problem()
    hidden, weight = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    output = fused_log_probs(hidden, weight, given.labels, **options(given))[used]
    assert output is not None
    (output @ (given.log_prob_weights, given.entropy_weights)[used]).backward()
    (given.entropy_weights, given.log_prob_weights)[used].zero_()
    expected = reference(given)
    assert_close(gradient(hidden), expected.hidden_gradient)
    assert_close(gradient(weight), expected.weight_gradient)


def test_extreme_logits_stay_exact() -> None:
    """Logits of 1e4 apart and at 1e4 with differences of 1; powers of two and small integers, so that float32 holds them."""
    hidden = torch.tensor([[16384.0, 0.0], [-16384.0, 0.0], [16384.0, 1.0], [0.0, 1e4]])
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0], [-1.0, 0.0]])
    given = Problem(hidden, weight, torch.tensor([0, 3, 1, 0]), torch.ones(4), torch.ones(4))
    assert_equal(fused(given), reference(given))
    given.labels = torch.tensor([3, 0, 3, 2])  # the least likely ones
    assert_equal(fused(given), reference(given))


class LargestOutput(TorchDispatchMode):
    """Watches every operation: the most elements that one produced, and how many matrix products ran."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_one_chunk_are_the_largest_thing_made(dtype: torch.dtype) -> None:
    given = problem(tokens=400, vocab=1000, width=16, dtype=dtype)
    with LargestOutput() as watch:
        fused(given, chunk=32)
    assert watch.elements == 32 * 1000


@pytest.mark.parametrize(("trained", "products"), [("both", 4), ("hidden", 3), ("weight", 3), ("neither", 1)])
def test_gradients_that_nobody_wants_cost_nothing(trained: str, products: int) -> None:
    """Matrix products of one chunk: logits, and to train logits again, and one for each gradient."""
    given = problem()
    given.hidden.requires_grad_(trained in ("both", "hidden"))
    given.weight.requires_grad_(trained in ("both", "weight"))
    with LargestOutput() as watch:
        log_probs, _ = fused_log_probs(given.hidden, given.weight, given.labels, **options(given, chunk=13, with_entropy=False))
        if trained != "neither":
            log_probs.sum().backward()
    assert watch.products == products
    assert (given.hidden.grad is not None) == given.hidden.requires_grad
    assert (given.weight.grad is not None) == given.weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_valid": 38}, "vocab_valid=38 of a weight with 37 rows"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"chunk": 0}, "chunk=0"),
        ({"needed": torch.ones(3, dtype=torch.bool)}, r"needed has shape \(3,\) for 13 tokens"),
    ],
)
def test_arguments_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused(problem(), **changes)


def test_mixed_formats_are_refused() -> None:
    given = problem()
    given.weight = given.weight.bfloat16()
    with pytest.raises(ValueError, match="one dtype"):
        fused(given)


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Sharded:
    """A problem whose vocabulary is cut after `cut` rows; each rank's part is padded with NaN to 40 rows."""

    given: Problem
    cut: int
    temperature: float = 1.0
    needed: Tensor | None = None
    reduce_hidden_gradient: bool = True


def sharded_cases() -> dict[str, Sharded]:
    unlabelled = problem(seed=3)
    unlabelled.labels[[1, 4, 7]] = torch.tensor([-1, 37, -100])
    far_apart = problem(seed=4)
    far_apart.weight[18:] *= 100
    return {
        "halves": Sharded(problem(), 18, temperature=0.6),
        "bfloat16": Sharded(problem(dtype=torch.bfloat16), 18),
        "uneven": Sharded(problem(seed=1), 31),
        "second rank holds only padding": Sharded(problem(seed=2), 37),
        "positions without a label": Sharded(unlabelled, 18),
        "one shard outweighs the other by far": Sharded(far_apart, 18),
        "needed": Sharded(problem(seed=5), 18, needed=torch.arange(13) % 2 == 0),
        "nothing needed": Sharded(problem(seed=6), 18, needed=torch.zeros(13, dtype=torch.bool)),
        "unreduced": Sharded(problem(seed=7), 18, reduce_hidden_gradient=False),
    }


def run_rank(rank: int, folder: str) -> None:
    """All cases on one of two ranks; leaves outcomes and the number of collectives of each in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    calls = 0
    all_reduce = dist.all_reduce

    def counted_all_reduce(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return all_reduce(*arguments, **named)

    dist.all_reduce = counted_all_reduce
    outcomes = {}
    for name, case in sharded_cases().items():
        start, stop = ((0, case.cut), (case.cut, 37))[rank]
        shard = Problem(**{**vars(case.given), "weight": case.given.weight[start:stop]})
        calls = 0
        outcome = fused(
            padded(shard, 40 - (stop - start)),
            temperature=case.temperature,
            chunk=4,
            vocab_start=start,
            vocab_valid=stop - start,
            group=dist.group.WORLD,
            needed=case.needed,
            reduce_hidden_gradient=case.reduce_hidden_gradient,
        )
        outcomes[name] = (outcome, calls)
    torch.save(outcomes, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Outcome, int]]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", sharded_cases())
def test_two_ranks_equal_the_whole_vocabulary(name: str, two_ranks: list[dict[str, tuple[Outcome, int]]]) -> None:
    case = sharded_cases()[name]
    (first, first_calls), (second, second_calls) = (outcomes[name] for outcomes in two_ranks)
    counted = (case.given.labels >= 0) & (case.given.labels < 37)
    counted = counted if case.needed is None else counted & case.needed
    expected = reference(case.given, case.temperature, counted)

    weight_gradient = torch.cat([first.weight_gradient[: case.cut], second.weight_gradient[: 37 - case.cut]])
    assert first.weight_gradient[case.cut :].eq(0).all()
    assert second.weight_gradient[37 - case.cut :].eq(0).all()
    if case.reduce_hidden_gradient:
        assert torch.equal(first.hidden_gradient, second.hidden_gradient)
        hidden_gradient = first.hidden_gradient
    else:
        hidden_gradient = first.hidden_gradient + second.hidden_gradient
    assert torch.equal(first.log_probs, second.log_probs)
    assert torch.equal(first.entropy, second.entropy)
    assert_equal(Outcome(first.log_probs, first.entropy, hidden_gradient, weight_gradient), expected)

    # Maximum, sums, and the gradient of hidden: once for all four chunks, and not at all where nothing is needed.
    assert first_calls == second_calls == (2 + case.reduce_hidden_gradient if counted.any() else 0)
