"""A site's part of a model that is cut, as its sheet says: blocks from disk, segments, and the plan it follows."""

from __future__ import annotations

from fedloom.assembly.inputs import lora_of
from fedloom.errors import MethodError
from fedloom.lora.layer import LoRAModel
from fedloom.models.load import BaseFolder
from fedloom.models.partial_load import client_part, skeleton
from fedloom.sites.sheet import Sheet, SheetSplit
from fedloom.sites.site_settings import SiteModel
from fedloom.split.plan import Segment, SplitPlan, block_of


def own_part(found: BaseFolder, model: SiteModel, sheet: Sheet, cut: SheetSplit) -> LoRAModel:
    """Load a site's blocks, and make room for adapters in those target modules that are among them.

    Raises:
        FedloomError: the base cannot be loaded or cut there.
    """
    part = client_part(found, cut.cut_layer, cut.tail_blocks, dtype=model.dtype, quantization=model.quantization)
    return lora_of(skeleton(found.path, found.is_trusted), sheet.target_modules, part)


def segments_of(cut: SheetSplit, lora: LoRAModel, client: int) -> list[Segment]:
    """Return the segments that the sheet names, over the modules that are held here.

    Raises:
        MethodError: they are not exactly the blocks held here.
    """
    blocks = [block for part in cut.segments for block in part]
    held = {module: block_of(lora.model, module) for module in lora.shapes}
    if len(set(blocks)) < len(blocks) or (cut.segments and set(held.values()) != set(blocks)):
        raise MethodError(
            f"expected segments over the blocks {sorted(set(held.values()))} held here, each once, got {blocks}; run "
            "the same version of fedloom on both sides"
        )
    return [
        Segment({module: lora.shapes[module] for module, block in held.items() if block in part}, (client,))
        for part in cut.segments
    ]


def plan_of(sheet: Sheet, cut: SheetSplit, num_rows: int) -> SplitPlan:
    """Return the plan as one site knows it."""
    # Clients are counted from 0, and of those before this one nothing is asked here.
    everybody = sheet.client + 1
    return SplitPlan(
        seed=sheet.seed,
        num_steps=cut.num_steps,
        aggregate_every=cut.aggregate_every,
        cut_layers=(cut.cut_layer,) * everybody,
        ranks=(sheet.rank,) * everybody,
        scales=(sheet.scale,) * everybody,
        server_rank=sheet.rank,
        server_scale=sheet.scale,
        num_rows={sheet.client: num_rows},
        training=sheet.local_training,
        tail_blocks=cut.tail_blocks,
        client_half=cut.client_half,
        wire_dtype=cut.wire_dtype,
        gradient_wire_dtype=cut.gradient_wire_dtype,
        error_feedback=cut.error_feedback,
        micro_batches=cut.micro_batches,
        max_length=sheet.max_length,
    )
