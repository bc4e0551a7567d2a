"""How the strategies of the shipped methods are made from a run's settings; loaded when one is run."""

from __future__ import annotations

from fedloom.methods import zero_padding as padding
from fedloom.methods.carry import Carry
from fedloom.methods.fedex import FedEx
from fedloom.methods.fedsa import FedSALoRA
from fedloom.methods.ffa_lora import FFALoRA
from fedloom.methods.flexlora import FlexLoRA
from fedloom.methods.flora import FLoRA, Initialisation
from fedloom.methods.options import MethodOptions
from fedloom.methods.rolora import RoLoRA
from fedloom.methods.standalone import Standalone
from fedloom.methods.strategy import Cohort, Strategy, Weighting
from fedloom.methods.weave import Weave


def fedit(cohort: Cohort, options: MethodOptions) -> Strategy:
    """Make FedIT."""
    return padding.fedit(cohort, Weighting(options.weighting))


def zero_padding(cohort: Cohort, options: MethodOptions) -> Strategy:
    """Make zero-padding."""
    return padding.ZeroPadding(cohort, Weighting(options.weighting))


def fedex_lora(cohort: Cohort, options: MethodOptions) -> Strategy:
    """Make FedEx-LoRA."""
    return FedEx(cohort, Weighting(options.weighting))


def weave(cohort: Cohort, options: MethodOptions) -> Strategy:
    """Make weave."""
    return Weave(cohort, Weighting(options.weighting))


def carry(cohort: Cohort, options: MethodOptions) -> Strategy:
    """Make carry."""
    return Carry(cohort, Weighting(options.weighting))


def flexlora(cohort: Cohort, options: MethodOptions) -> Strategy:
    """Make FlexLoRA."""
    return FlexLoRA(cohort, Weighting(options.weighting))


def ffa_lora(cohort: Cohort, options: MethodOptions) -> Strategy:
    """Make FFA-LoRA."""
    return FFALoRA(cohort, Weighting(options.weighting))


def rolora(cohort: Cohort, options: MethodOptions) -> Strategy:
    """Make RoLoRA."""
    return RoLoRA(cohort, Weighting(options.weighting))


def fedsa_lora(cohort: Cohort, options: MethodOptions) -> Strategy:
    """Make FedSA-LoRA."""
    return FedSALoRA(cohort, Weighting(options.weighting))


def flora(cohort: Cohort, options: MethodOptions) -> Strategy:
    """Make FLoRA."""
    return FLoRA(cohort, Weighting(options.weighting), Initialisation(options.initialisation))


def standalone(cohort: Cohort, _: MethodOptions) -> Strategy:
    """Make the control in which every client tunes for itself."""
    return Standalone(cohort)


def centralised(cohort: Cohort, _: MethodOptions) -> Strategy:
    """Make the control in which the one client owns all rows."""
    return Standalone(cohort, name="centralised")
