"""What a run's settings put around a method's strategy."""

from __future__ import annotations

from fedloom.lora.sketches import SketchSize
from fedloom.methods.around import FewBits, SynchronisedSteps, WithControlVariates, WithOtherMoments
from fedloom.methods.client_half import Moments
from fedloom.methods.gradient_start import GradientStart
from fedloom.methods.masked_sums import MaskedSums, MeanOfFactors, Rule, SumOfProducts
from fedloom.methods.options import MethodOptions
from fedloom.methods.private_clients import PrivateClients
from fedloom.methods.strategy import Strategy
from fedloom.methods.traits import GRADIENT


def with_options(strategy: Strategy, options: MethodOptions, *, starts_fresh: bool) -> Strategy:
    """Return a method's strategy with what the options put around it."""
    rule: Rule = MeanOfFactors(strategy)
    if options.sketch_rank is not None:
        rule = SumOfProducts(strategy.cohort, SketchSize(options.sketch_rank, options.sketch_is_whole))
    if options.client_privacy is not None:
        strategy = rule = PrivateClients(strategy, options.client_privacy)
    if options.adamw is not None:
        strategy = SynchronisedSteps(strategy, options.adamw)
    if (moments := Moments(options.moments)) is not Moments.FRESH:
        strategy = WithOtherMoments(strategy, moments, options.moments_prior)
    if options.control_clients:
        strategy = WithControlVariates(strategy, options.control_clients)
    if options.few_bits:
        strategy = FewBits(strategy, not starts_fresh)
    if options.masked:
        strategy = MaskedSums(strategy, rule)
    return GradientStart(strategy) if options.initialisation == GRADIENT else strategy
