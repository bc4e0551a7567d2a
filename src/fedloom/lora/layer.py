"""A frozen causal LM with slots for adapters: what training, evaluation and generation see of the layer.

A slot holds raw factors and a scale s; outside, only the effective pair ``(s·b, a)`` is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fedloom.errors import AdapterError, ModelError
from fedloom.lora.algebra import united
from fedloom.lora.dropout import Dropout
from fedloom.lora.initial import check_rank
from fedloom.lora.linear import LoRALinear, is_transposed
from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.route import Owners, Route, Slot, chosen_of, samples_of
from fedloom.lora.transfer import moved_together
from fedloom.lora.turns import Turn

__all__ = ["LoRAModel", "Slot", "check_covers", "check_fits"]


class LoRAModel:
    """A frozen causal LM whose target modules carry slots for adapters and one side adapter for all of them.

    The model is wrapped in place, once; its own weights are never written. ``open`` makes room for a cohort,
    ``route`` says whose tokens the next passes hold, ``adapter`` reads a slot back as effective pairs. A module of
    ``may_be_narrow`` takes of a slot's rank what its smaller side can; of any other that is an error.

    Raises:
        ModelError: if a target is absent or is not a linear layer.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str], may_be_narrow: Collection[str] = ()) -> None:
        self.model = model.requires_grad_(False)
        self._may_be_narrow = frozenset(may_be_narrow)
        self._route = Route()
        self.layers: dict[str, LoRALinear] = {}
        self._ground, self._side = Adapter(), Adapter()
        for name in targets:
            self._wrap(name)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every target module."""
        return {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}

    @property
    def uses_conv1d(self) -> bool:
        """Whether the targets are GPT-2's transposed ``Conv1D`` (PEFT's ``fan_in_fan_out``)."""
        return any(is_transposed(layer.base) for layer in self.layers.values())

    @property
    def slots(self) -> list[Slot]:
        """The open slots."""
        return self._route.slots

    def check_rank(self, rank: int) -> None:
        """Reject a rank that a module cannot hold, unless that module may be narrow.

        Raises:
            AdapterError: naming the module.
        """
        named = {name: shape for name, shape in self.shapes.items() if name not in self._may_be_narrow}
        check_rank(named or dict.fromkeys(self.shapes, (rank, rank)), rank)

    @property
    def base_weight(self) -> Tensor:
        """A weight of the base, whose dtype and device are the activations'; a slot's are fp32, whatever the base's."""
        slots = {id(whole) for layer in self.layers.values() for whole in (layer.a_RI, layer.bt_RO)}
        return next(weight for weight in self.model.parameters() if id(weight) not in slots)

    def narrow(self, rank: int) -> dict[str, int]:
        """Return the modules that take less than this rank, with the rank they take."""
        return {name: min(shape) for name, shape in self.shapes.items() if min(shape) < rank}

    def open(self, slots: Sequence[Slot]) -> None:
        """Make room for a cohort, replacing any slots that were open.

        Raises:
            AdapterError: if a rank is below 1 or above the smaller side of a module that was named.
        """
        for slot in slots:
            self.check_rank(slot.rank)
        self.open_narrow(slots)

    def open_narrow(self, slots: Sequence[Slot]) -> None:
        """Make room as :meth:`open` does, in every module for as much of a rank as it can hold."""
        self._route.slots = list(slots)
        self.route_all(None)
        for layer in self.layers.values():
            layer.allocate()

    def close(self) -> None:
        """Free all slots; the side adapter stays."""
        self.open([])

    def load(self, slot: int, adapter: Adapter) -> None:
        """Copy an adapter of the slot's rank into it.

        Raises:
            AdapterError: if modules, shapes or ranks do not fit.
        """
        check_fits(adapter, self.shapes)
        rank, scale = self.slots[slot].rank, self.slots[slot].scale
        for name, layer in self.layers.items():
            if adapter[name].rank != min(rank, layer.most_rank):
                raise AdapterError(
                    f"expected rank {rank} in slot {slot}, got {adapter[name].rank} for {name}; "
                    "open the slot with the adapter's rank"
                )
        whole = [factor for name in self.layers for factor in (adapter[name].a_RI, adapter[name].b_OR)]
        moved = iter(moved_together(whole, self.base_weight.device))
        with torch.no_grad():
            for layer in self.layers.values():
                rows = self._route.rows_of(slot, layer.most_rank)
                layer.a_RI[rows].copy_(next(moved))
                layer.bt_RO[rows].copy_(next(moved).T).div_(scale)

    def adapter(self, slot: int) -> Adapter:
        """Return a copy of a slot as effective pairs, fp32 (fp64 for an fp64 model), on the CPU."""
        scale = self.slots[slot].scale
        moved = iter(moved_together([factor.detach() for factor in self.parameters(slot)], torch.device("cpu")))
        pairs = {}
        for name in self.layers:
            # Cloned, since nothing may have been copied yet, and the next step would change it.
            a_RI, b_OR = next(moved).clone(), next(moved).T.clone(memory_format=torch.contiguous_format).mul_(scale)
            pairs[name] = Pair(b_OR, a_RI)
        return Adapter(pairs)

    def parameters(self, slot: int) -> list[nn.Parameter]:
        """Return a slot's factors as leaf views whose ``.grad`` are views too: any torch optimiser can own them."""
        # Views, because a layer trains all its clients in one tensor (one product, one gradient), while an optimiser
        # must own one client's factors only: its moments, its clipping and its decay must not touch the others'. A
        # view of the weights and a view of the gradient give both without a copy in either direction.
        views = []
        for layer in self.layers.values():
            rows = self._route.rows_of(slot, layer.most_rank)
            for whole in (layer.a_RI, layer.bt_RO):
                view = nn.Parameter(whole.detach()[rows])
                view.grad = whole.grad[rows]  # type: ignore[index]
                views.append(view)
        return views

    def zero_grad(self) -> None:
        """Zero all slots' gradients in place: the optimisers' views must stay views of these tensors."""
        wholes = [whole for layer in self.layers.values() for whole in (layer.a_RI, layer.bt_RO)]
        torch._foreach_zero_([whole.grad for whole in wholes if whole.grad is not None])

    @property
    def ground(self) -> Adapter:
        """What is added to the base under every side."""
        return self._ground

    def set_ground(self, ground: Adapter) -> None:
        """Add a frozen adapter of any ranks to the base for good, whatever side comes and goes.

        Raises:
            AdapterError: if it covers a module that is not a target, or has another shape.
        """
        check_covers(ground, self.shapes)
        self._ground = ground
        self.set_side(self._side)

    def set_side(self, side: Adapter | None) -> None:
        """Add a frozen adapter of any ranks to the base and its ground, replacing the previous one.

        A module that the adapter does not cover gets nothing.

        Raises:
            AdapterError: if it covers a module that is not a target, or has another shape.
        """
        self._side = side or Adapter()
        check_covers(self._side, self.shapes)
        whole = united([self._ground, self._side])
        for name, layer in self.layers.items():
            layer.set_side(whole.get(name))

    def route(
        self,
        segments: Sequence[tuple[int, int]],
        dropout: Dropout | None = None,
        lengths: Sequence[int] = (),
        chosen_K: Tensor | None = None,
        turn: Turn | None = None,
    ) -> None:
        """Say which slot the token rows of this thread's next passes belong to: ``[(slot, num_tokens), ...]`` in order.

        ``dropout`` acts on the adapters' input in passes with gradients. With the ``lengths`` of the pass's samples a
        CPU sums the factors' gradients sample by sample: how a batch was cut into passes then changes no bit of them.
        ``chosen_K`` are the rows that modules may get alone (:mod:`fedloom.training.last_block`), by the lengths too.
        With a ``turn`` the pass is one of several at once, and adds its gradients in its turn.
        """
        samples = samples_of([count for _, count in segments], lengths)
        here, whole = self._route.here, Owners(list(segments), samples, dropout)
        here.everything_to, here.whole, here.turn = None, whole, turn
        here.chosen = None if chosen_K is None else chosen_of(whole, lengths, chosen_K)

    def route_all(self, slot: int | None, dropout: Dropout | None = None) -> None:
        """Send every token of this thread's next passes to one slot, or to none (base and side only)."""
        here = self._route.here
        here.everything_to, here.whole, here.chosen, here.turn = slot, Owners(dropout=dropout), None, None

    def routed_again(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what routes passes, in any thread, as this thread's are now; no gradients are added there."""
        return self._route.here.again()

    def unwrap(self) -> nn.Module:
        """Put the original modules back and return the model."""
        for name, layer in self.layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, layer.base)
        self.layers = {}
        return self.model

    def _wrap(self, name: str) -> None:
        try:
            base = self.model.get_submodule(name)
        except AttributeError:
            raise ModelError(
                f"model.target_modules: expected a module of {type(self.model).__name__}, got {name!r}; "
                "choose modules of this base"
            ) from None
        layer = LoRALinear(base, self._route, name)
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, layer)
        self.layers[name] = layer


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Reject an adapter whose modules or shapes are not exactly those given.

    Raises:
        AdapterError: naming the first module that differs.
    """
    check_covers(adapter, shapes)
    lacking = sorted(shapes.keys() - adapter.keys())
    if lacking:
        raise AdapterError(
            f"expected an adapter of {len(shapes)} modules of this base, it lacks module {lacking[0]}; "
            "use an adapter of these modules"
        )


def check_covers(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Reject an adapter that has a foreign module, or one of another shape.

    Raises:
        AdapterError: naming the first such module.
    """
    for name, pair in adapter.items():
        if name not in shapes:
            raise AdapterError(
                f"expected an adapter of {len(shapes)} modules of this base, it has the foreign module {name}; "
                "load it on the base it was trained on"
            )
        if pair.shape != shapes[name]:
            raise AdapterError(
                f"{name}: expected an adapter of shape {shapes[name]}, got {pair.shape}; "
                "it is for another base: load it on its own"
            )
